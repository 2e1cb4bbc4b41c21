# SPDX-License-Identifier: Apache-2.0
"""Importance matrices are written so that gguf-py and a reader of the older format find what was put in."""

import os
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.imatrix import Entry, Imatrix, read_imatrix
from gguf_kit.quantize.imatrix_write import write_imatrix, write_legacy
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrix_files import assert_equal, legacy_bytes, make_entry, make_imatrix

BOTH = pytest.mark.parametrize("write", [write_imatrix, write_legacy])


def full_entry(**options):
    return make_entry(n_rows=5, gain=0.5, gain_calls=3.0, in_sum=torch.randn(1, 8), **options)


def test_gguf_py_reads_every_number(tmp_path):
    imatrix = make_imatrix({"b.weight": full_entry(), "a.weight": make_entry(6, n_matrices=3)}, datasets=("x", "ü"))
    write_imatrix(imatrix, tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["x", "ü"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 16,
    }
    kinds = {key: field.types[-1].name for key, field in reader.fields.items()}
    assert (kinds["imatrix.chunk_count"], kinds["imatrix.datasets"]) == ("UINT32", "STRING")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    parts = ["in_sum2", "counts", "in_sum", "rows", "gain"]
    assert list(tensors) == ["a.weight.in_sum2", "a.weight.counts", *(f"b.weight.{part}" for part in parts)]
    entry, stack = imatrix.entries["b.weight"], imatrix.entries["a.weight"]
    assert tensors["b.weight.in_sum2"].shape.tolist() == [8, 1]
    assert np.array_equal(tensors["a.weight.in_sum2"].data, stack.sums.numpy())
    assert tensors["a.weight.counts"].shape.tolist() == [1, 3]
    assert np.array_equal(tensors["b.weight.in_sum"].data, entry.in_sum.numpy())
    assert tensors["b.weight.rows"].tensor_type is gguf.GGMLQuantizationType.BF16
    assert np.array_equal(gguf.quants.dequantize(tensors["b.weight.rows"].data, 30), entry.rows.float().numpy())
    assert tensors["b.weight.gain"].data.tolist() == [0.5, 3.0]


def test_what_was_read_is_written_as_it_was(tmp_path):
    imatrix = make_imatrix({"b": full_entry(), "a": make_entry(6, n_matrices=3, count=0)}, datasets=())
    write_imatrix(imatrix, tmp_path / "i.gguf")
    found = read_imatrix(tmp_path / "i.gguf")
    assert list(found.entries) == ["a", "b"]
    for name, entry in found.entries.items():
        assert_equal(entry, imatrix.entries[name])
    assert (found.datasets, found.chunk_count, found.chunk_size) == ((), 2, 16)
    write_imatrix(found, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "i.gguf").read_bytes()


def test_a_file_can_replace_the_one_that_its_rows_are_views_of(tmp_path):
    path = tmp_path / "i.gguf"
    write_imatrix(make_imatrix({"a": make_entry(64, n_rows=300)}), path)
    imatrix = read_imatrix(path)
    rows = imatrix.entries["a"].rows.clone()
    write_imatrix(imatrix, path, overwrite=True)
    assert torch.equal(read_imatrix(path).entries["a"].rows, rows)


def test_without_datasets_the_key_is_there_since_llama_quantize_asks_for_it(tmp_path):
    write_imatrix(make_imatrix({"a": make_entry()}, datasets=()), tmp_path / "i.gguf")
    assert gguf.GGUFReader(tmp_path / "i.gguf").fields["imatrix.datasets"].contents() == [""]


def parse_legacy(raw):
    """The older format, read with struct alone: {name: (calls, values)}, chunks, dataset."""
    (n_entries,), pos, entries = struct.unpack_from("<i", raw), 4, {}
    for _ in range(n_entries):
        (n_name,) = struct.unpack_from("<i", raw, pos)
        name = raw[pos + 4 : pos + 4 + n_name].decode()
        n_calls, n_values = struct.unpack_from("<ii", raw, pos + 4 + n_name)
        pos += 12 + n_name
        entries[name] = n_calls, np.frombuffer(raw, "<f4", n_values, pos)
        pos += 4 * n_values
    chunks, n_text = struct.unpack_from("<ii", raw, pos)
    assert len(raw) == pos + 8 + n_text
    return entries, chunks, raw[pos + 8 :].decode()


def test_the_older_format_has_means_times_chunks(tmp_path):
    # 40 rows of 16 a chunk are 3 chunks, rounded up
    sums = torch.tensor([[40.0, 80.0, 20.0], [30.0, 60.0, 3.0], [7.0, 7.0, 7.0]])
    entries = {
        "b": Entry(sums, torch.tensor([40.0, 20.0, 0.0])),
        "a": Entry(sums[:1], torch.tensor([1.0])),
        "never used": make_entry(count=0),
    }
    write_legacy(make_imatrix(entries, datasets=("x", "ü")), tmp_path / "i.dat")
    found, chunks, dataset = parse_legacy((tmp_path / "i.dat").read_bytes())
    assert (list(found), chunks, dataset) == (["a", "b"], 2, "x, ü")
    assert found["b"][0] == 3
    assert found["b"][1].tolist() == [3, 6, 1.5, 4.5, 9, np.float32(3 / 20) * np.float32(3), 3, 3, 3]
    assert (found["a"][0], found["a"][1].tolist()) == (1, [40, 80, 20])


def test_the_older_format_comes_back_byte_for_byte_through_the_newer(tmp_path):
    rng = np.random.default_rng(3)
    entries = {name: (rng.exponential(size=500).astype(np.float32), calls) for name, calls in (("a", 49), ("b", 1))}
    (tmp_path / "1.dat").write_bytes(legacy_bytes(entries))
    write_imatrix(read_imatrix(tmp_path / "1.dat"), tmp_path / "2.gguf")
    write_legacy(read_imatrix(tmp_path / "2.gguf"), tmp_path / "3.dat")
    assert (tmp_path / "3.dat").read_bytes() == (tmp_path / "1.dat").read_bytes()


FLOATS = st.floats(0, 2.0**100, width=32)


@st.composite
def entries(draw):
    n_matrices, n_columns = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    values = st.lists(FLOATS, min_size=n_matrices * n_columns, max_size=n_matrices * n_columns)
    sums = torch.tensor(draw(values), dtype=torch.float32).reshape(n_matrices, n_columns)
    counts = draw(st.lists(st.integers(0, 2**24), min_size=n_matrices, max_size=n_matrices))
    rows = draw(st.none() | st.integers(1, 4).map(lambda n: torch.ones(n, n_columns).bfloat16()))
    gain = draw(st.none() | FLOATS)
    return Entry(sums, torch.tensor(counts, dtype=torch.float32), rows, gain, 0.0 if gain is None else 5.0)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("round")


@settings(max_examples=60, deadline=None)
@given(found=st.dictionaries(NAMES, entries(), min_size=1, max_size=4), chunk_size=st.integers(0, 2**32 - 1))
def test_any_sound_entries_come_back(folder, found, chunk_size):
    imatrix = make_imatrix(found, chunk_size=chunk_size)
    write_imatrix(imatrix, folder / "i.gguf", overwrite=True)
    read = read_imatrix(folder / "i.gguf")
    assert read.entries.keys() == found.keys()
    assert read.chunk_size == chunk_size
    for name, entry in read.entries.items():
        assert_equal(entry, found[name])


@settings(max_examples=60, deadline=None)
@given(found=st.dictionaries(NAMES, entries(), min_size=1, max_size=4), chunk_size=st.integers(0, 600))
def test_any_sound_means_come_back_from_the_older_format(folder, found, chunk_size):
    used = {name: entry for name, entry in found.items() if float(entry.counts.max()) > 0}
    if not used:
        return
    write_legacy(make_imatrix(found, chunk_size=chunk_size), folder / "i.dat", overwrite=True)
    read = read_imatrix(folder / "i.dat")
    assert read.entries.keys() == used.keys()
    for name, entry in used.items():
        assert torch.allclose(read.columns[name], entry.means.flatten(), rtol=3e-7, atol=1e-37)


BAD = {
    "no entries": ({}, "there are no entries to write"),
    "negative sums": ({"a": Entry(-torch.ones(1, 4), torch.ones(1))}, "'a' has negative or non-finite values"),
    "one dimension": ({"a": Entry(torch.ones(4), torch.ones(1))}, "'a' has sums of shape"),
    "no columns": ({"a": Entry(torch.ones(1, 0), torch.ones(1))}, "'a' has sums of shape"),
    "counts that do not fit": ({"a": Entry(torch.ones(1, 4), torch.ones(2))}, "that do not fit"),
    "rows that do not fit": ({"a": make_entry(rows=torch.ones(2, 7).bfloat16())}, "expected 8 columns"),
    "another precision": ({"a": Entry(torch.ones(1, 4).double(), torch.ones(1))}, "'a' has sums of float64, expected"),
    "rows of another precision": (
        {"a": make_entry(rows=torch.ones(2, 8).half())},
        "rows of float16, expected bfloat16",
    ),
    "gain of nothing": ({"a": make_entry(gain=1.0)}, "has a gain of 1.0 from 0.0 calls"),
    "no name": ({"": make_entry()}, "has a name of 0 characters"),
    "a long name": ({"x" * 1020: make_entry()}, "has a name of 1020 characters"),
    "no text": ({"\udc80": make_entry()}, "that the format cannot hold"),
}


@BOTH
@pytest.mark.parametrize("bad", BAD)
def test_what_could_not_be_read_again_is_refused_and_leaves_nothing(tmp_path, write, bad):
    found, problem = BAD[bad]
    with pytest.raises(GGUFError, match=rf"^i.out: .*{problem}"):
        write(make_imatrix(found), tmp_path / "i.out")
    assert os.listdir(tmp_path) == []


def test_the_older_format_needs_an_entry_that_was_used(tmp_path):
    with pytest.raises(GGUFError, match="none of its entries was ever used"):
        write_legacy(make_imatrix({"a": make_entry(count=0)}), tmp_path / "i.dat")


@BOTH
def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path, write):
    path = tmp_path / "i.out"
    path.write_bytes(b"kept")
    imatrix = make_imatrix({"a": make_entry()})
    with pytest.raises(GGUFError, match=r"i\.out: the file exists"):
        write(imatrix, path)
    assert path.read_bytes() == b"kept"
    write(imatrix, path, overwrite=True)
    assert list(read_imatrix(path).entries) == ["a"]
    assert os.listdir(tmp_path) == ["i.out"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "i.gguf"
    path.write_bytes(b"kept")
    monkeypatch.setattr("gguf_kit.quantize.imatrix_write.Writer.end_tensor", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_imatrix(make_imatrix({"a": make_entry()}), path, overwrite=True)
    assert (os.listdir(tmp_path), path.read_bytes()) == (["i.gguf"], b"kept")


def test_the_number_of_tensors_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_kit.quantize.imatrix_write.MAX_ENTRIES", 3)
    with pytest.raises(GGUFError, match="it would have 4 tensors, more than 3"):
        write_imatrix(Imatrix(tmp_path, {name: make_entry() for name in "ab"}), tmp_path / "i.gguf")
