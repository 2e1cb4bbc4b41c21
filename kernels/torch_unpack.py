# SPDX-License-Identifier: Apache-2.0
"""Unpacks the integers of a code on a CPU with torch alone, many to a machine word, into buffers that are made once.

Owns the ways to do it: shifts and masks over eight bytes at a time, look-ups that move several numbers as one integer,
and copies of whole runs to their places. Knows planes, books and buffers, no qtype and no arithmetic on weights. A new
way to pack bits is a class with fill() and its line in _make_filler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ..layouts import ELEMENT_SIZES, Code, CodeBook, Layout, Plane
from .apart import run_apart
from .iq_grids import byte_table

_CPU = torch.device("cpu")
# What so many bytes are moved as at once; the widest only ever moves.
_LANES: Mapping[int, torch.dtype] = MappingProxyType(
    {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
)


def can_fill(layout: Layout, code: Code) -> bool:
    """Whether make_fillers() knows how the code is packed, and int8 holds what it stands for."""
    if _has_wide_book(code):
        return True
    if not _is_bytes(layout, code) or (len(code.parts) > 1 and any(plane.run == 1 for plane in code.planes())):
        return False
    if code.book is not None:
        return all(plane.shifts == (0, 4) and plane.bits == 4 for plane in code.planes())
    return code.bits < 8 or all(layout.word(plane) == "i8" for plane in code.planes())


def _has_wide_book(code: Code) -> bool:
    return code.book is not None and code.book.width in (4, 8)


def _is_bytes(layout: Layout, code: Code) -> bool:
    """Whether the code's integers fit in bytes and come from bytes."""
    return code.bits <= 8 and all(layout.word(plane) in ("u8", "i8") for plane in code.planes())


class Integers:
    """A code's integers, in a buffer that is made once: int8, or int32 where they do not come from bytes.

    Attributes:
        codes: (n_blocks, codes per block), those of the blocks last read.
    """

    def __init__(self, layout: Layout, code: Code, n_blocks: int) -> None:
        dtype = torch.int8 if _is_bytes(layout, code) else torch.int32
        self.codes = torch.empty(n_blocks, layout.n_codes(code), dtype=dtype, device=_CPU)
        self._signed = any(layout.word(plane) == "i8" for plane in code.planes())
        self._code = code
        make = make_fillers if dtype == torch.int8 else _make_word_fillers
        self._fillers = make(layout, replace(code, book=None), self.codes)

    def read(self, blocks: Tensor) -> Tensor:
        """The integers of the blocks, valid until the next call."""
        for filler in self._fillers:
            filler.fill(blocks)
        return self.codes

    def read_numbers(self, blocks: Tensor) -> Tensor:
        """mul * code + add: float32 (n_blocks, codes per block)."""
        codes = self.read(blocks)
        numbers = codes.float() if self._signed or codes.dtype != torch.int8 else codes.view(torch.uint8).float()
        if self._code.mul != 1:
            numbers *= self._code.mul
        if self._code.add:
            numbers += self._code.add
        return numbers


class Filler(Protocol):
    """Writes into the buffer that it was made for."""

    def fill(self, blocks: Tensor) -> None:
        """Read from uint8 (n_blocks, type_size)."""


def make_fillers(layout: Layout, code: Code, numbers: Tensor, as_factors: bool = False) -> list[Filler]:
    """How to write a code's integers (of signs: mul * code + add) into int8 (n_blocks, numbers per block)."""
    if code.book is not None and _has_wide_book(code):
        return [_Book(layout, code, code.book, numbers)]
    mul_add = (int(code.mul), int(code.add)) if as_factors else (1, 0)
    fillers: list[Filler] = []
    first = 0
    for part in code.parts:
        n_codes = layout.n_codes(Code((part,)))
        target = numbers[:, first : first + n_codes]
        fillers.append(_make_filler(layout, part[0], target, code.book, mul_add))
        for plane in part[1:]:
            bits = torch.empty(numbers.shape[0], n_codes, dtype=torch.int8, device=_CPU)
            fillers += [_make_filler(layout, plane, bits), _Or(bits, target)]
        first += n_codes
    return fillers


def _make_filler(
    layout: Layout, plane: Plane, target: Tensor, book: CodeBook | None = None, mul_add: tuple[int, int] = (1, 0)
) -> Filler:
    """How to write a plane's bits, at their place in each code, into int8 (n_blocks, codes per block)."""
    octets = _octets(layout, plane)
    if plane.bits == 8:
        return _Copy(octets, target)
    if book is not None:
        return _Pairs(octets, plane, book, target)
    if plane.base == 3:
        return _Trits(octets, plane, target)
    if plane.run == 1 and len(plane.shifts) > 1:
        return _Bytes(octets, plane, mul_add, target)
    return _Shifts(octets, plane, target)


def _make_word_fillers(layout: Layout, code: Code, codes: Tensor) -> list[Filler]:
    """How to write a code's integers into int32 (n_blocks, codes per block)."""
    (planes,) = code.parts
    fillers: list[Filler] = []
    for i, plane in enumerate(planes):
        target = torch.empty_like(codes) if i else codes
        if layout.word(plane) in ("u8", "i8"):
            octets = torch.empty(codes.shape, dtype=torch.int8, device=_CPU)
            fillers += [_make_filler(layout, replace(plane, lift=0), octets), _Widen(octets, plane.lift, target)]
        else:
            fillers.append(_Words(layout, plane, target))
        if i:
            fillers.append(_Or(target, codes))
    return fillers


def _octets(layout: Layout, plane: Plane) -> slice:
    """The bytes of a plane of byte words in the block."""
    start = layout.offsets[plane.field]
    words = layout.word_slice(plane)
    return slice(start + words.start, start + words.stop, words.step)


class _Copy:
    """Whole bytes are the codes."""

    def __init__(self, octets: slice, target: Tensor) -> None:
        self._octets, self._target = octets, target.view(torch.uint8)

    def fill(self, blocks: Tensor) -> None:
        self._target.copy_(blocks[:, self._octets])


class _Or:
    """Adds bits that another filler wrote."""

    def __init__(self, bits: Tensor, target: Tensor) -> None:
        n_bytes = target.shape[1] * target.element_size()
        lane = next(_LANES[size] for size in (8, 4, 2, 1) if n_bytes % size == 0)
        self._bits, self._target = bits.view(lane), target.view(lane)

    def fill(self, blocks: Tensor) -> None:
        torch.bitwise_or(self._target, self._bits, out=self._target)


class _Widen:
    """Bytes that another filler wrote, as integers, shifted left."""

    def __init__(self, octets: Tensor, lift: int, target: Tensor) -> None:
        self._octets, self._target = octets.view(torch.uint8), target
        self._lift = constant(lift, torch.int32) if lift else None

    def fill(self, blocks: Tensor) -> None:
        self._target.copy_(self._octets)
        if self._lift is not None:
            torch.bitwise_left_shift(self._target, self._lift, out=self._target)


class _Words:
    """Bits of 16 or 32-bit words, one integer each."""

    def __init__(self, layout: Layout, plane: Plane, target: Tensor) -> None:
        start = layout.offsets[plane.field]
        self._octets = slice(start, start + layout.field_named(plane.field).n_bytes)
        word = _LANES[ELEMENT_SIZES[layout.word(plane)]]
        self._field = torch.empty(
            target.shape[0], layout.field_named(plane.field).n_bytes, dtype=torch.uint8, device=_CPU
        )
        self._source = self._field.view(word)[:, layout.word_slice(plane)]
        self._words = torch.empty(self._source.shape, dtype=torch.int32, device=_CPU)
        self._shifts = [constant(shift, torch.int32) for shift in plane.shifts]
        self._target = target
        n_runs = self._words.shape[1] // plane.run
        self._places = target.view(-1, n_runs, len(plane.shifts), plane.run).unbind(2)
        self._runs = self._words.view(-1, n_runs, plane.run)
        self._mask = constant((1 << plane.bits) - 1, torch.int32)
        self._lift = constant(plane.lift, torch.int32) if plane.lift else None

    def fill(self, blocks: Tensor) -> None:
        self._field.copy_(blocks[:, self._octets])
        self._words.copy_(self._source)  # a sign that this extends is masked away
        for place, shift in zip(self._places, self._shifts, strict=True):
            torch.bitwise_right_shift(self._runs, shift, out=place)
        torch.bitwise_and(self._target, self._mask, out=self._target)
        if self._lift is not None:
            torch.bitwise_left_shift(self._target, self._lift, out=self._target)


class _Book:
    """A code book of 4 or 8 numbers: one look-up moves them all, as one integer."""

    def __init__(self, layout: Layout, code: Code, book: CodeBook, target: Tensor) -> None:
        self._integers = Integers(layout, code, target.shape[0])
        self._indices = torch.empty(self._integers.codes.shape, dtype=torch.int32, device=_CPU)
        self._table = _packed_book(book)
        self._target = target.view(self._table.dtype).view(-1)

    def fill(self, blocks: Tensor) -> None:
        indices = self._integers.read(blocks)
        if indices.dtype == torch.int8:
            indices = self._indices.copy_(indices.view(torch.uint8))
        torch.index_select(self._table, 0, indices.view(-1), out=self._target)


class _Bytes:
    """All codes of a byte follow one another: one look-up moves them all, as one integer."""

    def __init__(self, octets: slice, plane: Plane, mul_add: tuple[int, int], target: Tensor) -> None:
        self._octets = octets
        self._table = _unpacked_bytes(plane.bits, plane.shifts, plane.lift, *mul_add)
        self._target = target.view(self._table.dtype).view(-1)
        self._indices = torch.empty(
            target.shape[0], target.shape[1] // len(plane.shifts), dtype=torch.int32, device=_CPU
        )

    def fill(self, blocks: Tensor) -> None:
        self._indices.copy_(blocks[:, self._octets])
        torch.index_select(self._table, 0, self._indices.view(-1), out=self._target)


class _Digits:
    """A plane's words side by side, and where in the codes the digits of each shift go, a run at a time."""

    def __init__(self, octets: slice, plane: Plane, target: Tensor) -> None:
        n_blocks, n_words = target.shape[0], target.shape[1] // len(plane.shifts)
        n_bytes = n_blocks * n_words
        n_lanes = ceil(n_bytes / 8)  # the last may hold some bytes that mean nothing
        self.octets = octets
        self.word_lanes = torch.empty(n_lanes, dtype=torch.int64, device=_CPU)
        self.digit_lanes = torch.empty(n_lanes, dtype=torch.int64, device=_CPU)
        self.words = self.word_lanes.view(torch.uint8)[:n_bytes].view(n_blocks, n_words)
        self.digits = self.digit_lanes.view(torch.uint8)[:n_bytes].view(n_blocks, n_words)
        run = plane.run if len(plane.shifts) > 1 else n_words
        lane = next(dtype for n_lane_bytes, dtype in _LANES.items() if run % n_lane_bytes == 0)
        runs = (n_words // run, run)
        self._digit_runs = torch.unflatten(self.digits, 1, runs).view(lane)
        places = torch.unflatten(target.view(torch.uint8), 1, (runs[0], len(plane.shifts), runs[1]))
        self._places = places.view(lane).unbind(2)

    def put(self, i_shift: int) -> None:
        """Move the digits to their places."""
        self._places[i_shift].copy_(self._digit_runs)


class _Shifts(_Digits):
    """Bits cut out by shift and mask, eight bytes at a time: the mask drops what came from the next byte."""

    def __init__(self, octets: slice, plane: Plane, target: Tensor) -> None:
        super().__init__(octets, plane, target)
        octet = ((1 << plane.bits) - 1) << plane.lift
        self._mask = constant(int.from_bytes([octet] * 8, "little", signed=True), torch.int64)
        self._shifts = [
            (torch.bitwise_left_shift if left > 0 else torch.bitwise_right_shift, constant(abs(left), torch.int64))
            for left in (plane.lift - shift for shift in plane.shifts)
        ]

    def fill(self, blocks: Tensor) -> None:
        self.words.copy_(blocks[:, self.octets])
        for i, (shift, amount) in enumerate(self._shifts):
            shift(self.word_lanes, amount, out=self.digit_lanes)
            torch.bitwise_and(self.digit_lanes, self._mask, out=self.digit_lanes)
            self.put(i)


class _Trits(_Digits):
    """Ternary digits of a byte: byte * 3**i % 256 * 3 >> 8, in 16 bits."""

    def __init__(self, octets: slice, plane: Plane, target: Tensor) -> None:
        super().__init__(octets, plane, target)
        self._powers = [constant(3**i, torch.int16) for i in plane.shifts]
        self._low, self._three, self._eight = (constant(number, torch.int16) for number in (255, 3, 8))
        self._numbers = torch.empty(self.words.shape, dtype=torch.int16, device=_CPU)
        self._products = torch.empty_like(self._numbers)

    def fill(self, blocks: Tensor) -> None:
        self._numbers.copy_(blocks[:, self.octets])
        for i, power in enumerate(self._powers):
            torch.mul(self._numbers, power, out=self._products)
            torch.bitwise_and(self._products, self._low, out=self._products)
            torch.mul(self._products, self._three, out=self._products)
            torch.bitwise_right_shift(self._products, self._eight, out=self._products)
            self.digits.copy_(self._products)
            self.put(i)


class _Pairs(_Digits):
    """Nibbles that stand for a book's numbers: two bytes are one index of four numbers, two low and two high."""

    def __init__(self, octets: slice, plane: Plane, book: CodeBook, target: Tensor) -> None:
        super().__init__(octets, plane, target)
        self._table = _packed_pairs(book)
        self._word_pairs = self.words.view(-1).view(torch.int16)
        self._digit_pairs = self.digits.view(-1).view(torch.int16)
        self._indices = torch.empty(self._word_pairs.shape, dtype=torch.int32, device=_CPU)
        self._fours = torch.empty_like(self._indices)
        self._low_and_high = self._fours.view(torch.int16).view(-1, 2).unbind(1)
        self._unsigned = constant(0xFFFF, torch.int32)

    def fill(self, blocks: Tensor) -> None:
        self.words.copy_(blocks[:, self.octets])
        self._indices.copy_(self._word_pairs)
        torch.bitwise_and(self._indices, self._unsigned, out=self._indices)
        torch.index_select(self._table, 0, self._indices, out=self._fours)
        for i, pairs in enumerate(self._low_and_high):
            self._digit_pairs.copy_(pairs)
            self.put(i)


def _made_apart(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a constant, built apart from its caller's modes."""

    @functools.cache
    def cached(*args: object) -> Tensor:
        return run_apart(build, *args)

    return cached


@_made_apart
def constant(number: int, dtype: torch.dtype) -> Tensor:
    """A number as torch takes it without making a tensor of it first: dtype ()."""
    return torch.tensor(number, dtype=dtype, device=_CPU)


@_made_apart
def _packed_book(book: CodeBook) -> Tensor:
    """A book's entries, each as one integer of its numbers' bytes: int32 or int64 (n_entries,)."""
    return byte_table(book).view(_LANES[book.width]).flatten()


@_made_apart
def _packed_pairs(book: CodeBook) -> Tensor:
    """For two bytes: the numbers of both low nibbles, then of both high ones, as bytes of one int32 (65536,)."""
    octets = torch.arange(1 << 16, device=_CPU).to(torch.int16).view(torch.uint8).view(-1, 2)
    nibbles = torch.cat([octets & 15, octets >> 4], dim=1)
    return byte_table(book)[nibbles.long()].view(torch.int32).flatten()


@_made_apart
def _unpacked_bytes(bits: int, shifts: tuple[int, ...], lift: int, mul: int, add: int) -> Tensor:
    """For every byte: mul * code + add of each of its codes, as bytes of one integer (256,)."""
    codes = torch.arange(256, device=_CPU).unsqueeze(1) >> torch.tensor(shifts, device=_CPU) & (1 << bits) - 1
    return ((codes << lift) * mul + add).to(torch.int8).view(_LANES[len(shifts)]).flatten()
