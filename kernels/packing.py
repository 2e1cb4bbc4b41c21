# SPDX-License-Identifier: Apache-2.0
"""Packs codes and scales into ggml blocks, driven by the rows of layouts.py: the inverse of the reference's reading.

Owns pack_blocks(), the only writer of block bytes in the encoders. It knows where bits go, not how they are chosen. A
new qtype needs nothing here, unless it packs its bits in a way that no Plane describes; ternary digits (base 3) are
read only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layouts import ELEMENT_SIZES, Code, Layout, Plane

_FLOAT_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_WORD_DTYPES = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
}  # by bytes; shifts and ors give the same bits as unsigned


def pack_blocks(layout: Layout, values: Mapping[str, Tensor]) -> Tensor:
    """Write one block for each row of the values; bits that no value covers are 0.

    Args:
        layout: the row of layouts.LAYOUTS.
        values: by name, all on one device. A float field ("d", "dmin", "m"): (n_blocks,) or (n_blocks, count) of a
            float dtype, rounded to the field's. A code of the row ("quants", "scales", "mins", ...): integers
            (n_blocks, codes per block), as stored, so before mul and add; negative ones in two's complement.
    Returns:
        uint8 (n_blocks, layout.type_size).
    Raises:
        ValueError: a name that is no field or code of the row, a wrong number of codes, or a ternary code.
    """
    first = next(iter(values.values()))
    blocks = torch.zeros(first.shape[0], layout.type_size, dtype=torch.uint8, device=first.device)
    codes = layout.codes()
    for name, value in values.items():
        if name in codes:
            _write_code(blocks, layout, codes[name], value)
        elif name in layout.offsets and layout.field_named(name).element in _FLOAT_DTYPES:
            _write_floats(blocks, layout, name, value)
        else:
            raise ValueError(f"{layout.qtype.name}: no float field and no code is named {name!r}")
    return blocks


def _write_floats(blocks: Tensor, layout: Layout, name: str, numbers: Tensor) -> None:
    """Set a float field: numbers (n_blocks,) or (n_blocks, count)."""
    member = layout.field_named(name)
    stored = numbers.reshape(blocks.shape[0], member.count).to(_FLOAT_DTYPES[member.element])
    start = layout.offsets[name]
    blocks[:, start : start + member.n_bytes] = stored.view(torch.uint8)


def _write_code(blocks: Tensor, layout: Layout, code: Code, codes: Tensor) -> None:
    """Set the bits of a code: codes (n_blocks, codes per block)."""
    if codes.shape != (blocks.shape[0], layout.n_codes(code)):
        expected = (blocks.shape[0], layout.n_codes(code))
        raise ValueError(f"{layout.qtype.name}: codes have shape {tuple(codes.shape)}, expected {expected}")
    n_done = 0
    for part in code.parts:
        n_part = layout.n_codes(Code((part,)))
        for plane in part:
            _write_plane(blocks, layout, plane, codes[:, n_done : n_done + n_part])
        n_done += n_part


def _write_plane(blocks: Tensor, layout: Layout, plane: Plane, codes: Tensor) -> None:
    """Or the plane's bits of the codes (n_blocks, codes of the part) into its words."""
    if plane.base != 2:
        raise ValueError(f"{layout.qtype.name}: digits of base {plane.base} cannot be packed")
    word_size = ELEMENT_SIZES[layout.word(plane)]
    if plane.bits > 8 * codes.element_size() - plane.lift or word_size > codes.element_size():
        codes = codes.to(torch.int32)
    all_bits = plane.bits == 8 * codes.element_size()
    mask = 0 if all_bits else (1 << plane.bits) - 1
    digits = torch.unflatten(codes, 1, (-1, len(plane.shifts), plane.run))  # (n_blocks, n_runs, n_shifts, run)
    words = _shifted(digits[:, :, 0], plane.lift, mask, plane.shifts[0])
    for i, shift in enumerate(plane.shifts[1:], start=1):
        words = words | _shifted(digits[:, :, i], plane.lift, mask, shift)
    words = words.flatten(1).to(_WORD_DTYPES[word_size])  # (n_blocks, n_words)
    start = layout.offsets[plane.field]
    octets = blocks[:, start : start + layout.field_named(plane.field).n_bytes]
    target = torch.unflatten(octets, 1, (-1, word_size))[:, layout.word_slice(plane)]  # (n_blocks, n_words, word_size)
    target.bitwise_or_(torch.unflatten(words.contiguous().view(torch.uint8), 1, (-1, word_size)))


def _shifted(codes: Tensor, lift: int, mask: int, shift: int) -> Tensor:
    """The codes' bits above `lift` under the mask (0: all of them), moved to their place in the word."""
    digits = codes >> lift if lift else codes
    digits = digits & mask if mask else digits
    return digits << shift if shift else digits
