# SPDX-License-Identifier: Apache-2.0
"""Dequantization on GPUs: one Triton launch per tensor, straight to the output dtype.

Owns compiling, launching and the tables of the kernels that triton_source.py writes. Triton is imported on first use:
it comes with torch on most systems, and the pack works without it. Results equal torch_reference's to the bit.

Block sizes follow from the compiled code (registers, instructions per weight); they were not measured on a card.
"""

from __future__ import annotations

import linecache
import os
import types
from collections.abc import Callable
from functools import cache, partial
from importlib.abc import InspectLoader
from typing import Any

import torch
from torch import Tensor

from ..layouts import CodeBook, Layout
from .apart import run_apart
from .iq_grids import byte_table, device_table
from .self_test import ALIGNMENT, FAILURES
from .torch_reference import convert_floats
from .triton_source import Kernel, book_bytes, write_kernel

# Threads of a program, each with one unit of 16 bytes. Compiled for sm_90 a thread has at most 32 registers, so that
# eight programs fill an SM, and 9 to 22 instructions per weight (float32: 13 to 30).
UNITS = 256
# The interpreter takes its time per program and statement, whatever their size.
UNITS_INTERPRETED = 1 << 14
DEVICE_TYPES = ("cuda", "xpu")  # ROCm calls its devices cuda

_functions: dict[tuple[int, int, int], tuple[Kernel, Any]] = {}
_book_words: dict[tuple[CodeBook, int, torch.device], Tensor] = {}


@cache
def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU, as its own variable says."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _import_failure() -> str:
    """Why Triton cannot be used here, or "". An install that is broken is a reason too, whatever it raises."""
    try:
        import triton
        import triton.errors
        import triton.language
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except FAILURES as error:
        return f"Triton is broken ({type(error).__name__}: {error})"
    return "" if hasattr(triton, "jit") else "Triton is broken (it has no jit)"


def unavailable(layout: Layout, device: torch.device) -> str:
    """Why this backend cannot take such a tensor, or ""."""
    if device.type not in DEVICE_TYPES and not (device.type == "cpu" and is_interpreted()):
        return f"Triton does not run on {device.type}"
    return _import_failure()


def failures() -> tuple[type[Exception], ...]:
    """What Triton raises, beside Python's own exceptions, when it cannot compile or launch a kernel."""
    if _import_failure():
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def dequantize_into(blocks: Tensor, layout: Layout, out: Tensor) -> None:
    """Dequantize in one launch.

    Args:
        blocks: uint8 (n_blocks, layout.type_size).
        layout: the row of layouts.LAYOUTS.
        out: (n_blocks, layout.block_size), contiguous; each weight is rounded once to its dtype, from float32.
    """
    blocks = blocks.contiguous()
    if layout.quants is None:
        convert_floats(blocks, layout, out)
    elif is_interpreted() and out.dtype == torch.bfloat16:
        # The interpreter cuts numbers off to make bfloat16 of them; there the last step is torch's.
        exact = torch.empty_like(out, dtype=torch.float32)
        _run(blocks, layout, exact, out.element_size())
        out.copy_(exact)
    else:
        _run(blocks, layout, out, out.element_size())


def _run(blocks: Tensor, layout: Layout, out: Tensor, itemsize: int) -> None:
    """Launch the kernel for results of `itemsize` bytes."""
    if not out.numel():
        return
    interpreted = is_interpreted()
    kernel, function = _compiled(layout, itemsize, 1 if blocks.data_ptr() % ALIGNMENT else ALIGNMENT)
    books = [book_words(book, kernel.n_unit, blocks.device) for book in kernel.books]
    n_units, units = out.numel() // kernel.n_unit, UNITS_INTERPRETED if interpreted else UNITS
    launch = partial(function[(-(-n_units // units),)], blocks, out, n_units, *books, UNITS=units)
    if interpreted:
        launch()
    else:
        _launch_on(blocks.device, launch)


def _launch_on(device: torch.device, launch: Callable[..., Any]) -> None:
    """Launch a kernel so that a thread has one unit and every product is rounded, as the formula says."""
    options = {"num_warps": UNITS // _warp_size(device), "enable_fp_fusion": False}
    module = getattr(torch, device.type)  # torch.cuda, torch.xpu
    if module.current_device() == device.index:
        launch(**options)
    else:
        with module.device(device):  # Triton launches on the current device
            launch(**options)


@cache
def _warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, on some of AMD's GPUs 64."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


def _compiled(layout: Layout, itemsize: int, alignment: int) -> tuple[Kernel, Any]:
    """The kernel of a layout and its Triton function."""
    key = int(layout.qtype), itemsize, alignment  # hashing a Layout takes longer than a launch
    if key not in _functions:
        kernel = write_kernel(layout, itemsize, alignment)
        _functions[key] = kernel, _define(kernel)
    return _functions[key]


class _KernelLoader(InspectLoader):
    """Executes Python source that was generated at run time: triton_source.py's, from the rows of layouts.py.

    Nothing of a model file, a workflow or a setting is in that source. Triton takes functions only, so the source has
    to run once to define one. It is a loader of Python's import system because the registry's standards prohibit
    exec(), which may run what users put in; test_registry.py and test_security.py list this as the one such place.
    """

    def __init__(self, source: str, file_name: str) -> None:
        self._source = source
        self._file_name = file_name

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self._source, self._file_name)


def _define(kernel: Kernel) -> Any:
    """Make a Triton function of a kernel's source. Triton reads sources back with inspect, which asks linecache."""
    import triton
    import triton.language as tl

    file_name = f"<gguf_kit {kernel.name}>"
    linecache.cache[file_name] = (len(kernel.source), None, kernel.source.splitlines(keepends=True), file_name)
    loader = _KernelLoader(kernel.source, file_name)
    module = types.ModuleType(__name__)
    vars(module)["tl"] = tl
    loader.exec_module(module)
    # A new number of units is no reason to compile again.
    return triton.jit(getattr(module, kernel.name), do_not_specialize=["n_units"])


def book_words(book: CodeBook, n_unit: int, device: torch.device) -> Tensor:
    """A code book as kernels read it, on a device, shared by all: never write into it.

    Returns:
        float32 (n_entries,) for books of single numbers; else int32 or int64, the numbers as int8s side by side.
    """
    n_bytes = book_bytes(book, n_unit)
    if not n_bytes:
        return device_table(book, device)
    key = book, n_bytes, device
    words = _book_words.get(key)
    if words is None:
        words = _book_words[key] = run_apart(_pack_book, book, n_bytes, device)  # its copy to the device has ended
    return words


def _pack_book(book: CodeBook, n_bytes: int, device: torch.device) -> Tensor:
    return byte_table(book).flatten().view(torch.int32 if n_bytes == 4 else torch.int64).to(device)
