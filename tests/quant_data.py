# SPDX-License-Identifier: Apache-2.0
"""Makes block bytes for tests from a Layout, judges dequantized weights by gguf-py, and says what differs.

`write_codes` is the inverse of what a Plane describes, in numpy and on its own, so that it checks the reader too.
"""

from __future__ import annotations

from itertools import product

import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels.torch_reference import read_numbers
from gguf_kit.layouts import ELEMENT_SIZES, LAYOUTS, Code, Layout

QTYPES = sorted(LAYOUTS, key=lambda qtype: qtype.name)
BLOCK_QTYPES = [qtype for qtype in QTYPES if LAYOUTS[qtype].quants is not None]

F16_ADVERSARIES = {
    "0": 0x0000,
    "-0": 0x8000,
    "smallest subnormal": 0x0001,
    "largest subnormal": 0x83FF,
    "smallest normal": 0x0400,
    "1": 0x3C00,
    "65504": 0x7BFF,
    "-65504": 0xFBFF,
}


def random_blocks(layout: Layout, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes with finite f16 scales: uint8 (n_blocks, type_size)."""
    rng = np.random.default_rng([seed, int(layout.qtype)])
    blocks = rng.integers(0, 256, (n_blocks, layout.type_size), dtype=np.uint8)
    for source in f16_sources(layout):
        bits = rng.integers(0, 1 << 16, n_blocks, dtype=np.uint16)
        bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
        write_f16(blocks, layout, source, bits)
    return blocks


def adversarial_blocks(layout: Layout) -> dict[str, np.ndarray]:
    """Named sets of blocks that hit the corners of a format: {name: uint8 (n_blocks, type_size)}."""
    corners = {f"all 0x{byte:02X}": np.full((1, layout.type_size), byte, np.uint8) for byte in (0x00, 0x80, 0xFF)}
    every_byte = np.arange(256)[:, None] + np.arange(layout.type_size)
    corners["every byte everywhere"] = every_byte.astype(np.uint8)
    sources = f16_sources(layout)
    combinations = list(product(F16_ADVERSARIES.values(), repeat=len(sources)))
    blocks = random_blocks(layout, len(combinations))
    for source, bits in zip(sources, np.array(combinations, np.uint16).T, strict=True):
        write_f16(blocks, layout, source, bits)
    corners["extreme f16 scales"] = blocks
    for name, code in layout.codes().items():
        if not code.as_f16 and all(plane.base == 2 for plane in code.planes()):
            n_values = 1 << code.bits
            blocks = random_blocks(layout, n_values)
            values = np.arange(n_values)[:, None] + np.arange(layout.n_codes(code))
            corners[f"every value of {name}"] = write_codes(blocks, layout, code, values % n_values)
    return corners


def dequantize_with(kernels: object, blocks: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """What a module of kernels writes: dtype (n_blocks, block_size), memory that was not zero before."""
    out = torch.full((blocks.shape[0], layout.block_size), 7.7, dtype=dtype, device=blocks.device)
    kernels.dequantize_into(blocks, layout, out)
    return out


def f16_sources(layout: Layout) -> list[str | Code]:
    """Where the row keeps f16 numbers: names of fields, and the code that IQ1_M has instead."""
    return [
        source
        for source in (layout.d, layout.dmin, layout.m)
        if (source.as_f16 if isinstance(source, Code) else source and layout.field_named(source).element == "f16")
    ]


def write_f16(blocks: np.ndarray, layout: Layout, source: str | Code, bits: np.ndarray) -> None:
    """Set one f16 number per block, given by its bits (n_blocks,), in place."""
    if isinstance(source, Code):
        write_codes(blocks, layout, source, bits[:, None])
    else:
        start = layout.offsets[source]
        blocks[:, start : start + 2] = bits.astype("<u2")[:, None].view(np.uint8)


def write_codes(blocks: np.ndarray, layout: Layout, code: Code, values: np.ndarray) -> np.ndarray:
    """Set all integers of a code, (n_blocks, codes per block), in place. Not for ternary digits."""
    n_done = 0
    for part in code.parts:
        for plane in part:
            start = layout.offsets[plane.field]
            field_bytes = slice(start, start + layout.field_named(plane.field).n_bytes)
            field_words = np.ascontiguousarray(blocks[:, field_bytes]).view(f"<u{ELEMENT_SIZES[layout.word(plane)]}")
            words = field_words[:, layout.word_slice(plane)]
            n_codes = words.shape[1] * len(plane.shifts)
            mask = (1 << plane.bits) - 1
            digits = (values[:, n_done : n_done + n_codes].astype(np.int64) >> plane.lift) & mask
            digits = digits.reshape(len(blocks), words.shape[1] // plane.run, len(plane.shifts), plane.run)
            for i, shift in enumerate(plane.shifts):
                digit = digits[:, :, i].reshape(words.shape).astype(words.dtype)
                words[...] = words & words.dtype.type(~(mask << shift) & np.iinfo(words.dtype).max) | digit << shift
            blocks[:, field_bytes] = field_words.view(np.uint8)
        n_done += n_codes
    return blocks


def dequantize_by_gguf(blocks: np.ndarray, qtype: QType) -> np.ndarray:
    """gguf-py's float32 (n_blocks, block_size)."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(gguf.quants.dequantize(blocks, qtype), dtype=np.float32)


def assert_same_weights(weights: torch.Tensor, blocks: np.ndarray, qtype: QType) -> None:
    """Fail, with a description, unless weights (any float dtype) are gguf-py's to the bit, cast to that dtype."""
    expected = torch.from_numpy(dequantize_by_gguf(blocks, qtype)).to(weights.dtype)
    weights = weights.reshape(expected.shape)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[weights.dtype.itemsize]
    same = (weights.view(bits) == expected.view(bits)) | (weights.isnan() & expected.isnan())
    if not bool(same.all()):
        raise AssertionError(describe_mismatch(weights, expected, ~same, blocks, LAYOUTS[qtype]))


def describe_mismatch(
    weights: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor, blocks: np.ndarray, layout: Layout
) -> str:
    """The qtype, the share of bad blocks, and the worst block: its bytes, what it says, both outputs."""
    n_wrong = wrong.sum(dim=1)
    difference = (weights.float() - expected.float()).abs().nan_to_num(nan=torch.inf).masked_fill(~wrong, 0)
    worst = int(difference.sum(dim=1).argmax() if bool(difference.any()) else n_wrong.argmax())
    block = torch.from_numpy(blocks[worst : worst + 1].copy())
    members = {"d": layout.d, "dmin": layout.dmin, "m": layout.m} | layout.codes()
    decoded = {
        name: read_numbers(block, layout, source).flatten().tolist() for name, source in members.items() if source
    }
    lines = [
        f"{layout.qtype.name}: {100 * float((n_wrong > 0).float().mean()):.2f} % of {len(blocks)} blocks differ",
        f"worst is block {worst}, {int(n_wrong[worst])} of {layout.block_size} weights",
        f"  bytes    {blocks[worst].tobytes().hex()}",
        *(f"  {name} = {numbers}" for name, numbers in decoded.items()),
        f"  got      {weights[worst].tolist()}",
        f"  expected {expected[worst].tolist()}",
    ]
    return "\n".join(lines)
