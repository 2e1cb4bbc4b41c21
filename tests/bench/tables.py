# SPDX-License-Identifier: Apache-2.0
"""How records of benchmarks are shown: one Markdown table for each benchmark, made from the records alone.

A new benchmark is an entry of TABLES. Knows only the fields of records; measure.py writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Record = Mapping[str, object]
MACHINE = ("device", "threads", "isa", "driver", "torch", "triton", "llvmlite", "comfyui", "python", "git")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        header: its title.
        path: where the value is in a record, as keys of nested mappings.
        form: format specification of numbers.
        inverse: show the reciprocal (of a time: a speed).
    """

    header: str
    path: tuple[str, ...]
    form: str = ""
    inverse: bool = False

    def show(self, record: Record) -> str:
        """The cell of a record, "" where it has no such value."""
        value: object = record
        for key in self.path:
            value = value.get(key, "") if isinstance(value, Mapping) else ""
        if isinstance(value, (list, tuple)):
            return "x".join(str(each) for each in value)
        if not isinstance(value, (int, float)):
            return str(value)
        return format(1 / value if self.inverse else value, self.form)


@dataclass(frozen=True)
class Table:
    """One benchmark's table.

    Attributes:
        bench: the benchmark's name in records.
        title, note: what stands above it.
        columns: from left to right.
        hidden: names of contestants that have no line of their own: they are columns of the others.
    """

    bench: str
    title: str
    note: str
    columns: tuple[Column, ...]
    hidden: frozenset[str] = frozenset()

    def make(self, records: Iterable[Record]) -> str:
        """The table of these records in Markdown."""
        shown = [record for record in records if record.get("name") not in self.hidden or "result" in record]
        columns = [column for column in self.columns if any(column.show(record) for record in shown)]
        rows = [[column.show(record) for column in columns] + wrong(record) for record in shown]
        rows = [[column.header for column in columns], ["--:" if column.form else "---" for column in columns], *rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def wrong(record: Record) -> list[str]:
    """What stands behind the cells of a record whose result is wrong."""
    return [f"**{record['result']}**"] if "result" in record else []


def time_of(name: str, header: str) -> Column:
    """Milliseconds of a baseline."""
    return Column(f"{header} ms", ("against", name, "ms"), ".4g")


def time_by(name: str, header: str) -> Column:
    """Time in units of a baseline's."""
    return Column(header, ("against", name, "time"), ".2f")


def speed_by(name: str) -> Column:
    """Speed in units of a baseline's."""
    return Column(f"x {name}", ("against", name, "time"), ".2f", inverse=True)


QTYPE, DTYPE, SHAPE = Column("type", ("qtype",)), Column("dtype", ("dtype",)), Column("shape", ("shape",))
TOKENS, NAME = Column("tokens", ("tokens",), "d"), Column("", ("name",))
MS, ROUNDS = Column("ms", ("ms",), ".4g"), Column("n", ("n",), "d")

TABLES = (
    Table(
        "bench_dequant",
        "Dequantization",
        "Speeds in million weights/s and in units of the baselines'. fresh: everybody allocates the result; given: the "
        "result's memory is there (straight torch and other packs allocate always).",
        (
            QTYPE,
            DTYPE,
            SHAPE,
            Column("memory", ("memory",)),
            NAME,
            Column("M weights/s", ("mweights_per_s",), ".0f"),
            Column("GB/s", ("gb_per_s",), ".3g"),
            speed_by("straight torch"),
            speed_by("ggml C"),
            speed_by("copy"),
            Column("bandwidth / copy", ("against", "copy", "bandwidth"), ".2f"),
            speed_by("pack"),
        ),
        frozenset({"straight torch", "ggml C", "copy", "pack"}),
    ),
    Table(
        "bench_linear",
        "Linear",
        "The pack's Linear, which dequantizes its weight in each call, and F.linear with the same weight dense.",
        (
            QTYPE,
            DTYPE,
            SHAPE,
            TOKENS,
            MS,
            time_of("dense", "dense"),
            time_by("dense", "time / dense"),
            Column("GFLOP/s", ("gflops",), ".0f"),
            ROUNDS,
        ),
        frozenset({"dense"}),
    ),
    Table(
        "bench_step",
        "Step",
        "A whole step of a model through the pack, and of the same weights dequantized in ComfyUI's own layers. "
        "pair: a double and a single block of Flux's width.",
        (
            Column("model", ("model",)),
            QTYPE,
            DTYPE,
            TOKENS,
            MS,
            time_of("dense", "dense"),
            time_by("dense", "time / dense"),
            Column("peak GB", ("peak_gb",), ".1f"),
            Column("dense peak GB", ("dense_peak_gb",), ".1f"),
            ROUNDS,
        ),
    ),
    Table(
        "bench_lora",
        "LoRA",
        "A Linear of 3072x12288, and a step of a double and a single block of Flux's width, with plain LoRAs on all "
        "matrices and without.",
        (
            NAME,
            QTYPE,
            DTYPE,
            TOKENS,
            Column("LoRAs", ("loras",), "d"),
            Column("rank", ("rank",), "d"),
            MS,
            time_by("without", "time / without"),
            ROUNDS,
        ),
    ),
    Table(
        "bench_load",
        "Loading",
        "full: a Flux.1-dev of 780 tensors through the node's function; host: the least that the host needs for these "
        "keys; added: the difference. Memory before the first forward.",
        (
            NAME,
            QTYPE,
            Column("file GB", ("gb",), ".2f"),
            Column("s", ("seconds",), ".3f"),
            Column("peak added MB", ("peak_added_mb",), ".0f"),
            Column("resident added MB", ("resident_added_mb",), ".0f"),
        ),
    ),
    Table(
        "bench_collect",
        "Recording an importance matrix",
        "A sampling of the tiny Flux, or of a double and a single block of Flux's width, with the collector node and "
        "without; with the work on the file.",
        (
            Column("model", ("model",)),
            QTYPE,
            DTYPE,
            TOKENS,
            Column("rows kept", ("rows",), "d"),
            MS,
            time_by("without", "time / without"),
            ROUNDS,
        ),
    ),
    Table(
        "bench_tune",
        "Choosing types",
        "Measuring every candidate for the first double and single blocks of a Flux-shaped file, and solving the "
        "choice for the whole model; minutes for Flux.1-dev are extrapolated from processor time, linear in the "
        "weights that are measured.",
        (
            Column("engine", ("name",)),
            Column("rows of a matrix", ("sample_rows",), "d"),
            Column("weights measured", ("sampled_weights",), ",d"),
            Column("CPU s", ("cpu_seconds",), ".0f"),
            Column("us/weight", ("us_per_weight",), ".1f"),
            Column("Flux.1-dev, rows", ("flux_sample_rows",), "d"),
            Column("on 8 cores, minutes", ("flux_minutes",), ".0f"),
            Column("solving s", ("solve_seconds",), ".2f"),
            Column("peak MB", ("peak_mb",), ".0f"),
        ),
    ),
    Table(
        "bench_open",
        "Opening text encoders",
        "A file with 262,144 tokens and 442 tensors.",
        (Column("case", ("name",)), Column("file MB", ("mb",), ".1f"), MS, ROUNDS),
    ),
    Table(
        "bench_text_encoder",
        "A T5-XXL of real size",
        "Seconds to load and for a prompt of 256 tokens; peak memory over that before. roofline: its matrix products "
        "alone, in float32.",
        (
            Column("case", ("name",)),
            QTYPE,
            Column("file GB", ("file_gb",), ".2f"),
            Column("load s", ("load",), ".2f"),
            Column("first prompt s", ("first",), ".1f"),
            Column("next s", ("next",), ".1f"),
            Column("peak GB", ("resident_gb",), ".2f"),
            Column("not the mapped file GB", ("anonymous_gb",), ".2f"),
        ),
    ),
    Table(
        "bench_convert",
        "Converting",
        "A Flux-shaped BF16 file, and ggml_quantize_chunk alone on as many threads, in million weights/s.",
        (
            Column("engine", ("name",)),
            Column("type", ("type",)),
            Column("s", ("seconds",), ".1f"),
            Column("M weights/s", ("mweights_per_s",), ".0f"),
            Column("ggml alone", ("ggml_alone",), ".0f"),
            Column("x ggml", ("speed_by_ggml",), ".2f"),
            Column("peak MB", ("peak_mb",), ".0f"),
        ),
    ),
    Table(
        "bench_encode",
        "Encoders",
        "Million weights/s, and in units of ggml_quantize_chunk's on as many threads.",
        (
            QTYPE,
            Column("importance", ("importance",)),
            SHAPE,
            NAME,
            Column("M weights/s", ("mweights_per_s",), ".1f"),
            speed_by("ggml_quantize_chunk"),
        ),
    ),
    Table(
        "prototype_int8",
        "Prototype: Linear in 8-bit integers",
        "A prototype, no part of the product. Time by F.linear with the dense weight; relative L2 error of the result.",
        (
            NAME,
            QTYPE,
            DTYPE,
            SHAPE,
            TOKENS,
            MS,
            time_by("dense", "time / dense"),
            Column("error", ("error",), ".4f"),
            Column("with outliers", ("error_with_outliers",), ".4f"),
        ),
    ),
    Table(
        "prototype_overlap",
        "Prototype: the next layer dequantized beside this one's product",
        "A prototype, no part of the product. A chain of Linears; dense only multiplies.",
        (NAME, QTYPE, DTYPE, TOKENS, MS, time_by("dense", "time / dense")),
    ),
)


def make_page(records: Sequence[Record]) -> str:
    """All tables of these records, each under the machine that it was measured on."""
    parts = []
    for table in TABLES:
        own = [record for record in records if record["bench"] == table.bench]
        if own:
            parts += [f"## {table.title}", describe(own[-1]), table.note, table.make(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(record: Record) -> str:
    """The machine of a record in one line."""
    rest = [f"{key} {record[key]}" for key in MACHINE if key in record and key != "device"]
    return ", ".join([str(record["device"]), *rest])
