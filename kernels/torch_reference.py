# SPDX-License-Identifier: Apache-2.0
"""The reference dequantizer: torch only, any device, every row of layouts.LAYOUTS. It is the specification.

Owns the meaning of a row: dequantize_blocks() is layouts.py's formula line by line, in float32, and equals gguf-py bit
for bit. Kernels are tested against it; clarity goes before speed. A new qtype needs nothing in this file, unless it
packs its bits in a way that no Plane describes.

Source: operations and their order as in gguf-py 0.19.0, gguf/quants.py, dequantize_blocks of each class, which follow
dequantize_row_* in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from ..layouts import Code, CodeBook, Layout, Plane
from .iq_grids import device_table

# Weights dequantized at a time: on a CPU what its caches hold, elsewhere enough to hide the launches. The temporaries
# take up to 13.3 bytes a weight (measured; IQ2_S), so 3.5 MB and 56 MB.
CHUNK_WEIGHTS_CPU = 1 << 18
CHUNK_WEIGHTS = 1 << 22

_TORCH_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "u8": torch.uint8,
    "i8": torch.int8,
    "u16": torch.int16,  # torch has few operations for the wider unsigned types; shifts and masks give the same bits
    "u32": torch.int32,
}


def unavailable(layout: Layout, device: torch.device) -> str:
    """Why this backend cannot take such a tensor: "", it always can."""
    return ""


def dequantize(blocks: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Dequantize into new memory: dtype (n_blocks, layout.block_size); otherwise as dequantize_into()."""
    out = torch.empty(blocks.shape[0], layout.block_size, dtype=dtype, device=blocks.device)
    dequantize_into(blocks, layout, out)
    return out


def dequantize_into(blocks: Tensor, layout: Layout, out: Tensor) -> None:
    """Dequantize chunk by chunk, which bounds the temporaries.

    Args:
        blocks: uint8 (n_blocks, layout.type_size).
        layout: the row of layouts.LAYOUTS.
        out: (n_blocks, layout.block_size), contiguous; each weight is rounded once to its dtype, from float32.
    """
    n_weights = CHUNK_WEIGHTS_CPU if blocks.device.type == "cpu" else CHUNK_WEIGHTS
    n_chunk = n_weights // layout.block_size
    for out_chunk, chunk in zip(torch.split(out, n_chunk), torch.split(blocks, n_chunk), strict=True):
        out_chunk.copy_(dequantize_blocks(chunk, layout))


def convert_floats(blocks: Tensor, layout: Layout, out: Tensor) -> None:
    """A row without quants, whose weights are floats as they lie: torch converts them at once; otherwise as above."""
    dtype = _TORCH_DTYPES[layout.fields[0].element]
    if not out.numel():
        return
    blocks = blocks.contiguous()
    if (blocks.data_ptr() | blocks.storage_offset()) % dtype.itemsize:
        blocks = blocks.clone()
    out.copy_(blocks.view(dtype))


def dequantize_blocks(blocks: Tensor, layout: Layout) -> Tensor:
    """Dequantize: w = d*scales * (quants + delta) * signs - dmin*mins + m, as far as the row has them.

    Args:
        blocks: uint8 (n_blocks, layout.type_size).
        layout: the row of layouts.LAYOUTS.
    Returns:
        float32 (n_blocks, layout.block_size), its own memory.
    """
    dl = read_numbers(blocks, layout, layout.d)  # (n_blocks, n_d)
    if layout.quants is None:
        return dl
    if layout.scales is not None:
        dl = dl * read_numbers(blocks, layout, layout.scales)  # (n_blocks, n_scales)
    w = read_numbers(blocks, layout, layout.quants)  # (n_blocks, block_size)
    if layout.delta is not None:
        w = _by_shares(torch.add, w, read_numbers(blocks, layout, layout.delta))
    w = _by_shares(torch.mul, w, dl)
    if layout.signs is not None:
        w = w * read_numbers(blocks, layout, layout.signs)
    if layout.mins is not None:
        ml = read_numbers(blocks, layout, layout.dmin) * read_numbers(blocks, layout, layout.mins)
        w = _by_shares(torch.sub, w, ml)
    if layout.m:
        w = w + read_numbers(blocks, layout, layout.m)
    return w


def read_numbers(blocks: Tensor, layout: Layout, source: str | Code) -> Tensor:
    """What a float field or a code stands for: float32 (n_blocks, numbers per block)."""
    if isinstance(source, str):
        return _read_words(blocks, layout, source, layout.field_named(source).element).float()
    codes = unpack_codes(blocks, layout, source)
    if source.as_f16:
        return codes.to(torch.int16).view(torch.float16).float()
    if source.book is not None:
        return _look_up(codes, source.book)
    numbers = codes.float()
    if source.mul != 1:
        numbers = numbers * source.mul
    return numbers + source.add if source.add else numbers


def unpack_codes(blocks: Tensor, layout: Layout, code: Code) -> Tensor:
    """The integers of a code: (n_blocks, codes per block), uint8 or int8 up to 8 bits, else int32."""
    wide = code.bits > 8
    parts = [
        reduce(torch.bitwise_or, [_unpack_plane(blocks, layout, plane, wide) for plane in part]) for part in code.parts
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _unpack_plane(blocks: Tensor, layout: Layout, plane: Plane, wide: bool) -> Tensor:
    """The plane's bits at their place in each code: (n_blocks, codes per block), integers as in unpack_codes."""
    words = _read_words(blocks, layout, plane.field, layout.word(plane))[:, layout.word_slice(plane)]
    words = torch.unflatten(words, 1, (-1, plane.run))  # (n_blocks, n_runs, run)
    if plane.base == 3:
        words = words.to(torch.int16)
        digits = [((words * 3**i & 255) * 3) >> 8 for i in plane.shifts]
    elif plane.bits == 8 and words.element_size() == 1:
        digits = [words]
    else:
        digits = [words >> shift & (1 << plane.bits) - 1 for shift in plane.shifts]
    codes = torch.stack(digits, dim=2).flatten(1)  # (n_blocks, n_runs * n_shifts * run)
    if wide:
        codes = codes.to(torch.int32)
    elif codes.dtype != torch.int8:
        codes = codes.to(torch.uint8)
    return codes << plane.lift


def _read_words(blocks: Tensor, layout: Layout, name: str, element: str) -> Tensor:
    """A field's bytes as elements of a type: (n_blocks, n_words)."""
    start = layout.offsets[name]
    octets = blocks[:, start : start + layout.field_named(name).n_bytes]
    dtype = _TORCH_DTYPES[element]
    # Wider elements need aligned memory, which neither the field nor the tensor in its file is sure to have.
    return (
        octets.view(dtype) if dtype.itemsize == 1 else octets.clone(memory_format=torch.contiguous_format).view(dtype)
    )


def _look_up(codes: Tensor, book: CodeBook) -> Tensor:
    """The book's numbers, one after another: float32 (n_blocks, codes per block * book.width)."""
    numbers = device_table(book, codes.device).index_select(0, codes.to(torch.int32).flatten())
    return numbers.view(codes.shape[0], codes.shape[1] * book.width)


def _by_shares(operation: Callable[[Tensor, Tensor], Tensor], weights: Tensor, numbers: Tensor) -> Tensor:
    """Apply each number of a block to its equal share of the weights: (n_blocks, block_size)."""
    shares = torch.unflatten(weights, 1, (numbers.shape[1], -1))  # (n_blocks, n_numbers, weights per number)
    return operation(shares, numbers.unsqueeze(2)).flatten(1)
