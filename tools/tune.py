# SPDX-License-Identifier: Apache-2.0
"""Choose a type for each tensor by what each type costs it: a recipe for convert.py that fits a size.

    python tools/tune.py --src flux1-dev.safetensors --imatrix flux1-dev.imatrix.gguf --max-size 6.0GB
    python tools/tune.py --src model.safetensors --imatrix model.imatrix.gguf --target-bpw 3.5 --keep-policy free
    python tools/tune.py --src model.safetensors --imatrix model.imatrix.gguf --max-error 0.1
    python tools/convert.py --src model.safetensors --recipe model-auto-error0.1.txt --imatrix model.imatrix.gguf

Every type really encodes some rows of each tensor, with and without the importance matrix, and the error of the layer's
outputs is measured on the inputs that the importance matrix recorded. What is measured is kept in --cache: a run that
was stopped goes on where it was, and another size takes seconds.
Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.dequant import PLAIN_DTYPES
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.convert import Conversion, check_importance
from gguf_kit.quantize.encode import check_engine
from gguf_kit.quantize.imatrix import read_imatrix
from gguf_kit.quantize.sensitivity import Progress, TensorCosts, measure
from gguf_kit.quantize.sources import open_source
from gguf_kit.quantize.tune import Goal, KeepPolicy, Task, Tuned, tune
from gguf_kit.quantize.writer import file_exists
from gguf_kit.tools._command import run_command, say, write_text
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
    read_qtypes,
)
from gguf_kit.tools._output import write_out
from gguf_kit.tools._plan_table import describe

CACHE_ENDING = ".costs.jsonl"


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", type=Path, required=True, metavar="FILE|DIR", help="the model, as convert.py reads it")
    add("--dst", type=Path, metavar="FILE|DIR", help="the recipe to write (NAME-auto-SIZE.txt beside the source)")
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix, best with recorded rows and gains")
    add_tuning_options(parser, "what to choose, and how it is measured")
    add_choice_options(parser)
    add_engine_options(parser)
    add("--overwrite", action="store_true", help="replace the recipe if it exists")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Choose as the options say and write the recipe."""
    choices, goal = read_choices(args), read_goal(args)
    if goal is None:
        raise GGUFError("there is nothing to aim at", hint=GOAL_HINT)
    path = destination(args, f"auto-{goal.text}.txt")
    if path.exists() and not args.overwrite:
        raise file_exists(path)
    source = open_source(args.src)
    imatrix = read_imatrix(args.imatrix) if args.imatrix else None
    task = Task(source, model_name(args.src.absolute()), imatrix, KeepPolicy(args.keep_policy), choices)
    tuned = tune_model(args, task, goal, path)
    for line in (*source.notes, *tuned.plan.warnings):
        say(f"{args.prog}: {line}")
    write_text(path, tuned.recipe(), args.overwrite)
    if args.json:
        write_out(json.dumps({"path": str(path)} | tuned.as_json()) + "\n")
    else:
        lines = [describe(tuned.plan, path, tuned.file_bytes), *result_lines(tuned), next_line(args, path)]
        write_out("\n".join(lines) + "\n")
    return 0


def tune_model(args: argparse.Namespace, task: Task, goal: Goal, path: Path) -> Tuned:
    """Measure with a progress bar, then choose.

    Args:
        path: what is made, beside which measurements are kept.
    Raises:
        GGUFError: the goal cannot be reached, or the model cannot be measured.
    """
    check_importance(Conversion(task.source, task.base, task.name, task.imatrix))
    return tune(task, measure_model(args, task, path), goal)


def measure_model(args: argparse.Namespace, task: Task, path: Path) -> tuple[TensorCosts, ...]:
    """The costs of all tensors that may be chosen for."""
    qtypes = read_qtypes(args)
    engine = choose_engine(args, qtypes)
    if args.types is not None:
        check_engine(engine, frozenset(qtypes))
    torch.set_num_threads(1)  # the threads are ours
    with tqdm(
        total=1.0, desc="measuring", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", disable=None
    ) as bar:
        return measure(
            task.source,
            task.free,
            task.imatrix,
            engine,
            qtypes=qtypes,
            sample_rows=args.sample_rows,
            n_threads=args.threads,
            cache=args.cache or path.with_name(task.name + CACHE_ENDING),
            progress=bar_updater(bar),
            arch=task.base.arch,
        )


def bar_updater(bar: tqdm) -> Progress:
    """A progress function that shows the tensor at work."""

    def update(name: str, fraction: float) -> None:
        bar.set_postfix_str(name[-40:], refresh=False)
        bar.update(fraction - bar.n)

    return update


def result_lines(tuned: Tuned) -> list[str]:
    """What was found, in a few lines."""
    counts = Counter(t.weighting.value for t in tuned.plan.tensors if t.qtype not in PLAIN_DTYPES)
    weightings = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    lines = [tuned.error_line(), tuned.gains_line()]
    lines += [f"weighting by the importance matrix: {weightings}"] if tuned.task.imatrix and counts else []
    return lines + ([tuned.fixed_line()] if tuned.fixed else [])


def next_line(args: argparse.Namespace, recipe: Path) -> str:
    """The command that makes the file."""
    imatrix = ["--imatrix", str(args.imatrix)] if args.imatrix else []
    command = ["python", "tools/convert.py", "--src", str(args.src), *imatrix, "--recipe", str(recipe)]
    return f"now: {shlex.join(command)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser().parse_args(argv)
    args.prog = "tune"
    return run_command("tune", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
