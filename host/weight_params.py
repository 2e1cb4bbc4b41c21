# SPDX-License-Identifier: Apache-2.0
"""What the bytes of a quantized weight mean, in the form that comfy_kitchen wants of a layout's parameters."""

from __future__ import annotations

import dataclasses

import torch
from gguf.constants import GGMLQuantizationType


@dataclasses.dataclass(frozen=True)
class WeightParams:
    """What the bytes of a weight mean.

    Attributes:
        qtype: how the bytes are encoded.
        orig_dtype: the float dtype the weight claims to have; changing it moves no data.
        orig_shape: logical shape in torch order; may differ from the rows of the bytes (comfy.gguf.orig_shape).
    """

    qtype: GGMLQuantizationType
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]

    def _tensor_fields(self) -> list[str]:
        return []

    def to_device(self, device: torch.device) -> WeightParams:
        return self

    def clone(self) -> WeightParams:
        return dataclasses.replace(self)

    def copy_from(self, src: WeightParams, non_blocking: bool = False) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, getattr(src, field.name))
