# SPDX-License-Identifier: Apache-2.0
"""Importance matrices for tests: in memory, and as files of any tensors that gguf-py or struct writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.quantize.imatrix import Entry, Imatrix


def make_entry(n_columns: int = 8, seed: int = 0, **options: Any) -> Entry:
    """A seeded entry of one matrix.

    Args:
        options: n_matrices, count, n_rows (0: none recorded), and fields of Entry.
    """
    generator = torch.Generator().manual_seed(seed)
    n_matrices, n_rows = options.pop("n_matrices", 1), options.pop("n_rows", 0)
    counts = torch.full((n_matrices,), float(options.pop("count", 4)))
    sums = torch.rand(n_matrices, n_columns, generator=generator) * 9
    rows = torch.randn(n_rows, n_columns, generator=generator).bfloat16() if n_rows else None
    return Entry(**{"sums": sums, "counts": counts, "rows": rows, **options})


def make_imatrix(entries: Mapping[str, Entry], path: Path | str = "made.gguf", **options: Any) -> Imatrix:
    """Entries as if read from a file; options: fields of Imatrix."""
    return Imatrix(Path(path), dict(entries), **{"datasets": ("a",), "chunk_count": 2, "chunk_size": 16, **options})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> Path:
    """A GGUF file of float32 and bfloat16 tensors; metadata under imatrix.KEY."""
    writer = gguf.GGUFWriter(path, "imatrix")
    for key, value in metadata.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"imatrix.{key}", value)
    for name, tensor in tensors.items():
        qtype = QType.BF16 if tensor.dtype is torch.bfloat16 else QType.F32
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_bytes(entries: Mapping[str, tuple[np.ndarray, int]], chunks: int = 10, dataset: str = "data") -> bytes:
    """The older format: name -> (values, number of calls)."""
    raw = struct.pack("<i", len(entries))
    for name, (values, n_calls) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        raw += np.asarray(values, "<f4").tobytes()
    return raw + struct.pack("<ii", chunks, len(dataset)) + dataset.encode()


def assert_equal(first: Entry, second: Entry) -> None:
    """Every field of two entries."""
    for field in ("sums", "counts", "rows", "in_sum"):
        a, b = getattr(first, field), getattr(second, field)
        if a is None or b is None:
            assert a is b, field
        else:
            assert a.dtype is b.dtype, field
            assert torch.equal(a, b), field
    assert (first.gain, first.gain_calls) == (second.gain, second.gain_calls)
