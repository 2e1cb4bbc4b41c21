# SPDX-License-Identifier: Apache-2.0
"""Writes a model's weights as a safetensors file: quantized ones dequantized, every float rounded once to one type.

The header is known before a weight is read, so tensors are computed piece by piece as they are written, and the file
appears under its name only when it is complete (writer.py). Format: safetensors' README, section "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch

from ..dequant import dequantize_rows
from ..errors import GGUFError, plain_text
from ..models.values import QuantizedBytes, StateDict, Value
from .containers import SAFETENSORS_DTYPES
from .sources import NOT_CARRIED
from .writer import Writer

# What --dtype takes; integers, such as the bytes of tokenizers, keep their type.
FLOAT_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in SAFETENSORS_DTYPES.items()})
HEADER_ALIGNMENT = 8
PIECE_WEIGHTS = 2**22  # 16 MB as float32
WRITER_METADATA = MappingProxyType({"format": "pt"})  # without it readers do not know whose tensors these are

# Called with the key that is being written and the bytes of it that were just done.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Layout:
    """Where everything will be in the file.

    Attributes:
        keys: in the order of the file: the wider a type, the earlier, so that every tensor is aligned to its type.
        header: bytes before the data, the length in front of them included.
        data_bytes: bytes of all tensors.
    """

    keys: tuple[str, ...]
    header: bytes
    data_bytes: int

    @property
    def n_bytes(self) -> int:
        """Size of the complete file."""
        return len(self.header) + self.data_bytes


def make_layout(state: StateDict, dtype: torch.dtype, metadata: Mapping[str, str]) -> Layout:
    """Decide the place of every tensor; no weight is read.

    Args:
        dtype: of all floats in the file, one of FLOAT_TYPES.
        metadata: strings to carry along; those that describe a file instead of a model are left out.
    """
    carried = {key: text for key, text in metadata.items() if key not in NOT_CARRIED}
    entries: dict[str, object] = {"__metadata__": {**carried, **WRITER_METADATA}}
    keys = sorted(state, key=lambda key: -stored_dtype(state[key], dtype).itemsize)
    end = 0
    for key in keys:
        kind, shape = stored_dtype(state[key], dtype), tuple(state[key].shape)
        start, end = end, end + prod(shape) * kind.itemsize
        entries[key] = {"dtype": DTYPE_NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return Layout(tuple(keys), len(text).to_bytes(8, "little") + text, end)


def stored_dtype(value: Value, dtype: torch.dtype) -> torch.dtype:
    """The type of a value in the file: `dtype` for floats, its own for everything else."""
    return dtype if isinstance(value, QuantizedBytes) or value.dtype.is_floating_point else value.dtype


def write_safetensors(
    state: StateDict,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a state dict; beside it, memory holds one piece of one tensor.

    Args:
        dtype, metadata: as for make_layout().
    Raises:
        GGUFError: a weight is too large for dtype, the file exists, or it cannot be written.
    """
    layout = make_layout(state, dtype, metadata)
    with Writer(path, layout.n_bytes, overwrite=overwrite) as writer:
        writer.write(layout.header)
        for key in layout.keys:
            for piece in _pieces(key, state[key], stored_dtype(state[key], dtype)):
                data = piece.contiguous().view(torch.uint8)
                writer.write(data)
                if progress:
                    progress(key, data.numel())


def _pieces(key: str, value: Value, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The numbers of a value in order, as 1-D tensors of `dtype`, each of a few rows."""
    if not prod(value.shape):
        return
    is_quantized = isinstance(value, QuantizedBytes)
    rows = value.data if isinstance(value, QuantizedBytes) else value.reshape(-1, value.shape[-1] if value.dim() else 1)
    n_rows = max(1, PIECE_WEIGHTS * rows.shape[0] // prod(value.shape))
    for start in range(0, rows.shape[0], n_rows):
        piece = rows[start : start + n_rows]
        if isinstance(value, QuantizedBytes):
            piece = dequantize_rows(piece, value.qtype, torch.float32)
        rounded = piece.to(dtype)
        if dtype.is_floating_point and (is_quantized or piece.dtype != dtype):
            _check_range(key, piece, rounded)
        yield rounded.flatten()


def _check_range(key: str, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    if not torch.equal(torch.isfinite(rounded), torch.isfinite(exact)):
        largest = exact[torch.isfinite(exact)].abs().max().item()
        problem = f"has weights up to {largest:.4g}, which {DTYPE_NAMES[rounded.dtype]} cannot hold"
        raise GGUFError(
            f"tensor '{plain_text(key)}' {problem}",
            subject=key,
            hint="Write it with --dtype F32.",
        )
