# SPDX-License-Identifier: Apache-2.0
"""How fast the encoders quantize, against ggml_quantize_chunk on as many CPU threads in the same run.

    python tests/bench/bench_encode.py [--types Q8_0 Q4_K] [--shapes flux-proj] [--threads 1] [--repeat 5]

Needs libggml-python, whose prebuilt ggml is the baseline. An engine's bytes are compared with the baseline's before it
is timed; one that differs prints FAIL and no figure. The engines take turns, so that a busy machine slows all of them;
the ratio is the median of the rounds'. With --device the torch engine
runs there, on weights that lie there, and the baseline stays on the CPU.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import _paths  # noqa: F401
import make_files
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels import torch_encoder
from gguf_kit.layouts import byte_shape, n_bytes
from gguf_kit.quantize import ggml
from gguf_kit.quantize.encode import Engine, GgmlEngine, TorchEngine, encode_rows
from gguf_kit.tools.llama_cpp import build
from measure import LAYERS, Report, Timing, digits, make_parser


@dataclass(frozen=True)
class Case:
    """What one figure is about. `rows` may be fewer than the layer has: one shape is as fast as another."""

    qtype: QType
    layer: str
    rows: int
    columns: int
    importance: bool

    @property
    def n_weights(self) -> int:
        return self.rows * self.columns

    def n_bytes(self) -> int:
        """Bytes read and written at least once."""
        return 4 * self.n_weights + n_bytes(self.qtype, (self.rows, self.columns))

    def make_inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normal weights and a positive importance, the same for every engine."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(self.rows, self.columns, generator=generator) * 0.02
        return weights, torch.rand(self.columns, generator=generator) if self.importance else None


@dataclass(frozen=True)
class Place:
    """Where engines run: a pool of so many CPU threads, or a device."""

    threads: int
    pool: ThreadPoolExecutor
    device: torch.device


# An engine is prepared for a case outside of the timing; the action quantizes once and returns the bytes.
Action = Callable[[], torch.Tensor]
Inputs = tuple[torch.Tensor, "torch.Tensor | None"]


def prepare_baseline(case: Case, inputs: Inputs, place: Place) -> Action:
    """ggml_quantize_chunk on float32 rows in memory, each thread its share of the rows."""
    weights, importance = (None if each is None else each.numpy() for each in inputs)
    out = np.empty(byte_shape(case.qtype, weights.shape), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    quantize_chunk = make_files.load_ggml().ggml_quantize_chunk
    bounds = [case.rows * i // place.threads for i in range(place.threads + 1)]

    def encode_rows(first: int, last: int) -> None:
        begin, n_rows = first * case.columns, last - first
        quantize_chunk(case.qtype.value, weights.ctypes.data, out.ctypes.data, begin, n_rows, case.columns, pointer)

    def action() -> torch.Tensor:
        list(place.pool.map(encode_rows, bounds[:-1], bounds[1:]))
        return torch.from_numpy(out)

    return action


def prepare_engine(engine: Engine, case: Case, inputs: Inputs, place: Place) -> Action:
    """One of the converter's engines, with its checks: on a CPU each thread has its share of the rows."""
    torch.set_num_threads(1)  # several intra-op threads wait for each other at every operation
    weights, importance = (None if each is None else each.to(engine.device) for each in inputs)
    shares = torch.tensor_split(weights, place.threads if engine.device.type == "cpu" else 1)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return encode_rows(engine, rows, case.qtype, importance, "weights").view(byte_shape(case.qtype, rows.shape))

    return lambda: torch.cat(list(place.pool.map(encode, shares)))


def prepare_torch(case: Case, inputs: Inputs, place: Place) -> Action:
    """The pure-torch encoder, on the device; its bytes come back to the CPU as in a conversion."""
    return prepare_engine(TorchEngine(place.device), case, inputs, place)


def prepare_ggml(case: Case, inputs: Inputs, place: Place) -> Action:
    """The pack's own build of ggml."""
    return prepare_engine(GgmlEngine(ggml.find_library() or build.build_ggml(print)), case, inputs, place)


# The first one judges the bytes and is the 1 of the ratios. A new engine is a line.
ENGINES: dict[str, Callable[[Case, Inputs, Place], Action]] = {
    "ggml_quantize_chunk": prepare_baseline,
    "ggml": prepare_ggml,
    "torch": prepare_torch,
}
BASELINE = next(iter(ENGINES))


def measure(case: Case, place: Place, n_runs: int) -> dict[str, list[float]]:
    """Seconds of each engine's runs, in turns: {engine: [seconds]}, [] for one whose bytes are not the baseline's."""
    inputs = case.make_inputs()
    actions = {name: prepare(case, inputs, place) for name, prepare in ENGINES.items()}
    expected = actions[BASELINE]().clone()  # also the warm-up
    right = {name: torch.equal(action().cpu(), expected) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(n_runs):
        for name in (name for name, same in right.items() if same):
            start = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def record(case: Case, seconds: Mapping[str, list[float]], report: Report) -> None:
    """The records of one case: a line for each engine, in million weights/s and by the baseline's."""
    base = Timing(tuple(seconds[BASELINE]))
    for engine, each in seconds.items():
        fields: dict[str, object] = {
            "name": engine,
            "qtype": case.qtype.name,
            "importance": "yes" if case.importance else "no",
            "layer": case.layer,
            "shape": [case.rows, case.columns],
        }
        if not each:
            report.fail(fields, "bytes differ from the baseline's")
            continue
        timing = Timing(tuple(each))
        fields["mweights_per_s"] = digits(case.n_weights / timing.median / 1e6)
        fields["gb_per_s"] = digits(case.n_bytes() / timing.median / 1e9)
        against = {BASELINE: {"ms": digits(1e3 * base.median), "time": digits(timing.over(base))}}
        report.add({**fields, **timing.describe(), "against": against})


def main(argv: Sequence[str] | None = None) -> int:
    names = sorted((qtype.name for qtype in torch_encoder.ENCODABLE_QTYPES), key=lambda name: QType[name])
    parser = make_parser(__doc__)
    parser.add_argument("--types", nargs="+", choices=names, default=names, metavar="TYPE", help=", ".join(names))
    parser.add_argument("--shapes", nargs="+", choices=list(LAYERS), default=["flux-proj"])
    parser.add_argument("--importance", choices=["none", "random", "both"], default="both")
    parser.add_argument("--rows", type=int, default=1 << 30, help="encode at most so many rows of a matrix")
    parser.set_defaults(threads=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the torch engine")
    options = parser.parse_args(argv)
    importances = {"none": [False], "random": [True], "both": [False, True]}[options.importance]
    place = Place(options.threads, ThreadPoolExecutor(options.threads), torch.device(options.device))
    report = Report("bench_encode", options, place.device)
    names, n_rows, n_runs = options.types, options.rows, options.repeat
    if options.quick:
        names, n_rows, n_runs = names[:2], 16, 1
    for layer, name, importance in itertools.product(options.shapes, names, importances):
        rows, columns = LAYERS[layer]
        case = Case(QType[name], layer, min(rows, n_rows), columns, importance)
        record(case, measure(case, place, n_runs), report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
