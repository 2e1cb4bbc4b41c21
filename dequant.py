# SPDX-License-Identifier: Apache-2.0
"""Front door: dequantize() and its choice of backend.

Owns the checks of what callers hand in, the table of backends and the choice among them. Knows no block layout and no
arithmetic. A new backend is a module in kernels/ with the functions of Backend and one line in BACKENDS.

A backend is known to be right before it is used: on first use with a device, qtype and dtype it dequantizes a small
sample, and one that differs from the reference is off from then on, with one warning.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from . import layouts
from .errors import GGUFError, UnsupportedQtype
from .kernels import fresh_memory, llvm_cpu, self_test, torch_cpu, torch_reference, triton_gpu
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
PLAIN_NAMES = frozenset(qtype.name for qtype in PLAIN_DTYPES)


logger = logging.getLogger("gguf_kit")

# Why a backend is off, "" if it is right: by name, device, qtype, dtype and whether the data is aligned.
_faults: dict[tuple[str, torch.device, GGMLQuantizationType, torch.dtype, bool], str] = {}
_warned: set[tuple[str, str]] = set()
_faults_lock = threading.Lock()
UNTESTED = "it cannot be tested on meta tensors or while a CUDA graph is captured"


class Backend(NamedTuple):
    """A way to dequantize.

    Attributes:
        dequantize_into: (blocks uint8 (n_blocks, type_size), layout, contiguous result (n_blocks, block_size)).
        unavailable: (layout, device) -> why it cannot take such a tensor here, or "".
        failures: () -> what its compiler and launcher raise beside self_test.FAILURES.
    """

    dequantize_into: Callable[[Tensor, Layout, Tensor], None]
    unavailable: Callable[[Layout, torch.device], str]
    failures: Callable[[], tuple[type[Exception], ...]] = tuple


BACKENDS: Mapping[str, Backend] = MappingProxyType(  # fastest first; the last takes everything and is the specification
    {
        "triton": Backend(triton_gpu.dequantize_into, triton_gpu.unavailable, triton_gpu.failures),
        "llvm": Backend(llvm_cpu.dequantize_into, llvm_cpu.unavailable),
        "torch-cpu": Backend(torch_cpu.dequantize_into, torch_cpu.unavailable),
        "torch": Backend(torch_reference.dequantize_into, torch_reference.unavailable),
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

    Beside the result, torch-cpu holds temporaries of up to 21 MB (measured; IQ1_M), torch 7 MB on a CPU and 56 MB
    elsewhere. On a CPU the memory of a large result is used again for the next of its size, once nobody has it.

    Args:
        data: uint8, the tensor's bytes in any shape, alignment and device.
        qtype: how they are stored, one of SUPPORTED_QTYPES.
        shape: of the weights, in torch order (the last dim is a row); () is one weight.
        dtype: of the result.
        backend: a name in BACKENDS; None: GGUF_KIT_BACKEND, or else the fastest that can take the tensor and is right.
    Returns:
        dtype tensor of `shape` on data's device. Its memory is its own, also for F16 to float16.
    Raises:
        UnsupportedQtype: no dequantizer for the qtype.
        GGUFError: data does not fit qtype and shape, or a named backend is unknown, cannot take the tensor or is wrong.
    """
    if not is_direct(data):
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


def dequantize_into(data: Tensor, qtype: GGMLQuantizationType, out: Tensor, *, backend: str | None = None) -> None:
    """Dequantize into memory that is there, as dequantize() does; compilers cannot see into it.

    Args:
        data, qtype, backend: as for dequantize().
        out: contiguous, of the shape and dtype of the weights, on data's device.
    Raises:
        GGUFError: out is not contiguous, or elsewhere, or wants gradients; otherwise as dequantize().
    """
    layout = _check_data(data, qtype, out.shape)
    if not out.is_contiguous() or out.device != data.device or out.requires_grad:
        raise GGUFError(
            f"out is on {out.device} with strides {out.stride()}, expected contiguous memory on {data.device} "
            "without gradients",
            hint="Dequantize into a tensor of its own and copy it.",
        )
    if not is_direct(data, out):
        out.copy_(dequantize(data, qtype, out.shape, out.dtype, backend=backend))
        return
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own functions do that write
    blocks = data.reshape(-1, layout.type_size)  # (n_blocks, type_size)
    name = _choose_tested(blocks, layout, out.dtype, backend)
    BACKENDS[name].dequantize_into(blocks, layout, out.view(-1, layout.block_size))


def is_direct(*tensors: Tensor) -> bool:
    """Whether these are tensors with memory, and nobody follows what is done to them: no compiler, mode or transform.

    Otherwise everything has to go through operators that such followers know.
    """
    if torch.compiler.is_compiling() or not all(type(tensor) is Tensor for tensor in tensors):
        return False
    modes = getattr(torch._C, "_len_torch_dispatch_stack", int)()
    transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)()
    return not modes and transform is None


def _dequantize(
    data: Tensor, qtype: GGMLQuantizationType, shape: Sequence[int], dtype: torch.dtype, backend: str | None
) -> Tensor:
    layout = _check_data(data, qtype, shape)
    blocks = data.reshape(-1, layout.type_size)  # (n_blocks, type_size)
    out = fresh_memory.empty((blocks.shape[0], layout.block_size), dtype, data.device)
    BACKENDS[_choose_tested(blocks, layout, dtype, backend)].dequantize_into(blocks, layout, out)
    return out.reshape(shape)


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


def _choose_tested(blocks: Tensor, layout: Layout, dtype: torch.dtype, backend: str | None) -> str:
    """As choose_backend(), among those that the self-test found right for such blocks."""
    if backend or os.environ.get(BACKEND_VARIABLE):
        name = choose_backend(layout, blocks.device, backend)
        if fault := _find_fault(name, blocks, layout, dtype):
            raise GGUFError(
                f"backend {name!r} is wrong for {layout.qtype.name} to {dtype} on {blocks.device}: {fault}",
                hint=f"Use another of: {', '.join(BACKENDS)}.",
            )
        return name
    for name, candidate in BACKENDS.items():
        if not candidate.unavailable(layout, blocks.device):
            fault = _find_fault(name, blocks, layout, dtype)
            if not fault:
                break
            if fault != UNTESTED:
                _warn_once(name, fault, f"{layout.qtype.name} to {dtype} on {blocks.device}")
    return name


def _find_fault(name: str, blocks: Tensor, layout: Layout, dtype: torch.dtype) -> str:
    """Why a backend that is available is not to be used for such blocks, or "". Tests it when it is new to them."""
    if name == _reference_name():
        return ""
    aligned = blocks.device.type == "cpu" or blocks.data_ptr() % self_test.ALIGNMENT == 0
    key = name, blocks.device, layout.qtype, dtype, aligned
    fault = _faults.get(key)
    if fault is not None:
        return fault
    if blocks.device.type == "meta" or (blocks.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return UNTESTED  # there is nothing to test, or the test would break the capture
    with _faults_lock:
        if key not in _faults:
            backend = BACKENDS[name]
            _faults[key] = self_test.find_fault(
                backend.dequantize_into, layout, blocks.device, dtype, aligned=aligned, failures=backend.failures()
            )
    return _faults[key]


def _reference_name() -> str:
    return [*BACKENDS][-1]


def _warn_once(name: str, fault: str, what: str) -> None:
    with _faults_lock:
        is_new = (name, what) not in _warned
        _warned.add((name, what))
    if is_new:
        logger.warning(
            "Backend %r is not used for %s: %s. %s=%s turns it off for everything.",
            *(name, what, fault, BACKEND_VARIABLE, _reference_name()),
        )


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
