# SPDX-License-Identifier: Apache-2.0
"""What the node that is running shows in the host's page: a line of text on it, and how far it has come.

Outside of a prompt both do nothing. Source: ComfyUI server.py PromptServer.send_progress_text, whose text the frontend
puts on the node by itself; comfy_execution/utils.py get_executing_context.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from .prompt_server import running_server


def show_text(text: str) -> None:
    """Put text on the node that is running, in the page that has queued it."""
    context, server = get_executing_context(), running_server()
    if text and context is not None and server is not None:
        server.send_progress_text(text, context.node_id, server.client_id)


def progress(total: int) -> Callable[[int], None]:
    """Start the host's progress bar for so many steps or bytes; what it returns is called with those just done.

    Raises (by that call): the host's exception for a prompt that was cancelled.
    """
    if get_executing_context() is None:
        return lambda done: None  # the host would send it to every page
    bar = comfy.utils.ProgressBar(total)

    def advance(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(done)

    return advance
