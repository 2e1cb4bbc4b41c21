# SPDX-License-Identifier: Apache-2.0
"""Choosing types for the tiny Flux by costs that are made up: sizes of files, what is kept, goals, comparisons."""

import functools
import math
import re
from dataclasses import replace

import make_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import DEFAULT_ALIGNMENT
from gguf_kit.layouts import bpw, n_bytes
from gguf_kit.models.archs import Category
from gguf_kit.quantize.containers import StoredTensor
from gguf_kit.quantize.convert import Conversion
from gguf_kit.quantize.encode import FLOAT_DTYPES
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.recipe_files import parse_recipe
from gguf_kit.quantize.recipes import RECIPES
from gguf_kit.quantize.sensitivity import (
    DEFAULT_QTYPES,
    IGNORE_IMPORTANCE,
    Candidate,
    TensorCosts,
    candidate_types,
    candidate_weightings,
)
from gguf_kit.quantize.sources import Source, open_source
from gguf_kit.quantize.tune import Goal, KeepPolicy, Task, frontier, solve, solve_error, tune
from gguf_kit.quantize.writer import file_size, make_header

POLICIES = list(KeepPolicy)
SLACK = 0.995  # of the request that a file has at least, where there is something left to choose


@pytest.fixture(scope="module")
def source():
    return open_source(make_files.MODEL)


@pytest.fixture(scope="module")
def imatrix(source, tmp_path_factory):
    entries = {
        name: Entry(torch.ones(1, t.shape[1]), torch.ones(1), gain=0.5, gain_calls=1.0)
        for name, t in source.tensors.items()
        if len(t.shape) == 2
    }
    return Imatrix(tmp_path_factory.mktemp("imatrix") / "im.gguf", entries)


def make_costs(tensor, seed):
    """Errors that fall with the bits as real ones do, with some luck for each weighting."""
    rng = np.random.default_rng(seed)
    scale = float(np.exp(rng.normal(0, 1)))
    own = QType.BF16 if tensor.qtype not in FLOAT_DTYPES else tensor.qtype
    ways = [(own, Weighting.FULL)]
    ways += [(q, w) for q in candidate_types(tensor, DEFAULT_QTYPES) for w in candidate_weightings(q, True)]
    found = []
    for qtype, weighting in ways:
        size = n_bytes(qtype, tensor.stored_shape)
        error = 0.0 if qtype is own else scale * 4 ** -bpw(qtype) * math.exp(rng.normal(0, 0.2))
        found.append(Candidate(qtype, weighting, size + -size % DEFAULT_ALIGNMENT, error, error / 10))
    return TensorCosts(tensor.name, tensor.category, 0, tensor.shape, 0.5, 1.0, tuple(found))


def costs_of(task):
    return [make_costs(tensor, seed) for seed, tensor in enumerate(task.free)]


@pytest.fixture(scope="module")
def tuned(source, imatrix):
    """(policy, goal) -> what was chosen for the tiny Flux."""
    tasks = {policy: Task(source, "tiny", imatrix, policy) for policy in POLICIES}
    costs = {policy: costs_of(task) for policy, task in tasks.items()}
    return functools.cache(lambda policy, goal: tune(tasks[policy], costs[policy], goal))


def of_size(n):
    return Goal(max_bytes=n, text=f"{n}B")


def real_size(tuned):
    """Size of the file that convert.py makes of the recipe's text, by the writer's own arithmetic."""
    recipe = parse_recipe(tuned.recipe())
    task = tuned.task
    plan = make_plan(task.source, Choices(exact=recipe.types, weightings=recipe.weightings, has_imatrix=True))
    return file_size(plan, Conversion(task.source, plan, task.name, task.imatrix).header)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.value)
@pytest.mark.parametrize("size", range(3_200_000, 17_500_000, 1_130_001))
def test_the_file_is_never_above_the_request_and_hardly_below(tuned, policy, size):
    found = tuned(policy, of_size(size))
    assert real_size(found) == found.file_bytes
    assert SLACK * size <= found.file_bytes <= size


@pytest.mark.parametrize("size", [17_890_013, 17_950_000])
def test_just_below_everything_nothing_that_would_fit_is_left(tuned, size):
    found = tuned(KeepPolicy.FREE, of_size(size))
    for tensor in costs_of(found.task):
        pick = found.choice.picks[tensor.name]
        larger = [c.n_bytes - pick.n_bytes for c in tensor.candidates if c.n_bytes > pick.n_bytes]
        assert not larger or min(larger) > size - found.file_bytes


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.value)
def test_a_request_above_everything_takes_everything_as_it_is(tuned, source, policy):
    found = tuned(policy, of_size(10**9))
    assert {t.qtype for t in found.plan.tensors} == {QType.BF16, QType.F32}
    assert found.error == 0
    assert found.file_bytes < 1.01 * make_files.MODEL.stat().st_size


def test_kept_layers_are_those_of_the_fixed_recipes(tuned, source):
    found = tuned(KeepPolicy.KEPT, of_size(4_500_000))
    kept = {t.name: t.qtype for t in make_plan(source, Choices("Q4_K_S")).tensors if t.qtype in FLOAT_DTYPES}
    types = {t.name: t.qtype for t in found.plan.tensors}
    assert {name: types[name] for name in kept} == kept
    assert {name for name, qtype in types.items() if qtype in FLOAT_DTYPES} == set(kept)


def test_free_layers_are_chosen_too_and_vectors_are_not(tuned):
    found = tuned(KeepPolicy.FREE, of_size(3_200_000))
    types = {t.name: t.qtype for t in found.plan.tensors}
    assert types["txt_in.weight"] not in FLOAT_DTYPES
    assert types["final_layer.linear.weight"] not in FLOAT_DTYPES
    assert all(t.qtype is QType.F32 for t in found.plan.tensors if len(t.shape) == 1)
    kept = tuned(KeepPolicy.KEPT, of_size(3_200_000))
    assert found.choice.error < kept.choice.error


def test_more_room_is_never_worse(tuned):
    errors = [tuned(KeepPolicy.KEPT, of_size(n)).error for n in range(3_200_000, 12_000_000, 800_000)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.value)
def test_an_impossible_size_names_the_smallest_possible_one(tuned, policy):
    with pytest.raises(GGUFError, match=r"as small as 1000000B, the smallest has ([\d,]+) bytes. Ask for") as error:
        tuned(policy, of_size(1_000_000))
    smallest = int(re.search(r"has ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    assert ("--keep-policy free" in str(error.value)) is (policy is KeepPolicy.KEPT)
    assert tuned(policy, of_size(smallest)).file_bytes <= smallest
    with pytest.raises(GGUFError):
        tuned(policy, of_size(smallest - 1))


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.25, 6.0, 9.0])
def test_bits_per_weight_are_met_and_not_exceeded(tuned, bits):
    found = tuned(KeepPolicy.FREE, Goal(bits_per_weight=bits, text="x"))
    assert SLACK * bits <= found.plan.bpw <= bits


def test_impossible_bits_per_weight_name_the_least(tuned):
    with pytest.raises(GGUFError, match=r"the smallest has ([\d.]+) bits per weight") as error:
        tuned(KeepPolicy.FREE, Goal(bits_per_weight=1.0, text="1bpw"))
    least = float(re.search(r"has ([\d.]+) bits", str(error.value))[1])
    assert tuned(KeepPolicy.FREE, Goal(bits_per_weight=least, text="x")).plan.bpw == pytest.approx(least, abs=0.002)


def test_an_error_is_reached_with_the_smallest_file(tuned):
    by_size = tuned(KeepPolicy.KEPT, of_size(5_000_000))
    found = tuned(KeepPolicy.KEPT, Goal(max_error=by_size.error, text="x"))
    assert found.error <= by_size.error * (1 + 1e-9)
    assert found.file_bytes <= by_size.file_bytes
    assert tuned(KeepPolicy.KEPT, of_size(found.file_bytes - 32)).error > by_size.error
    tighter = tuned(KeepPolicy.KEPT, Goal(max_error=by_size.error / 2, text="x"))
    assert tighter.file_bytes > found.file_bytes


def test_the_choice_has_every_tensor_once_and_its_sums(source, imatrix):
    task = Task(source, "tiny", imatrix)
    costs = costs_of(task)
    budget = sum(c.candidates[0].n_bytes for c in costs) // 4
    choice = solve(costs, budget)
    assert [*choice.picks] == [c.name for c in costs]
    assert choice.n_bytes == sum(pick.n_bytes for pick in choice.picks.values()) <= budget
    assert choice.error == pytest.approx(sum(c.gain * choice.picks[c.name].error for c in costs))
    assert choice.bound <= choice.error * (1 + 1e-9)
    assert solve_error(costs, math.sqrt(choice.error) * 1.000001).n_bytes <= choice.n_bytes
    curve = frontier(costs)
    at = [error for size, error in curve if size <= budget][-1]
    assert choice.error * (1 - 1e-9) <= at <= 1.02 * choice.error


def test_a_gain_of_nothing_still_prefers_the_smaller_error(source, imatrix):
    costs = [replace(c, gain=0.0) for c in costs_of(Task(source, "tiny", imatrix))]
    choice = solve(costs, 10**12)
    assert choice.error == 0
    assert all(choice.picks[c.name].error == 0 for c in costs)


def test_weightings_are_in_the_recipe_where_the_matrix_has_the_tensor(source, imatrix):
    name = "double_blocks.0.img_attn.qkv.weight"
    known = Imatrix(imatrix.path, {n: e for n, e in imatrix.entries.items() if n != name})
    picks = {}
    for matrix in (imatrix, known, None):
        task = Task(source, "tiny", matrix)
        costs = [
            replace(c, candidates=tuple(k for k in c.candidates if k.weighting is Weighting.NONE))
            for c in costs_of(task)
        ]
        found = tune(task, costs, of_size(5_000_000))
        picks[matrix and len(matrix.entries)] = parse_recipe(found.recipe()).weightings
    chosen = {t.name for t in Task(source, "tiny").free}
    assert picks[len(imatrix.entries)] == dict.fromkeys(chosen, Weighting.NONE)
    assert set(picks[len(known.entries)]) == chosen - {name}
    assert picks[None] == {}


def fixed_by_hand(source, costs, type_name):
    """Predicted error of a recipe without importance matrix."""
    types = {t.name: t.qtype for t in make_plan(source, Choices(type_name)).tensors}
    total = 0.0
    for tensor in costs:
        (error,) = [
            c.error
            for c in tensor.candidates
            if c.qtype is types[tensor.name] and (c.weighting is Weighting.NONE or c.qtype in IGNORE_IMPORTANCE)
        ]
        total += tensor.gain * error
    return math.sqrt(total)


def test_the_comparison_is_the_largest_fixed_recipe_that_fits(source, imatrix):
    task = Task(source, "tiny", imatrix)
    costs = costs_of(task)
    sizes = {}
    for type_name in (name for name, recipe in RECIPES.items() if not recipe.needs_imatrix):
        plan = make_plan(source, Choices(type_name))
        sizes[type_name] = file_size(plan, make_header(plan, "tiny", {}))
    for type_name in ("Q2_K", "Q3_K_S", "Q4_K_S"):
        found = tune(task, costs, of_size(sizes[type_name]))
        assert found.fixed.file_bytes == sizes[found.fixed.type_name] == sizes[type_name]
        by_hand = fixed_by_hand(source, costs, found.fixed.type_name)
        assert by_hand <= fixed_by_hand(source, costs, type_name)  # of equally large ones the better
        assert math.sqrt(found.fixed.error) == pytest.approx(by_hand)
        assert found.error < by_hand
        assert found.gained == pytest.approx(1 - found.error / by_hand)
        just_below = tune(task, costs, of_size(sizes[type_name] - 1)).fixed
        assert just_below is None or just_below.file_bytes < sizes[type_name]
    assert tune(task, costs, of_size(sizes["Q2_K"] - 1)).fixed is None


def test_the_recipe_and_the_json_say_what_was_predicted(tuned):
    found = tuned(KeepPolicy.KEPT, of_size(5_000_000))
    head = [line for line in found.recipe().splitlines() if line.startswith("# ")]
    text = "\n".join(head)
    for part in (
        "5000000B",
        f"{found.file_bytes:,} bytes",
        "im.gguf",
        f"{found.error:.4f}",
        "Q3_K_S without",
        "% less",
    ):
        assert part in text, part
    assert "gains measured for 32 of 32 tensors" in text
    data = found.as_json()
    assert data["file_bytes"] == found.file_bytes
    assert data["predicted_error"] == pytest.approx(found.error)
    assert data["predicted_error_bound"] <= data["predicted_error"] * (1 + 1e-9)
    assert data["fixed"]["type"] == "Q3_K_S"
    assert {row["name"]: row["qtype"] for row in data["tensors"]} == {t.name: t.qtype.name for t in found.plan.tensors}
    assert {row["weighting"] for row in data["tensors"]} <= {"none", "root", "full"}
    deviation = math.sqrt(sum((0.5 * pick.std_error) ** 2 for pick in found.choice.picks.values()))
    assert data["predicted_error_std"] == pytest.approx(deviation / (2 * found.error))


def test_without_measured_gains_it_says_so(source, imatrix):
    entries = {name: replace(entry, gain=None, gain_calls=0.0) for name, entry in imatrix.entries.items()}
    task = Task(source, "tiny", Imatrix(imatrix.path, entries))
    assert "no gains were measured" in tune(task, costs_of(task), of_size(5_000_000)).recipe()


def test_what_the_user_has_decided_stays(source, imatrix):
    name = "double_blocks.0.img_attn.qkv.weight"
    choices = Choices(
        "Q2_K", "", ((re.compile("txt_in"), QType.Q8_0),), {name: QType.Q5_0}, True, {name: Weighting.ROOT}
    )
    task = Task(source, "tiny", imatrix, KeepPolicy.FREE, choices)
    assert not {name, "txt_in.weight"} & {t.name for t in task.free}
    planned = {t.name: t for t in tune(task, costs_of(task), of_size(5_000_000)).plan.tensors}
    assert (planned[name].qtype, planned[name].weighting) == (QType.Q5_0, Weighting.ROOT)
    assert planned["txt_in.weight"].qtype is QType.Q8_0


def test_the_file_type_is_that_of_most_weights(tuned):
    assert tuned(KeepPolicy.KEPT, of_size(10**9)).plan.file_type.name == "MOSTLY_BF16"
    assert tuned(KeepPolicy.KEPT, of_size(10_300_000)).plan.file_type.name == "MOSTLY_Q8_0"


def stored_source(tmp_path, **tensors):
    """A source of shapes and types without data."""
    stored = {
        name.replace("__", "."): StoredTensor(dtype, shape, lambda: torch.zeros(()))
        for name, (dtype, shape) in tensors.items()
    }
    return Source(tmp_path / "model.safetensors", "test", stored, {}, ())


def test_tensors_of_32_bit_may_become_bf16_and_never_stay_larger(tmp_path):
    wide = {f"blocks__{i}__attn__to_q__weight": (torch.float32, (512, 256)) for i in range(4)}
    task = Task(stored_source(tmp_path, **wide, img_in__weight=(torch.float32, (512, 256))), "m", None, KeepPolicy.FREE)
    assert {t.qtype for t in task.free} == {QType.BF16}
    assert len(task.free) == 5


def test_a_model_without_anything_to_choose_is_refused(tmp_path):
    task = Task(stored_source(tmp_path, norm__weight=(torch.float32, (512,))), "m")
    with pytest.raises(GGUFError, match=r"model.safetensors: it has no tensor whose type could be chosen"):
        _ = task.free


def test_a_table_of_tokens_stays_precise(source, imatrix):
    task = Task(source, "tiny", imatrix)
    costs = costs_of(task)
    costs[0] = replace(costs[0], category=Category.TOKEN_EMBD, gain=1e-9)
    pick = tune(task, costs, of_size(4_000_000)).choice.picks[costs[0].name]
    assert bpw(pick.qtype) >= bpw(QType.Q5_K)
