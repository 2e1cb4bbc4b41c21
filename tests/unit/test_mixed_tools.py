# SPDX-License-Identifier: Apache-2.0
"""Mixed recipes from end to end: recorded rows, tune.py, the recipe's text, convert.py, the blocks of the file."""

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.dequant import dequantize
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.imatrix_write import write_imatrix
from gguf_kit.quantize.recipe_files import read_recipe_file
from gguf_kit.tools import convert, imatrix, tune
from safetensors.torch import save_file

NAMES = [f"blocks.{i}.attn.to_q.weight" for i in range(3)]
ROWS, COLUMNS, N_RECORDED = 48, 512, 48
QUICK = "--engine", "torch", "--threads", "2", "--sample-rows", "16", "--types", "Q3_K"
GOAL = "--target-bpw", "3.5"


def inputs(n, seed):
    """Inputs (n, COLUMNS) whose columns move together and are of very different size."""
    mixing = torch.randn(16, COLUMNS, generator=torch.Generator().manual_seed(9))
    size = torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(8))]
    return (torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) @ mixing + 0.3) * size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its importance matrix with and without rows, and what was tuned with the rows."""
    folder, generator = tmp_path_factory.mktemp("mixed"), torch.Generator().manual_seed(0)
    state = {name: torch.randn(ROWS, COLUMNS, generator=generator).bfloat16() for name in NAMES}
    save_file(state, folder / "model.safetensors")
    x = inputs(N_RECORDED, 1).bfloat16()
    for file, rows in ("im.gguf", x), ("plain.gguf", None):
        entry = Entry(x.float().square().sum(0, keepdim=True), torch.tensor([float(N_RECORDED)]), rows)
        write_imatrix(Imatrix(folder / file, dict.fromkeys(NAMES, entry)), folder / file)
    assert run(tune, folder, *GOAL, "--dst", folder / "recipe.txt") == 0
    assert run(convert, folder, "--recipe", folder / "recipe.txt", "--dst", folder / "mixed.gguf") == 0
    return folder


def run(tool, folder, *options, file="im.gguf"):
    """Exit code of a tool on the model."""
    source = "--src", folder / "model.safetensors", "--imatrix", folder / file
    return tool.main([str(option) for option in (*source, *QUICK, *options)])


def output_error(folder, file):
    """Mean squared output error of all matrices in a file, on inputs that nobody has recorded."""
    x, made, source, total = inputs(256, 2), GGUFFile(folder / file), torch.Generator().manual_seed(0), 0.0
    for name in NAMES:
        weights = torch.randn(ROWS, COLUMNS, generator=source).bfloat16().float()
        decoded = dequantize(made.data(name), made.tensors[name].qtype, (ROWS, COLUMNS))
        total += float(((decoded - weights) @ x.T).square().sum(0).mean())
    return total


def test_tuning_with_recorded_rows_writes_a_mixed_recipe(folder):
    recipe = read_recipe_file(folder / "recipe.txt")
    assert recipe.types == dict.fromkeys(NAMES, QType.Q3_K)
    assert recipe.weightings == dict.fromkeys(NAMES, Weighting.MIXED)
    assert f"#weighting {NAMES[0]}=mixed\n" in (folder / "recipe.txt").read_text()


@pytest.mark.parametrize("weighting", ["none", "root", "full"])
def test_the_file_has_less_output_error_than_with_one_weighting(folder, tmp_path, weighting):
    text = (folder / "recipe.txt").read_text().replace("=mixed", f"={weighting}")
    (tmp_path / "recipe.txt").write_text(text)
    assert run(convert, folder, "--recipe", tmp_path / "recipe.txt", "--dst", tmp_path / "fixed.gguf") == 0
    assert (tmp_path / "fixed.gguf").stat().st_size <= (folder / "mixed.gguf").stat().st_size
    assert output_error(folder, "mixed.gguf") < 0.9 * output_error(tmp_path, "fixed.gguf")


@pytest.mark.parametrize("options", [("--recipe", "recipe.txt"), ("--type", "auto", *GOAL)], ids=lambda o: o[1])
def test_every_way_gives_the_same_bytes(folder, tmp_path, options, monkeypatch):
    monkeypatch.setattr("gguf_kit.quantize.convert.MIN_CHUNK_WEIGHTS", 3 * COLUMNS)
    monkeypatch.setattr("gguf_kit.quantize.convert.MAX_WEIGHTS_IN_FLIGHT", 1)
    options = [folder / option if option == "recipe.txt" else option for option in options]
    assert run(convert, folder, *options, "--dst", tmp_path / "mixed.gguf", "--cache", tmp_path / "c.jsonl") == 0
    assert (tmp_path / "mixed.gguf").read_bytes() == (folder / "mixed.gguf").read_bytes()


def test_without_recorded_rows_the_recipe_is_refused_in_one_sentence(folder, tmp_path, capsys):
    options = "--recipe", folder / "recipe.txt", "--dst", tmp_path / "no.gguf"
    assert run(convert, folder, *options, file="plain.gguf") == 2
    said = f"plain.gguf: tensor '{NAMES[0]}' is to be mixed, which needs recorded rows of its inputs. Give the"
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert convert.main(["--src", str(folder / "model.safetensors"), *map(str, options)]) == 2
    assert "is to be mixed, which needs recorded rows" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "no.gguf").exists()


def test_no_importance_matrix_stands_for_a_mixed_recipe(folder, tmp_path, capsys):
    options = folder / "im.gguf", tmp_path / "out.gguf", "--recipe", folder / "recipe.txt"
    assert imatrix.main(["reduce", *map(str, options)]) == 2
    assert "in a way that no importance matrix can say" in capsys.readouterr().err


def test_an_entry_of_several_matrices_is_refused(folder, tmp_path, capsys):
    entry = Entry(torch.ones(4, COLUMNS), torch.ones(4))
    write_imatrix(Imatrix(tmp_path / "experts.gguf", {NAMES[0]: entry}), tmp_path / "experts.gguf")
    for tool, options in (tune, GOAL), (convert, ("--type", "Q4_K_S")):
        assert run(tool, folder, *options, "--dst", tmp_path / "o", file=tmp_path / "experts.gguf") == 2
        assert "is for 4 experts, expected a single matrix" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("goal", [("--max-size", "9" * 30 + "TB"), ("--target-bpw", "1e308"), ("--max-error", "1e200")])
def test_goals_beyond_all_numbers_are_met(folder, tmp_path, goal):
    assert run(tune, folder, *goal, "--cache", folder / "c.jsonl", "--dst", tmp_path / "o.txt") == 0


def test_an_error_out_of_reach_is_told_as_it_was_asked(folder, tmp_path, capsys):
    wide = {name: torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) for name in NAMES}
    save_file(wide, tmp_path / "model.safetensors")
    command = "--src", tmp_path / "model.safetensors", *QUICK, "--max-error", "0.0001"
    assert tune.main([*map(str, command)]) == 2
    problem = "no choice of types has a predicted error of 0.0001, the least is about 0.00"
    assert problem in capsys.readouterr().err.splitlines()[-1]
