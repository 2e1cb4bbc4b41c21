# SPDX-License-Identifier: Apache-2.0
"""Every malformed GGUF ends in one clear error, quickly and without taking memory."""

import errno
import os
import struct
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import gguf_builder as build
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit import mapped_file
from gguf_kit.errors import BadFile, GGUFError, UnsupportedQtype
from gguf_kit.gguf_file import MAX_ENTRIES, GGUFFile
from gguf_kit.gguf_header import MAX_HEADER_BYTES

HUGE = 2**64 - 1
F32, Q8_0, Q4_K = int(QType.F32), int(QType.Q8_0), int(QType.Q4_K)
ARCH = build.pair("general.architecture", build.STRING, "flux")
WEIGHT = build.entry("a.weight", [8], F32)
SOUND = build.assemble([ARCH], [WEIGHT], bytes(32))


@dataclass(frozen=True)
class Case:
    """A malformed file.

    Attributes:
        id: what is wrong with it.
        content: the file's bytes.
        culprit: what the message has to name.
        error: the class it has to be.
    """

    id: str
    content: bytes
    culprit: str
    error: type[GGUFError] = BadFile


def with_pair(key: str | bytes, value_type: int, content: object) -> bytes:
    return build.assemble([ARCH, build.pair(key, value_type, content)], [WEIGHT], bytes(32))


def with_array(item_type: int, count: int, rest: bytes = b"") -> bytes:
    return with_pair("list", build.ARRAY, build.u32(item_type) + build.u64(count) + rest)


def with_tensors(*entries: bytes, data: bytes = bytes(64), pairs: tuple[bytes, ...] = ()) -> bytes:
    return build.assemble(pairs, entries, data)


def with_alignment(value: int, value_type: int = build.U32) -> bytes:
    return with_tensors(WEIGHT, pairs=(build.pair("general.alignment", value_type, value),))


def nested(depth: int) -> bytes:
    """Encode an array that holds an array, and so on, with one number in the innermost."""
    header = build.u32(build.ARRAY) + build.u64(1)
    return header * (depth - 1) + build.u32(build.U8) + build.u64(1) + b"\x01"


def cut_before(mark: bytes) -> bytes:
    return SOUND[: SOUND.index(mark)]


def cut_after(mark: bytes, n_bytes: int = 0) -> bytes:
    return SOUND[: SOUND.index(mark) + len(mark) + n_bytes]


def big_endian() -> bytes:
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32)


def pair_start(key: str, value_type: int) -> bytes:
    return build.string(key) + build.u32(value_type)


def with_string(length: int, rest: bytes = b"") -> bytes:
    """End the file inside a string value that announces `length` bytes."""
    return build.assemble([ARCH, pair_start("text", build.STRING) + build.u64(length) + rest], alignment=1)


def cut_array() -> bytes:
    return build.assemble([ARCH, build.pair("list", build.ARRAY, (build.STRING, ["a", "b" * 20]))], alignment=1)[:-1]


def unaligned_for_64() -> bytes:
    pairs = [build.pair("general.alignment", build.U32, 64)]
    return build.assemble(pairs, [WEIGHT, build.entry("b", [8], F32, 32)], bytes(96), alignment=64)


def overlap_by_one_byte() -> bytes:
    entries = [build.entry("a", [33], int(QType.I8)), build.entry("b", [8], F32, 32)]
    return build.assemble([], entries, bytes(64))


def tensor_inside_another() -> bytes:
    entries = [build.entry("a", [64], F32), build.entry("b", [8], F32, 64), build.entry("c", [8], F32, 256)]
    return build.assemble([], entries, bytes(288))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SAFETENSORS = build.u64(64) + b'{"a.weight":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}  ' + bytes(32)

CASES = [
    # not GGUF at all
    Case("empty file", b"", "empty"),
    Case("one byte", b"G", "b'G'"),
    Case("wrong magic", b"GGML" + SOUND[4:], "b'GGML'"),
    Case("lower-case magic", b"gguf" + SOUND[4:], "b'gguf'"),
    Case("byte-swapped magic", b"FUGG" + SOUND[4:], "b'FUGG'"),
    Case("Git LFS pointer", LFS, "Git LFS pointer"),
    Case("safetensors", SAFETENSORS, "safetensors"),
    Case("zip archive", b"PK\x03\x04" + bytes(64), "zip archive"),
    Case("web page", b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    # version
    Case("version 0", build.assemble(version=0), "version 0"),
    Case("version 1", build.assemble(version=1), "version 1"),
    Case("version 4", build.assemble(version=4), "version 4"),
    Case("version of 32 bits", build.assemble(version=2**32 - 1), "version 4294967295"),
    Case("big-endian", big_endian(), "big-endian"),
    # cut off
    Case("cut after the magic", SOUND[:4], "the header needs 4 bytes"),
    Case("cut inside the version", SOUND[:6], "the header needs 4 bytes"),
    Case("cut inside the tensor count", SOUND[:12], "the header needs 8 bytes"),
    Case("cut inside the pair count", build.assemble(alignment=1)[:20], "the header needs 8 bytes"),
    Case("cut after the header", SOUND[:24], "1 tensors"),
    Case("cut inside a key", build.assemble([ARCH[:16]], alignment=1), "metadata entry 1 of 1"),
    Case("cut before a value", build.assemble([ARCH[: 8 + 20 + 4]], alignment=1), "'general.architecture'"),
    Case("cut inside a value", cut_before(b"lux"), "'general.architecture'"),
    Case("cut inside a tensor name", cut_after(b"a.we"), "tensor entry 1 of 1"),
    Case("cut inside the dimensions", cut_after(b"a.weight", 8), "'a.weight'"),
    Case("cut before the qtype", cut_after(b"a.weight", 12), "'a.weight'"),
    Case("cut inside the offset", build.assemble([], [WEIGHT[:-4]], alignment=1), "'a.weight'"),
    Case("cut before the data", SOUND[:-32], "'a.weight' ends beyond the file, which is 32 bytes short"),
    Case("last byte missing", SOUND[:-1], "which is 1 bytes short"),
    # counts
    Case("endless tensors", build.assemble([ARCH], [WEIGHT], bytes(32), n_tensors=HUGE), f"{HUGE} tensors"),
    Case("endless pairs", build.assemble([ARCH], [WEIGHT], bytes(32), n_pairs=HUGE), f"{HUGE} key/value pairs"),
    Case("one tensor too many", build.assemble([ARCH], [WEIGHT], bytes(32), n_tensors=2), "tensor entry 2 of 2"),
    Case("one pair too many", build.assemble([ARCH], [WEIGHT], bytes(32), n_pairs=2), "tensor entry 1 of 1"),
    Case("more tensors than any model", build.assemble(data=bytes(2**22), n_tensors=MAX_ENTRIES + 1), "the limit"),
    Case(
        "more arrays than any model",
        build.assemble([build.pair("k", build.ARRAY, (build.ARRAY, [(build.U8, [])] * 5000))]),
        "more than 4096 arrays",
    ),
    Case("more pairs than any model", build.assemble(data=bytes(2**22), n_pairs=MAX_ENTRIES + 1), "the limit"),
    # keys
    Case("empty key", with_pair("", build.U8, 1), "key of 0 bytes"),
    Case("key longer than allowed", with_pair("k" * 65536, build.U8, 1), "key of 65536 bytes"),
    Case("key with endless length", build.assemble([build.string("k", HUGE) + bytes(16)]), f"key of {HUGE} bytes"),
    Case("key beyond the file", build.assemble([build.string("k", 60000) + bytes(16)]), "needs 60000 bytes"),
    Case("key that is not UTF-8", with_pair(b"k\xff", build.U8, 1), r"not UTF-8: b'k\xff'"),
    Case("key with half a character", with_pair(b"k\xe6\x97", build.U8, 1), r"not UTF-8: b'k\xe6'"),
    Case("duplicate key", build.assemble([ARCH, ARCH]), "'general.architecture' occurs twice"),
    # values
    Case("undefined value type", with_pair("odd", 13, b"\0"), "'odd' has value type 13"),
    Case("value type of 32 bits", with_pair("odd", 2**32 - 1, b"\0"), "'odd' has value type 4294967295"),
    Case("string of endless length", with_string(HUGE), f"'text' needs {HUGE} bytes"),
    Case("string of a negative length", with_string(2**63), f"'text' needs {2**63} bytes"),
    Case("string one byte beyond the file", with_string(4, b"abc"), "'text' needs 4 bytes"),
    Case("value missing at the end", build.assemble([pair_start("k", build.U64)], alignment=1), "1 key/value"),
    # arrays
    Case("endless array of numbers", with_array(build.F32, HUGE), f"{HUGE} array items"),
    Case("array whose size wraps 64 bits", with_array(build.U64, 2**61 + 1, bytes(8)), f"{2**61 + 1} array items"),
    Case("array one number beyond the file", with_array(build.U8, 200, bytes(9)), "'list' announces 200"),
    Case("endless array of strings", with_array(build.STRING, HUGE), f"{HUGE} array items"),
    Case("array of more strings than fit", with_array(build.STRING, 100, bytes(80)), "100 array items"),
    Case("array with an endless string", with_array(build.STRING, 2, build.string("a") + build.u64(HUGE)), "'list'"),
    Case("array with a string up to 2**63", with_array(build.STRING, 2, build.u64(2**63 - 8)), "'list' needs"),
    Case("array with a string beyond the file", with_array(build.STRING, 2, build.u64(300)), "'list' needs"),
    Case("array whose last string is cut", cut_array(), "'list' needs"),
    Case("array of an undefined type", with_array(99, 1, bytes(8)), "'list' has value type 99"),
    Case("array without a count", build.assemble([ARCH, pair_start("list", build.ARRAY)], alignment=1), "'list' needs"),
    Case("arrays nested too deep", with_pair("nest", build.ARRAY, nested(5)), "'nest' nests arrays more than 4"),
    Case("arrays nested without end", with_pair("nest", build.ARRAY, nested(20000)), "'nest' nests arrays"),
    Case("endless array of arrays", with_array(build.ARRAY, HUGE), f"{HUGE} array items"),
    Case("array of more arrays than fit", with_array(build.ARRAY, 20, bytes(24)), "20 array items"),
    Case("array of an endless array", with_array(build.ARRAY, 1, build.u32(build.F64) + build.u64(HUGE)), "'list'"),
    # alignment
    Case("alignment 0", with_alignment(0), "'general.alignment' is 0"),
    Case("alignment 1", with_alignment(1), "'general.alignment' is 1"),
    Case("alignment that is no power of two", with_alignment(48), "'general.alignment' is 48"),
    Case("huge alignment", with_alignment(2**31), f"'general.alignment' is {2**31}"),
    Case("alignment of 64 bits", with_alignment(32, build.U64), "'general.alignment' has type UINT64"),
    Case("negative alignment", with_alignment(-32, build.I32), "'general.alignment' has type INT32"),
    # tensor names
    Case("empty tensor name", with_tensors(build.entry("", [8], F32)), "name of 0 bytes"),
    Case("endless tensor name", with_tensors(build.u64(HUGE) + bytes(32)), f"name of {HUGE} bytes"),
    Case("tensor name longer than allowed", with_tensors(build.entry("n" * 1025, [8], F32)), "name of 1025 bytes"),
    Case("tensor name that is not UTF-8", with_tensors(build.entry(b"\xe9", [8], F32)), "tensor entry 1 of 1"),
    Case("duplicate tensor", with_tensors(WEIGHT, build.entry("a.weight", [8], F32, 32)), "'a.weight' occurs twice"),
    # shapes
    Case("9 dimensions", with_tensors(build.entry("w", [1] * 9, F32)), "'w' has 9 dimensions"),
    Case("endless dimensions", with_tensors(build.entry("w", [1], F32, n_dims=2**32 - 1)), "'w' has 4294967295 dim"),
    Case("one dimension too many", with_tensors(build.entry("w", [8], F32, 32, n_dims=2)), "'w'"),
    Case("endless dimension", with_tensors(build.entry("w", [HUGE], F32)), "'w' has dimensions"),
    Case("negative dimension", with_tensors(build.entry("w", [2**63], F32)), "'w' has dimensions"),
    Case("product that wraps to 0", with_tensors(build.entry("w", [2**32, 2**32], F32)), "'w' has dimensions"),
    Case("product that wraps to 8", with_tensors(build.entry("w", [8, 2**62 + 1, 4], F32)), "'w' has dimensions"),
    Case("bytes that wrap to 0", with_tensors(build.entry("w", [2**62], F32)), "'w' ends beyond the file"),
    Case("empty tensor of endless strides", with_tensors(build.entry("w", [0, HUGE, HUGE], F32)), "'w' has dimensions"),
    Case("half a block per row", with_tensors(build.entry("w", [16, 2], Q8_0)), "'w' has rows of 16 weights"),
    Case("scalar of a block type", with_tensors(build.entry("w", [], Q8_0)), "'w' has rows of 1 weights"),
    Case("rows between block sizes", with_tensors(build.entry("w", [384, 2], Q4_K)), "Q4_K's block size 256"),
    # types
    Case("unknown qtype", with_tensors(build.entry("w", [256], 200)), "'w' has type id 200", UnsupportedQtype),
    Case("qtype of 32 bits", with_tensors(build.entry("w", [8], 2**32 - 1)), "'w' has type id", UnsupportedQtype),
    Case("early qtype that ggml removed", with_tensors(build.entry("w", [32], 4)), "type id 4,", UnsupportedQtype),
    Case("repacked qtype that ggml removed", with_tensors(build.entry("w", [32], 31)), "type id 31,", UnsupportedQtype),
    # extents
    Case("unaligned offset", with_tensors(build.entry("w", [8], F32, 4)), "'w' has offset 4"),
    Case("offset unaligned for this file", unaligned_for_64(), "'b' has offset 32"),
    Case("offset beyond the file", with_tensors(build.entry("w", [8], F32, 2**40)), "'w' ends beyond the file"),
    Case("endless offset", with_tensors(build.entry("w", [8], F32, HUGE - 31)), "'w' ends beyond the file"),
    Case("tensor larger than the file", with_tensors(build.entry("w", [2**40], F32)), "'w' ends beyond the file"),
    Case("same offset twice", with_tensors(WEIGHT, build.entry("b", [8], F32, 0)), "inside tensor 'a.weight'"),
    Case("overlap by one byte", overlap_by_one_byte(), "'b' starts at 128, inside tensor 'a'"),
    Case("tensor inside another", tensor_inside_another(), "'b' starts at 192, inside tensor 'a'"),
    Case("data starts beyond the file", build.assemble([], [WEIGHT], alignment=1), "'a.weight' ends beyond the file"),
]


def check(path: Path, culprit: str, error: type[GGUFError]) -> None:
    """Open the file, which has to fail as described, within a second of CPU time and 4 MiB."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(error) as caught:
            GGUFFile(path)
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{path.name}: ")
    assert culprit in message
    assert len(message) < 500
    assert "\n" not in message
    assert caught.value.path == str(path)
    assert caught.value.hint.endswith(".")
    assert seconds < 1
    assert peak < 4 * 2**20


def test_the_file_that_the_cases_are_made_of_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND)
    assert GGUFFile(path).data("a.weight").numel() == 32
    assert GGUFFile(path).metadata["general.architecture"] == "flux"


def test_nesting_up_to_the_limit_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"
    path.write_bytes(with_pair("nest", build.ARRAY, nested(4)))
    assert GGUFFile(path).metadata["nest"][0][0][0].tolist() == [1]


def test_ids_and_contents_are_distinct() -> None:
    assert len({case.id for case in CASES}) == len({case.content for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_malformed_file_is_refused(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(case.content)
    check(path, case.culprit, case.error)


@pytest.mark.parametrize("n_bytes", range(len(SOUND)), ids=lambda n_bytes: f"{n_bytes} bytes")
def test_every_truncation_is_refused(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(SOUND[:n_bytes])
    check(path, "", BadFile)


def test_header_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    """A string of zeros, larger than any header, in a file that is large enough for it."""
    path = tmp_path / "blank.gguf"
    path.write_bytes(build.assemble([ARCH, pair_start("text", build.STRING) + build.u64(MAX_HEADER_BYTES)]))
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    check(path, f"'text' makes the header longer than {MAX_HEADER_BYTES} bytes", BadFile)


def test_missing_file_is_named(tmp_path: Path) -> None:
    check(tmp_path / "missing.gguf", "no such file", BadFile)


def test_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "folder.gguf"
    path.mkdir()
    check(path, "a folder", BadFile)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    check(path, "a device or pipe", BadFile)


def test_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    path = tmp_path / "mapped.gguf"
    path.write_bytes(SOUND)
    monkeypatch.setattr(mapped_file, "MappedFile", refuse)
    check(path, os.strerror(errno.ENOMEM), BadFile)


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    path.write_bytes(with_tensors(build.entry("\x1b[31m\nok", [16], Q8_0)))
    check(path, r"'\x1b[31m\nok'", BadFile)
