# SPDX-License-Identifier: Apache-2.0
"""ggml's searches for scales and codes, many sub-blocks at a time, with the bits of its C code.

Owns the helpers of ggml-quants.c that the encoders of several qtypes share: nearest_int and make_*_quants. Knows no
qtype and no block. A sub-block is here what shares one scale (16 or 32 weights, or the 8 or 16 scales of a block).

Sub-blocks are columns: x is float32 (n, n_sub_blocks), contiguous, row i holding element i of every sub-block, so that
each step of ggml's loops is one operation on whole rows. What makes the results equal to the bit:

- sums add row after row, in ggml's order and in float32: sum_rows(), never torch.sum;
- products and sums are separate operations, so that nothing is fused into a multiply-add on any device;
- a number divided by a tensor goes through divide(): torch multiplies by the reciprocal;
- comparisons are written as in C, so that NaN and signed zeros take the same branch; branches are torch.where.

Source: ggml/src/ggml-quants.c (llama.cpp b11434), the function of the same name in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

GROUP_MAX_EPS = 1e-15  # a sub-block below it counts as zeros, as in ggml
NEAREST_INT_LIMIT = 4194303.0  # beyond it nearest_int wraps around
N_DESCENTS = 5  # sweeps of make_q3_quants and make_qp_quants at most
PART_SIZE_CPU = 1 << 16  # elements that a search on a CPU works on at a time: 256 KB for each of its buffers

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer and leaves that in the mantissa
_MANTISSA = 0x007FFFFF
_HALF_MANTISSA = 0x00400000
_EXPONENT = 0x4B000000

# Rounds numbers to codes low..high, in place: the numbers stay float32.
Rounding = Callable[[Tensor, int, int], Tensor]


def float32_steps(first: float, step: float, counts: Sequence[int], add: float = 0) -> list[float]:
    """The numbers first + step*i + add, computed in float32 in that order, for each i in counts."""
    numbers = np.float32(first) + np.float32(step) * np.array(counts, np.float32) + np.float32(add)
    return [float(number) for number in numbers]


def divide(number: float, by: Tensor) -> Tensor:
    """number / by, correctly rounded; as `number / tensor` it would be number * (1 / tensor)."""
    return torch.div(torch.full_like(by, number), by)


def square_root(x: Tensor) -> Tensor:
    """C's sqrtf. torch's float32 square root is not correctly rounded on a CPU; float64's, rounded once more, is."""
    return x.double().sqrt_().float() if x.device.type == "cpu" else x.sqrt()


def sum_rows(rows: Sequence[Tensor]) -> Tensor:
    """0 + rows[0] + rows[1] + ..., in this order in float32; rows are of one shape."""
    return add_rows_(torch.zeros_like(rows[0]), rows)


def add_rows_(total: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """total + rows[0] + rows[1] + ..., in this order in float32, in place."""
    for row in rows:
        total += row
    return total


def _rows_per_part(x: Tensor) -> int:
    """How many rows of x (n, n_sub_blocks) a search computes at a time, so that a CPU's caches hold it: divides n."""
    n_rows, n_sub_blocks = x.shape
    if x.device.type != "cpu" or n_rows * n_sub_blocks <= PART_SIZE_CPU:
        return n_rows
    wanted = PART_SIZE_CPU // n_sub_blocks
    return gcd(n_rows, 1 << max(wanted.bit_length() - 1, 0))


def nearest_int(x: Tensor) -> Tensor:
    """ggml's rounding, halves to even; beyond NEAREST_INT_LIMIT it wraps around. float32 -> int32, same shape."""
    bits = (_without_nan_(x.clone()) + _MAGIC).view(torch.int32)
    return (bits & _MANTISSA) - _HALF_MANTISSA


def nearest_codes_(x: Tensor, low: int, high: int) -> Tensor:
    """nearest_int() clamped to low..high, for all of float32, in place: float32, contiguous."""
    bits = _without_nan_(x).add_(_MAGIC).view(torch.int32)
    bits &= _MANTISSA
    bits.clamp_(_HALF_MANTISSA + low, _HALF_MANTISSA + high)
    bits |= _EXPONENT
    return x.sub_(_MAGIC)


def round_codes_(x: Tensor, low: int, high: int) -> Tensor:
    """nearest_codes_() for numbers within NEAREST_INT_LIMIT, at half its cost."""
    return x.round_().clamp_(low, high)


def bounded_codes_(x: Tensor, low: int, high: int) -> Tensor:
    """make_qkx3_quants' own rounding, for all of float32: clamped first, so that nothing wraps; NaN gives low."""
    return torch.nan_to_num_(x.clamp_(low, high), nan=low).round_()


def _without_nan_(x: Tensor) -> Tensor:
    """NaN replaced by 0, which nearest_int makes of a CPU's NaN; a GPU's has other bits."""
    return torch.nan_to_num_(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def largest_by_magnitude(x: Tensor) -> Tensor:
    """The first element of each column whose magnitude none exceeds, with its sign; 0 in a column of zeros.

    Args:
        x: float32 (n, n_sub_blocks).
    Returns:
        float32 (n_sub_blocks,).
    """
    magnitudes = x.abs()
    largest = torch.zeros_like(x[0])
    top = torch.zeros_like(x[0])
    for row, magnitude in zip(x, magnitudes, strict=True):
        largest = torch.where(magnitude > top, row, largest)
        top = torch.maximum(top, magnitude)
    return largest


def make_qx_quants(x: Tensor, weights: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """The scale of x ~ scale * l, -nmax <= l < nmax, with the least weighted error among 19 tries.

    Args:
        x: float32 (n, n_sub_blocks), finite.
        weights: float32 (n, n_sub_blocks), >= 0; x*x where ggml is given none (rmse_type 1).
    Returns:
        scale: float32 (n_sub_blocks,); codes: uint8 (n, n_sub_blocks), l + nmax, but 0 in a sub-block of zeros.
    """
    largest = largest_by_magnitude(x)
    alive = largest.abs() >= GROUP_MAX_EPS
    largest = torch.where(alive, largest, 1)
    search = _ScaleSearch(x, weights, nmax)
    iscale = divide(-nmax, largest)
    sumlx, suml2 = search.sums(iscale)
    scale = torch.where(suml2 != 0, sumlx / suml2, 0)
    best = scale * sumlx
    for numerator in float32_steps(nmax, 0.1, [i for i in range(-9, 10) if i]):
        try_iscale = divide(-numerator, largest)
        sumlx, suml2 = search.sums(try_iscale)
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        torch.where(better, sumlx / suml2, scale, out=scale)
        torch.where(better, scale * sumlx, best, out=best)
        torch.where(better, try_iscale, iscale, out=iscale)
    codes = _scaled_codes(x, iscale, nmax).add_(nmax) * alive
    return torch.where(alive, scale, 0), codes.to(torch.uint8)


class _ScaleSearch:
    """What the tries of make_qx_quants share: the products that stay the same, and room for those that do not.

    Attributes:
        parts: (x, w*x, w) of some rows each, float32 (rows, n_sub_blocks).
        products: float32 (rows, 2, n_sub_blocks), w*x*l and w*l*l of a part.
    """

    def __init__(self, x: Tensor, weights: Tensor, nmax: int) -> None:
        n_rows = _rows_per_part(x)
        self.nmax = nmax
        self.parts = list(zip(*(torch.split(tensor, n_rows) for tensor in (x, weights * x, weights)), strict=True))
        self.scaled = x.new_empty(n_rows, x.shape[1])
        self.products = x.new_empty(n_rows, 2, x.shape[1])
        self.rows = self.products.unbind(0)
        self.total = x.new_empty(2, x.shape[1])

    def sums(self, iscale: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of w*x*l and w*l*l for a try: float32 (n_sub_blocks,) each, valid until the next call."""
        self.total.zero_()
        for x, weighted, weights in self.parts:
            codes = _scaled_codes(x, iscale, self.nmax, self.scaled)
            torch.mul(weighted, codes, out=self.products[:, 0])
            torch.mul(weights, codes, out=self.products[:, 1]).mul_(codes)
            add_rows_(self.total, self.rows)
        sumlx, suml2 = self.total
        return sumlx, suml2


def _scaled_codes(x: Tensor, iscale: Tensor, nmax: int, out: Tensor | None = None) -> Tensor:
    """l of make_qx_quants, float32 of x's shape. |iscale * x| is below nmax + 1 there, so nothing wraps."""
    return round_codes_(torch.mul(x, iscale, out=out), -nmax, nmax - 1)


def make_q3_quants(x: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """The scale of x ~ scale * l, -nmax <= l < nmax, improved code by code; weights are x*x.

    Args:
        x: float32 (n, n_sub_blocks), finite.
    Returns:
        scale: float32 (n_sub_blocks,); codes: uint8 (n, n_sub_blocks), l + nmax, but 0 in a sub-block of zeros.
    """
    largest = largest_by_magnitude(x)
    alive = largest.abs() >= GROUP_MAX_EPS
    weights = x * x
    codes = _scaled_codes(x, divide(-nmax, torch.where(alive, largest, 1)), nmax)
    sumlx = sum_rows((weights * x * codes).unbind(0))
    suml2 = sum_rows((weights * codes * codes).unbind(0))
    _descend(_Descent(x, weights, codes, sumlx, suml2), -nmax, nmax - 1, unsigned=False)
    scale = torch.where(suml2 > 0, sumlx / suml2, 0)
    return torch.where(alive, scale, 0), (codes.add_(nmax) * alive).to(torch.uint8)


def make_qp_quants(x: Tensor, weights: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """The scale of x ~ scale * l, 0 <= l <= nmax, for scales and mins, which are hardly ever negative.

    Args:
        x: float32 (n, n_sub_blocks), finite.
        weights: float32 (n, n_sub_blocks), >= 0.
    Returns:
        scale: float32 (n_sub_blocks,); codes: uint8 (n, n_sub_blocks). A negative element gives what ggml stores of it:
            the low 8 bits, so codes above nmax.
    """
    top = torch.clamp(x.amax(0), min=0)
    alive = top >= GROUP_MAX_EPS
    top = torch.where(alive, top, 1)
    iscale = divide(nmax, top)
    codes = (nearest_int(x * iscale) & 0xFF).float()
    best = _scale_error(x, weights, divide(1, iscale), codes)
    for numerator in float32_steps(0, 0.1, [i for i in range(-4, 5) if i], add=nmax):
        try_iscale = divide(numerator, top)
        codes = nearest_int(x * try_iscale).clamp_(max=nmax).float()
        error = _scale_error(x, weights, divide(1, try_iscale), codes)
        better = error < best
        best = torch.where(better, error, best)
        iscale = torch.where(better, try_iscale, iscale)
    codes = nearest_int(x * iscale).clamp_(max=nmax).float()
    sumlx = sum_rows((weights * x * codes).unbind(0))
    suml2 = sum_rows((weights * codes * codes).unbind(0))
    codes = _low_octet(codes)
    _descend(_Descent(x, weights, codes, sumlx, suml2), -_HALF_MANTISSA, nmax, unsigned=True)
    scale = torch.where(suml2 > 0, sumlx / suml2, 0)
    return torch.where(alive, scale, 0), (codes * alive).to(torch.uint8)


def _scale_error(x: Tensor, weights: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Sum of w*diff*diff over the rows, diff = x - scale*l: float32 (n_sub_blocks,)."""
    diff = x - scale * codes
    return sum_rows((weights * diff * diff).unbind(0))


def _low_octet(codes: Tensor) -> Tensor:
    """Integers in float32 as C stores them in an uint8_t."""
    return codes - torch.floor(codes * (1 / 256)) * 256


@dataclass
class _Descent:
    """A state of make_q3_quants' and make_qp_quants' last loop, changed in place.

    Attributes:
        x, weights: float32 (n, n_sub_blocks).
        codes: l as stored, float32 (n, n_sub_blocks).
        sumlx, suml2: sums of w*x*l and w*l*l, float32 (n_sub_blocks,).
    """

    x: Tensor
    weights: Tensor
    codes: Tensor
    sumlx: Tensor
    suml2: Tensor

    def take(self, which: Tensor) -> _Descent:
        """A copy of some sub-blocks, given by their indices."""
        members = (self.x, self.weights, self.codes, self.sumlx, self.suml2)
        return _Descent(*(member.index_select(-1, which) for member in members))

    def put(self, which: Tensor, other: _Descent) -> None:
        """The inverse of take(), for what changes."""
        for mine, theirs in zip(
            (self.codes, self.sumlx, self.suml2), (other.codes, other.sumlx, other.suml2), strict=True
        ):
            mine.index_copy_(-1, which, theirs)


def _descend(state: _Descent, low: int, high: int, *, unsigned: bool, n_tries: int = N_DESCENTS) -> None:
    """Sweep up to n_tries times, each time only over sub-blocks in which the sweep before changed a code."""
    changed = _sweep(state, low, high, unsigned).nonzero().flatten()
    if n_tries == 1 or not len(changed):
        return
    rest = state.take(changed)
    _descend(rest, low, high, unsigned=unsigned, n_tries=n_tries - 1)
    state.put(changed, rest)


def _sweep(state: _Descent, low: int, high: int, unsigned: bool) -> Tensor:
    """Move one code after the other to its best value given the others, where the fit gains: bool (n_sub_blocks,)."""
    changed = torch.zeros_like(state.sumlx, dtype=torch.bool)
    for x, w, code in zip(state.x, state.weights, state.codes, strict=True):
        wx = w * x
        slx = state.sumlx - wx * code
        sl2 = state.suml2 - w * code * code
        new = nearest_codes_(x * sl2 / slx, low, high)
        better = (slx > 0) & (new != code)
        if unsigned:
            better &= sl2 > 0
        slx += wx * new
        sl2 += w * new * new
        if not unsigned:
            better &= sl2 > 0
        better &= slx * slx * state.suml2 > state.sumlx * state.sumlx * sl2
        torch.where(better, _low_octet(new) if unsigned else new, code, out=code)
        torch.where(better, slx, state.sumlx, out=state.sumlx)
        torch.where(better, sl2, state.suml2, out=state.suml2)
        changed |= better
    return changed


def make_qkx2_quants(
    x: Tensor, weights: Tensor, nmax: int, rmin: float, rdelta: float, nstep: int, *, use_mad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and min of x ~ scale * l - min, 0 <= l <= nmax, with the least weighted error among nstep + 2 tries.

    Args:
        x: float32 (n, n_sub_blocks), finite.
        weights: float32 (n, n_sub_blocks), >= 0.
        rmin, rdelta, nstep: try i maps the range to nmax + rmin + rdelta*i codes.
        use_mad: the error is the sum of w*|diff|, else of w*diff*diff.
    Returns:
        scale, min: float32 (n_sub_blocks,), min >= 0 (it may be -0); codes: uint8 (n, n_sub_blocks).
    """
    factors = float32_steps(rmin, rdelta, range(nstep + 1), add=nmax)
    return _make_line_quants(x, weights, nmax, factors, use_mad, nearest_codes_)


def make_qkx3_quants(
    x: Tensor, weights: Tensor, nmax: int, rmin: float, rdelta: float, nstep: int, *, use_mad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """make_qkx2_quants, but codes out of range are clamped before they can wrap around. Arguments as there."""
    factors = float32_steps(rmin, rdelta, range(nstep + 1), add=nmax)
    return _make_line_quants(x, weights, nmax, factors, use_mad, bounded_codes_)


def _make_line_quants(
    x: Tensor, weights: Tensor, nmax: int, factors: Sequence[float], use_mad: bool, rounding: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, min and codes: with the quick rounding first, with the given one where that may not be the same."""
    search = _LineSearch(x, weights, nmax, use_mad)
    search.start()
    if not search.run(factors, round_codes_):
        search.start()
        search.run(factors, rounding)
    return search.result(rounding)


class _LineSearch:
    """make_qkx2_quants and make_qkx3_quants: the state of a search and the room it needs.

    Attributes:
        alive: bool (n_sub_blocks,), sub-blocks that are not constant (a positive constant counts 0 as its smallest).
        scale, low, error: the best line so far and its error, float32 (n_sub_blocks,); low is ggml's min before its
            sign changes.
        code_iscale, code_low: what gave the best line's codes, l = round((x - code_low) * code_iscale).
        improved: bool (n_sub_blocks,), the codes are not those of start().
    """

    def __init__(self, x: Tensor, weights: Tensor, nmax: int, use_mad: bool) -> None:
        self.x, self.weights, self.nmax, self.use_mad = x, weights, nmax, use_mad
        self.smallest, largest = x[0], x[0]
        for row in x[1:]:  # not aminmax, which may give zeros of another sign
            self.smallest = torch.where(row < self.smallest, row, self.smallest)
            largest = torch.where(row > largest, row, largest)
        self.ends = torch.stack((self.smallest, largest))  # (2, n_sub_blocks)
        self.sum_w = weights[0].clone()
        self.sum_x = weights[0] * x[0]
        for w, row in zip(weights[1:], x[1:], strict=True):
            self.sum_w += w
            self.sum_x += w * row
        n_rows = _rows_per_part(x)
        self.all_codes = torch.empty_like(x)
        self.parts = list(zip(*(torch.split(tensor, n_rows) for tensor in (x, weights, self.all_codes)), strict=True))
        self.products = x.new_empty(n_rows, 3, x.shape[1])
        self.product_rows = self.products.unbind(0)
        self.diff = x.new_empty(n_rows, x.shape[1])
        self.diff_rows = self.diff.unbind(0)

    def start(self) -> None:
        """The line through the smallest element, or 0, and the largest."""
        self.low = torch.where(self.smallest > 0, 0, self.smallest)
        self.alive = self.ends[1] != self.low
        iscale = divide(self.nmax, torch.where(self.alive, self.ends[1] - self.low, 1))
        self.scale = divide(1, iscale)
        nearest_codes_(torch.sub(self.x, self.low, out=self.all_codes).mul_(iscale), 0, self.nmax)
        self.first_codes = self.all_codes.to(torch.uint8)
        self.error = self.line_error(self.scale, self.low)
        self.improved = torch.zeros_like(self.alive)
        self.code_iscale, self.code_low = iscale, self.low

    def run(self, factors: Sequence[float], rounding: Rounding) -> bool:
        """Try lines of ever more codes; False: some code was out of the range in which all roundings agree."""
        reach = torch.zeros_like(self.ends)
        for factor in factors:
            iscale = divide(factor, torch.where(self.alive, self.ends[1] - self.low, 1))
            torch.maximum(reach, torch.mul(self.ends - self.low, iscale).abs_(), out=reach)
            sum_l, sum_l2, sum_xl = self.sums(iscale, rounding)
            determinant = self.sum_w * sum_l2 - sum_l * sum_l
            scale = (self.sum_w * sum_xl - self.sum_x * sum_l) / determinant
            low = (sum_l2 * self.sum_x - sum_l * sum_xl) / determinant
            above = low > 0
            low = low.masked_fill_(above, 0)
            scale = torch.where(above, sum_xl / sum_l2, scale)
            error = self.line_error(scale, low)
            better = (determinant > 0) & (error < self.error)
            self.code_iscale = torch.where(better, iscale, self.code_iscale)
            self.code_low = torch.where(better, self.low, self.code_low)
            self.scale = torch.where(better, scale, self.scale)
            self.low = torch.where(better, low, self.low)
            self.error = torch.where(better, error, self.error)
            self.improved |= better
        return bool(((reach <= NEAREST_INT_LIMIT) | ~self.alive).all())

    def sums(self, iscale: Tensor, rounding: Rounding) -> Tensor:
        """Sums of w*l, w*l*l and w*l*x: float32 (3, n_sub_blocks)."""
        totals = torch.zeros_like(self.products[0])
        for x, weights, codes in self.parts:
            rounding(torch.sub(x, self.low, out=codes).mul_(iscale), 0, self.nmax)
            weighted = torch.mul(weights, codes, out=self.products[:, 0])
            torch.mul(weighted, codes, out=self.products[:, 1])
            torch.mul(weighted, x, out=self.products[:, 2])
            add_rows_(totals, self.product_rows)
        return totals

    def line_error(self, scale: Tensor, low: Tensor) -> Tensor:
        """Weighted error of the codes that the last call of sums() left: float32 (n_sub_blocks,)."""
        total = torch.zeros_like(scale)
        for x, weights, codes in self.parts:
            diff = torch.mul(codes, scale, out=self.diff).add_(low).sub_(x)
            diff = diff.abs_() if self.use_mad else diff.mul_(diff)
            diff.mul_(weights)
            add_rows_(total, self.diff_rows)
        return total

    def result(self, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, min (its sign changed) and uint8 codes of the best line."""
        codes = rounding((self.x - self.code_low).mul_(self.code_iscale), 0, self.nmax).to(torch.uint8)
        codes = torch.where(self.improved, codes, self.first_codes) * self.alive
        return torch.where(self.alive, self.scale, 0), -self.low, codes
