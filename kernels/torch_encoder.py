# SPDX-License-Identifier: Apache-2.0
"""Quantizes weights with torch alone, on any device, to the very bytes that ggml's C writes on a CPU.

Owns encode(), the one way in, and the types that are no K types: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS. The K
types are torch_encoder_k.py's, the searches that both need encoder_search.py's, the places of the bits those of
layouts.py, through packing.py. Knows nothing of files and models. A new type is a function and a line in _ENCODERS.

The same bytes need the same float32 operations in the same order. So a sum adds one element after the other, for many
blocks at a time; a divisor is a tensor, because torch multiplies by the reciprocal of a number; and blocks that the C
code treats apart, by a branch or an early exit, are told apart by masks.

Source: ggml/src/ggml-quants.c (llama.cpp b11434), what ggml_quantize_chunk calls; each encoder names its function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from ..layouts import KVALUES_IQ4NL, LAYOUTS, Layout, byte_shape
from .encoder_search import (
    GROUP_MAX_EPS,
    divide,
    largest_by_magnitude,
    make_qkx3_quants,
    make_qx_quants,
    nearest_int,
    square_root,
    sum_rows,
)
from .iq_grids import device_table
from .packing import pack_blocks
from .torch_encoder_k import ENCODERS as K_ENCODERS

# Weights encoded at a time: on a CPU what its caches hold, elsewhere enough to hide the launches.
BATCH_WEIGHTS_CPU = 1 << 17
BATCH_WEIGHTS = 1 << 22
# Rows and columns squared at a time for the rows' mean squares.
TILE_ROWS, TILE_COLUMNS = 1 << 14, 64

SUB_BLOCK = 32
IQ4_TRIES = 7
# Beyond the outermost of kvalues_iq4nl, -127 and 113, nothing changes; the tries reach 127 + IQ4_TRIES and a rounding.
IQ4_REACH = 136
# The largest float32 below 0.5: adding 0.5 itself would round 0.49999997 up to 1.
JUST_BELOW_HALF = 0.49999997

# What a block holds, by the names of its layout, as pack_blocks takes it.
Values = Mapping[str, Tensor]


def encode(weights: Tensor, qtype: QType, importance: Tensor | None = None) -> Tensor:
    """Quantize a matrix to ggml's blocks.

    Temporaries are bounded by the batch, not by the tensor. A scale that overflows f16 is written as inf, as ggml does.

    Args:
        weights: float32 (n_rows, n_columns) of any device, finite, n_columns a multiple of the qtype's block size.
        qtype: one of ENCODABLE_QTYPES.
        importance: float32 (n_columns,) on that device, finite and not negative: a tensor's row of an imatrix; or None.
    Returns:
        uint8 (n_rows, n_columns // block_size * type_size) on that device.
    Raises:
        ValueError: an argument that is none of these.
    Source: ggml_quantize_chunk, ggml/src/ggml.c.
    """
    weights = weights.detach()
    _check_arguments(weights, qtype, importance)
    weights = weights.contiguous()
    if not weights.numel():
        return torch.empty(byte_shape(qtype, weights.shape), dtype=torch.uint8, device=weights.device)
    if qtype in K_ENCODERS:
        return K_ENCODERS[qtype](weights, importance)
    layout, encoder = LAYOUTS[qtype], _ENCODERS[qtype]
    n_blocks = weights.numel() // layout.block_size
    blocks = torch.empty(n_blocks, layout.type_size, dtype=torch.uint8, device=weights.device)
    start = 0
    for x, qw in _batches(weights, layout, importance, encoder.sigma2_of):
        blocks[start : start + len(x)] = pack_blocks(layout, encoder.find(x, qw))
        start += len(x)
    return blocks.view(byte_shape(qtype, weights.shape))


def _check_arguments(weights: Tensor, qtype: QType, importance: Tensor | None) -> None:
    if qtype not in ENCODABLE_QTYPES:
        known = ", ".join(sorted(each.name for each in ENCODABLE_QTYPES))
        raise ValueError(f"{qtype.name} has no torch encoder. Use one of: {known}.")
    if weights.dtype != torch.float32 or weights.ndim != 2:
        raise ValueError(f"weights are {weights.dtype} of shape {tuple(weights.shape)}, expected a float32 matrix.")
    byte_shape(qtype, weights.shape)
    if weights.numel() and not all(bool(end.isfinite()) for end in weights.aminmax()):
        raise ValueError("weights hold infinity or NaN, expected finite numbers.")
    if importance is None:
        return
    if importance.dtype != torch.float32 or importance.shape != weights.shape[1:]:
        raise ValueError(
            f"importance is {importance.dtype} of shape {tuple(importance.shape)}, "
            f"expected float32, one number for each of the {weights.shape[1]} columns."
        )
    if importance.device != weights.device:
        raise ValueError(f"importance is on {importance.device}, expected {weights.device}, where the weights are.")
    if importance.numel() and not (bool(importance.amin() >= 0) and bool(importance.amax().isfinite())):
        raise ValueError("importance holds negative numbers, infinity or NaN, expected finite numbers from 0.")


# Batches


def _batches(
    weights: Tensor, layout: Layout, importance: Tensor | None, sigma2_of: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut a matrix into batches of blocks, each with the weights that the errors of its elements have in a search.

    Args:
        weights: float32 (n_rows, n_columns), contiguous.
        importance: float32 (n_columns,) or None.
        sigma2_of: what sigma2 belongs to, see _Encoder.
    Yields:
        x: float32 (n_blocks, block_size), a view of the weights.
        qw: importance * sqrt(sigma2 + x*x), float32 (n_blocks, block_size); None without importance or sigma2.
    """
    x = weights.view(-1, layout.block_size)
    n_batch = max(1, (BATCH_WEIGHTS_CPU if x.device.type == "cpu" else BATCH_WEIGHTS) // layout.block_size)
    if importance is None or not sigma2_of:
        yield from ((batch, None) for batch in torch.split(x, n_batch))
        return
    n_per_row = weights.shape[1] // layout.block_size
    columns = importance.view(n_per_row, layout.block_size)
    rows = _row_mean_squares(weights) if sigma2_of == "row" else None
    for start in range(0, len(x), n_batch):
        batch = x[start : start + n_batch]
        block = torch.arange(start, start + len(batch), device=x.device)
        squares = batch.square()
        if rows is not None:
            sigma2 = rows[block // n_per_row]
        else:
            sigma2 = sum_rows(squares.t().contiguous().unbind(0)).mul_(2 / layout.block_size)  # a power of two
        root = square_root(squares.add_(sigma2[:, None]))
        yield batch, root.mul_(columns[block % n_per_row])


def _row_mean_squares(weights: Tensor) -> Tensor:
    """Mean of the squares of each row, summed from left to right: (n_rows, n_columns) -> (n_rows,)."""
    means = torch.zeros(weights.shape[0], device=weights.device)
    for total, rows in zip(torch.split(means, TILE_ROWS), torch.split(weights, TILE_ROWS), strict=True):
        for tile in torch.split(rows, TILE_COLUMNS, dim=1):
            for column in tile.square().t().contiguous():
                total += column
    return means.div_(torch.full_like(means, weights.shape[1]))


# What several encoders need


def _divide(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once."""
    return x / torch.full_like(x, number)


def _reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 where d is 0."""
    return torch.where(d == 0, d, d.reciprocal())


def _first_of(x: Tensor, key: Tensor) -> Tensor:
    """In each row of x, the element that has the largest key, the first one of several: (n, n_x) -> (n,)."""
    return x.gather(1, key.argmax(1, keepdim=True)).squeeze(1)


def _signed_max(x: Tensor) -> Tensor:
    """In each row the number of the largest magnitude, with its sign; the first one of several: (n, n_x) -> (n,)."""
    low, high = x.amin(1), x.amax(1)
    largest = torch.where(high > -low, high, low)
    tied = (high == -low) & (high > 0)
    if bool(tied.any()):
        rows = x[tied]
        largest[tied] = _first_of(rows, rows.abs())
    return largest.add_(0.0)  # -0.0 becomes 0.0: the C loops start there


def _first_min(x: Tensor) -> Tensor:
    """The minimum of each row; of several zeros the first, for its sign: (n, n_x) -> (n,)."""
    low = x.amin(1)
    zero = low == 0
    if bool(zero.any()):
        rows = x[zero]
        low[zero] = _first_of(rows, (rows == 0).to(torch.int8))
    return low


def _truncate(x: Tensor, inverse: Tensor, offset: float, n_max: int) -> Tensor:
    """Codes min(trunc(x * inverse + offset), n_max), and 0 where the inverse overflowed, as x86 casts infinity and NaN.

    Args:
        x: float32 (n_blocks, block_size).
        inverse: float32 (n_blocks,).
    Returns:
        int8 (n_blocks, block_size).
    """
    overflowed = inverse.isinf()
    offsets = torch.full_like(inverse, offset).masked_fill_(overflowed, 0)
    codes = x * inverse.masked_fill(overflowed, 0)[:, None]
    return codes.add_(offsets[:, None]).clamp_(max=n_max).to(torch.int8)


# Encoders: x float32 (n_blocks, block_size) and qw, of the same shape or None, -> what the blocks hold, by name


def encode_q8_0(x: Tensor, qw: Tensor | None) -> Values:
    """Q8_0: d = max|x| / 127, q = x/d rounded half away from zero. There is no search.

    Source: quantize_row_q8_0_ref.
    """
    d = _divide(x.abs().amax(1), 127)
    inverse = _reciprocal(d)
    q = x * inverse.masked_fill_(inverse.isinf(), 0)[:, None]
    half = torch.copysign(torch.full((), JUST_BELOW_HALF, device=x.device), q)
    return {"d": d, "quants": q.add_(half).to(torch.int8)}


def _encode_symmetric(x: Tensor, qw: Tensor | None, n_max: int) -> Values:
    """Q4_0 and Q5_0: w = d*(q - n_max); the number of the largest magnitude becomes -n_max.

    Source: quantize_row_q4_0_ref, quantize_row_q5_0_ref; with qw quantize_row_q4_0_impl, quantize_row_q5_0_impl.
    """
    if qw is not None:
        d, quants = make_qx_quants(x.t().contiguous(), qw.t().contiguous(), n_max)
        return {"d": d, "quants": quants.t()}
    d = _divide(_signed_max(x), -n_max)
    return {"d": d, "quants": _truncate(x, _reciprocal(d), n_max + 0.5, 2 * n_max - 1)}


def _encode_affine(x: Tensor, qw: Tensor | None, n_max: int) -> Values:
    """Q4_1 and Q5_1: w = d*q + m; the smallest number becomes 0, the largest n_max.

    Source: quantize_row_q4_1_ref, quantize_row_q5_1_ref; with qw quantize_row_q4_1_impl, quantize_row_q5_1_impl.
    """
    if qw is not None:
        d, neg_min, quants = make_qkx3_quants(x.t().contiguous(), qw.t().contiguous(), n_max, -0.9, 0.05, 36)
        return {"d": d, "m": -neg_min, "quants": quants.t()}
    m = _first_min(x)
    d = _divide(x.amax(1) - m, n_max).add_(0.0)
    return {"d": d, "m": m, "quants": _truncate(x - m[:, None], _reciprocal(d), 0.5, n_max)}


def encode_iq4_nl(x: Tensor, qw: Tensor | None) -> Values:
    """IQ4_NL: w = d*kvalues[q].

    Source: quantize_row_iq4_nl_impl as quantize_iq4_nl calls it.
    """
    fit = _IQ4Fit(x, qw)
    d = fit.search_scales()
    return {"d": d, "quants": fit.quantize(d)}


def encode_iq4_xs(x: Tensor, qw: Tensor | None) -> Values:
    """IQ4_XS: w = d*(scale - 32)*kvalues[q]; the scale of the largest magnitude becomes -32.

    Source: quantize_row_iq4_nl_impl as quantize_iq4_xs calls it.
    """
    fit = _IQ4Fit(x.view(-1, SUB_BLOCK), None if qw is None else qw.view(-1, SUB_BLOCK))
    found = fit.search_scales().view(len(x), -1)  # (n_blocks, 8)
    d = _divide(_signed_max(found), -32)
    scales = nearest_int(_reciprocal(d)[:, None] * found).clamp_(-32, 31)
    quants = fit.quantize((d[:, None] * scales).flatten())
    return {"d": d, "scales": scales + 32, "quants": quants.reshape(x.shape)}


class _IQ4Fit:
    """Fits kvalues_iq4nl to sub-blocks of 32 numbers.

    The nearest of the values changes only at middles between two of them, all multiples of 1/2: so it is looked up by
    floor(2*number). At a middle the upper value is the nearest.

    Attributes:
        x, qw: float32 (32, n), one sub-block a column.
        codes: int8, codes[floor(2*number) + 2*IQ4_REACH] is the index of the nearest value.
        values: float32, that value.
    """

    def __init__(self, x: Tensor, qw: Tensor | None) -> None:
        self.x = x.t().contiguous()
        self.qw = self.x * self.x if qw is None else qw.t().contiguous()
        kvalues = device_table(KVALUES_IQ4NL, x.device)
        halves = torch.arange(-2 * IQ4_REACH, 2 * IQ4_REACH + 1, device=x.device) / 2
        codes = torch.bucketize(halves, (kvalues[1:] + kvalues[:-1]) / 2, right=True)
        self.codes, self.values = codes.to(torch.int8), kvalues[codes]
        self.first_value = float(kvalues[0])
        self._number = torch.empty_like(self.x)
        self._step = torch.empty_like(self.x, dtype=torch.int32)
        self._value = torch.empty_like(self.x)
        self._products = self.x.new_empty(SUB_BLOCK, 2, x.shape[0])

    def search_scales(self) -> Tensor:
        """The scale of each sub-block: the best by weighted squares of 1 + (2*IQ4_TRIES + 1) tries, (n,)."""
        largest = largest_by_magnitude(self.x)
        dead = largest.abs() < GROUP_MAX_EPS
        largest = largest.masked_fill_(dead, 1)
        sumqx, sumq2 = self._sums(_divide(largest, -self.first_value).reciprocal_())
        scale = torch.where(sumq2 > 0, sumqx / sumq2, 0)
        best = scale * sumqx
        for i in range(-IQ4_TRIES, IQ4_TRIES + 1):
            sumqx, sumq2 = self._sums(divide(i + self.first_value, largest))
            better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
            scale = torch.where(better, sumqx / sumq2, scale)
            best = torch.where(better, scale * sumqx, best)
        return scale.masked_fill_(dead, 0)

    def quantize(self, scales: Tensor) -> Tensor:
        """Indices of the values nearest to x / scale: int8 (n, 32). NaN has the last one."""
        numbers = torch.mul(self.x, _reciprocal(scales), out=self._number).nan_to_num_(nan=IQ4_REACH)
        steps = self._steps(numbers.clamp_(-IQ4_REACH, IQ4_REACH))
        return self.codes.index_select(0, steps.flatten()).view_as(steps).t()

    def _sums(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of qw*q*x and qw*q*q over the values q nearest to x * inverse: (n,), (n,)."""
        steps = self._steps(torch.mul(self.x, inverse, out=self._number))
        value = torch.index_select(self.values, 0, steps.view(-1), out=self._value.view(-1)).view_as(steps)
        weighted = torch.mul(self.qw, value, out=self._number)
        torch.mul(weighted, self.x, out=self._products[:, 0])
        torch.mul(weighted, value, out=self._products[:, 1])
        sumqx, sumq2 = sum_rows(self._products.unbind(0))
        return sumqx, sumq2

    def _steps(self, numbers: Tensor) -> Tensor:
        """Where codes and values have the numbers, at most IQ4_REACH in magnitude, which are overwritten: int32."""
        return self._step.copy_(numbers.mul_(2).floor_().add_(2 * IQ4_REACH))


@dataclass(frozen=True)
class _Encoder:
    """How a type is encoded.

    Attributes:
        find: x and qw -> the values for pack_blocks.
        sigma2_of: sigma2 in qw is the mean square of a "row", or twice that of a "block"; "": the type has no qw.
    """

    find: Callable[[Tensor, Tensor | None], Values]
    sigma2_of: str


_ENCODERS: Mapping[QType, _Encoder] = MappingProxyType(
    {
        QType.Q8_0: _Encoder(encode_q8_0, ""),
        QType.Q4_0: _Encoder(partial(_encode_symmetric, n_max=8), "row"),
        QType.Q4_1: _Encoder(partial(_encode_affine, n_max=15), "row"),
        QType.Q5_0: _Encoder(partial(_encode_symmetric, n_max=16), "row"),
        QType.Q5_1: _Encoder(partial(_encode_affine, n_max=31), "row"),
        QType.IQ4_NL: _Encoder(encode_iq4_nl, "block"),
        QType.IQ4_XS: _Encoder(encode_iq4_xs, "block"),
    }
)
ENCODABLE_QTYPES: frozenset[QType] = frozenset({*_ENCODERS, *K_ENCODERS})
