# SPDX-License-Identifier: Apache-2.0
"""One tensor of a file as a model takes it: quantized layer weights as bytes, everything else as torch tensors.

Owns QuantizedBytes and the choice between the two. Values are views of the mapped file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from gguf.constants import GGMLQuantizationType

from ..dequant import PLAIN_DTYPES, SUPPORTED_QTYPES, dequantize_rows
from ..errors import BadFile, UnsupportedQtype, plain_text
from ..gguf_file import GGUFFile, TensorInfo
from .tokenizers import BYTE_KEYS


@dataclasses.dataclass(frozen=True)
class QuantizedBytes:
    """A weight as it lies in the file.

    Attributes:
        data: uint8 (n_rows, row_bytes), a view of the mapped file.
        qtype: encoding of the bytes.
        shape: logical shape in torch order; its size is that of the rows, its last dim may differ from a row.
    """

    data: torch.Tensor
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a float tensor of its logical shape."""
        return dequantize_rows(self.data, self.qtype, dtype).reshape(self.shape)


Value = QuantizedBytes | torch.Tensor
StateDict = dict[str, Value]


def shapes_of(state: Mapping[str, Value]) -> dict[str, tuple[int, ...]]:
    """Key -> logical shape, torch order; a host empties the state dict that it is given."""
    return {key: tuple(value.shape) for key, value in state.items()}


def read_tensor(file: GGUFFile, key: str, tensor: TensorInfo) -> Value:
    """One value: layer weights keep their bytes; vectors and bare parameters, which models use as floats, do not."""
    shape, data = file.logical_shape(tensor.name), file.data(tensor.name)
    if key in BYTE_KEYS and tensor.qtype in PLAIN_DTYPES:
        return _bytes(file, tensor, data)
    if tensor.qtype in PLAIN_DTYPES:
        return _plain_tensor(data, PLAIN_DTYPES[tensor.qtype]).reshape(shape)
    if tensor.qtype not in SUPPORTED_QTYPES:
        raise UnsupportedQtype(
            f"tensor '{plain_text(tensor.name)}' has qtype {tensor.qtype.name}, which has no dequantizer here",
            path=file.path,
            subject=tensor.name,
            hint=f"Use a file with one of: {', '.join(sorted(q.name for q in SUPPORTED_QTYPES))}.",
        )
    n_rows = math.prod(tensor.shape[:-1])
    weight = QuantizedBytes(data.reshape(n_rows, -1) if data.numel() else data.reshape(n_rows, 0), tensor.qtype, shape)
    return weight if len(shape) > 1 and key.endswith(".weight") else weight.dequantize()


def _bytes(file: GGUFFile, tensor: TensorInfo, data: torch.Tensor) -> torch.Tensor:
    """The bytes of a tokenizer, uint8 (n_bytes,); GGUF has no uint8, so they are I8 or numbers of a wider type."""
    if tensor.qtype is GGMLQuantizationType.I8:
        return data
    numbers = _plain_tensor(data, PLAIN_DTYPES[tensor.qtype])
    found = numbers.to(torch.uint8)
    if not torch.equal(found.to(numbers.dtype), numbers):
        raise BadFile(
            f"tensor '{plain_text(tensor.name)}' holds a tokenizer, but not only numbers from 0 to 255",
            path=file.path,
            subject=tensor.name,
            hint="Take the file from another source.",
        )
    return found


def _plain_tensor(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as 1-D `dtype`, without a copy when they are aligned for it."""
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def floats(value: Value) -> torch.Tensor:
    """A value as a float tensor, float32 unless it is wider."""
    return value.dequantize() if isinstance(value, QuantizedBytes) else value.float()
