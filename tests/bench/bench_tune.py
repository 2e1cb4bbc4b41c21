# SPDX-License-Identifier: Apache-2.0
"""What choosing types for a model costs: measuring every candidate, and solving the choice. Extrapolated to Flux.1-dev.

    python tests/bench/bench_tune.py [--gigabytes 6] [--blocks 1] [--threads 2] [--sample-rows 128]

The source is a Flux-shaped safetensors file of normal BF16 weights, the importance matrix one with rows for every
matrix. The matrices of the first double and single blocks are measured, with their share in the whole model. Encoding
takes a time that grows with the weights that are encoded; so the processor time per sampled weight, which a busy
machine changes little, gives that of 11.9 G weights at the tool's number of rows. The choice is solved for all of the
model's matrices, with the measured costs of their kind. Memory is the peak of anonymous pages (Linux), sampled.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import _paths  # noqa: F401
import torch
from bench_convert import write_source
from gguf_kit.quantize import ggml
from gguf_kit.quantize.encode import Engine, GgmlEngine, TorchEngine
from gguf_kit.quantize.imatrix import Entry, Imatrix
from gguf_kit.quantize.plan import Choices, PlannedTensor, make_plan
from gguf_kit.quantize.sensitivity import DEFAULT_SAMPLE_ROWS, TensorCosts, measure
from gguf_kit.quantize.sources import Source, open_source
from gguf_kit.quantize.tune import solve
from gguf_kit.tools.llama_cpp import build
from hosted import N_DOUBLE, N_SINGLE, flux_shapes
from measure import Report, digits, make_parser
from tqdm import tqdm

RECORDED_ROWS = 256
GOAL_CORES = 8
GOAL_BPW = 4.5
BLOCK = re.compile(r"_blocks\.(\d+)\.(.+)\.weight")


def make_imatrix(tensors: Sequence[PlannedTensor]) -> Imatrix:
    """Importance of very different columns and some rows for each matrix; those of one width are the same."""
    generator = torch.Generator().manual_seed(0)
    entries: dict[int, Entry] = {}
    for n_columns in sorted({tensor.shape[-1] for tensor in tensors}):
        rows = torch.randn(RECORDED_ROWS, n_columns, generator=generator)
        rows *= torch.randn(n_columns, generator=generator).exp()
        sums = rows.square().sum(0, keepdim=True)
        entries[n_columns] = Entry(sums, torch.tensor([float(RECORDED_ROWS)]), rows.bfloat16(), 1.0, 1.0)
    return Imatrix(Path("synthetic.gguf"), {tensor.name: entries[tensor.shape[-1]] for tensor in tensors})


def matrices_of(source: Source, n_blocks: int) -> list[PlannedTensor]:
    """The matrices of the first blocks of both kinds."""
    tensors = make_plan(source, Choices("BF16")).tensors
    found = ((BLOCK.search(tensor.name), tensor) for tensor in tensors)
    return [tensor for match, tensor in found if match and int(match.group(1)) < n_blocks]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Largest number of bytes by which the process grew: the last number of the list."""
    status, peaks, done = Path("/proc/self/status"), [0], threading.Event()

    def anonymous() -> int:
        lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)

    before = anonymous()

    def watch() -> None:
        while not done.wait(0.02):
            peaks[0] = max(peaks[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def n_sampled(shapes: Mapping[str, tuple[int, ...]], sample_rows: int) -> int:
    """Weights that are measured of matrices of these shapes."""
    return sum(min(prod(shape[:-1]), sample_rows) * shape[-1] for shape in shapes.values() if len(shape) > 1)


def whole_model(costs: Sequence[TensorCosts]) -> list[TensorCosts]:
    """Costs for every matrix in Flux.1-dev's blocks: those of the measured one of its kind."""
    kinds = {match.group(2): tensor for tensor in costs if (match := BLOCK.search(tensor.name))}
    found = []
    for i, name in enumerate(flux_shapes(N_DOUBLE, N_SINGLE)):
        match = BLOCK.search(name)
        if match and match.group(2) in kinds:
            # Gains that differ keep the choice from being one of a few kinds only.
            found.append(replace(kinds[match.group(2)], name=name, gain=1.0 + i % 97 / 10))
    return found


def measure_part(source: Source, tensors: Sequence[PlannedTensor], engine: Engine, n_threads: int, rows: int) -> dict:
    """Costs of some tensors, and what measuring them took."""
    imatrix = make_imatrix(tensors)
    for warm in (True, False):  # the first time makes ggml's search tables
        start, used = time.perf_counter(), time.process_time()
        with peak_memory() as peak:
            part, n_rows = (tensors[:1], 2) if warm else (tensors, rows)
            costs = measure(source, part, imatrix, engine, sample_rows=n_rows, n_threads=n_threads)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
    return {"costs": costs, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak[-1]}


def solving_seconds(costs: Sequence[TensorCosts]) -> float:
    """Seconds of one choice for the whole model."""
    model = whole_model(costs)
    budget = int(sum(prod(tensor.shape) for tensor in model) * GOAL_BPW / 8)
    start = time.perf_counter()
    solve(model, budget)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--blocks", type=int, default=1, help="of each kind that are measured (1)")
    parser.add_argument("--sample-rows", type=int, default=128, help="that stand for a matrix here (128)")
    parser.add_argument("--engine", choices=("ggml", "torch"), default="ggml")
    args = parser.parse_args(argv)
    report = Report("bench_tune", args)
    torch.set_num_threads(1)
    library = ggml.find_library() or build.build_ggml(tqdm.write) if args.engine == "ggml" else None
    engine = GgmlEngine(library) if library else TorchEngine()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-shaped.safetensors"
        n_weights = write_source(path, 0.7 if args.quick else args.gigabytes)
        source = open_source(path)
        tensors = matrices_of(source, args.blocks)
        rows = 8 if args.quick else args.sample_rows
        done = measure_part(source, tensors[-3:] if args.quick else tensors, engine, args.threads, rows)
    costs = done["costs"]
    sampled = n_sampled({tensor.name: tensor.shape for tensor in costs}, rows)
    per_weight = done["cpu_seconds"] / sampled
    everything = per_weight * n_sampled(flux_shapes(N_DOUBLE, N_SINGLE, guidance=True), DEFAULT_SAMPLE_ROWS)
    figures = {"seconds": done["seconds"], "cpu_seconds": done["cpu_seconds"], "us_per_weight": 1e6 * per_weight}
    figures |= {"flux_cpu_hours": everything / 3600, "flux_minutes": everything / 60 / GOAL_CORES}
    figures |= {"solve_seconds": solving_seconds(costs), "peak_mb": done["peak"] / 1e6}
    record = {"name": args.engine, "source_weights": n_weights, "tensors": len(costs), "sampled_weights": sampled}
    record |= {"candidates": sum(len(tensor.candidates) for tensor in costs), "sample_rows": rows}
    record |= {"flux_sample_rows": DEFAULT_SAMPLE_ROWS, "flux_cores": GOAL_CORES}
    report.add({**record, **{key: digits(value) for key, value in figures.items()}})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
