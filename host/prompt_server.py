# SPDX-License-Identifier: Apache-2.0
"""The host's web server, as packs meet it when imported: there while ComfyUI runs, absent where its code is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def running_server() -> Any | None:
    """The server, or None where there is none."""
    # Not imported: the host has done that if it serves, and ComfyUI 0.3.75's cannot be imported after its nodes.
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(prompt_server, "instance", None)


def call_when_started(function: Callable[[], None]) -> bool:
    """Have a function called when all packs are loaded and the server begins to answer; False if it never will be."""
    app = getattr(running_server(), "app", None)
    if app is None or app.on_startup.frozen:
        return False

    async def on_startup(_: Any) -> None:
        function()

    app.on_startup.append(on_startup)
    return True
