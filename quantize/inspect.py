# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file holds and whether its numbers are finite, as plain records.

Owns describe(), which reads the header only, and check(), which looks at all data in chunks that bound its memory.
Where a type keeps its scales is asked of layouts.LAYOUTS; a code book for scales needs a line in SPECIAL_CODES. Knows
no command line and prints nothing; compare.py compares two files.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType

from ..errors import plain_text
from ..gguf_file import DEFAULT_ALIGNMENT, GGUFFile, TensorInfo
from ..gguf_header import MetadataValue
from ..kernels.torch_reference import unpack_codes
from ..layouts import LAYOUTS, NOT_SUPPORTED, Code, Layout
from ..models import archs, split_files, text_encoders

MAX_ITEMS = 16  # longest array that is decoded unasked
CHUNK_BYTES = 1 << 20  # looked at in one go by check(): what a cache holds

INTEGER_QTYPES = frozenset(q for q in GGMLQuantizationType if q.name in ("I8", "I16", "I32", "I64"))
# Exponents of all ones, which make a number inf or, with anything in the fraction, nan.
EXPONENT_MASKS: Mapping[str, int] = MappingProxyType({"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F80_0000})
# Code book of scales -> (codes that are nan in the format's definition, codes that make float32 weights overflow).
SPECIAL_CODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = MappingProxyType(
    {"e8m0_half": ((0xFF,), (0xFD, 0xFE)), "ue4m3_half": ((0x7F, 0xFF), ())}
)

Advance: TypeAlias = Callable[[int], object]  # told the bytes of file that were just dealt with
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MetadataRow:
    """One key/value pair.

    Attributes:
        key: as stored.
        kind: GGUF's name of the value type; of arrays that are not decoded only that they are ARRAY.
        n_items: items of an array, 1 for any other value.
        value: decoded, or None for an array longer than was asked for.
    """

    key: str
    kind: str
    n_items: int
    value: MetadataValue | None


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the table.

    Attributes:
        name, qtype, offset, n_bytes: as in TensorInfo; the offset counts within the tensor's own part of a split file.
        shape: the logical one, torch order; stored_shape: the one in the table.
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    n_bytes: int
    offset: int

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.stored_shape)


@dataclass(frozen=True)
class QtypeRow:
    """All tensors of one type taken together."""

    qtype: GGMLQuantizationType
    n_tensors: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Description:
    """What a file holds.

    Attributes:
        path: as given.
        n_files: files that it consists of, more than one if it is split; file_bytes: the size of all.
        version, alignment: of the container.
        arch: `general.architecture`, "" if it has none.
        title: what the tensors say it is, "" if nothing known.
        metadata, tensors: in file order.
        qtypes: most bytes first.
    """

    path: str
    n_files: int
    file_bytes: int
    version: int
    alignment: int
    arch: str
    title: str
    metadata: tuple[MetadataRow, ...]
    tensors: tuple[TensorRow, ...]
    qtypes: tuple[QtypeRow, ...]

    @property
    def n_weights(self) -> int:
        """Elements of all tensors."""
        return sum(row.n_weights for row in self.qtypes)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(row.n_bytes for row in self.qtypes)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return bits_per_weight(self.n_bytes, self.n_weights)


@dataclass(frozen=True)
class NonFinite:
    """Numbers of a tensor that are nan or inf.

    Attributes:
        tensor: its name; qtype: its type.
        part: the field of the block (d, dmin, m), or "weights" where the type has no blocks.
        n_nan, n_inf: how many, of n_numbers.
        first_block: index of the first block (weight) that has one.
    """

    tensor: str
    qtype: GGMLQuantizationType
    part: str
    n_nan: int
    n_inf: int
    n_numbers: int
    first_block: int


@dataclass(frozen=True)
class CheckResult:
    """What check() found.

    Attributes:
        n_tensors, n_bytes: what was looked at.
        problems: in file order, at most one for each part of a tensor.
        unchecked: name of a tensor that could not be looked at -> reason. Integers need no look.
    """

    n_tensors: int
    n_bytes: int
    problems: tuple[NonFinite, ...]
    unchecked: Mapping[str, str]


def bits_per_weight(n_bytes: int, n_weights: int) -> float:
    """Bits per weight, 0 where there are none."""
    return 8 * n_bytes / n_weights if n_weights else 0.0


def ignore(_n_bytes: int) -> None:
    """Stand in for a progress bar."""


def describe(file: GGUFFile, max_items: int | None = MAX_ITEMS) -> Description:
    """Describe a file from its header.

    Args:
        max_items: arrays longer than this are not decoded; None: all are.
    Raises:
        BadFile: metadata that has to be decoded is not sound.
        OSError: the size of a file cannot be had.
    """
    paths = split_files.paths_of(file)
    tensors = tuple(tensor_row(file, info) for info in file.tensors.values())
    alignment = file.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    arch = file.metadata.get("general.architecture", "")
    return Description(
        path=file.path,
        n_files=len(paths),
        file_bytes=sum(map(os.path.getsize, paths)),
        version=file.version,
        alignment=alignment if isinstance(alignment, int) else DEFAULT_ALIGNMENT,
        arch=plain_text(arch) if isinstance(arch, str) else "",
        title=_title({row.name: row.shape for row in tensors}, text_encoders.tags_of(file)),
        metadata=tuple(metadata_row(file, key, max_items) for key in file.metadata),
        tensors=tensors,
        qtypes=_histogram(tensors),
    )


def tensor_row(file: GGUFFile, info: TensorInfo) -> TensorRow:
    """One row of the table; raises BadFile where the file states an impossible logical shape."""
    shape = file.logical_shape(info.name)
    return TensorRow(info.name, info.qtype, shape, info.shape, info.n_bytes, info.offset)


def metadata_row(file: GGUFFile, key: str, max_items: int | None) -> MetadataRow:
    """One key/value pair, decoded unless it is an array of more than max_items."""
    kind, n_items = file.metadata.type_of(key), file.metadata.n_items(key)
    decoded = kind is not GGUFValueType.ARRAY or max_items is None or n_items <= max_items
    return MetadataRow(key, kind.name, n_items, file.metadata[key] if decoded else None)


def plain_value(value: Any) -> Any:
    """A metadata value made of Python's own numbers, texts and lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain_value(item) for item in value] if isinstance(value, list) else value


def _title(shapes: Mapping[str, tuple[int, ...]], tags: Collection[str]) -> str:
    """What the tensors are, by the tables that loading and converting go by."""
    encoder = text_encoders.detect(shapes, tags)
    if encoder is not None:
        return encoder.title
    if text_encoders.is_mmproj(shapes):
        return "vision part (mmproj)"
    arch = archs.detect({key: shapes[name] for key, name in archs.strip_prefix(shapes).items()})
    if arch is not None:
        return arch.title
    found = text_encoders.find_native(shapes)
    natives = [archs.detect_encoder({key: shapes[name] for key, name in match.keys.items()}) for match in found]
    return " and ".join(native.title for native in natives if native is not None)


def _histogram(tensors: Iterable[TensorRow]) -> tuple[QtypeRow, ...]:
    groups: dict[GGMLQuantizationType, list[TensorRow]] = defaultdict(list)
    for row in tensors:
        groups[row.qtype].append(row)
    rows = [
        QtypeRow(qtype, len(group), sum(row.n_weights for row in group), sum(row.n_bytes for row in group))
        for qtype, group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.n_bytes, row.qtype.name)))


def check(file: GGUFFile, advance: Advance = ignore) -> CheckResult:
    """Look for scales, offsets and plain weights that are nan or inf, in every block of every tensor.

    Args:
        advance: called with the bytes just looked at; they add up to those of all tensors.
    """
    problems: list[NonFinite] = []
    unchecked: dict[str, str] = {}
    n_bytes = 0
    for info in file.tensors.values():
        layout = LAYOUTS.get(info.qtype)
        if layout is not None:
            problems += _check_tensor(file, info, layout, advance)
            n_bytes += info.n_bytes
            continue
        advance(info.n_bytes)
        if info.qtype not in INTEGER_QTYPES:
            unchecked[info.name] = f"{info.qtype.name}: {NOT_SUPPORTED.get(info.qtype, 'an unknown block layout')}"
    return CheckResult(len(file.tensors) - len(unchecked), n_bytes, tuple(problems), MappingProxyType(unchecked))


def _check_tensor(file: GGUFFile, info: TensorInfo, layout: Layout, advance: Advance) -> list[NonFinite]:
    n_blocks = info.n_bytes // layout.type_size
    blocks = file.data(info.name).reshape(n_blocks, layout.type_size)
    sources = {"d" if layout.quants else "weights": layout.d, "dmin": layout.dmin, "m": layout.m}
    found: dict[str, NonFinite] = {}
    for start in range(0, n_blocks, step := max(1, CHUNK_BYTES // layout.type_size)):
        chunk = blocks[start : start + step]
        for part, source in sources.items():
            flags = _find_non_finite(chunk, layout, source) if source else None
            if flags is None:
                continue
            nan, inf = flags  # each (n_blocks, numbers per block)
            first = start + int((nan | inf).any(axis=1).argmax())
            seen = found.get(part) or NonFinite(info.name, info.qtype, part, 0, 0, n_blocks * nan.shape[1], first)
            found[part] = replace(seen, n_nan=seen.n_nan + int(nan.sum()), n_inf=seen.n_inf + int(inf.sum()))
        advance(chunk.numel())
    return [found[part] for part in sources if part in found]


def _find_non_finite(blocks: torch.Tensor, layout: Layout, source: str | Code) -> tuple[Flags, Flags] | None:
    """Which numbers of a field or code are (nan, inf): each bool (n_blocks, numbers per block); None: none is."""
    if isinstance(source, str):
        field = layout.field_named(source)
        octets = blocks.numpy()[:, layout.offsets[source] :][:, : field.n_bytes]
        return _split_bits(octets.view(f"<u{field.n_bytes // field.count}"), EXPONENT_MASKS[field.element])
    codes = unpack_codes(blocks, layout, source).numpy()
    if source.as_f16:
        return _split_bits(codes.astype(np.uint16), EXPONENT_MASKS["f16"])
    if source.book is None:
        return None
    nan_codes, inf_codes = SPECIAL_CODES[source.book.name]
    table = np.zeros(source.book.n_entries, dtype=np.uint8)
    table[list(nan_codes)], table[list(inf_codes)] = 1, 2
    verdicts = table[codes]
    return (verdicts == 1, verdicts == 2) if verdicts.any() else None


def _split_bits(bits: npt.NDArray[Any], mask: int) -> tuple[Flags, Flags] | None:
    """As _find_non_finite(), for the bits of floats with this exponent mask: unsigned (n_blocks, n_numbers)."""
    bits = np.ascontiguousarray(bits)
    if not bits.size:
        return None
    # Two maxima are several times as fast as looking at each exponent: positive numbers are the largest of the signed
    # view, negative ones of the unsigned.
    negative = mask | 1 << 8 * bits.itemsize - 1
    if bits.max() < negative and bits.view(f"i{bits.itemsize}").max() < mask:
        return None
    magnitudes = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return magnitudes > mask, magnitudes == mask
