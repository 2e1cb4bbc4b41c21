# SPDX-License-Identifier: Apache-2.0
"""Memory for results on a CPU.

Owns empty(). The system hands out fresh memory page by page as it is first touched, which costs several times what it
takes to dequantize into it, and gets all of it back when the result is gone. So the memory of the last large result is
held, and used again for one of the same size once nobody else has it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

# Smaller memory stays with the process anyway; larger is not worth to be held.
MIN_BYTES, MAX_BYTES = 4 << 20, 256 << 20


# How many tensors and Python objects have a storage, by its address.
def _find_counter() -> Callable[[int], int] | None:
    """torch's own function, if it counts as it is understood here."""
    count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    probe = torch.UntypedStorage(1, device="cpu")  # type: ignore[no-untyped-call]
    if count is None or count(probe._cdata) != 1:
        return None
    user = torch.empty(0, dtype=torch.uint8, device="cpu").set_(probe)
    return count if count(user.untyped_storage()._cdata) == 2 else None


_count_users = _find_counter()
_lock = threading.Lock()
_held: list[torch.UntypedStorage] = []  # one at most


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is not filled yet. Its memory is its own for as long as it, or a view of it, is there."""
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not MIN_BYTES <= n_bytes <= MAX_BYTES or _count_users is None:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        if not (_held and _held[0].nbytes() == n_bytes and _is_alone()):
            _held[:] = [torch.UntypedStorage(n_bytes, device="cpu")]  # type: ignore[no-untyped-call]
        result: Tensor = torch.empty(0, dtype=dtype, device="cpu").set_(_held[0])
        return result.view(shape)


def release() -> None:
    """Let go what is held."""
    with _lock:
        _held.clear()


def _is_alone() -> bool:
    """Whether nobody has what is held: no tensor, no other object, no other process."""
    storage = _held[0]
    references = 3  # of the list, of this function, and of the question
    alone = _count_users is not None and _count_users(storage._cdata) == 1
    return alone and sys.getrefcount(storage) <= references and not storage.is_shared()
