# SPDX-License-Identifier: Apache-2.0
"""Damage of any kind to a sound file ends in a file that can be read completely or in a GGUFError, nothing else."""

import itertools
import struct
from pathlib import Path

import gguf_builder as build
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

METADATA = {
    "general.architecture": (build.STRING, "flux"),
    "general.alignment": (build.U32, 32),
    "u8": (build.U8, 1),
    "i64": (build.I64, -1),
    "f64": (build.F64, 0.5),
    "flag": (build.BOOL, True),
    "tokens": (build.ARRAY, (build.STRING, ["", "ä", "token"])),
    "scores": (build.ARRAY, (build.F32, [0.0, 1.0, 2.0])),
    "nested": (build.ARRAY, (build.ARRAY, [(build.STRING, ["a"]), (build.I16, [1, 2])])),
}
TENSORS = [
    ("img_in.weight", int(QType.Q8_0), (2, 32), bytes(68)),
    ("blk.0.weight", int(QType.Q4_K), (1, 256), bytes(144)),
    ("conv.weight", int(QType.F16), (2, 1, 1, 2, 2), bytes(16)),
    ("marker", int(QType.F32), (0,), b""),
    ("scale", int(QType.F32), (), bytes(4)),
]
SOUND = build.build_gguf(METADATA, TENSORS)
HEADER_BYTES = len(SOUND) - 320  # most of the damage goes where it matters
NUMBERS = [0, 1, 2, 7, 8, 9, 12, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]

positions = st.integers(0, HEADER_BYTES - 1)
flips = st.tuples(st.just("flip"), positions, st.integers(1, 255))
words = st.tuples(st.just("word"), positions, st.sampled_from(NUMBERS))
insertions = st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40))
deletions = st.tuples(st.just("delete"), positions, st.integers(1, 40))
truncations = st.tuples(st.just("truncate"), st.integers(0, len(SOUND) - 1), st.none())
damages = st.lists(st.one_of(flips, words, insertions, deletions, truncations), min_size=1, max_size=3)

FUZZED = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
file_numbers = itertools.count()


def damage(content: bytes, kind: str, position: int, argument: int | bytes | None) -> bytes:
    position = min(position, len(content))
    before, after = content[:position], content[position:]
    if kind == "flip" and after:
        return before + bytes([after[0] ^ argument]) + after[1:]
    if kind == "word":
        width = 4 if argument < 2**32 and position % 2 else 8
        return before + struct.pack("<Q", argument)[:width] + after[width:]
    if kind == "insert":
        return before + argument + after
    if kind == "delete":
        return before + after[argument:]
    return before


def read_completely(folder: Path, content: bytes) -> list[GGUFError]:
    """Read all there is in the file and return the errors that this raised."""
    path = folder / f"fuzz-{next(file_numbers)}.gguf"  # a map of the last one may still be alive
    path.write_bytes(content)
    errors = []
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        return [error]
    for name, info in file.tensors.items():
        data = file.data(name)
        assert data.numel() == info.n_bytes
        assert 0 <= int(data.sum(dtype=torch.int64)) <= 255 * info.n_bytes
        assert torch.empty(info.shape, device="meta").shape == info.shape
    for key in file.metadata:
        try:
            file.metadata[key]
        except GGUFError as error:
            errors.append(error)
    return errors


def check(folder: Path, content: bytes) -> None:
    errors = read_completely(folder, content)
    assert all(str(error).startswith("fuzz-") for error in errors)
    event("read" if not errors else "refused" if len(errors) == 1 else "several texts are not UTF-8")


def test_sound_file_is_read(tmp_path: Path) -> None:
    assert read_completely(tmp_path, SOUND) == []


@settings(FUZZED, max_examples=800)
@given(changes=damages)
def test_damaged_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[str, int, int | bytes | None]]) -> None:
    content = SOUND
    for change in changes:
        content = damage(content, *change)
    check(tmp_path, content)


@settings(FUZZED, max_examples=400)
@given(
    counts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    fields=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(NUMBERS).map(lambda n: build.u32(n) if n < 2**32 else build.u64(n)),
            st.text(max_size=4).map(build.string),
        ),
        max_size=30,
    ),
)
def test_any_fields_after_the_counts_are_read_or_refused(
    tmp_path: Path, counts: tuple[int, int], fields: list[bytes]
) -> None:
    header = b"GGUF" + build.u32(3) + build.u64(counts[0]) + build.u64(counts[1])
    check(tmp_path, header + b"".join(fields) + bytes(64))


@pytest.mark.parametrize("value", [0x00, 0x7F, 0x80, 0xFF], ids=hex)
def test_any_single_byte_of_the_header_may_be_wrong(tmp_path: Path, value: int) -> None:
    for position in range(HEADER_BYTES):
        read_completely(tmp_path, SOUND[:position] + bytes([value]) + SOUND[position + 1 :])
