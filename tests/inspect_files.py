# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files for the tests of inspect_gguf.py, and its command line called in process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_builder as build
import inspect_gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit.layouts import LAYOUTS
from quant_data import dequantize_by_gguf, random_blocks

Stored = tuple[QType, tuple[int, ...], bytes]


@dataclass(frozen=True)
class Run:
    """What one call of the command line did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON it printed; fails on numbers that JSON does not have."""
        document: dict[str, Any] = json.loads(self.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        return document


def run_inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> Run:
    """Call the command line."""
    status = inspect_gguf.main([str(argument) for argument in arguments])
    return Run(status, *capsys.readouterr())


def write_model(
    folder: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, tuple[int, Any]] | None = None,
    name: str = "model.gguf",
) -> Path:
    """Write a sound file; metadata is {key: (value type, content)} as in gguf_builder."""
    rows = [(key, int(qtype), shape, data) for key, (qtype, shape, data) in tensors.items()]
    path = folder / name
    path.write_bytes(build.build_gguf(metadata or {}, rows))
    return path


def tensor_of(qtype: QType, blocks: np.ndarray) -> Stored:
    """Blocks, uint8 (n_blocks, type_size), as a tensor of one block per row."""
    return qtype, (len(blocks), LAYOUTS[qtype].block_size), blocks.tobytes()


def floats(values: Any, shape: tuple[int, ...] | None = None) -> Stored:
    """Numbers as an F32 tensor."""
    values = np.asarray(values, np.float32)
    return QType.F32, values.shape if shape is None else shape, values.tobytes()


def finite_blocks(qtype: QType, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random blocks whose weights are finite by gguf-py: uint8 (n_blocks, type_size)."""
    blocks = random_blocks(LAYOUTS[qtype], 4 * n_blocks, seed)
    finite = np.isfinite(dequantize_by_gguf(blocks, qtype)).all(axis=1)
    if qtype.name == "NVFP4":  # gguf-py reads this nan as 0
        finite &= ((blocks[:, :4] & 0x7F) != 0x7F).all(axis=1)
    return blocks[finite][:n_blocks].copy()
