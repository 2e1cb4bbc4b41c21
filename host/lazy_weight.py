# SPDX-License-Identifier: Apache-2.0
"""What a state dict shows of a quantized weight: bytes to be counted, and a float tensor once somebody needs one."""

from __future__ import annotations

import collections
from typing import Any

import torch

_LazyDevice = collections.namedtuple("_LazyDevice", ["type", "index"])


class LazyWeight(torch.Tensor):
    """What state_dict() holds for a quantized weight: a float tensor that is made when somebody computes with it.

    The host weighs a model by its state dict and saves it through safetensors, which calls .to("cpu") on each tensor
    just before writing it. So it reports the bytes the weight occupies, its logical shape and dtype, and makes the
    float weight, patches merged, when it is moved, converted or used.

    Attributes:
        module: the layer that holds the weight.
    """

    module: Any

    @staticmethod
    def __new__(cls, module: Any) -> LazyWeight:
        shell = torch.empty(module.weight.shape, dtype=module.weight.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shell)

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def device(self) -> Any:
        return _LazyDevice("gguf-lazy", 0)

    @property
    def nbytes(self) -> int:
        return self.module.weight._qdata.nbytes

    def nelement(self) -> int:
        return self.nbytes

    def element_size(self) -> int:
        return 1

    def detach(self) -> LazyWeight:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        return self

    def merged(self) -> torch.Tensor:
        """The float weight with the patches in force."""
        patch = self.module.base_patch()
        return self.module.merged_weight(self.module.active_patches(), patch.key if patch else "")

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.merged().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Questions about shape and kind are answered by the shell; everything else computes with the float weight."""
        if func in _ANSWERED_BY_SHELL:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_merge_all(args), **_merge_all(kwargs or {}))


_ANSWERED_BY_SHELL = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "layout", "ndim", "requires_grad", "is_meta")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_sparse", "is_nested", "is_quantized")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_inference")),
    *(getattr(torch.Tensor, name) for name in ("is_floating_point", "untyped_storage", "data_ptr", "__len__")),
}


def _merge_all(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value.merged()
    if isinstance(value, dict):
        return {k: _merge_all(v) for k, v in value.items()}
    return type(value)(_merge_all(v) for v in value) if type(value) in (list, tuple) else value
