# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file from front to back: the header from a plan, then data in the order of its tensors.

The file appears under its name only when it is complete. Until then it is NAME.xxxxxxxx.part in the same folder, which
every end of the program that can be caught removes. Knows no types and no models.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import gguf
import numpy as np
import torch

from ..errors import GGUFError, name_list, plain_text
from ..gguf_file import DEFAULT_ALIGNMENT, MAX_KEY_BYTES, MAX_NAME_BYTES, ORIG_SHAPE_KEY, OWN_KEYS
from .plan import Plan, PlannedTensor

PART = ".part"
NO_ROOM_HINT = "Free some space, or write to another disk."  # how, differs from tool to tool
MAX_PREFIX_BYTES = 255 - len(".12345678.part")


def make_header(plan: Plan, name: str, metadata: Mapping[str, str], imatrix_name: str = "") -> bytes:
    """Everything before the data of the first tensor, padded to the alignment.

    Args:
        name: value of general.name.
        metadata: strings to carry along, under their own keys.
        imatrix_name: file name of the importance matrix, or "".
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, plan.arch.tag)
        writer.add_name(_text(name))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(plan.file_type)
        if imatrix_name:
            writer.add_string("quantize.imatrix.file", _text(imatrix_name))
        for key, text in metadata.items():
            writer.add_string(_text(key), _text(text))
        for tensor in plan.tensors:
            _add_tensor(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def _text(text: str) -> str:
    """Text that UTF-8 can hold; names of files may not be."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _add_tensor(writer: gguf.GGUFWriter, tensor: PlannedTensor) -> None:
    n_bytes = len(tensor.name.encode("utf-8", "replace"))
    if n_bytes > MAX_NAME_BYTES or _text(tensor.name) != tensor.name:
        problem = f"is {n_bytes} bytes long, more than {MAX_NAME_BYTES}" if n_bytes > MAX_NAME_BYTES else "is no text"
        hint = "Rename it in the source."
        raise GGUFError(f"the name of tensor '{plain_text(tensor.name)}' {problem}", subject=tensor.name, hint=hint)
    writer.add_tensor_info(
        tensor.name, tensor.stored_shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.qtype
    )
    if tensor.stored_shape != tensor.shape and tensor.shape and 0 not in tensor.shape:
        writer.add_array(ORIG_SHAPE_KEY + tensor.name, list(tensor.shape))


def file_size(plan: Plan, header: bytes) -> int:
    """Bytes of the complete file."""
    return len(header) + sum(t.n_bytes + -t.n_bytes % DEFAULT_ALIGNMENT for t in plan.tensors)


class Writer:
    """A file in the making; a context manager that renames at a clean end and removes at any other.

    Args:
        path: final name.
        n_bytes: size of the complete file, for which room must be there.
        overwrite: replace an existing file.
    Raises:
        GGUFError: the file exists, the folder cannot be written to, or the disk has no room.
    """

    def __init__(self, path: Path, n_bytes: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.n_bytes = n_bytes
        self.overwrite = overwrite
        self._part = path.with_name(f"{part_prefix(path)}{secrets.token_hex(4)}{PART}")

    def __enter__(self) -> Writer:
        self._refuse_existing()
        with self._disk_errors():
            free = shutil.disk_usage(self.path.parent).free
            if free < self.n_bytes:
                problem = f"needs {self.n_bytes / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB left"
                raise GGUFError(problem, path=self.path, hint=NO_ROOM_HINT)
            atexit.register(self._remove_part)  # a signal can arrive before the with statement watches over it
            self._file = open(self._part, "xb")
        return self

    def write(self, data: bytes | torch.Tensor) -> None:
        """Append bytes, or a contiguous uint8 tensor's."""
        with self._disk_errors():
            self._file.write(data if isinstance(data, bytes) else data.numpy().data)

    def end_tensor(self) -> None:
        """Pad to the alignment, where the next tensor starts."""
        self.write(bytes(-self._file.tell() % DEFAULT_ALIGNMENT))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            self._remove_part()
            atexit.unregister(self._remove_part)

    def _remove_part(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink()

    def _finish(self) -> None:
        with self._disk_errors():
            self._file.flush()
            written = self._file.tell()
            if written != self.n_bytes:
                raise GGUFError(f"wrote {written} bytes, expected {self.n_bytes}", path=self.path)
            os.fsync(self._file.fileno())
            self._file.close()
            self._refuse_existing()
            if not self.overwrite:
                try:
                    os.link(self._part, self.path)  # unlike a rename it never replaces
                    return
                except FileExistsError:
                    raise
                except OSError:
                    pass  # a disk without hard links
            os.replace(self._part, self.path)

    def _refuse_existing(self) -> None:
        with self._disk_errors():
            exists = self.path.exists()
            is_file = self.path.is_file()
        if exists and not is_file:
            kind = "a folder" if self.path.is_dir() else "a device or pipe"
            raise GGUFError(f"this is {kind}", path=self.path, hint="Name a file.")
        if exists and not self.overwrite:
            raise file_exists(self.path)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise file_exists(self.path) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = "the disk is full" if full else f"cannot be written: {error.strerror}"
            hint = NO_ROOM_HINT if full else "Check the folder and its permissions."
            raise GGUFError(problem, path=self.path, hint=hint) from error


def file_exists(path: Path) -> GGUFError:
    """The refusal to replace a file unasked."""
    return GGUFError("the file exists", path=path, hint="Give --overwrite to replace it.")


def part_prefix(path: Path) -> str:
    """Beginning of the names of unfinished files: the final name, cut where the whole would be too long for a disk."""
    return path.name.encode("utf-8", "surrogateescape")[:MAX_PREFIX_BYTES].decode("utf-8", "ignore") + "."


def leftovers(path: Path) -> list[Path]:
    """Unfinished files that killed runs left beside `path`."""
    return sorted(path.parent.glob(f"{glob.escape(part_prefix(path))}*{PART}"))


def merged_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The source's metadata as it may stand beside our own keys, and warnings about what was left out."""
    left_out = [key for key in metadata if key.startswith(OWN_KEYS) or not 0 < len(key.encode()) <= MAX_KEY_BYTES]
    kept = {key: text for key, text in metadata.items() if key not in left_out and key != "format"}
    warnings = (f"metadata keys of the source that are left out: {name_list(left_out)}",) if left_out else ()
    return kept, warnings
