# SPDX-License-Identifier: Apache-2.0
"""Recipe files: the type of each tensor by its whole name, one `name=TYPE` per line, as llama-quantize reads them too.

The name is everything before the last `=`; empty lines and lines that start with `#` are comments. One comment means
something here: `#weighting name=none|root|full|mixed`, how an importance matrix weighs that tensor (else full).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, plain_text
from ..layouts import LAYOUTS
from .imatrix import Weighting
from .plan import STORED_TYPES, Plan

# What a user may name: every type that is dequantized here, and the integers that a recipe file repeats.
QTYPE_NAMES = tuple(dict.fromkeys(q.name for q in (*LAYOUTS, *STORED_TYPES.values())))
WEIGHTING = "#weighting"  # the comment that is a directive
WEIGHTING_FORM = f"{WEIGHTING} name={'|'.join(weighting.value for weighting in Weighting)}"


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says.

    Attributes:
        types: name -> type.
        weightings: name -> how the importance matrix weighs it, as far as the file says so; FULL for all others.
    """

    types: Mapping[str, QType] = field(default_factory=dict)
    weightings: Mapping[str, Weighting] = field(default_factory=dict)


def parse_qtype(text: str, *, path: Path | None = None, where: str = "--tensor-type") -> QType:
    """The type of a name, in upper or lower case."""
    name = text.strip().upper()
    if name not in QTYPE_NAMES:
        problem = f"{where}: '{plain_text(text)}' is no type of tensors"
        raise GGUFError(problem, path=path, hint=f"Types: {', '.join(QTYPE_NAMES)}.")
    return QType[name]


def read_recipe_file(path: Path) -> RecipeFile:
    """Read a recipe file.

    Raises:
        GGUFError: the file cannot be read, or a line is not of this form.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise GGUFError(f"the recipe cannot be read: {error.strerror}", path=path, hint="Check the path.") from error
    except UnicodeDecodeError as error:
        raise GGUFError("the recipe is not UTF-8 text", path=path, hint="Save it as UTF-8.") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path | None = None) -> RecipeFile:
    """The same for the text of a recipe file.

    Args:
        path: where it comes from, for errors; None: the user has typed it.
    """
    types: dict[str, QType] = {}
    weightings: dict[str, Weighting] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        where = f"line {number} {'' if path else 'of the recipe '}"
        is_weighting = line.startswith(WEIGHTING) and line.split(maxsplit=1)[0] == WEIGHTING
        if not line.strip() or (line.startswith("#") and not is_weighting):
            continue
        known: Mapping[str, object] = weightings if is_weighting else types
        rest = line.partition(f"{WEIGHTING} ")[2] if is_weighting else line  # names may begin with a space
        name, separator, value = rest.rpartition("=")
        if not separator or not name or name in known:
            form = WEIGHTING_FORM if is_weighting else "name=TYPE"
            problem = "names a tensor twice" if name in known else f"is not of the form {form}"
            raise GGUFError(f"{where}{problem}: '{plain_text(line)}'", path=path, hint="Correct that line.")
        if is_weighting:
            weightings[name] = _parse_weighting(value, path, where.rstrip())
        else:
            types[name] = parse_qtype(value, path=path, where=where.rstrip())
    return RecipeFile(types, weightings)


def _parse_weighting(text: str, path: Path | None, where: str) -> Weighting:
    names = [weighting.value for weighting in Weighting]
    if text.strip().lower() not in names:
        problem = f"{where}: '{plain_text(text)}' is no weighting"
        raise GGUFError(problem, path=path, hint=f"Weightings: {', '.join(names)}.")
    return Weighting(text.strip().lower())


def recipe_text(plan: Plan, comments: Sequence[str] = ()) -> str:
    """The plan as a recipe file.

    Args:
        comments: lines to stand at its beginning; none: the architecture, type and size.
    Raises:
        GGUFError: a tensor's name cannot stand in one.
    """
    for tensor in plan.tensors:
        if tensor.name.startswith("#") or "\n" in tensor.name or tensor.name.endswith("\r") or not tensor.name:
            problem = f"the name of tensor '{plain_text(tensor.name)}' cannot stand in a recipe file"
            raise GGUFError(problem, subject=tensor.name, hint="Leave out --export-recipe.")
    lines = [f"# {line}" for line in comments or [f"{plan.arch.title}, {plan.label}: {plan.bpw:.2f} bits per weight"]]
    lines += [f"{t.name}={t.qtype.name}" for t in plan.tensors]
    lines += [f"{WEIGHTING} {t.name}={t.weighting.value}" for t in plan.tensors if t.weighting is not Weighting.FULL]
    return "\n".join(lines) + "\n"
