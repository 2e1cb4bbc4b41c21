# SPDX-License-Identifier: Apache-2.0
"""Whether a backend computes what the specification says, found out on one small tensor.

Owns the sample and the comparison. Compilers and drivers differ from machine to machine, so that tests elsewhere do not
replace this one. dequant.py decides when it runs and what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from subprocess import SubprocessError

import torch
from torch import Tensor

from ..layouts import Layout
from . import torch_reference
from .apart import run_apart

# What compilers and launchers raise, among Python's own kinds: no C compiler, no libcuda, an unwritable cache, an API
# that changed, an instruction that the device lacks.
FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    OSError,
    ImportError,
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    SubprocessError,
    NameError,
    SyntaxError,
    EOFError,
)
# In the message of an error that says nothing of the backend: no memory, no thread, the end of the process.
PASSING = ("out of memory", "can't allocate", "new thread", "new futures")
# More than one program of a kernel, and a last one that is not full.
N_BLOCKS = 127
UNWRITTEN = 7.7  # what the result holds before
EDGES = (0x00, 0x7F, 0x80, 0xFF)
# What backends may tell apart: addresses that are multiples of this, and all others.
ALIGNMENT = 16


def sample_blocks(layout: Layout) -> Tensor:
    """Blocks that look random, the same each time, and one for each of EDGES: uint8 (n_blocks, type_size), on the CPU.

    One f16 scale in 32 is infinite or NaN, as in any random bytes.
    """
    scattered = torch.arange(N_BLOCKS * layout.type_size, device="cpu") * 2654435761  # hashing with Knuth's constant
    scattered = (scattered ^ scattered >> 15) * 40503 >> 11 & 255
    edges = torch.tensor(EDGES, device="cpu").repeat_interleave(layout.type_size)
    return torch.cat([scattered, edges]).to(torch.uint8).view(-1, layout.type_size)


def _move(blocks: Tensor, device: torch.device, aligned: bool) -> Tensor:
    """A copy on a device, at an aligned address or one byte behind one."""
    buffer = torch.empty(blocks.numel() + 2 * ALIGNMENT, dtype=torch.uint8, device=device)
    start = -buffer.data_ptr() % ALIGNMENT + (0 if aligned else 1)
    return buffer[start : start + blocks.numel()].view(blocks.shape).copy_(blocks)


def find_fault(
    dequantize_into: Callable[[Tensor, Layout, Tensor], None],
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    *,
    aligned: bool = True,
    failures: tuple[type[Exception], ...] = (),
) -> str:
    """Why a backend is not to be trusted with such tensors, or "".

    Args:
        dequantize_into: the backend's function.
        layout, device, dtype, aligned: what it is to be trusted with.
        failures: what it raises beside FAILURES when it does not work.
    Raises:
        RuntimeError: no room for the sample, or another of PASSING.
    """
    try:
        return run_apart(_compare, dequantize_into, layout, device, dtype, aligned)
    except (*FAILURES, *failures) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or any(w in str(error).lower() for w in PASSING):
            raise
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _compare(
    dequantize_into: Callable[[Tensor, Layout, Tensor], None],
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    aligned: bool,
) -> str:
    blocks = sample_blocks(layout)
    expected = torch_reference.dequantize(blocks, layout, dtype)
    out = torch.full_like(expected, UNWRITTEN, device=device)
    dequantize_into(_move(blocks, device, aligned), layout, out)
    weights = out.cpu()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    same = (weights.view(bits) == expected.view(bits)) | (weights.isnan() & expected.isnan())
    n_wrong = same.numel() - int(same.sum())
    return f"{n_wrong} of {same.numel()} weights differ from the reference's" if n_wrong else ""
