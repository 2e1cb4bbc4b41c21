# SPDX-License-Identifier: Apache-2.0
"""Patches on quantized weights: which are in force for a weight, and how they are applied without touching its bytes.

A patch list is the host's own: tuples (strength, adapter, strength_model, offset, function). Plain LoRA is added on a
low-rank side path, or into the freshly dequantized weight when there are many tokens (low_rank.py); everything else
goes through the host's calculate_weight on the dequantized weight, which is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.lora
import torch

from .compat import is_quantized
from .kept_factors import factors_of, hand_over
from .low_rank import LowRank, Patch

PatchList = list[Patch]
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
        hand_over(self._dynamic_patch, patch)  # dynamic hosts make all patches anew for every run
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

    def low_rank_factors(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, keep_all: bool
    ) -> tuple[LowRank, ...] | None:
        """All patches in force now as low-rank factors, or None if one of them is anything but a plain LoRA.

        Those of the hooks are apart: they come and go while the others stay.
        """
        found: tuple[LowRank, ...] = ()
        for ref in (self.base_patch(), self._hook_patch):
            factors = () if ref is None else factors_of(ref, shape, device, dtype, keep_all)
            if factors is None:
                return None
            found += factors
        return found

    def wrapper_functions(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Weight functions that are not patches (the host's weight wrappers); they run last, on the float weight."""
        return [f for f in self.weight_function if not is_patch(f)]


def is_patch(function: Any) -> bool:
    """Whether a weight function is a patch list in the host's wrapping."""
    return hasattr(function, "patches") and hasattr(function, "key")


def patch_weight(weight: torch.Tensor, patches: PatchList, key: str, original: Any) -> torch.Tensor:
    """All patches on a private float weight through the host, in the weight's own dtype.

    Args:
        original: the unpatched weight, for patches that are differences to it.
    """
    originals = {key: [(original, None)]}
    return comfy.lora.calculate_weight(
        patches, weight, key, intermediate_dtype=weight.dtype, original_weights=originals
    )
