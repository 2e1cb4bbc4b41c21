# SPDX-License-Identifier: Apache-2.0
"""The binding to ggml, names of builds, and how a build gets its source: hash, unpacking, patch, errors."""

import ctypes
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import gguf
import make_files
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError, UnsupportedQtype
from gguf_kit.quantize import ggml
from gguf_kit.tools.llama_cpp import build, compilers, golden, source

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


# The source


def make_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def pin(monkeypatch, path):
    """Take a file for the pinned archive."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = source.Pinned(**{**vars(source.PINNED), "sha256": digest, "archive": path.name})
    monkeypatch.setattr(source, "PINNED", pinned)


def test_another_archive_than_the_pinned_one_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "a.tar.gz", {"x/llama.cpp/ggml/src/ggml-quants.c": "1"})
    pin(monkeypatch, archive)
    archive.write_bytes(archive.read_bytes() + b"\0")
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ggml.BuildError, match=r"a\.tar\.gz: it has sha256 [0-9a-f]{64}, expected"):
        source.prepare_source(archive, tmp_path / "out", SILENT)


def test_a_missing_archive_is_refused(tmp_path):
    with pytest.raises(ggml.BuildError, match=r"no\.tar\.gz: the archive cannot be read"):
        source.prepare_source(tmp_path / "no.tar.gz", tmp_path / "out", SILENT)


def test_only_what_a_build_reads_is_unpacked_and_nothing_outside(tmp_path, monkeypatch):
    inside = ["ggml/src/ggml-quants.c", "src/a.cpp", "vendor/nlohmann/json.hpp"]
    outside = ["models/m.gguf", "../../evil.c", "ggml/src/../../../../evil.c", "src/../evil.c", "tests/t.cpp"]
    archive = make_archive(tmp_path / "a.tar.gz", {f"x/llama.cpp/{name}": "1" for name in inside + outside})
    pin(monkeypatch, archive)
    monkeypatch.setattr(source, "apply_patch", lambda *_: None)
    source.prepare_source(archive, tmp_path / "out", SILENT)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.tar.gz", *(f"out/{name}" for name in inside)}


def test_a_folder_without_llama_cpp_is_refused(tmp_path):
    (tmp_path / "given").mkdir()
    with pytest.raises(ggml.BuildError, match=r"given: there is no llama\.cpp in it"):
        source.prepare_source(tmp_path / "given", tmp_path / "out", SILENT)


@pytest.mark.parametrize("link", ["{}", "../../files/{}#sha256=00", "{}#egg=x"])
def test_the_archive_is_found_on_an_index(tmp_path, cache, monkeypatch, link):
    page = tmp_path / "simple" / source.PINNED.package
    page.mkdir(parents=True)
    (tmp_path / "files").mkdir()
    made = make_archive(tmp_path / "llama.tar.gz", {"x": "1"})
    pin(monkeypatch, made)
    href = link.format(made.name)
    shutil.copyfile(made, tmp_path / "files" / made.name if "files" in link else page / made.name)
    (page / "index.html").write_text(f'<a href="other-1.0.tar.gz">o</a><a href="{href}">{made.name}</a>')
    settings = {"index-url": "file:///nothing/here", "extra-index-url": (tmp_path / "simple").as_uri()}
    monkeypatch.setattr(source, "package_settings", lambda: settings)
    assert source.fetch_archive(SILENT).read_bytes() == made.read_bytes()
    shutil.rmtree(tmp_path / "simple")
    assert source.fetch_archive(SILENT).parent == cache  # the second time it is there


def test_what_an_index_gives_is_checked(tmp_path, cache, monkeypatch):
    page = tmp_path / "simple" / source.PINNED.package
    page.mkdir(parents=True)
    (page / source.PINNED.archive).write_bytes(b"something else")
    (page / "index.html").write_text(f'<a href="{source.PINNED.archive}">x</a>')
    monkeypatch.setattr(source, "package_settings", lambda: {"index-url": (tmp_path / "simple").as_uri()})
    with pytest.raises(ggml.BuildError, match="expected"):
        source.fetch_archive(SILENT)
    assert list(cache.iterdir()) == []


def test_without_an_index_the_error_says_what_to_do(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(source, "package_settings", lambda: {"index-url": (tmp_path / "none").as_uri()})
    with pytest.raises(ggml.BuildError, match=r"cannot be downloaded .* --source, or convert with --engine torch"):
        source.fetch_archive(SILENT)


def test_settings_of_pip_and_uv_name_the_index(monkeypatch):
    for name in (
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "UV_DEFAULT_INDEX",
        "UV_INDEX_URL",
        "UV_INDEX",
        "UV_EXTRA_INDEX_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert source.index_urls({}) == [source.DEFAULT_INDEX]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://uv.test/simple/")
    assert source.index_urls(source.package_settings())[0] == "https://uv.test/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip.test/simple")
    assert source.index_urls(source.package_settings())[0] == "https://pip.test/simple"


def test_a_password_in_an_index_url_becomes_a_header():
    request = source._request("https://user:pa%40ss@index.test/simple/x/", "text/html")
    assert request.full_url == "https://index.test/simple/x/"
    assert request.unredirected_hdrs["Authorization"] == "Basic dXNlcjpwYUBzcw=="


# The patch

OLD = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n"
NEW = "zero\none\nthree\nfour\n4.5\nfive\nsix\nseven\nEIGHT\nnine\nten\neleven\n"


def make_patch(folder, old, new, context):
    """A patch as git writes it, for a file f/x.c."""
    for side, text in (("a", old), ("b", new)):
        (folder / side / "f").mkdir(parents=True)
        (folder / side / "f" / "x.c").write_text(text)
    command = ["git", "diff", "--no-index", "--no-prefix", f"-U{context}", "a/f/x.c", "b/f/x.c"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    return "".join(line for line in made.splitlines(True) if not line.startswith(("diff ", "index ")))


@pytest.mark.skipif(shutil.which("git") is None, reason="git makes the patches")
@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
def test_a_patch_gives_what_git_made_it_from(tmp_path, context, crlf):
    patch = make_patch(tmp_path, OLD, NEW, context)
    target = tmp_path / "a" / "f" / "x.c"
    if crlf:
        patch = patch.replace("\n", "\r\n")
        target.write_bytes(OLD.replace("\n", "\r\n").encode())
    source.apply_patch(patch, tmp_path / "a")
    assert target.read_bytes() == NEW.encode()


@pytest.mark.skipif(shutil.which("git") is None, reason="git makes the patches")
def test_a_patch_that_does_not_fit_changes_nothing(tmp_path):
    patch = make_patch(tmp_path, OLD, NEW, 1)
    target = tmp_path / "a" / "f" / "x.c"
    for other in (OLD.replace("eight", "Eight"), "inserted\n" + OLD, OLD[: OLD.index("nine")]):
        target.write_text(other)
        with pytest.raises(ggml.BuildError, match=r"line \d+ of f/x\.c is not what the patch expects"):
            source.apply_patch(patch, tmp_path / "a")
        assert target.read_text() == other
    target.unlink()
    with pytest.raises(ggml.BuildError, match=r"f/x\.c, which is not there"):
        source.apply_patch(patch, tmp_path / "a")


@pytest.mark.parametrize(
    "text", ["garbage", "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a", "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\nmore"]
)
def test_a_damaged_patch_is_refused(tmp_path, text):
    (tmp_path / "x").write_text("a\n")
    with pytest.raises(ggml.BuildError):
        source.apply_patch(text, tmp_path)


def test_the_patch_of_llama_cpp_is_small_and_names_no_architecture():
    text = source.PATCH.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert set(source._split_patch(text)) == {
        "ggml/include/ggml.h",
        "src/llama-quant.cpp",
        "tools/quantize/quantize.cpp",
    }
    added = [line for line in text.splitlines() if line.startswith("+")]
    assert not any(arch in line for line in added for arch in ("flux", "wan", "LLM_ARCH_LLAMA"))


# Compilers


def test_a_failed_command_is_named_with_its_last_lines_and_a_way_out(tmp_path):
    script = "import sys; print('\\n'.join(f'line {i}' for i in range(99)), file=sys.stderr); sys.exit(3)"
    with pytest.raises(ggml.BuildError, match=r"(?s)exit code 3.*line 98.*--engine torch") as caught:
        compilers.run([sys.executable, "-c", script], {})
    assert "line 50" not in str(caught.value)
    with pytest.raises(ggml.BuildError, match="cannot be started"):
        compilers.run([str(tmp_path / "no-compiler")], {})


def test_a_compiler_that_does_not_work_is_passed_over(monkeypatch):
    zig = compilers.Compiler("zig", ("zig",), ("zig",))
    monkeypatch.setattr(compilers, "works", lambda compiler: False)
    monkeypatch.setattr(compilers, "get_zig", lambda log, target="": zig)
    assert compilers.find_compiler("auto", SILENT) is zig
    with pytest.raises(ggml.BuildError, match="gcc compiles no C"):
        compilers.find_compiler("gcc", SILENT)


@pytest.mark.parametrize(
    ("target", "system"),
    [("x86_64-windows-gnu", "win32"), ("aarch64-macos", "darwin"), ("x86_64-linux-gnu.2.17", "linux")],
)
def test_a_target_names_its_system(target, system):
    assert compilers.Compiler("zig", (), (), target).system == system


def test_no_compiler_fuses_multiplication_and_addition():
    assert "-ffp-contract=off" in source.PINNED.flags
    assert "-ffp-contract=off" in build.PROGRAM_FLAGS


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GGUF_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ggml.BuildError, match="Set GGUF_KIT_CACHE"), build._workshop():
        pass
