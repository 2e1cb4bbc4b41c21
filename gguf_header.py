# SPDX-License-Identifier: Apache-2.0
"""Numbers, text and values of a GGUF header, each checked against the bytes there are before it is used.

Format: ggml/docs/gguf.md; the limits that it does not set are the MAX_ constants below.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType as ValueType

from .errors import BadFile

MAX_HEADER_BYTES = 2**27  # several times the largest vocabulary with its merges; bounds the time an opening takes
MAX_STRINGS = 2**21  # in one array; the largest vocabularies have a quarter million, merges twice that
MAX_ARRAYS = 2**12  # in the whole header, nested ones included; bounds the time an opening takes
MAX_ARRAY_DEPTH = 4

# struct and numpy agree on these codes.
SCALAR_CODES: Mapping[ValueType, str] = MappingProxyType({
    ValueType.UINT8: "B", ValueType.UINT16: "H", ValueType.UINT32: "I", ValueType.UINT64: "Q", ValueType.BOOL: "?",
    ValueType.INT8: "b", ValueType.INT16: "h", ValueType.INT32: "i", ValueType.INT64: "q",
    ValueType.FLOAT32: "f", ValueType.FLOAT64: "d",
})  # fmt: skip
# Fewest bytes a value of each type takes: a string its length, an array its item type and count.
MIN_VALUE_BYTES: Mapping[ValueType, int] = MappingProxyType(
    {kind: struct.calcsize(f"<{code}") for kind, code in SCALAR_CODES.items()}
    | {ValueType.STRING: 8, ValueType.ARRAY: 12}
)
DAMAGED = "The file is damaged or incomplete; download it again."

_unpack_u64 = struct.Struct("<Q").unpack_from

MetadataValue: TypeAlias = "bool | int | float | str | npt.NDArray[Any] | list[Any]"


class HeaderReader:
    """A position in the header that never leaves it; section and name say what is being read when a check fails."""

    def __init__(self, buffer: mmap.mmap, path: str, pos: int = 0, section: str = "the header", name: str = "") -> None:
        self.buffer = buffer
        self.path = path
        self.pos = pos
        self.section = section
        self.name = name
        self.end = min(len(buffer), MAX_HEADER_BYTES)
        self.n_arrays = 0

    def enter(self, section: str, name: str = "") -> None:
        self.section, self.name = section, name

    def where(self) -> str:
        return f"{self.section} {quote(self.name)}" if self.name else self.section

    def fail(self, problem: str, hint: str = DAMAGED) -> NoReturn:
        raise BadFile(f"{self.where()} {problem}", path=self.path, subject=self.name or self.section, hint=hint)

    def fail_text(self, error: UnicodeDecodeError) -> NoReturn:
        self.fail(f"has text that is not UTF-8: {error.object[: error.start + 1][-40:]!r}")

    def take(self, n_bytes: int) -> int:
        """Step over n_bytes and return the offset where they start."""
        start = self.pos
        if n_bytes > self.end - start:
            if n_bytes <= len(self.buffer) - start:
                self.fail(f"makes the header longer than {MAX_HEADER_BYTES} bytes, which no model needs")
            self.fail(f"needs {n_bytes} bytes at offset {start}, but the file ends at {len(self.buffer)}")
        self.pos = start + n_bytes
        return start

    def check_count(self, n_items: int, item_bytes: int, what: str) -> None:
        """Refuse a count whose items could not fit even if each were as small as it can be."""
        if n_items * item_bytes > self.end - self.pos:
            self.fail(f"announces {n_items} {what}, more than there is room for")

    def u32(self) -> int:
        start = self.take(4)
        return int.from_bytes(self.buffer[start : self.pos], "little")

    def u64(self) -> int:
        start = self.take(8)
        return int.from_bytes(self.buffer[start : self.pos], "little")

    def string(self) -> str:
        return self.text(self.u64())

    def label(self, what: str, max_bytes: int) -> str:
        """Read a key or tensor name."""
        n_bytes = self.u64()
        if not 0 < n_bytes <= max_bytes:
            self.fail(f"has a {what} of {n_bytes} bytes, expected 1 to {max_bytes}")
        return self.text(n_bytes)

    def text(self, n_bytes: int) -> str:
        start = self.take(n_bytes)
        try:
            return self.buffer[start : self.pos].decode()
        except UnicodeDecodeError as error:
            self.fail_text(error)

    def value_type(self) -> ValueType:
        code = self.u32()
        try:
            return ValueType(code)
        except ValueError:
            self.fail(f"has value type {code}, which GGUF does not define")

    def array_header(self, depth: int) -> tuple[ValueType, int]:
        """Read item type and count of an array, depth arrays deep, and check that the items can fit."""
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"nests arrays more than {MAX_ARRAY_DEPTH} deep")
        self.n_arrays += 1
        if self.n_arrays > MAX_ARRAYS:
            self.fail(f"is one of more than {MAX_ARRAYS} arrays, which no model needs")
        item_type = self.value_type()
        n_items = self.u64()
        self.check_count(n_items, MIN_VALUE_BYTES[item_type], "array items")
        if item_type is ValueType.STRING and n_items > MAX_STRINGS:
            self.fail(f"announces {n_items} strings, more than the limit of {MAX_STRINGS}")
        return item_type, n_items

    def skip_value(self, kind: ValueType, depth: int = 1) -> None:
        if kind is ValueType.STRING:
            self.take(self.u64())
        elif kind is not ValueType.ARRAY:
            self.take(MIN_VALUE_BYTES[kind])
        else:
            item_type, n_items = self.array_header(depth)
            if item_type is ValueType.STRING:
                self.skip_strings(n_items)
            elif item_type is not ValueType.ARRAY:
                self.take(n_items * MIN_VALUE_BYTES[item_type])
            else:
                for _ in range(n_items):
                    self.skip_value(item_type, depth + 1)

    def skip_strings(self, n_strings: int) -> None:
        # A vocabulary has a quarter million, so one call each: unpack_from checks the lengths' bounds, take() the end.
        pos = self.pos
        try:
            for _ in range(n_strings):
                pos += 8 + _unpack_u64(self.buffer, pos)[0]
        except (struct.error, OverflowError):
            pos += 8  # the length that lies outside, so that take() reports it
        self.take(pos - self.pos)

    def strings(self, n_strings: int) -> list[str]:
        start = self.pos
        self.skip_strings(n_strings)
        raw, pos, texts = self.buffer[start : self.pos], 0, []
        try:
            for _ in range(n_strings):
                start = pos + 8
                pos = start + _unpack_u64(raw, pos)[0]
                texts.append(raw[start:pos].decode())
        except UnicodeDecodeError as error:
            self.fail_text(error)
        return texts

    def read_value(self, kind: ValueType, depth: int = 1) -> MetadataValue:
        if kind is ValueType.STRING:
            return self.string()
        if kind is not ValueType.ARRAY:
            value: MetadataValue = self.numbers(SCALAR_CODES[kind], 1).item()
            return value
        item_type, n_items = self.array_header(depth)
        if item_type is ValueType.STRING:
            return self.strings(n_items)
        if item_type is not ValueType.ARRAY:
            return self.numbers(SCALAR_CODES[item_type], n_items)
        return [self.read_value(item_type, depth + 1) for _ in range(n_items)]

    def numbers(self, code: str, n_items: int) -> npt.NDArray[Any]:
        """Read numbers into memory of their own, in native byte order."""
        # Bytes other than 0 and 1 must not become numpy bools unconverted.
        stored = np.dtype(f"<{code.replace('?', 'B')}")
        start = self.take(n_items * stored.itemsize)
        return np.frombuffer(self.buffer, stored, n_items, start).astype(code)


def quote(name: str) -> str:
    """Quote a name from the file for a message, on one line and not endlessly long."""
    return repr(name if len(name) <= 100 else f"{name[:97]}...")
