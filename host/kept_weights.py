# SPDX-License-Identifier: Apache-2.0
"""The weights of a model that stay dequantized on the compute device: which they are, and that they fit a budget.

Time saved per byte kept is what dequantizing a weight costs over what it takes as a float, and that depends on its
qtype alone; every call saves a fixed cost on top, which counts for more in small layers. So the order is: qtypes with
the most work per weight first, small layers before large ones, then by name. How many tokens a layer sees does not
matter: it is dequantized once per call. The bytes stay what is saved, patched and offloaded; a kept weight is what
dequantizing them gives, to the bit. When there is room, and when it must be given back, patcher.py knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..layouts import LAYOUTS, Layout
from .compat import is_quantized, quantized_modules


def work_per_weight(layout: Layout) -> float:
    """What dequantizing a weight takes: integers taken out of words, tables looked up, products and sums."""
    work = 1.0  # the product with d
    for name, code in layout.codes().items():
        n_codes = layout.n_codes(code) / layout.block_size
        n_planes = sum(len(part) for part in code.parts) / len(code.parts)
        work += n_codes * n_planes + (n_codes * code.book.width if code.book else 0)
        work += name in ("delta", "signs", "mins")
    return work + bool(layout.m)


class KeptWeights:
    """The layers of one model that may keep their weight dequantized, those that gain most first.

    Attributes:
        budget: bytes that they may take together.
    """

    def __init__(self, model: torch.nn.Module, budget: int) -> None:
        self.budget = budget
        found = [(name, module) for name, module in quantized_modules(model) if module.can_keep]
        self._modules = [module for _, module in sorted(found, key=lambda item: _rank(*item))]

    def size(self) -> int:
        """Bytes that are kept now."""
        return sum(module.kept_bytes() for module in self._modules)

    def planned(self, dtype: torch.dtype) -> int:
        """Bytes that will be kept in a compute dtype where there is room for all that the budget allows."""
        return sum(_size(module, dtype) for module in self._choose(self.budget, dtype))

    def fill(self, device: torch.device, dtype: torch.dtype, room: float) -> None:
        """Keep as much as budget and room allow on a device, and nothing else. Room is in bytes, all kept ones in it.

        Raises:
            torch.OutOfMemoryError: as every allocation.
        """
        chosen = {id(module) for module in self._choose(min(self.budget, room), dtype)}
        for module in self._modules:  # first those that go: they make room
            if id(module) not in chosen:
                module.drop_kept()
        for module in self._modules:
            if id(module) in chosen:
                module.keep(device, dtype)

    def release(self, n_bytes: float) -> int:
        """Drop kept weights, those that gain least first, until n_bytes are free or none is left; bytes freed."""
        freed = 0
        for module in reversed(self._modules):
            if freed >= n_bytes:
                break
            freed += module.kept_bytes()
            module.drop_kept()
        return freed

    def _choose(self, n_bytes: float, dtype: torch.dtype) -> Iterator[Any]:
        """The layers to keep in so many bytes; one that does not fit leaves its place to the next that does."""
        for module in self._modules:
            if is_quantized(module.weight) and _size(module, dtype) <= n_bytes:
                n_bytes -= _size(module, dtype)
                yield module


def _size(module: Any, dtype: torch.dtype) -> int:
    return int(module.weight.numel()) * dtype.itemsize


def _rank(name: str, module: Any) -> tuple[float, int, str]:
    return -work_per_weight(LAYOUTS[module.weight._params.qtype]), module.weight.numel(), name
