# SPDX-License-Identifier: Apache-2.0
"""A dequantizer for a CPU as LLVM IR, written from a row of layouts.LAYOUTS.

Owns kernel_text(): one function per row and output type, a loop over blocks whose body is layouts.py's formula on
vectors of LANES weights. Which byte, which shift and which scale a weight needs is known when the text is written, so
the body has no index arithmetic: loads at fixed offsets, shuffles with fixed masks, shifts by fixed amounts. Knows
nothing of compilers and threads (llvm_cpu.py). A new qtype needs nothing here, unless it packs its bits in a way that
no Plane describes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..layouts import ELEMENT_SIZES, Code, CodeBook, Layout, Plane

LANES = 16
OUTPUT_SIZES = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of one weight
SMALL_BOOK = 16  # a book of so many single numbers is looked up within a register

_BYTE_SHUFFLES = {  # name of the table look-up in a register of 16 bytes, by architecture
    "x86_64": "llvm.x86.ssse3.pshuf.b.128",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
}


def books(layout: Layout) -> tuple[CodeBook, ...]:
    """The code books that the row's kernel takes as arguments, in this order."""
    found = {code.book: None for code in layout.codes().values() if code.book is not None}
    return tuple(found)


def in_bytes(book: CodeBook) -> bool:
    """Whether a kernel takes the book as int8, not float32: grids, which are large and hold small whole numbers."""
    return (book.width > 1 and book.n_entries > 128) or _fits_register(book)


def kernel_name(layout: Layout, output: str) -> str:
    """Name of the kernel's function."""
    return f"dequantize_{layout.qtype.name.lower()}_{output}"


def kernel_text(layout: Layout, output: str, machine: str) -> str:
    """The module of one kernel, a function of (blocks, out, n_blocks, books...).

    Args:
        layout: the row; blocks are uint8 (n_blocks, type_size) at any address.
        output: a key of OUTPUT_SIZES, the type of out (n_blocks, block_size).
        machine: LLVM's name of the architecture, such as x86_64.
    """
    writer = _Writer(layout, output, _BYTE_SHUFFLES.get(machine, ""))
    writer.write_block()
    tables = "".join(f", ptr noalias readonly %{book.name}" for book in books(layout))
    shuffle = f"declare <16 x i8> @{writer.byte_shuffle}(<16 x i8>, <16 x i8>)" if writer.byte_shuffle else ""
    return f"""{shuffle}
define void @{kernel_name(layout, output)}(ptr noalias readonly %blocks, ptr noalias %out, i64 %n_blocks{tables}) {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp ult i64 %i, %n_blocks
  br i1 %more, label %body, label %done
body:
  %block_offset = mul i64 %i, {layout.type_size}
  %block = getelementptr i8, ptr %blocks, i64 %block_offset
  %weights_offset = mul i64 %i, {layout.block_size * OUTPUT_SIZES[output]}
  %weights = getelementptr i8, ptr %out, i64 %weights_offset
{writer.text()}
  %next = add i64 %i, 1
  br label %loop
done:
  ret void
}}
"""


class _Vector:
    """A value of the kernel: the name of a vector of `n` elements of `element`."""

    def __init__(self, name: str, n: int, element: str) -> None:
        self.name, self.n, self.element = name, n, element

    @property
    def type(self) -> str:
        """As LLVM writes it."""
        return f"<{self.n} x {self.element}>"

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


class _Writer:
    """Writes the body for one block; an instruction that is there already is not written again."""

    def __init__(self, layout: Layout, output: str, byte_shuffle: str) -> None:
        self.layout, self.output, self.byte_shuffle = layout, output, byte_shuffle
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    def text(self) -> str:
        """The lines so far."""
        return "\n".join(f"  {line}" for line in self._lines)

    def _value(self, instruction: str) -> str:
        name = self._names.get(instruction)
        if name is None:
            name = self._names[instruction] = f"%v{len(self._names)}"
            self._lines.append(f"{name} = {instruction}")
        return name

    def _vector(self, instruction: str, n: int, element: str) -> _Vector:
        return _Vector(self._value(instruction), n, element)

    # -- the formula --

    def write_block(self) -> None:
        """w = d*scales * (quants + delta) * signs - dmin*mins + m, in this order, each rounded to float32."""
        row = self.layout
        dl = self._numbers(row.d)
        if row.scales is not None:
            dl = self._combine("fmul", dl, self._numbers(row.scales))
        ml = self._combine("fmul", self._numbers(row.dmin), self._numbers(row.mins)) if row.mins is not None else None
        m = self._numbers(row.m) if row.m else None
        if row.quants is None:
            raise ValueError(f"{row.qtype.name}: a row without quants needs no kernel")
        for start in range(0, row.block_size, LANES):
            w = self._weights(row.quants, start)
            if row.delta is not None:
                w = self._float_op("fadd", w, self._weights(row.delta, start))
            w = self._float_op("fmul", w, self._spread(dl, start))
            if row.signs is not None:
                w = self._float_op("fmul", w, self._weights(row.signs, start))
            if ml is not None:
                w = self._float_op("fsub", w, self._spread(ml, start))
            if m is not None:
                w = self._float_op("fadd", w, self._spread(m, start))
            self._store(w, start)

    def _weights(self, code: Code, start: int) -> _Vector:
        """What a code gives for LANES weights from `start`: one number each, or numbers that several share."""
        n = self.layout.n_codes(code) * (code.book.width if code.book else 1)
        if n < self.layout.block_size:
            return self._spread(self._numbers(code), start)
        return self._code_numbers(code, start, start + LANES)

    def _spread(self, numbers: _Vector, start: int) -> _Vector:
        """Each number on its equal share of the block, for LANES weights from `start`."""
        return self._shuffle(numbers, [(start + i) * numbers.n // self.layout.block_size for i in range(LANES)])

    def _combine(self, op: str, left: _Vector, right: _Vector) -> _Vector:
        """An operation on numbers, of which one side may be a single one for all."""
        n = max(left.n, right.n)
        return self._float_op(op, *(v if v.n == n else self._shuffle(v, [0] * n) for v in (left, right)))

    def _float_op(self, op: str, left: _Vector, right: _Vector) -> _Vector:
        return self._vector(f"{op} {left}, {right.name}", left.n, "float")

    # -- numbers of a block --

    def _numbers(self, source: str | Code) -> _Vector:
        """All numbers of a float field or a code."""
        if isinstance(source, str):
            halves = self._load(self.layout.offsets[source], self.layout.field_named(source).count, "half")
            return self._vector(f"fpext {halves} to <{halves.n} x float>", halves.n, "float")
        return self._code_numbers(source, 0, self.layout.n_codes(source) * (source.book.width if source.book else 1))

    def _code_numbers(self, code: Code, start: int, stop: int) -> _Vector:
        """The numbers [start:stop] that the codes stand for, float32."""
        n = stop - start
        if code.book is not None:
            return self._look_up(code, code.book, start, stop)
        codes = self._codes(code, start, stop)
        if code.as_f16:
            bits = self._vector(f"trunc {codes} to <{n} x i16>", n, "i16")
            halves = self._vector(f"bitcast {bits} to <{n} x half>", n, "half")
            return self._vector(f"fpext {halves} to <{n} x float>", n, "float")
        whole = float(code.mul).is_integer() and float(code.add).is_integer()
        if whole:  # in whole numbers, as exact
            codes = self._int_op("mul", codes, int(code.mul)) if code.mul != 1 else codes
            codes = self._int_op("add", codes, int(code.add)) if code.add else codes
        numbers = self._vector(f"sitofp {codes} to <{n} x float>", n, "float")
        if not whole:
            numbers = self._float_op("fmul", numbers, _constants([code.mul] * n))
            numbers = self._float_op("fadd", numbers, _constants([code.add] * n))
        return numbers

    def _look_up(self, code: Code, book: CodeBook, start: int, stop: int) -> _Vector:
        n = stop - start
        if _fits_register(book) and self.byte_shuffle and n == LANES:
            codes = self._codes(code, start, stop)
            index = self._vector(f"trunc {codes} to <{n} x i8>", n, "i8")
            table = self._vector(f"load <{SMALL_BOOK} x i8>, ptr %{book.name}, align 1", SMALL_BOOK, "i8")
            found = self._vector(f"call <16 x i8> @{self.byte_shuffle}({table}, {index})", n, "i8")
            return self._vector(f"sitofp {found} to <{n} x float>", n, "float")
        element, size = ("i8", 1) if in_bytes(book) else ("float", 4)
        rows = []
        codes = self._codes(code, start // book.width, -(-stop // book.width))
        for i in range(codes.n):
            index_of = self._value(f"zext i32 {self._value(f'extractelement {codes}, i32 {i}')} to i64")
            offset = self._value(f"mul i64 {index_of}, {book.width * size}")
            address = self._value(f"getelementptr i8, ptr %{book.name}, i64 {offset}")
            load = f"load <{book.width} x {element}>, ptr {address}, align {size}"
            rows.append(self._vector(load, book.width, element))
        found = self._join(rows)
        return found if element == "float" else self._vector(f"sitofp {found} to <{n} x float>", n, "float")

    # -- whole numbers --

    def _codes(self, code: Code, start: int, stop: int) -> _Vector:
        """The integers [start:stop] of a code, i32."""
        pieces, first = [], 0
        for part in code.parts:
            n = self.layout.n_codes(Code((part,)))
            lanes = range(max(start - first, 0), min(stop - first, n))
            if len(lanes):
                codes = self._plane(part[0], lanes)
                for plane in part[1:]:
                    codes = self._vector(f"or {codes}, {self._plane(plane, lanes).name}", codes.n, "i32")
                pieces.append(codes)
            first += n
        return self._join(pieces)

    def _plane(self, plane: Plane, lanes: range) -> _Vector:
        """The plane's bits at their place in the codes `lanes` of its part, i32."""
        row, n = self.layout, len(lanes)
        words = range(*row.word_slice(plane).indices(1 << 30))
        places = [divmod(i % (len(plane.shifts) * plane.run), plane.run) for i in lanes]
        runs = [i // (len(plane.shifts) * plane.run) for i in lanes]
        index = [words[run * plane.run + word] for run, (_, word) in zip(runs, places, strict=True)]
        shifts = [plane.shifts[digit] for digit, _ in places]
        element = row.word(plane)
        signed = element == "i8" and plane.bits == 8
        size, first = ELEMENT_SIZES[element], min(index)
        loaded = self._load(row.offsets[plane.field] + first * size, max(index) - first + 1, f"i{8 * size}")
        found = self._shuffle(loaded, [i - first for i in index])
        codes = found if size == 4 else self._vector(f"{'sext' if signed else 'zext'} {found} to <{n} x i32>", n, "i32")
        if plane.base == 3:
            codes = self._int_op("and", self._int_op("mul", codes, [3**i for i in shifts]), 255)
            codes = self._int_op("lshr", self._int_op("mul", codes, 3), 8)
        else:
            codes = self._int_op("lshr", codes, shifts) if any(shifts) else codes
            whole = plane.bits == 8 * size
            codes = codes if whole else self._int_op("and", codes, (1 << plane.bits) - 1)
        return self._int_op("shl", codes, plane.lift) if plane.lift else codes

    def _int_op(self, op: str, codes: _Vector, numbers: int | Sequence[int]) -> _Vector:
        """An operation with constants, one for all lanes or one each."""
        each = [numbers] * codes.n if isinstance(numbers, int) else numbers
        constants = ", ".join(f"i32 {number}" for number in each)
        return self._vector(f"{op} {codes}, <{constants}>", codes.n, "i32")

    # -- memory and order --

    def _load(self, offset: int, n: int, element: str) -> _Vector:
        address = self._value(f"getelementptr i8, ptr %block, i64 {offset}")
        return self._vector(f"load <{n} x {element}>, ptr {address}, align 1", n, element)

    def _shuffle(self, vector: _Vector, lanes: Sequence[int]) -> _Vector:
        """The elements of a vector in another order."""
        if list(lanes) == [*range(vector.n)]:
            return vector
        mask = ", ".join(f"i32 {i}" for i in lanes)
        n = len(lanes)
        return self._vector(f"shufflevector {vector}, {vector.type} poison, <{n} x i32> <{mask}>", n, vector.element)

    def _join(self, vectors: Sequence[_Vector]) -> _Vector:
        """One vector after another."""
        joined = vectors[0]
        for vector in vectors[1:]:
            n = joined.n + vector.n
            longest = max(joined.n, vector.n)
            left, right = (self._shuffle_out(v, longest) for v in (joined, vector))
            mask = [*range(joined.n), *range(longest, longest + vector.n)]
            text = ", ".join(f"i32 {i}" for i in mask)
            joined = self._vector(f"shufflevector {left}, {right}, <{n} x i32> <{text}>", n, joined.element)
        return joined

    def _shuffle_out(self, vector: _Vector, n: int) -> _Vector:
        """A vector made longer; what follows is never read."""
        return self._shuffle(vector, [min(i, vector.n - 1) for i in range(n)])

    def _store(self, w: _Vector, start: int) -> None:
        """Round LANES weights once to the output type and write them."""
        address = self._value(f"getelementptr i8, ptr %weights, i64 {start * OUTPUT_SIZES[self.output]}")
        if self.output == "f16":
            w = self._vector(f"fptrunc {w} to <{w.n} x half>", w.n, "half")
        elif self.output == "bf16":
            w = self._to_bf16(w)
        self._lines.append(f"store {w}, ptr {address}, align {OUTPUT_SIZES[self.output]}")

    def _to_bf16(self, w: _Vector) -> _Vector:
        """The upper halves, rounded to the nearest, ties to even; every NaN becomes the same one."""
        n = w.n
        bits = self._vector(f"bitcast {w} to <{n} x i32>", n, "i32")
        odd = self._int_op("and", self._int_op("lshr", bits, 16), 1)
        rounded = self._int_op("add", bits, 0x7FFF)
        rounded = self._vector(f"add {rounded}, {odd.name}", n, "i32")
        upper = self._vector(f"trunc {self._int_op('lshr', rounded, 16)} to <{n} x i16>", n, "i16")
        is_nan = self._vector(f"fcmp uno {w}, {w.name}", n, "i1")
        nan = ", ".join(["i16 32704"] * n)  # 0x7FC0
        return self._vector(f"select {is_nan}, <{n} x i16> <{nan}>, {upper}", n, "i16")


def _fits_register(book: CodeBook) -> bool:
    return book.width == 1 and book.n_entries == SMALL_BOOK


def _constants(numbers: Sequence[float]) -> _Vector:
    """A float vector constant."""
    return _Vector("<" + ", ".join(f"float {number:e}" for number in numbers) + ">", len(numbers), "float")
