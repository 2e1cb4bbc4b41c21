# SPDX-License-Identifier: Apache-2.0
"""Importance matrices in both of llama.cpp's formats, and files that are neither."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile
from gguf_kit.quantize.imatrix import read_imatrix

SUMS = np.array([2.0, 0.5, 0.0, 9.0], np.float32)


def write_gguf(path, entries):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32).reshape(1, -1))
        if counts is not None:
            writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(entries):
    raw = struct.pack("<i", len(entries))
    for name, (values, n_calls) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        raw += np.asarray(values, "<f4").tobytes()
    return raw + struct.pack("<ii", 10, 4) + b"data"


def test_the_mean_of_squares_is_read_from_gguf(tmp_path):
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", {"a.weight": (SUMS, 4), "unused.weight": (SUMS, 0)}))
    assert torch.equal(imatrix.columns["a.weight"], torch.tensor([0.5, 0.125, 0.0, 2.25]))
    assert torch.equal(imatrix.columns["unused.weight"], torch.ones(4))


def test_the_mean_of_squares_is_read_from_the_older_format(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({"a.weight": (SUMS, 2), "b.weight": (SUMS, 0)}))
    imatrix = read_imatrix(path)
    assert torch.equal(imatrix.columns["a.weight"], torch.from_numpy(SUMS / 2))
    assert torch.equal(imatrix.columns["b.weight"], torch.from_numpy(SUMS))


def test_an_entry_for_another_model_is_refused_with_both_sizes(tmp_path):
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", {"a.weight": (SUMS, 4)}))
    assert imatrix.importance("b.weight", 4) is None
    assert imatrix.importance("a.weight", 4).shape == (4,)
    with pytest.raises(BadFile, match=r"i.gguf: the entry of 'a.weight' has 4 columns, expected 8.*another model"):
        imatrix.importance("a.weight", 8)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({}, "no entries"),
        ({"a": (SUMS, None)}, "'a' is incomplete"),
        ({"a": (SUMS, [1, 2])}, "'a' is for 2 experts"),
        ({"a": (-SUMS, 1)}, "negative or non-finite"),
        ({"a": (SUMS * np.float32("nan"), 1)}, "negative or non-finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gguf_without_sound_entries_is_refused(tmp_path, entries, problem):
    with pytest.raises(BadFile, match=rf"i.gguf: .*{problem}"):
        read_imatrix(write_gguf(tmp_path / "i.gguf", entries))


GOOD = legacy({"a.weight": (SUMS, 2)})


@pytest.mark.parametrize(
    "raw",
    [
        b"abc",
        bytes(100),
        b"\xff" * 100,
        GOOD[:10],
        GOOD[:30],
        struct.pack("<ii", 1, 2**30),
        b"\x01\0\0\0\x02\0\0\0\xff\xfe",
    ],
    ids=lambda raw: f"{len(raw)} bytes",
)
def test_other_files_are_refused_in_one_sentence(tmp_path, raw):
    path = tmp_path / "i.dat"
    path.write_bytes(raw)
    with pytest.raises(BadFile, match=r"^i.dat: [^\n]*\. Take another importance matrix, or make it again\.$"):
        read_imatrix(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"none.dat: there is no such file"):
        read_imatrix(tmp_path / "none.dat")
