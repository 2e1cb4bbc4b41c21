# SPDX-License-Identifier: Apache-2.0
"""How a build gets its source and its compiler: index, hash, unpacking, patch, and what is said when one fails."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile

import pytest
from gguf_kit.quantize import ggml
from gguf_kit.tools.llama_cpp import build, compilers, source

SILENT = print  # a log that pytest captures


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("GGUF_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    outside = [
        "models/m.gguf",
        "../../evil.c",
        "ggml/src/../../../../evil.c",
        "src/../evil.c",
        "src/..\\evil.c",
        "src/..",
        "tests/t.cpp",
    ]
    archive = make_archive(tmp_path / "a.tar.gz", {f"x/llama.cpp/{name}": "1" for name in inside + outside})
    pin(monkeypatch, archive)
    monkeypatch.setattr(source, "apply_patch", lambda *_: None)
    source.prepare_source(archive, tmp_path / "out", SILENT)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.tar.gz", *(f"out/{name}" for name in inside)}


@pytest.mark.parametrize("inner", ["", "llama.cpp"], ids=["llama.cpp", "archive"])
def test_a_folder_is_copied_and_left_as_it_is(tmp_path, monkeypatch, inner):
    file = tmp_path / "given" / inner / "ggml" / "src" / "ggml-quants.c"
    file.parent.mkdir(parents=True)
    file.write_text("old")
    monkeypatch.setattr(source, "apply_patch", lambda _, folder: (folder / "ggml/src/ggml-quants.c").write_text("new"))
    made = source.prepare_source(tmp_path / "given", tmp_path / "out", SILENT)
    assert (file.read_text(), (made / "ggml" / "src" / "ggml-quants.c").read_text()) == ("old", "new")


def test_the_command_line_says_in_one_message_what_is_wrong(tmp_path, cache, capsys):
    assert build.main(["--source", str(tmp_path / "no.tar.gz")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no.tar.gz: the archive cannot be read" in said.err
    assert list(cache.iterdir()) == []


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
