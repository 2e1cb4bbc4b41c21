# SPDX-License-Identifier: Apache-2.0
"""Make a GGUF file of a diffusion model or text encoder: read any source, choose a type per tensor, quantize, write.

    python tools/convert.py --src flux1-dev.safetensors --type Q4_K_S
    python tools/convert.py --src flux1-dev.safetensors                     its own precision, in GGUF
    python tools/convert.py --src folder-of-shards --type Q5_K_M --dry-run  what would be written, and how large
    python tools/convert.py --src model.ckpt --type Q4_K_M --tensor-type 'to_v=Q6_K' --tensor-type '^proj_out=F16'
    python tools/convert.py --src model.safetensors --type auto --max-size 6.0GB --imatrix model.imatrix.gguf
    python tools/convert.py --src t5xxl_fp16.safetensors --type Q8_0        a text encoder, for CLIPLoader (GGUF)

Sources: .safetensors (one file, shards with an index, a diffusers folder), .ckpt .pt .pth .bin, whole checkpoints (the
diffusion model is taken out), text encoders under the names that ComfyUI or their makers give them, fp8 plain and
scaled, and GGUF in 16 or 32 bit. Tensors are read one after another.
Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.errors import GGUFError, name_list
from gguf_kit.quantize.convert import Conversion, check_importance, convert, tensors_without_importance
from gguf_kit.quantize.encode import Engine, useful_threads
from gguf_kit.quantize.imatrix import Imatrix, Weighting, read_imatrix
from gguf_kit.quantize.plan import Choices, PlannedTensor, make_plan
from gguf_kit.quantize.recipe_files import recipe_text
from gguf_kit.quantize.recipes import TYPE_NAMES
from gguf_kit.quantize.sources import Source, open_source
from gguf_kit.quantize.tune import Goal, KeepPolicy, Task, Tuned
from gguf_kit.quantize.writer import file_exists, file_size, merged_metadata
from gguf_kit.tools import tune
from gguf_kit.tools._command import run_command, say, tell_leftovers, write_text
from gguf_kit.tools._options import (
    GOAL_HINT,
    add_choice_options,
    add_engine_options,
    add_tuning_options,
    choose_engine,
    destination,
    model_name,
    read_choices,
    read_goal,
)
from gguf_kit.tools._output import write_out
from gguf_kit.tools._plan_table import describe, size_line

AUTO = "auto"  # the type that is none: types chosen by measured costs


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of convert.py and quantize.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", type=Path, required=True, metavar="FILE|DIR", help="the model to convert")
    add("--dst", type=Path, metavar="FILE|DIR", help="the file to write (NAME-TYPE.gguf beside the source)")
    add("--type", default="", metavar="TYPE", help=f"{', '.join(TYPE_NAMES)}, {AUTO} (the source's own precision)")
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix in one of llama.cpp's formats")
    add_choice_options(parser)
    add("--export-recipe", type=Path, metavar="FILE", help="write the types that were chosen, one NAME=QTYPE per line")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add_engine_options(parser)
    add("--dry-run", action="store_true", help="show the plan and write no file; only --type auto reads data")
    add("--json", action="store_true", help="print the plan (--dry-run) or the result as JSON")
    add_tuning_options(parser, f"--type {AUTO}: types chosen by what each costs each tensor (see tune.py)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert as the options say."""
    choices, goal = replace(read_choices(args), type_name=read_type(args)), read_auto_goal(args)
    source = open_source(args.src)
    with_rows = goal is not None or Weighting.MIXED in choices.weightings.values()
    imatrix = read_imatrix(args.imatrix, with_rows=with_rows) if args.imatrix else None
    made = make_conversion(args, source, choices, imatrix, goal)
    conversion, path, plan = made.conversion, made.path, made.conversion.plan
    check_importance(conversion)
    for line in notes(source, conversion):
        say(f"{args.prog}: {line}")
    if args.export_recipe:
        write_text(args.export_recipe, made.tuned.recipe() if made.tuned else recipe_text(plan), args.overwrite)
    n_bytes = file_size(plan, conversion.header)
    as_json = made.tuned.as_json() if made.tuned else plan.as_json(n_bytes)
    if args.dry_run:
        write_out((json.dumps(as_json, indent=1) if args.json else describe(plan, path, n_bytes)) + "\n")
        return 0
    started = time.monotonic()
    engine = write_file(args, conversion, path)
    seconds = time.monotonic() - started
    result = {"path": str(path), "engine": engine.name, "seconds": seconds} | as_json
    line = f"{path}: {size_line(plan, n_bytes)}, made in {seconds:.0f} s by {engine.name}"
    write_out((json.dumps(result) if args.json else line) + "\n")
    return 0


def read_type(args: argparse.Namespace) -> str:
    """The type of --type, "" for none and for AUTO."""
    type_name: str = args.type.upper()
    if type_name and type_name not in (*TYPE_NAMES, AUTO.upper()):
        raise GGUFError(f"--type '{args.type}' is not known", hint=f"Types: {', '.join(TYPE_NAMES)}, {AUTO}.")
    return "" if type_name == AUTO.upper() else type_name


def read_auto_goal(args: argparse.Namespace) -> Goal | None:
    """What --type auto is to reach, None for other types."""
    goal, is_auto = read_goal(args), args.type.upper() == AUTO.upper()
    if goal and not is_auto:
        raise GGUFError(f"--max-size, --target-bpw and --max-error are for --type {AUTO}", hint="Give that type.")
    if is_auto and goal is None:
        raise GGUFError(f"--type {AUTO} has nothing to aim at", hint=GOAL_HINT)
    return goal


@dataclass(frozen=True)
class Made:
    """What is to be written where; `tuned` says how its types were chosen, if they were."""

    conversion: Conversion
    path: Path
    tuned: Tuned | None = None


def make_conversion(
    args: argparse.Namespace, source: Source, choices: Choices, imatrix: Imatrix | None, goal: Goal | None
) -> Made:
    """Decide about every type, by a plan or by measured costs."""
    name = model_name(args.src.absolute())
    if goal is None:
        plan = make_plan(source, choices)
        label = args.recipe.stem.removeprefix(f"{name}-") if args.recipe and not args.type else plan.label
        return Made(Conversion(source, plan, name, imatrix), destination(args, f"{label}.gguf"))
    path = destination(args, f"{AUTO}-{goal.text}.gguf")
    if not args.dry_run:
        refuse_existing(args, path)  # before hours of measuring
    task = Task(source, name, imatrix, KeepPolicy(args.keep_policy), choices)
    tuned = tune.tune_model(args, task, goal, path)
    for line in tune.result_lines(tuned):
        say(f"{args.prog}: {line}")
    return Made(Conversion(source, tuned.plan, name, imatrix), path, tuned)


def refuse_existing(args: argparse.Namespace, path: Path) -> None:
    """Refuse to write over a file unasked."""
    if path.exists() and not args.overwrite:
        raise file_exists(path)


def write_file(args: argparse.Namespace, conversion: Conversion, path: Path) -> Engine:
    """Write the file with a progress bar; the engine that did it."""
    plan = conversion.plan
    refuse_existing(args, path)  # before an engine is built
    tell_leftovers(args.prog, path)
    engine = choose_engine(args, [tensor.qtype for tensor in plan.tensors])
    torch.set_num_threads(1)  # the threads are ours
    label = AUTO if args.type.upper() == AUTO.upper() else plan.label
    with tqdm(total=plan.data_bytes, unit="B", unit_scale=True, desc=label, disable=None, smoothing=0.1) as bar:
        progress = bar_updater(bar)
        n_threads = useful_threads(engine, args.threads)
        convert(conversion, path, engine, n_threads=n_threads, overwrite=args.overwrite, progress=progress)
    return engine


def bar_updater(bar: tqdm) -> Callable[[PlannedTensor, int], None]:
    """A progress function that shows the tensor at work and its type."""

    def update(tensor: PlannedTensor, n_bytes: int) -> None:
        bar.set_postfix_str(f"{tensor.qtype.name} {tensor.name[-40:]}", refresh=False)
        bar.update(n_bytes)

    return update


def notes(source: Source, conversion: Conversion) -> list[str]:
    """Everything that the user should know before it starts."""
    found = [*source.notes, *conversion.plan.warnings, *merged_metadata(source.metadata)[1]]
    without = tensors_without_importance(conversion)
    if without:
        found.append(f"{len(without)} quantized tensors are not in the importance matrix: {name_list(without)}")
    return found


def main(argv: Sequence[str] | None = None, *, prog: str = "convert", description: str = __doc__ or "") -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser(description).parse_args(argv)
    args.prog = prog
    return run_command(prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
