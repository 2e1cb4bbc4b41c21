# SPDX-License-Identifier: Apache-2.0
"""A float tensor times a quantized weight, with no more of the weight dequantized at a time than pays.

A vocabulary's matrix is the largest weight of a model by far, and as a float tensor it would be gigabytes, so large
weights go by rows. On a CPU fresh memory costs more than dequantizing into it, so there the weights of all layers pass
through one buffer that stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from gguf.constants import GGMLQuantizationType

from .. import layouts
from ..dequant import dequantize_into, dequantize_rows, is_direct
from ..kernels import fresh_memory

# Of a dequantized weight at a time; larger than any layer but those of vocabularies, for parts are slower: measured on
# a CPU with 512 tokens, 1.06 to 1.11 of the dense product in one part, 1.2 in parts of 32 MB, 1.5 to 1.7 in parts of 8.
SLICE_BYTES = 256 << 20

Change = Callable[[torch.Tensor, int], torch.Tensor]

_buffers = threading.local()


def multiply_rows(
    x: torch.Tensor,
    rows: torch.Tensor,
    qtype: GGMLQuantizationType,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    change: Change | None = None,
) -> torch.Tensor:
    """x times the transposed weight, plus bias.

    Args:
        x: (..., in), float.
        rows: uint8 (out, bytes per row), the weight's, on x's device.
        bias: (out,) in x's dtype, or None.
        dtype: that the weight is dequantized to before it is cast to x's.
        change: (some rows of the weight, index of the first) -> those rows as they are to be used; it may write to the
            ones it gets.
    Returns:
        (..., out) in x's dtype.
    """
    n_out, n_in = layouts.weight_shape(qtype, rows.shape)
    buffered = x.device.type == "cpu" and _is_overwritable(x, bias)
    n_rows = max(1, SLICE_BYTES // max(1, n_in * dtype.itemsize))

    def weight_of(part: slice) -> torch.Tensor:
        if buffered:
            weight = _buffer((min(part.stop, n_out) - part.start) * n_in, dtype).view(-1, n_in)
            dequantize_into(rows[part], qtype, weight)
        else:
            weight = dequantize_rows(rows[part], qtype, dtype)
        return (change(weight, part.start) if change else weight).to(x.dtype)

    if n_rows >= n_out:
        return torch.nn.functional.linear(x, weight_of(slice(0, n_out)), bias)
    tokens = x.reshape(-1, n_in)  # (n_tokens, in)
    y = x.new_empty((tokens.shape[0], n_out))
    for start in range(0, n_out, n_rows):
        part = slice(start, min(start + n_rows, n_out))
        part_bias = None if bias is None else bias[part]
        if buffered and part_bias is not None:
            torch.addmm(part_bias, tokens, weight_of(part).t(), out=y[:, part])
        elif buffered:
            torch.mm(tokens, weight_of(part).t(), out=y[:, part])
        else:
            y[:, part] = torch.nn.functional.linear(tokens, weight_of(part), part_bias)
    return y.view(*x.shape[:-1], n_out)


def _is_overwritable(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product is computed now and needs no gradient, so that its weight may be overwritten afterwards."""
    graded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return not graded and is_direct(x)


def release_buffers() -> None:
    """Let go the memory that this thread, and dequantize(), hold for later weights."""
    _buffers.bytes = None
    fresh_memory.release()


def _buffer(n_weights: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread for so many weights; what it held before is lost."""
    held: torch.Tensor | None = getattr(_buffers, "bytes", None)
    n_bytes = n_weights * dtype.itemsize
    if held is None or held.numel() < n_bytes:
        held = _buffers.bytes = None  # before there is another
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            held = _buffers.bytes = torch.empty(n_bytes, dtype=torch.uint8)
    return held[:n_bytes].view(dtype)
