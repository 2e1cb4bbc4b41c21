# SPDX-License-Identifier: Apache-2.0
"""The CPU's own torch backend: the reference's arithmetic in pieces that stay in the caches. Nothing to install.

Owns how the weights of a row of layouts.LAYOUTS are unpacked fast with torch alone: quants stay bytes as long as
possible, many to a machine word, then become floats straight in the result. Operations and their order are those of
torch_reference, so results are equal to the bit. Knows no qtype: a new row works here if torch_unpack knows how its
quants are packed, else unavailable() says that it does not.

Three sizes of work. A group of blocks has its scales made at once, a piece its quants unpacked, and a step becomes
floats at once. An operation has to be long enough that torch's threads share it and its fixed cost is lost in it, and
short enough that a step stays in the caches. Threads of Python's own would wait for the interpreter between operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts import Code, Layout
from .torch_reference import convert_floats, read_numbers
from .torch_reference import dequantize_into as dequantize_reference
from .torch_unpack import Filler, Integers, can_fill, constant, make_fillers

# Elements of an operation: 2 MB of floats.
STEP_WEIGHTS = 1 << 19
GROUP_WEIGHTS = 1 << 22
# Of fewer weights the reference makes no more operations.
SMALL_WEIGHTS = 1 << 17


def unavailable(layout: Layout, device: torch.device) -> str:
    """Why this backend cannot take such a tensor, or ""."""
    if device.type != "cpu":
        return "it runs on the CPU alone"
    return "" if _can_unpack(layout) else "its quants are packed in a way that only the reference reads"


@functools.cache
def _can_unpack(layout: Layout) -> bool:
    """Whether quants and signs can be had as int8."""
    codes = [code for code in (layout.quants, layout.signs) if code is not None]
    return all(can_fill(layout, code) for code in codes) and (layout.quants is None or layout.quants.mul == 1)


class _Sizes(NamedTuple):
    """Blocks in a step, a piece and a group."""

    step: int
    piece: int
    group: int


def _choose_sizes(layout: Layout, n_blocks: int) -> _Sizes:
    """As many blocks as can be without an operation that is too long."""
    codes = layout.codes()
    quants = [code for name, code in codes.items() if name in ("quants", "signs")]
    factors = [code for name, code in codes.items() if name not in ("quants", "signs")]
    fields = [name for name in (layout.d, layout.dmin, layout.m) if isinstance(name, str) and name]
    step = STEP_WEIGHTS // layout.block_size
    piece = STEP_WEIGHTS // max(_longest(layout, code) for code in quants) // step * step
    longest = max([_longest(layout, code) for code in factors] + [layout.field_named(name).n_bytes for name in fields])
    group = min(STEP_WEIGHTS // longest, GROUP_WEIGHTS // layout.block_size, n_blocks) // piece * piece
    return _Sizes(step, piece, max(piece, group))


def _longest(layout: Layout, code: Code) -> int:
    """Elements per block of the longest operation that reads the code; bytes of quants are moved in longer words."""
    n_bytes = max(layout.field_named(plane.field).n_bytes for plane in code.planes())
    return max(n_bytes, layout.n_codes(code)) if layout.n_codes(code) < layout.block_size else n_bytes


def dequantize_into(blocks: Tensor, layout: Layout, out: Tensor) -> None:
    """Dequantize group by group.

    Args:
        blocks: uint8 (n_blocks, layout.type_size), on the CPU.
        layout: a row for which unavailable() has nothing to say.
        out: (n_blocks, layout.block_size), contiguous; each weight is rounded once to its dtype, from float32.
    """
    if layout.quants is None:
        convert_floats(blocks, layout, out)
        return
    if out.numel() < SMALL_WEIGHTS:
        dequantize_reference(blocks, layout, out)
        return
    sizes = _choose_sizes(layout, blocks.shape[0])
    workers: dict[int, _Worker] = {}  # by number of blocks: of full groups, and of the last
    for group, place in zip(torch.split(blocks, sizes.group), torch.split(out, sizes.group), strict=True):
        if group.shape[0] not in workers:
            workers[group.shape[0]] = _Worker(layout, sizes, group.shape[0], out.dtype)
        workers[group.shape[0]].dequantize(group, place)


class _Term:
    """An operation of the formula in layouts.py and its numbers: one source, or two that are multiplied."""

    def __init__(
        self, operation: Callable[..., Tensor], layout: Layout, n_blocks: int, *sources: str | Code | None
    ) -> None:
        self.operation = operation
        self._readers = [_make_reader(layout, source, n_blocks) for source in sources if source is not None]

    def read(self, blocks: Tensor) -> Tensor:
        """float32 (n_blocks, numbers per block), for equal shares of the weights."""
        return functools.reduce(torch.mul, [read(blocks) for read in self._readers])


def _make_terms(layout: Layout, n_blocks: int) -> list[_Term]:
    """What is done to the quants, in the formula's order; signs are left to the quants."""
    terms = [_Term(torch.mul, layout, n_blocks, layout.d, layout.scales)]
    if layout.delta is not None:
        terms.insert(0, _Term(torch.add, layout, n_blocks, layout.delta))
    if layout.mins is not None:
        terms.append(_Term(torch.sub, layout, n_blocks, layout.dmin, layout.mins))
    if layout.m:
        terms.append(_Term(torch.add, layout, n_blocks, layout.m))
    return terms


def _make_reader(layout: Layout, source: str | Code, n_blocks: int) -> Callable[[Tensor], Tensor]:
    """How to read a float field, or what a code stands for, as torch_reference.read_numbers does."""
    if isinstance(source, str) or source.as_f16 or source.book is not None:
        return functools.partial(read_numbers, layout=layout, source=source)
    return Integers(layout, source, n_blocks).read_numbers


class _Unpacker:
    """Unpacks the quants of pieces of n_blocks blocks, in buffers that are made once.

    The signs are multiplied in while all are integers: a factor of 1 or -1 rounds nothing, wherever it stands.
    """

    def __init__(self, layout: Layout, n_blocks: int, width: int) -> None:
        self._fillers: list[Filler] = []
        self._steps: list[tuple[Tensor, ...]] = []  # of the quants; of the signs
        for code in layout.quants, layout.signs:
            if code is not None:
                numbers = torch.empty(n_blocks, layout.block_size, dtype=torch.int8, device="cpu")
                as_factors = code is layout.signs
                self._fillers += make_fillers(layout, code, numbers, as_factors)
                self._steps.append(torch.split(numbers.view(-1, width), STEP_WEIGHTS // width))
        offset = int(layout.quants.add) if layout.quants and layout.quants.book is None else 0
        self._offset = constant(offset, torch.int8) if offset else None

    def read_steps(self, blocks: Tensor) -> Iterator[Tensor]:
        """The piece's quants times its signs: int8 (weights of a step / width, width), valid until the next piece."""
        for filler in self._fillers:
            filler.fill(blocks)
        for quants, *signs in zip(*self._steps, strict=True):
            if self._offset is not None:
                torch.add(quants, self._offset, out=quants)
            for factors in signs:
                torch.mul(quants, factors, out=quants)
            yield quants


class _Worker:
    """Dequantizes groups of n_blocks blocks, in buffers that are made once."""

    def __init__(self, layout: Layout, sizes: _Sizes, n_blocks: int, dtype: torch.dtype) -> None:
        self._sizes = sizes
        self._n_blocks, self._block_size = n_blocks, layout.block_size
        self._terms = _make_terms(layout, n_blocks)
        self._unpackers: dict[int, _Unpacker] = {}  # by number of blocks: of full pieces, and of the last
        self._layout = layout
        # Where steps compute, unless they can do it in the result.
        self._scratch = (
            None
            if dtype == torch.float32
            else torch.empty(min(sizes.step, n_blocks), layout.block_size, dtype=torch.float32, device="cpu")
        )

    def dequantize(self, blocks: Tensor, out: Tensor) -> None:
        """Dequantize uint8 (n_blocks, type_size) into (n_blocks, block_size)."""
        places: dict[int, Sequence[Tensor]] = {}  # by numbers per block; a view costs as much as an operation on it
        terms = []
        for term in self._terms:
            numbers = term.read(blocks)
            n_numbers = numbers.shape[1]
            if n_numbers not in places:
                places[n_numbers] = self._split_shares(out, n_numbers)
            factors = torch.split(numbers.view(-1, 1), self._sizes.step * n_numbers)
            terms.append((term.operation, places[n_numbers], factors))
        weights = terms[0][1]
        results = (
            torch.split(out.view(-1, weights[0].shape[1]), weights[0].shape[0]) if self._scratch is not None else ()
        )
        for i, quants in enumerate(self._read_quants(blocks, weights[0].shape[1])):
            weights[i].copy_(quants)
            for operation, shares, factors in terms:
                operation(shares[i], factors[i], out=shares[i])
            if results:
                results[i].copy_(weights[i])

    def _split_shares(self, out: Tensor, n_numbers: int) -> Sequence[Tensor]:
        """Where each step computes: float32 (n_blocks of a step * n_numbers, weights per number)."""
        width = self._block_size // n_numbers
        n_rows = self._sizes.step * n_numbers
        if self._scratch is None:
            return torch.split(out.view(-1, width), n_rows)
        n_full, n_left = divmod(self._n_blocks, self._sizes.step)
        shares = self._scratch.view(-1, width)
        return [shares] * n_full + [shares[: n_left * n_numbers]] * bool(n_left)

    def _read_quants(self, blocks: Tensor, width: int) -> Iterator[Tensor]:
        """The quants of each step: int8 (weights / width, width)."""
        for piece in torch.split(blocks, self._sizes.piece):
            if piece.shape[0] not in self._unpackers:
                self._unpackers[piece.shape[0]] = _Unpacker(self._layout, piece.shape[0], width)
            yield from self._unpackers[piece.shape[0]].read_steps(piece)
