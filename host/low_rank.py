# SPDX-License-Identifier: Apache-2.0
"""Plain LoRAs as low-rank factors: those of one weight joined by rank, added beside its product or into it.

plain_pairs() says whether a patch list is nothing but plain LoRAs, join_pairs() makes the factors, the rest computes
with them. How long factors are kept is in kept_factors.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter

Patch = tuple[float, Any, float, Any, Any]  # the host's: strength, adapter, strength_model, offset, function


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One plain LoRA as its file has it: W[rows, columns] += scale * up @ down.

    Attributes:
        up: (n_rows, rank, ...), any float dtype; down: (rank, n_columns, ...). Both with trailing dimensions of 1 where
            they were made for a convolution.
        scale: strength times alpha / rank.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    rows: slice
    columns: slice


@dataclasses.dataclass(frozen=True, eq=False)
class UpPart:
    """What some ranks of a LowRank give to some rows of the weight.

    Attributes:
        up: (n_rows, n_ranks), strengths and alphas multiplied in.
        ranks: the rows of the down factor that it takes.
    """

    up: torch.Tensor
    rows: slice
    ranks: slice


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """All plain LoRAs on the same columns of a 2-D weight: W[rows, columns] += up @ down[ranks] for each part.

    Attributes:
        down: (rank, n_columns), the LoRAs below each other; dtype and device are those of every `up`.
        parts: one for each range of rows, as trainers split a fused weight.
    """

    down: torch.Tensor
    columns: slice
    parts: tuple[UpPart, ...]


def plain_pairs(patches: Iterable[Patch], shape: tuple[int, ...]) -> tuple[Pair, ...] | None:
    """The patches of a weight of this shape as pairs, or None if one of them is anything but a plain LoRA."""
    pairs = []
    for strength, adapter, strength_model, offset, function in patches:
        if not isinstance(adapter, LoRAAdapter) or function is not None or strength_model != 1.0 or len(shape) != 2:
            return None
        up, down, alpha, mid, dora_scale, reshape = adapter.weights
        if mid is not None or dora_scale is not None or reshape is not None:
            return None
        rows, columns = _target(shape, offset)
        found = up.shape[0], up[0].numel(), down[0].numel()
        if found != (rows.stop - rows.start, down.shape[0], columns.stop - columns.start):
            return None
        scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
        if scale:
            pairs.append(Pair(up, down, scale, rows, columns))
    return tuple(pairs)


def _target(shape: tuple[int, ...], offset: tuple[int, int, int] | None) -> tuple[slice, slice]:
    """Rows and columns that a patch with this offset (dim, start, length) acts on."""
    bounds = [slice(0, n) for n in shape]
    if offset is not None:
        dim, start, length = offset
        bounds[dim] = slice(start, start + length)
    return bounds[0], bounds[1]


def n_bytes_joined(pairs: Iterable[Pair], dtype: torch.dtype) -> int:
    """Bytes of what join_pairs() makes of the pairs."""
    return sum(p.up.numel() + p.down.numel() for p in pairs) * dtype.itemsize


def join_pairs(pairs: Sequence[Pair], device: torch.device, dtype: torch.dtype) -> tuple[LowRank, ...]:
    """The pairs as factors on `device`, joined by rank; scales are multiplied in before `up` is rounded to `dtype`."""
    by_columns: dict[tuple[int, int], dict[tuple[int, int], list[Pair]]] = {}
    for pair in pairs:
        by_rows = by_columns.setdefault((pair.columns.start, pair.columns.stop), {})
        by_rows.setdefault((pair.rows.start, pair.rows.stop), []).append(pair)
    joined = []
    for columns, by_rows in by_columns.items():
        downs, parts, n_ranks = [], [], 0
        for rows, group in by_rows.items():
            ups = [(_moved(p.up, device, torch.float32) * p.scale).to(dtype) for p in group]
            up = _cat(ups, dim=1)  # (n_rows, ranks of the group)
            parts.append(UpPart(up, slice(*rows), slice(n_ranks, n_ranks + up.shape[1])))
            downs += [_moved(p.down, device, dtype) for p in group]
            n_ranks += up.shape[1]
        joined.append(LowRank(_cat(downs, dim=0), slice(*columns), tuple(parts)))
    return tuple(joined)


def _moved(factor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A factor as a matrix on `device`; it travels in the type that it has, which is the smaller one as a rule."""
    non_blocking = comfy.model_management.device_supports_non_blocking(device)
    return factor.flatten(1).to(device=device, non_blocking=non_blocking).to(dtype)


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def prefers_side_path(n_tokens: int, factors: Iterable[LowRank]) -> bool:
    """Whether the side path costs no more operations than adding the product of the factors to the weight.

    Of one pair on a whole weight: T r (in + out) against r in out, which meet at T = in out / (in + out).
    """
    beside = into = 0
    for f in factors:
        beside += n_tokens * (f.down.numel() + sum(part.up.numel() for part in f.parts))
        into += f.down.shape[1] * sum(part.up.numel() for part in f.parts)
    return beside <= into


def add_to_output(y: torch.Tensor, x: torch.Tensor, factors: Iterable[LowRank]) -> torch.Tensor:
    """y += x[columns] down' up' for each factor, in the factors' dtype.

    Args:
        y: (..., out), contiguous and private: it is changed in place.
        x: (..., in).
    """
    tokens, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for f in factors:
        hidden = torch.nn.functional.linear(tokens[:, f.columns].to(f.down.dtype), f.down)  # (n_tokens, rank)
        for part in f.parts:
            if sums.dtype == hidden.dtype:
                sums[:, part.rows].addmm_(hidden[:, part.ranks], part.up.t())
            else:
                sums[:, part.rows] += torch.nn.functional.linear(hidden[:, part.ranks], part.up)
    return y


def add_to_weight(weight: torch.Tensor, factors: Iterable[LowRank], first_row: int = 0) -> torch.Tensor:
    """Add what the factors give to consecutive rows of a weight, in place.

    Args:
        weight: (n_rows, in), float and private: rows `first_row` to `first_row + n_rows` of the whole weight.
    """
    for f in factors:
        for part in f.parts:
            start = max(part.rows.start, first_row)
            stop = min(part.rows.stop, first_row + weight.shape[0])
            if start < stop:
                up = part.up[start - part.rows.start : stop - part.rows.start].to(weight.dtype)
                down = f.down[part.ranks].to(weight.dtype)
                weight[start - first_row : stop - first_row, f.columns].addmm_(up, down)
    return weight
