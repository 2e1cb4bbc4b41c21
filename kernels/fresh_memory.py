# SPDX-License-Identifier: Apache-2.0
"""Memory for results on a CPU.

Owns empty(). The first touch of a page of 4 KB costs more than dequantizing what goes there, so large results ask Linux
for pages of 2 MB; systems that give them by themselves, or never, ignore it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 0)  # only Linux has it


def empty(n_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor (n_blocks, block_size) that is not filled yet."""
    result = torch.empty(n_blocks, block_size, dtype=dtype, device=device)
    if MADV_HUGEPAGE and device.type == "cpu" and result.nbytes >= 2 * HUGE_PAGE and sys.platform == "linux":
        start = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (result.data_ptr() + result.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(start, stop - start, MADV_HUGEPAGE)
    return result


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
