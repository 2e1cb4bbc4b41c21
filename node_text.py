# SPDX-License-Identifier: Apache-2.0
"""The line that a loader node shows after loading: what the file is, its type, its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .host.page import show_text
from .loader import LoadInfo, loaded_files

MAX_TYPES_SHOWN = 4
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@contextmanager
def described() -> Iterator[None]:
    """Show on the running node what is loaded from GGUF files inside the block, unless that fails."""
    with loaded_files() as infos:
        yield
    show_text("\n".join(line_of(info, named=len(infos) > 1) for info in infos))


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
