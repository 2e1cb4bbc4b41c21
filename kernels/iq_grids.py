# SPDX-License-Identifier: Apache-2.0
"""Contents of the code books that layouts.py names, from gguf-py's own tables, once per device.

Owns device_table(), the one way for a kernel to a constant on a device: built at first use, then only looked up, so
that no dequantization copies constants from host to device. A new code book is a CodeBook in layouts.py and a line in
_BUILD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layouts import CodeBook
from .apart import run_apart

if TYPE_CHECKING:
    import numpy as np

_tables: dict[tuple[CodeBook, torch.device], Tensor] = {}
_byte_tables: dict[CodeBook, Tensor] = {}


def device_table(book: CodeBook, device: torch.device) -> Tensor:
    """The numbers of a code book on a device, shared by all: never write into it.

    Returns:
        float32 (book.n_entries, book.width), or (book.n_entries,) when the width is 1.
    """
    table = _tables.get((book, device))
    if table is None:
        table = _tables[book, device] = run_apart(_build_table, book, device)
    return table


def byte_table(book: CodeBook) -> Tensor:
    """The same on the CPU as int8, for books that hold nothing else; shared by all.

    Raises:
        ValueError: a number of the book is no int8.
    """
    table = _byte_tables.get(book)
    if table is None:
        table = _byte_tables[book] = run_apart(_build_bytes, book)
    return table


def _build_bytes(book: CodeBook) -> Tensor:
    numbers = device_table(book, torch.device("cpu"))
    octets = numbers.to(torch.int8)
    if not torch.equal(octets.float(), numbers):
        raise ValueError(f"{book.name}: not all of its numbers are int8")
    return octets


def _build_table(book: CodeBook, device: torch.device) -> Tensor:
    import gguf.quants
    import numpy as np

    numbers = np.array(_BUILD[book.name](gguf.quants), dtype=np.float32)
    shape = (book.n_entries, book.width) if book.width > 1 else (book.n_entries,)
    return torch.from_numpy(numbers.reshape(shape)).to(device)


def _build_grid(quant_class: Any) -> np.ndarray:
    """The grid of one of gguf-py's IQ classes, (n_entries, width)."""
    quant_class.init_grid()
    grid: np.ndarray = quant_class.grid
    return grid


def _build_ksigns(quants: Any) -> np.ndarray:
    """Eight factors per code: bit i of the byte gives 1 or -1 for weight i."""
    import numpy as np

    sign_bytes = np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)
    return 1.0 - 2.0 * np.unpackbits(sign_bytes[:, None], axis=1, bitorder="little")


def _every_byte() -> np.ndarray:
    import numpy as np

    return np.arange(256, dtype=np.uint8)


_BUILD: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "iq1s_grid": lambda quants: _build_grid(quants.IQ1_S),
        "iq2xxs_grid": lambda quants: _build_grid(quants.IQ2_XXS),
        "iq2xs_grid": lambda quants: _build_grid(quants.IQ2_XS),
        "iq2s_grid": lambda quants: _build_grid(quants.IQ2_S),
        "iq3xxs_grid": lambda quants: _build_grid(quants.IQ3_XXS),
        "iq3s_grid": lambda quants: _build_grid(quants.IQ3_S),
        "ksigns_iq2xs": _build_ksigns,
        "kvalues_iq4nl": lambda quants: quants.IQ4_NL.kvalues,
        "kvalues_mxfp4": lambda quants: quants.MXFP4.kvalues,
        "e8m0_half": lambda quants: quants.MXFP4.e8m0_to_fp32_half(_every_byte()),
        "ue4m3_half": lambda quants: quants.NVFP4.ue4m3_to_fp32(_every_byte()),
    }
)
