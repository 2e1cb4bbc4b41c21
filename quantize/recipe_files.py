# SPDX-License-Identifier: Apache-2.0
"""Recipe files: the type of each tensor by its whole name, one `name=TYPE` per line, as llama-quantize reads them too.

The name is everything before the last `=`; empty lines and lines that start with `#` are comments.
"""

from __future__ import annotations

from pathlib import Path

from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, plain_text
from ..layouts import LAYOUTS
from .plan import STORED_TYPES, Plan

# What a user may name: every type that is dequantized here, and the integers that a recipe file repeats.
QTYPE_NAMES = tuple(dict.fromkeys(q.name for q in (*LAYOUTS, *STORED_TYPES.values())))


def parse_qtype(text: str, *, path: Path | None = None, where: str = "--tensor-type") -> QType:
    """The type of a name, in upper or lower case."""
    name = text.strip().upper()
    if name not in QTYPE_NAMES:
        problem = f"{where}: '{plain_text(text)}' is no type of tensors"
        raise GGUFError(problem, path=path, hint=f"Types: {', '.join(QTYPE_NAMES)}.")
    return QType[name]


def read_recipe_file(path: Path) -> dict[str, QType]:
    """Read name -> type.

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


def parse_recipe(text: str, path: Path | None = None) -> dict[str, QType]:
    """The same for the text of a recipe file.

    Args:
        path: where it comes from, for errors; None: the user has typed it.
    """
    of_recipe = "" if path else "of the recipe "
    exact: dict[str, QType] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        name, separator, type_name = line.rpartition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not separator or not name or name in exact:
            problem = "names a tensor twice" if name in exact else "is not of the form name=TYPE"
            raise GGUFError(
                f"line {number} {of_recipe}{problem}: '{plain_text(line)}'", path=path, hint="Correct that line."
            )
        exact[name] = parse_qtype(type_name, path=path, where=f"line {number} {of_recipe}".rstrip())
    return exact


def recipe_text(plan: Plan) -> str:
    """The plan as a recipe file.

    Raises:
        GGUFError: a tensor's name cannot stand in one.
    """
    for tensor in plan.tensors:
        if tensor.name.startswith("#") or "\n" in tensor.name or tensor.name.endswith("\r") or not tensor.name:
            problem = f"the name of tensor '{plain_text(tensor.name)}' cannot stand in a recipe file"
            raise GGUFError(problem, subject=tensor.name, hint="Leave out --export-recipe.")
    head = f"# {plan.arch.title}, {plan.label}: {plan.bpw:.2f} bits per weight\n"
    return head + "".join(f"{t.name}={t.qtype.name}\n" for t in plan.tensors)
