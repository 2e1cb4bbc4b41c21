# SPDX-License-Identifier: Apache-2.0
"""Shows, joins and rewrites importance matrices.

    python tools/imatrix.py show flux.imatrix.gguf                 what it knows of each weight, as a table
    python tools/imatrix.py merge all.gguf one.gguf two.gguf       one of several runs of the same model
    python tools/imatrix.py convert old.dat new.gguf               from one of llama.cpp's formats to the other
    python tools/imatrix.py reduce full.gguf for-llama.gguf --recipe recipe.txt
                                                                   what llama-quantize needs to follow a recipe

Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.errors import GGUFError, plain_text
from gguf_kit.quantize.imatrix import Entry, Imatrix, read_imatrix
from gguf_kit.quantize.imatrix_merge import merge, reduce_imatrix
from gguf_kit.quantize.imatrix_write import write_imatrix, write_legacy
from gguf_kit.quantize.recipe_files import read_recipe_file
from gguf_kit.quantize.writer import file_exists
from gguf_kit.tools._command import check_destination, run_command, say, tell_leftovers
from gguf_kit.tools._output import write_out

PROG = "imatrix"
SHOW_EPILOG = """\
columns of the table, and keys of --json under entries (a list, sorted by name or --sort):
  columns, matrices (more than one: experts), count (rows of inputs that were summed),
  mean (of the squared inputs), top1_share (how much of their sum is in the 1 % of the columns that have most),
  effective (number of equal columns that would be as uneven: (sum m)^2 / sum m^2; small: few columns matter),
  rows (recorded as they were), gain (squared error of the result per squared error of this layer's output), calls
--json writes schema (1), file, datasets, chunk_count, chunk_size, entries [{name, ...}]; what is not known is null.
"""
SCHEMA = 1
TOP_SHARE = 0.01  # of the columns
Write = Callable[..., None]
WRITERS: dict[str, Write] = {"gguf": write_imatrix, "legacy": write_legacy}


@dataclass(frozen=True)
class Row:
    """An entry in figures; SHOW_EPILOG says what they are."""

    name: str
    columns: int
    matrices: int
    count: float
    mean: float
    top1_share: float
    effective: float
    rows: int
    gain: float | None
    calls: float


def by_number(name: str) -> list[str | int]:
    """A key that sorts block 2 before block 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: by_number(row.name),
    "mean": lambda row: -row.mean,
    "top": lambda row: -row.top1_share,
    "effective": lambda row: row.effective / row.columns,
    "gain": lambda row: -1.0 if row.gain is None else -row.gain,
}


def make_parser() -> argparse.ArgumentParser:
    """The subcommands and their options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="a table of the entries", epilog=SHOW_EPILOG, formatter_class=raw)
    show.add_argument("file", type=Path, metavar="FILE", help="importance matrix in one of llama.cpp's formats")
    show.add_argument("--sort", choices=tuple(SORTS), default="name", help="order of the entries (name)")
    show.add_argument("--json", action="store_true", help="one JSON document instead of text, see below")
    show.set_defaults(run=run_show)

    join = commands.add_parser("merge", help="one file of several of the same model")
    join.add_argument("out", type=Path, metavar="OUT", help="the file to write, GGUF")
    join.add_argument("files", type=Path, nargs="+", metavar="IN", help="files of either format")
    join.add_argument(
        "--rows", type=row_count, metavar="N", help="recorded rows to keep of a weight (as many as the file with most)"
    )
    join.set_defaults(run=run_merge)

    change = commands.add_parser("convert", help="write the other format, or leave parts out")
    change.add_argument("file", type=Path, metavar="IN", help="a file of either format")
    change.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    change.add_argument("--format", choices=tuple(WRITERS), default="gguf", help="legacy: llama.cpp's older one (gguf)")
    change.add_argument("--without-rows", action="store_true", help="leave out recorded rows, most of a file's size")
    change.set_defaults(run=run_convert)

    shrink = commands.add_parser("reduce", help="what llama-quantize needs to follow a recipe with weightings")
    shrink.add_argument("file", type=Path, metavar="IN", help="the file that the recipe was made with")
    shrink.add_argument("out", type=Path, metavar="OUT", help="the file to write, GGUF")
    shrink.add_argument(
        "--recipe", type=Path, required=True, metavar="FILE", help="the recipe, as convert.py exports it"
    )
    shrink.set_defaults(run=run_reduce)
    for command in (join, change, shrink):
        command.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def row_count(text: str) -> int:
    """A number of rows on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def run_show(args: argparse.Namespace) -> None:
    """Print the table, or the JSON document."""
    imatrix = read_imatrix(args.file)
    rows = sorted((describe(name, entry) for name, entry in imatrix.entries.items()), key=SORTS[args.sort])
    write_out((to_json(imatrix, rows) if args.json else "\n".join([*show_head(imatrix), "", *show_rows(rows)])) + "\n")


def run_merge(args: argparse.Namespace) -> None:
    """Join files."""
    check_output(args, *args.files)
    merged = merge([read_imatrix(path) for path in args.files], max_rows=args.rows)
    write(args, merged, write_imatrix)


def run_convert(args: argparse.Namespace) -> None:
    """Write a file again, in the format and with the parts that were asked for."""
    check_output(args, args.file)
    imatrix = read_imatrix(args.file, with_rows=not args.without_rows)
    lost = lost_parts(imatrix) if args.format == "legacy" else []
    if lost:
        say(f"{PROG}: the older format has no place for {' and '.join(lost)}, which are left out")
    write(args, imatrix, WRITERS[args.format])


def run_reduce(args: argparse.Namespace) -> None:
    """Write what a recipe's weightings make of a file."""
    check_output(args, args.file, args.recipe)
    imatrix = read_imatrix(args.file, with_rows=False)
    recipe = read_recipe_file(args.recipe)
    if not recipe.types.keys() & imatrix.entries.keys():
        hint = "Take the importance matrix that the recipe was made with."
        raise GGUFError("none of its entries is a tensor of the recipe", path=args.file, hint=hint)
    write(args, reduce_imatrix(imatrix, recipe.weightings), write_imatrix)


def check_output(args: argparse.Namespace, *inputs: Path) -> None:
    """Refuse a file to write that is also read or exists, before anything is read."""
    check_destination(args.out, *inputs)
    if args.out.exists() and not args.overwrite:
        raise file_exists(args.out)
    tell_leftovers(PROG, args.out)


def write(args: argparse.Namespace, imatrix: Imatrix, writer: Write) -> None:
    """Write the file and say what it is."""
    writer(imatrix, args.out, overwrite=args.overwrite)
    write_out(f"{args.out}: {len(imatrix.entries)} entries, {args.out.stat().st_size / 1e6:.2f} MB\n")


def lost_parts(imatrix: Imatrix) -> list[str]:
    """What the older format cannot hold of the entries that were read."""
    entries = imatrix.entries.values()
    found = {
        "recorded rows": any(entry.rows is not None for entry in entries),
        "gains": any(entry.gain is not None for entry in entries),
        "sums of inputs": any(entry.in_sum is not None for entry in entries),
        "entries that were never used": any(not float(entry.counts.max()) for entry in entries),
    }
    return [part for part, is_there in found.items() if is_there]


def describe(name: str, entry: Entry) -> Row:
    """An entry's figures; of experts the means over all."""
    means = entry.means.double()  # (n_matrices, n_columns)
    sums = means.sum(1).clamp_min(math.ulp(0.0))
    n_top = max(1, round(TOP_SHARE * entry.n_columns))
    top = means.topk(n_top, dim=1).values.sum(1)
    scaled = means / means.amax(1, keepdim=True).clamp_min(math.ulp(0.0))  # squares of small means would vanish
    effective = scaled.sum(1) ** 2 / (scaled**2).sum(1).clamp_min(math.ulp(0.0))
    return Row(
        name=name,
        columns=entry.n_columns,
        matrices=entry.n_matrices,
        count=float(entry.counts.double().sum()),
        mean=float(means.mean()),
        top1_share=float((top / sums).mean()),
        effective=float(effective.mean()),
        rows=0 if entry.rows is None else len(entry.rows),
        gain=entry.gain,
        calls=entry.gain_calls,
    )


def to_json(imatrix: Imatrix, rows: Sequence[Row]) -> str:
    """The document that --json prints."""
    head = {"schema": SCHEMA, "file": imatrix.path.name, "datasets": list(imatrix.datasets)}
    chunks = {"chunk_count": imatrix.chunk_count, "chunk_size": imatrix.chunk_size}
    return json.dumps({**head, **chunks, "entries": [vars(row) for row in rows]}, indent=1, allow_nan=False)


def show_head(imatrix: Imatrix) -> list[str]:
    """What is known of the whole."""
    entries = imatrix.entries.values()
    n_rows = sum(len(entry.rows) for entry in entries if entry.rows is not None)
    n_gains = sum(entry.gain is not None for entry in entries)
    size = f"{imatrix.chunk_size} rows each" if imatrix.chunk_size else "of unknown size"
    lines = [f"{imatrix.path.name}: {len(entries)} entries, {n_rows} recorded rows, {n_gains} gains"]
    lines.append(f"made of {imatrix.chunk_count} chunks, {size}")
    return lines + [f"dataset: {plain_text(dataset)}" for dataset in imatrix.datasets]


def show_rows(rows: Sequence[Row]) -> list[str]:
    """The table of entries."""
    lines = [
        f"{'columns':>8} {'count':>10} {'mean':>10} {'top 1 %':>8} {'effective':>10} {'rows':>6} {'gain':>10}  name"
    ]
    for row in rows:
        gain = "-" if row.gain is None else f"{row.gain:.3g}"
        experts = f" ({row.matrices} experts)" if row.matrices > 1 else ""
        effective = f"{row.effective:.0f}"
        lines.append(
            f"{row.columns:>8} {row.count:>10.0f} {row.mean:>10.3g} {row.top1_share:>8.1%} {effective:>10}"
            f" {row.rows or '-':>6} {gain:>10}  {plain_text(row.name)}{experts}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser().parse_args(argv)

    def command() -> int:
        args.run(args)
        return 0

    return run_command(PROG, command)


if __name__ == "__main__":
    sys.exit(main())
