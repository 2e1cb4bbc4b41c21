# SPDX-License-Identifier: Apache-2.0
"""Encodes float32 rows as blocks of a qtype, by one of two engines that give the same bytes.

`ggml` is ggml's own C code in a library that was built beforehand (ggml.py), `torch` is kernels/torch_encoder.py, which
runs anywhere and on GPUs. Weights that a type cannot hold are refused: ggml would write infinite scales without a word.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Protocol

import torch
from gguf.constants import GGMLQuantizationType as QType

from ..dequant import PLAIN_DTYPES
from ..errors import GGUFError, name_list, plain_text
from ..kernels import torch_encoder
from ..layouts import LAYOUTS, byte_shape
from .ggml import MAX_IQ_WEIGHT, Ggml

FLOAT_DTYPES = {qtype: PLAIN_DTYPES[qtype] for qtype in (QType.F32, QType.F16, QType.BF16)}
ENGINES = ("auto", "ggml", "torch")
DEVICE_THREADS = 2  # one prepares rows while the other's are on the device


class Engine(Protocol):
    """What turns rows into blocks.

    Attributes:
        name: as --engine names it.
        qtypes: what it can encode.
        device: where it wants the weights.
    """

    name: str
    qtypes: frozenset[QType]
    device: torch.device

    def encode(self, weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None) -> torch.Tensor:
        """float32 (n_rows, n_columns) and float32 (n_columns,) or None -> uint8 (n_rows, row_bytes) on the CPU."""


class GgmlEngine:
    """ggml's C code; may be called from many threads, which run side by side."""

    name = "ggml"
    device = torch.device("cpu")

    def __init__(self, library: Path) -> None:
        self._ggml = Ggml(library)
        self.qtypes = frozenset(self._ggml.ENCODABLE)

    def encode(self, weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(byte_shape(qtype, weights.shape), dtype=torch.uint8)
        self._ggml.quantize(weights, qtype, importance, out)
        return out


class TorchEngine:
    """The pure-torch encoder on a device."""

    name = "torch"
    qtypes = torch_encoder.ENCODABLE_QTYPES

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def encode(self, weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None) -> torch.Tensor:
        moved = None if importance is None else importance.to(self.device)
        return torch_encoder.encode(weights.to(self.device), qtype, moved).cpu()


def useful_threads(engine: Engine, n_threads: int) -> int:
    """Of so many threads those that make an engine faster: on a device, few."""
    return n_threads if engine.device.type == "cpu" else min(n_threads, DEVICE_THREADS)


def check_engine(engine: Engine, qtypes: frozenset[QType]) -> None:
    """Refuse types that an engine cannot encode, before anything is written."""
    missing = sorted(q.name for q in qtypes - engine.qtypes - set(FLOAT_DTYPES) if q in LAYOUTS)
    if missing:
        hint = "Use --engine ggml for them." if engine.name == "torch" else "Choose other types."
        raise GGUFError(f"the {engine.name} engine cannot make {name_list(missing)}", hint=hint)


def encode_rows(
    engine: Engine,
    rows: torch.Tensor,
    qtype: QType,
    importance: torch.Tensor | None,
    name: str,
    path: Path | None = None,
) -> torch.Tensor:
    """Encode some rows of a tensor and make sure that every number survived.

    Args:
        rows: (n_rows, n_columns) of any float type.
        importance: float32 (n_columns,) or None.
        name, path: of the tensor and its source, for errors.
    Returns:
        uint8, the bytes in file order.
    Raises:
        GGUFError: weights are not finite, or too large for the type.
    """
    weights = rows.to(torch.float32)
    try:
        if qtype in FLOAT_DTYPES:
            return _encode_floats(weights, qtype)
        return _encode_blocks(engine, weights.contiguous(), qtype, importance)
    except GGUFError as error:
        problem = str(error).removesuffix(error.hint).strip()
        hint = error.hint or f"Keep it at higher precision: --tensor-type '{re.escape(name)}=BF16'."
        raise GGUFError(f"tensor '{plain_text(name)}' {problem}", path=path, subject=name, hint=hint) from error


def _encode_floats(weights: torch.Tensor, qtype: QType) -> torch.Tensor:
    plain = weights.to(FLOAT_DTYPES[qtype])
    if qtype is not QType.F32 and not torch.equal(torch.isfinite(plain), torch.isfinite(weights)):
        raise _too_large(weights, qtype)
    return plain.contiguous().view(torch.uint8).flatten()


def _encode_blocks(
    engine: Engine, weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None
) -> torch.Tensor:
    if not weights.numel():
        return torch.empty(0, dtype=torch.uint8)
    low, high = (float(end) for end in torch.aminmax(weights))
    if not (abs(low) < math.inf and abs(high) < math.inf):  # a NaN fails every comparison
        raise GGUFError("has weights that are NaN or infinite", hint="The source is damaged; take another one.")
    if qtype.name.startswith("IQ") and max(-low, high) > MAX_IQ_WEIGHT:
        raise _too_large(weights, qtype)
    data = engine.encode(weights, qtype, importance).flatten()
    if not scales_are_finite(data, qtype):
        raise _too_large(weights, qtype)
    return data


def _too_large(weights: torch.Tensor, qtype: QType) -> GGUFError:
    largest = float(weights[torch.isfinite(weights)].abs().max())
    return GGUFError(f"has weights up to {largest:.3g}, too large for {qtype.name}")


def scales_are_finite(data: torch.Tensor, qtype: QType) -> bool:
    """Whether all f16 fields (d, dmin, m) of some blocks are finite.

    Args:
        data: uint8, whole blocks of `qtype`.
    """
    layout = LAYOUTS[qtype]
    blocks = data.reshape(-1, layout.type_size)  # (n_blocks, type_size)
    for member in layout.fields:
        if member.element == "f16":
            start = layout.offsets[member.name]
            values = blocks[:, start : start + member.n_bytes].contiguous().view(torch.float16)
            if not bool(torch.isfinite(values).all()):
                return False
    return True
