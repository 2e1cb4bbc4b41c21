# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: what a calibration run recorded about the inputs of each matrix of a model.

Reads llama.cpp's two file formats, GGUF (`<name>.in_sum2`, `<name>.counts`, `<name>.in_sum`) and the older binary one,
and what a GGUF file may hold besides: `<name>.rows`, recorded inputs, and `<name>.gain`, how much an error of the layer
counts. llama.cpp passes over those. imatrix_write.py writes both formats, imatrix_merge.py joins several files.
Source: llama.cpp common/imatrix-loader.cpp (both formats), tools/quantize/quantize.cpp load_imatrix (the division).
"""

from __future__ import annotations

import enum
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as QType

from ..errors import BadFile, plain_text
from ..gguf_file import MAX_ENTRIES, MAX_NAME_BYTES, GGUFFile, TensorInfo
from ..mapped_file import map_file

# Endings of the tensors of an entry.
SUMS, COUNTS, IN_SUM, ROWS, GAIN = ".in_sum2", ".counts", ".in_sum", ".rows", ".gain"
DATASETS_KEY, CHUNK_COUNT_KEY, CHUNK_SIZE_KEY = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
GGUF_MAGIC = b"GGUF"
MAX_COLUMNS = 2**24
MAX_DATASETS = 2**16
MAX_FLOAT = torch.finfo(torch.float32).max
# Fields of an entry that are tensors.
FIELD_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"sums": torch.float32, "counts": torch.float32, "in_sum": torch.float32, "rows": torch.bfloat16}
)
FINITE_CHUNK = 2**20  # numbers that are checked at once


class Weighting(enum.Enum):
    """How importance weighs the columns of a matrix while it is encoded.

    FULL is what ggml does with an importance matrix. Which one gives the least error differs from matrix to matrix.
    MIXED takes for each block of each row what suits the recorded rows best (mixed.py).
    """

    NONE = "none"
    ROOT = "root"
    FULL = "full"
    MIXED = "mixed"

    def apply(self, columns: torch.Tensor) -> torch.Tensor | None:
        """float32 (n_columns,) means of squares -> the weights of the columns, None where all weigh the same.

        MIXED has no weights of its own: those of FULL.
        """
        if self is Weighting.NONE:
            return None
        return columns.sqrt() if self is Weighting.ROOT else columns


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known about the inputs of one weight; of several where it is a stack of matrices (experts).

    Attributes:
        sums: float32 (n_matrices, n_columns), sums of the squared inputs.
        counts: float32 (n_matrices,), how many rows of inputs were summed.
        rows: bfloat16 (n_rows, n_columns), some of these rows as they were; None without.
        gain: squared error of the model's result per squared error of the layer's output; None where not measured.
        gain_calls: how many calls of the model `gain` is the mean of, 0 without.
        in_sum: float32 (n_matrices, n_columns), sums of the inputs; None without.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor | None = None
    gain: float | None = None
    gain_calls: float = 0.0
    in_sum: torch.Tensor | None = None

    @property
    def n_matrices(self) -> int:
        """1 but for a stack of experts."""
        return self.sums.shape[0]

    @property
    def n_columns(self) -> int:
        """Columns of each matrix."""
        return self.sums.shape[1]

    @cached_property
    def means(self) -> torch.Tensor:
        """float32 (n_matrices, n_columns) means of the squared inputs, divided as llama-quantize does it.

        A matrix that was never used has equal columns.
        """
        counts = torch.floor(self.counts.double() + 0.5).float().unsqueeze(1)  # (n_matrices, 1), as lround has it
        return torch.where(counts > 0, self.sums / counts, 1.0)

    def problem(self) -> str:
        """What no sound entry may have, "" if nothing."""
        return self._problem_of_shapes() or self._problem_of_values()

    def _problem_of_shapes(self) -> str:
        shape = tuple(self.sums.shape)
        if len(shape) != 2 or 0 in shape or shape[1] > MAX_COLUMNS:
            return f"has sums of shape {shape}"
        if tuple(self.counts.shape) != shape[:1] or (self.in_sum is not None and self.in_sum.shape != self.sums.shape):
            return f"has sums of shape {shape} and others that do not fit"
        for part, dtype in FIELD_DTYPES.items():
            tensor = getattr(self, part)
            if tensor is not None and tensor.dtype is not dtype:
                return f"has {part} of {_dtype_name(tensor.dtype)}, expected {_dtype_name(dtype)}"
        if self.rows is not None and (self.rows.dim() != 2 or self.rows.shape[1] != shape[1]):
            return f"has rows of shape {tuple(self.rows.shape)}, expected {shape[1]} columns"
        return ""

    def _problem_of_values(self) -> str:
        if not _are_finite(self.sums, self.counts) or bool((self.sums < 0).any()) or bool((self.counts < 0).any()):
            return "has negative or non-finite values"
        if self.in_sum is not None and not _are_finite(self.in_sum):
            return "has non-finite sums of inputs"
        if self.rows is not None and not _are_finite(self.rows):
            return "has non-finite rows"
        if self.gain is not None and not (0 <= self.gain <= MAX_FLOAT and 0 < self.gain_calls <= MAX_FLOAT):
            return f"has a gain of {self.gain} from {self.gain_calls} calls"
        return ""


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Importance of the columns of some matrices.

    Attributes:
        path: the file.
        entries: name of a weight, as in the model -> what is known of it; read-only, in file order.
        datasets: what the model was run on, as the file says.
        chunk_count: how many parts of the datasets were run.
        chunk_size: rows that a matrix got for each part; 0 where unknown, as in the older format.
    """

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0

    @cached_property
    def columns(self) -> Mapping[str, torch.Tensor]:
        """Name -> float32 (n_columns,) means of the squared inputs, finite and not negative; of single matrices."""
        single = {name: entry.means[0] for name, entry in self.entries.items() if entry.n_matrices == 1}
        return MappingProxyType(single)

    def importance(self, name: str, n_columns: int, weighting: Weighting = Weighting.FULL) -> torch.Tensor | None:
        """The weights of a matrix's columns, float32 (n_columns,); None if it has no entry, or all weigh the same.

        Raises:
            BadFile: the entry has another number of columns, or is for several matrices.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.n_matrices != 1 or entry.n_columns != n_columns:
            has = f"has {entry.n_columns} columns" if entry.n_matrices == 1 else f"is for {entry.n_matrices} experts"
            expected = f"{n_columns} columns" if entry.n_matrices == 1 else "a single matrix"
            raise BadFile(
                f"the entry of '{plain_text(name)}' {has}, expected {expected}",
                path=self.path,
                subject=name,
                hint="The importance matrix was made with another model.",
            )
        return weighting.apply(self.columns[name])


def read_imatrix(path: Path, *, with_rows: bool = True) -> Imatrix:
    """Read an importance matrix of either format.

    Args:
        with_rows: also take the recorded rows: they are read once to be checked, and stay views of the mapped file.
    Raises:
        BadFile: the file cannot be read, is damaged, or holds something else.
    """
    buffer = map_file(str(path))
    imatrix = _read_gguf(path, with_rows) if buffer[:4] == GGUF_MAGIC else _read_legacy(path, buffer)
    for name, entry in imatrix.entries.items():
        problem = entry.problem()
        if problem:
            raise _bad_entry(path, name, problem)
    if not imatrix.entries:
        raise _bad(path, "it has no entries")
    return imatrix


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _are_finite(*tensors: torch.Tensor) -> bool:
    """Whether no number of some tensors is NaN or infinite."""
    parts = (part for tensor in tensors for part in torch.split(tensor.reshape(-1), FINITE_CHUNK) if part.numel())
    # Both ends are NaN where any number is; several times as fast as isfinite, most of all for bfloat16.
    return all(abs(float(end)) < np.inf for part in parts for end in torch.aminmax(part))


def _bad(path: Path, problem: str) -> BadFile:
    return BadFile(problem, path=path, hint="Take another importance matrix, or make it again.")


def _bad_entry(path: Path, name: str, problem: str) -> BadFile:
    return _bad(path, f"the entry of '{plain_text(name)}' {problem}")


def _read_gguf(path: Path, with_rows: bool) -> Imatrix:
    file = GGUFFile(path)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    entries = {name: _read_entry(path, file, name, with_rows) for name in names}
    datasets = _read_datasets(path, file)
    chunk_count, chunk_size = (_read_count(path, file, key) for key in (CHUNK_COUNT_KEY, CHUNK_SIZE_KEY))
    return Imatrix(path, MappingProxyType(entries), datasets, chunk_count, chunk_size)


def _read_count(path: Path, file: GGUFFile, key: str) -> int:
    if key not in file.metadata:
        return 0
    value = file.metadata[key]
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise _bad(path, f"metadata key '{key}' is no number of chunks")
    return int(value)


def _read_datasets(path: Path, file: GGUFFile) -> tuple[str, ...]:
    if DATASETS_KEY not in file.metadata:
        return ()
    n_items = file.metadata.n_items(DATASETS_KEY)
    value = file.metadata[DATASETS_KEY] if n_items <= MAX_DATASETS else None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _bad(path, f"metadata key '{DATASETS_KEY}' is no list of up to {MAX_DATASETS} texts")
    return tuple(text for text in value if text)


def _read_entry(path: Path, file: GGUFFile, name: str, with_rows: bool) -> Entry:
    sums, counts = file.tensors[name + SUMS], _find(path, file, name + COUNTS, QType.F32)
    if counts is None or sums.qtype is not QType.F32 or not sums.n_bytes or not counts.n_bytes:
        raise _bad_entry(path, name, "is incomplete")
    n_matrices = counts.n_bytes // 4
    shape = (n_matrices, sums.shape[-1] if sums.shape else 1)
    if sums.n_bytes != 4 * shape[0] * shape[1]:
        raise _bad_entry(path, name, f"is for {n_matrices} experts, but has sums of shape {sums.shape}")
    in_sum = _find(path, file, name + IN_SUM, QType.F32)
    if in_sum is not None and in_sum.n_bytes != sums.n_bytes:
        raise _bad_entry(path, name, f"has sums of shapes {sums.shape} and {in_sum.shape}")
    gain, gain_calls = _read_gain(path, file, name)
    return Entry(
        _numbers(file, sums).reshape(shape),
        _numbers(file, counts).reshape(n_matrices),
        _read_rows(path, file, name) if with_rows else None,
        gain,
        gain_calls,
        None if in_sum is None else _numbers(file, in_sum).reshape(shape),
    )


def _find(path: Path, file: GGUFFile, name: str, qtype: QType) -> TensorInfo | None:
    info = file.tensors.get(name)
    if info is not None and info.qtype is not qtype:
        raise _bad(path, f"tensor '{plain_text(name)}' is {info.qtype.name}, expected {qtype.name}")
    return info


def _numbers(file: GGUFFile, info: TensorInfo) -> torch.Tensor:
    return file.data(info.name).view(torch.float32).clone()


def _read_rows(path: Path, file: GGUFFile, name: str) -> torch.Tensor | None:
    info = _find(path, file, name + ROWS, QType.BF16)
    if info is None or not info.n_bytes:
        return None
    if len(info.shape) not in (1, 2):
        raise _bad_entry(path, name, f"has rows of shape {info.shape}, expected two dimensions")
    return file.data(info.name).view(torch.bfloat16).reshape(-1, info.shape[-1])


def _read_gain(path: Path, file: GGUFFile, name: str) -> tuple[float | None, float]:
    info = _find(path, file, name + GAIN, QType.F32)
    if info is None:
        return None, 0.0
    if info.n_bytes != 8:
        raise _bad_entry(path, name, f"has a gain of shape {info.shape}, expected (2,)")
    gain, gain_calls = _numbers(file, info).tolist()
    return gain, gain_calls


def _read_legacy(path: Path, raw: mmap.mmap) -> Imatrix:
    """Entries of: length of the name, name, number of calls, number of values, values; int32 and float32."""
    entries: dict[str, Entry] = {}
    try:
        (n_entries,), pos = struct.unpack_from("<i", raw), 4
        if not 0 < n_entries <= MAX_ENTRIES:
            raise _bad(path, "it is no importance matrix")
        for _ in range(n_entries):
            (n_name,), pos = struct.unpack_from("<i", raw, pos), pos + 4
            if not 0 < n_name <= MAX_NAME_BYTES:
                raise _bad(path, "it is no importance matrix, or is damaged")
            name, pos = raw[pos : pos + n_name].decode(), pos + n_name
            (n_calls, n_values), pos = struct.unpack_from("<ii", raw, pos), pos + 8
            if not 0 < n_values <= MAX_COLUMNS or pos + 4 * n_values > len(raw):
                raise _bad_entry(path, name, "is cut off")
            values = torch.from_numpy(np.frombuffer(raw, "<f4", n_values, pos).astype(np.float32))
            pos += 4 * n_values
            # Without calls the values are the means themselves.
            entries[name] = Entry(values.unsqueeze(0), torch.tensor([float(n_calls if n_calls > 0 else 1)]))
    except (struct.error, UnicodeDecodeError) as error:
        raise _bad(path, "it is no importance matrix, or is cut off") from error
    chunk_count, datasets = _read_legacy_end(raw, pos)
    return Imatrix(path, MappingProxyType(entries), datasets, chunk_count)


def _read_legacy_end(raw: mmap.mmap, pos: int) -> tuple[int, tuple[str, ...]]:
    """The number of chunks and the dataset behind the entries; files without them are as good."""
    if pos + 8 > len(raw):
        return 0, ()
    chunk_count, n_text = struct.unpack_from("<ii", raw, pos)
    text = raw[pos + 8 : pos + 8 + max(n_text, 0)].decode("utf-8", "replace")
    return max(chunk_count, 0), (text,) if text else ()
