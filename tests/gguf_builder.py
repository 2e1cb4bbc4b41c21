# SPDX-License-Identifier: Apache-2.0
"""Builds GGUF bytes field by field, so that a test can write any of them wrongly.

`build_gguf` makes a sound file from metadata and tensors. `assemble` joins hand-made `pair` and `entry` bytes under a
header whose every field can be set. The value types are listed here again on purpose: a test must not take them from
the code it judges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALAR_CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """Encode a string; `length` replaces the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def array(item_type: int, items: Sequence[Any], count: int | None = None) -> bytes:
    """Encode an array value without its own type id; `count` replaces the true one."""
    n_items = len(items) if count is None else count
    return u32(item_type) + u64(n_items) + b"".join(value(item_type, item) for item in items)


def value(value_type: int, content: Any) -> bytes:
    """Encode a value without its type id. An array's content is (item type, items); bytes are taken as they are."""
    if value_type == STRING:
        return string(content)
    if isinstance(content, bytes):
        return content
    if value_type == ARRAY:
        return array(*content)
    return struct.pack(f"<{SCALAR_CODES[value_type]}", content)


def pair(key: str | bytes, value_type: int, content: Any) -> bytes:
    """Encode a key/value pair."""
    return string(key) + u32(value_type) + value(value_type, content)


def entry(name: str | bytes, ne: Sequence[int], qtype: int, offset: int = 0, n_dims: int | None = None) -> bytes:
    """Encode a row of the tensor table; `ne` is in ggml's order, `n_dims` replaces its true length."""
    dims = u32(len(ne) if n_dims is None else n_dims) + b"".join(map(u64, ne))
    return string(name) + dims + u32(qtype) + u64(offset)


def assemble(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Join the parts of a file; the counts default to the true ones."""
    n_tensors = len(entries) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    header = magic + u32(version) + u64(n_tensors) + u64(n_pairs) + b"".join((*pairs, *entries))
    return pad(header, alignment) + data


def build_gguf(
    metadata: Mapping[str, tuple[int, Any]],
    tensors: Iterable[tuple[str, int, Sequence[int], bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Build a sound file.

    Args:
        metadata: key -> (value type, content).
        tensors: (name, qtype, shape in torch order, bytes), stored in this order.
    """
    entries, data = [], b""
    for name, qtype, shape, content in tensors:
        entries.append(entry(name, list(reversed(shape)), qtype, len(data)))
        data = pad(data + content, alignment)
    pairs = [pair(key, *typed) for key, typed in metadata.items()]
    return assemble(pairs, entries, data, version=version, alignment=alignment)


def pad(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)
