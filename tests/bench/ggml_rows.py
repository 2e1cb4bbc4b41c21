# SPDX-License-Identifier: Apache-2.0
"""ggml's own dequantize_row_* as a baseline: float32 into memory that is given, rows shared by threads.

The library is the pack's own build if tools/llama_cpp/build.py has made it (or $GGUF_KIT_BENCH_GGML names another),
else the prebuilt one of libggml-python. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import _paths  # noqa: F401
import make_files
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.layouts import LAYOUTS
from gguf_kit.quantize import ggml

VARIABLE = "GGUF_KIT_BENCH_GGML"
SLICES_PER_THREAD = 4
FLOAT_ROWS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


@functools.cache
def load() -> ctypes.CDLL:
    """The library that is the baseline."""
    named = os.environ.get(VARIABLE) or ggml.find_library()
    return ctypes.CDLL(str(named)) if named else make_files.load_ggml()


@functools.cache
def find_function(qtype: QType) -> Callable[[int, int, int], None] | None:
    """(blocks, out, number of weights) -> None for a type, or None where ggml has no such function."""
    name = FLOAT_ROWS.get(qtype.name, f"dequantize_row_{qtype.name.lower().replace('_k', '_K')}")
    function = getattr(load(), name, None)
    if function is not None:
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


def dequantize_into(blocks: torch.Tensor, qtype: QType, out: torch.Tensor, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Fill float32 `out` (n_blocks, block_size) from uint8 `blocks` (n_blocks, type_size), both on the CPU."""
    function, block_size = find_function(qtype), LAYOUTS[qtype].block_size
    if function is None:
        raise NotImplementedError(f"ggml has no dequantize_row for {qtype.name}")
    n_slices = SLICES_PER_THREAD * pool._max_workers
    bounds = [len(blocks) * i // n_slices for i in range(n_slices + 1)]

    def run(first: int, last: int) -> None:
        if last > first:
            function(blocks[first].data_ptr(), out[first].data_ptr(), (last - first) * block_size)

    list(pool.map(run, bounds[:-1], bounds[1:]))
    return out
