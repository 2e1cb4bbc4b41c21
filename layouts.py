# SPDX-License-Identifier: Apache-2.0
"""Block layouts: where each qtype keeps its bits, and what they mean, as data.

Owns LAYOUTS, one row per qtype that can be dequantized, and the byte arithmetic of shapes. Knows nothing of torch,
files or devices. The reference dequantizer, the kernels, the encoders and the test data all read these rows, so no byte
offset stands anywhere else. A new qtype is a new row; NOT_SUPPORTED says why the others have none.

What a row means, in float32 and in this order of operations (a part that the row does not have drops out):

    w = d*scales * (quants + delta) * signs - dmin*mins + m

Each factor covers an equal, consecutive share of the block's weights: 16 scales in a block of 256 weights are 16
sub-blocks of 16. Field names, types and order are those of the block structs in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import MappingProxyType

from gguf.constants import GGML_QUANT_SIZES, QK_K, GGMLQuantizationType

# The numbers in ggml's structs: bytes of one element. Little-endian, as everything in a GGUF file.
ELEMENT_SIZES: Mapping[str, int] = MappingProxyType(
    {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "u16": 2, "u32": 4}
)
K_SCALE_SIZE = 12


@dataclass(frozen=True)
class Field:
    """One member of a block struct.

    Attributes:
        name: as in ggml-common.h.
        element: a key of ELEMENT_SIZES.
        count: number of elements.
    """

    name: str
    element: str
    count: int = 1

    @property
    def n_bytes(self) -> int:
        """Bytes in the block."""
        return ELEMENT_SIZES[self.element] * self.count


@dataclass(frozen=True)
class CodeBook:
    """A table that turns a code into `width` numbers. kernels/iq_grids.py has the contents.

    Attributes:
        name: as in ggml-common.h where it has one.
        n_entries: number of codes.
        width: consecutive weights (or scales) that one code stands for.
    """

    name: str
    n_entries: int
    width: int = 1


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, spread over words of one field.

    The words [start:stop:step] of the field are cut into runs of `run` words. A run gives, for each shift in turn, one
    digit of each of its words: code[(i_run * len(shifts) + i_shift) * run + i_word] = (word >> shift) & (2**bits - 1).

    Attributes:
        field: name of the field.
        bits: bits taken per code.
        shifts: right shifts, in the order of the codes. With base 3: indices of the ternary digits, highest first.
        run: words per run.
        lift: left shift of the bits within the code.
        word: element type to read the field as; "" is the field's own. An i8 word of 8 bits keeps its sign.
        start, stop, step: which words, as in a slice.
        base: 2; or 3 for digits stored as a fraction of 256, digit i of a byte being (byte * 3**i % 256) * 3 >> 8.
    """

    field: str
    bits: int
    shifts: tuple[int, ...] = (0,)
    run: int = 1
    lift: int = 0
    word: str = ""
    start: int = 0
    stop: int | None = None
    step: int = 1
    base: int = 2


@dataclass(frozen=True)
class Code:
    """A sequence of small integers in a block and the numbers they stand for: book[code], or mul * code + add.

    Attributes:
        parts: the parts follow one another; the planes within a part hold different bits of the same codes.
        mul, add: exact in float32.
        book: the table of the numbers, or None.
        as_f16: the 16 bits of a code are those of one f16 (IQ1_M's d); mul, add and book are unused then.
    """

    parts: tuple[tuple[Plane, ...], ...]
    mul: float = 1
    add: float = 0
    book: CodeBook | None = None
    as_f16: bool = False

    @property
    def bits(self) -> int:
        """Bits of one integer."""
        return max(plane.lift + plane.bits for plane in self.planes())

    def planes(self) -> Iterator[Plane]:
        """All planes of all parts."""
        for part in self.parts:
            yield from part


def _code(*planes: Plane, mul: float = 1, add: float = 0, book: CodeBook | None = None) -> Code:
    return Code((planes,), mul, add, book)


@dataclass(frozen=True)
class Layout:
    """One qtype: its fields in file order and what they hold (see the module's formula).

    Attributes:
        qtype: gguf's enum member.
        formula: the row in words, for people.
        fields: in file order, without gaps.
        d: the factor(s) of all weights: name of a float field, or a code.
        quants: one code per weight (per book.width weights); None: the d field is the weights themselves.
        scales, delta, signs, mins: further codes of the formula, or None.
        dmin, m: name of the f16 field, or "".
        block_size, type_size: weights and bytes per block, as gguf has them.
        offsets: {field name: byte offset in the block}.
    Raises:
        ValueError: the row contradicts gguf's sizes or itself.
    """

    qtype: GGMLQuantizationType
    formula: str
    fields: tuple[Field, ...]
    d: str | Code = "d"
    quants: Code | None = None
    scales: Code | None = None
    delta: Code | None = None
    signs: Code | None = None
    mins: Code | None = None
    dmin: str = ""
    m: str = ""
    block_size: int = field(init=False)
    type_size: int = field(init=False)
    offsets: Mapping[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        block_size, type_size = GGML_QUANT_SIZES[self.qtype]
        offsets: dict[str, int] = {}
        end = 0
        for member in self.fields:
            offsets[member.name] = end
            end += member.n_bytes
        if end != type_size or len(offsets) != len(self.fields):
            raise ValueError(f"{self.qtype.name}: fields {[*offsets]} have {end} bytes, expected {type_size}")
        for name, value in ("block_size", block_size), ("type_size", type_size), ("offsets", MappingProxyType(offsets)):
            object.__setattr__(self, name, value)
        self._check_codes()

    def _check_codes(self) -> None:
        """Every code must cover the block in equal shares, from words that have the bits it takes."""
        for label, code in self.codes().items():
            for plane in code.planes():
                word_bits = 8 * ELEMENT_SIZES[self.word(plane)]
                if plane.base == 2 and max(plane.shifts) + plane.bits > word_bits:
                    raise ValueError(f"{self.qtype.name}: {label} takes bits of {plane.field} beyond {word_bits}")
            n_values = self.n_codes(code) * (code.book.width if code.book else 1)
            if self.block_size % n_values or (label == "quants" and n_values != self.block_size):
                raise ValueError(f"{self.qtype.name}: {n_values} {label} for a block of {self.block_size} weights")

    def field_named(self, name: str) -> Field:
        """The field of that name."""
        return next(member for member in self.fields if member.name == name)

    def codes(self) -> dict[str, Code]:
        """The codes of the row by their name in the formula, as far as it has them."""
        members = {name: getattr(self, name) for name in ("d", "quants", "scales", "delta", "signs", "mins")}
        return {name: code for name, code in members.items() if isinstance(code, Code)}

    def word(self, plane: Plane) -> str:
        """Element type that the plane's field is read as."""
        return plane.word or self.field_named(plane.field).element

    def word_slice(self, plane: Plane) -> slice:
        """The plane's words among all of its field, with the end spelled out."""
        n_words = self.field_named(plane.field).n_bytes // ELEMENT_SIZES[self.word(plane)]
        return slice(plane.start, n_words if plane.stop is None else plane.stop, plane.step)

    def n_codes(self, code: Code) -> int:
        """Number of codes in one block. Planes of a part must agree on it."""
        total = 0
        for part in code.parts:
            words = [len(range(*self.word_slice(plane).indices(1 << 30))) for plane in part]
            counts = {n * len(plane.shifts) for n, plane in zip(words, part, strict=True)}
            if len(counts) != 1 or any(n % plane.run for n, plane in zip(words, part, strict=True)):
                raise ValueError(f"{self.qtype.name}: planes of {[p.field for p in part]} give {counts} codes")
            total += counts.pop()
        return total


IQ1S_GRID = CodeBook("iq1s_grid", 2048, 8)
IQ2XXS_GRID = CodeBook("iq2xxs_grid", 256, 8)
IQ2XS_GRID = CodeBook("iq2xs_grid", 512, 8)
IQ2S_GRID = CodeBook("iq2s_grid", 1024, 8)
IQ3XXS_GRID = CodeBook("iq3xxs_grid", 256, 4)
IQ3S_GRID = CodeBook("iq3s_grid", 512, 4)
KSIGNS = CodeBook("ksigns_iq2xs", 128, 8)  # eight factors of 1 or -1, an even number of them -1
KVALUES_IQ4NL = CodeBook("kvalues_iq4nl", 16)
KVALUES_MXFP4 = CodeBook("kvalues_mxfp4", 16)  # e2m1, doubled
E8M0_HALF = CodeBook("e8m0_half", 256)  # 2**(e - 127) / 2
UE4M3_HALF = CodeBook("ue4m3_half", 256)  # unsigned e4m3 / 2; 0x7F is 0

_D = Field("d", "f16")
_NIBBLES = (0, 4)
_CRUMBS = (0, 2, 4, 6)
_BITS = tuple(range(8))
_TRITS = tuple(range(5))

_NIBBLES_16 = Plane("qs", 4, _NIBBLES, run=16)  # low nibbles are weights 0-15, high nibbles 16-31
_NIBBLES_32 = Plane("qs", 4, _NIBBLES, run=32)
_CRUMBS_32 = Plane("qs", 2, _CRUMBS, run=32)
_FIFTH_BITS = Plane("qh", 1, _BITS, lift=4)
_SCALE_NIBBLES = Plane("scales", 4, _NIBBLES)

# Q4_K and Q5_K: scale j and min j have 6 bits. For j < 4 they are the low bits of bytes j and j+4; for j >= 4 the low
# nibble (high nibble: min) of byte j+4, and above it the two high bits of byte j-4 (j: min).
_K_SCALES = Code(
    (
        (Plane("scales", 6, stop=4),),
        (Plane("scales", 4, start=8), Plane("scales", 2, (6,), lift=4, stop=4)),
    )
)
_K_MINS = Code(
    (
        (Plane("scales", 6, start=4, stop=8),),
        (Plane("scales", 4, (4,), start=8), Plane("scales", 2, (6,), lift=4, start=4, stop=8)),
    )
)
# TQ1_0: 32 bytes of five digits, 16 bytes of five digits, 4 bytes of four digits.
_TQ1_0_QUANTS = Code(
    (
        (Plane("qs", 2, _TRITS, run=32, stop=32, base=3),),
        (Plane("qs", 2, _TRITS, run=16, start=32, base=3),),
        (Plane("qh", 2, _TRITS[:4], run=4, base=3),),
    ),
    add=-1,
)
# IQ1_M: the four nibbles of its f16 are the top nibbles of the four u16 words of scales, lowest first.
_IQ1_M_D = Code(
    (tuple(Plane("scales", 4, (12,), lift=4 * i, word="u16", start=i, stop=i + 1) for i in range(4)),), as_f16=True
)

# By name, since an older gguf lacks the newest members.
_ROWS: dict[str, Callable[[GGMLQuantizationType], Layout]] = {
    "F32": partial(Layout, formula="w = d", fields=(Field("d", "f32"),)),
    "F16": partial(Layout, formula="w = d", fields=(_D,)),
    "BF16": partial(Layout, formula="w = d", fields=(Field("d", "bf16"),)),
    "Q4_0": partial(
        Layout,
        formula="w = d*(q - 8)",
        fields=(_D, Field("qs", "u8", 16)),
        quants=_code(_NIBBLES_16, add=-8),
    ),
    "Q4_1": partial(
        Layout,
        formula="w = d*q + m",
        fields=(_D, Field("m", "f16"), Field("qs", "u8", 16)),
        quants=_code(_NIBBLES_16),
        m="m",
    ),
    "Q5_0": partial(
        Layout,
        formula="w = d*(q - 16)",
        fields=(_D, Field("qh", "u8", 4), Field("qs", "u8", 16)),
        quants=_code(_NIBBLES_16, _FIFTH_BITS, add=-16),
    ),
    "Q5_1": partial(
        Layout,
        formula="w = d*q + m",
        fields=(_D, Field("m", "f16"), Field("qh", "u8", 4), Field("qs", "u8", 16)),
        quants=_code(_NIBBLES_16, _FIFTH_BITS),
        m="m",
    ),
    "Q8_0": partial(
        Layout,
        formula="w = d*q",
        fields=(_D, Field("qs", "i8", 32)),
        quants=_code(Plane("qs", 8)),
    ),
    "Q2_K": partial(
        Layout,
        formula="w = d*scale*q - dmin*min; 16 sub-blocks of 16, 4-bit scales and mins",
        fields=(Field("scales", "u8", QK_K // 16), Field("qs", "u8", QK_K // 4), _D, Field("dmin", "f16")),
        quants=_code(_CRUMBS_32),
        scales=_code(Plane("scales", 4)),
        mins=_code(Plane("scales", 4, (4,))),
        dmin="dmin",
    ),
    "Q3_K": partial(
        Layout,
        formula="w = d*(scale - 32)*(q - 4); 16 sub-blocks of 16, 6-bit scales",
        fields=(
            Field("hmask", "u8", QK_K // 8),
            Field("qs", "u8", QK_K // 4),
            Field("scales", "u8", K_SCALE_SIZE),
            _D,
        ),
        quants=_code(_CRUMBS_32, Plane("hmask", 1, _BITS, run=32, lift=2), add=-4),
        scales=_code(
            Plane("scales", 4, _NIBBLES, run=8, stop=8),
            Plane("scales", 2, _CRUMBS, run=4, lift=4, start=8),
            add=-32,
        ),
    ),
    "Q4_K": partial(
        Layout,
        formula="w = d*scale*q - dmin*min; 8 sub-blocks of 32, 6-bit scales and mins",
        fields=(_D, Field("dmin", "f16"), Field("scales", "u8", K_SCALE_SIZE), Field("qs", "u8", QK_K // 2)),
        quants=_code(_NIBBLES_32),
        scales=_K_SCALES,
        mins=_K_MINS,
        dmin="dmin",
    ),
    "Q5_K": partial(
        Layout,
        formula="w = d*scale*q - dmin*min; 8 sub-blocks of 32, 6-bit scales and mins",
        fields=(
            _D,
            Field("dmin", "f16"),
            Field("scales", "u8", K_SCALE_SIZE),
            Field("qh", "u8", QK_K // 8),
            Field("qs", "u8", QK_K // 2),
        ),
        quants=_code(_NIBBLES_32, Plane("qh", 1, _BITS, run=32, lift=4)),
        scales=_K_SCALES,
        mins=_K_MINS,
        dmin="dmin",
    ),
    "Q6_K": partial(
        Layout,
        formula="w = d*scale*(q - 32); 16 sub-blocks of 16, signed 8-bit scales",
        fields=(
            Field("ql", "u8", QK_K // 2),
            Field("qh", "u8", QK_K // 4),
            Field("scales", "i8", QK_K // 16),
            _D,
        ),
        quants=_code(Plane("ql", 4, _NIBBLES, run=64), Plane("qh", 2, _CRUMBS, run=32, lift=4), add=-32),
        scales=_code(Plane("scales", 8)),
    ),
    "TQ1_0": partial(
        Layout,
        formula="w = d*(q - 1); ternary digits, five to a byte",
        fields=(Field("qs", "u8", (QK_K - 4 * QK_K // 64) // 5), Field("qh", "u8", QK_K // 64), _D),
        quants=_TQ1_0_QUANTS,
    ),
    "TQ2_0": partial(
        Layout,
        formula="w = d*(q - 1)",
        fields=(Field("qs", "u8", QK_K // 4), _D),
        quants=_code(_CRUMBS_32, add=-1),
    ),
    "IQ1_S": partial(
        Layout,
        formula="w = d*(2*scale + 1)*(grid[q] +- 1/8); 8 sub-blocks of 32, 3-bit scales",
        fields=(_D, Field("qs", "u8", QK_K // 8), Field("qh", "u16", QK_K // 32)),
        quants=_code(Plane("qs", 8), Plane("qh", 3, (0, 3, 6, 9), lift=8), book=IQ1S_GRID),
        scales=_code(Plane("qh", 3, (12,)), mul=2, add=1),
        delta=_code(Plane("qh", 1, (15,)), mul=-0.25, add=0.125),
    ),
    "IQ1_M": partial(
        Layout,
        formula="w = d*(2*scale + 1)*(grid[q] +- 1/8); 16 sub-blocks of 16, 3-bit scales",
        fields=(Field("qs", "u8", QK_K // 8), Field("qh", "u8", QK_K // 16), Field("scales", "u8", QK_K // 32)),
        d=_IQ1_M_D,
        quants=_code(Plane("qs", 8), Plane("qh", 3, _NIBBLES, lift=8), book=IQ1S_GRID),
        scales=_code(Plane("scales", 3, (0, 3, 6, 9), word="u16"), mul=2, add=1),
        delta=_code(Plane("qh", 1, (3, 7)), mul=-0.25, add=0.125),
    ),
    "IQ2_XXS": partial(
        Layout,
        formula="w = d*(scale + 1/2)/4*grid[q]*sign; 8 sub-blocks of 32: a u32 of 4 indices, a u32 of signs and scale",
        fields=(_D, Field("qs", "u16", QK_K // 8)),
        quants=_code(Plane("qs", 8, (0, 8, 16, 24), word="u32", step=2), book=IQ2XXS_GRID),
        scales=_code(Plane("qs", 4, (28,), word="u32", start=1, step=2), mul=0.25, add=0.125),
        signs=_code(Plane("qs", 7, (0, 7, 14, 21), word="u32", start=1, step=2), book=KSIGNS),
    ),
    "IQ2_XS": partial(
        Layout,
        formula="w = d*(scale + 1/2)/4*grid[q]*sign; 16 sub-blocks of 16, 4-bit scales",
        fields=(_D, Field("qs", "u16", QK_K // 8), Field("scales", "u8", QK_K // 32)),
        quants=_code(Plane("qs", 9), book=IQ2XS_GRID),
        scales=_code(_SCALE_NIBBLES, mul=0.25, add=0.125),
        signs=_code(Plane("qs", 7, (9,)), book=KSIGNS),
    ),
    "IQ2_S": partial(
        Layout,
        formula="w = d*(scale + 1/2)/4*grid[q]*sign; 16 sub-blocks of 16, 4-bit scales; signs after the indices in qs",
        fields=(_D, Field("qs", "u8", QK_K // 4), Field("qh", "u8", QK_K // 32), Field("scales", "u8", QK_K // 32)),
        quants=_code(Plane("qs", 8, stop=QK_K // 8), Plane("qh", 2, _CRUMBS, lift=8), book=IQ2S_GRID),
        scales=_code(_SCALE_NIBBLES, mul=0.25, add=0.125),
        signs=_code(Plane("qs", 1, _BITS, start=QK_K // 8), mul=-2, add=1),
    ),
    "IQ3_XXS": partial(
        Layout,
        formula="w = d*(scale + 1/2)/2*grid[q]*sign; 8 sub-blocks of 32: after the indices, u32s of signs and scale",
        fields=(_D, Field("qs", "u8", 3 * QK_K // 8)),
        quants=_code(Plane("qs", 8, stop=QK_K // 4), book=IQ3XXS_GRID),
        scales=_code(Plane("qs", 4, (28,), word="u32", start=QK_K // 16), mul=0.5, add=0.25),
        signs=_code(Plane("qs", 7, (0, 7, 14, 21), word="u32", start=QK_K // 16), book=KSIGNS),
    ),
    "IQ3_S": partial(
        Layout,
        formula="w = d*(2*scale + 1)*grid[q]*sign; 8 sub-blocks of 32, 4-bit scales",
        fields=(
            _D,
            Field("qs", "u8", QK_K // 4),
            Field("qh", "u8", QK_K // 32),
            Field("signs", "u8", QK_K // 8),
            Field("scales", "u8", QK_K // 64),
        ),
        quants=_code(Plane("qs", 8), Plane("qh", 1, _BITS, lift=8), book=IQ3S_GRID),
        scales=_code(_SCALE_NIBBLES, mul=2, add=1),
        signs=_code(Plane("signs", 1, _BITS), mul=-2, add=1),
    ),
    "IQ4_NL": partial(
        Layout,
        formula="w = d*kvalues[q]",
        fields=(_D, Field("qs", "u8", 16)),
        quants=_code(_NIBBLES_16, book=KVALUES_IQ4NL),
    ),
    "IQ4_XS": partial(
        Layout,
        formula="w = d*(scale - 32)*kvalues[q]; 8 sub-blocks of 32, 6-bit scales",
        fields=(
            _D,
            Field("scales_h", "u16"),
            Field("scales_l", "u8", QK_K // 64),
            Field("qs", "u8", QK_K // 2),
        ),
        quants=_code(_NIBBLES_16, book=KVALUES_IQ4NL),
        scales=_code(Plane("scales_l", 4, _NIBBLES), Plane("scales_h", 2, tuple(range(0, 16, 2)), lift=4), add=-32),
    ),
    "MXFP4": partial(
        Layout,
        formula="w = e8m0(e)/2*kvalues[q]",
        fields=(Field("e", "u8"), Field("qs", "u8", 16)),
        d=_code(Plane("e", 8), book=E8M0_HALF),
        quants=_code(_NIBBLES_16, book=KVALUES_MXFP4),
    ),
    "NVFP4": partial(
        Layout,
        formula="w = ue4m3(d)/2*kvalues[q]; 4 sub-blocks of 16",
        fields=(Field("d", "u8", 4), Field("qs", "u8", 32)),
        d=_code(Plane("d", 8), book=UE4M3_HALF),
        quants=_code(Plane("qs", 4, _NIBBLES, run=8), book=KVALUES_MXFP4),
    ),
}

_NO_ROW: dict[str, str] = {
    "Q8_1": "holds activations inside ggml's dot products, never weights",
    "Q8_K": "holds activations inside ggml's dot products, never weights",
    "Q1_0": "gguf-py has no dequantizer for it",
    "I8": "integers, not weights",
    "I16": "integers, not weights",
    "I32": "integers, not weights",
    "I64": "integers, not weights",
    "F64": "float64 does not exist on every device",
}

_MEMBERS = GGMLQuantizationType.__members__

LAYOUTS: Mapping[GGMLQuantizationType, Layout] = MappingProxyType(
    {_MEMBERS[name]: row(_MEMBERS[name]) for name, row in _ROWS.items() if name in _MEMBERS}
)
NOT_SUPPORTED: Mapping[GGMLQuantizationType, str] = MappingProxyType(
    {_MEMBERS[name]: reason for name, reason in _NO_ROW.items() if name in _MEMBERS}
)


def byte_shape(qtype: GGMLQuantizationType, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the uint8 tensor that holds a tensor's bytes: bytes per row in the last dim.

    Args:
        qtype: any type that gguf knows, also one without a Layout.
        shape: in torch order; () is one weight.
    Raises:
        ValueError: the rows are not whole blocks.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    *outer, row = shape or (1,)
    if row % block_size:
        raise ValueError(
            f"{qtype.name} of shape {tuple(shape)}: rows of {row} weights, expected a multiple of {block_size}."
        )
    return (*outer, row // block_size * type_size)


def weight_shape(qtype: GGMLQuantizationType, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the weights in a uint8 tensor of `shape`: the inverse of byte_shape.

    Raises:
        ValueError: the rows are not whole blocks.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    *outer, row = shape
    if row % type_size:
        raise ValueError(
            f"{qtype.name} bytes of shape {tuple(shape)}: rows of {row} bytes, expected a multiple of {type_size}."
        )
    return (*outer, row // type_size * block_size)


def n_bytes(qtype: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` (torch order) stored as `qtype`. Raises as byte_shape does."""
    return prod(byte_shape(qtype, shape))


def bpw(qtype: GGMLQuantizationType) -> float:
    """Bits per weight."""
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    return 8 * type_size / block_size
