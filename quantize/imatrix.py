# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: for each matrix of a model the mean of the squared inputs, one number per column.

Reads llama.cpp's two file formats, GGUF (`<name>.in_sum2` and `<name>.counts`) and the older binary one.
Source: llama.cpp common/imatrix-loader.cpp (both formats), tools/quantize/quantize.cpp load_imatrix (the division).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as QType

from ..errors import BadFile, plain_text
from ..gguf_file import MAX_ENTRIES, MAX_NAME_BYTES, GGUFFile
from ..mapped_file import map_file

SUMS, COUNTS = ".in_sum2", ".counts"
GGUF_MAGIC = b"GGUF"
MAX_COLUMNS = 2**24


@dataclass(frozen=True)
class Imatrix:
    """Importance of the columns of some matrices.

    Attributes:
        path: the file.
        columns: name -> float32 (n_columns,), finite and not negative.
    """

    path: Path
    columns: Mapping[str, torch.Tensor]

    def importance(self, name: str, n_columns: int) -> torch.Tensor | None:
        """The row for a matrix, None if there is none.

        Raises:
            BadFile: it has another number of columns.
        """
        found = self.columns.get(name)
        if found is not None and found.numel() != n_columns:
            raise BadFile(
                f"the entry of '{plain_text(name)}' has {found.numel()} columns, expected {n_columns}",
                path=self.path,
                subject=name,
                hint="The importance matrix was made with another model.",
            )
        return found


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises:
        BadFile: the file cannot be read, is damaged, or holds something else.
    """
    buffer = map_file(str(path))
    columns = _read_gguf(path) if buffer[:4] == GGUF_MAGIC else _read_legacy(path, buffer)
    for name, values in columns.items():
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise _bad(path, f"the entry of '{plain_text(name)}' has negative or non-finite values")
    if not columns:
        raise _bad(path, "it has no entries")
    return Imatrix(path, columns)


def _bad(path: Path, problem: str) -> BadFile:
    return BadFile(problem, path=path, hint="Take another importance matrix, or make it again.")


def _read_gguf(path: Path) -> dict[str, torch.Tensor]:
    file = GGUFFile(path)
    columns = {}
    for name, info in file.tensors.items():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        counts = file.tensors.get(base + COUNTS)
        if counts is None or {info.qtype, counts.qtype} != {QType.F32} or not info.n_bytes or not counts.n_bytes:
            raise _bad(path, f"the entry of '{plain_text(base)}' is incomplete")
        if prod(counts.shape) != 1:
            raise _bad(path, f"the entry of '{plain_text(base)}' is for {prod(counts.shape)} experts")
        sums = file.data(name).view(torch.float32)
        count = torch.round(file.data(counts.name).view(torch.float32))
        # As llama-quantize does it: a matrix that was never used has equal columns.
        columns[base] = sums / count.expand_as(sums) if float(count) > 0 else torch.ones_like(sums)
    return columns


def _read_legacy(path: Path, raw: mmap.mmap) -> dict[str, torch.Tensor]:
    """Entries of: length of the name, name, number of calls, number of values, values; int32 and float32."""
    columns: dict[str, torch.Tensor] = {}
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
                raise _bad(path, f"the entry of '{plain_text(name)}' is cut off")
            values = np.frombuffer(raw, "<f4", n_values, pos).astype(np.float32)
            pos += 4 * n_values
            columns[name] = torch.from_numpy(values / np.float32(n_calls) if n_calls > 0 else values)
    except (struct.error, UnicodeDecodeError) as error:
        raise _bad(path, "it is no importance matrix, or is cut off") from error
    return columns
