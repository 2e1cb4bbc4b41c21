# SPDX-License-Identifier: Apache-2.0
"""A mapped file and the tensors over it: no copy is made, no write reaches the file, and each tensor tells its place.

Knows no format. What holds a tensor over the map, or a view of one, holds the map; there is nothing to close. Nobody
may write into such a tensor: release_pages() would bring the file's bytes back, and on Windows the map is read-only.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
import sys
import threading
import warnings
from typing import Any, NamedTuple

import torch

from .errors import BadFile

_ORIGIN = "_gguf_origin"  # of a storage: (MappedFile, offset of its first byte)


class FileRange(NamedTuple):
    """A place in a file: n_bytes from offset on."""

    file: MappedFile
    offset: int
    n_bytes: int

    def tensor(self) -> torch.Tensor:
        """Its bytes, uint8 (n_bytes,), in a storage of their own."""
        return self.file.tensor(self.offset, self.n_bytes)


class MappedFile(mmap.mmap):
    """A whole regular file, mapped privately.

    Attributes:
        path: absolute.
        lock: to be held while the file of open() is positioned and read.
    """

    path: str
    lock: threading.Lock
    _identity: tuple[int, ...]
    _opened: io.FileIO | None

    def tensor(self, offset: int, n_bytes: int) -> torch.Tensor:
        """The bytes from an offset on, uint8 (n_bytes,): a storage of its own over the map, nothing is copied."""
        if not n_bytes:  # frombuffer refuses empty views
            return torch.empty(0, dtype=torch.uint8)
        tensor = torch.frombuffer(self, dtype=torch.uint8, count=n_bytes, offset=offset)
        setattr(tensor.untyped_storage(), _ORIGIN, (self, offset))
        return tensor

    def open(self) -> io.FileIO | None:
        """The file, opened unbuffered once for all readers; None when another one lies at its path by now."""
        if self._opened is None:
            try:
                opened = _OwnFile(self.path, "rb")
            except OSError:
                return None
            if _identity_of(os.fstat(opened.fileno())) != self._identity:
                opened.close()
                return None
            self._opened = opened
        return self._opened

    def check_unchanged(self) -> None:
        """Refuse to read on in a file that was written to in place: its bytes are others now, or are no more there.

        A file that was deleted, or replaced by a new one under its name, is still whole for who has it mapped. What is
        written after this look goes unnoticed; reading behind a new end of the file ends the process on most systems.

        Raises:
            BadFile: its size or its time of change is another than when it was mapped, or it cannot be reached.
        """
        hint = "Run the workflow again to load it anew; replace model files by renaming new ones over them."
        try:
            n_bytes = self.size()  # of what is mapped, whatever lies at the path by now
        except OSError as error:  # a share that is gone, or says that the file is another one by now
            problem = f"the file cannot be reached while its model is loaded: {error.strerror}"
            raise BadFile(
                problem, path=self.path, hint="Check its disk or share, then run the workflow again."
            ) from error
        try:
            found = _identity_of(os.stat(self.path))
        except OSError:
            found = self._identity
        is_same = found == self._identity or found[:2] != self._identity[:2]
        if is_same and n_bytes == len(self):
            return
        change = "was written to" if n_bytes == len(self) else f"went from {len(self)} to {n_bytes} bytes"
        raise BadFile(f"the file {change} while its model was loaded", path=self.path, hint=hint)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFile:
        return self  # nothing writes to it, so copies of a model may share it

    def release_pages(self) -> bool:
        """Take all pages read so far out of the process; they stay in the system's cache and come back when read."""
        if not hasattr(self, "madvise"):  # Windows, which takes them back by itself
            return False
        self.madvise(mmap.MADV_DONTNEED)
        return True

    def bounce(self) -> bool:
        """What ComfyUI calls after it read from the map."""
        return self.release_pages()


class _OwnFile(io.FileIO):
    """Closed with the last tensor that it could be read for, without a warning about it."""

    def __del__(self) -> None:
        self.close()


def file_range(tensor: torch.Tensor) -> FileRange | None:
    """Where in a mapped file a tensor's bytes lie; None of a tensor that was copied, has gaps or is empty."""
    origin = getattr(tensor.untyped_storage(), _ORIGIN, None)
    if origin is None or not tensor.numel() or not tensor.is_contiguous():
        return None
    file, start = origin
    return FileRange(file, start + tensor.storage_offset() * tensor.element_size(), tensor.nbytes)


def map_file(path: str) -> MappedFile:
    """Map a whole regular file so that no write can reach it.

    Raises:
        BadFile: it is no regular file, is empty, or cannot be opened.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise BadFile(f"this is {kind}, not a file", path=path, hint="Choose a .gguf file.")
        if status.st_size == 0:
            raise BadFile("the file is empty", path=path, hint="Download it again.")
        with open(path, "rb") as file:
            mapped = _map_descriptor(file.fileno())
            mapped._identity = _identity_of(os.fstat(file.fileno()))
    except FileNotFoundError:
        raise BadFile("there is no such file", path=path, hint=f"Check the path {path}.") from None
    except OSError as error:
        problem = f"the file cannot be opened: {error.strerror}"
        raise BadFile(problem, path=path, hint="Check its permissions and its disk.") from error
    mapped.path, mapped.lock, mapped._opened = os.path.abspath(path), threading.Lock(), None
    return mapped


def _map_descriptor(fd: int) -> MappedFile:
    # A private view is charged as if all of it were written. Windows counts that against the page file ("error 1455"),
    # so it gets a read-only view; Linux refuses files larger than memory unless told not to reserve.
    if sys.platform == "win32":
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # said by torch.frombuffer
        return MappedFile(fd, 0, access=mmap.ACCESS_READ)
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which Python 3.12 lacks
    return MappedFile(fd, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _identity_of(status: os.stat_result) -> tuple[int, ...]:
    """What two files at one path differ in."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
