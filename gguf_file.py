# SPDX-License-Identifier: Apache-2.0
"""The GGUF container: a bounded, lazy reader of versions 2 and 3 that hands out tensor bytes without copying them.

A file is hostile input: every count, length, dimension, offset and product is checked against the bytes there are
before it is used, single values of the header by gguf_header.py. Opening reads the positions of the key/value pairs and
the tensor table; metadata values are decoded only when asked for, and no page of tensor data is touched. This module
knows no architecture and no way to dequantize. Format: ggml/docs/gguf.md; limits that it does not set are the MAX_
constants here and there.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.constants import GGUFValueType as ValueType

from .errors import BadFile, UnsupportedQtype
from .gguf_header import HeaderReader, MetadataValue, quote
from .mapped_file import map_file

SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8  # also what makes .view() to any dtype safe
MAX_ALIGNMENT = 2**20
MAX_ENTRIES = 2**15  # key/value pairs or tensors; bounds the memory of their tables
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 1024  # ggml stops at 64; image models exceed that
MAX_DIMS = 8  # ggml stops at 4; files with native 5-D convolutions exist

MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, value type, value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, name, n_dims, qtype, offset

# (offset, bytes there, what the file is, what to do) for files that are often met under a .gguf name.
MISTAKEN_FILES = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "Run 'git lfs pull', or download the file itself."),
    (0, b"PK\x03\x04", "a PyTorch checkpoint or another zip archive", "Get the model as a .gguf file."),
    (0, b"<!", "a web page", "Download the file again, logged in if its page asks for that."),
    (8, b'{"', "safetensors", "Load it with the node for safetensors models."),
)
# Ids that ggml once gave to types it has since removed; a newer gguf package does not bring them back.
REMOVED_QTYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
# Metadata key, followed by a tensor's name: the shape that it had before it was made to fit GGUF; int32, torch order.
ORIG_SHAPE_KEY = "comfy.gguf.orig_shape."
# Beginnings of keys that say what a file is; all other strings were carried along from the model it was made of.
OWN_KEYS = ("general.", "tokenizer.", "quantize.", "split.", "comfy.gguf.", "GGUF.")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        name: as stored.
        qtype: storage type; not every one has a dequantizer.
        shape: torch order (ggml's ne reversed), 0 to 8 dimensions, any of them may be 0.
        offset: bytes from the start of the file; without meaning where n_bytes is 0.
        n_bytes: stored size.
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Metadata(Mapping[str, MetadataValue]):
    """The key/value pairs in file order; each look-up decodes the value anew, so keep large ones.

    Values are bool, int, float, str, a numpy array in the stored width, or a list of str or of such arrays. A look-up
    raises BadFile where text is not UTF-8.
    """

    def __init__(self, buffer: mmap.mmap, path: str, index: dict[str, tuple[ValueType, int]]) -> None:
        self._buffer = buffer
        self._path = path
        self._index = index

    def __getitem__(self, key: str) -> MetadataValue:
        kind, pos = self._index[key]
        return HeaderReader(self._buffer, self._path, pos, "metadata key", key).read_value(kind)

    def __contains__(self, key: object) -> bool:  # Mapping's own would decode the value
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def n_items(self, key: str) -> int:
        """Return the number of items of an array without decoding them, 1 for any other value."""
        kind, pos = self._index[key]
        if kind is not ValueType.ARRAY:
            return 1
        return HeaderReader(self._buffer, self._path, pos, "metadata key", key).array_header(1)[1]

    def type_of(self, key: str) -> ValueType:
        """Return the stored type, ARRAY for all arrays; needed to write a value back as it was."""
        return self._index[key][0]


class GGUFFile:
    """An open GGUF file: checked header, lazy metadata, tensor bytes straight from the map.

    The file stays mapped while this object, its metadata or any tensor from data() is alive; there is nothing to close.

    Attributes:
        path: as given.
        version: 2 or 3.
        metadata: key -> value, decoded at each look-up.
        tensors: name -> TensorInfo, read-only, in file order.
    Raises:
        BadFile: the file cannot be read or is not a sound GGUF file.
        UnsupportedQtype: a tensor's type is unknown to the installed gguf package, so its size is too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._buffer = map_file(self.path)
        reader = HeaderReader(self._buffer, self.path)
        self.version = _read_version(reader)
        n_tensors = _read_count(reader, MIN_TENSOR_BYTES, "tensors")
        n_pairs = _read_count(reader, MIN_PAIR_BYTES, "key/value pairs")
        self.metadata = _read_metadata(reader, n_pairs)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            _read_tensors(reader, n_tensors, _read_alignment(reader, self.metadata))
        )
        _check_extents(reader, list(self.tensors.values()))

    def data(self, name: str) -> torch.Tensor:
        """Return the tensor's bytes, 1-D uint8 (n_bytes,): a storage of its own over the map, nothing is copied.

        mapped_file.file_range() tells where they lie, of a view of them too. Writing to them never reaches the file; on
        Windows, where the map is read-only, it ends the process.
        """
        info = self.tensors[name]
        return self._buffer.tensor(info.offset, info.n_bytes)

    def logical_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor had before it was made to fit GGUF, torch order.

        Raises:
            BadFile: the file states a shape with another number of elements.
        """
        stored, key = self.tensors[name].shape, ORIG_SHAPE_KEY + name
        if key not in self.metadata:
            return stored
        value = self.metadata[key] if self.metadata.n_items(key) <= MAX_DIMS else None
        shape = tuple(value.tolist()) if isinstance(value, np.ndarray) and value.dtype.kind in "iu" else None
        if shape is None or min(shape, default=0) < 0 or max(shape, default=0) > 2**48 or prod(shape) != prod(stored):
            problem = f"metadata key {quote(key)} is no shape that holds the {prod(stored)} elements of {stored}"
            raise BadFile(problem, path=self.path, subject=name, hint="Convert the model again.")
        return shape

    @property
    def arch(self) -> str:
        """`general.architecture` as the file has it, "" if it has none."""
        tag = self.metadata.get("general.architecture", "")
        return tag if isinstance(tag, str) else ""

    def carried_metadata(self) -> dict[str, str]:
        """Return the strings that were carried along from the safetensors file, such as `config`."""
        texts = (key for key in self.metadata if self.metadata.type_of(key) is ValueType.STRING)
        return {key: str(self.metadata[key]) for key in texts if not key.startswith(OWN_KEYS)}


def _read_version(reader: HeaderReader) -> int:
    """Check the magic and return the version, explaining what other kinds of file are."""
    head = reader.buffer[:64]
    if not head.startswith(b"GGUF"):
        reader.enter("the file")
        for offset, mark, kind, hint in MISTAKEN_FILES:
            if head.startswith(mark, offset):
                reader.fail(f"is {kind}, not GGUF", hint)
        reader.fail(f"starts with {head[:4]!r} instead of b'GGUF'", "It is damaged, or not a GGUF file.")
    reader.take(4)
    version = reader.u32()
    if version in SUPPORTED_VERSIONS:
        return version
    if version and version & 0xFFFF == 0:  # byte-swapped; no version will exceed 16 bits
        reader.fail("is big-endian, which is not supported", "Get the little-endian file or convert it with gguf-py.")
    hint = "Get a newer file." if version < min(SUPPORTED_VERSIONS) else "Update this pack."
    reader.fail(f"has GGUF version {version}, expected 2 or 3", hint)


def _read_count(reader: HeaderReader, item_bytes: int, what: str) -> int:
    n_items = reader.u64()
    reader.check_count(n_items, item_bytes, what)
    if n_items > MAX_ENTRIES:
        reader.fail(f"announces {n_items} {what}, more than the limit of {MAX_ENTRIES}")
    return n_items


def _read_metadata(reader: HeaderReader, n_pairs: int) -> Metadata:
    index: dict[str, tuple[ValueType, int]] = {}
    for i in range(n_pairs):
        reader.enter(f"metadata entry {i + 1} of {n_pairs}")
        key = reader.label("key", MAX_KEY_BYTES)
        reader.enter("metadata key", key)
        if key in index:
            reader.fail("occurs twice")
        kind = reader.value_type()
        index[key] = (kind, reader.pos)
        reader.skip_value(kind)
    return Metadata(reader.buffer, reader.path, index)


def _read_alignment(reader: HeaderReader, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    reader.enter("metadata key", key)
    kind = metadata.type_of(key)
    if kind is not ValueType.UINT32:
        reader.fail(f"has type {kind.name}, expected UINT32")
    alignment = metadata[key]
    if not isinstance(alignment, int) or alignment.bit_count() != 1 or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT:
        reader.fail(f"is {alignment}, expected a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
    return alignment


def _read_tensors(reader: HeaderReader, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    relative: dict[str, TensorInfo] = {}
    for i in range(n_tensors):
        reader.enter(f"tensor entry {i + 1} of {n_tensors}")
        info = _read_tensor(reader, alignment)
        if info.name in relative:
            reader.fail("occurs twice")
        relative[info.name] = info
    data_start = -(-reader.pos // alignment) * alignment
    return {name: replace(info, offset=data_start + info.offset) for name, info in relative.items()}


def _read_tensor(reader: HeaderReader, alignment: int) -> TensorInfo:
    """Read one row of the tensor table; its offset is still counted from the start of the data section."""
    name = reader.label("name", MAX_NAME_BYTES)
    reader.enter("tensor", name)
    n_dims = reader.u32()
    if n_dims > MAX_DIMS:
        reader.fail(f"has {n_dims} dimensions, expected at most {MAX_DIMS}")
    ne: list[int] = reader.numbers("Q", n_dims).tolist()
    qtype = _read_qtype(reader)
    offset = reader.u64()
    if offset % alignment:
        reader.fail(f"has offset {offset}, which is not a multiple of the alignment {alignment}")
    # Zeros are left out: torch multiplies the other dimensions into strides even where a tensor is empty.
    if prod(n for n in ne if n) >= 2**63:
        reader.fail(f"has dimensions {ne[::-1]}, more elements than can be counted")
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    row = ne[0] if ne else 1
    if row % block_size:
        reader.fail(f"has rows of {row} weights, expected a multiple of {qtype.name}'s block size {block_size}")
    return TensorInfo(name, qtype, tuple(ne[::-1]), offset, prod(ne) // block_size * type_size)


def _read_qtype(reader: HeaderReader) -> GGMLQuantizationType:
    code = reader.u32()
    if code in GGML_QUANT_SIZES:
        return GGMLQuantizationType(code)
    if code in REMOVED_QTYPES:
        problem, hint = "which ggml has removed", "Use a file in another type, such as Q8_0 or Q4_K_M."
    else:
        problem = "which the installed gguf package does not know"
        hint = "Update it (pip install -U gguf) or use a file in another type, such as Q8_0 or Q4_K_M."
    problem = f"{reader.where()} has type id {code}, {problem}"
    raise UnsupportedQtype(problem, path=reader.path, subject=reader.name, hint=hint)


def _check_extents(reader: HeaderReader, tensors: list[TensorInfo]) -> None:
    """Refuse tensor data that overlaps or lies outside the file."""
    stored = sorted((info for info in tensors if info.n_bytes), key=lambda info: info.offset)
    for before, after in pairwise(stored):
        if before.offset + before.n_bytes > after.offset:
            reader.enter("tensor", after.name)
            reader.fail(f"starts at {after.offset}, inside tensor {quote(before.name)}")
    n_missing = stored[-1].offset + stored[-1].n_bytes - len(reader.buffer) if stored else 0
    if n_missing > 0:
        reader.enter("tensor", stored[-1].name)
        reader.fail(f"ends beyond the file, which is {n_missing} bytes short", "Download it again.")
