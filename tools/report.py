# SPDX-License-Identifier: Apache-2.0
"""Shows what every type costs a model and what recipes make of it: one HTML page with pictures, and these as PNG.

    python tools/report.py --src flux1-dev.safetensors --imatrix flux1-dev.gguf --recipe flux1-dev-auto-6.0GB.txt
    python tools/report.py --src model.safetensors --imatrix model.gguf --recipe a.txt --recipe b.txt --out report
    python tools/report.py --src model.safetensors --imatrix model.gguf --pictures demo-output/pictures --markdown

Costs are those that tools/tune.py measured: give the same --imatrix, --types, --sample-rows and --cache; what the cache
lacks is measured now. Needs matplotlib and scikit-image. The page, report.html, needs no other file and no network.
Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.errors import GGUFError, plain_text
from gguf_kit.gguf_file import DEFAULT_ALIGNMENT
from gguf_kit.quantize.imatrix import read_imatrix
from gguf_kit.quantize.plan import Choices, Plan, make_plan
from gguf_kit.quantize.recipe_files import parse_qtype, read_recipe_file
from gguf_kit.quantize.recipes import KEPT, RECIPES
from gguf_kit.quantize.sensitivity import DEFAULT_SAMPLE_ROWS, TensorCosts
from gguf_kit.quantize.sources import open_source
from gguf_kit.quantize.tune import KeepPolicy, Task, frontier
from gguf_kit.quantize.writer import Writer, file_exists
from gguf_kit.tools._command import run_command, say
from gguf_kit.tools._options import add_engine_options, model_name
from gguf_kit.tools._output import write_out
from gguf_kit.tools.report_data import Measured, Selection, has_gains, pick_recipe, require_all
from gguf_kit.tools.tune import measure_model

PAGE = "report.html"
MAPS = "Q2_K,Q3_K,Q4_K"
LIBRARIES = ("matplotlib", "skimage")
MAX_RESULTS_BYTES = 2**26
NUMBERS = ("mb", "bpw", "latent_error", "psnr_db", "ssim")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", type=Path, required=True, metavar="FILE|DIR", help="the model, as convert.py reads it")
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix that the costs were measured with")
    add("--recipe", type=Path, action="append", default=[], metavar="FILE", help="a recipe to look at; may be repeated")
    add("--out", type=Path, metavar="DIR", help=f"folder for {PAGE} and *.png (NAME-report beside the source)")
    add("--pictures", type=Path, metavar="DIR", help="pictures to compare: DIR/TYPE/NAME.png, one TYPE the reference")
    add("--reference", default="", metavar="TYPE", help="which TYPE that is (safetensors, reference or BF16)")
    add("--results", type=Path, metavar="FILE", help="measured errors (results.json in --pictures or beside it)")
    add("--maps", default=MAPS, metavar="QTYPE,...", help=f"heat maps of one type for all tensors ({MAPS})")
    add("--markdown", action="store_true", help="print the table of files in Markdown")
    add("--arch", default="", metavar="NAME", help="do not detect the architecture")
    add("--types", metavar="QTYPE,...", help="candidates, as given to tune.py")
    add("--sample-rows", type=int, default=DEFAULT_SAMPLE_ROWS, metavar="N", help="rows, as given to tune.py")
    add("--cache", type=Path, metavar="FILE", help="where measurements are kept (NAME.costs.jsonl beside the source)")
    add("--overwrite", action="store_true", help="replace an older report")
    add_engine_options(parser)
    return parser


def require_libraries() -> None:
    """Refuse to start without the libraries that draw.

    Raises:
        GGUFError: one is not installed.
    """
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            problem = f"{'scikit-image' if name == 'skimage' else name} is not installed"
            raise GGUFError(problem, hint="Run: pip install matplotlib scikit-image") from error


def run(args: argparse.Namespace) -> int:
    """Make the report as the options say."""
    require_libraries()
    from gguf_kit.tools import report_page
    from gguf_kit.tools.report_html import markdown_table

    src = args.src.absolute()
    out = args.out or src.parent / f"{model_name(src)}-report"
    if (out / PAGE).exists() and not args.overwrite:
        raise file_exists(out / PAGE)
    map_types = tuple(dict.fromkeys(parse_qtype(name, where="--maps") for name in args.maps.split(",") if name))
    report_page.check_names([path.stem for path in args.recipe])
    source = open_source(args.src)
    imatrix = read_imatrix(args.imatrix) if args.imatrix else None
    task = Task(source, model_name(src), imatrix, KeepPolicy.FREE, Choices(arch=args.arch))
    measured = read_results(args)
    chosen_files = [(path.stem, read_recipe_file(path)) for path in args.recipe]
    costs = measure_model(args, task, src)
    chosen = tuple(select_recipe(task, costs, name, found.types, found.weightings) for name, found in chosen_files)
    sheet, measured = look_at_pictures(args, measured)
    facts = report_page.Facts(
        f"{task.base.arch.title}: what types cost",
        tuple(about(task, costs)),
        costs,
        tuple(select_fixed(task, costs, with_imatrix=False)),
        tuple(select_fixed(task, costs, with_imatrix=True)) if imatrix else (),
        chosen,
        frontiers(task, costs),
        map_types,
        measured,
        sheet,
    )
    report = report_page.build_report(facts)
    write_report(out, report.page, report.pictures, args.overwrite)
    if args.markdown:
        write_out(markdown_table(report.summary))
    else:
        write_out(f"{out / PAGE}: {len(costs)} tensors, {len(report.pictures)} pictures beside it\n")
    return 0


def about(task: Task, costs: Sequence[TensorCosts]) -> list[str]:
    """What the report rests on."""
    gains = "with measured gains" if has_gains(costs) else "without measured gains: each layer counts the same"
    imatrix = f"importance matrix {task.imatrix.path.name}, {gains}" if task.imatrix else "no importance matrix"
    n_candidates = sum(len(tensor.candidates) for tensor in costs)
    return [
        f"{task.source.path.name}, {imatrix}.",
        f"{len(costs)} tensors with {n_candidates:,} candidates were really encoded; errors of files are predicted by "
        "adding up gain * error over tensors, as if layers did not depend on each other.",
    ]


def plan_rest(plan: Plan, costs: Iterable[TensorCosts]) -> tuple[int, int]:
    """Bytes, padded, and weights of the tensors of a plan that have no costs."""
    known = {tensor.name for tensor in costs}
    rest = [tensor for tensor in plan.tensors if tensor.name not in known]
    n_bytes = sum(tensor.n_bytes + -tensor.n_bytes % DEFAULT_ALIGNMENT for tensor in rest)
    return n_bytes, sum(prod(tensor.shape) for tensor in rest)


def select_recipe(task: Task, costs: Sequence[TensorCosts], name: str, types: Any, weightings: Any) -> Selection:
    """What a recipe file makes of the model.

    Raises:
        GGUFError: it is another model's, or has types whose costs are not known.
    """
    choices = replace(task.choices, exact=types, weightings=weightings, has_imatrix=task.imatrix is not None)
    plan = make_plan(task.source, choices)
    planned = {tensor.name: tensor.qtype for tensor in plan.tensors}
    picks, missing = pick_recipe(costs, planned, weightings)
    require_all(missing, name)
    return Selection(name, picks, *plan_rest(plan, costs), is_chosen=True)


def select_fixed(task: Task, costs: Sequence[TensorCosts], *, with_imatrix: bool) -> list[Selection]:
    """The fixed types whose costs are known; without an importance matrix those that do not need one."""
    found = []
    for name, recipe in RECIPES.items():
        if recipe.needs_imatrix and not with_imatrix:
            continue
        plan = make_plan(task.source, replace(task.choices, type_name=name, has_imatrix=True))
        planned = {tensor.name: tensor.qtype for tensor in plan.tensors}
        picks, missing = pick_recipe(costs, planned, {} if with_imatrix else None)
        if not missing:
            found.append(Selection(name, picks, *plan_rest(plan, costs)))
    return found


def frontiers(task: Task, costs: Sequence[TensorCosts]) -> dict[str, list[tuple[int, float]]]:
    """(bytes of all tensors, least squared error) of every size: all matrices chosen, or those in 16 bit left so."""
    rest = plan_rest(task.base, costs)[0]
    kept = [replace(t, candidates=t.candidates[:1]) if t.category in KEPT else t for t in costs]
    found = {"best choice for all matrices": costs, "best choice, embedders and final layers kept": kept}
    if all(tensor.category not in KEPT for tensor in costs):
        found = {"best choice": costs}
    return {label: [(rest + size, error) for size, error in frontier(each)] for label, each in found.items()}


def read_results(args: argparse.Namespace) -> tuple[Measured, ...]:
    """The measured errors, where there are any.

    Raises:
        GGUFError: the file is not of this form.
    """
    places = [args.results] if args.results else []
    if args.pictures and not places:
        places = [
            path for path in (args.pictures / "results.json", args.pictures.parent / "results.json") if path.exists()
        ]
    if not places:
        return ()
    path, hint = places[0], 'Expected a list of {"type": ..., "mb": ..., "latent_error": ...}, or {"rows": that list}.'
    try:
        if path.stat().st_size > MAX_RESULTS_BYTES:
            raise ValueError("it is too large")
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = document["rows"] if isinstance(document, dict) else document
        return tuple(_measured(row) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"these are no results: {plain_text(str(error)) or 'another form'}"
        raise GGUFError(problem, path=path, hint=hint) from error


def _measured(row: dict[str, Any]) -> Measured:
    """One row; null, as JSON has no infinity, is a PSNR of equal pictures."""
    numbers: dict[str, float | None] = {}
    for name in NUMBERS:
        value = row.get(name)
        numbers[name] = None if value is None else float(value)
        if value is not None and not (math.isfinite(float(value)) and float(value) >= 0):
            raise ValueError(f"{name} is {value}")
    if "psnr_db" in row and row["psnr_db"] is None and numbers["latent_error"] == 0:
        numbers["psnr_db"] = math.inf
    return Measured(str(row["type"]), **numbers)


def look_at_pictures(
    args: argparse.Namespace, measured: tuple[Measured, ...]
) -> tuple[tuple[bytes, str] | None, tuple[Measured, ...]]:
    """The contact sheet with a sentence about it, and the rows with what the pictures tell."""
    if not args.pictures:
        return None, measured
    from gguf_kit.tools import report_pictures

    gallery = report_pictures.find_pictures(args.pictures, args.reference)
    for line in report_pictures.check_names(gallery):
        say(f"{args.prog}: {line}")
    rows = {row.type: row for row in measured}
    qualities = report_pictures.compare_pictures(gallery)
    for name, (quality, _) in qualities.items():
        row = rows.get(name, Measured(name))
        psnr = quality.psnr_db if row.psnr_db is None else row.psnr_db
        rows[name] = replace(row, psnr_db=psnr, ssim=quality.ssim if row.ssim is None else row.ssim)
    labels = {
        name: f"{name}\n{row.mb:.2f} MB\nerror {row.latent_error:.4f}"
        for name, row in rows.items()
        if row.mb is not None and row.latent_error is not None
    }
    order = sorted(rows, key=lambda name: -(rows[name].mb or 0.0))
    png, n_shown = report_pictures.draw_contact_sheet(gallery, qualities, order, labels)
    text = (
        f"{n_shown} of {len(gallery.names)} pictures of each type, PSNR and SSIM against "
        f"{plain_text(gallery.reference)}, of whole pictures. In the table of "
        "files PSNR is over all pictures together, SSIM their mean."
    )
    return (png, text), tuple(rows.values())


def write_report(out: Path, page: str, pictures: Any, overwrite: bool) -> None:
    """Write the files, each complete or not at all, the page last."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        with Writer(out / name, len(data), overwrite=overwrite) as writer:
            writer.write(data)
    data = page.encode("utf-8")
    with Writer(out / PAGE, len(data), overwrite=overwrite) as writer:
        writer.write(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser().parse_args(argv)
    args.prog = "report"
    return run_command("report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
