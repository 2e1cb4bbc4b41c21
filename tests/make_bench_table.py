# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of speeds in docs/speed.md and in the READMEs from the records of the benchmarks.

    python tests/make_bench_table.py                  # from tests/bench/results/*.json
    nox -s bench && python tests/make_bench_table.py  # on this machine first

Each file of records is one kind of machine. docs/speed.md shows a table of dequantization, a line for each type,
and one of the rest: layers, steps, LoRAs and loading; the READMEs show the latter. All figures are in the files of
records beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from readme_blocks import DOCS, READMES, replace_between, rewrite

ROOT = Path(__file__).resolve().parent.parent
PAGE = DOCS / "speed.md"
RESULTS = ROOT / "tests" / "bench" / "results"
BEGIN, END = "<!-- begin of the tables of speeds -->", "<!-- end of the tables of speeds -->"
BASELINES = ("copy", "straight torch", "ggml C", "pack")
DTYPES = ("float32", "bfloat16")
HEADER = ("M weights/s", "x straight torch", "x ggml's C", "of a copy")

Record = Mapping[str, object]


def read_results() -> dict[str, list[Record]]:
    """Kind of machine -> its records; the prototypes' are not shown."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    return {kind: records for kind, records in found.items() if any("bench_" in each["bench"] for each in records)}


def make_tables(results: Mapping[str, Sequence[Record]]) -> str:
    """Both tables of each machine, in Markdown."""
    parts = []
    for kind, records in results.items():
        machine = f"{records[0]['device']}, {records[0]['threads']} threads, torch {records[0]['torch']}"
        tables = [table for table in (dequant_table(records), rest_table(records)) if table]
        parts += [f"{machine} ([all figures](../tests/bench/results/{kind}.md)):", *tables]
    return "\n\n".join(parts)


def make_short_tables(results: Mapping[str, Sequence[Record]]) -> str:
    """The second table of each machine, in Markdown."""
    parts = [
        (f"{records[0]['device']}, torch {records[0]['torch']}:", rest_table(records)) for records in results.values()
    ]
    return "\n\n".join(part for title, table in parts if table for part in (title, table))


def pick(records: Sequence[Record], **wanted: object) -> list[Record]:
    """Those records that have all these values, and no wrong result."""
    own = (record for record in records if "result" not in record)
    return [record for record in own if all(record.get(key) == value for key, value in wanted.items())]


def fastest(records: Sequence[Record], qtype: object, dtype: str) -> Record | None:
    """The pack's fastest backend for a type, of memory that is there if one writes into it."""
    own = [record for record in pick(records, qtype=qtype, dtype=dtype) if record["name"] not in BASELINES]
    given = pick(own, memory="given") or own
    return max(given, key=lambda record: float(str(record["mweights_per_s"])), default=None)


def dequant_table(records: Sequence[Record]) -> str:
    """A line for each type: the fastest backend in each dtype and how it compares; "" without such records."""
    own = pick(records, bench="bench_dequant")
    dtypes = [dtype for dtype in DTYPES if pick(own, dtype=dtype)]
    if not dtypes:
        return ""
    columns = [f"{dtype}: {HEADER[0]}" if not i else title for dtype in dtypes for i, title in enumerate(HEADER)]
    lines = ["| type | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for qtype in dict.fromkeys(record["qtype"] for record in own):
        cells = [cell for dtype in dtypes for cell in dequant_cells(fastest(own, qtype, dtype))]
        lines.append(f"| {qtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dequant_cells(record: Record | None) -> list[str]:
    """Speed, and speed by straight torch's, ggml's and a copy's."""
    if record is None:
        return [""] * len(HEADER)
    speeds = [speed_by(record, name) for name in ("straight torch", "ggml C", "copy")]
    shares = ["" if speed is None else f"{speed:.1f}" for speed in speeds[:2]]
    return [f"{record['mweights_per_s']:.0f}", *shares, "" if speeds[2] is None else f"{100 * speeds[2]:.0f} %"]


def speed_by(record: Record, name: str) -> float | None:
    """Speed in units of a baseline's, None where it was not measured."""
    against = record["against"]
    if not isinstance(against, Mapping) or name not in against:
        return None
    return 1 / float(against[name]["time"])


def rest_table(records: Sequence[Record]) -> str:
    """A line for each Linear, step, number of LoRAs, and loading; "" without such records."""
    lines = [*linear_lines(records), *step_lines(records), *lora_lines(records), *load_lines(records)]
    return "\n".join(["| | time |", "|---|---|", *lines]) if lines else ""


def by(record: Record, name: str) -> str:
    """Time by a baseline's."""
    return f"{1 / (speed_by(record, name) or 1):.2f}"


def linear_lines(records: Sequence[Record]) -> list[str]:
    """Linear: one line for each shape, dtype and number of tokens, its types together."""
    groups: dict[tuple[str, object, object], list[str]] = {}
    for record in pick(records, bench="bench_linear", name="GGUF Linear"):
        shape = "x".join(str(n) for n in list(record["shape"]))  # type: ignore[call-overload]
        key = shape, record["dtype"], record["tokens"]
        groups.setdefault(key, []).append(f"{record['qtype']} {by(record, 'dense')}")
    title = "Linear {}, {}, {} tokens"
    return [f"| {title.format(*key)} | {', '.join(each)} of dense |" for key, each in groups.items()]


def step_lines(records: Sequence[Record]) -> list[str]:
    """Whole steps."""
    titles = {"pair": "a step of two blocks as wide as Flux", "tiny-flux": "a step of the tiny Flux"}
    titles["full-flux"] = "a step of a Flux of 12 G weights"
    lines = []
    for record in pick(records, bench="bench_step"):
        what = f"{titles[str(record['model'])]}, {record['qtype']}, {record['dtype']}, {record['tokens']} tokens"
        peak = f"; peak memory {record['peak_gb']} GB ({record['dense_peak_gb']})" if "peak_gb" in record else ""
        seconds = float(str(record["ms"])) / 1e3
        lines.append(f"| {what} | {seconds:.3g} s, {by(record, 'dense')} of dense{peak} |")
    return lines


def lora_lines(records: Sequence[Record]) -> list[str]:
    """LoRAs on a step."""
    lines = []
    for record in pick(records, bench="bench_lora", name="step"):
        if record["loras"]:
            plural = "s" if record["loras"] != 1 else ""
            what = f"the two blocks with {record['loras']} LoRA{plural} of rank {record['rank']}, {record['dtype']}"
            lines.append(f"| {what}, {record['tokens']} tokens | {by(record, 'without')} of without |")
    return lines


def load_lines(records: Sequence[Record]) -> list[str]:
    """Loading a whole Flux."""
    full, added = (pick(records, bench="bench_load", name=name) for name in ("full", "added"))
    if not (full and added):
        return []
    seconds, own = float(str(full[0]["seconds"])), float(str(added[0]["seconds"]))
    cost = f"{seconds:.2f} s, {own:.2f} s of it the pack's; {full[0]['resident_added_mb']} MB before the first forward"
    return [f"| loading a Flux.1-dev of {full[0]['gb']} GB | {cost} |"]


def replace_block(text: str, tables: str) -> str:
    """A page with the tables between its markers."""
    return replace_between(text, BEGIN, END, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    results = read_results()
    rewrite(PAGE, BEGIN, END, make_tables(results))
    for readme in READMES:
        rewrite(readme, BEGIN, END, make_short_tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
