# SPDX-License-Identifier: Apache-2.0
"""Front door: dequantize() and its choice of backend.

Owns the checks of what callers hand in and the table of backends. Knows no block layout and no arithmetic. A new
backend is a module in kernels/ with the two functions of Backend and one line in BACKENDS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from . import layouts
from .errors import GGUFError, UnsupportedQtype
from .kernels import torch_reference
from .layouts import LAYOUTS, NOT_SUPPORTED, Layout

BACKEND_VARIABLE = "GGUF_KIT_BACKEND"

SUPPORTED_QTYPES: frozenset[GGMLQuantizationType] = frozenset(LAYOUTS)

# Types whose bytes are numbers as torch knows them.
PLAIN_DTYPES: Mapping[GGMLQuantizationType, torch.dtype] = MappingProxyType(
    {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
        GGMLQuantizationType.F64: torch.float64,
        GGMLQuantizationType.I8: torch.int8,
        GGMLQuantizationType.I16: torch.int16,
        GGMLQuantizationType.I32: torch.int32,
        GGMLQuantizationType.I64: torch.int64,
    }
)


class Backend(NamedTuple):
    """A way to dequantize.

    Attributes:
        dequantize: (blocks uint8 (n_blocks, type_size), layout, dtype) -> dtype (n_blocks, block_size), its own memory.
        unavailable: (layout, device) -> why it cannot take such a tensor here, or "".
    """

    dequantize: Callable[[Tensor, Layout, torch.dtype], Tensor]
    unavailable: Callable[[Layout, torch.device], str]


BACKENDS: Mapping[str, Backend] = MappingProxyType(  # fastest first; the last takes everything
    {
        "torch": Backend(torch_reference.dequantize, torch_reference.unavailable),
    }
)


def dequantize(
    data: Tensor,
    qtype: GGMLQuantizationType,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Dequantize a tensor: exact in float32, rounded once to `dtype`.

    Beside the result the torch backend holds temporaries of at most 4 MB on a CPU, 56 MB elsewhere.

    Args:
        data: uint8, the tensor's bytes in any shape, alignment and device.
        qtype: how they are stored, one of SUPPORTED_QTYPES.
        shape: of the weights, in torch order (the last dim is a row); () is one weight.
        dtype: of the result.
        backend: a name in BACKENDS; None: GGUF_KIT_BACKEND, or else the fastest that can take the tensor.
    Returns:
        dtype tensor of `shape` on data's device. Its memory is its own, also for F16 to float16.
    Raises:
        UnsupportedQtype: no dequantizer for the qtype.
        GGUFError: data does not fit qtype and shape, or the backend is unknown or cannot take the tensor.
    """
    if torch.compiler.is_compiling() or type(data) is not Tensor:
        weights: Tensor = torch.ops.gguf_kit.dequantize(data, qtype, shape, dtype, backend or "")
        return weights
    return _dequantize(data, qtype, shape, dtype, backend)


def dequantize_rows(
    rows: Tensor, qtype: GGMLQuantizationType, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """Dequantize whole rows of bytes, as dequantize() does.

    Args:
        rows: uint8 (..., bytes per row).
        qtype, dtype, backend: as for dequantize().
    Returns:
        dtype (..., weights per row).
    """
    return dequantize(rows, qtype, layouts.weight_shape(qtype, rows.shape), dtype, backend=backend)


def _dequantize(
    data: Tensor, qtype: GGMLQuantizationType, shape: Sequence[int], dtype: torch.dtype, backend: str | None
) -> Tensor:
    layout = _check_data(data, qtype, shape)
    name = choose_backend(layout, data.device, backend)
    blocks = data.reshape(-1, layout.type_size)  # (n_blocks, type_size)
    return BACKENDS[name].dequantize(blocks, layout, dtype).reshape(shape)


def _check_data(data: Tensor, qtype: GGMLQuantizationType, shape: Sequence[int]) -> Layout:
    """The qtype's row, once data is known to be `shape` weights of it. Raises as dequantize() does."""
    layout = LAYOUTS.get(qtype)
    if layout is None:
        reason = f" ({NOT_SUPPORTED[qtype]})" if qtype in NOT_SUPPORTED else ""
        names = ", ".join(known.name for known in LAYOUTS)  # all of them: this is the list to choose from
        raise UnsupportedQtype(
            f"qtype {getattr(qtype, 'name', qtype)} has no dequantizer here{reason}", hint=f"Use one of: {names}."
        )
    if data.dtype != torch.uint8:
        raise GGUFError(
            f"{layout.qtype.name} data has dtype {data.dtype}, expected torch.uint8",
            hint="Pass the bytes as the file holds them.",
        )
    n_bytes = layouts.n_bytes(layout.qtype, shape)
    if data.numel() != n_bytes:
        raise GGUFError(
            f"{layout.qtype.name} data for shape {tuple(shape)} has {data.numel()} bytes, expected {n_bytes}",
            hint="Check that shape is in torch order and that the file is complete.",
        )
    return layout


def choose_backend(layout: Layout, device: torch.device, backend: str | None = None) -> str:
    """Name of the backend for such a tensor: `backend`, else GGUF_KIT_BACKEND, else the fastest that can take it.

    Raises:
        GGUFError: the named backend is unknown or cannot take the tensor; there is no silent second choice.
    """
    origin = "backend" if backend else BACKEND_VARIABLE
    backend = backend or os.environ.get(BACKEND_VARIABLE)
    if not backend:
        return next(name for name, candidate in BACKENDS.items() if not candidate.unavailable(layout, device))
    names = ", ".join(BACKENDS)
    if backend not in BACKENDS:
        raise GGUFError(f"{origin} is {backend!r}, which is no backend", hint=f"Use one of: {names}.")
    reason = BACKENDS[backend].unavailable(layout, device)
    if reason:
        raise GGUFError(
            f"{origin} is {backend!r}, which cannot take {layout.qtype.name} on {device}: {reason}",
            hint=f"Use another of: {names}.",
        )
    return backend


# Compilers see one opaque operator: exactness does not hang on what they fuse, and a backend need not be traceable.
OPERATOR = "dequantize(Tensor data, int qtype, SymInt[] shape, ScalarType dtype, str backend) -> Tensor"


def _run_operator(data: Tensor, qtype: int, shape: Sequence[int], dtype: torch.dtype, backend: str) -> Tensor:
    return _dequantize(data, GGMLQuantizationType(qtype), shape, dtype, backend or None)


def _trace_operator(data: Tensor, qtype: int, shape: Sequence[int], dtype: torch.dtype, backend: str) -> Tensor:
    _check_data(data, GGMLQuantizationType(qtype), shape)
    return data.new_empty(shape, dtype=dtype)


if not hasattr(torch.ops.gguf_kit, "dequantize"):  # a second copy of the pack in one process shares the first one's
    _library = torch.library.Library("gguf_kit", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define(OPERATOR)  # type: ignore[no-untyped-call]
    _library.impl("dequantize", _run_operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl("dequantize", _trace_operator, "Meta")  # type: ignore[no-untyped-call]
