# SPDX-License-Identifier: Apache-2.0
"""Chooses a type for each tensor of a model by what every type costs it, such that a goal is met with the least loss.

Takes measured costs (sensitivity.py) and a goal: a file size, bits per weight or an error. Gives a plan that
convert.py carries out, the same as a recipe file, and what it gains over the fixed recipe of that size. Errors are
predicted: the sum over tensors of gain * error, as if the errors of different layers added up independently.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, plain_text
from ..gguf_file import DEFAULT_ALIGNMENT
from ..layouts import bpw
from ..models.archs import Category
from . import knapsack
from .convert import Conversion
from .encode import FLOAT_DTYPES
from .imatrix import Imatrix, Weighting
from .plan import Choices, Plan, PlannedTensor, make_plan
from .recipe_files import recipe_text
from .recipes import RECIPES
from .sensitivity import IGNORE_IMPORTANCE, Candidate, TensorCosts, is_quantizable
from .sources import Source
from .writer import file_size, make_header, merged_metadata

BASE_TYPE = "Q8_0"  # the recipe that says what is left alone: all of them do it alike
TOKEN_TYPE = QType.Q5_K  # a table of tokens is read row by row, by every prompt; recipes keep it at this or better
# Where a gain is 0 nothing is known to be lost, yet what is left of a budget should go to the larger relative error.
TIE_BREAKER = 1e-12
MAX_BITS = 64.0  # of any type; what is asked for above makes no difference


class KeepPolicy(enum.Enum):
    """What happens to the matrices that the fixed recipes leave in 16 bit: embedders and final layers."""

    KEPT = "kept"  # they stay as the source has them
    FREE = "free"  # they are chosen like all others


@dataclass(frozen=True)
class Goal:
    """What is asked for; exactly one of these.

    Attributes:
        max_bytes: size that the file must not exceed.
        bits_per_weight: the same for the data of all tensors.
        max_error: predicted relative error of the result that must not be exceeded.
        text: as the user said it, for file names and messages.
    """

    max_bytes: int | None = None
    bits_per_weight: float | None = None
    max_error: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Choice:
    """One candidate for each tensor.

    Attributes:
        picks: name -> candidate.
        error: predicted relative squared error of the result: the sum of gain * error.
        n_bytes: of all of them, padded.
        bound: no choice of this size has a smaller predicted error.
    """

    picks: Mapping[str, Candidate]
    error: float
    n_bytes: int
    bound: float


@dataclass(frozen=True)
class Fixed:
    """A recipe of RECIPES as it is without an importance matrix, for comparison; `error` as in Choice."""

    type_name: str
    file_bytes: int
    error: float


@dataclass(frozen=True)
class Task:
    """A model whose types are to be chosen.

    Attributes:
        source: the model.
        name: value of general.name.
        imatrix: the importance matrix that the file will be made with, or None.
        policy: what is left alone.
        choices: tensors that the user has decided about, and the architecture; its type_name is not used.
    """

    source: Source
    name: str
    imatrix: Imatrix | None = None
    policy: KeepPolicy = KeepPolicy.KEPT
    choices: Choices = field(default_factory=Choices)

    @cached_property
    def base(self) -> Plan:
        """What is planned for the tensors about which nothing is chosen, in the shapes of the file."""
        return make_plan(self.source, replace(self.choices, type_name=BASE_TYPE))

    @cached_property
    def free(self) -> tuple[PlannedTensor, ...]:
        """The tensors to choose for, planned as what does without a loss that matters.

        Raises:
            GGUFError: there are none.
        """
        wanted = {t.name for t in make_plan(self.source, replace(self.choices, type_name="BF16")).tensors if _is_16(t)}
        found = []
        for tensor in self.base.tensors:
            is_kept = self.policy is KeepPolicy.KEPT and tensor.qtype in FLOAT_DTYPES
            if tensor.name in wanted and not is_kept and not self._is_decided(tensor.name):
                found.append(replace(tensor, qtype=QType.BF16, note="") if self._is_wide(tensor) else tensor)
        found = [tensor for tensor in found if is_quantizable(tensor)]
        if not found:
            raise GGUFError("it has no tensor whose type could be chosen", path=self.source.path)
        return tuple(found)

    def _is_decided(self, name: str) -> bool:
        return name in self.choices.exact or any(pattern.search(name) for pattern, _ in self.choices.overrides)

    def _is_wide(self, tensor: PlannedTensor) -> bool:
        """Whether the source has a tensor in 32 bit, which BF16 can stand for."""
        stored = self.source.tensors[tensor.name]
        return stored.qtype is None and stored.dtype.itemsize > 2

    def header_bytes(self, plan: Plan) -> int:
        """Bytes before the data of a file that is made with the importance matrix."""
        imatrix_name = self.imatrix.path.name if self.imatrix else ""
        return len(make_header(plan, self.name, merged_metadata(self.source.metadata)[0], imatrix_name))

    def plan(self, picks: Mapping[str, Candidate]) -> Plan:
        """The plan with a choice for the free tensors."""
        types = {t.name: picks[t.name].qtype if t.name in picks else t.qtype for t in self.base.tensors}
        exact = {**self.choices.exact, **types}  # names of a recipe that are no tensors are still warned of
        known = self.imatrix.entries if self.imatrix else {}
        weightings = {
            name: pick.weighting for name, pick in picks.items() if name in known and pick.qtype not in FLOAT_DTYPES
        }
        weightings = {name: weighting for name, weighting in weightings.items() if weighting is not Weighting.FULL}
        decided = {name: w for name, w in self.choices.weightings.items() if name not in picks}
        choices = replace(self.choices, type_name="", exact=exact, weightings=weightings | decided)
        return make_plan(self.source, replace(choices, has_imatrix=self.imatrix is not None))


@dataclass(frozen=True)
class Tuned:
    """A choice for a model and what is known about it.

    Attributes:
        task, goal: what was asked for.
        choice: what was chosen.
        plan: the whole file.
        file_bytes: its size.
        std_error: of choice.error, from measuring some rows of each tensor only.
        n_gains: tensors whose gain was measured.
        fixed: the largest fixed recipe that is not larger, where its costs are known.
    """

    task: Task
    goal: Goal
    choice: Choice
    plan: Plan
    file_bytes: int
    std_error: float
    n_gains: int
    fixed: Fixed | None

    @property
    def error(self) -> float:
        """Predicted relative error of the result."""
        return math.sqrt(self.choice.error)

    @property
    def error_tolerance(self) -> float:
        """Standard error of `error`."""
        return self.std_error / (2 * self.error) if self.error else 0.0

    @property
    def gained(self) -> float | None:
        """Part of the fixed recipe's error that this choice takes away."""
        if self.fixed is None or not self.fixed.error:
            return None
        return 1 - self.error / math.sqrt(self.fixed.error)

    def as_json(self) -> dict[str, Any]:
        """For programs: the plan as convert.py prints it, with weightings and what is predicted."""
        found = self.plan.as_json(self.file_bytes) | {
            "type": "auto",
            "goal": self.goal.text,
            "keep_policy": self.task.policy.value,
            "predicted_error": self.error,
            "predicted_error_std": self.error_tolerance,
            "predicted_error_bound": math.sqrt(max(self.choice.bound, 0.0)),
            "n_chosen": len(self.choice.picks),
            "n_measured_gains": self.n_gains,
            "fixed": None,
        }
        for row, tensor in zip(found["tensors"], self.plan.tensors, strict=True):
            row["weighting"] = tensor.weighting.value
        if self.fixed:
            error = math.sqrt(self.fixed.error)
            found["fixed"] = {
                "type": self.fixed.type_name,
                "file_bytes": self.fixed.file_bytes,
                "predicted_error": error,
            }
        return found

    def comments(self) -> list[str]:
        """What a recipe file says about itself, in lines."""
        imatrix = f" and the importance matrix {plain_text(self.task.imatrix.path.name)}" if self.task.imatrix else ""
        policy = "embedders and final layers kept" if self.task.policy is KeepPolicy.KEPT else "all matrices chosen"
        lines = [
            f"{self.plan.arch.title}, types chosen by measured costs for {plain_text(self.goal.text)}, {policy}",
            f"{self.file_bytes:,} bytes, {self.plan.bpw:.3f} bits per weight, with this recipe{imatrix}",
            f"{self.error_line()}; {self.gains_line()}",
        ]
        return lines + ([self.fixed_line()] if self.fixed else [])

    def recipe(self) -> str:
        """Text of the recipe file."""
        return recipe_text(self.plan, self.comments())

    def error_line(self) -> str:
        """The predicted error in words."""
        what = "predicted relative error of the result" if self.n_gains else "predicted error"
        return f"{what}: {self.error:.4f} +- {self.error_tolerance:.4f}"

    def gains_line(self) -> str:
        """What the prediction rests on."""
        if not self.n_gains:
            return "no gains were measured, the relative output error of every layer counts the same"
        return f"gains measured for {self.n_gains} of {len(self.choice.picks)} tensors"

    def fixed_line(self) -> str:
        """The comparison in words, "" if there is none."""
        if self.fixed is None:
            return ""
        text = f"{self.fixed.type_name} without importance matrix, {self.fixed.file_bytes:,} bytes: predicted"
        text = f"{text} {math.sqrt(self.fixed.error):.4f}"
        return text if self.gained is None else f"{text}, this one has {100 * self.gained:.0f} % less"


def _is_16(tensor: PlannedTensor) -> bool:
    return tensor.qtype is not QType.F32


# -- choosing --


def solve(costs: Sequence[TensorCosts], budget_bytes: int) -> Choice:
    """The choice of least predicted error whose candidates have no more bytes than this in all.

    Raises:
        GGUFError: even the smallest candidates have more.
    """
    return _choice(costs, knapsack.solve(_items(costs), budget_bytes))


def solve_error(costs: Sequence[TensorCosts], max_error: float) -> Choice:
    """The smallest choice whose predicted relative error, the root of the sum, is not larger than this.

    Raises:
        GGUFError: even the best candidates have a larger one.
    """
    items, limit = _items(costs), max_error * max_error * (1 + knapsack.ROUNDING)
    least = math.fsum(float(item.errors[-1]) for item in items)
    if least > limit:
        problem = f"no choice of types has a predicted error of {max_error:g}"
        problem = f"{problem}, the least is about {math.sqrt(least):.3g}"
        raise GGUFError(problem, hint="Ask for a larger one.")
    return _choice(costs, knapsack.solve_error(items, limit))


def frontier(costs: Sequence[TensorCosts]) -> list[tuple[int, float]]:
    """(bytes of all candidates, predicted relative squared error) of the best choices of all sizes."""
    return knapsack.frontier(_items(costs))


def _items(costs: Sequence[TensorCosts]) -> list[knapsack.Item]:
    return [
        knapsack.make_item([c.n_bytes for c in tensor.candidates], [_weighed(tensor, c) for c in tensor.candidates])
        for tensor in costs
    ]


def _weighed(tensor: TensorCosts, candidate: Candidate) -> float:
    """What a candidate adds to the error, or little where the gain says nothing about it."""
    if tensor.gain > 0 or not tensor.energy > 0:
        return tensor.gain * candidate.error
    return TIE_BREAKER * candidate.error / tensor.energy


def _choice(costs: Sequence[TensorCosts], solution: knapsack.Solution) -> Choice:
    picks = {tensor.name: tensor.candidates[pick] for tensor, pick in zip(costs, solution.picks, strict=True)}
    error = math.fsum(tensor.gain * picks[tensor.name].error for tensor in costs)
    return Choice(picks, error, solution.size, solution.bound)


# -- a whole file --


def tune(task: Task, costs: Sequence[TensorCosts], goal: Goal) -> Tuned:
    """Choose types for a model.

    Args:
        costs: what measure() gives for task.free.
    Raises:
        GGUFError: the goal cannot be reached.
    """
    allowed = [_allowed(tensor) for tensor in costs] if task.policy is KeepPolicy.KEPT else list(costs)
    if goal.max_error is not None:
        choice = solve_error(allowed, goal.max_error)
    else:
        choice = solve(allowed, _budget(task, allowed, goal))
    plan = task.plan(choice.picks)
    n_bytes = file_size(plan, Conversion(task.source, plan, task.name, task.imatrix).header)
    variance = sum((tensor.gain * choice.picks[tensor.name].std_error) ** 2 for tensor in costs)
    fixed = best_fixed(task, costs, n_bytes if goal.max_bytes is None else goal.max_bytes)
    return Tuned(task, goal, choice, plan, n_bytes, math.sqrt(variance), _n_gains(task), fixed)


def _n_gains(task: Task) -> int:
    entries = task.imatrix.entries if task.imatrix else {}
    return sum(t.is_matrix and t.name in entries and entries[t.name].gain is not None for t in task.free)


def _allowed(tensor: TensorCosts) -> TensorCosts:
    """A table of tokens without the types that recipes never give it; any other tensor as it is."""
    if tensor.category is not Category.TOKEN_EMBD:
        return tensor
    kept = tuple(candidate for candidate in tensor.candidates if bpw(candidate.qtype) >= bpw(TOKEN_TYPE))
    return replace(tensor, candidates=kept or tensor.candidates)


def _budget(task: Task, costs: Sequence[TensorCosts], goal: Goal) -> int:
    """Bytes for the candidates such that the goal is met.

    Raises:
        GGUFError: not even the smallest candidates meet it.
    """
    chosen = {tensor.name for tensor in costs}
    others = [tensor.n_bytes for tensor in task.base.tensors if tensor.name not in chosen]
    smallest = sum(min(candidate.n_bytes for candidate in tensor.candidates) for tensor in costs)
    if goal.max_bytes is not None:
        used = task.header_bytes(task.base) + sum(n + -n % DEFAULT_ALIGNMENT for n in others)
        budget, least = goal.max_bytes - used, f"{used + smallest:,} bytes"
    else:
        bits = min(goal.bits_per_weight or 0.0, MAX_BITS)
        budget = math.floor(bits * task.base.n_weights / 8) - sum(others)
        least = f"{math.ceil(8000 * (sum(others) + smallest) / task.base.n_weights) / 1000:.3f} bits per weight"
    if smallest > budget:
        raise GGUFError(
            f"no choice of types makes it as small as {plain_text(goal.text)}, the smallest has {least}",
            path=task.source.path,
            hint="Ask for that or more"
            + (", or choose for all matrices with --keep-policy free." if task.policy is KeepPolicy.KEPT else "."),
        )
    return budget


def best_fixed(task: Task, costs: Sequence[TensorCosts], max_bytes: int) -> Fixed | None:
    """The largest recipe that does without an importance matrix and makes a file of no more bytes than this.

    Of several of one size that of the least error.
    """
    found = []
    for type_name, recipe in RECIPES.items():
        if recipe.needs_imatrix:
            continue
        plan = make_plan(task.source, replace(task.choices, type_name=type_name))
        n_bytes = file_size(plan, Conversion(task.source, plan, task.name).header)
        error = predicted_error(plan, costs)
        if n_bytes <= max_bytes and error is not None:
            found.append(Fixed(type_name, n_bytes, error))
    return max(found, key=lambda fixed: (fixed.file_bytes, -fixed.error), default=None)


def predicted_error(plan: Plan, costs: Sequence[TensorCosts]) -> float | None:
    """The sum of gain * error for a plan that is made without an importance matrix; None where one was not measured."""
    types = {tensor.name: tensor.qtype for tensor in plan.tensors}
    errors = [_error_without_importance(tensor, types[tensor.name]) for tensor in costs]
    known = [error for error in errors if error is not None]
    return math.fsum(known) if len(known) == len(errors) else None


def _error_without_importance(tensor: TensorCosts, qtype: QType) -> float | None:
    if qtype in FLOAT_DTYPES:
        return 0.0
    # A type that takes no notice of importance was measured once, and is said to be weighed.
    unweighted = (Weighting.NONE, Weighting.FULL) if qtype in IGNORE_IMPORTANCE else (Weighting.NONE,)
    found = (c for c in tensor.candidates if c.qtype is qtype and c.weighting in unweighted)
    candidate = next(found, None)
    return tensor.gain * candidate.error if candidate else None
