# SPDX-License-Identifier: Apache-2.0
"""The plan of a conversion: for every tensor of a source its shape in the file, its type and its size. No data is read.

Applies a recipe (recipes.py) to roles (models/archs.py), the user's exceptions to both, and the rules of the container:
vectors and small tensors are float32, rows must be whole blocks, GGUF has four dimensions and none of size 1 in front.
Parameters that are no layer's weight are never BF16: loaders take such tensors as they are, some only in F16 and F32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, QK_K, LlamaFileType
from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, name_list, plain_text
from ..layouts import LAYOUTS, bpw, n_bytes
from ..models import archs
from .imatrix import Weighting
from .recipes import ENCODER_RECIPES, KEPT, PLAIN_TYPES, RECIPES, SMALL_BLOCK_TYPES
from .sources import Source, SourceTensor

MAX_DIMS = 4  # of ggml; more are stored as rows
SMALLEST_BLOCK = 32  # of all quantized types; rows that are no multiple of it are joined to rows of 256
WHOLE_ROWS = KEPT | {archs.Category.TOKEN_EMBD}  # read row by row, or as they are
SMALL = 1024  # weights; up to here a matrix costs more in quality than it saves

# GGUF has signed integers only; a type that is wide enough takes the others.
STORED_TYPES: Mapping[torch.dtype, QType] = MappingProxyType(
    {
        torch.float32: QType.F32,
        torch.float16: QType.F16,
        torch.bfloat16: QType.BF16,
        torch.bool: QType.I8,
        torch.int8: QType.I8,
        torch.uint8: QType.I16,
        torch.int16: QType.I16,
        torch.uint16: QType.I32,
        torch.int32: QType.I32,
        torch.uint32: QType.I64,
        torch.int64: QType.I64,
        torch.uint64: QType.I64,
    }
)
# general.file_type of a file that consists mostly of a type; of several recipes with one base the last, its S variant.
_FILE_TYPES = {recipe.base: recipe.file_type for recipe in RECIPES.values()} | {
    qtype: file_type for file_type, qtype in PLAIN_TYPES.values()
}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be.

    Attributes:
        name: as in the source and the file.
        shape: logical shape, torch order.
        stored_shape: shape in the file, torch order; another one than `shape` only if the container asks for it.
        category: role in the model.
        qtype: type in the file.
        note: why it is not the type that the recipe wants, or "".
        weighting: how an importance matrix, where there is one, weighs its columns.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    category: archs.Category
    qtype: QType
    note: str = ""
    weighting: Weighting = Weighting.FULL

    @cached_property
    def n_bytes(self) -> int:
        """Size in the file."""
        return n_bytes(self.qtype, self.stored_shape)

    @property
    def is_matrix(self) -> bool:
        """A matrix that is stored as it is: what importance matrices speak of."""
        return self.stored_shape == self.shape and len(self.shape) == 2

    @property
    def is_empty(self) -> bool:
        """A marker without elements, stored as one zero."""
        return not prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    Attributes:
        arch: the architecture's entry.
        type_name: a key of RECIPES or PLAIN_TYPES, or "" when every matrix keeps its type.
        file_type: value of general.file_type.
        tensors: in the order of the file.
        warnings: sentences for the user.
    """

    arch: archs.Arch
    type_name: str
    file_type: LlamaFileType
    tensors: tuple[PlannedTensor, ...]
    warnings: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        """Weights in all tensors."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.data_bytes / max(self.n_weights, 1)

    @property
    def label(self) -> str:
        """Ending of the file's name: its type, or its own precision."""
        return self.type_name or self.file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")

    def as_json(self, file_bytes: int) -> dict[str, Any]:
        """The plan as --dry-run --json prints it; file_bytes: the size of the whole file."""
        keys = "name", "shape", "category", "qtype", "bytes"
        rows = ((t.name, list(t.shape), t.category.value, t.qtype.name, t.n_bytes) for t in self.tensors)
        return {
            "arch": self.arch.name,
            "type": self.label,
            "file_bytes": file_bytes,
            "bpw": self.bpw,
            "warnings": list(self.warnings),
            "tensors": [dict(zip(keys, row, strict=True)) for row in rows],
        }


@dataclass(frozen=True)
class Choices:
    """What the user asked for.

    Attributes:
        type_name: a key of RECIPES or PLAIN_TYPES; "" keeps every matrix's own type.
        arch: name of an architecture that replaces detection, or "".
        overrides: (pattern, type) of --tensor-type, searched in the name; the first that is found wins.
        exact: name -> type of a recipe file; weaker than overrides, stronger than type_name.
        has_imatrix: an importance matrix will be used.
        weightings: name -> how it weighs that tensor; FULL for all others.
    """

    type_name: str = ""
    arch: str = ""
    overrides: tuple[tuple[re.Pattern[str], QType], ...] = ()
    exact: Mapping[str, QType] = field(default_factory=dict)
    has_imatrix: bool = False
    weightings: Mapping[str, Weighting] = field(default_factory=dict)


def make_plan(source: Source, choices: Choices) -> Plan:
    """Decide type and shape of every tensor.

    Raises:
        GGUFError: the source has no model that can be told, or a type that was asked for cannot hold a tensor.
    """
    shapes = {name: t.shape for name, t in source.tensors.items()}
    arch, warnings = choose_arch(source.path, shapes, choices.arch)
    roles = archs.roles(arch, shapes)
    if choices.arch and arch is not archs.GENERIC and all(role.block < 0 for role in roles.values()):
        problem = f"--arch {arch.name}: it has no tensor in a block of {arch.title}"
        raise GGUFError(problem, path=source.path, hint="Leave out --arch, or name the right one.")
    recipe = RECIPES.get(choices.type_name)
    if recipe and recipe.needs_imatrix and not choices.has_imatrix:
        raise GGUFError(
            f"{choices.type_name} needs an importance matrix",
            path=source.path,
            hint="Give one with --imatrix, or take IQ4_XS, Q3_K_S or Q2_K, which do without.",
        )
    if choices.exact and not choices.exact.keys() & shapes.keys():
        problem = f"the model has none of the {len(choices.exact)} names in the recipe: {name_list([*choices.exact])}"
        raise GGUFError(problem, path=source.path, hint="Take the recipe of this model.")
    planner = _Planner(source.path, arch, choices)
    tensors = tuple(planner.plan(source.tensors[name], role) for name, role in roles.items())
    file_type = _file_type(choices.type_name, tensors)
    return Plan(arch, choices.type_name, file_type, tensors, (*warnings, *_warnings(tensors, choices)))


def choose_arch(path: Path, shapes: archs.Shapes, name: str) -> tuple[archs.Arch, tuple[str, ...]]:
    """The architecture to convert as, by name or by content, and what the user should know about it."""
    if name:
        return archs.named(name), ()
    found = archs.find_all(shapes)
    if len({arch.name for arch in found}) > 1:
        raise GGUFError(
            f"its tensors fit {len(found)} architectures: {name_list([arch.title for arch in found])}",
            path=path,
            hint="Say which with --arch.",
        )
    known = found[0] if found else archs.detect_encoder(shapes)
    if known:
        return known, ()
    return archs.GENERIC, (
        "this model is not recognised; recipes keep the precision of its embedders, first and last layers and small "
        "tensors. --arch NAME names a known architecture.",
    )


class _Planner:
    """Applies one set of choices to tensors, one at a time."""

    def __init__(self, path: Path, arch: archs.Arch, choices: Choices) -> None:
        self.path = path
        self.arch = arch
        self.choices = choices
        self.recipe = (ENCODER_RECIPES if arch.is_encoder else RECIPES).get(choices.type_name)
        self.plain = PLAIN_TYPES[choices.type_name][1] if choices.type_name in PLAIN_TYPES else None
        self.instead_of_bf16 = QType.F16 if self.recipe else QType.F32

    def plan(self, tensor: SourceTensor, role: archs.Role) -> PlannedTensor:
        shape = self.stored_shape(tensor, role)
        explicit = self.explicit(tensor.name)
        if explicit is not None:
            self.check(tensor, shape, explicit)
        qtype, note = (explicit, "") if explicit is not None else self.by_recipe(tensor, shape, role)
        weighting = self.choices.weightings.get(tensor.name, Weighting.FULL)
        return PlannedTensor(tensor.name, tensor.shape, shape, role.category, qtype, note, weighting)

    def stored_shape(self, tensor: SourceTensor, role: archs.Role) -> tuple[int, ...]:
        """The shape in the file; it depends on the tensor alone, so that a 16-bit file can be quantized later."""
        shape = tensor.shape
        fits = tensor.name.endswith(".weight") and prod(shape) % QK_K == 0 and prod(shape) > SMALL
        if fits and not role.f32 and role.category not in WHOLE_ROWS:
            is_kernel = self.arch.reshape_conv and len(shape) > 2
            if is_kernel or (len(shape) == 2 and shape[-1] % SMALLEST_BLOCK):
                return (prod(shape) // QK_K, QK_K)
        return stored_shape(shape)

    def explicit(self, name: str) -> QType | None:
        """The type that the user gave this tensor by name, if any."""
        for pattern, qtype in self.choices.overrides:
            if pattern.search(name):
                return qtype
        return self.choices.exact.get(name)

    def check(self, tensor: SourceTensor, shape: tuple[int, ...], qtype: QType) -> None:
        """Refuse a type that was asked for and cannot hold the tensor."""
        row, block_size = shape[-1], GGML_QUANT_SIZES[qtype][0]
        problem = ""
        is_float = qtype in LAYOUTS
        if is_float != tensor.dtype.is_floating_point or (not is_float and qtype is not STORED_TYPES[tensor.dtype]):
            problem = f"holds {str(tensor.dtype).removeprefix('torch.')}"
        elif row % block_size:
            problem = f"has rows of {row} weights, no multiple of {block_size}"
        if problem:
            raise GGUFError(
                f"tensor '{plain_text(tensor.name)}' {problem} and cannot be {qtype.name}",
                path=self.path,
                subject=tensor.name,
                hint="Choose another type for it.",
            )

    def by_recipe(self, tensor: SourceTensor, shape: tuple[int, ...], role: archs.Role) -> tuple[QType, str]:
        """Type and note for a tensor that the user did not name."""
        own = _own_type(tensor, shape)
        if not tensor.dtype.is_floating_point:
            return own, ""
        if len(tensor.shape) < 2 or not prod(tensor.shape):
            return QType.F32, ""
        if self.choices.type_name and (role.f32 or prod(shape) <= SMALL):
            return QType.F32, ""
        unquantized = own if self.plain is None else self.plain
        if not tensor.name.endswith(".weight"):
            return self.instead_of_bf16 if unquantized is QType.BF16 else unquantized, ""
        wanted = self.recipe.qtype(role) if self.recipe else None
        return (unquantized, "") if wanted is None else _fitting(wanted, shape[-1], own)


def _own_type(tensor: SourceTensor, shape: tuple[int, ...]) -> QType:
    """The type that keeps the precision of the source: the one it is quantized as, where the file can hold that."""
    if tensor.qtype is not None and shape[-1] % GGML_QUANT_SIZES[tensor.qtype][0] == 0:
        return tensor.qtype
    return STORED_TYPES[tensor.dtype]


def _fitting(wanted: QType, row: int, own: QType) -> tuple[QType, str]:
    """The wanted type, or what stands in for it where rows are not whole blocks of it."""
    if row % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted, ""
    note = f"{wanted.name} needs rows of a multiple of {GGML_QUANT_SIZES[wanted][0]}, these have {row}"
    small = SMALL_BLOCK_TYPES.get(wanted, wanted)
    return (small, note) if row % GGML_QUANT_SIZES[small][0] == 0 else (own, note)


def stored_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which GGUF can hold a tensor of this one, torch order: 1 to 4 dimensions, no leading 1."""
    if not prod(shape):
        return (1,)  # ggml divides by its dimensions
    if len(shape) > MAX_DIMS:
        shape = (shape[0], prod(shape[1:]))
    trimmed = tuple(shape)
    while len(trimmed) > 1 and trimmed[0] == 1:
        trimmed = trimmed[1:]
    return trimmed or (1,)


def _file_type(type_name: str, tensors: Sequence[PlannedTensor]) -> LlamaFileType:
    """What general.file_type says: the recipe's, or that of the type that most weights have."""
    if type_name:
        return RECIPES[type_name].file_type if type_name in RECIPES else PLAIN_TYPES[type_name][0]
    weights = dict.fromkeys(_FILE_TYPES, 0)
    for tensor in tensors:
        if tensor.qtype in weights and len(tensor.shape) > 1:
            weights[tensor.qtype] += prod(tensor.shape)
    return _FILE_TYPES[max(weights, key=lambda qtype: weights[qtype])]


def _warnings(tensors: Sequence[PlannedTensor], choices: Choices) -> list[str]:
    """What a user would want to know about types that are not the recipe's, and about names that fit nothing."""
    found = []
    for qtype in sorted({t.qtype for t in tensors if t.note}, key=bpw):
        noted = [t for t in tensors if t.qtype is qtype and t.note]
        names = name_list([t.name for t in noted])
        found.append(f"{len(noted)} tensors become {qtype.name} ({noted[0].note}): {names}")
    unused = [p.pattern for p, _ in choices.overrides if not any(p.search(t.name) for t in tensors)]
    if unused:
        found.append(f"--tensor-type patterns that no tensor matches: {name_list(unused)}")
    strangers = sorted({*choices.exact, *choices.weightings} - {t.name for t in tensors})
    if strangers:
        found.append(f"names in the recipe that the model does not have: {name_list(strangers)}")
    if choices.weightings and not choices.has_imatrix:
        n_named = len(choices.weightings)
        found.append(f"the recipe says how importance weighs {n_named} tensors; without --imatrix nothing is weighed")
    n_weights = sum(prod(t.shape) for t in tensors)
    n_quantized = sum(prod(t.shape) for t in tensors if t.qtype not in STORED_TYPES.values())
    if choices.type_name in RECIPES and 2 * n_quantized < n_weights:
        share = 100 * n_quantized / n_weights
        found.append(f"only {share:.0f} % of the weights are quantized; --tensor-type 'REGEX=TYPE' names more")
    return found
