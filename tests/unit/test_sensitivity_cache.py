# SPDX-License-Identifier: Apache-2.0
"""The cache of measured costs: what it saves, what makes it void, kills, damaged and foreign files, several writers."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.quantize import weight_samples
from gguf_kit.quantize.costs_cache import BEGINNING, CostsCache, Encoding, Measured
from gguf_kit.quantize.encode import TorchEngine
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.sensitivity import measure
from gguf_kit.quantize.sources import open_source
from gguf_kit.quantize.weight_samples import Estimate
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"blocks.{i}.attn.to_q.weight" for i in range(6)]
TYPES = (QType.Q8_0, QType.Q4_0)
KEY = "00" * 16
KNOWN = Measured(
    2.5, {Encoding(QType.Q8_0, Weighting.FULL): Estimate(0.5, 0.25), Encoding(QType.Q4_K, Weighting.ROOT): None}
)


class CountingEngine(TorchEngine):
    """Remembers what it was asked to encode: (qtype, rows)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, weights, qtype, importance):
        self.calls.append((qtype, len(weights)))
        return super().encode(weights, qtype, importance)


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(40, 256, generator=generator).bfloat16() for name in NAMES}, path)
    return path


def imatrix_of(scale=1.0, with_rows=False):
    sums, rows = torch.full((1, 256), 4 * scale), torch.ones(4, 256).bfloat16()
    entry = Entry(sums, torch.tensor([4.0]), rows if with_rows else None)
    return Imatrix(Path("calibration.gguf"), dict.fromkeys(NAMES, entry))


def run(model, cache, *, imatrix=None, engine=None, **options):
    """(costs, encodings that were made) of a measurement."""
    engine = engine or CountingEngine()
    source = open_source(model)
    options = {"qtypes": TYPES} | options
    costs = measure(source, make_plan(source, Choices("BF16")).tensors, imatrix, engine, cache=cache, **options)
    return costs, len(engine.calls)


def lines_of(cache):
    return [line for line in cache.read_bytes().split(b"\n") if line]


def test_what_was_measured_is_not_measured_again(tmp_path, model):
    cache = tmp_path / "folder" / "costs.jsonl"
    costs, n_encoded = run(model, cache)
    assert n_encoded == len(NAMES) * len(TYPES)
    assert run(model, cache) == (costs, 0)
    assert run(model, None) == (costs, n_encoded)
    assert [json.loads(line)["name"] for line in lines_of(cache)] == NAMES


def test_only_new_types_are_measured(tmp_path, model):
    cache = tmp_path / "costs.jsonl"
    run(model, cache)
    costs, n_encoded = run(model, cache, qtypes=(*TYPES, QType.Q5_0))
    assert n_encoded == len(NAMES)
    assert run(model, cache, qtypes=(*TYPES, QType.Q5_0)) == (costs, 0)
    assert run(model, cache, qtypes=[QType.Q5_0])[1] == 0
    assert costs == run(model, None, qtypes=(*TYPES, QType.Q5_0))[0]


def test_other_weights_inputs_rows_samples_or_methods_are_measured_anew(tmp_path, model, monkeypatch):
    cache = tmp_path / "costs.jsonl"
    every = run(model, cache)[1]
    assert run(model, cache, sample_rows=20)[1] == every
    assert run(model, cache, sample_rows=40)[1] == 0
    weighted = run(model, cache, imatrix=imatrix_of())[1]
    assert weighted == len(NAMES) * 4  # Q4_0 in three weightings
    assert run(model, cache, imatrix=imatrix_of(2.0))[1] == weighted
    assert run(model, cache, imatrix=imatrix_of(with_rows=True))[1] == weighted
    assert run(model, cache, imatrix=imatrix_of())[1] == 0
    state = load_file(model)
    state[NAMES[2]][5, 5] += 1
    save_file(state, model)
    assert run(model, cache)[1] == len(TYPES)
    monkeypatch.setattr(weight_samples, "METHOD", 10**6)
    assert run(model, cache)[1] == every


def test_a_type_that_cannot_hold_a_tensor_is_not_tried_again(tmp_path, model):
    state = load_file(model)
    state[NAMES[0]][0, 0] = 1e9
    save_file(state, model)
    cache = tmp_path / "costs.jsonl"
    costs, _ = run(model, cache, qtypes=[QType.Q4_0])
    assert [len(c.candidates) for c in costs] == [1, 2, 2, 2, 2, 2]
    assert run(model, cache, qtypes=[QType.Q4_0]) == (costs, 0)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, model):
    def interrupt(name, part):
        if name == NAMES[3]:
            raise KeyboardInterrupt

    cache = tmp_path / "costs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, progress=interrupt)
    assert len(lines_of(cache)) == 3
    costs, n_encoded = run(model, cache)
    assert n_encoded == 3 * len(TYPES)
    assert costs == run(model, None)[0]


KILLED = """
import sys
sys.path[:0] = [sys.argv[1]]
import _pack, os, signal
from pathlib import Path
from gguf import GGMLQuantizationType as QType
from gguf_kit.quantize.encode import TorchEngine
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.sensitivity import measure
from gguf_kit.quantize.sources import open_source
source = open_source(sys.argv[2])
def progress(name, part):
    if part > 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
measure(source, make_plan(source, Choices("BF16")).tensors, None, TorchEngine(), qtypes=[QType.Q8_0, QType.Q4_0],
        cache=Path(sys.argv[3]), progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_loses_no_tensor_that_was_done(tmp_path, model):
    cache = tmp_path / "costs.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT / "tools"), str(model), str(cache)], check=False)
    assert done.returncode == -signal.SIGKILL
    n_done = len(lines_of(cache))
    assert 0 < n_done < len(NAMES)
    costs, n_encoded = run(model, cache)
    assert n_encoded == (len(NAMES) - n_done) * len(TYPES)
    assert costs == run(model, None)[0]


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path, model):
    cache = tmp_path / "costs.jsonl"
    costs, _ = run(model, cache)
    whole = cache.read_bytes()
    last = len(whole) - whole.rstrip(b"\n").rfind(b"\n")
    for cut in (2, 10, last // 2, last - 1):
        cache.write_bytes(whole[:-cut])
        assert run(model, cache) == (costs, len(TYPES)), cut
        assert run(model, cache) == (costs, 0), cut
    for n_left in (1, 2, 12, len(BEGINNING) + 5):
        cache.write_bytes(whole[:n_left])
        assert run(model, cache)[1] == len(NAMES) * len(TYPES), n_left
        assert run(model, cache) == (costs, 0), n_left


DAMAGED = {
    "no object": "[]",
    "no errors": '{"key": "K", "name": "a", "energy": 1}',
    "errors are a list": '{"key": "K", "name": "a", "energy": 1, "errors": [1]}',
    "unknown type": '{"key": "K", "name": "a", "energy": 1, "errors": {"Q9_K full": [1, 1]}}',
    "unknown weighting": '{"key": "K", "name": "a", "energy": 1, "errors": {"Q8_0 some": [1, 1]}}',
    "negative": '{"key": "K", "name": "a", "energy": 1, "errors": {"Q8_0 full": [-1, 1]}}',
    "not finite": '{"key": "K", "name": "a", "energy": NaN, "errors": {"Q8_0 full": [1, 1]}}',
    "endless number": '{"key": "K", "name": "a", "energy": 1' + "0" * 5000 + ', "errors": {"Q8_0 full": [1, 1]}}',
    "text": '{"key": "K", "name": "a", "energy": "1", "errors": {"Q8_0 full": "11"}}',
    "truth": '{"key": "K", "name": "a", "energy": true, "errors": {"Q8_0 full": [1, 1]}}',
    "too few numbers": '{"key": "K", "name": "a", "energy": 1, "errors": {"Q8_0 full": [1]}}',
    "deep": '{"key": ' + "[" * 50000,
    "bytes": "\ud800",
}


@pytest.mark.parametrize("record", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_passed_over(tmp_path, record):
    cache = tmp_path / "costs.jsonl"
    CostsCache(cache).add(KEY, "a", KNOWN)
    line = record.replace('"K"', f'"{KEY}"').encode("utf-8", "surrogatepass")
    for text in (line, BEGINNING + b", " + line[1:], BEGINNING + b", " + b"x" * 10**6):
        with open(cache, "ab") as file:
            file.write(text + b"\n")
    CostsCache(cache).add("11" * 16, "b", KNOWN)
    found = CostsCache(cache)
    assert found.get(KEY) == KNOWN
    assert found.get("11" * 16) == KNOWN


def test_records_of_one_key_are_joined_and_the_last_word_counts(tmp_path):
    cache = tmp_path / "costs.jsonl"
    CostsCache(cache).add(KEY, "a", KNOWN)
    encoding = Encoding(QType.Q4_K, Weighting.ROOT)
    CostsCache(cache).add(KEY, "a", replace(KNOWN, errors={encoding: Estimate(1.0, 0.0)}))
    assert CostsCache(cache).get(KEY) == replace(KNOWN, errors={**KNOWN.errors, encoding: Estimate(1.0, 0.0)})


@pytest.mark.parametrize("content", [b"GGUF\x03", b'{"a": 1}\n', b"#!/bin/sh\n", b"\n\n\x00"], ids=repr)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path, content):
    cache = tmp_path / "precious"
    cache.write_bytes(content)
    with pytest.raises(GGUFError, match=r"^precious: this is no cache of measured costs\. Name another file\.$"):
        CostsCache(cache)
    assert cache.read_bytes() == content


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "costs.jsonl"):
        with pytest.raises(GGUFError, match=r"the cache of measured costs cannot be used: .*\. Name another file\.$"):
            CostsCache(path)


def test_writers_at_the_same_time_do_not_spoil_each_others_lines(tmp_path):
    path = tmp_path / "costs.jsonl"

    def write(writer):
        cache = CostsCache(path)
        for i in range(100):
            cache.add(f"{writer}-{i}", "x" * 3000, KNOWN)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = CostsCache(path)
    assert all(found.get(f"{writer}-{i}") == KNOWN for writer in range(4) for i in range(100))


def test_without_a_path_nothing_is_remembered():
    cache = CostsCache(None)
    cache.add(KEY, "a", KNOWN)
    assert cache.get(KEY) is None
