# SPDX-License-Identifier: Apache-2.0
"""A prototype, no part of the product: does it pay to dequantize the next layer's weight beside this layer's product?

    python tests/bench/prototype_overlap.py [--qtype Q4_K] [--tokens 512 4608] [--layers 12] [--save PATH]

A chain of Linears of 3072x12288 and back, on a CUDA device. "in line" dequantizes a weight and multiplies, one layer
after another, as the product does. "overlapped" dequantizes layer i + 1 on a stream of its own while layer i
multiplies, so that two weights are in memory. "dense" only multiplies: in line less dense is all that an overlap could
hide. Results are compared first: both do the same arithmetic, so they must be equal to the bit.

Times are those of the device between two events, with all launches queued. No GPU was at hand when this was written:
it never ran.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import _paths  # noqa: F401
import measure
import torch
import weights
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from measure import Budget, Clock, Report, digits

SHAPES = (measure.LAYERS["flux-mlp-up"], measure.LAYERS["flux-mlp-down"])
DTYPE = torch.bfloat16
INLINE, OVERLAPPED, DENSE = "in line", "overlapped", "dense"


@dataclass(frozen=True)
class Chain:
    """Layers that follow one another.

    Attributes:
        data: uint8 (rows, bytes per row) of each, on the device.
        dense: the weights of the first two layers, for "dense".
        side: the stream that dequantizes.
    """

    qtype: QType
    data: Sequence[torch.Tensor]
    dense: Sequence[torch.Tensor]
    side: torch.cuda.Stream

    def weight(self, i: int) -> torch.Tensor:
        return dequant.dequantize_rows(self.data[i], self.qtype, DTYPE)

    def run_inline(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(self.data)):
            x = torch.nn.functional.linear(x, self.weight(i))
        return x

    def run_dense(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(self.data)):
            x = torch.nn.functional.linear(x, self.dense[i % 2])
        return x

    def run_overlapped(self, x: torch.Tensor) -> torch.Tensor:
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        ready = self._prepare(0)
        for i in range(len(self.data)):
            weight, event = ready
            if i + 1 < len(self.data):
                ready = self._prepare(i + 1)
            main.wait_event(event)
            x = torch.nn.functional.linear(x, weight)
            weight.record_stream(main)  # its memory is not given away before main is done with it
        return x

    def _prepare(self, i: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Layer i's weight, dequantized on the side stream, and when it is there."""
        with torch.cuda.stream(self.side):
            weight = self.weight(i)
            return weight, self.side.record_event()


def make_chain(qtype: QType, n_layers: int, device: torch.device) -> Chain:
    data = [weights.make_bytes(qtype, SHAPES[i % 2], seed=i).to(device) for i in range(n_layers)]
    dense = [dequant.dequantize_rows(each, qtype, DTYPE) for each in data[:2]]
    return Chain(qtype, data, dense, torch.cuda.Stream(device))


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    measure.add_budget(parser, seconds=5, rounds=10)
    parser.add_argument("--qtype", type=measure.parse_qtype, default=QType.Q4_K, metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4608])
    parser.add_argument("--layers", type=int, default=12, help="an even number")
    options = parser.parse_args(argv)
    measure.require_cuda(parser, "the overlap of streams")
    device = torch.device("cuda")
    report, clock = Report("prototype_overlap", options, device), Clock(device)
    chain = make_chain(options.qtype, 4 if options.quick else options.layers, device)
    budget = Budget(0, 2) if options.quick else Budget(options.seconds, options.rounds)
    for tokens in options.tokens:
        x = torch.randn(tokens, SHAPES[0][1], device=device, dtype=DTYPE)
        fields = {"qtype": options.qtype.name, "dtype": measure.dtype_name(DTYPE), "tokens": tokens}
        if not torch.equal(chain.run_inline(x), chain.run_overlapped(x)):
            report.fail({"name": OVERLAPPED, **fields}, "the result is not that of in line")
            continue
        runs = {INLINE: chain.run_inline, OVERLAPPED: chain.run_overlapped, DENSE: chain.run_dense}
        actions = {name: lambda run=run, x=x: run(x) for name, run in runs.items()}
        timings = measure.take_turns(actions, clock, budget)
        base = timings[DENSE]
        for name, timing in timings.items():
            against = {DENSE: {"ms": digits(1e3 * base.median), "time": digits(timing.over(base))}}
            report.add({"name": name, **fields, **timing.describe(), "against": against})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
