# SPDX-License-Identifier: Apache-2.0
"""GGML-aware layers for ComfyUI models: keep the bytes, dequantize in the forward, apply patches, multiply.

make_ops() gives the `custom_operations` of one load: a namespace of layer classes that carry that load's options, so
two loaded models never share them. Layers that cannot compute from bytes (norms, transposed convolutions) dequantize a
quantized weight when it is loaded. To make another layer keep its bytes, derive it from QuantizedLayer here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import comfy.float
import comfy.ops
import torch

from .dequant import dequantize_rows
from .host.compat import (
    as_param,
    cast_weight,
    dequantize_weight,
    indexed_bytes,
    is_quantized,
    release_weight,
    with_dtype,
    wrap,
)
from .host.lora import (
    PatchableWeight,
    add_to_output,
    add_to_weight,
    low_rank_patches,
    patch_weight,
    prefers_side_path,
)

# Vocabularies are padded by tens to hundreds of rows: Gemma 3 by 64, Llama 3 for pictures by 64, Qwen by 267.
MAX_SPARE_ROWS = 1024
_LazyDevice = collections.namedtuple("_LazyDevice", ["type", "index"])


@dataclasses.dataclass(frozen=True)
class OpsOptions:
    """How the layers of one loaded model compute.

    Attributes:
        dequant_dtype: dtype the weights are rounded to before they are cast to the compute dtype; None: only that.
        patch_dtype: dtype in which LoRA and other patches are computed; "target": the compute dtype; None: the compute
            dtype for plain LoRA, float32 for all that changes the weight itself.
        patch_on_device: keep the LoRA factors on the compute device between steps.
    """

    dequant_dtype: torch.dtype | None = None
    patch_dtype: torch.dtype | Literal["target"] | None = None
    patch_on_device: bool = False


class LazyWeight(torch.Tensor):
    """What state_dict() holds for a quantized weight: a float tensor that is made when somebody computes with it.

    The host weighs a model by its state dict and saves it through safetensors, which calls .to("cpu") on each tensor
    just before writing it. So it reports the bytes the weight occupies, its logical shape and dtype, and makes the
    float weight, patches merged, when it is moved, converted or used.

    Attributes:
        module: the layer that holds the weight.
    """

    module: Any

    @staticmethod
    def __new__(cls, module: Any) -> LazyWeight:
        shell = torch.empty(module.weight.shape, dtype=module.weight.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shell)

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def device(self) -> Any:
        return _LazyDevice("gguf-lazy", 0)

    @property
    def nbytes(self) -> int:
        return self.module.weight._qdata.nbytes

    def nelement(self) -> int:
        return self.nbytes

    def element_size(self) -> int:
        return 1

    def detach(self) -> LazyWeight:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        return self

    def merged(self) -> torch.Tensor:
        """The float weight with the patches in force."""
        patch = self.module.base_patch()
        return self.module.merged_weight(self.module.active_patches(), patch.key if patch else "")

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.merged().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Questions about shape and kind are answered by the shell; everything else computes with the float weight."""
        if func in _ANSWERED_BY_SHELL:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_merge_all(args), **_merge_all(kwargs or {}))


_ANSWERED_BY_SHELL = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "layout", "ndim", "requires_grad", "is_meta")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_sparse", "is_nested", "is_quantized")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_inference")),
    *(getattr(torch.Tensor, name) for name in ("is_floating_point", "untyped_storage", "data_ptr", "__len__")),
}


def _merge_all(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value.merged()
    if isinstance(value, dict):
        return {k: _merge_all(v) for k, v in value.items()}
    return type(value)(_merge_all(v) for v in value) if type(value) in (list, tuple) else value


class QuantizedLayer(PatchableWeight):
    """Mixin over a host layer whose weight may be quantized; with a float weight it is the host's own layer.

    Attributes:
        options: the options of this load.
        weight: quantized or float parameter (out, in, ...), None until it is loaded.
        bias: float parameter (out,) or None.
        missing: names of parameters that the file did not have; they are zero.
    """

    options = OpsOptions()
    missing: frozenset[str] = frozenset()
    comfy_cast_weights = True

    def __init__(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        # Built on the meta device: shapes and attributes of the host's layer without memory for its weights.
        super().__init__(*args, device="meta", dtype=dtype, **kwargs)
        self._expected_shapes = {
            name: tuple(p.shape) for name, p in (("weight", self.weight), ("bias", self.bias)) if p is not None
        }
        self.weight = None
        self.bias = None
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype

    # -- state --

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take weight and bias as they are, without a copy, whatever the host says about assigning."""
        for name, shape in self._expected_shapes.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                if self._parameters[name] is None:
                    self._fill_missing(name, shape)
            elif not self._fits(tuple(value.shape), shape):
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: {tuple(value.shape)} in the file, {shape} in the model"
                )
            else:
                self._parameters[name] = self._adopt(name, value)
                self.missing -= {name}
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix)
                and "." not in key[len(prefix) :]
                and key[len(prefix) :] not in self._expected_shapes
            ]

    def _fits(self, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        return found == expected

    def _fill_missing(self, name: str, shape: tuple[int, ...]) -> None:
        # One zero seen everywhere: whole models can be missing, of a picture part or of a file that is then refused.
        zeros = torch.zeros((), dtype=self.weight_comfy_model_dtype).expand(shape)
        self._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
        self.missing |= {name}

    def _adopt(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, LazyWeight):
            value = value.module.weight
        if not is_quantized(value):
            return torch.nn.Parameter(value, requires_grad=False)
        if name == "bias":
            return torch.nn.Parameter(dequantize_weight(value, torch.float32), requires_grad=False)
        return as_param(with_dtype(value, self.weight_comfy_model_dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if is_quantized(value):
                destination[prefix + name] = self.lazy_weight()
            elif value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def lazy_weight(self) -> LazyWeight:
        """The weight as others may save or convert it."""
        return LazyWeight(self)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        """Move or convert by putting new parameters in place; torch's own way writes into the old ones."""
        for name, value in self._parameters.items():
            if value is not None:
                new = fn(value)
                self._parameters[name] = as_param(new) if is_quantized(new) else torch.nn.Parameter(new, False)
        return self

    # -- what a host's patcher calls when it patches a weight itself --

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Quantized to float, for arithmetic; float weights pass."""
        return dequantize_weight(weight, weight.dtype) if is_quantized(weight) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool | None = None,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Put a patched float weight in place of the loaded one, or only return it, in the loaded dtype, to be saved.

        In place it is rounded to the wider of the loaded and the model's dtype: a BF16 tensor in a float32 model loses
        nothing. Older hosts call this in every forward of an offloaded layer, without inplace_update: the same then.
        """
        loaded, model = self.weight.dtype, self.weight_comfy_model_dtype or self.weight.dtype
        to_save = return_weight and inplace_update is not None
        dtype = loaded if to_save else max(loaded, model, key=lambda d: d.itemsize)
        weight = comfy.float.stochastic_rounding(weight, dtype, seed=seed or 0)
        if return_weight:
            return weight
        # After an update "in place" the host keeps its tensor, and later writes other values into the parameter.
        own = weight.clone() if inplace_update else weight
        self._parameters["weight"] = torch.nn.Parameter(own, requires_grad=False)
        return None

    def merged_weight(self, patches: list[Any], key: str, device: Any = None) -> torch.Tensor:
        """The weight with `patches`, computed in float32 on `device`, in the dtype that the weight claims."""
        weight = self.weight if device is None else self.weight.to(device=device)
        merged = dequantize_weight(weight, torch.float32)
        return (patch_weight(merged, patches, key, weight) if patches else merged).to(weight.dtype)

    # -- forward --

    def float_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight that cast_weight() gave, as a private float tensor without patches."""
        if not is_quantized(weight):
            return weight.to(dtype, copy=True)
        return dequantize_weight(weight, self.options.dequant_dtype or dtype).to(dtype)

    def patched_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same with all patches in force and the host's weight wrappers applied, rounded once to `dtype`."""
        patches, wrappers = self.active_patches(), self.wrapper_functions()
        if not patches:
            result = self.float_weight(weight, dtype)
        else:
            patch_dtype = self._patch_dtype(dtype, default=torch.float32)
            key = (self.base_patch() or self._hook_patch).key
            result = patch_weight(self.float_weight(weight, patch_dtype), patches, key, weight).to(dtype)
        for function in wrappers:
            result = function(result)
        return result

    def _patch_dtype(self, compute_dtype: torch.dtype, default: torch.dtype) -> torch.dtype:
        chosen = self.options.patch_dtype
        return compute_dtype if chosen == "target" else chosen or default


class GGUFLinear(QuantizedLayer, comfy.ops.manual_cast.Linear):
    """Linear over a quantized weight (out, in): x (..., in) to (..., out) in x's dtype."""

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        if not is_quantized(self.weight):
            return super().forward_comfy_cast_weights(input)
        weight, bias, token = cast_weight(self, input, input.dtype)
        try:
            return self._multiply(input, weight, bias)
        finally:
            release_weight(self, weight, bias, token)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        patches = self.active_patches()
        factors = self._factors(patches, weight.shape, x) if patches else []
        if factors is None or self.wrapper_functions():
            return torch.nn.functional.linear(x, self.patched_weight(weight, x.dtype), bias)
        dense = self.float_weight(weight, x.dtype)
        if factors and not prefers_side_path(x.numel() // x.shape[-1], weight.shape):
            return torch.nn.functional.linear(x, add_to_weight(dense, factors), bias)
        return add_to_output(torch.nn.functional.linear(x, dense, bias), x, factors)

    def _factors(self, patches: list[Any], shape: torch.Size, x: torch.Tensor) -> Any:
        """Low-rank factors of the patches, kept on the device between calls if the user asked for it."""
        dtype = self._patch_dtype(x.dtype, default=x.dtype)
        holder = self.base_patch() or self._hook_patch
        keep = self.options.patch_on_device and self._hook_patch is None
        if keep and getattr(holder, "_gguf_factors", (None,))[0] == (x.device, dtype):
            return holder._gguf_factors[1]
        factors = low_rank_patches(patches, tuple(shape), x.device, dtype)
        if keep and factors is not None:
            holder._gguf_factors = ((x.device, dtype), factors)
        return factors


class _GGUFConv(QuantizedLayer):
    """Convolution over a quantized weight (out, in / groups, kernel...); always from the dense weight."""

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

    def _fits(self, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        return found[1:] == expected[1:] and abs(found[0] - expected[0]) <= MAX_SPARE_ROWS

    def _adopt(self, name: str, value: torch.Tensor) -> torch.Tensor:
        n_missing = self.num_embeddings - value.shape[0]
        if not n_missing:
            return super()._adopt(name, value)
        if isinstance(value, LazyWeight):
            value = value.module.weight
        if n_missing < 0:
            return super()._adopt(name, value[: self.num_embeddings])
        rows = torch.zeros((n_missing, *value.shape[1:]), dtype=value.dtype)
        if is_quantized(value):
            spare = torch.zeros((n_missing, value._qdata.shape[1]), dtype=torch.uint8)  # a block of zero bytes is zeros
            rows = wrap(spare, value._params.qtype, tuple(rows.shape), value.dtype)
        return super()._adopt(name, torch.cat([value, rows]))

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
    """Experts over a quantized weight: dequantizes the expert that is used, not the bank."""

    _bank: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextlib.contextmanager
    def bank_resident(self, input: torch.Tensor) -> Iterator[GGUFMoEExperts]:
        """Keep the bank on input's device for the experts that are used within."""
        weight, bias, token = cast_weight(self, input, input.dtype)
        patched = self.active_patches() or self.wrapper_functions()
        self._bank = (self.patched_weight(weight, input.dtype) if patched else weight), bias
        try:
            yield self
        finally:
            self._bank = None
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
            expert = weight[i]
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
}
_FLOAT_LAYERS = ("LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm2d", "ConvTranspose1d", "ConvTranspose2d")


def make_ops(options: OpsOptions | None = None) -> type:
    """The layer classes of one load, as the host's `custom_operations`."""
    options = options or OpsOptions()
    layers: dict[str, Any] = {
        name: type(f"GGUF{name}", (base,), {"options": options}) for name, base in _QUANTIZED_LAYERS.items()
    }
    layers["MoEExperts"] = type("GGUFMoEExperts", (GGUFMoEExperts,), {"options": options})
    for name in _FLOAT_LAYERS:
        base = getattr(comfy.ops.manual_cast, name, None)
        if base is not None:
            layers[name] = type(f"GGUF{name}", (_FloatLayer, base), {})
    return type("GGUFOps", (comfy.ops.manual_cast,), layers)
