# SPDX-License-Identifier: Apache-2.0
"""Sound GGUF files are read completely, lazily and without copies."""

import gc
import os
import sys
import tracemalloc
import warnings
from pathlib import Path

import gguf
import gguf_builder as build
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SCALARS = {
    GGUFValueType.UINT8: 255,
    GGUFValueType.INT8: -128,
    GGUFValueType.UINT16: 65535,
    GGUFValueType.INT16: -32768,
    GGUFValueType.UINT32: 2**32 - 1,
    GGUFValueType.INT32: -(2**31),
    GGUFValueType.FLOAT32: 0.1,
    GGUFValueType.BOOL: True,
    GGUFValueType.UINT64: 2**64 - 1,
    GGUFValueType.INT64: -(2**63),
    GGUFValueType.FLOAT64: 0.1,
}
DTYPES = {
    GGUFValueType.UINT8: np.uint8,
    GGUFValueType.INT8: np.int8,
    GGUFValueType.UINT16: np.uint16,
    GGUFValueType.INT16: np.int16,
    GGUFValueType.UINT32: np.uint32,
    GGUFValueType.INT32: np.int32,
    GGUFValueType.FLOAT32: np.float32,
    GGUFValueType.BOOL: np.bool_,
    GGUFValueType.UINT64: np.uint64,
    GGUFValueType.INT64: np.int64,
    GGUFValueType.FLOAT64: np.float64,
}
STRINGS = ["", "a", "grüße", "日本語", "x" * 1000]
N_VOCABULARY = 262_144


def random_bytes(n_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


def write_reference(path: Path, version: int = 3) -> None:
    """Write a file with gguf-py that has every value type, and every qtype in 1 to 4 dimensions."""
    writer = gguf.GGUFWriter(path, "flux")
    for kind, value in SCALARS.items():
        writer.add_key_value(f"scalar.{kind.name}", value, kind)
        writer.add_key_value(f"array.{kind.name}", [value, 1, 0], GGUFValueType.ARRAY, kind)
    writer.add_string("string", STRINGS[2])
    writer.add_key_value("array.STRING", STRINGS, GGUFValueType.ARRAY, GGUFValueType.STRING)
    for i, (qtype, (_, type_size)) in enumerate(GGML_QUANT_SIZES.items()):
        byte_shape = [(3,), (2, 3), (1, 5, 2), (2, 1, 3, 1)][i % 4]
        byte_shape = (*byte_shape[:-1], byte_shape[-1] * type_size)
        content = random_bytes(int(np.prod(byte_shape)), seed=i).reshape(byte_shape)
        writer.add_tensor(f"blk.{i}.{qtype.name}.weight", content, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "r+b") as file:  # versions 2 and 3 differ in nothing else
        file.seek(4)
        file.write(build.u32(version))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module", params=[2, 3], ids=["v2", "v3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / f"reference-v{request.param}.gguf"
    write_reference(path, request.param)
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [f"token-{i}" for i in range(N_VOCABULARY)]
    metadata = {
        "tokenizer.ggml.tokens": (build.ARRAY, (build.STRING, tokens)),
        "tokenizer.ggml.scores": (build.ARRAY, (build.F32, np.arange(N_VOCABULARY, dtype="<f4").tolist())),
    }
    tensors = [(f"blk.{i}.weight", int(QType.F32), (4,), bytes(16)) for i in range(500)]
    return write(tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf", build.build_gguf(metadata, tensors))


def test_version_is_told(reference: Path) -> None:
    assert GGUFFile(reference).version == int(reference.stem[-1])


@pytest.mark.parametrize("kind", SCALARS, ids=lambda kind: kind.name)
def test_scalar_metadata_has_value_and_type(reference: Path, kind: GGUFValueType) -> None:
    value = GGUFFile(reference).metadata[f"scalar.{kind.name}"]
    assert type(value) is type(SCALARS[kind])
    assert value == (float(np.float32(0.1)) if kind is GGUFValueType.FLOAT32 else SCALARS[kind])
    assert GGUFFile(reference).metadata.type_of(f"scalar.{kind.name}") is kind


@pytest.mark.parametrize("kind", SCALARS, ids=lambda kind: kind.name)
def test_numeric_arrays_keep_their_width(reference: Path, kind: GGUFValueType) -> None:
    metadata = GGUFFile(reference).metadata
    value = metadata[f"array.{kind.name}"]
    assert isinstance(value, np.ndarray)
    assert value.dtype == DTYPES[kind]
    assert value.tolist() == np.array([SCALARS[kind], 1, 0], DTYPES[kind]).tolist()
    assert metadata.type_of(f"array.{kind.name}") is GGUFValueType.ARRAY


def test_strings_are_decoded(reference: Path) -> None:
    metadata = GGUFFile(reference).metadata
    assert metadata["string"] == STRINGS[2]
    assert metadata["array.STRING"] == STRINGS
    assert metadata["general.architecture"] == "flux"


def test_keys_are_in_file_order(reference: Path) -> None:
    metadata = GGUFFile(reference).metadata
    expected = [key for key in gguf.GGUFReader(reference).fields if not key.startswith("GGUF.")]
    assert list(metadata) == expected
    assert len(metadata) == len(expected)
    assert "no.such.key" not in metadata
    assert metadata.get("no.such.key") is None


def test_tensors_equal_those_of_gguf_py(reference: Path) -> None:
    file, expected = GGUFFile(reference), gguf.GGUFReader(reference).tensors
    assert list(file.tensors) == [tensor.name for tensor in expected]
    for tensor in expected:
        info = file.tensors[tensor.name]
        assert info.name == tensor.name
        assert info.qtype is tensor.tensor_type
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(file.data(tensor.name).numpy(), tensor.data.reshape(-1).view(np.uint8))


def test_five_dimensions_and_long_names_are_read(tmp_path: Path) -> None:
    name, content = "n" * 200, random_bytes(2 * 3 * 4 * 5 * 6 * 2, seed=0).tobytes()
    tensors = [(name, int(QType.F16), (2, 3, 4, 5, 6), content)]
    file = GGUFFile(write(tmp_path / "five.gguf", build.build_gguf({}, tensors)))
    assert file.tensors[name].shape == (2, 3, 4, 5, 6)
    assert bytes(file.data(name).tolist()) == content


def test_scalar_tensor_has_one_element(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "scalar.gguf", build.build_gguf({}, [("s", int(QType.F32), (), b"\0\0\x80\x3f")])))
    assert file.tensors["s"].shape == ()
    assert file.data("s").view(torch.float32).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 256)], ids=str)
def test_empty_tensors_have_no_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = [("before", 0, (1,), bytes(4)), ("marker", int(QType.Q4_K), shape, b""), ("after", 0, (1,), bytes(4))]
    file = GGUFFile(write(tmp_path / "empty.gguf", build.build_gguf({}, tensors)))
    assert file.tensors["marker"].shape == shape
    data = file.data("marker")
    assert (data.dtype, tuple(data.shape)) == (torch.uint8, (0,))


def test_last_tensor_may_be_empty_in_a_file_without_padding(tmp_path: Path) -> None:
    entries = [build.entry("a", [1], 0, 0), build.entry("marker", [0], 0, 32)]
    file = GGUFFile(write(tmp_path / "unpadded.gguf", build.assemble([], entries, bytes(4))))
    assert file.data("marker").numel() == 0


def test_file_without_tensors_or_metadata_is_read(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "bare.gguf", build.assemble(alignment=1)))
    assert (len(file.metadata), len(file.tensors)) == (0, 0)


def test_tensors_may_be_stored_in_any_order_with_gaps(tmp_path: Path) -> None:
    entries = [build.entry("second", [1], 0, 64), build.entry("first", [1], 0, 0)]
    data = b"1st." + bytes(60) + b"2nd." + bytes(100)
    file = GGUFFile(write(tmp_path / "gaps.gguf", build.assemble([], entries, data)))
    assert list(file.tensors) == ["second", "first"]
    assert bytes(file.data("second").tolist()) == b"2nd."
    assert bytes(file.data("first").tolist()) == b"1st."


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_of_the_file_is_used(tmp_path: Path, alignment: int) -> None:
    metadata = {"general.alignment": (build.U32, alignment)}
    tensors = [("a", 0, (1,), b"abcd"), ("b", 0, (1,), b"efgh")]
    file = GGUFFile(write(tmp_path / "aligned.gguf", build.build_gguf(metadata, tensors, alignment=alignment)))
    assert file.tensors["b"].offset == file.tensors["a"].offset + alignment
    assert bytes(file.data("b").tolist()) == b"efgh"


def test_nested_and_empty_arrays_are_decoded(tmp_path: Path) -> None:
    inner = (build.ARRAY, [(build.STRING, ["a", "b"]), (build.I32, [1, 2])])
    metadata = {
        "nested": (build.ARRAY, (build.ARRAY, [inner, (build.U8, [])])),
        "no.numbers": (build.ARRAY, (build.F32, [])),
        "no.strings": (build.ARRAY, (build.STRING, [])),
        "last": (build.U8, 7),
    }
    file = GGUFFile(write(tmp_path / "nested.gguf", build.build_gguf(metadata, [])))
    (strings, numbers), empty = file.metadata["nested"]
    assert strings == ["a", "b"]
    assert numbers.tolist() == [1, 2]
    assert (empty.dtype, empty.size) == (np.uint8, 0)
    assert (file.metadata["no.numbers"].dtype, file.metadata["no.numbers"].size) == (np.float32, 0)
    assert file.metadata["no.strings"] == []
    assert file.metadata["last"] == 7


def test_any_nonzero_byte_is_true_in_a_bool_array(tmp_path: Path) -> None:
    metadata = {"flags": (build.ARRAY, build.u32(build.BOOL) + build.u64(3) + b"\x00\x01\x02")}
    flags = GGUFFile(write(tmp_path / "flags.gguf", build.build_gguf(metadata, []))).metadata["flags"]
    assert flags.view(np.uint8).tolist() == [0, 1, 1]


def test_arrays_outlive_the_file_and_belong_to_the_caller(reference: Path) -> None:
    file = GGUFFile(reference)
    value = file.metadata["array.INT32"]
    value[0] = 5
    assert file.metadata["array.INT32"][0] == SCALARS[GGUFValueType.INT32]
    assert value.base is None


def test_tensor_table_is_read_only(reference: Path) -> None:
    file = GGUFFile(reference)
    with pytest.raises(TypeError):
        file.tensors["new"] = None  # type: ignore[index]


def test_data_lies_in_one_map_with_storages_of_its_own(reference: Path) -> None:
    file = GGUFFile(reference)
    starts = set()
    for name, info in file.tensors.items():
        data = file.data(name)
        assert (data.dtype, tuple(data.shape), data.storage_offset()) == (torch.uint8, (info.n_bytes,), 0)
        assert data.untyped_storage().nbytes() == info.n_bytes
        starts.add(data.data_ptr() - info.offset)
    assert len(starts) == 1


@linux_only
def test_neither_opening_nor_data_reads_the_tensors(tmp_path: Path) -> None:
    """Memory grows by the pages that are touched, not by the 256 MiB that are mapped."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    entries = [build.entry(f"t{i}", [2**20], 0, i * 2**22) for i in range(64)]
    path = write(tmp_path / "large.gguf", build.assemble([], entries))
    os.truncate(path, path.stat().st_size + 64 * 2**22)
    before = resident_bytes()
    file = GGUFFile(path)
    tensors = [file.data(name).view(torch.float32).view(1024, 1024) for name in file.tensors]
    assert resident_bytes() - before < 8 * 2**20
    assert sum(tensor.numel() for tensor in tensors) == 64 * 2**20


@linux_only
def test_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """A private map that reserves memory fails here with "Cannot allocate memory"."""
    n_weights = 2**38
    path = write(tmp_path / "huge.gguf", build.assemble([], [build.entry("huge", [n_weights], 0)]))
    os.truncate(path, path.stat().st_size + 4 * n_weights)
    data = GGUFFile(path).data("huge")
    assert data.numel() == 4 * n_weights
    assert data[-1] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="the map is read-only there")
def test_writing_to_data_does_not_reach_the_file(reference: Path) -> None:
    before = reference.read_bytes()
    file = GGUFFile(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in file.tensors:
            file.data(name).fill_(7)
    assert reference.read_bytes() == before


def test_windows_map_gives_the_same_bytes_without_a_warning(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GGUFFile(reference)
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(sys, "platform", "win32")
        file = GGUFFile(reference)
        tensors = {name: file.data(name) for name in file.tensors}
    assert all(torch.equal(data, expected.data(name)) for name, data in tensors.items())


def test_data_outlives_the_file_object(tmp_path: Path) -> None:
    path = write(tmp_path / "gone.gguf", build.build_gguf({}, [("a", 0, (2,), b"abcdefgh")]))
    data = GGUFFile(path).data("a")
    gc.collect()
    assert bytes(data.tolist()) == b"abcdefgh"


@linux_only
def test_no_file_handle_is_left(reference: Path, tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    file = GGUFFile(reference)
    tensors = [file.data(name) for name in file.tensors]
    broken = write(tmp_path / "broken.gguf", b"GGUF")
    for _ in range(20):
        with pytest.raises(GGUFError):
            GGUFFile(broken)
    del file, tensors
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_decodes_no_vocabulary(vocabulary: Path) -> None:
    """The tokens take about 20 MB as Python strings and 5 MB in the file; opening must need a fraction of that."""
    GGUFFile(vocabulary)  # what is cached once for all files is not counted
    tracemalloc.start()
    try:
        file = GGUFFile(vocabulary)
        assert "tokenizer.ggml.tokens" in file.metadata
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert vocabulary.stat().st_size > 4 * 2**20
    assert peak < 2**20


def test_vocabulary_is_decoded_when_asked_for(vocabulary: Path) -> None:
    metadata = GGUFFile(vocabulary).metadata
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    assert (len(tokens), tokens[0], tokens[-1]) == (N_VOCABULARY, "token-0", f"token-{N_VOCABULARY - 1}")
    assert np.array_equal(scores, np.arange(N_VOCABULARY, dtype=np.float32))


def test_text_that_is_not_utf8_is_reported_when_asked_for(tmp_path: Path) -> None:
    metadata = {
        "bad.text": (build.STRING, b"ab\xff"),
        "bad.list": (build.ARRAY, build.array(build.STRING, ["ok", b"\xc3("])),
        "good": (build.U8, 1),
    }
    file = GGUFFile(write(tmp_path / "latin1.gguf", build.build_gguf(metadata, [])))
    assert file.metadata["good"] == 1
    with pytest.raises(GGUFError, match=r"^latin1\.gguf: metadata key 'bad\.text' has .* not UTF-8: b'ab\\xff'"):
        file.metadata["bad.text"]
    with pytest.raises(GGUFError, match=r"metadata key 'bad\.list' .* not UTF-8: b'\\xc3'"):
        file.metadata["bad.list"]


def test_long_names_are_shortened_in_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "long.gguf", build.assemble([], [build.entry("n" * 1000, [1], 99)], bytes(4)))
    with pytest.raises(GGUFError, match=r"tensor 'n{97}\.\.\.' has type id 99") as caught:
        GGUFFile(path)
    assert caught.value.subject == "n" * 1000
