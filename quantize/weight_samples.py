# SPDX-License-Identifier: Apache-2.0
"""Some rows of a tensor and what is known of its inputs: the arithmetic of output errors.

The mean over inputs x of |W x|^2 is a sum over the rows of W. So a part of the rows tells the whole, and how far its
rows differ tells how well. Knows no types and no files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from gguf.constants import GGMLQuantizationType as QType

from .imatrix import Weighting

CHUNK_WEIGHTS = 2**20  # at work at a time in each thread: 4 MB as float32
DEVICE_CHUNK_WEIGHTS = 2**25
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, fill the range without ever repeating
METHOD = 4  # part of each key; a new number makes what was measured before void


class Estimate(NamedTuple):
    """A sum over the rows of a tensor, and its standard error: 0 where all rows were measured."""

    error: float
    std_error: float


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a layer.

    Attributes:
        mean_squares: float32 (n_columns,).
        rows: float32 (n_rows, n_columns), some of the inputs; None without. They count more than mean_squares, because
            they also say which columns are large together.
    """

    mean_squares: torch.Tensor
    rows: torch.Tensor | None = None

    def mean_square_outputs(self, weights: torch.Tensor) -> torch.Tensor:
        """Mean over the inputs x of (w x)^2 for each row w: weights (n, n_columns) -> (n,) of the same float type."""
        if self.rows is None:
            return weights.square() @ self.mean_squares.to(weights.dtype)
        return (weights @ self.rows.to(weights.dtype).T).square().mean(1)

    @cached_property
    def root_mean_rows(self) -> torch.Tensor | None:
        """float64 (n_rows, n_columns): rows over the root of their number, so that squared products sum up to means."""
        return None if self.rows is None else self.rows.double() / len(self.rows) ** 0.5

    def halves(self) -> tuple[Inputs, Inputs]:
        """The same with every other of the recorded rows, and with those between."""
        rows = self.rows
        first, second = (None, None) if rows is None else (rows[::2], rows[1::2])
        return Inputs(self.mean_squares, first), Inputs(self.mean_squares, second)

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        if self.mean_squares.device == device:
            return self
        return Inputs(self.mean_squares.to(device), None if self.rows is None else self.rows.to(device))


@dataclass(frozen=True)
class Sample:
    """Some rows of a tensor, or all, as it is stored.

    Attributes:
        name: of the tensor.
        rows: (n, n_columns) of the source's dtype.
        n_rows: rows of the whole tensor.
        qtype: type that the source has quantized it to already, or None.
        importance: for each weighting float32 (n_columns,), or None where all columns weigh the same.
        inputs: of its layer.
    """

    name: str
    rows: torch.Tensor
    n_rows: int
    qtype: QType | None
    importance: Mapping[Weighting, torch.Tensor | None]
    inputs: Inputs

    @cached_property
    def key(self) -> str:
        """Digest of everything that decides what is measured, but the encodings."""
        importance = self.importance.get(Weighting.FULL)
        tensors = [self.rows, importance, self.inputs.mean_squares, self.inputs.rows]
        shapes = [None if tensor is None else [str(tensor.dtype), *tensor.shape] for tensor in tensors]
        head = [METHOD, self.n_rows, self.qtype.name if self.qtype else "", shapes]
        digest = hashlib.blake2b(json.dumps(head).encode(), digest_size=16)
        for tensor in tensors:
            if tensor is not None:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def chunks(self) -> Iterator[torch.Tensor]:
        """The rows, some at a time."""
        size = CHUNK_WEIGHTS if self.rows.device.type == "cpu" else DEVICE_CHUNK_WEIGHTS
        yield from torch.split(self.rows, max(1, size // self.rows.shape[1]))

    def energy(self) -> float:
        """Mean over the inputs x of |W x|^2; in float64, since weights of any size may be in a source."""
        outputs = [self.inputs.mean_square_outputs(rows.double()) for rows in self.chunks()]
        return self.estimate(torch.cat(outputs)).error

    def to(self, device: torch.device) -> Sample:
        """The same on a device; importance stays, engines move it."""
        return replace(self, rows=self.rows.to(device), inputs=self.inputs.to(device))

    def estimate(self, row_values: torch.Tensor) -> Estimate:
        """The sum over all rows of the tensor, from values (n,) of the rows that are here.

        The standard error is that of a random sample without replacement; rows that are spread evenly are rarely worse.
        """
        values = row_values.double()
        n = values.numel()
        total = float(values.mean()) * self.n_rows
        if n == self.n_rows:
            return Estimate(total, 0.0)
        missing = 1 - n / self.n_rows
        return Estimate(total, self.n_rows * math.sqrt(missing * float(values.var()) / n))


def spread_rows(n_rows: int, n: int) -> torch.Tensor:
    """int64 (n,): one row of each of n equal parts of range(n_rows), at a place in it that does not recur.

    Rows at equal distances would all be the same row of their attention heads, where that distance divides a head.
    """
    bounds = torch.arange(n + 1) * n_rows // n
    place = torch.arange(1, n + 1, dtype=torch.float64) * GOLDEN_RATIO % 1
    return bounds[:-1] + (place * bounds.diff()).long()
