# SPDX-License-Identifier: Apache-2.0
"""The binding to ggml, the names of builds, and what a build must compute."""

import ctypes
import json
import shutil
import sys
import threading
from pathlib import Path

import gguf
import make_files
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError, UnsupportedQtype
from gguf_kit.quantize import ggml
from gguf_kit.tools.llama_cpp import build, golden

FAST = [QType[name] for name in golden.PROGRAM_TYPES]
SILENT = print  # a log that pytest captures


@pytest.fixture(scope="module")
def trusted():
    """The binding over a ggml-base that others built."""
    return ggml.Ggml(Path(make_files.load_ggml()._name))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("GGUF_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encode(library, weights, qtype, importance=None):
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    out = torch.zeros(len(weights), weights.shape[1] // block_size * type_size, dtype=torch.uint8)
    library.quantize(weights, qtype, importance, out)
    return out


# The binding


@pytest.mark.parametrize("qtype", FAST, ids=lambda q: q.name)
@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "imatrix"])
def test_the_binding_gives_the_bytes_of_ggml(trusted, qtype, with_importance):
    weights = golden.golden_weights(3)
    importance = golden.golden_importance() if with_importance else None
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    expected = torch.zeros(3, 1024 // block_size * type_size, dtype=torch.uint8)
    pointer = importance.data_ptr() if with_importance else None
    make_files.load_ggml().ggml_quantize_chunk(
        qtype.value, weights.data_ptr(), expected.data_ptr(), 0, 3, 1024, pointer
    )
    assert torch.equal(encode(trusted, weights, qtype, importance), expected)
    assert expected.count_nonzero() > 0


def test_every_type_that_ggml_can_encode_is_encodable():
    library = make_files.load_ggml()
    known = {q for q in QType if hasattr(library, f"quantize_{q.name.lower().replace('_k', '_K')}")}
    assert known == ggml.ENCODABLE == ggml.Ggml.ENCODABLE


def test_requires_imatrix_says_what_ggml_says():
    library = make_files.load_ggml()
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    for qtype in ggml.ENCODABLE:
        assert ggml.requires_imatrix(qtype) == library.ggml_quantize_requires_imatrix(qtype.value)


def test_many_threads_give_the_bytes_of_one(trusted):
    weights = golden.golden_weights(32)
    for qtype in (QType.Q4_K, QType.IQ3_XXS):
        whole = encode(trusted, weights, qtype)
        parts = [None] * 4

        def work(i, qtype=qtype, parts=parts):
            parts[i] = encode(trusted, weights[8 * i : 8 * i + 8], qtype)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(torch.cat(parts), whole)


def test_no_rows_and_no_columns_are_no_work(trusted):
    assert encode(trusted, torch.zeros(0, 256), QType.Q4_K).shape == (0, 144)
    assert encode(trusted, torch.zeros(3, 0), QType.Q4_K).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weights": torch.zeros(2, 256, dtype=torch.float16)}, "float16"),
        ({"weights": torch.zeros(256)}, "dimensions"),
        ({"weights": torch.zeros(2, 255)}, "multiple"),
        ({"weights": torch.zeros(256, 2).T}, "contiguous"),
        ({"weights": torch.zeros(2, 256, device="meta")}, "CPU"),
        ({"out": torch.zeros(2, 143, dtype=torch.uint8)}, "out"),
        ({"out": torch.zeros(2, 144)}, "out"),
        ({"importance": torch.ones(255)}, "importance"),
        ({"importance": torch.ones(256, dtype=torch.float64)}, "importance"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tensors_that_ggml_would_misread_are_refused(trusted, change, word):
    given = {"weights": torch.zeros(2, 256), "importance": None, "out": torch.zeros(2, 144, dtype=torch.uint8)}
    given |= change
    with pytest.raises(ValueError, match=word):
        trusted.quantize(given["weights"], QType.Q4_K, given["importance"], given["out"])


def test_types_that_cannot_be_encoded_are_refused(trusted):
    with pytest.raises(UnsupportedQtype, match="Q8_K"):
        encode(trusted, torch.zeros(1, 256), QType.Q8_K)
    with pytest.raises(UnsupportedQtype, match="IQ2_XS needs an importance matrix"):
        encode(trusted, torch.zeros(1, 256), QType.IQ2_XS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30], ids=["nan", "inf", "huge"])
def test_values_on_which_ggml_would_end_the_process_are_refused(trusted, value):
    weights = torch.ones(1, 256)
    weights[0, 5] = value
    with pytest.raises(GGUFError, match="IQ3_XXS"):
        encode(trusted, weights, QType.IQ3_XXS)
    with pytest.raises(GGUFError, match="importances"):
        encode(trusted, torch.ones(1, 256), QType.IQ3_XXS, weights[0])


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "ggml.so").write_bytes(b"no library")
    with pytest.raises(ggml.BuildError, match=r"ggml\.so: the library cannot be used"):
        ggml.Ggml(tmp_path / "ggml.so")


# Names of builds


def test_a_build_is_found_only_under_its_own_key(cache, monkeypatch):
    assert ggml.find_library() is None
    path = ggml.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert ggml.find_library() == path
    monkeypatch.setattr(ggml, "build_key", lambda: "other")
    assert ggml.find_library() is None


@pytest.mark.parametrize("name", ggml.DECIDING_FILES)
def test_the_key_changes_with_every_deciding_file(tmp_path, name):
    for file in ggml.DECIDING_FILES:
        shutil.copyfile(ggml.BUILD_FOLDER / file, tmp_path / file)
    assert ggml.build_key(tmp_path) == ggml.build_key()
    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(text.replace(b"\n", b"\r\n"))
    assert ggml.build_key(tmp_path) == ggml.build_key()  # a checkout with other line ends is the same
    (tmp_path / name).write_bytes(text + b" ")
    assert ggml.build_key(tmp_path) != ggml.build_key()


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"GGUF_KIT_CACHE": "/c"}, "/c"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/gguf-kit"),
        ("linux", {}, "/home/user/.cache/gguf-kit"),
        ("darwin", {}, "/home/user/Library/Caches/gguf-kit"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/gguf-kit"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, system, variables, expected):
    for name in ("GGUF_KIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/user"))
    assert ggml.cache_folder() == Path(expected)


# What a build must compute


def test_the_stored_hashes_cover_every_type():
    stored = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))
    assert {QType[name] for name in stored["types"] if name in QType.__members__} == ggml.ENCODABLE
    assert "libggml-python" in stored["made_by"]
    for name, hashes in stored["types"].items():
        assert set(hashes) == ({"imatrix"} if ggml.requires_imatrix(QType[name]) else {"plain", "imatrix"})


def test_the_trusted_library_gives_the_stored_hashes(trusted):
    assert golden.wrong_types(trusted, FAST) == []


class _Off:
    """A library that is wrong in one bit of one type, as a fused multiplication would make it."""

    def __init__(self, library):
        self.library = library

    def quantize(self, weights, qtype, importance, out):
        self.library.quantize(weights, qtype, importance, out)
        if qtype == QType.Q5_K:
            out[7, 100] ^= 1


def test_one_wrong_bit_is_found(trusted):
    assert golden.wrong_types(_Off(trusted), FAST) == ["Q5_K"]


def test_a_library_that_fails_the_check_is_not_kept(cache, monkeypatch, tmp_path):
    def link(compiler, root, library, progress):
        library.parent.mkdir()
        library.write_bytes(b"no library")
        return library

    monkeypatch.setattr(build, "_link_library", link)
    monkeypatch.setattr(build, "_prepare", lambda given, folder, log: folder)
    with pytest.raises(ggml.BuildError, match="cannot be used"):
        build.build_ggml(SILENT)
    assert ggml.find_library() is None
    assert list(cache.iterdir()) == []
