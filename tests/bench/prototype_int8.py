# SPDX-License-Identifier: Apache-2.0
"""A prototype, no part of the product: an approximate Linear in 8-bit integers, how fast and how wrong.

    python tests/bench/prototype_int8.py [--qtypes Q4_K Q8_0] [--tokens 77 512 4096] [--dtype float32]
                                         [--device cuda] [--save PATH]

The weight is rounded again, to int8 with one scale for each output row; the activations to int8 with one scale for each
token; torch._int_mm multiplies them in integers (tensor cores on a GPU, VNNI or AMX on a CPU), and the int32 sums are
scaled. Three ways are timed against F.linear with the dense weight:

    int8, weights kept      int8 weights are made once and stay: one byte a weight, whatever the file had
    int8, from the file     they are made in each call, from bytes as the file has them: dequantize, round, multiply
    GGUF                    dequantize, F.linear: what the product does

"error" is the relative L2 difference to the float32 product with the exactly dequantized weight, for normally
distributed activations; "with outliers", when one channel of 64 is 20 times as large, as in diffusion transformers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence

import _paths  # noqa: F401
import measure
import torch
import weights
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from measure import Action, Budget, Clock, Report, digits

DENSE = "dense"
OUTLIERS, OUTLIER_SCALE = 64, 20.0


def round_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (n, k) as int8 (n, k) and one scale (n, 1) for each row, in the matrix's dtype."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127  # (n, 1)
    return torch.round(values / scale).to(torch.int8), scale


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (tokens, in) by int8 weight (out, in) with scale (out, 1): (tokens, out) in x's dtype, approximately."""
    codes, x_scale = round_rows(x)
    sums = torch._int_mm(codes, weight.t())  # (tokens, out), int32
    return (sums.float() * x_scale.float() * scale.float().t()).to(x.dtype)


def make_actions(data: torch.Tensor, qtype: QType, x: torch.Tensor, dense: torch.Tensor) -> dict[str, Action]:
    """The contestants, each a function without arguments that gives (tokens, out)."""
    kept = round_rows(dense)
    return {
        DENSE: lambda: torch.nn.functional.linear(x, dense),
        "GGUF": lambda: torch.nn.functional.linear(x, dequant.dequantize_rows(data, qtype, x.dtype)),
        "int8, weights kept": lambda: multiply(x, *kept),
        "int8, from the file": lambda: multiply(x, *round_rows(dequant.dequantize_rows(data, qtype, x.dtype))),
    }


def errors(data: torch.Tensor, qtype: QType, x: torch.Tensor) -> dict[str, float]:
    """How wrong the integers are, without and with large channels."""
    exact = dequant.dequantize_rows(data, qtype, torch.float32)
    codes = round_rows(exact)
    large = x.float().clone()
    large[:, ::OUTLIERS] *= OUTLIER_SCALE
    found = {}
    for name, each in (("error", x.float()), ("error_with_outliers", large)):
        found[name] = measure.relative_error(multiply(each, *codes), torch.nn.functional.linear(each, exact))
    return {name: digits(error) for name, error in found.items()}


def run_group(
    fields: Mapping[str, object],
    actions: Mapping[str, Action],
    found: Mapping[str, float],
    clock: Clock,
    run: Report,
    budget: Budget,
) -> None:
    """Time and record one matrix at one number of tokens."""
    timings = measure.take_turns(actions, clock, budget)
    base = timings[DENSE]
    for name, timing in timings.items():
        against = {DENSE: {"ms": digits(1e3 * base.median), "time": digits(timing.over(base))}}
        wrong = found if name.startswith("int8") else {}
        run.add({"name": name, **fields, **timing.describe(), **wrong, "against": against})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=5, rounds=5)
    parser.add_argument("--qtypes", nargs="+", type=measure.parse_qtype, default=[QType.Q4_K, QType.Q8_0])
    parser.add_argument("--shape", type=measure.parse_shape, default=measure.LAYERS["flux-mlp-down"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[77, 512, 4096])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device, dtype = torch.device(options.device), measure.DTYPES[options.dtype]
    report, clock = Report("prototype_int8", options, device), Clock(device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    shape, tokens = ((64, 512), [32]) if options.quick else (options.shape, options.tokens)
    with torch.inference_mode():
        for qtype, n in itertools.product(options.qtypes, tokens):
            data = weights.make_bytes(qtype, shape).to(device)
            x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
            fields = {"qtype": qtype.name, "dtype": options.dtype, "shape": list(shape), "tokens": n}
            actions = make_actions(data, qtype, x, dequant.dequantize_rows(data, qtype, dtype))
            run_group(fields, actions, errors(data, qtype, x), clock, report, budget)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
