# SPDX-License-Identifier: Apache-2.0
"""Writes the Triton kernel of a layout: Python source, one statement per step of layouts.py's formula.

Owns what a thread reads and computes. Knows nothing of torch, Triton or devices, so that its output can be read and
tested anywhere; triton_gpu.py compiles and launches it. A new qtype needs nothing here, unless it packs its bits in a
way that write_kernel() refuses.

A block is cut into units of 16 bytes of output: 4 weights in float32, 8 in the 16-bit types. One thread makes one unit,
so it stores once, and what the weights of a unit share (scales, mins, code book entries) is computed once: tensors of
shape (UNITS, 1) beside the weights' (UNITS, n_unit). Bytes that lie together are read as the widest integer that their
alignment allows and taken apart in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from typing import NamedTuple

from ..layouts import ELEMENT_SIZES, Code, CodeBook, Layout, Plane

STORE_BYTES = 16  # the most that a thread stores at once


@dataclass(frozen=True)
class Index:
    """A non-negative integer in the kernel, `base * factor` where that form is known.

    Attributes:
        text: its source, an operand that needs no brackets.
        end: it is below this.
        step: it is a multiple of this.
        base, factor: see above; None and 1 otherwise.
    """

    text: str
    end: int
    step: int = 1
    base: Index | None = None
    factor: int = 1

    def times(self, factor: int) -> Index:
        """The product with a positive constant."""
        if factor == 1 or self.end == 1:
            return self
        base, whole = self.base or self, self.factor * factor
        return Index(f"({base.text} * {whole})", (self.end - 1) * factor + 1, self.step * factor, base, whole)

    def over(self, divisor: int) -> Index:
        """The whole part of the quotient."""
        if divisor == 1:
            return self
        if self.end <= divisor:
            return ZERO
        if self.base and (shared := gcd(self.factor, divisor)) > 1:
            return self.base.times(self.factor // shared).over(divisor // shared)
        step = self.step // divisor if self.step % divisor == 0 else 1
        return Index(f"({self.text} {_operator('//', divisor)})", (self.end - 1) // divisor + 1, step)

    def modulo(self, divisor: int) -> Index:
        """The remainder."""
        if self.end <= divisor:
            return self
        if self.step % divisor == 0:
            return ZERO
        if self.base and (shared := gcd(self.factor, divisor)) > 1:
            return self.base.times(self.factor // shared).modulo(divisor // shared).times(shared)
        return Index(f"({self.text} {_operator('%', divisor)})", divisor, gcd(self.step, divisor))

    def plus(self, number: int) -> Index:
        """The sum with a constant that is not negative."""
        if self.end == 1:
            return Index(str(number), number + 1, number)
        return Index(f"({self.text} + {number})", self.end + number, gcd(self.step, number)) if number else self

    def add(self, other: Index) -> Index:
        """The sum of two."""
        if self.end == 1 or other.end == 1:
            return other if self.end == 1 else self
        return Index(f"({self.text} + {other.text})", self.end + other.end - 1, gcd(self.step, other.step))

    def clamp(self, start: int, last: int) -> Index:
        """What it exceeds `start` by, but at least 0 and at most `last`."""
        text, end, step = self.text, self.end, gcd(self.step, start)
        if start:
            text, end = f"tl.maximum({text} - {start}, 0)", max(end - start, 1)
        if end > last + 1:
            text, end, step = f"tl.minimum({text}, {last})", last + 1, gcd(step, last)
        return Index(text, end, step)


ZERO = Index("0", 1, 0)


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


def _operator(sign: str, divisor: int) -> str:
    # Not / and % where that can be helped: the compiler would have to allow for negative numbers.
    if not _is_power(divisor):
        return f"{sign} {divisor}"
    return f">> {divisor.bit_length() - 1}" if sign == "//" else f"& {divisor - 1}"


class Kernel(NamedTuple):
    """What triton_gpu.py needs to compile and call a kernel.

    Attributes:
        name: of its function.
        source: Python text that defines it, without decorator or imports. Its parameters: data (pointer to uint8), out
            (pointer to the weights), n_units (of the whole tensor), the books, and the constant UNITS (of a program).
        books: the code books it reads, in the order of its parameters, each as words of `book_bytes`.
        n_unit: weights of a unit.
    """

    name: str
    source: str
    books: tuple[CodeBook, ...]
    n_unit: int


def book_bytes(book: CodeBook, n_unit: int) -> int:
    """Bytes of the words that a book is read as: 0 for single float32 numbers, else that many int8 at a time."""
    return min(book.width, n_unit) if book.width > 1 else 0


def write_kernel(layout: Layout, itemsize: int, alignment: int) -> Kernel:
    """Write the kernel that dequantizes a layout.

    Args:
        layout: a row of layouts.LAYOUTS whose quants are not None.
        itemsize: bytes of one weight in the output, 2 or 4.
        alignment: power of two that divides the address of the data, in bytes.
    Raises:
        ValueError: the row packs bits in a way that this generator does not know.
    """
    writer = _Writer(layout, STORE_BYTES // itemsize, alignment)
    weights = writer.weights()
    n_unit, per_block = writer.n_unit, writer.unit.end
    name = f"dequantize_{layout.qtype.name.lower()}_{8 * itemsize}_aligned_{alignment}"
    books = "".join(f"{book.name}, " for book in writer.books)
    head = [
        f"def {name}(data, out, n_units, {books}UNITS: tl.constexpr):",
        "    program = tl.program_id(0).to(tl.int64)  # offsets exceed 32 bits",
        "    n_here = tl.minimum(n_units - program * UNITS, UNITS).to(tl.int32)",
        "    row = tl.arange(0, UNITS)[:, None]",
        "    safe = tl.minimum(row, n_here - 1)  # threads behind the end repeat the last unit and do not store",
        f"    unit = safe & {per_block - 1}",
        f"    block = data + program * (UNITS // {per_block} * {layout.type_size})",
        f"    block += (safe >> {per_block.bit_length() - 1}) * {layout.type_size}",
        f"    i = tl.arange(0, {n_unit})[None, :]",
    ]
    tail = [
        f"    out += program * (UNITS * {n_unit})",
        f"    tl.store(out + row * {n_unit} + i, {weights}.to(out.dtype.element_ty), mask=row < n_here)",
    ]
    return Kernel(name, "\n".join([*head, *writer.lines, *tail, ""]), tuple(writer.books), n_unit)


class _Writer:
    """The body of one kernel, statement by statement; equal expressions are written once.

    Attributes:
        n_unit: weights of a unit.
        unit: which unit of its block, (UNITS, 1).
        lines: the statements so far.
        books: code books in the order of their first use.
    """

    def __init__(self, layout: Layout, n_unit: int, alignment: int) -> None:
        self.layout = layout
        self.n_unit = n_unit
        self.alignment = gcd(alignment, layout.type_size)
        self.unit = Index("unit", layout.block_size // n_unit)
        self.lines: list[str] = []
        self.books: list[CodeBook] = []
        self._names: dict[str, str] = {}
        if layout.block_size % n_unit or not _is_power(self.unit.end):
            raise ValueError(f"{layout.qtype.name}: blocks of {layout.block_size} weights are not 2**n units")

    def let(self, expression: str, stem: str = "v") -> str:
        """Write an assignment unless the expression has a name already; returns the name."""
        if expression.isidentifier():
            return expression
        if expression not in self._names:
            self._names[expression] = f"{stem}{len(self._names)}"
            self.lines.append(f"    {self._names[expression]} = {expression}")
        return self._names[expression]

    def weights(self) -> str:
        """The formula of layouts.py, in its order: float32 (UNITS, n_unit)."""
        layout = self.layout
        if layout.quants is None:
            raise ValueError(f"{layout.qtype.name}: plain numbers need no kernel")
        dl = self.shared(layout.d)
        if layout.scales is not None:
            dl = self.let(f"{dl} * {self.shared(layout.scales)}", "dl")
        w = self.single(layout.quants)
        if layout.delta is not None:
            w = self.let(f"{w} + {self.shared(layout.delta)}", "w")
        w = self.let(f"{w} * {dl}", "w")
        if layout.signs is not None:
            w = self.let(f"{w} * {self.single(layout.signs)}", "w")
        if layout.mins is not None:
            ml = self.let(f"{self.shared(layout.dmin)} * {self.shared(layout.mins)}", "ml")
            w = self.let(f"{w} - {ml}", "w")
        return self.let(f"{w} + {self.shared(layout.m)}", "w") if layout.m else w

    # Numbers that a unit shares: (UNITS, 1).

    def shared(self, source: str | Code) -> str:
        """The number of a float field or code that holds for the whole unit: float32 (UNITS, 1)."""
        if isinstance(source, str):
            if self.layout.field_named(source).element != "f16":
                raise ValueError(f"{self.layout.qtype.name}: field {source} is not f16")
            return self.as_f16(self.load(ZERO.plus(self.layout.offsets[source]), 2))
        share = self.layout.block_size // self.layout.n_codes(source)
        if share % self.n_unit or (source.book and source.book.width > 1):
            raise ValueError(f"{self.layout.qtype.name}: a code for {share} weights is not shared by a unit")
        code = self.code(source, self.unit.over(share // self.n_unit))
        if source.as_f16:
            return self.as_f16(code)
        return self.number(source, code)

    def as_f16(self, bits: str) -> str:
        """The f16 that the low 16 bits of an integer are, as float32."""
        return self.let(f"{bits}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)", "f")

    def number(self, source: Code, code: str) -> str:
        """What an integer stands for, if by a formula or a book of single numbers: float32 of its shape."""
        if source.book is not None:
            return self.let(f"tl.load({self.book(source.book)} + {code})", "f")
        number = f"{code}.to(tl.float32)"
        if source.mul != 1:
            number += f" * {float(source.mul)}"
        return self.let(number + (f" + {float(source.add)}" if source.add else ""), "f")

    def book(self, book: CodeBook) -> str:
        """The parameter for a code book."""
        if book not in self.books:
            self.books.append(book)
        return book.name

    def code(self, code: Code, index: Index) -> str:
        """The integer at an index, one per unit: int32 (UNITS, 1)."""
        counts = self.counts(code)
        value, n_done = "", 0
        for part, n_codes in zip(code.parts, counts, strict=True):
            within = self.within(index, n_done, counts)
            digits = " | ".join(self.digit(plane, within) for plane in part)
            integer = self.let(digits, "c") if " " in digits else digits
            value = integer if not n_done else self.let(f"tl.where({index.text} < {n_done}, {value}, {integer})", "c")
            n_done += n_codes
        return value

    def counts(self, code: Code) -> list[int]:
        """Codes per part."""
        return [self.layout.n_codes(Code((part,))) for part in code.parts]

    def within(self, index: Index, start: int, counts: list[int], n_read: int = 1) -> Index:
        """The index within the part that begins at `start`; outside of it an index where n_read codes can be read."""
        if len(set(counts)) == 1:
            return index.modulo(counts[0])  # the same for all parts, so that they share their reads
        ends = list(accumulate(counts))
        n_codes = next(n for n, end in zip(counts, ends, strict=True) if end - n == start)
        return index.clamp(start, n_codes - n_read)

    def place(self, plane: Plane, index: Index) -> tuple[Index, Index]:
        """Where the digit of a code lies: (byte offset in the block, which shift)."""
        words = self.layout.word_slice(plane)
        size = ELEMENT_SIZES[self.layout.word(plane)]
        word = index.modulo(plane.run).add(index.over(plane.run * len(plane.shifts)).times(plane.run))
        offset = word.times(words.step * size).plus(self.layout.offsets[plane.field] + words.start * size)
        return offset, index.over(plane.run).modulo(len(plane.shifts))

    def shift(self, plane: Plane, which: Index) -> Index:
        """How far a word is shifted right."""
        steps = {b - a for a, b in zip(plane.shifts, plane.shifts[1:], strict=False)} or {1}
        if len(steps) > 1:
            raise ValueError(f"{self.layout.qtype.name}: shifts {plane.shifts} are not evenly spaced")
        return which.times(steps.pop()).plus(plane.shifts[0])

    def digit(self, plane: Plane, index: Index) -> str:
        """A plane's share of a code: int32 (UNITS, 1)."""
        if plane.base != 2:
            raise ValueError(f"{self.layout.qtype.name}: ternary digits are read byte by byte")
        offset, which = self.place(plane, index)
        element = self.layout.word(plane)
        word = self.load(offset, ELEMENT_SIZES[element])
        if plane.bits == 8 * ELEMENT_SIZES[element]:
            return self.let(f"{word}.to(tl.int8).to(tl.int32)", "c") if element == "i8" else word
        shift = self.shift(plane, which).text
        shifted = f"({word} >> {shift})" if shift != "0" else word
        return self.let(_lifted(f"{shifted} & {(1 << plane.bits) - 1}", plane.lift), "c")

    def load(self, offset: Index, n_bytes: int) -> str:
        """Consecutive bytes of the block as one little-endian integer: int32, from 8 bytes on int64 (UNITS, 1)."""
        width = gcd(n_bytes, self.alignment, offset.step)
        kind = "tl.int64" if n_bytes > 4 else "tl.int32"
        pieces = []
        for start in range(0, n_bytes, width):
            address = f"block + {offset.plus(start).text}"
            pointer = f"({address}).to(tl.pointer_type(tl.uint{8 * width}))" if width > 1 else address
            piece = self.let(f"tl.load({pointer}).to({kind})", "b")
            pieces.append(f"({piece} << {8 * start})" if start else piece)
        return self.let(" | ".join(pieces), "b") if len(pieces) > 1 else pieces[0]

    # One number per weight: (UNITS, n_unit).

    def single(self, source: Code) -> str:
        """The numbers of a code or a book that differ from weight to weight: float32 (UNITS, n_unit)."""
        if source.book is not None and source.book.width > 1:
            return self.let(f"({self.entries(source, source.book)} >> (8 * i)).to(tl.int8).to(tl.float32)", "w")
        if self.layout.n_codes(source) != self.layout.block_size:
            raise ValueError(f"{self.layout.qtype.name}: a code for a few weights of a unit")
        counts = self.counts(source)
        value, n_done = "", 0
        for part, n_codes in zip(source.parts, counts, strict=True):
            integer = self.unit_codes(part, n_done, counts)
            value = (
                self.let(f"tl.where({self.first(0).text} < {n_done}, {value}, {integer})", "c") if n_done else integer
            )
            n_done += n_codes
        return self.number(source, value)

    def entries(self, source: Code, book: CodeBook) -> str:
        """The book's numbers of a unit, as an integer of int8s (UNITS, 1)."""
        n_bytes = book_bytes(book, self.n_unit)
        words = []
        for start in range(0, self.n_unit, n_bytes):
            first = self.first(start)
            place = self.code(source, first.over(book.width))
            if book.width > n_bytes:
                half = first.modulo(book.width).over(n_bytes)
                place = f"{place} * {book.width // n_bytes} + {half.text}"
            words.append(self.let(f"tl.load({self.book(book)} + {place})", "q"))
        return self.let(self.join(words, n_bytes), "q")

    def unit_codes(self, part: tuple[Plane, ...], start: int, counts: list[int]) -> str:
        """The integers of a unit within the part of a code that begins at `start`: int32 (UNITS, n_unit)."""
        joined, digits = [], []
        for plane in part:
            if plane.base == 3:
                digits.append(self.ternary(plane, start, counts))
            elif plane.run == 1 and len(plane.shifts) % self.n_unit == 0:
                digits.append(self.bits_of_a_word(plane, self.within(self.first(0), start, counts)))
            else:
                joined.append(self.bytes_of_words(plane, start, counts))
        if joined:
            octets = self.let(" | ".join(joined), "q")
            signed = any(self.layout.word(plane) == "i8" for plane in part)
            digits.insert(0, f"({octets} >> (8 * i)).to(tl.{'int8' if signed else 'uint8'}).to(tl.int32)")
        return self.let(" | ".join(digits), "c")

    def first(self, start: int) -> Index:
        """Index in the block of a weight of the unit, (UNITS, 1)."""
        return self.unit.times(self.n_unit).plus(start)

    def bits_of_a_word(self, plane: Plane, index: Index) -> str:
        """Digits that lie side by side in one word: int32 (UNITS, n_unit)."""
        offset, which = self.place(plane, index)
        word = self.load(offset, ELEMENT_SIZES[self.layout.word(plane)])
        shift = self.shift(plane, which).text
        distance = plane.shifts[1] - plane.shifts[0]
        # The part of the shift that a unit shares goes first: the rest is a constant in each register.
        shared = self.let(f"{word} >> {shift}", "c") if shift != "0" else word
        return _lifted(f"({shared} >> (i * {distance})) & {(1 << plane.bits) - 1}", plane.lift)

    def bytes_of_words(self, plane: Plane, start: int, counts: list[int], *, whole: bool = False) -> str:
        """Digits of consecutive words, one in each byte of an integer (UNITS, 1); the words themselves if `whole`."""
        if ELEMENT_SIZES[self.layout.word(plane)] > 1 or plane.step != 1 or plane.lift + plane.bits > 8:
            raise ValueError(f"{self.layout.qtype.name}: digits of {plane.field} do not fit the bytes they lie in")
        n_piece = self.n_piece(plane)
        pieces = []
        for i in range(0, self.n_unit, n_piece):
            offset, which = self.place(plane, self.within(self.first(i), start, counts, n_piece))
            piece = self.load(offset, n_piece)
            if plane.bits < 8 and not whole:
                shift = self.shift(plane, which).text
                shifted = f"({piece} >> {shift})" if shift != "0" else piece
                mask = int.from_bytes(bytes([(1 << plane.bits) - 1] * n_piece), "little")
                piece = self.let(_lifted(f"{shifted} & {mask:#x}", plane.lift), "q")
            pieces.append(piece)
        return self.let(self.join(pieces, n_piece), "q")

    def n_piece(self, plane: Plane) -> int:
        """How many weights of a unit have their words side by side."""
        n_piece = gcd(self.n_unit, plane.run)
        if n_piece < 4 and plane.bits < 8:
            raise ValueError(f"{self.layout.qtype.name}: runs of {plane.run} words of {plane.field} are too short")
        return n_piece if plane.run > 1 else self.n_unit

    def join(self, pieces: list[str], n_bytes: int) -> str:
        """Integers of so many bytes one after another, as an expression."""
        if len(pieces) == 1:
            return pieces[0]
        mask = (1 << 8 * n_bytes) - 1
        return " | ".join(
            f"(({piece}.to(tl.int64) & {mask:#x}) << {8 * n_bytes * i})" for i, piece in enumerate(pieces)
        )

    def ternary(self, plane: Plane, start: int, counts: list[int]) -> str:
        """Ternary digits of consecutive bytes: int32 (UNITS, n_unit)."""
        octets = self.bytes_of_words(plane, start, counts, whole=True)
        n_piece = self.n_piece(plane)
        power = ""
        for first in range(0, self.n_unit, n_piece):
            _, which = self.place(plane, self.within(self.first(first), start, counts, n_piece))
            choice = str(3 ** plane.shifts[-1])
            for digit in reversed(plane.shifts[:-1]):
                choice = f"tl.where({which.text} == {digit}, {3**digit}, {choice})"
            piece = self.let(choice, "power")
            power = self.let(f"tl.where(i < {first}, {power}, {piece})", "power") if first else piece
        octet = f"({octets} >> (8 * i)).to(tl.uint8).to(tl.int32)"
        return f"((({octet} * {power}) & 255) * 3) >> 8"


def _lifted(text: str, lift: int) -> str:
    return f"(({text}) << {lift})" if lift else f"({text})"
