# SPDX-License-Identifier: Apache-2.0
"""Tensors over a mapped file tell where their bytes lie, and the map gives back what was read of it."""

import copy
import errno
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_kit.errors import BadFile
from gguf_kit.mapped_file import MappedFile, file_range, map_file

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def content() -> bytes:
    return bytes(i % 251 for i in range(4096))


@pytest.fixture
def mapped(tmp_path: Path, content: bytes) -> MappedFile:
    path = tmp_path / "file"
    path.write_bytes(content)
    return map_file(str(path))


def test_a_tensor_and_its_views_know_their_place(mapped: MappedFile, content: bytes) -> None:
    tensor = mapped.tensor(64, 640)
    rows = tensor.view(torch.float32).view(16, 10)
    parameter = torch.nn.Parameter(rows[3:5], requires_grad=False)
    for view, offset, n_bytes in ((tensor, 64, 640), (rows, 64, 640), (rows[2:], 144, 560), (parameter, 184, 80)):
        found = file_range(view)
        assert found is not None
        assert (found.file, found.offset, found.n_bytes) == (mapped, offset, n_bytes)
        assert bytes(found.tensor().tolist()) == content[offset : offset + n_bytes]
        assert found.tensor().untyped_storage().nbytes() == n_bytes


def test_what_is_no_plain_view_has_no_place(mapped: MappedFile) -> None:
    tensor = mapped.tensor(0, 640).view(16, 40)
    others = tensor.clone(), tensor.float(), tensor[:, :20], tensor.t(), tensor[:0], torch.zeros(3), tensor.to("meta")
    assert [file_range(other) for other in others] == [None] * len(others)
    assert file_range(mapped.tensor(0, 0)) is None


def test_the_file_is_opened_once_and_closed_with_the_last_tensor(mapped: MappedFile, content: bytes) -> None:
    whole = map_file(mapped.path)
    opened, tensor = whole.open(), whole.tensor(0, 10)
    assert opened is not None
    assert opened is whole.open()
    opened.seek(100)
    assert opened.read(50) == content[100:150]
    n_descriptor = opened.fileno()
    del whole, opened
    gc.collect()
    assert os.fstat(n_descriptor).st_size == len(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del tensor
        gc.collect()
    assert not said
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(n_descriptor)


@pytest.mark.parametrize("change", ["replaced", "longer", "gone"])
def test_a_file_that_has_changed_is_not_opened(mapped: MappedFile, content: bytes, change: str) -> None:
    path = Path(mapped.path)
    if change == "replaced":
        other = path.with_name("other")
        other.write_bytes(content)
        other.replace(path)
    elif change == "longer":
        path.write_bytes(content * 2)
    else:
        path.unlink()
    assert mapped.open() is None
    assert mapped.tensor(0, 10).untyped_storage().nbytes() == 10


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.mark.skipif(sys.platform == "win32", reason="the system refuses this while the file is mapped")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 100), "went from 4096 to 100 bytes"),
        (lengthen, "went from 4096 to 4100 bytes"),
        (rewrite, "was written to"),
        (lambda path: (os.truncate(path, 100), path.unlink()), "went from 4096 to 100 bytes"),
    ],
    ids=["shorter", "longer", "rewritten", "shorter and gone"],
)
def test_a_file_that_was_written_to_is_refused(mapped: MappedFile, change: Callable[[Path], object], said: str) -> None:
    mapped.check_unchanged()
    change(Path(mapped.path))
    with pytest.raises(BadFile, match=rf"^file: the file {said} while its model was loaded\. Run the workflow again"):
        mapped.check_unchanged()


def test_a_file_that_its_disk_no_longer_gives_is_refused(mapped: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MappedFile) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(MappedFile, "size", fail)
    with pytest.raises(
        BadFile, match=r"^file: the file cannot be reached .* loaded: Stale file handle\. Check its disk"
    ):
        mapped.check_unchanged()


@pytest.mark.parametrize("change", ["replaced", "gone", "renamed", "read"])
def test_a_file_that_is_whole_under_another_name_or_none_is_as_good(mapped: MappedFile, change: str) -> None:
    path = Path(mapped.path)
    if change == "replaced":
        path.with_name("other").write_bytes(b"shorter")
        path.with_name("other").replace(path)
    elif change == "gone":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("other"))
    else:
        path.read_bytes()
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    mapped.check_unchanged()


def test_copies_of_a_model_share_the_map(mapped: MappedFile) -> None:
    assert copy.deepcopy(mapped) is mapped


def test_the_map_goes_with_its_last_tensor(mapped: MappedFile) -> None:
    path, gone = mapped.path, weakref.ref(map_file(mapped.path))
    gc.collect()
    assert gone() is None
    whole = map_file(path)
    gone, view = weakref.ref(whole), whole.tensor(0, 64)[8:16]
    del whole
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


@linux_only
def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 2**18)  # 64 MiB
    mapped = map_file(str(path))
    tensor = mapped.tensor(0, 2**26)
    total = int(tensor.sum())
    before = resident_bytes()
    assert mapped.release_pages()
    assert before - resident_bytes() > 60 * 2**20
    assert int(tensor.sum()) == total
