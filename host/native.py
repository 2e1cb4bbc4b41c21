# SPDX-License-Identifier: Apache-2.0
"""Layers that the host itself knows as quantized (scaled fp8 and its successors), beside layers from GGUF.

A host takes one `custom_operations` for all encoders of a CLIP, and with it leaves the quantization of safetensors
files alone. So a layer of ours that meets the host's quantization keys as it is loaded becomes the host's own layer,
built by the host's factory: what it computes, weighs and saves is the host's business from then on.

Two generations of files: a `scaled_fp8` mark and `X.scale_weight` for each layer, and `X.comfy_quant` (JSON as uint8)
beside `X.weight_scale`. All that hosts differ in about them is here.
"""

from __future__ import annotations

import functools
import itertools
import json
import types
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch

StateDict = dict[str, torch.Tensor]
_SCALES = ("scale_weight", "weight_scale", "comfy_quant")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def prepare_state(state: StateDict, metadata: dict[str, str] | None = None) -> StateDict:
    """A safetensors file's state dict with the keys from which the host's quantized layers of this version load.

    Args:
        state: as the file holds it; changed in place where it can be.
        metadata: the file's; older files describe their layers there.
    """
    described = (metadata or {}).get("_quantization_metadata")
    if hasattr(comfy.utils, "convert_old_quants"):
        if described is None and any(key.endswith(".scale_weight") for key in state):
            state.setdefault("scaled_fp8", torch.zeros(0, dtype=torch.float8_e4m3fn))  # some files lost their mark
        converted: StateDict = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata or {})[0]
        return converted
    for layer, settings in (json.loads(described)["layers"] if described else {}).items():
        state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return state


def native_class(kind: str, state: StateDict, prefix: str, dtype: torch.dtype | None) -> Any:
    """The host's class for a layer whose weight in `state` the host quantized; None for any other layer.

    Args:
        kind: name of the layer in an ops namespace, such as Linear.
        prefix: of the layer's keys in `state`, with the dot.
        dtype: of the model.
    Raises:
        ValueError: this host cannot compute such a layer.
    """
    found = [name for name in _SCALES if prefix + name in state]
    if not found:
        return None
    settings = state.get(prefix + "comfy_quant")
    form = json.loads(settings.numpy().tobytes()) if settings is not None else {}
    namespace: Any = None
    if form.get("format") in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        namespace = _mixed_precision_ops(prefix.rstrip("."), form, dtype)
    elif found == ["scale_weight"] and hasattr(comfy.ops, "scaled_fp8_ops"):
        weight = state.get(prefix + "weight")
        namespace = _scaled_fp8_ops(weight.dtype) if weight is not None and weight.dtype in _FP8 else None
    if kind not in vars(namespace or object):
        what = f"the {form['format']} weight" if "format" in form else "the weight"
        raise ValueError(f"{what} of {prefix.rstrip('.')} ({', '.join(found)}) is of no kind that this ComfyUI knows")
    return vars(namespace)[kind]


def _mixed_precision_ops(layer: str, form: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The host's ops for layers with their own format, set up as its text encoders set them up."""
    if hasattr(comfy.utils, "convert_old_quants"):
        return _ops_by_key(dtype)
    # Here the host reads the format of a layer from a table by name, not from the state dict.
    return comfy.ops.mixed_precision_ops({layer: form}, dtype, full_precision_mm=True)


@functools.cache
def _ops_by_key(dtype: torch.dtype | None) -> Any:
    return comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, full_precision_mm=True)


@functools.cache
def _scaled_fp8_ops(dtype: torch.dtype) -> Any:
    return comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False, override_dtype=dtype)


def become_native(layer: Any, native: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Turn a layer that holds nothing yet into one of the host's class `native`, built with `arguments`.

    The object stays the same, because the model that holds it is being filled at this moment. What the host derived
    from our class, such as Gemma's scaled embedding, is derived from `native` instead.
    """
    positional, named = arguments
    built = native(*positional, **named)
    built.requires_grad_(False).train(layer.training)
    if hasattr(comfy.model_management, "archive_model_dtypes"):
        comfy.model_management.archive_model_dtypes(built)
    derived = itertools.takewhile(lambda cls: "options" not in vars(cls), type(layer).__mro__)
    for cls in reversed(list(derived)):
        native = _rebased(cls, native)
    layer.__class__, layer.__dict__ = native, built.__dict__


def _rebased(cls: Any, base: Any) -> Any:
    """A class with what `cls` defines over another base; its super() calls mean that base."""
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    new = type(cls.__name__, (base,), members)
    for name, value in members.items():
        if isinstance(value, types.FunctionType) and "__class__" in value.__code__.co_freevars:
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            closure = tuple(types.CellType(new) if free == "__class__" else cell for free, cell in cells)
            function = types.FunctionType(value.__code__, value.__globals__, name, value.__defaults__, closure)
            function.__kwdefaults__ = value.__kwdefaults__
            setattr(new, name, function)
    return new


def mark_scaled_fp8(model: torch.nn.Module) -> None:
    """Give encoders with scaled fp8 layers the mark by which this host, or the next, will know the saved file.

    Only hosts with such ops of their own need it; the others save the format with each layer.
    """
    for encoder in model.modules():
        transformer = getattr(encoder, "transformer", None)
        if not isinstance(transformer, torch.nn.Module):
            continue
        scaled: Iterator[Any] = (m for m in transformer.modules() if getattr(m, "scale_weight", None) is not None)
        for layer in itertools.islice(scaled, 1):
            mark = torch.tensor([], dtype=layer.weight.dtype)
            transformer.scaled_fp8 = torch.nn.Parameter(mark, requires_grad=False)
