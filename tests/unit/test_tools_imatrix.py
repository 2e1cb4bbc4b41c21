# SPDX-License-Identifier: Apache-2.0
"""tools/imatrix.py shows, joins and rewrites importance matrices, and says in one line why it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_kit.quantize.imatrix import Entry, Weighting, read_imatrix
from gguf_kit.quantize.imatrix_merge import merge
from gguf_kit.quantize.imatrix_write import write_imatrix
from gguf_kit.tools import imatrix as tool
from imatrix_files import assert_equal, legacy_bytes, make_entry, make_imatrix

SCRIPT = Path(tool.__file__)


@pytest.fixture
def run(capsys):
    """Exit status, stdout and stderr of a command line."""

    def command(*args):
        status = tool.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def path(tmp_path):
    """A file with an even, an uneven and a stacked entry."""
    uneven = torch.zeros(1, 200)
    uneven[0, :4] = torch.tensor([9.0, 9.0, 1.0, 1.0])
    entries = {
        "uneven": Entry(uneven, torch.ones(1), torch.ones(3, 200).bfloat16(), 2.5, 4.0),
        "even": Entry(torch.full((1, 100), 8.0), torch.tensor([4.0])),
        "experts": make_entry(64, n_matrices=2),
    }
    path = tmp_path / "full.gguf"
    write_imatrix(make_imatrix(entries), path)
    return path


def test_show_says_what_is_known(run, path):
    status, out, _ = run("show", path)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "full.gguf: 3 entries, 3 recorded rows, 1 gains"
    assert lines[1:3] == ["made of 2 chunks, 16 rows each", "dataset: a"]
    assert lines[5].split() == ["100", "4", "2", "1.0%", "100", "-", "-", "even"]
    assert lines[6].endswith("experts (2 experts)")
    # (9 + 9 + 1 + 1)^2 / (81 + 81 + 1 + 1) = 2.4; 1 % of 200 columns are two
    assert lines[7].split() == ["200", "1", "0.1", "90.0%", "2", "3", "2.5", "uneven"]


def test_show_json_has_the_same_figures(run, path):
    document = json.loads(run("show", path, "--json")[1])
    assert {key: document[key] for key in document if key != "entries"} == {
        "schema": 1, "file": "full.gguf", "datasets": ["a"], "chunk_count": 2, "chunk_size": 16,
    }  # fmt: skip
    by_name = {entry["name"]: entry for entry in document["entries"]}
    assert list(by_name) == ["even", "experts", "uneven"]
    assert by_name["uneven"] == {
        "name": "uneven", "columns": 200, "matrices": 1, "count": 1.0, "mean": 0.1, "top1_share": 0.9,
        "effective": pytest.approx(400 / 164), "rows": 3, "gain": 2.5, "calls": 4.0,
    }  # fmt: skip
    assert (by_name["even"]["gain"], by_name["even"]["effective"]) == (None, 100)
    assert (by_name["experts"]["matrices"], by_name["experts"]["count"]) == (2, 8)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("name", ["even", "experts", "uneven"]),
        ("mean", ["even", "experts", "uneven"]),
        ("top", ["uneven", "experts", "even"]),
        ("effective", ["uneven", "experts", "even"]),
        ("gain", ["uneven", "even", "experts"]),
    ],
)
def test_show_sorts(run, path, order, names):
    document = json.loads(run("show", path, "--json", "--sort", order)[1])
    assert [entry["name"] for entry in document["entries"]] == names


def test_blocks_are_in_the_order_of_their_numbers(run, tmp_path):
    names = ["blocks.2.a", "blocks.10.a", "blocks.10.b2", "blocks.10.b10", "x"]
    write_imatrix(make_imatrix({name: make_entry() for name in reversed(names)}), tmp_path / "i.gguf")
    assert [entry["name"] for entry in json.loads(run("show", tmp_path / "i.gguf", "--json")[1])["entries"]] == names


def test_columns_that_are_all_zero_and_tiny_ones_have_figures(run, tmp_path):
    entries = {"zero": Entry(torch.zeros(1, 8), torch.ones(1)), "tiny": Entry(torch.full((1, 8), 1e-40), torch.ones(1))}
    write_imatrix(make_imatrix(entries, datasets=()), tmp_path / "i.gguf")
    tiny, zero = json.loads(run("show", tmp_path / "i.gguf", "--json")[1])["entries"]
    assert (zero["mean"], zero["top1_share"], zero["effective"]) == (0, 0, 0)
    assert (tiny["top1_share"], tiny["effective"]) == (pytest.approx(1 / 8), pytest.approx(8))


def test_names_cannot_break_the_table(run, tmp_path):
    write_imatrix(make_imatrix({"a\nb\x1b[31m": make_entry()}, datasets=("x\ny",)), tmp_path / "i.gguf")
    lines = run("show", tmp_path / "i.gguf")[1].splitlines()
    assert (lines[2], lines[-1].split()[-1], len(lines)) == ("dataset: x?y", "a?b?[31m", 6)


def test_merge_writes_what_merge_gives(run, path, tmp_path):
    other = tmp_path / "other.gguf"
    write_imatrix(make_imatrix({"even": make_entry(100)}, datasets=("b",)), other)
    status, out, err = run("merge", tmp_path / "all.gguf", path, other)
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'all.gguf'}: 3 entries, 0.00 MB")
    found, expected = read_imatrix(tmp_path / "all.gguf"), merge([read_imatrix(path), read_imatrix(other)])
    assert found.datasets == ("a", "b")
    for name, entry in found.entries.items():
        assert_equal(entry, expected.entries[name])


def test_merge_bounds_the_rows(run, path, tmp_path):
    assert run("merge", tmp_path / "all.gguf", path, "--rows", 2)[0] == 0
    assert len(read_imatrix(tmp_path / "all.gguf").entries["uneven"].rows) == 2


def test_convert_writes_the_older_format_and_says_what_it_loses(run, path, tmp_path):
    status, _, err = run("convert", path, tmp_path / "old.dat", "--format", "legacy")
    assert (status, err) == (
        0, "imatrix: the older format has no place for recorded rows and gains, which are left out\n",
    )  # fmt: skip
    assert (tmp_path / "old.dat").read_bytes()[:4] == b"\3\0\0\0"
    found = read_imatrix(tmp_path / "old.dat")
    assert torch.equal(found.columns["even"], read_imatrix(path).columns["even"])


def test_convert_reads_the_older_format(run, tmp_path):
    values = make_entry().sums[0].numpy()
    (tmp_path / "old.dat").write_bytes(legacy_bytes({"a": (values, 3)}))
    status, _, err = run("convert", tmp_path / "old.dat", tmp_path / "new.gguf")
    assert (status, err) == (0, "")
    assert (tmp_path / "new.gguf").read_bytes()[:4] == b"GGUF"
    assert torch.equal(read_imatrix(tmp_path / "new.gguf").columns["a"], torch.from_numpy(values) / 3)


def test_convert_can_leave_rows_out(run, path, tmp_path):
    assert run("convert", path, tmp_path / "small.gguf", "--without-rows")[0] == 0
    entry = read_imatrix(tmp_path / "small.gguf").entries["uneven"]
    assert (entry.rows, entry.gain) == (None, 2.5)


def write_recipe(tmp_path, *lines):
    (tmp_path / "recipe.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path / "recipe.txt"


def test_reduce_follows_the_recipes_weightings(run, path, tmp_path):
    weightings = "#weighting uneven=none", "#weighting even=root"
    recipe = write_recipe(tmp_path, "# made", "uneven=Q4_0", "even=Q4_0", *weightings)
    status, out, err = run("reduce", path, tmp_path / "reduced.gguf", "--recipe", recipe)
    assert (status, err, "2 entries" in out) == (0, "", True)
    full, reduced = read_imatrix(path), read_imatrix(tmp_path / "reduced.gguf")
    assert reduced.entries.keys() == {"even", "experts"}
    assert torch.equal(reduced.importance("even", 100), full.importance("even", 100, Weighting.ROOT))


REFUSALS = {
    "missing file": (["show", "none.gguf"], "none.gguf: there is no such file"),
    "no imatrix": (["show", "junk"], "junk: it is no importance matrix"),
    "an existing file": (["convert", "full.gguf", "junk"], "junk: the file exists. Give --overwrite"),
    "one of the sources": (["merge", "full.gguf", "full.gguf", "--overwrite"], "source and destination are the same"),
    "an output that is the recipe": (
        ["reduce", "full.gguf", "recipe.txt", "--recipe", "recipe.txt", "--overwrite"],
        "source and destination are the same",
    ),
    "another model's recipe": (
        ["reduce", "full.gguf", "new.gguf", "--recipe", "recipe.txt"],
        "full.gguf: none of its entries is a tensor of the recipe",
    ),
    "no folder": (["convert", "full.gguf", "none/new.gguf"], "new.gguf: "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_and_write_nothing(run, path, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk" * 9)
    write_recipe(tmp_path, "other.weight=Q4_0")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    args, message = REFUSALS[case]
    status, out, err = run(*args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"imatrix: {message}") or message in err
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize(
    "args", [[], ["show"], ["merge", "out"], ["convert", "a", "b", "--format", "x"], ["merge", "a", "b", "--rows", "0"]]
)
def test_a_wrong_command_line_ends_with_2(run, args):
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code == 2


def test_overwrite_replaces(run, path, tmp_path):
    (tmp_path / "new.gguf").write_bytes(b"old")
    assert run("convert", path, tmp_path / "new.gguf", "--overwrite")[0] == 0
    assert len(read_imatrix(tmp_path / "new.gguf").entries) == 3


def test_the_script_runs_from_any_folder_and_into_a_closed_pipe(path, tmp_path):
    command = [sys.executable, str(SCRIPT), "show", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("full.gguf: 3 entries")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
