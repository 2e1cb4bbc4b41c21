# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between ComfyUI versions: how a quantized weight is represented, cast and loaded.

Two representations of a weight, one surface. Where the host's comfy.quant_ops uses comfy_kitchen, a weight is a plain
comfy_kitchen QuantizedTensor with GGUFLayout, so that the host can page, pin and copy its bytes; on older hosts it is
GGUFTensor below. Both show the logical shape and a float dtype, and hold the bytes in `_qdata`, uint8 (n_rows,
row_bytes). Features are detected, versions are never compared. To support a new host, change this file; native.py for
layers that the host itself quantized, file_bytes.py for what it does with files and pinned memory.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from gguf.constants import GGMLQuantizationType

from ..dequant import dequantize_rows
from .product import Change, multiply_rows
from .weight_params import WeightParams

HostTensor = getattr(comfy.quant_ops, "QuantizedTensor", torch.Tensor)
# Asked of the host's class, not of the package: an older host may stand beside an installed comfy_kitchen.
HAS_KITCHEN = HostTensor.__module__.startswith("comfy_kitchen.")
LAYOUT_NAME = "GGUFLayout"


def _dequantize(qdata: torch.Tensor, params: WeightParams, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_rows(qdata, params.qtype, dtype).reshape(params.orig_shape)


def _fill(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy a quantized weight into a float tensor, rounded once to its dtype, and mark that it was quantized."""
    dst.copy_(dequantize_weight(src, dst.dtype), non_blocking=non_blocking)
    dst._gguf_was_quantized = True
    return dst


# -- Row operations: a slice of dim 0 is a slice of bytes, so model code that splits a fused qkv keeps it quantized. --


def indexed_bytes(weight: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a quantized weight by index of dim 0: uint8 (shape[0], bytes), or None when a row spans two."""
    n, qdata = weight.shape[0] if weight.dim() > 1 else 0, weight._qdata
    return qdata.reshape(n, -1) if n and qdata.shape[0] % n == 0 else None


def _slice_rows(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    row_bytes = weight._qdata.shape[1]
    params = dataclasses.replace(weight._params, orig_shape=(stop - start, *weight.shape[1:]))
    return _build(indexed_bytes(weight)[start:stop].reshape(-1, row_bytes), params)


def _slice_op(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    dim, start, stop, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    if dim != 0 or step != 1 or indexed_bytes(weight) is None:
        return torch.ops.aten.slice.Tensor(weight.dequantize(), dim, start, stop, step)
    start, stop, _ = slice(start, stop).indices(weight.shape[0])
    return _slice_rows(weight, start, max(start, stop))


def _narrow_op(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    _, dim, start, length = args
    return _slice_op(weight, (weight, dim, start, start + length), {})


def _split_op(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    size, dim = args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    sizes = [size] * -(-weight.shape[dim] // size) if isinstance(size, int) else size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        _slice_op(weight, (weight, dim, start, min(start + n, weight.shape[dim])), {})
        for start, n in zip(starts, sizes, strict=True)
    ]


def _chunk_op(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    n_chunks, dim = args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return _split_op(weight, (weight, -(-weight.shape[dim] // n_chunks), dim), {})


def _cat_op(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    head = tensors[0]
    same = all(
        is_quantized(t)
        and indexed_bytes(t) is not None
        and t._params.qtype == head._params.qtype
        and t.shape[1:] == head.shape[1:]
        and t._qdata.shape[1] == head._qdata.shape[1]
        for t in tensors
    )
    if dim != 0 or not same:
        return torch.cat([t.dequantize() if is_quantized(t) else t for t in tensors], dim)
    shape = (sum(t.shape[0] for t in tensors), *head.shape[1:])
    params = dataclasses.replace(head._params, orig_shape=shape)
    return _build(torch.cat([t._qdata for t in tensors]), params)


def _linear_op(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, bias = (*args, None)[:3]
    if not is_quantized(weight) or is_quantized(x) or weight.dim() != 2:
        x, weight = (t.dequantize() if is_quantized(t) else t for t in (x, weight))
        return torch.nn.functional.linear(x, weight, bias)
    return multiply(x, weight, bias, weight.dtype)


def _to_device_op(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    _, device, dtype, non_blocking, copy = (*args, False, False)[:5]
    named = {"non_blocking": non_blocking, "copy": copy} | {k: v for k, v in kwargs.items() if k != "memory_format"}
    return _build(weight._qdata.to(device, **named), dataclasses.replace(weight._params, orig_dtype=dtype))


def _view_op(make: Callable[..., Any]) -> Callable[..., Any]:
    """A view in the mode of its weight: torch counts the versions of both, and inference mode makes what has none."""

    def view(weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.inference_mode(weight.is_inference()):
            return make(weight, args, kwargs)

    return view


def _float_view_op(op: Any) -> Callable[..., Any]:
    return _view_op(lambda weight, args, kwargs: op(_floats(weight), *args[1:], **kwargs))


def _floats(weight: torch.Tensor) -> torch.Tensor:
    """A weight as floats: of the dtype that it claims in a model, without loss before it is in one."""
    return dequantize_weight(weight, torch.float32) if is_loading(weight) else weight.dequantize()


_FLOAT_VIEWS = "unsqueeze view t transpose.int permute expand select.int squeeze squeeze.dim squeeze.dims unbind.int"
_ROW_OPS: dict[Any, Callable[..., Any]] = {
    # Text generation multiplies with the embedding table: weight.to(x), then linear. Only inference mode gets here.
    torch.ops.aten.to.device: _to_device_op,
    torch.ops.aten.linear.default: _linear_op,
    torch.ops.aten.slice.Tensor: _view_op(_slice_op),
    # Inference mode does not take these apart into slices.
    torch.ops.aten.narrow.default: _view_op(_narrow_op),
    torch.ops.aten.chunk.default: _view_op(_chunk_op),
    torch.ops.aten.split.Tensor: _view_op(_split_op),
    torch.ops.aten.split.sizes: _view_op(_split_op),
    torch.ops.aten.split_with_sizes.default: _view_op(_split_op),
    torch.ops.aten.cat.default: _cat_op,
} | {
    op: _float_view_op(op)
    for name, _, overload in (text.partition(".") for text in _FLOAT_VIEWS.split())
    for op in [getattr(getattr(torch.ops.aten, name), overload or "default")]
}


# -- The two representations. --

if HAS_KITCHEN:
    from comfy_kitchen.tensor import QuantizedLayout, register_layout_class, register_layout_op

    class GGUFLayout(QuantizedLayout):
        """comfy_kitchen layout of ggml blocks; one inner tensor, no tensor fields."""

        Params = WeightParams

        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> Any:
            raise NotImplementedError(
                "GGUF weights are never quantized again by the host; patches are applied in the forward"
            )

        @classmethod
        def dequantize(cls, qdata: torch.Tensor, params: WeightParams) -> torch.Tensor:
            return _dequantize(qdata, params, params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor: Any) -> tuple[torch.Tensor, ...]:
            return (qtensor._qdata,)

        @classmethod
        def state_dict_tensors(cls, qdata: torch.Tensor, params: WeightParams) -> dict[str, torch.Tensor]:
            return {"": qdata}

        @classmethod
        def supports_fast_matmul(cls) -> bool:
            return False

    register_layout_class(LAYOUT_NAME, GGUFLayout)
    for _op, _handler in _ROW_OPS.items():
        register_layout_op(_op, GGUFLayout)(_handler)

    class _LoadedWeight(HostTensor):
        """A weight on its way into a model. Where a module of the host copies it, floats arrive there."""

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and not isinstance(args[0], HostTensor):
                return _fill(*args)
            if func is torch.ops.aten.detach.default:  # what nn.Parameter() does, where the host assigns
                return _view_op(lambda weight, *_: _build_loaded(weight._qdata, weight._params))(args[0], args, {})
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _build(qdata: torch.Tensor, params: WeightParams) -> torch.Tensor:
        return HostTensor(qdata, LAYOUT_NAME, params)

    def _build_loaded(qdata: torch.Tensor, params: WeightParams) -> torch.Tensor:
        return _LoadedWeight(qdata, LAYOUT_NAME, params)

    def is_quantized(tensor: Any) -> bool:
        """Whether `tensor` is a weight of ours that still holds its bytes."""
        return isinstance(tensor, HostTensor) and tensor._layout_cls == LAYOUT_NAME

    def is_loading(weight: torch.Tensor) -> bool:
        """Whether a weight of ours is on its way into a model."""
        return isinstance(weight, _LoadedWeight)

else:

    class GGUFTensor(HostTensor):
        """A quantized weight for hosts without comfy_kitchen; operations it does not know see a dequantized copy.

        Not called QuantizedTensor on purpose: these hosts pin tensors of that name by their logical size.
        """

        @staticmethod
        def __new__(cls, qdata: torch.Tensor, params: WeightParams) -> GGUFTensor:
            return torch.Tensor._make_wrapper_subclass(
                cls, params.orig_shape, device=qdata.device, dtype=params.orig_dtype, requires_grad=False
            )

        def __init__(self, qdata: torch.Tensor, params: WeightParams) -> None:
            self._qdata = qdata
            self._params = params

        def __repr__(self) -> str:
            return f"GGUFTensor({self._params.qtype.name}, shape={tuple(self.shape)}, dtype={self.dtype})"

        @property
        def nbytes(self) -> int:
            return self._qdata.nbytes

        def data_ptr(self) -> int:
            return self._qdata.data_ptr()

        def is_pinned(self) -> bool:
            return self._qdata.is_pinned()

        def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def dequantize(self) -> torch.Tensor:
            return _dequantize(self._qdata, self._params, self._params.orig_dtype)

        def __tensor_flatten__(self) -> tuple[list[str], WeightParams]:
            return ["_qdata"], self._params

        @staticmethod
        def __tensor_unflatten__(
            inner: dict[str, torch.Tensor], params: WeightParams, size: Any, stride: Any
        ) -> GGUFTensor:
            return GGUFTensor(inner["_qdata"], params)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            handler = _GENERIC_OPS.get(func) or _ROW_OPS.get(func)
            if handler is not None:
                return handler(args[0], args, kwargs)
            return func(*_dequantize_all(args), **_dequantize_all(kwargs))

    def _dequantize_all(value: Any) -> Any:
        if isinstance(value, GGUFTensor):
            return value.dequantize()
        if isinstance(value, dict):
            return {k: _dequantize_all(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(_dequantize_all(v) for v in value)
        return value

    def _with_bytes(weight: GGUFTensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> GGUFTensor:
        return GGUFTensor(fn(weight._qdata), weight._params)

    def _to_op(weight: GGUFTensor, args: Any, kwargs: dict[str, Any], copy: bool = False) -> GGUFTensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for arg in args[1:]:
            device = arg if isinstance(arg, torch.device) else device
            dtype = arg if isinstance(arg, torch.dtype) else dtype
        params = weight._params if dtype is None else dataclasses.replace(weight._params, orig_dtype=dtype)
        non_blocking = bool(kwargs.get("non_blocking", False))
        qdata = weight._qdata.to(device=device, non_blocking=non_blocking, copy=copy)
        return GGUFTensor(qdata, params)

    def _empty_like_op(weight: GGUFTensor, args: Any, kwargs: dict[str, Any]) -> GGUFTensor:
        dtype = kwargs.get("dtype") or weight._params.orig_dtype
        qdata = torch.empty_like(weight._qdata, device=kwargs.get("device"))
        return GGUFTensor(qdata, dataclasses.replace(weight._params, orig_dtype=dtype))

    def _copy_op(dst: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        src, non_blocking = args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        if not isinstance(dst, GGUFTensor):
            return _fill(dst, src, non_blocking)
        if not isinstance(src, GGUFTensor):
            raise TypeError("a float tensor cannot be copied into a quantized GGUF weight")
        dst._qdata.copy_(src._qdata, non_blocking=non_blocking)
        dst._params = dataclasses.replace(src._params, orig_dtype=dst._params.orig_dtype)
        return dst

    _GENERIC_OPS: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.detach.default: lambda w, args, kwargs: _with_bytes(w, torch.Tensor.detach),
        torch.ops.aten.clone.default: lambda w, args, kwargs: _with_bytes(w, torch.Tensor.clone),
        torch.ops.aten._to_copy.default: lambda w, args, kwargs: _to_op(w, args, kwargs, copy=True),
        torch.ops.aten.to.dtype_layout: _to_op,
        torch.ops.aten.to.dtype: _to_op,
        torch.ops.aten.empty_like.default: _empty_like_op,
        torch.ops.aten.copy_.default: _copy_op,
        torch.ops.aten._has_compatible_shallow_copy_type.default: lambda w, args, kwargs: True,
    }

    def _build(qdata: torch.Tensor, params: WeightParams) -> torch.Tensor:
        return GGUFTensor(qdata, params)

    _build_loaded = _build

    def is_quantized(tensor: Any) -> bool:
        """Whether `tensor` is a weight of ours that still holds its bytes."""
        return isinstance(tensor, GGUFTensor)

    def is_loading(weight: torch.Tensor) -> bool:
        """Whether a weight of ours is on its way into a model and known to be: never, in these hosts."""
        return False


# -- The surface that ops, patcher and nodes use. --


def wrap(
    data: torch.Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Make a weight for the host out of a file's bytes; nothing is copied.

    Args:
        data: uint8 (n_rows, row_bytes), contiguous, on any device.
        qtype: encoding of the bytes.
        shape: logical shape, torch order.
        dtype: the float dtype to claim. The host reads it when it chooses a model dtype; bfloat16 leaves it free.
    """
    return _build_loaded(data, WeightParams(qtype, dtype, tuple(shape)))


def as_param(weight: torch.Tensor) -> torch.Tensor:
    """Mark a quantized weight as a parameter without nn.Parameter(), whose detach fails across inference mode."""
    weight._is_param = True
    return weight


def with_dtype(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The same bytes as a model keeps them, under another claimed float dtype (None: the one they have)."""
    return _build(weight._qdata, dataclasses.replace(weight._params, orig_dtype=dtype or weight._params.orig_dtype))


def with_bytes(weight: torch.Tensor, qdata: torch.Tensor) -> torch.Tensor:
    """The same weight over another copy of its bytes."""
    return _build(qdata, weight._params)


def filled_from_quantized(tensor: torch.Tensor) -> bool:
    """Whether the host has copied a quantized weight into this float tensor."""
    return getattr(tensor, "_gguf_was_quantized", False)


def dequantize_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A quantized weight as a fresh float tensor of its logical shape, rounded once to `dtype`."""
    return _dequantize(weight._qdata, weight._params, dtype)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    change: Change | None = None,
) -> torch.Tensor:
    """x (..., in) times a quantized weight (out, in), as multiply_rows()."""
    rows = indexed_bytes(weight)
    if rows is not None:
        return multiply_rows(x, rows, weight._params.qtype, bias, dtype, change)
    dense = dequantize_weight(weight, dtype)
    return torch.nn.functional.linear(x, (change(dense, 0) if change else dense).to(x.dtype), bias)


class _CastView:
    """An op as the host's cast should see it: everything of the op, but no weight functions.

    The functions would make the host dequantize before our op can choose how; assigning to the op itself instead would
    change state that another thread or a compiled graph reads.
    """

    def __init__(self, op: Any) -> None:
        object.__setattr__(self, "_op", op)

    def __getattr__(self, name: str) -> Any:
        return [] if name == "weight_function" else getattr(self._op, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._op, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._op, name)


def cast_weight(op: Any, x: torch.Tensor, bias_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """Bring an op's weight, still quantized, and its bias to x's device through the host's own machinery.

    Returns:
        weight: quantized (a float tensor where the host could not keep the bytes), bias in `bias_dtype` or None, and
        the token that release_weight() takes after the last use of both.
    """
    view = _CastView(op) if op.weight_function else op
    return comfy.ops.cast_bias_weight(
        view, None, dtype=op.weight.dtype, device=x.device, bias_dtype=bias_dtype, offloadable=True
    )


def release_weight(op: Any, weight: torch.Tensor, bias: torch.Tensor | None, token: Any) -> None:
    """Tell the host that the device copies of cast_weight() are no longer needed."""
    comfy.ops.uncast_bias_weight(op, weight, bias, token)


def host_version() -> str:
    """The version of the running ComfyUI, for messages only."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "(unknown version)"
    return __version__


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Of `options`, those that this host's `function` has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


def quantized_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every module whose weight is quantized."""
    for name, module in model.named_modules():
        if is_quantized(getattr(module, "weight", None)):
            yield name, module
