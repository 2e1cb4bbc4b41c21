# SPDX-License-Identifier: Apache-2.0
"""Takes one variant of each item such that the sum of errors is least and the sum of sizes fits a budget.

A multiple-choice knapsack. Variants that no optimum can hold are dropped by a Lagrangian bound, what is left is solved
by dynamic programming over bytes in units of the greatest common divisor of the size differences. That is exact; where
it would cost too much time or memory units are larger, sizes are rounded up, and a fill pass spends what that left.
Source: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11 (greedy, bounds, reduction, recursion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import GGUFError

MAX_STEPS = 2_000_000_000  # additions of one dynamic programme: units times variants
MAX_TABLE_BYTES = 500_000_000  # of its table of choices
GOOD_ENOUGH = 1.005  # times the lower bound; a coarse solution above it is looked for again, in finer units
MAX_REFINEMENTS = 3
FINER = 4
ROUNDING = 1e-12  # relative; sums in another order differ by less

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Item:
    """One thing of which exactly one variant is taken; sizes rise strictly, errors fall strictly.

    Attributes:
        sizes: int64 (n_variants,), bytes.
        errors: float64 (n_variants,).
        index: int64 (n_variants,), what the caller knows the variants by.
    """

    sizes: Integers
    errors: Floats
    index: Integers

    @property
    def extra(self) -> Integers:
        """int64 (n_variants,), bytes above the smallest variant."""
        return np.asarray(self.sizes - self.sizes[0], np.int64)


@dataclass(frozen=True)
class Solution:
    """What was taken.

    Attributes:
        picks: the index of the variant of each item.
        size: bytes of all of them.
        error: sum of their errors.
        bound: no choice of that size or less has a smaller error than this.
    """

    picks: tuple[int, ...]
    size: int
    error: float
    bound: float


def make_item(sizes: Sequence[int], errors: Sequence[float]) -> Item:
    """An item without the variants that are neither smaller nor better than all others."""
    size, error = np.asarray(sizes, np.int64), np.asarray(errors, np.float64)
    order = np.lexsort((error, size))
    least_before = np.concatenate(([np.inf], np.minimum.accumulate(error[order])[:-1]))
    kept = order[error[order] < least_before].astype(np.int64)
    return Item(size[kept], error[kept], kept)


def smallest_size(items: Sequence[Item]) -> int:
    """Bytes below which no budget can be met."""
    return sum(int(item.sizes[0]) for item in items)


def solve(items: Sequence[Item], budget: int, *, max_steps: int = MAX_STEPS) -> Solution:
    """The choice of least error within a budget of bytes.

    Args:
        items: from make_item.
        max_steps: limits the work; the less, the farther from the optimum, as the solution's bound tells.
    Raises:
        GGUFError: even the smallest variants do not fit.
    """
    smallest = smallest_size(items)
    if smallest > budget:
        raise GGUFError(f"{budget:,} bytes are too few, the smallest choice has {smallest:,}", hint="Allow more.")
    budget = min(budget, sum(int(item.sizes[-1]) for item in items))  # more is of no use, and may not fit int64
    places, price = _greedy(items, budget)
    best = _fill(items, places, budget)
    bound = _lower_bound(items, budget, price)
    for refinement in range(MAX_REFINEMENTS):
        core = _core(items, budget, price, _error(items, best))
        unit = _unit(core, _room(core, budget), max_steps * FINER**refinement, MAX_TABLE_BYTES)
        found = _fill(items, _dynamic(core, budget, unit), budget)
        best = min(best, found, key=lambda places: _error(items, places))
        if _is_exact(core, unit):
            bound = _error(items, best)
        if _error(items, best) <= GOOD_ENOUGH * bound:
            break
    return _solution(items, best, bound)


def solve_error(items: Sequence[Item], max_error: float, *, max_steps: int = MAX_STEPS) -> Solution:
    """The smallest choice whose sum of errors is not above max_error.

    Raises:
        GGUFError: even the best variants have a larger error.
    """
    best = [len(item.sizes) - 1 for item in items]
    least = _error(items, best)
    if least > max_error:
        raise GGUFError(f"an error of {max_error:.3g} cannot be reached, the least is {least:.3g}", hint="Allow more.")
    low, high = smallest_size(items), _size(items, best)
    found = _solution(items, best, 0.0)
    step = max(1, _common_divisor(items))
    while low <= high:  # bytes; the relaxed problem says quickly how much too little is
        budget = low + (high - low) // step // 2 * step
        if _lower_bound(items, budget, _greedy(items, budget)[1]) > max_error * (1 + ROUNDING):
            low = budget + step
            continue
        tried = solve(items, budget, max_steps=max_steps)
        if tried.error <= max_error:
            found, high = tried, tried.size - step
        else:
            low = budget + step
    return found


def frontier(items: Sequence[Item], *, max_steps: int = MAX_STEPS) -> list[tuple[int, float]]:
    """For every size that lowers the least error: (bytes, error), sizes rising, errors falling.

    Exact where max_steps allow for units as fine as the size differences; else no point is better than what there is,
    and each is as much too large as rounding up to its units makes it.
    """
    room = _room(items, None)
    unit = _unit(items, room, max_steps, None)
    errors = _least_errors(items, unit, -(-room // unit), None)
    drops = np.concatenate(([True], errors[1:] < errors[:-1]))
    start, best = smallest_size(items), [len(item.sizes) - 1 for item in items]
    points = [(start + int(place) * unit, float(errors[place])) for place in np.flatnonzero(drops)]
    if _error(items, best) < points[-1][1] * (1 - ROUNDING):  # out of reach only because sizes were rounded up
        points = [point for point in points if point[0] < start + room] + [(start + room, _error(items, best))]
    return points


def _size(items: Sequence[Item], places: Sequence[int]) -> int:
    return sum(int(item.sizes[place]) for item, place in zip(items, places, strict=True))


def _error(items: Sequence[Item], places: Sequence[int]) -> float:
    return math.fsum(float(item.errors[place]) for item, place in zip(items, places, strict=True))


def _solution(items: Sequence[Item], places: Sequence[int], bound: float) -> Solution:
    picks = tuple(int(item.index[place]) for item, place in zip(items, places, strict=True))
    return Solution(picks, _size(items, places), _error(items, places), bound)


# -- bounds --


def _hull(item: Item) -> list[int]:
    """Places of the variants on the lower convex hull of error over size."""
    places: list[int] = []
    for place in range(len(item.sizes)):
        while len(places) > 1 and _gain(item, places[-2], places[-1]) <= _gain(item, places[-1], place):
            places.pop()
        places.append(place)
    return places


def _gain(item: Item, low: int, high: int) -> float:
    """Error that a byte takes away on the way from one variant to a larger one."""
    return float((item.errors[low] - item.errors[high]) / (item.sizes[high] - item.sizes[low]))


def _greedy(items: Sequence[Item], budget: int) -> tuple[list[int], float]:
    """Places when the steps along the hulls are taken in the order of their gain, and the gain of the first too many.

    That gain is the price of a byte for which the Lagrangian bound is highest; 0 where everything fits.
    """
    steps = []
    for number, item in enumerate(items):
        hull = _hull(item)
        steps += [(_gain(item, low, high), number, low, high) for low, high in pairwise(hull)]
    steps.sort(key=lambda step: -step[0])
    places, left, price = [0] * len(items), budget - smallest_size(items), 0.0
    for gain, number, low, high in steps:
        n_bytes = int(items[number].sizes[high] - items[number].sizes[low])
        if places[number] == low and n_bytes <= left:
            places[number], left = high, left - n_bytes
        else:
            price = max(price, gain)
    return places, price


def _lower_bound(items: Sequence[Item], budget: int, price: float) -> float:
    """The least error if bytes could be bought and sold at a price; never above the true one."""
    start = smallest_size(items)
    total = math.fsum(float((item.errors + price * item.extra).min()) for item in items)
    return total - price * (budget - start) - ROUNDING * total


def _core(items: Sequence[Item], budget: int, price: float, known: float) -> list[Item]:
    """The items without the variants with which no choice is better than a known one; index is the place in `items`."""
    room = known - _lower_bound(items, budget, price) + ROUNDING * known
    core = []
    for item in items:
        costs = item.errors + price * item.extra
        kept = np.flatnonzero(costs <= costs.min() + room).astype(np.int64)
        core.append(Item(item.sizes[kept], item.errors[kept], kept))
    return core


# -- dynamic programming --


def _room(items: Sequence[Item], budget: int | None) -> int:
    """Bytes to spend beyond the smallest variants; None: enough for the largest."""
    most = sum(int(item.extra[-1]) for item in items)
    return most if budget is None else min(most, budget - smallest_size(items))


def _common_divisor(items: Sequence[Item]) -> int:
    """Of all differences of size; 0 if there are none."""
    return math.gcd(*(int(np.gcd.reduce(item.extra)) for item in items))


def _is_exact(items: Sequence[Item], unit: int) -> bool:
    return all(not (item.extra % unit).any() for item in items)


def _unit(items: Sequence[Item], room: int, max_steps: int, max_bytes: int | None) -> int:
    """Bytes of a unit: the common divisor if that can be afforded, else what rounds least and can.

    Args:
        max_bytes: of the table of choices; None: there is none.
    """
    n_items = sum(len(item.sizes) > 1 for item in items)
    n_variants = sum(len(item.sizes) for item in items if len(item.sizes) > 1)
    n_units = max(1, max_steps // max(1, n_variants))
    if max_bytes is not None:
        n_units = min(n_units, max(1, max_bytes // (2 * max(1, n_items))))
    least = max(1, -(-room // n_units))
    exact = _common_divisor(items)
    if exact >= least or not exact:
        return max(1, exact)
    divisors = {int(np.gcd.reduce(item.extra)) for item in items}
    return min({least, *(d for d in divisors if d >= least)}, key=lambda unit: _rounding(items, unit))


def _rounding(items: Sequence[Item], unit: int) -> float:
    """Bytes that rounding up to units makes of nothing, for variants at random."""
    return sum(float((-item.extra % unit).mean()) for item in items)


def _dynamic(items: Sequence[Item], budget: int, unit: int) -> list[int]:
    """The best choice when sizes are rounded up to units: for each item the `index` of a variant."""
    capacity = _room(items, budget) // unit
    open_items = [number for number, item in enumerate(items) if len(item.sizes) > 1]
    choices = np.zeros((len(open_items), capacity + 1), np.int16)
    _least_errors([items[number] for number in open_items], unit, capacity, choices)
    places, left = [int(item.index[0]) for item in items], capacity
    for row in range(len(open_items) - 1, -1, -1):
        item, taken = items[open_items[row]], int(choices[row, left])
        places[open_items[row]] = int(item.index[taken])
        left -= int(_in_units(item, unit)[taken])
    return places


def _in_units(item: Item, unit: int) -> Integers:
    """int64 (n_variants,), units above the smallest variant, rounded up."""
    return -(-item.extra // unit)


def _least_errors(items: Sequence[Item], unit: int, capacity: int, choices: NDArray[np.int16] | None) -> Floats:
    """The least sum of errors for each number of units above the smallest sizes.

    Args:
        choices: int16 (n_items, capacity + 1), filled with the variant of each item that gives it; None: not wanted.
    Returns:
        float64 (capacity + 1,).
    """
    least, reach = np.zeros(capacity + 1), 0  # beyond `reach` units nothing changes
    for number, item in enumerate(items):
        units = _in_units(item, unit)
        reach = min(capacity, reach + int(units[-1]))
        before = least[: reach + 1].copy()
        now = least[: reach + 1]
        now += item.errors[0]
        for variant in range(1, int(np.searchsorted(units, reach, "right"))):
            start = int(units[variant])
            tried = before[: reach + 1 - start] + item.errors[variant]
            is_less = tried < now[start:]
            np.copyto(now[start:], tried, where=is_less)
            if choices is not None:
                np.copyto(choices[number, start : reach + 1], variant, where=is_less)
        least[reach + 1 :] = now[-1]
        if choices is not None:
            choices[number, reach + 1 :] = choices[number, reach]
    return least


def _fill(items: Sequence[Item], places: Sequence[int], budget: int) -> list[int]:
    """A choice with what is left of the budget spent: whatever takes away most error per byte, until nothing fits."""
    filled, left = list(places), budget - _size(items, places)
    steps = [_best_step(item, place, left) for item, place in zip(items, filled, strict=True)]
    while True:
        number = max(range(len(steps)), key=lambda n: steps[n][0], default=0)
        if not steps or not steps[number][0]:
            return filled
        place = steps[number][1]
        n_bytes = int(items[number].sizes[place] - items[number].sizes[filled[number]])
        if n_bytes <= left:
            filled[number], left = place, left - n_bytes
        steps[number] = _best_step(items[number], filled[number], left)


def _best_step(item: Item, place: int, left: int) -> tuple[float, int]:
    """(error taken away per byte, place) of the best larger variant within so many bytes more; (0, place) if none."""
    end = int(np.searchsorted(item.sizes, item.sizes[place] + left, "right"))
    if end <= place + 1:
        return 0.0, place
    gains = (item.errors[place] - item.errors[place + 1 : end]) / (item.sizes[place + 1 : end] - item.sizes[place])
    step = int(gains.argmax())
    return float(gains[step]), place + 1 + step
