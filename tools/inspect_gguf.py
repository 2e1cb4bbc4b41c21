# SPDX-License-Identifier: Apache-2.0
"""Shows what a GGUF file holds, checks its numbers, or compares it with another.

    python tools/inspect_gguf.py FILE                  model, types, metadata and tensors, from the header alone
    python tools/inspect_gguf.py FILE --metadata       every metadata value in full
    python tools/inspect_gguf.py FILE --check          look for scales and plain weights that are nan or inf
    python tools/inspect_gguf.py FILE --diff OTHER     tensor by tensor: types, shapes, errors of the weights

Of a split file any part stands for all parts, which are shown as one file; an offset counts within the tensor's part.
FILE is A and OTHER is B; the relative error of a tensor is ||B - A|| / ||A|| over its dequantized weights, so the types
may differ. Shapes are in torch order.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import _pack  # noqa: F401
from gguf_kit.errors import GGUFError, plain_text
from gguf_kit.gguf_file import ORIG_SHAPE_KEY, GGUFFile
from gguf_kit.models.split_files import open_gguf
from gguf_kit.quantize import compare, inspect
from gguf_kit.tools._output import one_line, write_out
from tqdm import tqdm

EPILOG = """\
exit status:
  0  done; nothing wrong under --check, all tensors equal under --diff (metadata does not count)
  1  --check found something, or the tensors differ
  2  usage or input error, one line on stderr

--json writes one document:
  schema (1), file, files (how many, if it is split), file_bytes, version, alignment, arch (general.architecture),
  model (what the tensors are, or ""), weights, tensor_bytes, bpw, qtypes [{qtype, tensors, weights, bytes, bpw}],
  metadata [{key, type, items, value}]   value is null for arrays of more than 16 items, unless --metadata is given
  tensors [{name, qtype, shape, stored_shape, bytes, weights, offset}]   not with --no-tensors or --metadata
  --check adds check {tensors, bytes, unchecked {name: reason},
                      problems [{name, qtype, part, nan, inf, numbers, first_block}]}
  --diff writes schema, a and b (as above, up to qtypes) and diff {equal, relative_error, max_error,
                      metadata [{key, a, b}], tensors [{name, status, relative_error, max_error, a, b}]}
    status is equal, different, shape, only_a or only_b; a and b of a tensor are {qtype, shape, stored_shape, bytes}
  Numbers that JSON lacks are the texts "nan", "inf" and "-inf".
"""
WORST = 30  # rows of the table of differences, unless told otherwise
STRUCTURAL = ("only_a", "only_b", "shape")
MIN_VALUE_WIDTH = 24

Document = dict[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; ends the process with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="a .gguf file")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="read all data and list numbers that are nan or inf")
    mode.add_argument("--diff", metavar="OTHER", help="compare FILE (A) with the .gguf file OTHER (B)")
    mode.add_argument("--metadata", action="store_true", help="only the metadata, every value in full")
    parser.add_argument("--no-tensors", action="store_true", help="leave out the table of tensors")
    parser.add_argument("--worst", type=count, default=WORST, metavar="N", help=f"differences shown ({WORST}; 0: all)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text, see below")
    return parser.parse_args(argv)


def count(text: str) -> int:
    """A number of rows on the command line."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def progress_bar(file: GGUFFile, label: str) -> Any:
    """A bar over the bytes of all tensors; only where stderr is a terminal."""
    n_bytes = sum(info.n_bytes for info in file.tensors.values())
    return tqdm(total=n_bytes, desc=label, unit="B", unit_scale=True, leave=False, disable=None)


def run(args: argparse.Namespace) -> tuple[str, int]:
    """The text to print and the exit status."""
    file = open_gguf(args.file)
    about = inspect.describe(file, None if args.metadata else inspect.MAX_ITEMS)
    if args.diff is not None:
        return run_diff(args, file, about)
    if args.check:
        with progress_bar(file, "checking") as bar:
            result = inspect.check(file, bar.update)
        status = 1 if result.problems else 0
        if args.json:
            return to_json(
                {**describe_as_json(about, tensors=not args.no_tensors), "check": check_as_json(result)}
            ), status
        return "\n".join([*show_header(about), "", *show_check(result), ""]), status
    if args.json:
        return to_json(describe_as_json(about, tensors=not (args.no_tensors or args.metadata))), 0
    if args.metadata:
        lines = [f"{row.key!r} {row.kind} = {inspect.plain_value(row.value)!r}" for row in about.metadata]
        return "".join(f"{line}\n" for line in lines), 0
    lines = [*show_header(about), "", *show_qtypes(about), "", *show_metadata(about)]
    if not args.no_tensors:
        lines += ["", *show_tensors(about)]
    return "\n".join([*lines, ""]), 0


def run_diff(args: argparse.Namespace, file: GGUFFile, about: inspect.Description) -> tuple[str, int]:
    """The comparison with the other file, and the exit status."""
    other = open_gguf(args.diff)
    about_other = inspect.describe(other)
    with progress_bar(file, "comparing") as bar:
        result = compare.compare(file, other, bar.update)
    status = 0 if result.equal else 1
    if args.json:
        sides = {"a": summary_as_json(about), "b": summary_as_json(about_other)}
        return to_json({"schema": 1, **sides, "diff": diff_as_json(result)}), status
    lines = ["A", *show_header(about), "", "B", *show_header(about_other), "", *show_diff(result, args.worst)]
    return "\n".join([*lines, ""]), status


def to_json(document: Document) -> str:
    """One strict JSON document in ASCII, so that no terminal or pipe can choke on it."""
    return json.dumps(_strict(document), indent=1, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary_as_json(about: inspect.Description) -> Document:
    """What --json says of a file as a whole."""
    return {
        "file": about.path,
        "files": about.n_files,
        "file_bytes": about.file_bytes,
        "version": about.version,
        "alignment": about.alignment,
        "arch": about.arch,
        "model": about.title,
        "weights": about.n_weights,
        "tensor_bytes": about.n_bytes,
        "bpw": about.bpw,
        "qtypes": [
            {
                "qtype": row.qtype.name,
                "tensors": row.n_tensors,
                "weights": row.n_weights,
                "bytes": row.n_bytes,
                "bpw": inspect.bits_per_weight(row.n_bytes, row.n_weights),
            }
            for row in about.qtypes
        ],
    }


def describe_as_json(about: inspect.Description, tensors: bool) -> Document:
    """The document of --json for one file."""
    document: Document = {"schema": 1, **summary_as_json(about)}
    document["metadata"] = [
        {"key": row.key, "type": row.kind, "items": row.n_items, "value": inspect.plain_value(row.value)}
        for row in about.metadata
    ]
    if tensors:
        document["tensors"] = [
            {"name": row.name, **tensor_as_json(row), "weights": row.n_weights, "offset": row.offset}
            for row in about.tensors
        ]
    return document


def tensor_as_json(row: inspect.TensorRow) -> Document:
    """How a tensor is stored."""
    return {"qtype": row.qtype.name, "shape": row.shape, "stored_shape": row.stored_shape, "bytes": row.n_bytes}


def check_as_json(result: inspect.CheckResult) -> Document:
    """The part that --check adds."""
    problems = [
        {
            "name": found.tensor,
            "qtype": found.qtype.name,
            "part": found.part,
            "nan": found.n_nan,
            "inf": found.n_inf,
            "numbers": found.n_numbers,
            "first_block": found.first_block,
        }
        for found in result.problems
    ]
    unchecked = dict(result.unchecked)
    return {"tensors": result.n_tensors, "bytes": result.n_bytes, "unchecked": unchecked, "problems": problems}


def diff_as_json(result: compare.Comparison) -> Document:
    """The part that --diff adds."""
    tensors = [
        {
            "name": diff.name,
            "status": diff.status,
            "relative_error": diff.relative_error,
            "max_error": diff.max_error,
            "a": tensor_as_json(diff.a) if diff.a else None,
            "b": tensor_as_json(diff.b) if diff.b else None,
        }
        for diff in result.tensors
    ]
    metadata = [
        {"key": key, "a": inspect.plain_value(a.value) if a else None, "b": inspect.plain_value(b.value) if b else None}
        for key, (a, b) in result.metadata.items()
    ]
    totals = {"equal": result.equal, "relative_error": result.relative_error, "max_error": result.max_error}
    return {**totals, "metadata": metadata, "tensors": tensors}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """Lines of a table: columns whose header is in `left` are left-aligned, the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    specs = [("<" if name in left else ">") + str(width) for name, width in zip(header, widths, strict=True)]
    specs[-1] = ""
    return ["  ".join(f"{cell:{spec}}" for cell, spec in zip(row, specs, strict=True)) for row in (header, *rows)]


def shape_text(shape: Sequence[int]) -> str:
    """A shape in torch order on few characters; that of a scalar is "scalar"."""
    return "x".join(map(str, shape)) or "scalar"


def size_text(n_bytes: int) -> str:
    """Bytes in the unit that reads best (powers of 1000)."""
    size, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.2f} {unit}" if unit != "bytes" else f"{n_bytes} bytes"


def show_header(about: inspect.Description) -> list[str]:
    """File, size, model and weights."""
    path = "".join(c if c.isprintable() else "?" for c in about.path)  # whole, unlike by plain_text
    tag = f"tagged '{about.arch}'" if about.arch else "no architecture tag"
    in_files = f" in {about.n_files} files" if about.n_files > 1 else ""
    return [
        f"file     {path}",
        f"size     {size_text(about.file_bytes)} ({about.file_bytes:,}){in_files}, GGUF {about.version}, "
        f"alignment {about.alignment}",
        f"model    {about.title or 'not recognised'} ({tag})",
        f"weights  {about.n_weights:,} in {len(about.tensors)} tensors, {about.bpw:.3f} bits per weight",
    ]


def show_qtypes(about: inspect.Description) -> list[str]:
    """The histogram of types."""
    rows = [
        (
            row.qtype.name,
            f"{row.n_tensors:,}",
            f"{row.n_weights:,}",
            f"{row.n_bytes:,}",
            f"{inspect.bits_per_weight(row.n_bytes, row.n_weights):.3f}",
            f"{100 * row.n_bytes / max(about.n_bytes, 1):.1f} %",
        )
        for row in about.qtypes
    ]
    return table(("qtype", "tensors", "weights", "bytes", "bpw", "share of bytes"), rows, ("qtype",))


def show_metadata(about: inspect.Description) -> list[str]:
    """Keys and short values; what only repeats the shapes of tensors is counted."""
    rows = [row for row in about.metadata if not row.key.startswith(ORIG_SHAPE_KEY)]
    keys = [plain_text(row.key) for row in rows]
    columns = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else 160
    width = max(MIN_VALUE_WIDTH, columns - max(map(len, keys), default=0) - 11)
    cells = [(row.kind, key, value_text(row, width)) for row, key in zip(rows, keys, strict=True)]
    lines = table(("type", "key", f"value of {len(about.metadata)}"), cells, ("type", "key"))
    n_shapes = len(about.metadata) - len(rows)
    return [*lines, f"and {n_shapes} x {ORIG_SHAPE_KEY}*, shown with the tensors"] if n_shapes else lines


def value_text(row: inspect.MetadataRow, width: int) -> str:
    """A metadata value on one line of at most `width` characters."""
    if row.value is None:
        return f"array of {row.n_items:,} items"
    text = row.value if isinstance(row.value, str) else repr(inspect.plain_value(row.value))
    shown = plain_text(text)
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def show_tensors(about: inspect.Description) -> list[str]:
    """The table of tensors; names come last, where long ones do no harm."""
    rows = [
        (row.qtype.name, stored_text(row), f"{row.n_bytes:,}", f"{row.offset:,}", plain_text(row.name))
        for row in about.tensors
    ]
    return table(("qtype", "shape", "bytes", "offset", "name"), rows, ("qtype", "shape"))


def stored_text(row: inspect.TensorRow) -> str:
    """The logical shape, and the stored one where it is another."""
    shape = shape_text(row.shape)
    return shape if row.shape == row.stored_shape else f"{shape} (stored {shape_text(row.stored_shape)})"


def show_check(result: inspect.CheckResult) -> list[str]:
    """What --check found."""
    looked_at = f"{result.n_tensors} tensors, {size_text(result.n_bytes)}"
    lines = [f"not checked: {plain_text(name)}, {reason}" for name, reason in result.unchecked.items()]
    if not result.problems:
        return [*lines, f"check    {looked_at}: every scale and plain weight is finite"]
    n_bad = len({found.tensor for found in result.problems})
    lines.append(f"check    {looked_at}: {n_bad} with numbers that are not finite; download or make the file again")
    rows = [
        (
            found.qtype.name,
            found.part,
            f"{found.n_nan:,}",
            f"{found.n_inf:,}",
            f"{found.n_numbers:,}",
            f"{found.first_block:,}",
            plain_text(found.tensor),
        )
        for found in result.problems
    ]
    return [*lines, "", *table(("qtype", "part", "nan", "inf", "of", "first block", "name"), rows, ("qtype", "part"))]


def show_diff(result: compare.Comparison, n_worst: int) -> list[str]:
    """Totals, the worst tensors, and metadata that differs."""
    counts = Counter(diff.status for diff in result.tensors)
    lines = [
        f"tensors  {counts['equal']} equal, {counts['different']} different, {counts['shape']} of another shape, "
        f"{counts['only_a']} only in A, {counts['only_b']} only in B"
    ]
    if result.relative_error is not None and result.max_error is not None:
        total = f"{result.relative_error:.6g} relative (L2), {result.max_error:.6g} at most in one weight"
        lines.append(f"error    {total}, over the tensors that differ")
    differing = sorted((diff for diff in result.tensors if diff.status != "equal"), key=severity)
    shown = differing[: n_worst or None]
    if shown:
        header = ("differs in", "error", "at most", "A", "B", "name")
        lines += ["", *table(header, [diff_cells(diff) for diff in shown], ("differs in", "A", "B"))]
    if len(differing) > len(shown):
        lines.append(f"and {len(differing) - len(shown)} more with smaller differences (--worst 0 shows all)")
    if result.metadata:
        lines += ["", *show_metadata_diff(result)]
    return lines


def severity(diff: compare.TensorDiff) -> tuple[int, float]:
    """Sort key, worst first: missing and misshapen tensors, then those without a finite error, then by error."""
    if diff.status in STRUCTURAL:
        return STRUCTURAL.index(diff.status), 0.0
    error = diff.relative_error
    return len(STRUCTURAL), -math.inf if error is None or math.isnan(error) else -error


def diff_cells(diff: compare.TensorDiff) -> tuple[str, ...]:
    """A row of the table of differences."""
    if diff.a is None or diff.b is None:
        kind = "presence"
    elif diff.status == "shape":
        kind = "shape"
    else:
        kind = "type" if diff.a.qtype is not diff.b.qtype else "bytes"
    errors = ("-" if error is None else f"{error:.4g}" for error in (diff.relative_error, diff.max_error))
    sides = (f"{row.qtype.name} {shape_text(row.shape)}" if row else "missing" for row in (diff.a, diff.b))
    return (kind, *errors, *sides, plain_text(diff.name))


def show_metadata_diff(result: compare.Comparison) -> list[str]:
    """Keys whose values differ, with both values cut short."""
    rows = [
        (plain_text(key), *(value_text(row, MIN_VALUE_WIDTH) if row else "missing" for row in rows))
        for key, rows in result.metadata.items()
    ]
    return table(("metadata", "A", "B"), rows, ("metadata", "A"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(argv)
    try:
        text, status = run(args)
        write_out(text)
    except GGUFError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the output'}: {error.strerror}."
    except KeyboardInterrupt:
        return 130
    else:
        return status
    print(one_line(message), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
