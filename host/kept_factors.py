# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors that stay on the compute device between forwards, within a budget for each device.

Factors hang on the reference to the patches that they were made of: PatchRef of our patcher or the host's LowVramPatch.
Both make a new one where the patches change, so factors live exactly as long as the patch set that they belong to, and
give back their part of the budget with it. First come, first served: what does not fit any more is copied
to the device in each forward, so that a budget too small for a whole model keeps a part of it instead of nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter

from .low_rank import LowRank, Pair, Patch, join_pairs, n_bytes_joined, plain_pairs

# Of a device's memory, for the factors of all models: 512 MB of 8 GB. A LoRA of rank 32 for Flux takes 150 to 300 MB.
BUDGET_PART = 16
_ATTRIBUTE = "_gguf_factors"


@dataclasses.dataclass(frozen=True, eq=False)
class KeptFactors:
    """What a patch reference is worth: its patches as pairs, and their factors if there is room to keep them.

    Attributes:
        patches: what the factors were made of.
        pairs: None if the patches are anything but plain LoRAs.
        factors: on `device` in `dtype`; None if they are made in each forward, or cannot be made.
    """

    patches: tuple[Patch, ...]
    device: torch.device
    dtype: torch.dtype
    pairs: tuple[Pair, ...] | None
    factors: tuple[LowRank, ...] | None

    def made_of(self, patches: Sequence[Patch]) -> bool:
        """Whether these are the very patches; hosts append to their lists, but never change an entry."""
        return len(patches) == len(self.patches) and all(a is b for a, b in zip(patches, self.patches, strict=True))


class DeviceBudget:
    """Bytes of factors that are kept on each device, of all loaded models together."""

    def __init__(self) -> None:
        self._used: dict[torch.device, int] = {}
        self._lock = threading.RLock()  # a set may be freed by the garbage collector, in any thread

    def used(self, device: torch.device) -> int:
        """Bytes of the factors that are kept on this device now."""
        return self._used.get(device, 0)

    def fits(self, device: torch.device, n_bytes: int) -> bool:
        """Whether so many bytes more may be kept on this device."""
        return self.used(device) + n_bytes <= budget_bytes(device)

    def charge(self, kept: KeptFactors, n_bytes: int) -> None:
        """Count so many bytes until `kept` is freed."""
        self._add(kept.device, n_bytes)
        weakref.finalize(kept, self._add, kept.device, -n_bytes).atexit = False

    def _add(self, device: torch.device, n_bytes: int) -> None:
        with self._lock:
            self._used[device] = self.used(device) + n_bytes


BUDGET = DeviceBudget()


@functools.cache
def budget_bytes(device: torch.device) -> int:
    """The most bytes of factors that are kept on this device."""
    return int(comfy.model_management.get_total_memory(device)) // BUDGET_PART


def factors_of(
    ref: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, keep_all: bool = False
) -> tuple[LowRank, ...] | None:
    """The patches that `ref` refers to as low-rank factors, or None if one of them is anything but a plain LoRA.

    Args:
        ref: a reference with `key` and `patches`, which keeps the factors.
        shape: of the weight.
        keep_all: keep them even where the budget has no room.
    """
    kept: KeptFactors | None = getattr(ref, _ATTRIBUTE, None)
    if kept is not None and (kept.device != device or kept.dtype != dtype):
        kept = None
    # What is kept was compared with the patches when the model was loaded. To do it in compiled code would bind that to
    # the key of one layer, and nothing is kept from within a graph.
    if not torch.compiler.is_compiling() and (kept is None or not kept.made_of(ref.patches.get(ref.key, ()))):
        kept = _keep(ref, shape, device, dtype, keep_all)
    if kept is not None and kept.factors is not None:
        return kept.factors
    pairs = plain_pairs(ref.patches.get(ref.key, ()), shape) if kept is None else kept.pairs
    return None if pairs is None else join_pairs(pairs, device, dtype)


def _keep(ref: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, keep_all: bool) -> KeptFactors:
    """Let `ref` keep its factors if there is room, else its pairs."""
    vars(ref).pop(_ATTRIBUTE, None)  # what it kept until now makes room first
    patches = tuple(ref.patches.get(ref.key, ()))
    pairs, factors = plain_pairs(patches, shape), None
    n_bytes = n_bytes_joined(pairs or (), dtype)
    if pairs is not None and (keep_all or BUDGET.fits(device, n_bytes)):
        # Ordinary tensors serve inside and outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            factors = join_pairs(pairs, device, dtype)
    kept = KeptFactors(patches, device, dtype, pairs, factors)
    if factors:
        BUDGET.charge(kept, n_bytes)
    setattr(ref, _ATTRIBUTE, kept)
    return kept


def hand_over(old: Any, new: Any) -> None:
    """Let a new reference to the same patches keep the factors of the old one; either may be None."""
    kept: KeptFactors | None = getattr(old, _ATTRIBUTE, None)
    if kept is None or kept.factors is None or new is None:  # what found no room may find it now
        return
    if kept.made_of(new.patches.get(new.key, ())):
        setattr(new, _ATTRIBUTE, kept)


def drop_factors(ref: Any) -> None:
    """Free what a reference, or None, keeps; a layer that still needs it makes it again."""
    if ref is not None:
        vars(ref).pop(_ATTRIBUTE, None)


class ExpectedFactors:
    """What the patches of one model's patchers may yet take on their device, for the host's estimate of a step.

    The host asks the model, which does not know which of its patchers is going to be loaded: the largest one counts.
    """

    def __init__(self, patcher: Any, keep_all: bool) -> None:
        self._n_weights: weakref.WeakKeyDictionary[Any, tuple[Any, int]] = weakref.WeakKeyDictionary()
        self._keep_all = keep_all
        self._n_made = 0
        self.add(patcher)

    def add(self, patcher: Any) -> None:
        """Count with a patcher, or a clone of one, for as long as it lives."""
        self._n_weights[patcher] = None, 0

    def made(self, patcher: Any) -> None:
        """Whose factors are there now, as far as there is room; None: nobody's."""
        self._n_made = 0 if patcher is None or patcher not in self._n_weights else self._count(patcher)

    def pending(self, model: Any, dtype: torch.dtype) -> int:
        """Bytes of factors in a compute dtype that are not made yet."""
        patchers = [p for p in [*self._n_weights] if p.model is model and self._count(p) > self._n_made]
        if not patchers:
            return 0
        n_weights, device = max(map(self._count, patchers)) - self._n_made, patchers[0].load_device
        n_bytes = n_weights * dtype.itemsize
        return n_bytes if self._keep_all else min(n_bytes, max(0, budget_bytes(device) - BUDGET.used(device)))

    def _count(self, patcher: Any) -> int:
        """Weights of all LoRAs of a patcher, counted once for a patch set."""
        uuid, n_weights = self._n_weights[patcher]
        if uuid != patcher.patches_uuid:
            n_weights = sum(map(_n_low_rank, patcher.patches.values()))
            self._n_weights[patcher] = patcher.patches_uuid, n_weights
        return n_weights


def _n_low_rank(patches: Sequence[Patch]) -> int:
    adapters = [patch[1] for patch in patches if isinstance(patch[1], LoRAAdapter)]
    return sum(adapter.weights[0].numel() + adapter.weights[1].numel() for adapter in adapters)
