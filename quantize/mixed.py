# SPDX-License-Identifier: Apache-2.0
"""Encodes each block of a row in whichever way leaves the least error of the outputs, judged by recorded inputs.

Blocks are independent of each other, so a tensor may be encoded several times, each time with the columns weighed in
another way, and put together of blocks. What counts is the error of the output, to which all blocks of a row add with
their signs: blocks are chosen one after another, several times over, such that errors cancel. The bytes are those of
any encoder, so every reader of the type reads them; no other program makes the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from ..dequant import dequantize
from .encode import Engine, encode_rows
from .ggml import requires_imatrix
from .weight_samples import Inputs

SWEEPS = 2  # a third changes a few percent of the blocks, and the error by one or two
# Part of the weight that goes to the mean squares alone: recorded inputs are few, and say too much of how columns move
# together.
SHRINKAGE = 0.05
# Columns are weighed by up to this factor more or less in the encodings that are there to differ from the others.
STRETCH = 4.0
MAX_ERRORS = 2**21  # errors that a thread looks at at a time, in float64 and with their squares: 32 MB


class Weighed(NamedTuple):
    """How the columns weigh in one of the encodings: mean_squares ** power, times factors between 1/4 and 4.

    Attributes:
        power: 0 is without importance, which some types refuse.
        step: of the factors from column to column, in parts of their range, an irrational number; 0 for none.
    """

    power: float
    step: float = 0.0

    def importance(self, mean_squares: torch.Tensor) -> torch.Tensor | None:
        """float32 (n_columns,) for mean squares of that shape; None where all columns weigh the same."""
        if not self.power:
            return None
        importance = mean_squares**self.power
        if self.step:
            place = torch.arange(len(mean_squares), dtype=torch.float64) * self.step % 1  # evenly over 0 to 1
            importance = importance * (STRETCH ** (2 * place - 1)).float()
        return importance


STRETCHED = (Weighed(0.75, 2**0.5), Weighed(0.75, 3**0.5))
ENCODINGS = (Weighed(1.0), Weighed(0.5), Weighed(0.0), *STRETCHED)
ENCODINGS_WITH_IMPORTANCE = (Weighed(1.0), Weighed(0.5), Weighed(0.25), *STRETCHED)


def encode_mixed(
    engine: Engine, rows: torch.Tensor, qtype: QType, inputs: Inputs, name: str, path: Path | None = None
) -> torch.Tensor:
    """Encode some rows of a tensor; errors are those of encode_rows().

    Args:
        rows: (n_rows, n_columns) of any float type, on any device.
        inputs: of the layer, with recorded rows.
        name, path: of the tensor and its source, for errors.
    Returns:
        uint8, the bytes in file order, on the CPU.
    """
    chosen = ENCODINGS_WITH_IMPORTANCE if requires_imatrix(qtype) else ENCODINGS
    weights, inputs = rows.to(engine.device, torch.float32), inputs.to(engine.device)
    mean_squares = inputs.mean_squares.cpu()  # to the same bits for every engine
    encodings, errors = [], torch.empty(len(chosen), *weights.shape, device=weights.device)
    for error, weighed in zip(errors, chosen, strict=True):
        data = encode_rows(engine, weights, qtype, weighed.importance(mean_squares), name, path)
        encodings.append(data)
        torch.sub(dequantize(data.to(weights.device), qtype, tuple(weights.shape)), weights, out=error)
    n_rows, n_columns = weights.shape
    block_size = GGML_QUANT_SIZES[qtype][0]
    picks = choose_blocks(errors, inputs, block_size).cpu()  # (n_rows, n_blocks)
    blocks = torch.stack(encodings).reshape(len(chosen), n_rows, n_columns // block_size, -1)
    index = picks[None, :, :, None].expand(1, *blocks.shape[1:])
    return blocks.gather(0, index).flatten()


def choose_blocks(errors: torch.Tensor, inputs: Inputs, block_size: int) -> torch.Tensor:
    """For each block of each row the encoding to take.

    Args:
        errors: float32 (n_encodings, n_rows, n_columns), what each encoding changes the weights by.
        inputs: of the layer, with recorded rows.
        block_size: columns of a block.
    Returns:
        int64 (n_rows, n_columns / block_size).
    """
    known = inputs.root_mean_rows
    if known is None:
        raise ValueError("there are no recorded rows")
    n_encodings, _, n_columns = errors.shape
    parts = torch.split(errors, max(1, MAX_ERRORS // (n_encodings * n_columns)), 1)
    mean_squares = inputs.mean_squares.double()
    return torch.cat([_choose_for_rows(part.double(), mean_squares, known, block_size) for part in parts])


def _choose_for_rows(
    errors: torch.Tensor, mean_squares: torch.Tensor, known: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The same for some rows; no row depends on the others.

    All in float64: in float32 ties, and so the bytes, would hang on how rows are divided into parts.

    Args:
        known: float64 (n, n_columns), the recorded inputs over the root of their number.
    """
    n_encodings, n_rows, n_columns = errors.shape
    split = errors.reshape(n_encodings, n_rows, -1, block_size)
    # What a block adds to the mean squared output if columns moved independently.
    squares = split.square().mul_(mean_squares.reshape(-1, block_size))
    alone = squares.sum(-1)  # (n_encodings, n_rows, n_blocks)
    del squares
    every = torch.arange(n_rows, device=errors.device)
    start = alone.sum(2).argmin(0)  # (n_rows,)
    picks = start.unsqueeze(1).repeat(1, n_columns // block_size)
    outputs = errors[start, every] @ known.T  # (n_rows, n)
    for _ in range(SWEEPS):
        for i, inputs in enumerate(torch.split(known, block_size, 1)):  # (n, block_size)
            choices = split[:, :, i]  # (n_encodings, n_rows, block_size)
            now, among = choices[picks[:, i], every], inputs.T @ inputs
            # The block's output v with the others' u: |u + v|^2 - |u|^2 = v.v + 2 u.v, all through the columns.
            rest = outputs @ inputs - now @ among
            together = ((choices @ among + 2 * rest) * choices).sum(-1)  # (n_encodings, n_rows)
            picks[:, i] = (together * (1 - SHRINKAGE) + alone[:, :, i] * SHRINKAGE).argmin(0)
            outputs += (choices[picks[:, i], every] - now) @ inputs.T
    return picks
