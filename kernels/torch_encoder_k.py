# SPDX-License-Identifier: Apache-2.0
"""Encoders of the K types in plain torch, on any device: ggml's bytes, with and without an importance matrix.

Owns ENCODERS, {qtype: function}, and how each K type turns sub-blocks into scales, mins and codes. The searches
are encoder_search.py's, the bits packing.py's. A new K type is a function and a line in ENCODERS.

Blocks are encoded in batches, so memory is bounded by the batch. In a batch element i of all sub-blocks is one row, so
that each step of a search is an operation on whole rows. Shapes: x is (size, n_subs, n_blocks), weights per sub-block
and sub-blocks per block; scales are (n_subs, n_blocks), which are rows for the search over the scales of a block.

Source: ggml/src/ggml-quants.c (llama.cpp b11434): quantize_row_q*_K_ref without an importance matrix,
quantize_row_q*_K_impl with one, as quantize_q*_K choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from gguf.constants import QK_K, GGMLQuantizationType
from torch import Tensor

from ..layouts import LAYOUTS, Layout
from .encoder_search import (
    GROUP_MAX_EPS,
    divide,
    largest_by_magnitude,
    make_q3_quants,
    make_qkx2_quants,
    make_qkx3_quants,
    make_qp_quants,
    make_qx_quants,
    nearest_codes_,
    nearest_int,
    square_root,
    sum_rows,
)
from .packing import pack_blocks

# Weights encoded at a time: on a CPU what its caches hold while rows are still long, elsewhere enough to hide launches.
# The temporaries take up to 27 bytes a weight on a CPU (measured), some 45 elsewhere: 7 MB and 360 MB.
BATCH_WEIGHTS_CPU = 1 << 18
BATCH_WEIGHTS = 1 << 23

Encoder = Callable[[Tensor, Tensor | None], Tensor]
# (x, importance) of one batch, each (size, n_subs, n_blocks) -> values for pack_blocks.
BatchEncoder = Callable[[Tensor, Tensor | None], dict[str, Tensor]]


def _join_octets(scale_codes: Tensor, min_codes: Tensor) -> tuple[Tensor, Tensor]:
    """Q2_K: the bits of a scale code above 4 run into the min beside it in the byte."""
    octets = scale_codes | min_codes << 4
    return octets & 15, octets >> 4


def _saturate(scale_codes: Tensor, min_codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes above 63 become 63."""
    return scale_codes.clamp(max=63), min_codes.clamp(max=63)


def _spill(scale_codes: Tensor, min_codes: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K: bits above 6 of the codes of sub-blocks 0-3 run into the top bits of sub-blocks 4-7, in the same bytes."""

    def spill(codes: Tensor) -> Tensor:
        first, last = codes.chunk(2)
        return torch.cat((first & 63, last & 63 | first >> 6 << 4))

    return spill(scale_codes), spill(min_codes)


# How a block keeps the codes of scales and mins, uint8 (n_subs, n_blocks), when some have too many bits; that takes
# negative scales, which degenerate importances can bring about.
JoinCodes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _LineType:
    """A type with w = d*scale*q - dmin*min, and the search that ggml makes for it.

    Attributes:
        nmax, scale_max: largest code of a weight, and of a scale or min.
        rmin, rdelta, nstep: the tries without an importance matrix.
        use_mad: without one, errors are |diff|, weighted by |x|; else diff*diff, weighted by |x| + root mean square.
        sigma_factor: with one, sigma2 is this times the block's mean square.
        join, join_importance: how the codes of scales and mins are kept, without and with one.
    """

    nmax: int
    scale_max: int
    rmin: float
    rdelta: float
    nstep: int
    use_mad: bool
    sigma_factor: float
    join: JoinCodes
    join_importance: JoinCodes


_Q2_K = _LineType(3, 15, -0.5, 0.1, 15, True, 1, _join_octets, _join_octets)
_Q4_K = _LineType(15, 63, -1, 0.1, 20, False, 2, _saturate, _spill)
_Q5_K = _LineType(31, 63, -0.5, 0.1, 15, False, 2, _saturate, _saturate)
_IMPORTANCE_TRIES = (-0.9, 0.05, 36)  # rmin, rdelta, nstep


def encode_q2_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Encode Q2_K: 16 sub-blocks of 16 weights, 4-bit scales and mins. Arguments and result as in _encode."""
    return _encode(weights, importance, GGMLQuantizationType.Q2_K, partial(_encode_lines, _Q2_K))


def encode_q3_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Encode Q3_K: 16 sub-blocks of 16 weights, 6-bit scales. Arguments and result as in _encode."""
    return _encode(weights, importance, GGMLQuantizationType.Q3_K, _encode_q3_k)


def encode_q4_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Encode Q4_K: 8 sub-blocks of 32 weights, 6-bit scales and mins. Arguments and result as in _encode."""
    return _encode(weights, importance, GGMLQuantizationType.Q4_K, partial(_encode_lines, _Q4_K))


def encode_q5_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Encode Q5_K: as Q4_K with a fifth bit. Arguments and result as in _encode."""
    return _encode(weights, importance, GGMLQuantizationType.Q5_K, partial(_encode_lines, _Q5_K))


def encode_q6_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Encode Q6_K: 16 sub-blocks of 16 weights, signed 8-bit scales. Arguments and result as in _encode."""
    return _encode(weights, importance, GGMLQuantizationType.Q6_K, _encode_q6_k)


ENCODERS: Mapping[GGMLQuantizationType, Encoder] = MappingProxyType(
    {
        GGMLQuantizationType.Q2_K: encode_q2_k,
        GGMLQuantizationType.Q3_K: encode_q3_k,
        GGMLQuantizationType.Q4_K: encode_q4_k,
        GGMLQuantizationType.Q5_K: encode_q5_k,
        GGMLQuantizationType.Q6_K: encode_q6_k,
    }
)


def _encode(
    weights: Tensor, importance: Tensor | None, qtype: GGMLQuantizationType, encode_batch: BatchEncoder
) -> Tensor:
    """Encode a matrix batch by batch.

    Args:
        weights: float32 (n_rows, n_columns), finite, n_columns a multiple of 256.
        importance: the imatrix row, float32 (n_columns,) >= 0 on the same device, or None.
        qtype: the type, with a row in layouts.LAYOUTS.
        encode_batch: what it does with a batch.
    Returns:
        uint8 (n_rows, bytes per row), ggml's bytes. A scale beyond float16 becomes inf, as in ggml.
    """
    layout = LAYOUTS[qtype]
    n_rows, n_columns = weights.shape
    blocks = weights.reshape(-1, QK_K)
    n_batch = (BATCH_WEIGHTS_CPU if weights.device.type == "cpu" else BATCH_WEIGHTS) // QK_K
    out = torch.empty(len(blocks), layout.type_size, dtype=torch.uint8, device=weights.device)
    for start in range(0, len(blocks), n_batch):
        stop = min(start + n_batch, len(blocks))
        batch_importance = None
        if importance is not None:
            which = torch.arange(start, stop, device=weights.device) % (n_columns // QK_K)
            batch_importance = _sub_block_columns(importance.reshape(-1, QK_K)[which], layout)
        values = encode_batch(_sub_block_columns(blocks[start:stop], layout), batch_importance)
        out[start:stop] = pack_blocks(layout, {name: _block_rows(value) for name, value in values.items()})
    return out.view(n_rows, n_columns // QK_K * layout.type_size)


def _sub_block_columns(blocks: Tensor, layout: Layout) -> Tensor:
    """Blocks (n_blocks, 256) with the elements of a sub-block first: (size, n_subs, n_blocks)."""
    n_subs = layout.n_codes(layout.scales) if layout.scales else 1
    return torch.unflatten(blocks, 1, (n_subs, -1)).permute(2, 1, 0).contiguous()


def _block_rows(value: Tensor) -> Tensor:
    """The inverse, for (size, n_subs, n_blocks), (codes per block, n_blocks) or (n_blocks,)."""
    return value.permute(*reversed(range(value.ndim))).flatten(1) if value.ndim > 1 else value


def _encode_lines(line: _LineType, x: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
    """A batch of Q2_K, Q4_K or Q5_K. x, importance: (size, n_subs, n_blocks)."""
    per_block = x.shape[1:]  # (n_subs, n_blocks)
    columns = x.flatten(1)  # (size, n_sub_blocks)
    if importance is None:
        tries = (line.rmin, line.rdelta, line.nstep)
        weights = _line_weights(columns, line.use_mad)
        scales, mins, codes = make_qkx2_quants(columns, weights, line.nmax, *tries, use_mad=line.use_mad)
        d, scale_codes = _encode_factors(scales.view(per_block), line.scale_max)
        dmin, min_codes = _encode_factors(mins.view(per_block), line.scale_max)
        scale_codes, min_codes = line.join(scale_codes, min_codes)
    else:
        weights = _importance_weights(x, importance, line.sigma_factor)
        scales, mins, codes = make_qkx3_quants(columns, weights.flatten(1), line.nmax, *_IMPORTANCE_TRIES)
        totals = sum_rows(weights.unbind(0))  # (n_subs, n_blocks)
        both = torch.cat((scales.view(per_block), mins.view(per_block)), dim=1)
        factors, factor_codes = make_qp_quants(both, torch.cat((totals, totals), dim=1), line.scale_max)
        d, dmin = factors.to(torch.float16).chunk(2)
        scale_codes, min_codes = line.join_importance(*factor_codes.chunk(2, dim=1))
    step = d.float() * scale_codes
    quants = torch.div(x + dmin.float() * min_codes, step)
    quants = _keep_where_zero(step, nearest_codes_(quants, 0, line.nmax), codes.view(x.shape))
    return {"d": d, "dmin": dmin, "scales": scale_codes, "mins": min_codes, "quants": quants}


def _line_weights(x: Tensor, magnitudes: bool) -> Tensor:
    """Weights of the errors without an importance matrix: |x|, or |x| + root mean square: (size, n_sub_blocks)."""
    if magnitudes:
        return x.abs()
    mean_square = sum_rows((x * x).unbind(0)) * (1 / x.shape[0])  # a power of two, so exact
    return x.abs() + square_root(mean_square)


def _importance_weights(x: Tensor, importance: Tensor, sigma_factor: float) -> Tensor:
    """importance * sqrt(sigma2 + x*x), sigma2 being of the block: (size, n_subs, n_blocks)."""
    squares = x * x
    sigma2 = sum_rows(squares.transpose(0, 1).flatten(0, 1).unbind(0)) * (sigma_factor / QK_K)
    return square_root(squares.add_(sigma2)).mul_(importance)


def _encode_factors(factors: Tensor, code_max: int) -> tuple[Tensor, Tensor]:
    """Scales or mins (n_subs, n_blocks) by their largest: f16 (n_blocks,), uint8 codes of their shape."""
    top = factors.amax(0)
    top = torch.where(top > 0, top, 0)  # not clamp, which may leave -0
    inverse = torch.where(top > 0, divide(code_max, top), 0)
    codes = (nearest_int(inverse * factors) & 0xFF).to(torch.uint8)
    return torch.div(top, torch.full_like(top, code_max)).to(torch.float16), codes


def _keep_where_zero(step: Tensor, quants: Tensor, searched: Tensor) -> Tensor:
    """The codes for the stored step; where that is 0, those of the search: uint8 (size, n_subs, n_blocks)."""
    return torch.where(step != 0, quants.to(torch.uint8), searched)


def _encode_q3_k(x: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
    """A batch of Q3_K. x, importance: (16, 16, n_blocks)."""
    per_block = x.shape[1:]  # (n_subs, n_blocks)
    columns = x.flatten(1)
    if importance is None:
        scales, codes = make_q3_quants(columns, 4)
        d, scale_codes = _encode_scales_q3_k(scales.view(per_block))
    else:
        weights = _importance_weights(x, importance, 2)
        scales, codes = make_qx_quants(columns, weights.flatten(1), 4)
        totals = sum_rows(weights.unbind(0))
        d, scale_codes = make_qx_quants(scales.view(per_block), totals, 32)
        d = d.to(torch.float16)
    step = d.float() * (scale_codes.float() - 32)
    quants = nearest_codes_(torch.div(x, step), -4, 3).add_(4)
    return {"d": d, "scales": scale_codes, "quants": _keep_where_zero(step, quants, codes.view(x.shape))}


def _encode_scales_q3_k(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (16, n_blocks) by their largest: f16 (n_blocks,) and uint8 codes, all 0 in a block of zeros."""
    largest = largest_by_magnitude(scales)
    alive = largest != 0
    inverse = divide(-32, torch.where(alive, largest, 1))
    codes = nearest_int(inverse * scales).to(torch.int8).clamp(-32, 31).to(torch.int32) + 32
    d = torch.where(alive, divide(1, inverse), 0).to(torch.float16)
    return d, (codes * alive).to(torch.uint8)


def _encode_q6_k(x: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
    """A batch of Q6_K. x, importance: (16, 16, n_blocks)."""
    columns = x.flatten(1)
    weights = columns * columns if importance is None else importance.flatten(1)
    scales, codes = make_qx_quants(columns, weights, 32)
    scales = scales.view(x.shape[1:])
    largest = largest_by_magnitude(scales)
    alive = largest.abs() >= GROUP_MAX_EPS
    inverse = divide(-128, torch.where(alive, largest, 1))
    scale_codes = (nearest_int(inverse * scales).clamp_(max=127) * alive).to(torch.int8)
    d = torch.where(alive, divide(1, inverse), 0).to(torch.float16)
    step = d.float() * scale_codes
    quants = nearest_codes_(torch.div(x, step), -32, 31).add_(32)
    quants = _keep_where_zero(step, quants, codes.view(x.shape)) * alive
    return {"d": d, "scales": scale_codes, "quants": quants}
