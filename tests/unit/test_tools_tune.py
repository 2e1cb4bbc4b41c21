# SPDX-License-Identifier: Apache-2.0
"""The command lines that choose types, on a small model that is really measured: files, sizes, cache, refusals."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_kit.quantize import sensitivity
from gguf_kit.quantize.imatrix import Entry, Imatrix
from gguf_kit.quantize.imatrix_write import write_imatrix
from gguf_kit.quantize.recipe_files import read_recipe_file
from gguf_kit.tools import convert, quantize, tune
from gguf_kit.tools._options import parse_size
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
WIDTH, ROWS, BLOCKS = 256, 128, 16
SIZE = "520KB"
QUICK = "--threads", "2", "--types", "Q2_K,Q3_K,Q4_K,Q6_K,Q8_0", "--sample-rows", "16"


def small_model():
    """Random weights with the keys of an unrecognised transformer."""
    generator = torch.Generator().manual_seed(0)
    state = {"img_in.weight": torch.randn(ROWS, WIDTH, generator=generator), "img_in.bias": torch.zeros(ROWS)}
    for i in range(BLOCKS):
        rows = 8 * (i + 2)  # of many sizes, so that small files can be of nearly any
        state[f"blocks.{i}.attn.to_q.weight"] = torch.randn(rows, WIDTH, generator=generator) * 0.1 * (i + 1)
        state[f"blocks.{i}.attn.to_v.weight"] = torch.randn(rows + 3, WIDTH, generator=generator)
        state[f"blocks.{i}.ffn.net.2.weight"] = torch.randn(ROWS // 2, 2 * WIDTH, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the model, its importance matrix and what was measured of it."""
    folder = tmp_path_factory.mktemp("made")
    state = small_model()
    save_file(state, folder / "model.safetensors", metadata={"config": '{"a": 1}'})
    generator = torch.Generator().manual_seed(1)
    entries = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            sums = torch.rand(1, tensor.shape[1], generator=generator) ** 4 * 8
            gain = 0.1 * float(torch.rand(1, generator=generator)) / float((tensor.float() ** 2).sum())
            # Of every second the rows contradict the sums, so that it is better not to weigh.
            rows = torch.randn(32, tensor.shape[1], generator=generator).bfloat16() if len(entries) % 2 else None
            entries[name] = Entry(sums, torch.tensor([4.0]), rows, gain=gain, gain_calls=2.0)
    write_imatrix(Imatrix(folder / "im.gguf", entries), folder / "im.gguf")
    assert run(tune, folder, "--max-size", SIZE, "--keep-policy", "free") == 0
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The same in a folder of one's own, without the recipe."""
    for name in ("model.safetensors", "im.gguf", "model.costs.jsonl"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


def run(tool, folder, *options):
    """Exit code of a tool on the model."""
    return tool.main([
        "--src", str(folder / "model.safetensors"), "--imatrix", str(folder / "im.gguf"), *QUICK, *map(str, options)
    ])  # fmt: skip


@pytest.mark.parametrize("policy", ["kept", "free"])
@pytest.mark.parametrize("size", [460_000, 520_000, 600_001, 750_000, 1_100_000])
def test_the_real_file_is_never_above_the_request_and_hardly_below(folder, size, policy):
    assert run(convert, folder, "--type", "auto", "--max-size", size, "--keep-policy", policy) == 0
    n_bytes = (folder / f"model-auto-{size}B.gguf").stat().st_size
    assert 0.995 * size <= n_bytes <= size


def test_auto_gives_the_bytes_of_tuning_and_converting(folder):
    assert run(tune, folder, "--max-size", SIZE) == 0
    recipe = folder / f"model-auto-{SIZE}.txt"
    assert run(convert, folder, "--recipe", recipe) == 0
    made = (folder / f"model-auto-{SIZE}.gguf").read_bytes()  # the model's name is not in it twice
    options = "--type", "auto", "--max-size", SIZE, "--export-recipe", folder / "same.txt", "--overwrite"
    assert run(convert, folder, *options) == 0
    assert (folder / f"model-auto-{SIZE}.gguf").read_bytes() == made
    assert (folder / "same.txt").read_bytes() == recipe.read_bytes()
    assert read_recipe_file(recipe).weightings


def test_a_gguf_of_16_bit_is_tuned_as_its_source(folder):
    assert run(tune, folder, "--target-bpw", "4", "--dst", folder / "a.txt") == 0
    assert convert.main(["--src", str(folder / "model.safetensors")]) == 0
    options = "--imatrix", folder / "im.gguf", *QUICK, "--target-bpw", "4", "--dst", folder / "b.gguf"
    source = "--src", folder / "model-BF16.gguf", "--type", "auto", "--export-recipe", folder / "b.txt"
    assert quantize.main([*map(str, (*source, *options))]) == 0
    assert dict(read_recipe_file(folder / "a.txt").types) == dict(read_recipe_file(folder / "b.txt").types)


def test_the_table_names_types_errors_and_the_fixed_recipe(folder, capsys):
    assert run(tune, folder, "--max-size", "700KB") == 0
    shown = capsys.readouterr().out
    for part in (
        "model-auto-700KB.txt",
        "attn_v",
        "bits per weight",
        "predicted relative error of",
        "% less",
        "weighting",
    ):
        assert part in shown, part
    assert "gains measured for 48 of 48 tensors" in shown
    command = shlex.split(shown.splitlines()[-1].removeprefix("now: "))
    assert command[:2] == ["python", "tools/convert.py"]
    assert convert.main(command[2:]) == 0
    assert (folder / "model-auto-700KB.gguf").stat().st_size <= 700_000


def test_json_is_one_object_with_the_prediction(folder, capsys):
    assert run(tune, folder, "--max-size", SIZE, "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["path"] == str(folder / f"model-auto-{SIZE}.txt")
    assert 0 < tuned["predicted_error"] < 1
    assert run(convert, folder, "--type", "auto", "--max-size", SIZE, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert {key: made[key] for key in tuned if key != "path"} == {key: tuned[key] for key in tuned if key != "path"}
    assert made["file_bytes"] == (folder / f"model-auto-{SIZE}.gguf").stat().st_size


def test_a_dry_run_of_auto_writes_no_file(folder, capsys):
    before = sorted(path.name for path in folder.iterdir())
    assert run(convert, folder, "--type", "auto", "--max-size", SIZE, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["file_bytes"] <= 520_000
    assert run(convert, folder, "--type", "auto", "--max-size", SIZE, "--dry-run") == 0
    assert f"model-auto-{SIZE}.gguf" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == before


def count_encodings(monkeypatch):
    """A list that grows by one with every encoding that is measured."""
    done = []
    real = sensitivity.Measurement.measure_encoding
    monkeypatch.setattr(sensitivity.Measurement, "measure_encoding", lambda *a: [done.append(a[2]), real(*a)][1])
    return done


def test_what_was_measured_serves_other_requests_and_a_run_that_was_cut_off_goes_on(folder, monkeypatch):
    done = count_encodings(monkeypatch)
    assert run(tune, folder, "--max-size", SIZE) == 0
    assert run(tune, folder, "--target-bpw", "3.7") == 0
    assert done == []
    cache = folder / "model.costs.jsonl"
    assert run(tune, folder, "--max-size", SIZE, "--cache", folder / "new.jsonl", "--dst", folder / "all.txt") == 0
    n_all = len(done)
    lines = cache.read_bytes().split(b"\n")
    cache.write_bytes(b"\n".join(lines[: len(lines) // 2])[:-20])  # as a kill leaves it
    done.clear()
    assert run(tune, folder, "--max-size", SIZE, "--overwrite") == 0
    assert 0 < len(done) < n_all
    assert (folder / f"model-auto-{SIZE}.txt").read_bytes() == (folder / "all.txt").read_bytes()


def test_other_goals_have_names_of_their_own(folder):
    for goal in ("--target-bpw", "4.5"), ("--max-error", "0.03"), ("--max-size", "0.5MB"), ("--max-size", "500 KiB"):
        assert run(tune, folder, *goal) == 0
    names = {path.name for path in folder.glob("*.txt")}
    assert names == {f"model-auto-{goal}.txt" for goal in ("4.5bpw", "error0.03", "0.5MB", "500KiB")}


def test_the_goal_is_met_by_the_numbers(folder, capsys):
    assert run(tune, folder, "--max-error", "0.03", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predicted_error"] <= 0.03
    assert run(tune, folder, "--target-bpw", "4.5", "--json") == 0
    assert 0.995 * 4.5 <= json.loads(capsys.readouterr().out)["bpw"] <= 4.5


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6.0GB", (6_000_000_000, "6.0GB")),
        ("5.2GiB", (int(5.2 * 2**30), "5.2GiB")),
        ("4500mb", (4_500_000_000, "4500mb")),
        (" 7 TB ", (7 * 10**12, "7TB")),
        ("123456", (123456, "123456B")),
        ("2KiB", (2048, "2KiB")),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "there is nothing to aim at. Give one of --max-size, --target-bpw and --max-error."),
        (("--max-size", "1GB", "--target-bpw", "4"), "there are several goals. Give one of"),
        (("--max-size", "1XB"), "--max-size '1XB' is no size. Examples: 6.0GB"),
        (("--max-size", "-1GB"), "--max-size"),
        (("--max-size", "10KB"), "model.safetensors: no choice of types makes it as small as 10KB, the smallest has"),
        (("--target-bpw", "0"), "--target-bpw 0 is not a number above 0"),
        (("--target-bpw", "nan"), "--target-bpw nan is not a number above 0"),
        (("--target-bpw", "1"), "the smallest has"),
        (("--max-error", "-1"), "--max-error -1 is not"),
        (("--max-size", "1MB", "--types", "Q4_K,Q9"), "--types: 'Q9' is no type of tensors"),
        (("--max-size", "1MB", "--types", "Q4_K,I8"), "--types: I8 quantizes nothing"),
        (("--max-size", "1MB", "--types", "IQ3_S", "--engine", "torch"), "the torch engine cannot make IQ3_S"),
        (("--max-size", "1MB", "--sample-rows", "1"), "1 sample rows are too few"),
        (("--max-size", "1MB", "--imatrix", "none.gguf"), "none.gguf: there is no such file"),
        (("--max-size", "1MB", "--dst", "no/such/a.txt"), "there is no folder"),
        (("--max-size", "1MB", "--threads", "0"), "--threads 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_request_is_one_line_and_exit_code_two(folder, capsys, options, problem):
    before = sorted(path.name for path in folder.iterdir())
    options = [f"--max-size={options[1]}"] if options[1:] == ("-1GB",) else options
    assert run(tune, folder, *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("tune: ")
    assert problem in said[-1]
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--type", "auto"), "--type auto has nothing to aim at. Give one of"),
        (("--type", "Q4_K_S", "--max-size", "1GB"), "are for --type auto"),
        (("--max-error", "0.1"), "are for --type auto"),
        (("--type", "AUTO", "--max-size", "10KB"), "the smallest has"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_goals_and_the_type_auto_belong_together(folder, capsys, options, problem):
    assert run(convert, folder, *options) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]
    assert not list(folder.glob("*.gguf.*"))


def test_existing_files_are_refused_before_anything_is_measured(folder, monkeypatch, capsys):
    (folder / f"model-auto-{SIZE}.txt").write_text("precious")
    (folder / f"model-auto-{SIZE}.gguf").write_text("precious")
    monkeypatch.setattr(tune, "measure", None)
    assert run(tune, folder, "--max-size", SIZE) == 2
    assert run(convert, folder, "--type", "auto", "--max-size", SIZE) == 2
    assert capsys.readouterr().err.count("the file exists. Give --overwrite") == 2


def test_an_importance_matrix_of_another_model_is_refused(folder, capsys):
    write_imatrix(Imatrix(folder / "o.gguf", {"x": Entry(torch.ones(1, 4), torch.ones(1))}), folder / "o.gguf")
    options = "--imatrix", str(folder / "o.gguf"), "--max-size", SIZE
    assert tune.main(["--src", str(folder / "model.safetensors"), *QUICK, *options]) == 2
    assert "o.gguf: none of its entries is a tensor of the model" in capsys.readouterr().err


def test_without_an_importance_matrix_columns_count_the_same(folder, capsys):
    options = "--target-bpw", "4", "--json"
    assert tune.main(["--src", str(folder / "model.safetensors"), *QUICK, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_measured_gains"] == 0
    assert not read_recipe_file(Path(found["path"])).weightings


def test_the_program_runs_by_its_path_and_helps(folder):
    command = [sys.executable, str(ROOT / "tools" / "tune.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert {*re.findall(r"--[a-z-]+", shown)} >= {
        "--src", "--imatrix", "--max-size", "--target-bpw", "--max-error", "--keep-policy", "--types", "--sample-rows",
        "--cache", "--dst", "--overwrite", "--threads", "--engine", "--device", "--json",
    }  # fmt: skip
    options = "--src", str(folder / "model.safetensors"), "--imatrix", str(folder / "im.gguf"), "--max-size", "1KB"
    done = subprocess.run([*command, *options, *QUICK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
