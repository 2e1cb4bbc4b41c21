# SPDX-License-Identifier: Apache-2.0
"""GGML-aware layers for ComfyUI models: keep the bytes, dequantize in the forward, apply patches, multiply.

make_ops() gives the `custom_operations` of one load: a namespace of layer classes that carry that load's options, so
two loaded models never share them. Layers that cannot compute from bytes (norms, transposed convolutions) dequantize a
quantized weight when it is loaded. To make another layer keep its bytes, derive it from QuantizedLayer (host/layer.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.ops
import torch

from .dequant import dequantize_rows
from .host.compat import cast_weight, dequantize_weight, indexed_bytes, is_quantized, multiply, release_weight, wrap
from .host.layer import OpsOptions, QuantizedLayer, tensor_device
from .host.lazy_weight import LazyWeight
from .host.low_rank import LowRank, add_to_output, add_to_weight, prefers_side_path

# Vocabularies are padded by tens to hundreds of rows: Gemma 3 by 64, Llama 3 for pictures by 64, Qwen by 267.
MAX_SPARE_ROWS = 1024
MAX_SPARE_PART = 16  # and never by more than this part: a table of positions of another length is another model


class GGUFLinear(QuantizedLayer, comfy.ops.manual_cast.Linear):
    """Linear over a quantized weight (out, in): x (..., in) to (..., out) in x's dtype."""

    kind = "Linear"
    can_keep = True

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        if not is_quantized(self.weight):
            return super().forward_comfy_cast_weights(input)
        weight, bias, token = cast_weight(self, input, input.dtype)
        try:
            return self._multiply(input, weight, bias)
        finally:
            release_weight(self, weight, bias, token)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        factors = self._factors(x.device, x.dtype, tuple(weight.shape))
        if factors is None or self.wrapper_functions():
            return torch.nn.functional.linear(x, self.patched_weight(weight, x.dtype), bias)
        by_rows = is_quantized(weight) and not self.has_kept(weight.device, x.dtype)
        if not prefers_side_path(x.numel() // x.shape[-1], factors):
            # patch_dtype may ask for more precision than x has; for less, the weight itself is never rounded.
            dtype = torch.promote_types(x.dtype, factors[0].down.dtype)
            if not by_rows:
                dense = add_to_weight(self.float_weight(weight, dtype), factors)
                return torch.nn.functional.linear(x, dense.to(x.dtype), bias)

            def patch(part: torch.Tensor, first_row: int) -> torch.Tensor:
                return add_to_weight(part.to(dtype), factors, first_row)

            return multiply(x, weight, bias, self.options.dequant_dtype or dtype, patch)
        if by_rows:
            y = multiply(x, weight, bias, self.options.dequant_dtype or x.dtype)
        else:
            y = torch.nn.functional.linear(x, self.shared_weight(weight, x.dtype), bias)
        return add_to_output(y, x, factors)

    def _factors(
        self, device: torch.device, compute_dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[LowRank, ...] | None:
        """Low-rank factors of the patches in force, on a device, or None if they are not all plain LoRAs."""
        dtype = self._patch_dtype(compute_dtype, default=compute_dtype)
        return self.low_rank_factors(shape, device, dtype, self.options.patch_on_device)

    def prepare_patches(self, device: torch.device, dtype: torch.dtype) -> None:
        self._factors(tensor_device(device), dtype, tuple(self.weight.shape))


class _GGUFConv(QuantizedLayer):
    """Convolution over a quantized weight (out, in / groups, kernel...); always from the dense weight."""

    can_keep = True

    def forward_comfy_cast_weights(self, input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not is_quantized(self.weight):
            return super().forward_comfy_cast_weights(input, **kwargs)
        weight, bias, token = cast_weight(self, input, input.dtype)
        try:
            return self._conv_forward(input, self.patched_weight(weight, input.dtype), bias, **kwargs)
        finally:
            release_weight(self, weight, bias, token)


class GGUFConv1d(_GGUFConv, comfy.ops.manual_cast.Conv1d):
    """Conv1d over a quantized weight."""


class GGUFConv2d(_GGUFConv, comfy.ops.manual_cast.Conv2d):
    """Conv2d over a quantized weight."""


class GGUFConv3d(_GGUFConv, comfy.ops.manual_cast.Conv3d):
    """Conv3d over a quantized weight."""


class GGUFEmbedding(QuantizedLayer, comfy.ops.manual_cast.Embedding):
    """Embedding over a quantized table (n, dim): gathers byte rows and dequantizes only those.

    A vocabulary padded to a round size has a few rows more, or fewer, than the model has; they stand for no token.
    """

    kind = "Embedding"

    def _fits(self, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        n_spare = min(MAX_SPARE_ROWS, expected[0] // MAX_SPARE_PART)
        return found[1:] == expected[1:] and abs(found[0] - expected[0]) <= n_spare

    def _adopt(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, LazyWeight):
            value = value.module.weight
        n_missing = self.num_embeddings - value.shape[0]
        if n_missing < 0:
            value = value[: self.num_embeddings]
        elif n_missing > 0:
            value = torch.cat([value, _zero_rows(value, n_missing)])
        # Text generation multiplies with this table. Told that it needs no cast, the host leaves it quantized there.
        self.comfy_cast_weights = not is_quantized(value)
        return super()._adopt(name, value)

    def forward(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Looks up in our own way, whatever `comfy_cast_weights` is."""
        return self.forward_comfy_cast_weights(input, out_dtype=out_dtype)

    def forward_comfy_cast_weights(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        if not is_quantized(self.weight):
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        dtype = out_dtype or self.weight.dtype
        table = indexed_bytes(self.weight)
        if table is not None and self.max_norm is None and not self.active_patches() and not self.wrapper_functions():
            return self._gather(table, input, dtype)
        weight, bias, token = cast_weight(self, input, dtype)
        try:
            dense = self.patched_weight(weight, dtype)
            return torch.nn.functional.embedding(
                input, dense, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
        finally:
            release_weight(self, weight, bias, token)

    def _gather(self, table: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `index` (any shape) of the bytes (n, row_bytes) as (*index.shape, dim) on index's device."""
        rows = table.index_select(0, index.reshape(-1).to(table.device)).to(index.device)  # (n_index, row_bytes)
        values = dequantize_rows(rows, self.weight._params.qtype, self.options.dequant_dtype or dtype)
        return values.to(dtype).reshape(*index.shape, -1)


def _zero_rows(table: torch.Tensor, n: int) -> torch.Tensor:
    """Rows of zeros (n, dim) to be put below a table (n_rows, dim), quantized as it is."""
    by_index = indexed_bytes(table) if is_quantized(table) else None
    if by_index is None:
        return torch.zeros((n, *table.shape[1:]), dtype=table.dtype, device=table.device)
    # In every qtype a block of zero bytes is a block of zeros.
    spare = by_index.new_zeros((n, by_index.shape[1])).reshape(-1, table._qdata.shape[1])
    return wrap(spare, table._params.qtype, (n, *table.shape[1:]), table.dtype)


class _ExpertBank(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """The linear layers of all experts in one weight (n_experts, out, in), with the host's surface for such layers."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        empty = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(num_experts, out_features, in_features, **empty), False)
        self.bias = torch.nn.Parameter(torch.empty(num_experts, out_features, **empty), False) if bias else None


class GGUFMoEExperts(QuantizedLayer, _ExpertBank):
    """Experts over a quantized weight: dequantizes the expert that is used, not the bank, unless there are patches."""

    kind = "MoEExperts"
    _bank: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextlib.contextmanager
    def bank_resident(self, input: torch.Tensor) -> Iterator[GGUFMoEExperts]:
        """Keep the bank on input's device for the experts that are used within."""
        weight, bias, token = cast_weight(self, input, input.dtype)
        outer = self._bank
        try:
            patched = self.active_patches() or self.wrapper_functions()
            self._bank = (self.patched_weight(weight, input.dtype) if patched else weight), bias
            yield self
        finally:
            self._bank = outer
            release_weight(self, weight, bias, token)

    def expert_linear(self, input: torch.Tensor, i: int) -> torch.Tensor:
        """x (..., in) through expert i, to (..., out)."""
        if self._bank is None:
            with self.bank_resident(input):
                return self.expert_linear(input, i)
        weight, bias = self._bank
        if is_quantized(weight):
            rows = weight._qdata.reshape(self.num_experts, self.out_features, -1)[i]
            dtype = self.options.dequant_dtype or input.dtype
            expert = dequantize_rows(rows, weight._params.qtype, dtype).to(input.dtype)
        else:
            expert = weight[i].to(input.dtype)
        return torch.nn.functional.linear(input, expert, None if bias is None else bias[i])


class _FloatLayer:
    """Mixin over a host layer that computes from float weights: quantized ones are dequantized as they are loaded.

    Attributes:
        missing: names of parameters that the file did not have.
    """

    missing: frozenset[str] = frozenset()

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name not in state_dict:
                self.missing |= {name} if getattr(self, name, None) is not None else set()
            elif is_quantized(state_dict[prefix + name]):
                state_dict[prefix + name] = dequantize_weight(state_dict[prefix + name], torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)


_QUANTIZED_LAYERS = {
    "Linear": GGUFLinear,
    "Conv1d": GGUFConv1d,
    "Conv2d": GGUFConv2d,
    "Conv3d": GGUFConv3d,
    "Embedding": GGUFEmbedding,
    "MoEExperts": GGUFMoEExperts,
}
_FLOAT_LAYERS = ("LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm2d", "ConvTranspose1d", "ConvTranspose2d")


def make_ops(options: OpsOptions | None = None) -> type:
    """The layer classes of one load, as the host's `custom_operations`."""
    options = options or OpsOptions()
    layers: dict[str, Any] = {
        name: type(f"GGUF{name}", (base,), {"options": options}) for name, base in _QUANTIZED_LAYERS.items()
    }
    for name in _FLOAT_LAYERS:
        base = getattr(comfy.ops.manual_cast, name, None)
        if base is not None:
            layers[name] = type(f"GGUF{name}", (_FloatLayer, base), {})
    return type("GGUFOps", (comfy.ops.manual_cast,), layers)
