# SPDX-License-Identifier: Apache-2.0
"""Importance matrices of several runs are joined as if there had been one, and reduced to what a recipe weighs."""

import pytest
import torch
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.imatrix import Entry, Weighting, read_imatrix
from gguf_kit.quantize.imatrix_merge import merge, reduce_imatrix
from gguf_kit.quantize.imatrix_write import write_imatrix
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrix_files import assert_equal, legacy_bytes, make_entry, make_imatrix


def entry_of(inputs, **options):
    """The entry that a run over some inputs (n, n_columns) records."""
    return Entry((inputs**2).sum(0, keepdim=True), torch.tensor([float(len(inputs))]), **options)


def test_two_runs_are_as_good_as_one():
    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    runs = [make_imatrix({"a": entry_of(part, in_sum=part.sum(0)[None])}) for part in (inputs[:32], inputs[32:])]
    merged = merge(runs)
    assert torch.allclose(merged.columns["a"], (inputs**2).mean(0), rtol=1e-6)
    assert torch.allclose(merged.entries["a"].in_sum, inputs.sum(0)[None], atol=1e-5)
    assert merged.entries["a"].counts.tolist() == [96]
    assert merged.entries["a"].problem() == ""


def test_what_is_said_of_the_whole_is_joined():
    runs = [
        make_imatrix({"a": make_entry()}, name, datasets=sets) for name, sets in (("1", ("x", "y")), ("2", ("y", "z")))
    ]
    merged = merge(runs)
    assert (merged.path.name, merged.datasets, merged.chunk_count, merged.chunk_size) == ("1", ("x", "y", "z"), 4, 16)


def test_an_entry_that_one_file_has_is_kept_as_it_is():
    first, second = make_entry(n_rows=3, gain=1.0, gain_calls=2.0), make_entry(6, 1)
    merged = merge([make_imatrix({"a": first}), make_imatrix({"b": second})])
    assert list(merged.entries) == ["a", "b"]
    assert_equal(merged.entries["a"], first)
    assert_equal(merged.entries["b"], second)


def test_gains_average_by_the_calls_they_were_measured_on():
    gains = ((1.0, 10.0), (None, 0.0), (4.0, 30.0))
    runs = [make_imatrix({"a": make_entry(gain=gain, gain_calls=calls)}) for gain, calls in gains]
    assert merge(runs).entries["a"].gain == pytest.approx((1 * 10 + 4 * 30) / 40)
    assert merge(runs).entries["a"].gain_calls == 40


def test_sums_of_inputs_are_kept_only_where_all_files_have_them():
    runs = [make_imatrix({"a": make_entry(in_sum=torch.ones(1, 8))}), make_imatrix({"a": make_entry()})]
    assert merge(runs).entries["a"].in_sum is None


def numbered(first, n_rows):
    """Rows that tell their number."""
    return torch.arange(first, first + n_rows, dtype=torch.bfloat16)[:, None].expand(-1, 8).contiguous()


def merged_rows(*runs, **options):
    """Numbers of the rows that a merge of (rows, count) keeps."""
    made = [make_imatrix({"a": make_entry(rows=rows, count=count)}) for rows, count in runs]
    return merge(made, **options).entries["a"].rows[:, 0].int().tolist()


def test_rows_are_given_in_proportion_to_what_a_file_has_seen():
    assert merged_rows((numbered(0, 4), 300), (numbered(100, 4), 100)) == [0, 2, 3, 102]
    assert merged_rows((numbered(0, 4), 300), (numbered(100, 4), 100), max_rows=8) == [0, 1, 2, 3, 101, 103]
    assert merged_rows((numbered(0, 4), 4), (numbered(100, 8), 8)) == [0, 2, 3, 100, 102, 104, 105, 107]


def test_rows_are_picked_evenly():
    assert merged_rows((numbered(0, 100), 1), max_rows=5) == [10, 30, 50, 70, 90]


def test_rows_of_the_files_that_have_some_are_enough():
    first, second = make_entry(), make_entry(rows=numbered(0, 3))
    merged = merge([make_imatrix({"a": first}), make_imatrix({"a": second})])
    assert torch.equal(merged.entries["a"].rows, second.rows)


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**6)), min_size=2, max_size=5),
    max_rows=st.none() | st.integers(1, 120),
)
def test_never_more_rows_than_the_bound(runs, max_rows):
    made = [make_imatrix({"a": make_entry(n_rows=n, count=count)}) for n, count in runs]
    rows = merge(made, max_rows=max_rows).entries["a"].rows
    assert len(rows if rows is not None else ()) <= (max_rows or max(n for n, _ in runs))


def test_the_older_format_counts_chunks(tmp_path):
    values = make_entry().sums[0].numpy()
    (tmp_path / "i.dat").write_bytes(legacy_bytes({"a": (values, 3)}))
    newer = make_imatrix({"a": make_entry(seed=1, count=16)}, chunk_size=16)
    merged = merge([read_imatrix(tmp_path / "i.dat"), newer])
    assert merged.entries["a"].counts.tolist() == [3 * 16 + 16]
    expected = (torch.from_numpy(values) / 3 * 48 + newer.entries["a"].sums[0]) / 64
    assert torch.allclose(merged.columns["a"], expected)
    assert (merged.chunk_size, merged.chunk_count, merged.datasets) == (16, 12, ("data", "a"))


def test_experts_are_summed_one_by_one():
    first, second = make_entry(n_matrices=3), make_entry(n_matrices=3, seed=1, count=1)
    merged = merge([make_imatrix({"a": first}), make_imatrix({"a": second})]).entries["a"]
    assert torch.allclose(merged.means, (first.sums + second.sums) / 5)


@pytest.mark.parametrize("other", [make_entry(9), make_entry(4, n_matrices=2)], ids=["columns", "experts"])
def test_entries_that_do_not_fit_are_refused_with_both_files(other):
    runs = [make_imatrix({"a": make_entry()}, "one.gguf"), make_imatrix({"a": other}, "two.gguf")]
    with pytest.raises(GGUFError, match=r"^two\.gguf: the entry of 'a' is . x ., but 1 x 8 in one\.gguf\. Merge"):
        merge(runs)


def test_a_merge_can_be_written_and_read(tmp_path):
    runs = [make_imatrix({"a": make_entry(seed=seed, n_rows=9, gain=1.0, gain_calls=1.0)}) for seed in range(3)]
    merged = merge(runs)
    write_imatrix(merged, tmp_path / "i.gguf")
    assert_equal(read_imatrix(tmp_path / "i.gguf").entries["a"], merged.entries["a"])


WEIGHTINGS = {"none": Weighting.NONE, "root": Weighting.ROOT, "full": Weighting.FULL}


def test_the_reduced_one_gives_the_weights_that_the_recipe_stands_for(tmp_path):
    names = [*WEIGHTINGS, "unnamed"]
    imatrix = make_imatrix({name: make_entry(seed=7, n_rows=2, gain=1.0, gain_calls=1.0) for name in names})
    reduced = reduce_imatrix(imatrix, WEIGHTINGS)
    write_imatrix(reduced, tmp_path / "i.gguf")
    found = read_imatrix(tmp_path / "i.gguf")
    for name in names:
        expected = imatrix.importance(name, 8, WEIGHTINGS.get(name, Weighting.FULL))
        weights = found.importance(name, 8)
        assert weights is expected is None or torch.equal(weights, expected)
    assert found.entries.keys() == {"root", "full", "unnamed"}
    assert all(entry.rows is None and entry.gain is None for entry in found.entries.values())
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a",), 2, 16)


def test_a_recipe_that_weighs_nothing_is_refused():
    with pytest.raises(GGUFError, match=r"weighs none of its entries\. Quantize without"):
        reduce_imatrix(make_imatrix({"a": make_entry()}), {"a": Weighting.NONE})


def test_a_mixed_weighting_is_refused_since_no_importance_matrix_stands_for_it():
    with pytest.raises(GGUFError, match=r"^made\.gguf: the recipe mixes the blocks of 'b' in a way that no importance"):
        reduce_imatrix(make_imatrix({"a": make_entry(), "b": make_entry()}), {"b": Weighting.MIXED})
