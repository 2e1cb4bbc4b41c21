# SPDX-License-Identifier: Apache-2.0
"""Importance matrices in both of llama.cpp's formats, and files that are neither."""

import contextlib
import struct

import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile, GGUFError
from gguf_kit.mapped_file import file_range
from gguf_kit.quantize.imatrix import FINITE_CHUNK, Weighting, read_imatrix
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrix_files import legacy_bytes, make_entry, make_imatrix, write_tensors

SUMS = np.array([2.0, 0.5, 0.0, 9.0], np.float32)


def write_gguf(path, entries):
    tensors = {}
    for name, (sums, counts) in entries.items():
        tensors[f"{name}.in_sum2"] = torch.from_numpy(np.asarray(sums, np.float32).reshape(1, -1))
        if counts is not None:
            tensors[f"{name}.counts"] = torch.from_numpy(np.asarray(counts, np.float32).reshape(-1, 1))
    return write_tensors(path, tensors)


def test_the_mean_of_squares_is_read_from_gguf(tmp_path):
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", {"a.weight": (SUMS, 4), "unused.weight": (SUMS, 0)}))
    assert torch.equal(imatrix.columns["a.weight"], torch.tensor([0.5, 0.125, 0.0, 2.25]))
    assert torch.equal(imatrix.columns["unused.weight"], torch.ones(4))


def test_the_mean_of_squares_is_read_from_the_older_format(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes({"a.weight": (SUMS, 2), "b.weight": (SUMS, 0)}))
    imatrix = read_imatrix(path)
    assert torch.equal(imatrix.columns["a.weight"], torch.from_numpy(SUMS / 2))
    assert torch.equal(imatrix.columns["b.weight"], torch.from_numpy(SUMS))


def test_an_entry_for_another_model_is_refused_with_both_sizes(tmp_path):
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", {"a.weight": (SUMS, 4)}))
    assert imatrix.importance("b.weight", 4) is None
    assert imatrix.importance("a.weight", 4).shape == (4,)
    with pytest.raises(BadFile, match=r"i.gguf: the entry of 'a.weight' has 4 columns, expected 8.*another model"):
        imatrix.importance("a.weight", 8)


def test_counts_are_rounded_as_c_rounds_them(tmp_path):
    entries = {f"{count}": (SUMS, count) for count in (0.49, 0.5, 2.5, 3.5)}
    columns = read_imatrix(write_gguf(tmp_path / "i.gguf", entries)).columns
    for count, divisor in ((0.5, 1), (2.5, 3), (3.5, 4)):
        assert torch.equal(columns[f"{count}"], torch.from_numpy(SUMS / np.float32(divisor)))
    assert torch.equal(columns["0.49"], torch.ones(4))


@pytest.mark.parametrize("weighting", Weighting)
def test_a_weighting_is_applied_to_the_means(weighting):
    imatrix = make_imatrix({"a": make_entry()})
    means = imatrix.columns["a"]
    expected = {Weighting.NONE: None, Weighting.ROOT: means**0.5}.get(weighting, means)
    found = imatrix.importance("a", 8, weighting)
    assert found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("weighting", Weighting)
def test_the_size_is_checked_whatever_the_weighting(weighting):
    with pytest.raises(BadFile, match="has 8 columns, expected 4"):
        make_imatrix({"a": make_entry()}).importance("a", 4, weighting)


def test_experts_are_read_and_refused_where_one_matrix_is_wanted(tmp_path):
    tensors = {"e.in_sum2": torch.arange(12.0).reshape(3, 4), "e.counts": torch.tensor([[2.0], [0.0], [4.0]])}
    imatrix = read_imatrix(write_tensors(tmp_path / "i.gguf", tensors))
    expected = torch.stack([torch.arange(4.0) / 2, torch.ones(4), torch.arange(8.0, 12.0) / 4])
    assert torch.equal(imatrix.entries["e"].means, expected)
    assert dict(imatrix.columns) == {}
    with pytest.raises(BadFile, match="the entry of 'e' is for 3 experts, expected a single matrix"):
        imatrix.importance("e", 4)


def whole(**changes):
    """The tensors of an entry with all parts, some changed or (None) left out."""
    tensors = {
        "a.in_sum2": torch.tensor([[2.0, 4.0]]),
        "a.counts": torch.tensor([[2.0]]),
        "a.in_sum": torch.tensor([[-1.0, 1.0]]),
        "a.rows": torch.tensor([[-1.0, 1.5], [0.5, 0.0], [3.0, 3.0]]).bfloat16(),
        "a.gain": torch.tensor([0.25, 8.0]),
    }
    tensors |= {f"a.{part}": value for part, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def test_all_parts_of_an_entry_are_read(tmp_path):
    path = write_tensors(tmp_path / "i.gguf", whole(), datasets=["b", "a", ""], chunk_count=3, chunk_size=512)
    imatrix = read_imatrix(path)
    entry = imatrix.entries["a"]
    assert (entry.sums.tolist(), entry.counts.tolist(), entry.in_sum.tolist()) == ([[2, 4]], [2], [[-1, 1]])
    assert entry.rows.tolist() == [[-1.0, 1.5], [0.5, 0.0], [3.0, 3.0]]
    assert (entry.gain, entry.gain_calls) == (0.25, 8)
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("b", "a"), 3, 512)
    assert file_range(entry.rows).file.path == str(path)


def test_tensors_of_other_endings_are_passed_over(tmp_path):
    imatrix = read_imatrix(write_tensors(tmp_path / "i.gguf", whole(stats=torch.zeros(12))))
    assert list(imatrix.entries) == ["a"]


NAN, INF = float("nan"), float("inf")
DAMAGES = {
    "no counts": ({"counts": None}, "is incomplete"),
    "counts of another type": ({"counts": torch.ones(1, 1).bfloat16()}, "tensor 'a.counts' is BF16, expected F32"),
    "sums of another type": ({"in_sum2": torch.ones(1, 2).bfloat16()}, "is incomplete"),
    "negative counts": ({"counts": torch.tensor([[-1.0]])}, "has negative or non-finite values"),
    "infinite counts": ({"counts": torch.tensor([[INF]])}, "has negative or non-finite values"),
    "two matrices' counts": ({"counts": torch.ones(2, 1)}, "is for 2 experts, but has sums of shape"),
    "longer sums of inputs": ({"in_sum": torch.ones(1, 3)}, "has sums of shapes .* and .*1, 3"),
    "sums of inputs of nan": ({"in_sum": torch.tensor([[NAN, 0]])}, "has non-finite sums of inputs"),
    "rows of another width": ({"rows": torch.ones(2, 3).bfloat16()}, "has rows of shape .*2, 3.*, expected 2 columns"),
    "rows in three dimensions": ({"rows": torch.ones(2, 2, 2).bfloat16()}, "expected two dimensions"),
    "rows of another type": ({"rows": torch.ones(2, 2)}, "tensor 'a.rows' is F32, expected BF16"),
    "rows of nan": ({"rows": torch.tensor([[1, 1], [NAN, 1]]).bfloat16()}, "has non-finite rows"),
    "rows of infinities": ({"rows": torch.tensor([[1, 1], [1, -INF]]).bfloat16()}, "has non-finite rows"),
    "gain of nan": ({"gain": torch.tensor([NAN, 1])}, "has a gain of nan from 1.0 calls"),
    "infinite gain": ({"gain": torch.tensor([INF, 1])}, "has a gain of inf"),
    "negative gain": ({"gain": torch.tensor([-1.0, 1])}, "has a gain of -1.0"),
    "gain of no calls": ({"gain": torch.tensor([1.0, 0])}, "has a gain of 1.0 from 0.0 calls"),
    "gain of nan calls": ({"gain": torch.tensor([1.0, NAN])}, "has a gain of 1.0 from nan calls"),
    "gain alone": ({"gain": torch.tensor([1.0])}, "has a gain of shape .*1,.*expected .2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_in_one_sentence(tmp_path, damage):
    changes, problem = DAMAGES[damage]
    with pytest.raises(BadFile, match=rf"^i.gguf: [^\n]*{problem}[^\n]*\. Take another importance matrix"):
        read_imatrix(write_tensors(tmp_path / "i.gguf", whole(**changes)))


@pytest.mark.parametrize(
    "metadata",
    [{"chunk_count": "3"}, {"chunk_size": ["3"]}, {"datasets": "x"}, {"datasets": [1, 2]}],
    ids=lambda metadata: "-".join(metadata),
)
def test_metadata_of_another_type_is_refused(tmp_path, metadata):
    with pytest.raises(BadFile, match=r"metadata key 'imatrix\..*' is no "):
        read_imatrix(write_tensors(tmp_path / "i.gguf", whole(), **metadata))


def test_rows_that_are_not_wanted_are_not_read(tmp_path):
    path = write_tensors(tmp_path / "i.gguf", whole(rows=torch.full((2, 2), NAN).bfloat16()))
    assert read_imatrix(path, with_rows=False).entries["a"].rows is None


@pytest.mark.parametrize("at", [0, FINITE_CHUNK - 1, FINITE_CHUNK, 2 * FINITE_CHUNK + 1])
def test_one_bad_number_is_found_wherever_it_is(at):
    rows = torch.zeros(2 * FINITE_CHUNK + 2, dtype=torch.bfloat16)
    rows[at] = NAN
    entry = make_entry(2, rows=rows.reshape(-1, 2))
    assert entry.problem() == "has non-finite rows"


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


GOOD = legacy_bytes({"a.weight": (SUMS, 2)})


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


def test_the_older_format_tells_chunks_and_dataset(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes({"a": (SUMS, 2)}, 7, "pictures"))
    imatrix = read_imatrix(path)
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets) == (7, 0, ("pictures",))
    entry = imatrix.entries["a"]
    assert (entry.sums.tolist(), entry.counts.tolist()) == ([SUMS.tolist()], [2])


@pytest.mark.parametrize("end", [0, 3, 8, 10], ids=lambda end: f"{end} bytes")
def test_the_older_format_may_end_behind_its_entries(tmp_path, end):
    path = tmp_path / "i.dat"
    path.write_bytes(GOOD[: len(GOOD) - 12 + end])
    assert list(read_imatrix(path).entries) == ["a.weight"]


@pytest.mark.parametrize("n_text", [-1, 3 - len(GOOD), -(2**31), 2**31 - 1])
def test_a_wrong_length_of_the_dataset_is_survived(tmp_path, n_text):
    path = tmp_path / "i.dat"
    path.write_bytes(GOOD[:-8] + struct.pack("<i", n_text) + b"data")
    imatrix = read_imatrix(path)
    assert list(imatrix.entries) == ["a.weight"]
    assert imatrix.datasets == (() if n_text < 0 else ("data",))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"none.dat: there is no such file"):
        read_imatrix(tmp_path / "none.dat")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file of each format, and a path to write changed ones to."""
    folder = tmp_path_factory.mktemp("sound")
    path = write_tensors(folder / "i.gguf", whole(), datasets=["a"], chunk_count=3, chunk_size=512)
    return {"gguf": path.read_bytes(), "legacy": GOOD}, folder / "changed"


@pytest.mark.parametrize("file_format", ["gguf", "legacy"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_refused_or_read_as_sound_entries(sound, file_format, data):
    raw = bytearray(sound[0][file_format])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, raw[at] ^ 1]))
    sound[1].write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    with contextlib.suppress(GGUFError):
        imatrix = read_imatrix(sound[1])
        assert imatrix.entries
        assert not any(entry.problem() for entry in imatrix.entries.values())
