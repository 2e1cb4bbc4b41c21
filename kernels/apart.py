# SPDX-License-Identifier: Apache-2.0
"""Work that must not see the modes of its caller.

Owns run_apart(). Tensors made in inference mode, under fake tensors or autocast spoil every later use outside of it, so
what is kept for all callers is made without any mode.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_apart(function: Callable[..., T], *args: object) -> T:
    """What a function gives in a fresh thread, which has no modes of torch; it raises what the function raises."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args).result()
