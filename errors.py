# SPDX-License-Identifier: Apache-2.0
"""The errors a user of the pack can meet. Every one is a single sentence: where, what is wrong, what to do."""

from __future__ import annotations

import os

MAX_NAMES_SHOWN = 5
MAX_TEXT_SHOWN = 120


class GGUFError(ValueError):
    """A file, tensor or model that cannot be used, said in words the user can act on.

    Attributes:
        path: the file the message is about, or None.
        subject: the tensor, metadata key or section at fault, or "".
        hint: what the user can do about it, or "".
    """

    def __init__(
        self, problem: str, *, path: str | os.PathLike[str] | None = None, subject: str = "", hint: str = ""
    ) -> None:
        self.path = path
        self.subject = subject
        self.hint = hint
        where = f"{os.path.basename(path)}: " if path is not None else ""
        problem = problem.rstrip(".")
        super().__init__(f"{where}{problem}. {hint}" if hint else f"{where}{problem}.")


class BadFile(GGUFError):
    """The bytes are not a usable GGUF file: wrong magic, truncated, inconsistent."""


class UnsupportedArch(GGUFError):
    """The file is sound but holds a model that cannot be loaded here."""


class UnsupportedQtype(GGUFError):
    """A tensor is stored in a type without a dequantizer."""


def plain_text(text: str) -> str:
    """Text from a file as it may stand in a message: on one line, printable, not endlessly long."""
    shown = text if len(text) <= MAX_TEXT_SHOWN else f"{text[: MAX_TEXT_SHOWN - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in shown)


def name_list(names: list[str]) -> str:
    """Join names for a message, at most MAX_NAMES_SHOWN of them and a count of the rest."""
    shown = ", ".join(plain_text(name) for name in names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return f"{shown} (+{rest} more)" if rest > 0 else shown
