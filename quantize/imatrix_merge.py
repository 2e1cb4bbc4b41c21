# SPDX-License-Identifier: Apache-2.0
"""Makes importance matrices of others: several of one model joined, or one as a recipe's weightings stand for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..errors import GGUFError, plain_text
from .imatrix import Entry, Imatrix, Weighting


class _Part(NamedTuple):
    """An entry of one file; its numbers times `scale` count rows."""

    path: Path
    entry: Entry
    scale: float

    @property
    def n_seen(self) -> float:
        """Rows of inputs that the entry was made of."""
        return self.scale * float(self.entry.counts.double().sum())


def merge(imatrices: Sequence[Imatrix], *, max_rows: int | None = None) -> Imatrix:
    """Join importance matrices of one model, as if it had been run on the datasets of all.

    Sums and counts add up and gains average, weighted by the calls of the model they were measured on. Each file gives
    recorded rows in proportion to the rows that it has seen, evenly picked from those that it has.

    Args:
        max_rows: recorded rows of an entry; None: as many as the one of the files that has most.
    Returns:
        The whole, under the path of the first file.
    Raises:
        GGUFError: the entries of a weight differ in columns or matrices.
    Source: llama.cpp tools/imatrix/imatrix.cpp IMatrixCollector::load_imatrix (the older format counts chunks).
    """
    chunk_size = max(imatrix.chunk_size for imatrix in imatrices)
    parts: dict[str, list[_Part]] = {}
    for imatrix in imatrices:
        scale = 1.0 if imatrix.chunk_size else float(max(chunk_size, 1))
        for name, entry in imatrix.entries.items():
            parts.setdefault(name, []).append(_Part(imatrix.path, entry, scale))
    entries = {name: _merge_parts(name, found, max_rows) for name, found in parts.items()}
    datasets = dict.fromkeys(dataset for imatrix in imatrices for dataset in imatrix.datasets)
    chunk_count = sum(imatrix.chunk_count for imatrix in imatrices)
    return Imatrix(imatrices[0].path, MappingProxyType(entries), tuple(datasets), chunk_count, chunk_size)


def reduce_imatrix(imatrix: Imatrix, weightings: Mapping[str, Weighting]) -> Imatrix:
    """The importance matrix that weightings stand for, for programs that know only the full one.

    Args:
        weightings: name of a weight -> weighting; others are weighed fully.
    Returns:
        The entries without those that are not to be weighed, and with the roots of the means where roots weigh; no
        rows, gains and sums of inputs.
    Raises:
        GGUFError: nothing is left.
    """
    entries = {}
    for name, entry in imatrix.entries.items():
        weighting = weightings.get(name, Weighting.FULL)
        if weighting is Weighting.MIXED:
            problem = f"the recipe mixes the blocks of '{plain_text(name)}' in a way that no importance matrix can say"
            raise GGUFError(problem, path=imatrix.path, subject=name, hint="Tune with one without rows.")
        weights = weighting.apply(entry.means)
        if weights is not None:
            is_full = weighting is Weighting.FULL
            entries[name] = (
                Entry(entry.sums, entry.counts) if is_full else Entry(weights, torch.ones_like(entry.counts))
            )
    if not entries:
        problem = "the recipe weighs none of its entries"
        raise GGUFError(problem, path=imatrix.path, hint="Quantize without an importance matrix.")
    return Imatrix(imatrix.path, MappingProxyType(entries), imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size)


def _merge_parts(name: str, parts: list[_Part], max_rows: int | None) -> Entry:
    first = parts[0]
    for part in parts[1:]:
        if part.entry.sums.shape != first.entry.sums.shape:
            shapes = [" x ".join(map(str, p.entry.sums.shape)) for p in (part, first)]
            raise GGUFError(
                f"the entry of '{plain_text(name)}' is {shapes[0]}, but {shapes[1]} in {first.path.name}",
                path=part.path,
                subject=name,
                hint="Merge importance matrices of one model.",
            )
    if len(parts) == 1 and first.scale == 1.0 and max_rows is None:
        return first.entry
    sums = _total([p.scale * p.entry.sums.double() for p in parts])
    counts = _total([p.scale * p.entry.counts.double() for p in parts])
    in_sums = [p.scale * p.entry.in_sum.double() for p in parts if p.entry.in_sum is not None]
    gain, gain_calls = _merge_gains(parts)
    in_sum = _total(in_sums) if len(in_sums) == len(parts) else None
    return Entry(sums, counts, _merge_rows(parts, max_rows), gain, gain_calls, in_sum)


def _total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of float64 tensors of one shape, float32."""
    return torch.stack(tuple(values)).sum(0).float()


def _merge_gains(parts: list[_Part]) -> tuple[float | None, float]:
    measured = [(p.entry.gain, p.entry.gain_calls) for p in parts if p.entry.gain is not None]
    n_calls = sum(calls for _, calls in measured)
    return (sum(gain * calls for gain, calls in measured) / n_calls, n_calls) if measured else (None, 0.0)


def _merge_rows(parts: list[_Part], max_rows: int | None) -> torch.Tensor | None:
    """bfloat16 (n_rows, n_columns), None where no file has recorded rows."""
    recorded = [(p.entry.rows, p.n_seen) for p in parts if p.entry.rows is not None]
    if not recorded:
        return None
    n_rows = max(len(rows) for rows, _ in recorded) if max_rows is None else max_rows
    n_seen = list(accumulate((seen for _, seen in recorded), initial=0.0))
    ends = [round(n_rows * seen / max(n_seen[-1], 1.0)) for seen in n_seen]
    shares = [end - start for start, end in pairwise(ends)]
    return torch.cat([_pick(rows, share) for (rows, _), share in zip(recorded, shares, strict=True)])


def _pick(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """At most so many rows, evenly spaced over all."""
    if n_rows >= len(rows):
        return rows
    at = (torch.arange(n_rows, dtype=torch.float64) + 0.5) * len(rows) / max(n_rows, 1)
    return rows[at.long()]
