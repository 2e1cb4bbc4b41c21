# SPDX-License-Identifier: Apache-2.0
"""Damage to files, drawn from a seeded generator: of bytes, of lines of text, and of the fields of a GGUF file.

The fields are changed before they are written, so that what comes out is a sound container with an odd content; damage
to the bytes breaks the container itself. Knows no reader.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf_builder as build

NUMBERS = (0, 1, 2, 7, 8, 31, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 3e38, 1e-45, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "\0", "\n", "=", "#", "a" * 2000, "\u2581", "\ufeff", "\U0001f600", "\u0130", "ä", "<0x00>", "<s>",
    "../../x", "%s%n", "llama", "t5", "gpt2", "gemma4", "tekken", "gpt-4o", "F32", "Q8_0", "nan", "-1", "1e999",
    "[" * 500, '{"a":' * 300, "a b", "a  b", "x y z",
)  # fmt: skip
QTYPES = (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 14, 16, 24, 26, 27, 28, 30, 36, 39, 40, 41, 1000)
INTEGER_RANGES: Mapping[int, tuple[int, int]] = {
    build.U8: (0, 2**8 - 1), build.I8: (-(2**7), 2**7 - 1), build.U16: (0, 2**16 - 1), build.I16: (-(2**15), 2**15 - 1),
    build.U32: (0, 2**32 - 1), build.I32: (-(2**31), 2**31 - 1), build.U64: (0, 2**64 - 1),
    build.I64: (-(2**63), 2**63 - 1),
}  # fmt: skip


@dataclass
class Fields:
    """A GGUF file before it is written.

    Attributes:
        metadata: key -> (value type, content), as gguf_builder takes them.
        tensors: (name, qtype id, shape in torch order, bytes).
    """

    metadata: dict[str, tuple[int, Any]]
    tensors: list[tuple[str, int, tuple[int, ...], bytes]] = field(default_factory=list)

    def write(self) -> bytes:
        """The file."""
        return build.build_gguf(self.metadata, self.tensors)


@dataclass
class Json:
    """A file that is JSON text, or begins with it.

    Attributes:
        value: what the text says.
        frame: the text to the bytes of the file.
    """

    value: Any
    frame: Callable[[bytes], bytes] = bytes

    def write(self) -> bytes:
        """The file."""
        return self.frame(json.dumps(self.value).encode())


Content = Fields | Json | bytes


def damaged(draw: random.Random, sound: Sequence[Content]) -> bytes:
    """One file made of one of some sound ones; every third or so is sound as a container."""
    chosen = draw.choice(sound)
    if isinstance(chosen, bytes):
        content = chosen
        rounds = draw.randint(1, 4)
    else:
        parts = copy.deepcopy(chosen)
        for _ in range(draw.choice((0, 1, 1, 2, 3, 6))):
            if isinstance(parts, Fields):
                _damage_fields(draw, parts)
            else:
                parts.value = _damage_json(draw, parts.value)
        content = parts.write()
        rounds = draw.choice((0, 0, 1, 2, 3))
    for _ in range(rounds):
        content = damage_bytes(draw, content)
    return content


def damage_bytes(draw: random.Random, content: bytes) -> bytes:
    """One damage: a bit, a number, a text, a piece that is gone, doubled, moved, or an end that is missing."""
    # Most of what readers decide on stands at the beginning.
    end = len(content) if draw.random() < 0.5 else min(len(content), 512)
    at = draw.randint(0, end)
    length = min(draw.choice((1, 2, 4, 8, 16, 64, 300)), len(content) - at)
    kind = draw.randrange(8)
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        number = struct.pack("<Q", draw.choice(NUMBERS))[: draw.choice((1, 2, 4, 8))]
        return content[:at] + number + content[at + len(number) :]
    if kind == 2:
        return content[:at] + draw.choice(TEXTS).encode() + content[at:]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        return content[:at] + content[at : at + length] * draw.choice((2, 3, 50)) + content[at + length :]
    if kind == 5:
        return content[:at]
    if kind == 6:
        other = draw.randint(0, len(content))
        return content[:other] + content[at : at + length] + content[other:]
    return content[:at] + draw.randbytes(length) + content[at + length :]


def _damage_json(draw: random.Random, value: Any) -> Any:
    """The same value with one place in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice([*value])
        if draw.random() < 0.15:
            value[draw.choice(TEXTS)] = value.pop(key)
        else:
            value[key] = _damage_json(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        value[at] = _damage_json(draw, value[at])
        return value if draw.random() < 0.8 else value * draw.choice((0, 2, 20))
    odd = (None, True, -1, 0.5, 1e999, 10**30, [], {}, [[]], {"": 0}, draw.choice(NUMBERS), draw.choice(TEXTS))
    return draw.choice(odd)


def _damage_fields(draw: random.Random, fields: Fields) -> None:
    if fields.tensors and draw.random() < 0.4:
        _damage_tensor(draw, fields.tensors)
    elif fields.metadata:
        _damage_pair(draw, fields.metadata)


def _damage_tensor(draw: random.Random, tensors: list[tuple[str, int, tuple[int, ...], bytes]]) -> None:
    i, kind = draw.randrange(len(tensors)), draw.randrange(6)
    name, qtype, shape, data = tensors[i]
    if kind == 0:
        del tensors[i]
    elif kind == 1:
        tensors[i] = name + draw.choice((".", "s", *TEXTS))[:70], qtype, shape, data
    elif kind == 2:
        tensors[i] = name, draw.choice(QTYPES), shape, data
    elif kind == 3:
        tensors[i] = (
            name,
            qtype,
            tuple(draw.choice((*shape, 0, 1, 2, 3, 32, 256)) for _ in range(draw.randint(0, 5))),
            data,
        )
    elif kind == 4:
        tensors[i] = name, qtype, shape, draw.randbytes(len(data))
    else:
        tensors.append((draw.choice((name, f"{name}x", tensors[0][0])), qtype, shape, data))


def _damage_pair(draw: random.Random, metadata: dict[str, tuple[int, Any]]) -> None:
    key = draw.choice([*metadata])
    kind, content = metadata[key]
    choice = draw.random()
    if choice < 0.1:
        del metadata[key]
    elif choice < 0.25:
        metadata[key] = _any_value(draw)
    elif choice < 0.35:
        metadata[key] = metadata[draw.choice([*metadata])]
    elif kind == build.ARRAY:
        metadata[key] = kind, _other_array(draw, *content)
    else:
        metadata[key] = kind, _item(draw, kind)


def _other_array(draw: random.Random, item_type: int, items: Sequence[Any]) -> tuple[int, list[Any]]:
    items, choice = list(items), draw.randrange(6)
    at = draw.randrange(len(items)) if items else 0
    if choice == 0:
        del items[at : at + draw.choice((1, 2, 1000))]
    elif choice == 1:
        items[at:at] = items[at : at + draw.choice((1, 5))] * draw.choice((1, 3, 200))
    elif choice == 2 and items:
        other = draw.randrange(len(items))
        items[at], items[other] = items[other], items[at]
    elif choice == 3:
        item_type = draw.choice([*INTEGER_RANGES, build.F32, build.STRING, build.BOOL])
        items = [_item(draw, item_type) for _ in range(draw.choice((0, 1, len(items), 3)))]
    elif items and item_type != build.ARRAY:
        for _ in range(draw.choice((1, 1, 5, 50))):
            items[draw.randrange(len(items))] = _item(draw, item_type)
    return item_type, items


def _any_value(draw: random.Random) -> tuple[int, Any]:
    kind = draw.choice([*INTEGER_RANGES, build.F32, build.F64, build.BOOL, build.STRING, build.ARRAY])
    if kind != build.ARRAY:
        return kind, _item(draw, kind)
    return kind, _other_array(draw, build.STRING, ["a", "b"])


def _item(draw: random.Random, kind: int) -> Any:
    if kind == build.STRING:
        return draw.choice(TEXTS)
    if kind == build.BOOL:
        return draw.random() < 0.5
    if kind in INTEGER_RANGES:
        low, high = INTEGER_RANGES[kind]
        return draw.choice([low, high, *(n for n in (-1, 0, 1, 2, 3, 4, 6, 255, 257, 300) if low <= n <= high)])
    return draw.choice(FLOATS) if kind != build.ARRAY else (build.U8, [1])
