# SPDX-License-Identifier: Apache-2.0
"""Patches on quantized weights: which are in force for a weight, and how they are applied without touching its bytes.

A patch list is the host's own: tuples (strength, adapter, strength_model, offset, function). Plain LoRA is added on a
low-rank side path, or into the freshly dequantized weight when there are many tokens; everything else goes through the
host's calculate_weight on the dequantized weight, which is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter

from .compat import is_quantized

PatchList = list[tuple[float, Any, float, Any, Any]]
MODEL_PREFIX = "diffusion_model."  # before the names of a network in the host's models and patches


@dataclasses.dataclass(eq=False)
class PatchRef:
    """The patches of one weight, by reference: the same two attributes as the host's LowVramPatch.

    Attributes:
        key: state-dict key of the weight.
        patches: the patcher's dict {key: PatchList}.
    """

    key: str
    patches: dict[str, PatchList]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """One plain LoRA on a 2-D weight: W[rows, columns] += up @ down.

    Attributes:
        up: (n_rows, rank), the strength and alpha already multiplied in.
        down: (rank, n_columns).
        rows, columns: the part of the weight it acts on.
    """

    up: torch.Tensor
    down: torch.Tensor
    rows: slice
    columns: slice


class PatchableWeight:
    """Mixin: the places where a host or our patcher leaves patches for `self.weight`, and the one that is in force.

    Sources: the host's LowVramPatch in `weight_function` (offloaded layer), `_loaded_patch` (set by our patcher for a
    layer that is fully loaded) and `_dynamic_patch` (what a dynamic patcher assigns to `weight_lowvram_function`). They
    describe the same patches, so at most one is used; two can be set at once after a partial unload. `_hook_patch`
    comes on top: patches of the hooks that are active at this step.
    """

    _loaded_patch: PatchRef | None = None
    _dynamic_patch: Any = None
    _hook_patch: PatchRef | None = None

    @property
    def weight_lowvram_function(self) -> Any:
        """What a dynamic host sees: nothing for quantized weights, else it would quantize the patched weight again."""
        return None if is_quantized(self.weight) else self._dynamic_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        self._dynamic_patch = patch

    def base_patch(self) -> Any:
        """The patch reference in force apart from hooks, or None."""
        for function in self.weight_function:
            if is_patch(function):
                return function
        return self._loaded_patch or self._dynamic_patch

    def active_patches(self) -> PatchList:
        """All patches in force for this weight now, in order."""
        patches: PatchList = []
        for ref in (self.base_patch(), self._hook_patch):
            if ref is not None:
                patches = patches + ref.patches.get(ref.key, [])
        return patches

    def wrapper_functions(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Weight functions that are not patches (the host's weight wrappers); they run last, on the float weight."""
        return [f for f in self.weight_function if not is_patch(f)]


def is_patch(function: Any) -> bool:
    """Whether a weight function is a patch list in the host's wrapping."""
    return hasattr(function, "patches") and hasattr(function, "key")


def low_rank_patches(
    patches: PatchList, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> list[LowRank] | None:
    """The patches as low-rank factors on `device`, or None if one of them is anything but a plain LoRA."""
    factors = []
    for strength, adapter, strength_model, offset, function in patches:
        if not isinstance(adapter, LoRAAdapter) or function is not None or strength_model != 1.0 or len(shape) != 2:
            return None
        up, down, alpha, mid, dora_scale, reshape = adapter.weights
        if mid is not None or dora_scale is not None or reshape is not None:
            return None
        rows, columns = _target(shape, offset)
        if (up.shape[0], down[0].numel()) != (rows.stop - rows.start, columns.stop - columns.start):
            return None
        scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
        up = up.flatten(1).to(device=device, dtype=torch.float32, non_blocking=True) * scale
        down = down.flatten(1).to(device=device, dtype=dtype, non_blocking=True)
        factors.append(LowRank(up.to(dtype), down, rows, columns))
    return factors


def _target(shape: tuple[int, ...], offset: tuple[int, int, int] | None) -> tuple[slice, slice]:
    """Rows and columns that a patch with this offset (dim, start, length) acts on."""
    bounds = [slice(0, n) for n in shape]
    if offset is not None:
        dim, start, length = offset
        bounds[dim] = slice(start, start + length)
    return bounds[0], bounds[1]


def prefers_side_path(n_tokens: int, shape: torch.Size) -> bool:
    """Whether the side path costs fewer operations than adding the product to the weight.

    Side path: 2 r T (in + out); into the weight: 2 r in out. They meet at T = in out / (in + out).
    """
    n_out, n_in = shape
    return n_tokens * (n_in + n_out) <= n_in * n_out


def add_to_output(y: torch.Tensor, x: torch.Tensor, factors: list[LowRank]) -> torch.Tensor:
    """y += x down' up' for each factor, in the factors' dtype; y (..., out), x (..., in). Works in place on y."""
    for f in factors:
        hidden = torch.nn.functional.linear(x[..., f.columns].to(f.down.dtype), f.down)  # (..., rank)
        y[..., f.rows] += torch.nn.functional.linear(hidden, f.up)
    return y


def add_to_weight(weight: torch.Tensor, factors: list[LowRank]) -> torch.Tensor:
    """weight[rows, columns] += up @ down for each factor, in place on a private weight (out, in)."""
    for f in factors:
        part = weight[f.rows, f.columns]
        part.addmm_(f.up.to(weight.dtype), f.down.to(weight.dtype))
    return weight


def patch_weight(weight: torch.Tensor, patches: PatchList, key: str, original: Any) -> torch.Tensor:
    """All patches on a private float weight through the host, in the weight's own dtype.

    Args:
        original: the unpatched weight, for patches that are differences to it.
    """
    originals = {key: [(original, None)]}
    return comfy.lora.calculate_weight(
        patches, weight, key, intermediate_dtype=weight.dtype, original_weights=originals
    )
