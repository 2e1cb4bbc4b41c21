# SPDX-License-Identifier: Apache-2.0
"""What recording an importance matrix costs while a model samples in a real ComfyUI: with the collector, and without.

    python tests/bench/bench_collect.py [--models pair tiny-flux] [--qtype Q4_K] [--tokens 512] [--rows 64]
                                        [--steps 4] [--device cuda] [--save]

    pair        one double and one single block as wide as Flux, from a GGUF file of random weights
    tiny-flux   the small trained Flux of the tests, 66 tokens

A sample is comfy.sample.sample() with the Euler sampler over a GGUF model, in the compute dtype that ComfyUI chooses,
and with the collector also the file that is read, added to and written at its end. The latents of both are compared
first: they have to be equal to the last bit. Sensitivity is not measured here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import hosted
import make_files
import measure
import torch
from gguf import GGMLQuantizationType as QType
from measure import Budget, Clock, Report, digits

COLLECTOR, WITHOUT = "collector", "without"
TINY_TOKENS = 64


@dataclass(frozen=True)
class Model:
    """A model with the collector and without, and what it samples from.

    Attributes:
        plain, collecting: patchers over one loaded model.
        inputs: as hosted.make_inputs() gives them.
        steps: of one sampling.
    """

    plain: Any
    collecting: Any
    inputs: dict[str, Any]
    steps: int

    def sample(self, patcher: Any) -> torch.Tensor:
        """The latent of one sampling."""
        import comfy.sample

        noise = self.inputs["x"].cpu()
        prompt = [[self.inputs["c_crossattn"].cpu(), {"pooled_output": self.inputs["y"].cpu()}]]
        options = {"denoise": 1.0, "disable_pbar": True, "seed": 0}
        with torch.inference_mode():
            latent: torch.Tensor = comfy.sample.sample(
                patcher, noise, self.steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise), **options
            )
        return latent


def open_model(patcher: Any, folder: Path, inputs: dict[str, Any], options: argparse.Namespace) -> Model:
    """A model and a clone of it that records into a file in a folder."""
    from gguf_kit.collector import ImatrixFile, collect

    path = folder / "bench.imatrix.gguf"
    path.unlink(missing_ok=True)
    file = ImatrixFile(lambda: path, fresh=False)
    return Model(patcher, collect(patcher, file, options.rows, 0), inputs, options.steps)


def report_model(model: Model, fields: dict[str, object], clock: Clock, budget: Budget, report: Report) -> None:
    """Check, time and record a model."""
    plain, collecting = (model.sample(each) for each in (model.plain, model.collecting))
    if not torch.equal(plain, collecting):
        report.fail({"name": COLLECTOR, **fields}, f"relative error {measure.relative_error(collecting, plain):.2g}")
        return
    actions = {COLLECTOR: lambda: model.sample(model.collecting), WITHOUT: lambda: model.sample(model.plain)}
    timings = measure.take_turns(actions, clock, budget)
    ratio = timings[COLLECTOR].over(timings[WITHOUT])
    against = {WITHOUT: {"ms": digits(1e3 * timings[WITHOUT].median), "time": digits(ratio)}}
    report.add({"name": COLLECTOR, **fields, **timings[COLLECTOR].describe(), "against": against})


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=60, rounds=5)
    parser.add_argument("--models", nargs="+", choices=("pair", "tiny-flux"))
    parser.add_argument("--qtype", type=measure.parse_qtype, default=QType.Q4_K, metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, choices=(512, 4096, 4608), default=[512])
    parser.add_argument("--rows", type=int, default=64, help="rows of each layer's input that are kept (64)")
    parser.add_argument("--steps", type=int, default=4, help="of one sampling (4)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    options.models = options.models or (["tiny-flux"] if options.quick else ["pair", "tiny-flux"])
    hosted.boot_host(options.device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    clock, report = Clock(device, with_launch=True), Report("bench_collect", options, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model_name in options.models:
            run_model(model_name, folder, options, clock, budget, report)
    return report.finish()


def run_model(
    name: str, folder: Path, options: argparse.Namespace, clock: Clock, budget: Budget, report: Report
) -> None:
    """One of the models, at each number of tokens."""
    from gguf_kit.host.patcher import compute_dtype
    from gguf_kit.ops import OpsOptions
    from gguf_kit.service import load_model

    if name == "pair":
        path = hosted.write_model(folder / "pair.gguf", options.qtype, hosted.flux_shapes(1, 1))
        sizes, widths = options.tokens, {}
    else:
        path = make_files.write_gguf("Q4_K_S", folder / "tiny-flux.gguf")
        sizes, widths = [TINY_TOKENS], {"text_width": 64, "vector": 64}
    patcher = load_model(str(path), OpsOptions())
    for tokens in sizes:
        inputs = hosted.make_inputs(tokens, clock.device, **widths)
        dtype = measure.dtype_name(compute_dtype(patcher.model))
        qtype = options.qtype.name if name == "pair" else QType.Q4_K.name
        shown = tokens if name == "pair" else inputs["c_crossattn"].shape[1] + TINY_TOKENS
        fields = {"model": name, "qtype": qtype, "dtype": dtype, "tokens": shown, "rows": options.rows}
        model = open_model(patcher, folder, inputs, options)
        report_model(model, {**fields, "steps": options.steps}, clock, budget, report)


if __name__ == "__main__":
    sys.exit(main())
