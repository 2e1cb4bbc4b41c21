# SPDX-License-Identifier: Apache-2.0
"""What a report says, as numbers: selections of types with their errors and sizes, and where each tensor stands.

A selection is one candidate of quantize/sensitivity.py per tensor: a recipe's choice, a fixed type's, or the same type
for all. Knows no files, pictures or pages. Errors are predicted relative squared errors of the final latents, gain *
error of a candidate, where nothing else is said; `rms` is the root of their sum, which compares with measured errors.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from gguf.constants import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError, name_list, plain_text
from gguf_kit.layouts import bpw
from gguf_kit.quantize.imatrix import Weighting
from gguf_kit.quantize.sensitivity import Candidate, TensorCosts

OUTSIDE = "outside the blocks"
WORST = 10  # tensors in the table of the worst
SAME_SIZE = 0.02  # part by which a file may be smaller than the fixed type that it is compared with
NUMBER = re.compile(r"(?<!\d)\d+\.")
# Which candidate stands for a type: of the weightings that were measured for it the first of these.
WITHOUT_IMATRIX = (Weighting.NONE, Weighting.FULL, Weighting.ROOT)
WITH_IMATRIX = (Weighting.MIXED, Weighting.FULL, Weighting.NONE, Weighting.ROOT)


@dataclass(frozen=True)
class Pick:
    """What one tensor is stored as.

    Attributes:
        costs: the tensor.
        candidate: one of its candidates.
    """

    costs: TensorCosts
    candidate: Candidate

    @property
    def error(self) -> float:
        """Predicted relative squared error that it adds to the final latents."""
        return self.costs.gain * self.candidate.error

    @property
    def std_error(self) -> float:
        """Sampling error of `error`, in the same unit; 0 where every row was measured."""
        return self.costs.gain * self.candidate.std_error


@dataclass(frozen=True)
class Selection:
    """A type for every tensor.

    Attributes:
        name: of the recipe or type.
        picks: one for each tensor whose costs are known.
        rest_bytes, rest_weights: of the tensors of the file that are not among them, which have no error.
        is_chosen: it is a recipe that the report is about, not a fixed one to compare with.
    """

    name: str
    picks: tuple[Pick, ...]
    rest_bytes: int = 0
    rest_weights: int = 0
    is_chosen: bool = False

    @cached_property
    def error(self) -> float:
        """Predicted relative squared error of the final latents."""
        return math.fsum(pick.error for pick in self.picks)

    @property
    def rms(self) -> float:
        """Predicted relative error of the final latents."""
        return math.sqrt(self.error)

    @cached_property
    def std_error(self) -> float:
        """Sampling error of `error`; that of tensors is independent."""
        return math.sqrt(math.fsum(pick.std_error**2 for pick in self.picks))

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of all tensors of the file, with their padding."""
        return self.rest_bytes + sum(pick.candidate.n_bytes for pick in self.picks)

    @property
    def megabytes(self) -> float:
        """The same in megabytes (powers of 1000)."""
        return self.n_bytes / 1e6

    @cached_property
    def n_weights(self) -> int:
        """Weights of all tensors of the file."""
        return self.rest_weights + sum(prod(pick.costs.shape) for pick in self.picks)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors of the file."""
        return 8 * self.n_bytes / max(self.n_weights, 1)

    def share(self, pick: Pick) -> float:
        """Part of the whole error that one tensor adds, 0 to 1."""
        return pick.error / self.error if self.error else 0.0

    def worst(self, n: int = WORST) -> list[Pick]:
        """The tensors that add most, largest first; none without an error."""
        return sorted((pick for pick in self.picks if pick.error > 0), key=lambda pick: -pick.error)[:n]


@dataclass(frozen=True)
class Measured:
    """A line of results.json: what sampling with a file gave, against the reference.

    Attributes:
        type: name of the file's type or recipe.
        mb, bpw: megabytes and bits per weight of all tensors, None where they are not known.
        latent_error: relative L2 error of the final latents.
        psnr_db: of the pictures, infinite for equal ones.
        ssim: of the pictures, 1 for equal ones.
    """

    type: str
    mb: float | None = None
    bpw: float | None = None
    latent_error: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None


@dataclass(frozen=True)
class Stack:
    """A heat map's axes: tensors that recur in numbered blocks, by kind of tensor and block.

    Attributes:
        title: the names of its blocks, or OUTSIDE.
        rows: (category, name within the block) from top to bottom.
        blocks: numbers of the blocks from left to right; (-1,) for what is in none.
        names: for each row and block the tensor's name, None where a block has no such tensor.
        n_left_out: rows that are not shown.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    blocks: tuple[int, ...]
    names: tuple[tuple[str | None, ...], ...]
    n_left_out: int = 0


def candidate_of(costs: TensorCosts, qtype: QType, order: Sequence[Weighting]) -> Candidate | None:
    """The tensor's candidate of a type with the first weighting of `order` that was measured, None without any."""
    found = {candidate.weighting: candidate for candidate in costs.candidates if candidate.qtype is qtype}
    return next((found[weighting] for weighting in order if weighting in found), None)


def pick_recipe(
    costs: Iterable[TensorCosts], types: Mapping[str, QType], weightings: Mapping[str, Weighting] | None = None
) -> tuple[tuple[Pick, ...], list[str]]:
    """What a recipe chooses.

    Args:
        types: name -> type of each tensor.
        weightings: name -> weighting, FULL where it is silent; None: nothing is weighted.
    Returns:
        One pick per tensor in order, and the names of those whose type was not measured.
    """
    picks, missing = [], []
    for tensor in costs:
        first = Weighting.NONE if weightings is None else weightings.get(tensor.name, Weighting.FULL)
        order = (first, *(WITHOUT_IMATRIX if weightings is None else WITH_IMATRIX))
        found = candidate_of(tensor, types[tensor.name], order) if tensor.name in types else None
        if found is None:
            missing.append(tensor.name)
        else:
            picks.append(Pick(tensor, found))
    return tuple(picks), missing


def pick_uniform(costs: Iterable[TensorCosts], qtype: QType) -> tuple[Pick, ...]:
    """Every tensor in one type, each with the weighting that serves it best; those that cannot have it are left out."""
    found = []
    for tensor in costs:
        fitting = [candidate for candidate in tensor.candidates if candidate.qtype is qtype]
        if fitting:
            found.append(Pick(tensor, min(fitting, key=lambda candidate: candidate.error)))
    return tuple(found)


def require_all(missing: Sequence[str], name: str) -> None:
    """Refuse a recipe some of whose types were not measured.

    Raises:
        GGUFError: with the tensors' names.
    """
    if missing:
        problem = f"the costs of the types in recipe '{plain_text(name)}' are not known for {len(missing)} tensors"
        raise GGUFError(f"{problem}: {name_list(list(missing))}", hint="Measure these types with tools/tune.py first.")


def has_gains(costs: Iterable[TensorCosts]) -> bool:
    """Whether gains were measured; without them each is 1 / energy, and errors add up to no error of latents."""
    return any(abs(tensor.gain * tensor.energy - 1) > 1e-4 for tensor in costs if tensor.energy > 0)


def compared_with(chosen: Selection, fixed: Iterable[Selection]) -> Selection | None:
    """The fixed type of a recipe's size: the smallest that is not smaller, and hardly larger; None if there is none."""
    fits = [other for other in fixed if chosen.n_bytes <= other.n_bytes <= chosen.n_bytes * (1 + SAME_SIZE)]
    return min(fits, key=lambda other: other.n_bytes, default=None)


def count_types(selection: Selection) -> dict[str, dict[QType, tuple[int, int]]]:
    """Category -> type -> (tensors, weights); categories with the most weights first, types with the fewest bits."""
    tensors: Counter[tuple[str, QType]] = Counter()
    weights: Counter[tuple[str, QType]] = Counter()
    for pick in selection.picks:
        key = pick.costs.category.value, pick.candidate.qtype
        tensors[key] += 1
        weights[key] += prod(pick.costs.shape)
    sizes: Counter[str] = Counter()
    for (category, _), n in weights.items():
        sizes[category] += n
    ordered = sorted(weights, key=lambda key: (bpw(key[1]), key[1].name))
    return {
        category: {key[1]: (tensors[key], weights[key]) for key in ordered if key[0] == category}
        for category, _ in sizes.most_common()
    }


def find_stacks(costs: Sequence[TensorCosts], max_rows: int = 64, max_stacks: int = 8) -> list[Stack]:
    """The axes of the heat maps: one stack per kind of block, then the tensors outside; the largest where many."""
    cells: dict[str, dict[tuple[str, str], dict[int, str]]] = defaultdict(dict)
    for tensor, (title, inside) in zip(costs, _places(costs), strict=True):
        row = cells[title].setdefault((tensor.category.value, inside), {})
        if tensor.block in row:
            row = cells[title].setdefault((tensor.category.value, tensor.name), {})
        row[tensor.block] = tensor.name
    titles = sorted(cells, key=lambda title: (title == OUTSIDE, -sum(map(len, cells[title].values()))))
    kept = titles if len(titles) <= max_stacks else [*titles[: max_stacks - 1], titles[-1]]
    return [_stack(title, cells[title], max_rows) for title in cells if title in kept and title != OUTSIDE] + [
        _stack(title, cells[title], max_rows) for title in kept if title == OUTSIDE
    ]


def _stack(title: str, cells: Mapping[tuple[str, str], Mapping[int, str]], max_rows: int) -> Stack:
    """One stack, its rows grouped by category in the model's order."""
    categories = list(dict.fromkeys(category for category, _ in cells))
    rows = sorted(cells, key=lambda row: categories.index(row[0]))
    shown = tuple(rows[:max_rows])
    blocks = tuple(sorted({block for row in shown for block in cells[row]}))
    names = tuple(tuple(cells[row].get(block) for block in blocks) for row in shown)
    return Stack(title, shown, blocks, names, len(rows) - len(shown))


def _places(costs: Sequence[TensorCosts]) -> list[tuple[str, str]]:
    """For each tensor its stack's title and its name within the block.

    The block's number ends the shortest beginning of the name that occurs with one block only.
    """
    blocks: dict[str, set[int]] = defaultdict(set)
    for tensor in costs:
        for match in NUMBER.finditer(tensor.name):
            blocks[tensor.name[: match.end()]].add(tensor.block)
    places = []
    for tensor in costs:
        ends = (match.end() for match in NUMBER.finditer(tensor.name))
        end = next((end for end in ends if len(blocks[tensor.name[:end]]) == 1), 0)
        if tensor.block < 0:
            places.append((OUTSIDE, _short(tensor.name)))
        else:
            title = re.sub(r"\d+", "#", tensor.name[:end]).rstrip(".")
            places.append((title.removesuffix(".#") or "blocks", _short(tensor.name[end:])))
    return places


def _short(name: str) -> str:
    return name.removesuffix(".weight") or name
