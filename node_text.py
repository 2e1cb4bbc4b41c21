# SPDX-License-Identifier: Apache-2.0
"""The line that a loader node shows after loading: what the file is, its type, its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .dequant import PLAIN_NAMES
from .host.page import show_text
from .loader import LoadInfo, loaded_files

MAX_TYPES_SHOWN = 4
NOT_LOADED = "not loaded"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Loaded:
    """What a node has loaded: from GGUF files, and the paths of those that the host reads itself."""

    infos: list[LoadInfo]
    by_host: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A line a file."""
        named = len(self.infos) + len(self.by_host) > 1
        return "\n".join([*(line_of(info, named=named) for info in self.infos), *map(host_line, self.by_host)])


@contextmanager
def described() -> Iterator[Loaded]:
    """Show on the running node what is loaded inside the block; "not loaded" if that fails or nothing is.

    The block adds to by_host itself; infos of GGUF files come by themselves.
    """
    text = ""
    try:
        with loaded_files() as infos:
            loaded = Loaded(infos)
            yield loaded
        text = loaded.text()
    finally:
        show_text(text or NOT_LOADED)  # the line of what was loaded before would stay


def host_line(path: str) -> str:
    """Such as "clip_l.safetensors: as ComfyUI reads it, 246.1 MB"."""
    return f"{os.path.basename(path)}: as ComfyUI reads it, {size_text(os.path.getsize(path))}"


def line_of(info: LoadInfo, *, named: bool = False) -> str:
    """Such as "Flux, Q4_K_S, 6.80 GB: 304 Q4_K, 5 BF16, 471 F32".

    Args:
        named: begin with the file's name.
    """
    beside = [os.path.basename(path) for path in (info.extra, info.vision) if path]
    model = " with ".join([info.title, *beside])
    name = f"{os.path.basename(info.path)}: " if named else ""
    return f"{name}{model}, {type_name(info)}, {size_text(info.n_bytes)}: {_types(info)}"


def type_name(info: LoadInfo) -> str:
    """The file's type as it says itself, such as Q4_K_S; that of most of its bytes if it says none or a wrong one."""
    main = max(info.type_bytes, key=lambda name: info.type_bytes[name], default="no tensors")
    if info.file_type in PLAIN_NAMES:
        return main  # often left over from the file that was quantized
    # Mixtures are named after the bits of a type that they hold: Q4_K_S of Q4_K, IQ3_M of IQ3_S.
    return info.file_type if _bits(info.file_type) in map(_bits, info.type_bytes) else main


def _bits(type_name: str) -> str:
    return type_name.partition("_")[0]


def _types(info: LoadInfo) -> str:
    """Numbers of tensors of each type, those first that have most of the bytes."""
    names = sorted(info.qtypes, key=lambda name: -info.type_bytes[name])
    rest = len(names) - MAX_TYPES_SHOWN
    shown = [f"{info.qtypes[name]} {name}" for name in names[:MAX_TYPES_SHOWN]]
    return ", ".join([*shown, f"{rest} more types"] if rest > 0 else shown) or "none"


def size_text(n_bytes: int) -> str:
    """Bytes as people name sizes of files: decimal units, three digits or a few more."""
    for unit, name in _UNITS:
        if n_bytes >= unit:
            value = n_bytes / unit
            return f"{value:.2f} {name}" if value < 10 else f"{value:.1f} {name}"
    return f"{n_bytes} bytes"
