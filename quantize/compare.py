# SPDX-License-Identifier: Apache-2.0
"""How far two GGUF files are apart, tensor by tensor and key by key, as plain records.

Owns compare(). Weights are compared as what they dequantize to, so across types and stored shapes, in chunks that bound
the memory. Knows no command line and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..dequant import SUPPORTED_QTYPES, dequantize
from ..gguf_file import ORIG_SHAPE_KEY, GGUFFile
from .inspect import MAX_ITEMS, Advance, MetadataRow, TensorRow, ignore, metadata_row, plain_value, tensor_row

CHUNK_BYTES = 1 << 20  # of each file, looked at in one go
CHUNK_WEIGHTS = 1 << 18  # compared in one go, a multiple of every block size; 2 MB in float64


@dataclass(frozen=True)
class TensorDiff:
    """One name in one or both of two files.

    Attributes:
        name: of the tensor; a, b: its rows, None where it is missing.
        status: "equal" (type, shape, bytes), "different", "shape" (logical shapes differ), "only_a" or "only_b".
        relative_error: ||b - a|| / ||a|| over the dequantized weights; None where they were not compared.
        max_error: the largest |b - a|, or None.
        squares: sums of (b - a)**2 and a**2, for totals.
    """

    name: str
    a: TensorRow | None
    b: TensorRow | None
    status: str
    relative_error: float | None = None
    max_error: float | None = None
    squares: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Comparison:
    """How two files differ.

    Attributes:
        tensors: in the order of file A, then what only B has.
        metadata: key -> its values in A and in B, for those that differ; None where it is missing.
    """

    tensors: tuple[TensorDiff, ...]
    metadata: Mapping[str, tuple[MetadataRow | None, MetadataRow | None]]

    @property
    def equal(self) -> bool:
        """Whether all tensors are; metadata does not count."""
        return all(diff.status == "equal" for diff in self.tensors)

    @property
    def relative_error(self) -> float | None:
        """Relative L2 error over all tensors whose weights were compared."""
        compared = [diff.squares for diff in self.tensors if diff.relative_error is not None]
        return _relative(sum(e for e, _ in compared), sum(a for _, a in compared)) if compared else None

    @property
    def max_error(self) -> float | None:
        """The largest |b - a| of all, nan if there is one."""
        errors = [diff.max_error for diff in self.tensors if diff.max_error is not None]
        return float(np.max(errors)) if errors else None


def compare(a: GGUFFile, b: GGUFFile, advance: Advance = ignore) -> Comparison:
    """Compare two files tensor by tensor, across types and stored shapes.

    Args:
        advance: called with the bytes of A just dealt with; they add up to those of all its tensors.
    """
    diffs = []
    for info in a.tensors.values():
        row = tensor_row(a, info)
        diffs.append(
            _compare_tensor(a, b, row, tensor_row(b, b.tensors[info.name]), advance)
            if info.name in b.tensors
            else TensorDiff(info.name, row, None, "only_a")
        )
        if diffs[-1].relative_error is None:
            advance(info.n_bytes)
    for info in b.tensors.values():
        if info.name not in a.tensors:
            diffs.append(TensorDiff(info.name, None, tensor_row(b, info), "only_b"))
    return Comparison(tuple(diffs), _compare_metadata(a, b))


def _compare_metadata(a: GGUFFile, b: GGUFFile) -> Mapping[str, tuple[MetadataRow | None, MetadataRow | None]]:
    differing: dict[str, tuple[MetadataRow | None, MetadataRow | None]] = {}
    for key in {**dict.fromkeys(a.metadata), **dict.fromkeys(b.metadata)}:
        if key.startswith(ORIG_SHAPE_KEY):  # part of a tensor's shape
            continue
        rows = [metadata_row(file, key, MAX_ITEMS) if key in file.metadata else None for file in (a, b)]
        if None in rows or not _same_value(a, b, key):
            differing[key] = (rows[0], rows[1])
    return MappingProxyType(differing)


def _same_value(a: GGUFFile, b: GGUFFile, key: str) -> bool:
    if a.metadata.type_of(key) is not b.metadata.type_of(key) or a.metadata.n_items(key) != b.metadata.n_items(key):
        return False
    # The shortest text that gives a number back is the same for the same number, nan included.
    return repr(plain_value(a.metadata[key])) == repr(plain_value(b.metadata[key]))


def _compare_tensor(a: GGUFFile, b: GGUFFile, row_a: TensorRow, row_b: TensorRow, advance: Advance) -> TensorDiff:
    diff = TensorDiff(row_a.name, row_a, row_b, "different")
    if row_a.shape != row_b.shape:
        return replace(diff, status="shape")
    data_a, data_b = a.data(row_a.name), b.data(row_b.name)
    if row_a.qtype is row_b.qtype and _same_bytes(data_a, data_b):
        return replace(diff, status="equal")
    if not {row_a.qtype, row_b.qtype} <= SUPPORTED_QTYPES:
        return diff
    error, norm, largest = 0.0, 0.0, 0.0
    for start in range(0, row_a.n_weights, CHUNK_WEIGHTS):
        stop = min(start + CHUNK_WEIGHTS, row_a.n_weights)
        weights = _read_weights(data_a, row_a.qtype, start, stop)
        delta = _read_weights(data_b, row_b.qtype, start, stop).sub_(weights)
        error += float(delta.dot(delta))
        norm += float(weights.dot(weights))
        largest = float(np.maximum(largest, float(delta.abs_().max())))  # unlike max(), it keeps nan
        advance(_byte_offset(row_a.qtype, stop) - _byte_offset(row_a.qtype, start))
    return replace(diff, relative_error=_relative(error, norm), max_error=largest, squares=(error, norm))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    chunks = range(0, a.numel(), CHUNK_BYTES)
    return all(torch.equal(a[i : i + CHUNK_BYTES], b[i : i + CHUNK_BYTES]) for i in chunks)


def _read_weights(data: torch.Tensor, qtype: GGMLQuantizationType, start: int, stop: int) -> torch.Tensor:
    """Weights start to stop, whole blocks of them: float64 (stop - start,)."""
    octets = data[_byte_offset(qtype, start) : _byte_offset(qtype, stop)]
    return dequantize(octets, qtype, (stop - start,)).double()


def _byte_offset(qtype: GGMLQuantizationType, n_weights: int) -> int:
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    return n_weights // block_size * type_size


def _relative(error: float, norm: float) -> float:
    """The root of a ratio of sums of squares; inf where there is an error but nothing to compare it with."""
    if not norm:
        return error * math.inf if error else 0.0  # nan stays nan
    return math.sqrt(error / norm)
