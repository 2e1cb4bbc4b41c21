# SPDX-License-Identifier: Apache-2.0
"""The knapsack against brute force on small cases, against itself with little work allowed on large ones."""

import itertools

import numpy as np
import pytest
from gguf_kit.errors import GGUFError
from gguf_kit.quantize import knapsack
from gguf_kit.quantize.knapsack import frontier, make_item, smallest_size, solve, solve_error
from hypothesis import given, settings
from hypothesis import strategies as st

NEAR = 1.02  # times the optimum: what is promised at worst
EXACT = 1 + 1e-9
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 80), (7, 3), (96, 16)]


def all_choices(items):
    """(size, error) of every choice there is."""
    for picks in itertools.product(*(zip(item.sizes, item.errors, strict=True) for item in items)):
        yield sum(int(size) for size, _ in picks), sum(float(error) for _, error in picks)


def model(n_items, seed, unit=288):
    """Items such as a model's tensors: types of 2 to 16 bits of matrices of a few shapes, in three weightings."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(n_items):
        rows, columns = SHAPES[number % len(SHAPES)]
        scale = np.exp(rng.normal(0, 1.5)) * rows * columns
        sizes, errors = [rows * columns * unit * 2], [0.0]
        for bits in (2.0625, 2.3125, 2.5625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5):
            for _ in range(3):
                n_bytes = int(rows * columns * unit * bits / 8)
                sizes.append(n_bytes + -n_bytes % 32)
                errors.append(float(scale * 4.0**-bits * np.exp(rng.normal(0, 0.2))))
        items.append(make_item(sizes, errors))
    return items


def budgets(items, n):
    low, high = smallest_size(items), sum(int(item.sizes[-1]) for item in items)
    return [low + (high - low) * i // n for i in range(n + 1)]


def test_variants_that_nothing_speaks_for_are_left_out():
    item = make_item([40, 10, 20, 20, 30, 10], [1.0, 9.0, 5.0, 4.0, 4.0, 8.0])
    assert item.sizes.tolist() == [10, 20, 40]
    assert item.errors.tolist() == [8.0, 4.0, 1.0]
    assert item.index.tolist() == [5, 3, 0]


VARIANT = st.tuples(st.integers(1, 60), st.one_of(st.just(0.0), st.floats(1e-6, 100)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(VARIANT, min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 260), st.data())
def test_no_choice_of_a_small_case_is_better(variants, budget, data):
    scale = data.draw(st.sampled_from([1, 32, 1536]))
    items = [make_item([scale * size for size, _ in item], [error for _, error in item]) for item in variants]
    fitting = [error for size, error in all_choices(items) if size <= budget * scale]
    if not fitting:
        with pytest.raises(GGUFError, match=f"the smallest choice has {smallest_size(items):,}"):
            solve(items, budget * scale)
        return
    found = solve(items, budget * scale)
    assert found.size <= budget * scale
    assert found.error <= min(fitting) * EXACT
    assert found.bound <= min(fitting) * EXACT


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(VARIANT, min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0, 120))
def test_no_smaller_choice_of_a_small_case_reaches_an_error(variants, max_error):
    items = [make_item([16 * size for size, _ in item], [error for _, error in item]) for item in variants]
    reaching = [size for size, error in all_choices(items) if error <= max_error]
    if not reaching:
        with pytest.raises(GGUFError, match="cannot be reached, the least is"):
            solve_error(items, max_error)
        return
    found = solve_error(items, max_error)
    assert found.error <= max_error
    assert found.size == min(reaching)


def test_picks_are_the_callers_numbers():
    sizes, errors = [[30, 10, 20], [8, 4]], [[0.0, 9.0, 1.0], [0.5, 3.0]]
    found = solve([make_item(s, e) for s, e in zip(sizes, errors, strict=True)], 28)
    assert found.picks == (2, 0)
    assert (found.size, found.error) == (28, 1.5)


def test_the_last_byte_counts_where_the_best_ratio_is_not_the_best_choice():
    items = [make_item([32, 32 * (1 + size)], [drop, 0.0]) for size, drop in ((6, 7.0), (5, 5.5), (5, 5.5))]
    assert solve(items, 32 * 13).picks == (0, 1, 1)
    assert solve(items, 32 * 13 - 1).picks == (1, 0, 0)


@pytest.mark.parametrize("n_items", [3, 5])
def test_a_case_of_real_types_is_solved_as_by_brute_force(n_items):
    items = [make_item(i.sizes[::3], i.errors[::3]) for i in model(n_items, seed=1)]
    choices = sorted(all_choices(items))
    for budget in budgets(items, 7):
        best = min(error for size, error in choices if size <= budget)
        assert solve(items, budget).error <= best * EXACT


@pytest.mark.parametrize("seed", range(3))
def test_little_work_costs_little_and_is_never_over_the_budget(seed):
    items = model(300, seed)
    for budget in budgets(items, 9):
        exact = solve(items, budget)
        assert exact.bound <= exact.error <= exact.bound * EXACT  # it says itself that it is the optimum
        coarse = solve(items, budget, max_steps=2000)
        assert coarse.size <= budget
        assert coarse.bound <= exact.error * EXACT
        assert exact.error <= coarse.error * EXACT
        assert coarse.error <= exact.error * NEAR + 1e-12


def test_without_a_bound_that_drops_variants_the_same_is_found(monkeypatch):
    items = model(40, seed=5)
    expected = [solve(items, budget).error for budget in budgets(items, 3)]
    everything = [knapsack.Item(i.sizes, i.errors, np.arange(len(i.sizes))) for i in items]
    monkeypatch.setattr(knapsack, "_core", lambda *_: everything)
    for budget, error in zip(budgets(items, 3), expected, strict=True):
        assert solve(items, budget).error == pytest.approx(error, rel=1e-9, abs=1e-12)
        coarse = solve(items, budget, max_steps=2_000_000)
        assert coarse.size <= budget
        assert coarse.error <= error * NEAR + 1e-12


def test_what_is_left_of_a_budget_is_spent():
    items = model(300, seed=7)
    for budget in budgets(items, 9)[1:]:
        found = solve(items, budget, max_steps=2000)
        for item, pick in zip(items, found.picks, strict=True):
            place = item.index.tolist().index(pick)
            larger = item.sizes[place + 1 :] - item.sizes[place]
            assert not (larger <= budget - found.size).any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(VARIANT, min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_frontier_of_a_small_case_is_exactly_the_choices_that_nothing_beats(variants):
    items = [make_item([32 * size for size, _ in item], [error for _, error in item]) for item in variants]
    expected = []
    for size, error in sorted(all_choices(items)):
        if not expected or error < expected[-1][1] * (1 - 1e-9):
            if expected and expected[-1][0] == size:
                expected.pop()
            expected.append((size, error))
    found = frontier(items)
    assert [size for size, _ in found] == sorted({size for size, _ in found})
    for size, error in expected:
        reached = [e for s, e in found if s <= size]
        assert min(reached) == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_the_frontier_of_a_large_case_is_near_the_optimum_at_every_size():
    items = model(120, seed=9)
    curve = frontier(items, max_steps=200_000_000)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    for budget in budgets(items, 12)[1:]:
        reached = [error for size, error in curve if size <= budget][-1]
        best = solve(items, budget).error
        assert best * (1 - 1e-9) <= reached <= best * NEAR + 1e-9


def test_the_smallest_size_for_an_error_is_found_in_a_large_case():
    items = model(100, seed=11)
    for budget in budgets(items, 4)[1:-1]:
        wanted = solve(items, budget)
        found = solve_error(items, wanted.error)
        assert found.error <= wanted.error
        assert found.size <= wanted.size
        with_less = solve(items, found.size - 1)
        assert with_less.error > wanted.error


def test_a_budget_without_an_end_takes_the_best_of_all():
    items = model(20, seed=13)
    assert solve(items, 10**15).picks == tuple(int(item.index[-1]) for item in items)
    assert solve([], 0) == knapsack.Solution((), 0, 0.0, 0.0)
