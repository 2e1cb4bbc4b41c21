# SPDX-License-Identifier: Apache-2.0
"""What a whole step of a model costs in a real ComfyUI, against the same weights dequantized in ComfyUI's own layers.

    python tests/bench/bench_step.py [--models pair tiny-flux] [--qtype Q4_K] [--tokens 512 4096]
                                     [--dtypes float32] [--device cuda] [--full-flux] [--save]

    pair        one double and one single block as wide as Flux (hidden 3072, 24 heads, MLP 12288), with embedders and
                final layer, from a GGUF file of random weights; tokens include 256 of text
    tiny-flux   the small trained Flux of the tests, 66 tokens
    full-flux   19 and 38 blocks, a picture of 1024x1024 and 512 tokens of text: seconds per step and peak memory, in
                bfloat16; needs a GPU with 48 GB. Peaks are of each model alone, times of both in turns.

A step is model.apply_model(), as samplers call it, of a model that the host has put on its device. Results of both are
compared first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import hosted
import make_files
import measure
import torch
from gguf import GGMLQuantizationType as QType
from measure import Budget, Clock, Report, Timing, digits

DENSE, GGUF = "dense", "GGUF"
# Relative L2 difference of results: in 16 bit the two round at other places.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
TINY_TOKENS, FULL_TOKENS = 64, 4608
FULL_BYTES = 48e9


@dataclass(frozen=True)
class Pair:
    """The same model twice, loaded.

    Attributes:
        quantized, dense: patchers.
        inputs: arguments of apply_model.
    """

    quantized: Any
    dense: Any
    inputs: Mapping[str, Any]

    def mistake(self, tolerance: float) -> str:
        """What is wrong with the quantized model's result, "" if nothing."""
        result, expected = (hosted.step(each, self.inputs) for each in (self.quantized, self.dense))
        error = measure.relative_error(result, expected)
        return "" if error <= tolerance else f"relative error {error:.2g}"

    def measure(self, clock: Clock, budget: Budget) -> dict[str, Timing]:
        actions = {
            GGUF: lambda: hosted.step(self.quantized, self.inputs),
            DENSE: lambda: hosted.step(self.dense, self.inputs),
        }
        return measure.take_turns(actions, clock, budget)


def report_pair(pair: Pair, fields: Mapping[str, object], dtype: torch.dtype, clock: Clock, run: Run) -> None:
    """Check, time and record a model."""
    problem = pair.mistake(TOLERANCES[dtype])
    if problem:
        run.report.fail({"name": GGUF, **fields}, problem)
        return
    timings = pair.measure(clock, run.budget)
    ratio = timings[GGUF].over(timings[DENSE])
    against = {DENSE: {"ms": digits(1e3 * timings[DENSE].median), "time": digits(ratio)}}
    run.report.add({"name": GGUF, **fields, **timings[GGUF].describe(), "against": against})


@dataclass(frozen=True)
class Run:
    """What all models of a run share."""

    options: argparse.Namespace
    device: torch.device
    report: Report
    budget: Budget
    folder: Path


def run_pair(run: Run) -> None:
    """The pair of blocks in each dtype and at each number of tokens."""
    qtype = run.options.qtype
    path = hosted.write_model(run.folder / "pair.gguf", qtype, hosted.flux_shapes(1, 1))
    for dtype_name in run.options.dtypes:
        dtype = measure.DTYPES[dtype_name]
        quantized, dense = hosted.quantized_model(path, dtype), hosted.dense_model(path, dtype)
        hosted.load_all(quantized, dense)
        for tokens in run.options.tokens:
            pair = Pair(quantized, dense, hosted.make_inputs(tokens, run.device))
            fields = {"model": "pair", "qtype": qtype.name, "dtype": dtype_name, "tokens": tokens}
            report_pair(pair, fields, dtype, Clock(run.device, with_launch=True), run)


def run_tiny(run: Run) -> None:
    """The tiny Flux, in float32."""
    path = make_files.write_gguf("Q4_K_S", run.folder / "tiny-flux.gguf")
    dtype = torch.float32
    quantized, dense = hosted.quantized_model(path, dtype), hosted.dense_model(path, dtype)
    hosted.load_all(quantized, dense)
    inputs = hosted.make_inputs(TINY_TOKENS, run.device, text_width=64, vector=64)
    fields = {"model": "tiny-flux", "qtype": "Q4_K", "dtype": "float32", "tokens": 66}
    report_pair(Pair(quantized, dense, inputs), fields, dtype, Clock(run.device, with_launch=True), run)


def run_full(run: Run) -> None:
    """The full Flux: peaks of each alone, then times of both."""
    dtype, qtype = torch.bfloat16, run.options.qtype
    shapes = hosted.flux_shapes(hosted.N_DOUBLE, hosted.N_SINGLE, guidance=True)
    path = hosted.write_model(run.folder / "flux.gguf", qtype, shapes)
    inputs = hosted.make_inputs(FULL_TOKENS, run.device) | {"guidance": torch.tensor([3.5], device=run.device)}
    patchers, peaks = {}, {}
    for name, make in ((GGUF, hosted.quantized_model), (DENSE, hosted.dense_model)):
        patchers[name] = make(path, dtype)
        peaks[name] = peak_of_step(patchers[name], inputs)
    hosted.load_all(*patchers.values())
    fields = {"model": "full-flux", "qtype": qtype.name, "dtype": "bfloat16", "tokens": FULL_TOKENS}
    fields |= {"peak_gb": digits(peaks[GGUF] / 1e9), "dense_peak_gb": digits(peaks[DENSE] / 1e9)}
    pair = Pair(patchers[GGUF], patchers[DENSE], inputs)
    report_pair(pair, fields, dtype, Clock(run.device, with_launch=True), run)


def peak_of_step(patcher: Any, inputs: Mapping[str, Any]) -> int:
    """Peak bytes of the GPU's memory while a model that is there alone makes a step."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    hosted.load_all(patcher)
    torch.cuda.reset_peak_memory_stats()
    hosted.step(patcher, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


MODELS = {"pair": run_pair, "tiny-flux": run_tiny}


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=20, rounds=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--qtype", type=measure.parse_qtype, default=QType.Q4_K, metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, choices=(512, 4096, 4608), default=[512, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=list(measure.DTYPES))
    parser.add_argument("--full-flux", action="store_true", help="the full model too")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.full_flux:
        measure.require_cuda(parser, "--full-flux")
        if torch.cuda.get_device_properties(0).total_memory < FULL_BYTES:
            parser.error(f"--full-flux needs {FULL_BYTES / 1e9:.0f} GB of GPU memory")
    options.models = options.models or (["tiny-flux"] if options.quick else list(MODELS))
    options.dtypes = options.dtypes or (["float32"] if device.type == "cpu" else ["bfloat16"])
    hosted.boot_host(options.device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    report = Report("bench_step", options, device)
    with tempfile.TemporaryDirectory() as name:
        run = Run(options, device, report, budget, Path(name))
        for run_model in itertools.chain((MODELS[each] for each in options.models), [run_full] * options.full_flux):
            run_model(run)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
