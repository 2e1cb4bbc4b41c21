# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that need no host run, check what they time, and record what their tables need. No time is judged."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as QType

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
measure = importlib.import_module("measure")
bench_dequant = importlib.import_module("bench_dequant")
tables = importlib.import_module("tables")
weights = importlib.import_module("weights")

MACHINE = {"bench", "device", "threads", "torch", "triton", "llvmlite", "isa", "python", "git"}
TIMED = {"name", "ms", "p20", "p80", "n"}
SMALL = ["--quick", "--threads", "1"]


def run(script, folder, *options):
    """(exit status, records, page) of a benchmark in a process of its own."""
    command = [sys.executable, str(BENCH / f"{script}.py"), *SMALL, "--save", str(folder / "kind"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (folder / "kind.json").exists(), done.stderr
    page = (folder / "kind.md").read_text(encoding="utf-8")
    assert page in done.stdout
    return done.returncode, json.loads((folder / "kind.json").read_text(encoding="utf-8")), page


def test_dequantization_is_recorded_for_each_contestant_with_machine_and_ratios(tmp_path):
    status, records, page = run("bench_dequant", tmp_path, "--qtypes", "Q8_0", "IQ4_XS", "--shapes", "8x512")
    assert status == 0
    names = {record["name"] for record in records}
    assert {"torch", "straight torch", "ggml C", "copy"} <= names
    for record in records:
        assert (MACHINE | TIMED | {"qtype", "shape", "dtype", "memory", "mweights_per_s", "gb_per_s"}) <= {*record}
    ours = [record for record in records if record["name"] == "torch" and record["memory"] == "fresh"]
    assert {(record["qtype"], record["dtype"]) for record in ours} == {
        (qtype, dtype) for qtype in ("Q8_0", "IQ4_XS") for dtype in ("float32", "bfloat16")
    }
    for record in ours:
        assert {*record["against"]} == {"straight torch", "ggml C", "copy"}
        assert all(each["time"] > 0 for each in record["against"].values())
    assert page.count("| torch |") >= 4


def test_the_integer_prototype_records_speed_and_error(tmp_path):
    status, records, _ = run("prototype_int8", tmp_path, "--qtypes", "Q8_0")
    assert status == 0
    errors = {record["name"]: record.get("error") for record in records}
    assert errors["dense"] is None
    assert 0 < errors["int8, weights kept"] < 0.05


def test_a_benchmark_replaces_its_own_records_and_keeps_the_others(tmp_path):
    first = [
        {"bench": "bench_load", "name": "full", "device": "x"},
        {"bench": "bench_load", "name": "host", "device": "x"},
    ]
    measure.save(tmp_path / "kind", "bench_load", first)
    measure.save(tmp_path / "kind", "bench_a", [{"bench": "bench_a", "name": "other", "device": "x"}])
    again = [{"bench": "bench_load", "name": "full", "seconds": 2.0, "device": "x"}]
    measure.save(tmp_path / "kind", "bench_load", again)
    saved = measure.read_records(tmp_path / "kind.json")
    assert [record["name"] for record in saved] == ["other", "full"]
    assert "2.000" in (tmp_path / "kind.md").read_text(encoding="utf-8")
    lines = (tmp_path / "kind.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == saved


def test_a_wrong_kernel_prints_fail_and_has_no_figure(monkeypatch, capsys):
    wrong = bench_dequant.dequant.Backend(lambda blocks, layout, out: out.zero_(), lambda *_: "")
    monkeypatch.setattr(bench_dequant.dequant, "BACKENDS", {"wrong": wrong})
    status = bench_dequant.main([*SMALL, "--qtypes", "Q4_K", "--dtypes", "float32", "--shapes", "8x512"])
    printed = capsys.readouterr().out
    record = next(json.loads(line) for line in printed.splitlines() if '"name": "wrong"' in line)
    assert status == 1
    assert record["result"].startswith("FAIL: ")
    assert "ms" not in record
    assert "**FAIL: " in printed


def test_a_kernel_that_leaves_given_memory_as_it_was_is_wrong(monkeypatch):
    idle = bench_dequant.dequant.Backend(lambda *_: None, lambda *_: "")
    monkeypatch.setattr(bench_dequant.dequant, "BACKENDS", {"idle": idle})
    with bench_dequant.ThreadPoolExecutor(1) as pool:
        work = bench_dequant.make_work(QType.Q4_K, (4, 512), torch.float32, torch.device("cpu"), pool)
    work.out.copy_(work.expected)
    [given] = [each for each in bench_dequant.backends(work, ["idle"]) if each.memory == bench_dequant.GIVEN]
    assert bench_dequant.mistake(given, work) == "2048 weights differ from the reference"


def test_a_baseline_that_is_off_by_a_percent_is_wrong():
    with bench_dequant.ThreadPoolExecutor(1) as pool:
        work = bench_dequant.make_work(QType.Q4_K, (4, 512), torch.float32, torch.device("cpu"), pool)
    good = bench_dequant.Contestant("x", "fresh", lambda: work.expected * (1 + 1e-6), 1e-5)
    bad = bench_dequant.Contestant("x", "fresh", lambda: work.expected * 1.01, 1e-5)
    assert bench_dequant.mistake(good, work) == ""
    assert "differs" in bench_dequant.mistake(bad, work)
    exact = bench_dequant.Contestant("x", "fresh", lambda: work.expected * (1 + 1e-6))
    assert "differ from the reference" in bench_dequant.mistake(exact, work)


def test_ratios_are_those_of_rounds_and_not_of_a_busy_moment():
    fast, slow = measure.Timing((1.0, 1.0, 10.0, 10.0, 10.0)), measure.Timing((2.0, 2.0, 20.0, 20.0, 2.0))
    assert slow.over(fast) == 2
    assert (fast.median, slow.median) == (10, 2)


def test_contestants_take_turns_and_each_round_starts_with_another():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    clock = measure.Clock(torch.device("cpu"))
    clock.warm_up = lambda action: action() or 1
    timings = measure.take_turns(actions, clock, measure.Budget(0, 3))
    assert calls == [*"ab", *"ab", *"ba", *"ab"]  # the first two are the warm-up
    assert {len(timing.seconds) for timing in timings.values()} == {3}


@pytest.mark.parametrize("qtype", bench_dequant.LAYOUTS, ids=lambda qtype: qtype.name)
def test_weights_are_finite_and_of_ordinary_size(qtype):
    layout = bench_dequant.LAYOUTS[qtype]
    blocks = weights.make_blocks(qtype, 2048 if layout.block_size == 1 else 64)
    values = bench_dequant.torch_reference.dequantize(blocks, layout, torch.float32)
    assert bool(values.isfinite().all())
    assert 1e-4 < float(values.abs().mean()) < 10


def test_every_benchmark_has_a_table():
    scripts = {path.stem for pattern in ("bench_*.py", "prototype_*.py") for path in BENCH.glob(pattern)}
    assert scripts == {table.bench for table in tables.TABLES}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--qtypes", "Q9_K"], "is none of"),
        (["--shapes", "3072*3072"], "is no ROWSxCOLUMNS"),
        (["--pack", "no/such/pack"], "is no Python file"),
        (["--pack", str(BENCH / "weights.py")], "has no function dequantize"),
    ],
    ids=["type", "shape", "pack that is not there", "pack without the function"],
)
def test_wrong_options_are_refused_in_words(options, words, capsys):
    with pytest.raises(SystemExit):
        bench_dequant.main(options)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs where there is a GPU")
def test_what_needs_a_gpu_says_so(capsys):
    for name, options in (("prototype_overlap", []), ("bench_step", ["--full-flux"])):
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(options)
        assert "needs a CUDA device" in capsys.readouterr().err
