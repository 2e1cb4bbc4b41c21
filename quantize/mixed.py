# SPDX-License-Identifier: Apache-2.0
"""Encodes each piece of a row in whichever way leaves the least error of the outputs, judged by recorded inputs.

Blocks are independent of each other, so a tensor may be encoded several times, each time with the columns weighed in
another way, and put together of pieces. What counts is the error of the output, to which all pieces of a row add with
their signs: pieces are chosen one after another, several times over, such that errors cancel. The bytes are those of
any encoder, so every reader of the type reads them; no other program makes the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from ..dequant import dequantize
from .encode import Engine, encode_rows
from .ggml import requires_imatrix
from .weight_samples import Inputs

PIECE = 256  # columns, or one block where rows are no multiple of it
SWEEPS = 4
# Exponents of the columns' mean squares in each encoding; 0 is without importance, which some types refuse.
POWERS = (1.0, 0.5, 0.0)
POWERS_WITH_IMPORTANCE = (1.0, 0.5, 0.25)
# Part of the weight that goes to the mean squares alone: recorded inputs are few, and say too much of how columns move
# together.
SHRINKAGE = 0.05
# Numbers of float64 that a thread works with at a time, 32 MB; in float32 ties would hang on the size of chunks.
MAX_OUTPUTS = 2**22


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
    powers = POWERS_WITH_IMPORTANCE if requires_imatrix(qtype) else POWERS
    weights, inputs = rows.to(engine.device, torch.float32), inputs.to(engine.device)
    encodings, errors = [], torch.empty(len(powers), *weights.shape, device=weights.device)
    for error, power in zip(errors, powers, strict=True):
        importance = inputs.mean_squares.cpu() ** power if power else None  # to the same bits for every engine
        data = encode_rows(engine, weights, qtype, importance, name, path)
        encodings.append(data)
        torch.sub(dequantize(data.to(weights.device), qtype, tuple(weights.shape)), weights, out=error)
    n_rows, n_columns = weights.shape
    piece = PIECE if n_columns % PIECE == 0 else GGML_QUANT_SIZES[qtype][0]
    picks = choose_pieces(errors, inputs, piece).cpu()  # (n_rows, n_pieces)
    pieces = torch.stack(encodings).reshape(len(powers), n_rows, n_columns // piece, -1)
    index = picks[None, :, :, None].expand(1, *pieces.shape[1:])
    return pieces.gather(0, index).flatten()


def choose_pieces(errors: torch.Tensor, inputs: Inputs, piece: int) -> torch.Tensor:
    """For each piece of each row the encoding to take.

    Args:
        errors: float32 (n_encodings, n_rows, n_columns), what each encoding changes the weights by.
        inputs: of the layer, with recorded rows.
        piece: columns of a piece.
    Returns:
        int64 (n_rows, n_columns / piece).
    """
    if inputs.rows is None:
        raise ValueError("there are no recorded rows")
    n_encodings, _, n_columns = errors.shape
    n_outputs = n_encodings * (n_columns // piece) * len(inputs.rows)  # of one row
    parts = torch.split(errors, max(1, MAX_OUTPUTS // n_outputs), 1)
    known = inputs.rows.double().reshape(-1, n_columns // piece, piece) / len(inputs.rows) ** 0.5
    return torch.cat([_choose_for_rows(part, inputs.mean_squares, known) for part in parts])


def _choose_for_rows(errors: torch.Tensor, mean_squares: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The same for some rows; no row depends on the others, so that any division into parts gives the same.

    Args:
        known: float64 (n, n_pieces, piece), the recorded inputs over the root of their number.
    """
    n_encodings, n_rows, _ = errors.shape
    _, n_pieces, piece = known.shape
    split = errors.reshape(n_encodings, n_rows, n_pieces, piece).double()
    each = (split.square() * mean_squares.double().reshape(-1, piece)).sum(-1)  # (n_encodings, n_rows, n_pieces)
    alone = each * SHRINKAGE
    outputs = torch.einsum("krpc,npc->prkn", split, known)  # what each piece adds to the error of each output
    every = torch.arange(n_rows, device=errors.device)
    start = each.sum(2).argmin(0)  # (n_rows,)
    picks = start.unsqueeze(1).repeat(1, n_pieces)
    total = outputs[:, every, start].sum(0)  # (n_rows, n)
    for _ in range(SWEEPS):
        for i, choices in enumerate(outputs):  # (n_rows, n_encodings, n)
            rest = total - choices[every, picks[:, i]]
            together = (rest.unsqueeze(1) + choices).square().sum(-1) * (1 - SHRINKAGE)
            picks[:, i] = (together + alone[:, :, i].T).argmin(1)
            total = rest + choices[every, picks[:, i]]
    return picks
