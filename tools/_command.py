# SPDX-License-Identifier: Apache-2.0
"""How a command line that writes a file ends: clean up at every signal, one line on stderr for every refusal.

Also which files it must not write over: those that it reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gguf_kit.errors import GGUFError, name_list
from gguf_kit.models.split_files import present_parts
from gguf_kit.quantize.writer import file_exists, leftovers
from gguf_kit.tools._output import one_line
from tqdm import tqdm

# Ends of the program that can be caught: Ctrl-C, kill, a closed terminal (SIGHUP, on Windows SIGBREAK).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asked the program to end; what it leaves behind is removed on the way out."""


def check_destination(path: Path, *sources: Path) -> None:
    """Refuse to write over a source or a part of one, by whatever name.

    Raises:
        GGUFError: the file to write is one of those that are read.
    """
    if not path.exists():
        return
    for source in sources:
        parts = present_parts(str(source)) if source.exists() else []
        if any(os.path.samefile(path, part) for part in parts):
            raise GGUFError("source and destination are the same file", path=path, hint="Name another.")


def tell_leftovers(prog: str, path: Path) -> None:
    """Name the unfinished files that killed runs left beside the file to write."""
    unfinished = leftovers(path)
    if unfinished:
        say(f"{prog}: unfinished files of earlier runs may be deleted: {name_list([p.name for p in unfinished])}")


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Write a small file, never over an existing one unasked."""
    try:
        with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise file_exists(path) from None
    except OSError as error:
        raise GGUFError(f"cannot be written: {error.strerror}", path=path, hint="Check the folder.") from error


def say(line: str) -> None:
    """A line for the user, beside the progress bar."""
    tqdm.write(one_line(line), file=sys.stderr)


def _stop(number: int, _frame: object) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the cleaning up
    raise Stopped(number)


def run_command(prog: str, command: Callable[[], int]) -> int:
    """The exit code of a command: its own, 2 with one line where it refuses.

    A signal ends the process here, with 128 + its number, when all is cleaned up.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)  # so that unfinished files are removed
    stopped_by = 0
    try:
        return command()
    except GGUFError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror}."
    except MemoryError:
        message = "there is not enough memory. Close other programs."
    except Stopped as stopped:
        message, stopped_by = "stopped; nothing was written", int(stopped.args[0])
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    say(f"{prog}: {message}")
    if stopped_by:
        # A thread that was being started when the signal came is in no pool's list, so nothing waits for it; torch
        # aborts the process if the interpreter ends beneath such a thread.
        with contextlib.suppress(OSError):  # its terminal may be gone
            sys.stdout.flush()
        os._exit(128 + stopped_by)
    return 2
