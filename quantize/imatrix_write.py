# SPDX-License-Identifier: Apache-2.0
"""Writes importance matrices in both of llama.cpp's formats; the file appears under its name only when complete.

What each format holds is told in imatrix.py. Recorded rows may be views of another mapped file: they go from there to
the new file entry by entry.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, plain_text
from ..gguf_file import DEFAULT_ALIGNMENT, MAX_ENTRIES, MAX_NAME_BYTES
from .imatrix import (
    CHUNK_COUNT_KEY,
    CHUNK_SIZE_KEY,
    COUNTS,
    DATASETS_KEY,
    GAIN,
    IN_SUM,
    ROWS,
    SUMS,
    Entry,
    Imatrix,
)
from .writer import Writer

QTYPES = {torch.float32: QType.F32, torch.bfloat16: QType.BF16}
MAX_INT32 = 2**31 - 1

Named = tuple[str, torch.Tensor]


class _HeaderWriter(gguf.GGUFWriter):
    """An importance matrix is of no architecture."""

    def add_architecture(self) -> None:
        self.add_type("imatrix")


def write_imatrix(imatrix: Imatrix, path: Path, *, overwrite: bool = False) -> None:
    """Write the GGUF format, with all that is known; entries in the order of their names.

    Raises:
        GGUFError: an entry is not sound, there is none, the file exists, or cannot be written.
    """
    _check(imatrix, path)
    named = [tensor for name in sorted(imatrix.entries) for tensor in _tensors(name, imatrix.entries[name])]
    if len(named) > MAX_ENTRIES:
        raise GGUFError(f"it would have {len(named)} tensors, more than {MAX_ENTRIES}", path=path)
    header = _make_header(imatrix, named)
    n_bytes = len(header) + sum(tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT for _, tensor in named)
    with Writer(path, n_bytes, overwrite=overwrite) as writer:
        writer.write(header)
        for _, tensor in named:
            writer.write(tensor.cpu().contiguous().view(torch.uint8))
            writer.end_tensor()


def write_legacy(imatrix: Imatrix, path: Path, *, overwrite: bool = False) -> None:
    """Write the older format, which has no place for rows, gains, sums of inputs, and entries that were never used.

    Raises:
        GGUFError: an entry is not sound, all were never used, the file exists, or cannot be written.
    Source: llama.cpp tools/imatrix/imatrix.cpp save_imatrix_legacy.
    """
    _check(imatrix, path)
    used = {name: entry for name, entry in sorted(imatrix.entries.items()) if float(entry.counts.max()) > 0}
    if not used:
        raise GGUFError("none of its entries was ever used", path=imatrix.path, hint="Make it again.")
    parts = [struct.pack("<i", len(used))]
    for name, entry in used.items():
        text = name.encode()
        n_calls, values = _legacy_values(entry, imatrix.chunk_size)
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", n_calls, values.size), values.tobytes()]
    datasets = _text(", ".join(imatrix.datasets)).encode()
    parts += [struct.pack("<ii", min(imatrix.chunk_count, MAX_INT32), len(datasets)), datasets]
    data = b"".join(parts)
    with Writer(path, len(data), overwrite=overwrite) as writer:
        writer.write(data)


def _check(imatrix: Imatrix, path: Path) -> None:
    """Refuse what could not be read again."""
    if not imatrix.entries:
        raise GGUFError("there are no entries to write", path=path, hint="Record some inputs first.")
    for name, entry in imatrix.entries.items():
        problem = entry.problem()
        n_bytes = len(name.encode("utf-8", "replace")) + max(map(len, (SUMS, COUNTS, IN_SUM, ROWS, GAIN)))
        if not problem and (not name or n_bytes > MAX_NAME_BYTES or _text(name) != name):
            problem = f"has a name of {len(name)} characters that the format cannot hold"
        if problem:
            raise GGUFError(f"the entry of '{plain_text(name)}' {problem}", path=path, subject=name)


def _text(text: str) -> str:
    """Text that UTF-8 can hold; names of files may not be."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _tensors(name: str, entry: Entry) -> Iterator[Named]:
    """The tensors of an entry, under their names."""
    yield name + SUMS, entry.sums
    yield name + COUNTS, entry.counts.unsqueeze(1)  # (n_matrices, 1)
    if entry.in_sum is not None:
        yield name + IN_SUM, entry.in_sum
    if entry.rows is not None and entry.rows.numel():
        yield name + ROWS, entry.rows
    if entry.gain is not None:
        yield name + GAIN, torch.tensor([entry.gain, entry.gain_calls], dtype=torch.float32)


def _make_header(imatrix: Imatrix, named: list[Named]) -> bytes:
    """Everything before the data of the first tensor, padded to the alignment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = _HeaderWriter(path, "")
        # llama-quantize refuses a file without datasets, gguf writes no empty array.
        writer.add_array(DATASETS_KEY, [_text(dataset) for dataset in imatrix.datasets] or [""])
        writer.add_uint32(CHUNK_COUNT_KEY, imatrix.chunk_count)
        writer.add_uint32(CHUNK_SIZE_KEY, imatrix.chunk_size)
        for name, tensor in named:
            dtype = np.dtype(np.float32)  # what the library asks for beside the type that it writes
            writer.add_tensor_info(name, tuple(tensor.shape), dtype, tensor.nbytes, raw_dtype=QTYPES[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def _legacy_values(entry: Entry, chunk_size: int) -> tuple[int, np.ndarray]:
    """How many chunks an entry was used in, and float32 (n_matrices * n_columns) means times that number."""
    most = float(torch.floor(entry.counts.double() + 0.5).max())
    n_calls = int(min(max(-(-most // max(chunk_size, 1)), 1), MAX_INT32))
    summed = entry.counts.unsqueeze(1) == n_calls  # where the sums are this product, before rounding
    values = torch.where(summed, entry.sums, entry.means * n_calls)
    return n_calls, values.flatten().numpy().astype("<f4")
