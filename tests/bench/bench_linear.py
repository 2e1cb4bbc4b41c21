# SPDX-License-Identifier: Apache-2.0
"""What a quantized Linear costs in a real ComfyUI, against F.linear with the same weights in the same dtype.

    python tests/bench/bench_linear.py [--qtypes Q4_K Q6_K Q8_0] [--shapes 3072x12288] [--tokens 512 4096]
                                       [--dtypes float32 bfloat16] [--device cuda] [--save]

The layer is the pack's Linear as models get it (make_ops().Linear), called with activations of the dtype; dense is
torch.nn.functional.linear with the dequantized weight in memory. The weight is dequantized in every call. Results are
compared first. All types of one shape, dtype and number of tokens take turns with dense.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence

import _paths  # noqa: F401
import hosted
import measure
import torch
import weights
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from measure import Action, Budget, Case, Clock, Report

DENSE, GGUF = "dense", "GGUF Linear"
# Relative L2 difference of results: the order of sums may differ, and 16-bit results are rounded.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = ("flux-mlp-down", "flux-mlp-up")


def make_layer(data: torch.Tensor, qtype: QType, bias: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    """The pack's Linear over bytes (rows, bytes per row)."""
    from gguf_kit.host.compat import wrap
    from gguf_kit.layouts import weight_shape
    from gguf_kit.ops import make_ops

    shape = weight_shape(qtype, data.shape)
    layer = make_ops().Linear(shape[1], shape[0], bias=True, dtype=dtype)
    layer.load_state_dict({"weight": wrap(data, qtype, shape), "bias": bias})
    return layer


def make_dense(data: torch.Tensor, qtype: QType, dtype: torch.dtype) -> torch.Tensor:
    return dequant.dequantize_rows(data, qtype, dtype)


def run_group(
    qtypes: Sequence[QType], case: Case, device: torch.device, clock: Clock, budget: Budget, report: Report
) -> None:
    """Check and time the layers of all types and a dense one, whose values do not matter for its speed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.shape[1], generator=generator).to(device, case.dtype)
    bias = torch.randn(case.shape[0], generator=generator).to(device, case.dtype)
    actions: dict[str, Action] = {}
    dense = None
    for qtype in qtypes:
        data = weights.make_bytes(qtype, case.shape).to(device)
        layer = make_layer(data, qtype, bias, case.dtype)
        dense = make_dense(data, qtype, case.dtype)
        error = measure.relative_error(layer(x), torch.nn.functional.linear(x, dense, bias))
        if error > TOLERANCES[case.dtype]:
            report.fail(make_case(case, qtype).describe(), f"relative error {error:.2g}")
        else:
            actions[qtype.name] = lambda layer=layer: layer(x)
    actions[DENSE] = lambda: torch.nn.functional.linear(x, dense, bias)
    timings = measure.take_turns(actions, clock, budget)
    record(qtypes, case, timings, report)


def make_case(case: Case, qtype: QType | None) -> Case:
    name = DENSE if qtype is None else GGUF
    return Case(name, qtype, case.shape, case.dtype, case.tokens)


def record(qtypes: Sequence[QType], case: Case, timings: Mapping[str, measure.Timing], report: Report) -> None:
    """A record for dense and each type that was timed."""
    dense = make_case(case, None), timings[DENSE]
    report.add_timing(*dense, {})
    for qtype in qtypes:
        if qtype.name in timings:
            report.add_timing(make_case(case, qtype), timings[qtype.name], {DENSE: dense})


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_device(parser)
    measure.add_budget(parser, seconds=10, rounds=5)
    names = [QType.Q4_K, QType.Q6_K, QType.Q8_0]
    parser.add_argument("--qtypes", nargs="+", type=measure.parse_qtype, default=names, metavar="TYPE")
    parser.add_argument("--shapes", nargs="+", type=measure.parse_shape)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=list(measure.DTYPES))
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    fill_defaults(options, device)
    hosted.boot_host(options.device)
    report = Report("bench_linear", options, device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    clock = Clock(device)
    with torch.inference_mode():
        for shape, tokens, dtype in itertools.product(options.shapes, options.tokens, options.dtypes):
            case = Case(DENSE, None, shape, measure.DTYPES[dtype], tokens)
            run_group(options.qtypes, case, device, clock, budget, report)
    return report.finish()


def fill_defaults(options: argparse.Namespace, device: torch.device) -> None:
    """What was not asked for: small for --quick, else what the device is used with."""
    on_cpu = device.type == "cpu"
    tokens, dtypes = ([1, 77, 512, 4096], ["float32", "bfloat16"]) if on_cpu else ([1, 512, 4096, 4608], ["bfloat16"])
    options.shapes = options.shapes or ([(64, 512)] if options.quick else [measure.LAYERS[name] for name in SHAPES])
    options.tokens = options.tokens or ([8] if options.quick else tokens)
    options.dtypes = options.dtypes or dtypes


if __name__ == "__main__":
    sys.exit(main())
