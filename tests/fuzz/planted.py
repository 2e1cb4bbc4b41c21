# SPDX-License-Identifier: Apache-2.0
"""Readers that are as bad as a reader can be, each in its way: what run.py reports must not depend on luck."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fuzz.mutate import Content
from gguf_kit.errors import BadFile, GGUFError

SLOW_CPU_SECONDS = 0.2


@dataclass(frozen=True)
class Planted:
    """A row as targets.Target, without what that module imports."""

    read: Callable[[Path], object]
    suffix: str = ".bin"

    def make(self) -> Sequence[Content]:
        return [b"content"]

    @staticmethod
    def names_file(error: GGUFError, path: Path) -> bool:
        return path.name in str(error)


def refuse(path: Path) -> None:
    raise BadFile("it is refused", path=path)


def refuse_without_name(path: Path) -> None:
    raise BadFile("it is refused")


def burn(path: Path) -> None:
    end = time.process_time() + SLOW_CPU_SECONDS
    while time.process_time() < end:
        pass


TARGETS: Mapping[str, Planted] = MappingProxyType({
    "read": Planted(Path.read_bytes),
    "refused": Planted(refuse),
    "unnamed file": Planted(refuse_without_name),
    "error": Planted(lambda path: {}[path]),
    "memory": Planted(lambda path: bytearray(b"\1") * (250 << 20)),
    "slow": Planted(burn),
    "crash": Planted(lambda path: os.abort()),
    "hang": Planted(lambda path: time.sleep(600)),
})  # fmt: skip
