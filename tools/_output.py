# SPDX-License-Identifier: Apache-2.0
"""How the command lines print: to readers that go away, in encodings that lack characters."""

from __future__ import annotations

import io
import os
import sys


def write_out(text: str) -> None:
    """Print; a reader that has gone away (| head) is no error, and characters that its encoding lacks are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # What is left in the buffer would be tried again, and fail, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(message: str) -> str:
    """A message as one printable line."""
    return "".join(c if c.isprintable() else "?" for c in message)
