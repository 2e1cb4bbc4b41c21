# SPDX-License-Identifier: Apache-2.0
"""How fast weights are dequantized, every type and backend, against four baselines in the same run.

    python tests/bench/bench_dequant.py [--qtypes Q4_K Q6_K] [--dtypes float32] [--shapes 3072x12288 flux-qkv]
                                        [--backends torch] [--threads 2] [--device cuda] [--pack FOLDER] [--save]

Baselines:
    straight torch   straight_torch.py: one chain of torch operations over the whole tensor
    ggml C           ggml's dequantize_row_*, its rows shared by as many threads; it always writes float32
    copy             out.copy_(dense) of the result: as fast as memory that is read and written
    pack             with --pack: the dequant.py of another node pack, dequantize(data, qtype, oshape, dtype)

Memory decides as much as arithmetic: the pages of a fresh result of 151 MB cost more than to fill them. So there are
two kinds of figures. "fresh": everybody allocates the result within the time. "given": everybody writes into memory
that is there; straight torch and other packs cannot. A given result is compared with the given copy and ggml, and with
straight torch as it is.

Each result is compared with the reference before it is timed: backends must equal it to the bit, rounded once to the
dtype; baselines to a tolerance, relative to the largest weight of a block. A wrong one prints FAIL and no figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import _paths  # noqa: F401
import ggml_rows
import measure
import straight_torch
import torch
import weights
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from gguf_kit.kernels import torch_reference
from gguf_kit.layouts import LAYOUTS
from measure import Action, Budget, Case, Clock, Report

FRESH, GIVEN = "fresh", "given"
STRAIGHT, GGML, COPY, PACK = "straight torch", "ggml C", "copy", "pack"
# Largest difference that a baseline may have, by the largest weight of its block.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PACK_TOLERANCE = 5e-2  # other packs compute in 16 bit


@dataclass(frozen=True)
class Work:
    """A matrix to be dequantized.

    Attributes:
        data: uint8 (rows, bytes per row) on the device.
        expected: (n_blocks, block_size), the reference's result rounded to dtype.
        out: memory for it.
        pool: the threads of those that have none of their own.
    """

    qtype: QType
    shape: tuple[int, int]
    dtype: torch.dtype
    data: torch.Tensor
    expected: torch.Tensor
    out: torch.Tensor
    pool: ThreadPoolExecutor

    @property
    def blocks(self) -> torch.Tensor:
        return self.data.view(-1, LAYOUTS[self.qtype].type_size)


@dataclass(frozen=True)
class Contestant:
    """Who dequantizes: the action returns the result; the tolerance is 0 for what must be exact."""

    name: str
    memory: str
    action: Callable[[], torch.Tensor]
    tolerance: float = 0

    @property
    def key(self) -> str:
        return f"{self.name}, {self.memory}"


def make_work(
    qtype: QType, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, pool: ThreadPoolExecutor
) -> Work:
    """The matrix and what the reference makes of it, on one thread: its small operations gain nothing from more."""
    data, n_threads = weights.make_bytes(qtype, shape).to(device), torch.get_num_threads()
    torch.set_num_threads(1)
    expected = torch_reference.dequantize(data.view(-1, LAYOUTS[qtype].type_size), LAYOUTS[qtype], dtype)
    torch.set_num_threads(n_threads)
    return Work(qtype, shape, dtype, data, expected, torch.zeros_like(expected), pool)


def backends(work: Work, names: Sequence[str]) -> Iterator[Contestant]:
    """Those of the pack's backends that can take it."""
    layout = LAYOUTS[work.qtype]
    for name in names:
        backend = dequant.BACKENDS[name]
        if backend.unavailable(layout, work.data.device):
            continue
        yield Contestant(
            name,
            FRESH,
            lambda name=name: dequant.dequantize(work.data, work.qtype, work.shape, work.dtype, backend=name),
        )

        def run(into: Callable[..., None] = backend.dequantize_into) -> torch.Tensor:
            into(work.blocks, layout, work.out)
            return work.out

        yield Contestant(name, GIVEN, run)


def baselines(work: Work, pack: ModuleType | None) -> Iterator[Contestant]:
    """What the backends are compared with."""
    tolerance, on_cpu = TOLERANCES[work.dtype], work.data.device.type == "cpu"
    yield Contestant(COPY, FRESH, lambda: work.expected.clone())
    yield Contestant(COPY, GIVEN, lambda: work.out.copy_(work.expected))
    if on_cpu:  # its constants lie there
        straight = straight_torch.dequantize
        yield Contestant(STRAIGHT, FRESH, lambda: straight(work.blocks, work.qtype, work.dtype), tolerance)
    if on_cpu and ggml_rows.find_function(work.qtype) is not None:
        given = torch.empty(work.expected.shape)

        def run(out: torch.Tensor | None = None) -> torch.Tensor:
            out = torch.empty(work.expected.shape) if out is None else out
            return ggml_rows.dequantize_into(work.blocks, work.qtype, out, work.pool)

        yield Contestant(GGML, FRESH, run, tolerance)
        yield Contestant(GGML, GIVEN, lambda: run(given), tolerance)
    if pack is not None and work.qtype in getattr(pack, "dequantize_functions", {work.qtype}):
        yield Contestant(
            PACK, FRESH, lambda: pack.dequantize(work.data, work.qtype, work.shape, work.dtype), PACK_TOLERANCE
        )


def mistake(contestant: Contestant, work: Work) -> str:
    """What is wrong with a contestant's result, "" if nothing; also its warm-up."""
    work.out.fill_(torch.nan)  # what is not written is wrong
    result = contestant.action().reshape(work.expected.shape)
    if not contestant.tolerance:
        bits = {2: torch.int16, 4: torch.int32}[work.dtype.itemsize]
        n_wrong = int((result.view(bits) != work.expected.view(bits)).sum()) if result.dtype == work.dtype else -1
        return f"{n_wrong} weights differ from the reference" if n_wrong else ""
    block_size = max(32, LAYOUTS[work.qtype].block_size)
    result, expected = (each.float().reshape(-1, block_size) for each in (result, work.expected))
    largest = expected.abs().amax(dim=1).clamp_min(1e-30)
    error = float(((result - expected).abs().amax(dim=1) / largest).max())
    return "" if error <= contestant.tolerance else f"differs from the reference by {error:.2g} of a block's largest"


def against(contestant: Contestant, right: Mapping[str, Contestant]) -> dict[str, str]:
    """Which baselines a contestant is compared with: {name: key}."""
    keys = {name: f"{name}, {contestant.memory}" for name in (GGML, COPY)}
    keys |= {name: f"{name}, {FRESH}" for name in (STRAIGHT, PACK)}
    return {name: key for name, key in keys.items() if key in right and key != contestant.key}


def run_case(
    work: Work, names: Sequence[str], clock: Clock, budget: Budget, pack: ModuleType | None, report: Report
) -> None:
    """Check, time and record all contestants of one matrix."""
    right: dict[str, Contestant] = {}
    for contestant in [*baselines(work, pack), *backends(work, names)]:
        case = make_case(contestant, work)
        problem = mistake(contestant, work)
        if problem:
            report.fail({**case.describe(), "memory": contestant.memory}, problem)
        else:
            right[contestant.key] = contestant
    actions: dict[str, Action] = {key: contestant.action for key, contestant in right.items()}
    timings = measure.take_turns(actions, clock, budget)
    for key, contestant in right.items():
        others = {
            name: (make_case(right[other], work), timings[other]) for name, other in against(contestant, right).items()
        }
        report.add_timing(make_case(contestant, work), timings[key], others, memory=contestant.memory)


def make_case(contestant: Contestant, work: Work) -> Case:
    reads = work.expected.nbytes if contestant.name == COPY else None
    writes = 4 * work.expected.numel() if contestant.name == GGML else None
    return Case(contestant.name, work.qtype, work.shape, work.dtype, reads=reads, writes=writes)


def load_pack(parser: argparse.ArgumentParser, path: Path | None) -> ModuleType | None:
    """The dequant module of another pack, loaded from where it lies."""
    if path is None:
        return None
    file = path / "dequant.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location("other_pack_dequant", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        parser.error(f"--pack: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        parser.error(f"--pack: {file} cannot be imported alone: {error}")
    if not callable(getattr(module, "dequantize", None)):
        parser.error(f"--pack: {file} has no function dequantize(data, qtype, oshape, dtype)")
    return module


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=2)
    every = [qtype for qtype in LAYOUTS if LAYOUTS[qtype].quants is not None]
    parser.add_argument("--qtypes", nargs="+", type=measure.parse_qtype, default=every, metavar="TYPE")
    parser.add_argument("--dtypes", nargs="+", choices=list(measure.DTYPES), default=["float32", "bfloat16"])
    parser.add_argument(
        "--shapes", nargs="+", type=measure.parse_shape, help=f"rows x columns, or {', '.join(measure.LAYERS)}"
    )
    every_backend = list(dequant.BACKENDS)
    parser.add_argument("--backends", nargs="+", choices=every_backend, default=every_backend)
    parser.add_argument("--pack", type=Path, help="folder (or dequant.py) of another pack to compare with")
    options = parser.parse_args(argv)
    shapes = options.shapes or [(64, 1024) if options.quick else (3072, 12288)]
    device = torch.device(options.device)
    pack = load_pack(parser, options.pack)
    report = Report("bench_dequant", options, device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    clock = Clock(device)
    with ThreadPoolExecutor(options.threads) as pool:
        for shape, qtype, name in itertools.product(shapes, options.qtypes, options.dtypes):
            work = make_work(qtype, shape, measure.DTYPES[name], device, pool)
            run_case(work, options.backends, clock, budget, pack, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
