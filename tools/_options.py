# SPDX-License-Identifier: Apache-2.0
"""Options that several command lines have, and what they stand for: types, goals, the engine, names of files."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType as QType
from gguf_kit.dequant import PLAIN_DTYPES
from gguf_kit.errors import GGUFError, plain_text
from gguf_kit.models import archs
from gguf_kit.quantize import ggml
from gguf_kit.quantize.encode import ENGINES, Engine, GgmlEngine, TorchEngine
from gguf_kit.quantize.plan import Choices
from gguf_kit.quantize.recipe_files import RecipeFile, parse_qtype, read_recipe_file
from gguf_kit.quantize.recipes import PLAIN_TYPES
from gguf_kit.quantize.sensitivity import DEFAULT_QTYPES, DEFAULT_SAMPLE_ROWS
from gguf_kit.quantize.tune import Goal, KeepPolicy
from gguf_kit.tools._command import check_destination, say
from gguf_kit.tools.llama_cpp import build

ARCH_NAMES = tuple(dict.fromkeys(arch.name for arch in (*archs.ARCHS, *archs.ENCODERS, archs.GENERIC)))
PRECISION_ENDINGS = tuple(f"-{name}" for name in PLAIN_TYPES)
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT")
}
GOAL_HINT = "Give one of --max-size, --target-bpw and --max-error."
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """What a user may say about architecture and single tensors."""
    add = parser.add_argument
    add("--arch", default="", metavar="NAME", help=f"do not detect it: {', '.join(ARCH_NAMES)}")
    add(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=QTYPE",
        help="type of the tensors whose name the pattern is found in; may be repeated, the first that fits wins",
    )
    add("--recipe", type=Path, metavar="FILE", help="type of each tensor, one NAME=QTYPE per line, as exported")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Where and on how many processors weights are encoded."""
    add = parser.add_argument
    add("--threads", type=int, default=default_threads(), metavar="N", help="processors to use (all there are)")
    add("--engine", choices=ENGINES, default="auto", help="ggml: C code, built on first use; torch: slower, anywhere")
    add(
        "--device",
        default="",
        metavar="DEVICE",
        help="where the torch engine computes: cpu, cuda (cuda if there is one)",
    )


def add_tuning_options(parser: argparse.ArgumentParser, title: str) -> None:
    """What types are to be chosen for, and how they are measured."""
    group = parser.add_argument_group(title)
    add = group.add_argument
    add("--max-size", metavar="SIZE", help="of the file, which uses all of it: 6.0GB, 5.2GiB, 4500MB, or bytes")
    add("--target-bpw", type=float, metavar="X", help="the same as bits per weight over all tensors")
    add(
        "--max-error",
        type=float,
        metavar="E",
        help="make the smallest file whose predicted relative error is not above",
    )
    add(
        "--keep-policy",
        choices=[policy.value for policy in KeepPolicy],
        default=KeepPolicy.KEPT.value,
        help="embedders and final layers: kept as the source has them, or free to be chosen (kept)",
    )
    add("--types", metavar="QTYPE,...", help=f"types to choose from ({','.join(q.name for q in DEFAULT_QTYPES)})")
    add(
        "--sample-rows",
        type=int,
        default=DEFAULT_SAMPLE_ROWS,
        metavar="N",
        help=f"rows to measure of each tensor, 0 for all ({DEFAULT_SAMPLE_ROWS})",
    )
    add("--cache", type=Path, metavar="FILE", help="where measurements are kept (NAME.costs.jsonl beside the result)")


def default_threads() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_choices(args: argparse.Namespace) -> Choices:
    """What the command line says about architecture and single tensors; the type is left open.

    Raises:
        GGUFError: it cannot be understood.
    """
    if args.threads < 1:
        raise GGUFError(f"--threads {args.threads} is less than 1", hint="Leave it out to use all processors.")
    overrides = []
    for text in args.tensor_type:
        pattern, separator, qtype_name = text.rpartition("=")
        if not separator or not pattern:
            raise GGUFError(f"--tensor-type '{text}' is not of the form REGEX=QTYPE", hint="Example: 'attn_v=Q6_K'.")
        try:
            overrides.append((re.compile(pattern), parse_qtype(qtype_name)))
        except re.error as error:
            raise GGUFError(f"--tensor-type '{text}': {error}", hint="Correct the pattern.") from error
    recipe = read_recipe_file(args.recipe) if args.recipe else RecipeFile()
    has_imatrix = args.imatrix is not None
    return Choices("", args.arch, tuple(overrides), recipe.types, has_imatrix, recipe.weightings)


def read_goal(args: argparse.Namespace) -> Goal | None:
    """What types are to be chosen for; None if that is not asked.

    Raises:
        GGUFError: there are several, or a number is none of its kind.
    """
    if sum(value is not None for value in (args.max_size, args.target_bpw, args.max_error)) > 1:
        raise GGUFError("there are several goals", hint=GOAL_HINT)
    for option, value in ("--target-bpw", args.target_bpw), ("--max-error", args.max_error):
        if value is not None and not 0 < value < math.inf:
            raise GGUFError(f"{option} {value:g} is not a number above 0", hint="Give another.")
    if args.max_size is not None:
        n_bytes, text = parse_size(args.max_size)
        return Goal(max_bytes=n_bytes, text=text)
    if args.target_bpw is not None:
        return Goal(bits_per_weight=args.target_bpw, text=f"{args.target_bpw:g}bpw")
    return None if args.max_error is None else Goal(max_error=args.max_error, text=f"error{args.max_error:g}")


def parse_size(text: str) -> tuple[int, str]:
    """(bytes, the same as it may stand in the name of a file) of a size such as 6.0GB, 5.2GiB, 4500MB or 123456."""
    match = SIZE.fullmatch(text.strip())
    if not match or match[2].upper() not in UNITS:
        problem = f"--max-size '{plain_text(text)}' is no size"
        raise GGUFError(problem, hint="Examples: 6.0GB, 5.2GiB, 4500MB, or bytes.")
    n_bytes = int(Fraction(match[1]) * UNITS[match[2].upper()])
    return n_bytes, f"{match[1]}{match[2] or 'B'}"


def read_qtypes(args: argparse.Namespace) -> tuple[QType, ...]:
    """The types of --types, or those that are usually worth a try.

    Raises:
        GGUFError: one is no type, or quantizes nothing.
    """
    if args.types is None:
        return DEFAULT_QTYPES
    qtypes = tuple(dict.fromkeys(parse_qtype(name, where="--types") for name in args.types.split(",")))
    plain = [qtype.name for qtype in qtypes if qtype in PLAIN_DTYPES]
    if plain:
        hint = "Leave it out; the source's own precision is always among the candidates."
        raise GGUFError(f"--types: {plain[0]} quantizes nothing", hint=hint)
    return qtypes


def model_name(src: Path) -> str:
    """Name of the model: that of its file or folder, without the precision that a first step put behind it."""
    stem = src.name if src.is_dir() else src.stem
    if src.suffix != ".gguf":
        return stem
    return next((stem.removesuffix(end) for end in PRECISION_ENDINGS if stem.endswith(end)), stem)


def destination(args: argparse.Namespace, ending: str) -> Path:
    """Where the file goes: --dst, a folder's NAME-ending, or the same beside the source.

    Raises:
        GGUFError: it is what is read, or there is no such folder.
    """
    src = args.src.absolute()  # a link gives its own name, not that of what it leads to
    name = f"{model_name(src)}-{ending}"
    if args.dst is None:
        path = src.parent / name
    else:
        path = args.dst / name if args.dst.is_dir() else args.dst
    path = Path(os.path.realpath(path))
    check_destination(path, src)
    if not path.parent.is_dir():
        raise GGUFError(f"there is no folder {path.parent}", path=path, hint="Make it first, or name another.")
    return path


def choose_engine(args: argparse.Namespace, qtypes: Iterable[QType]) -> Engine:
    """The engine of --engine; auto takes ggml, building it on first use, and torch where it cannot be had.

    Args:
        qtypes: that it is to make.
    """
    if args.device and args.engine == "ggml":
        raise GGUFError("--device is for the torch engine", hint="Leave out --engine ggml.")
    if args.engine == "torch" or args.device:
        return TorchEngine(choose_device(args.device))
    if all(qtype in PLAIN_DTYPES for qtype in qtypes):
        return TorchEngine()
    try:
        return GgmlEngine(ggml.find_library() or build.build_ggml(lambda line: say(f"{args.prog}: {line}")))
    except ggml.BuildError as error:
        if args.engine == "ggml":
            raise
        say(f"{args.prog}: {error} Going on with the torch engine, which is slower.")
        return TorchEngine(choose_device(args.device))


def choose_device(name: str) -> torch.device:
    """Where the torch engine computes: --device, which must work, else a CUDA device if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise GGUFError(f"--device {name} cannot be used: {reason}", hint="Leave out --device.") from error
