# SPDX-License-Identifier: Apache-2.0
"""What plain LoRAs cost on quantized weights in a real ComfyUI: a Linear and a step of two blocks, with and without.

    python tests/bench/bench_lora.py [--loras 1 4] [--rank 32] [--qtype Q4_K] [--tokens 512 4096]
                                     [--dtypes float32] [--device cuda] [--save]

LoRAs are added as a user adds them, one comfy.sd.load_lora_for_models() after another, on every matrix of one double
and one single block as wide as Flux. A model for each number of LoRAs is loaded, over the same file, and they take
turns. The Linear is double_blocks.0.img_mlp.2 (3072x12288) of those models. Its result is compared with that of the
dense weight plus the products of the factors, first. --quick takes the tests' tiny Flux instead.
"""

from __future__ import annotations

import argparse
import functools
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
from gguf_kit import dequant
from measure import Action, Budget, Clock, Report, Timing, digits

LINEAR = "double_blocks.0.img_mlp.2"
STRENGTH = 0.8
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def make_lora(patcher: Any, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA file's state dict for all matrices of a model's blocks, some percent of their weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if "_blocks." in name and isinstance(module, torch.nn.Linear):
            n_out, n_in = module.weight.shape
            key = f"diffusion_model.{name}"
            state[f"{key}.lora_up.weight"] = torch.randn(n_out, rank, generator=generator) * 1e-2
            state[f"{key}.lora_down.weight"] = torch.randn(rank, n_in, generator=generator) / rank
            state[f"{key}.alpha"] = torch.tensor(float(rank))
    return state


def add_loras(patcher: Any, loras: Sequence[dict[str, torch.Tensor]]) -> Any:
    """A clone of the model with these LoRAs, as the host's node makes it."""
    import comfy.sd

    for lora in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, dict(lora), STRENGTH, 0)
    return patcher


def find_linear(patcher: Any) -> torch.nn.Module:
    module: torch.nn.Module = patcher.model.diffusion_model.get_submodule(LINEAR)
    return module


def mistake(patcher: Any, loras: Sequence[dict[str, torch.Tensor]], dtype: torch.dtype) -> str:
    """What is wrong with the Linear's result, "" if nothing."""
    module = find_linear(patcher)
    weight = module.weight
    device = weight.device
    dense = dequant.dequantize(weight._qdata, weight._params.qtype, tuple(weight.shape))
    for lora in loras:
        up, down = (lora[f"diffusion_model.{LINEAR}.lora_{name}.weight"].to(device) for name in ("up", "down"))
        dense = dense + STRENGTH * (up @ down)
    x = torch.randn(33, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = torch.nn.functional.linear(x.float(), dense, module.bias.float())
    error = measure.relative_error(module(x), expected)
    return "" if error <= TOLERANCES[dtype] else f"relative error {error:.2g}"


@dataclass(frozen=True)
class Models:
    """The same model with several numbers of LoRAs.

    Attributes:
        patchers: {number of LoRAs: patcher}, all loaded.
        fields: what their records have in common.
    """

    patchers: Mapping[int, Any]
    fields: Mapping[str, object]

    def linears(self, tokens: int, clock: Clock, dtype: torch.dtype) -> dict[str, Action]:
        """A call of the Linear for each number of LoRAs."""
        layers = {str(n): find_linear(patcher) for n, patcher in self.patchers.items()}
        x = torch.randn(tokens, layers["0"].in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(clock.device, dtype)
        return {n: functools.partial(layer, x) for n, layer in layers.items()}

    def steps(self, inputs: Mapping[str, Any]) -> dict[str, Action]:
        """A step for each number of LoRAs."""
        return {str(n): functools.partial(hosted.step, patcher, inputs) for n, patcher in self.patchers.items()}


def load_models(path: Path, dtype: torch.dtype, options: argparse.Namespace, report: Report) -> Models | None:
    """The models with 0 and each of the wanted numbers of LoRAs, or None, reported, if one computes wrongly."""
    plain = hosted.quantized_model(path, dtype)
    loras = [make_lora(plain, options.rank, seed) for seed in range(max(options.loras))]
    patchers = {0: plain} | {n: add_loras(hosted.quantized_model(path, dtype), loras[:n]) for n in options.loras}
    hosted.load_all(*patchers.values())
    fields = {"qtype": options.qtype.name, "dtype": measure.dtype_name(dtype), "rank": options.rank}
    for n, patcher in patchers.items():
        problem = mistake(patcher, loras[:n], dtype)
        if problem:
            report.fail({"name": "Linear", **fields, "loras": n}, problem)
            return None
    return Models(patchers, fields)


def record(what: str, tokens: int, models: Models, timings: Mapping[str, Timing], report: Report) -> None:
    """A record for each number of LoRAs."""
    plain = timings["0"]
    for n, timing in timings.items():
        against = {"without": {"ms": digits(1e3 * plain.median), "time": digits(timing.over(plain))}}
        case = {"name": what, **models.fields, "loras": int(n), "tokens": tokens}
        report.add({**case, **timing.describe(), "against": against})


def run_dtype(path: Path, dtype: torch.dtype, options: argparse.Namespace, clock: Clock, report: Report) -> None:
    """Check, time and record the Linear and the step at each number of tokens."""
    models = load_models(path, dtype, options, report)
    if models is None:
        return
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    widths = {"text_width": 64, "vector": 64} if options.quick else {}
    for tokens in options.tokens:
        inputs = hosted.make_inputs(tokens, clock.device, **widths)
        timings = measure.take_turns(models.linears(tokens, clock, dtype), clock, budget)
        record("Linear", tokens, models, timings, report)
        record("step", tokens, models, measure.take_turns(models.steps(inputs), clock, budget), report)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=20, rounds=3)
    parser.add_argument("--loras", nargs="+", type=int, default=[1, 4], help="how many (1 4)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--qtype", type=measure.parse_qtype, default=QType.Q4_K, metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, choices=(64, 512, 4096, 4608))
    parser.add_argument("--dtypes", nargs="+", choices=list(measure.DTYPES))
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    options.tokens = options.tokens or ([64] if options.quick else [512, 4096])
    options.dtypes = options.dtypes or (["float32"] if device.type == "cpu" else ["bfloat16"])
    hosted.boot_host(options.device)
    report = Report("bench_lora", options, device)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        path = Path(name) / "model.gguf"
        if options.quick:
            make_files.write_gguf("Q4_K_S", path)
        else:
            hosted.write_model(path, options.qtype, hosted.flux_shapes(1, 1))
        for dtype_name in options.dtypes:
            run_dtype(path, measure.DTYPES[dtype_name], options, Clock(device, with_launch=True), report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
