# SPDX-License-Identifier: Apache-2.0
"""inspect_gguf.py --diff tells how two files differ, across types and stored shapes."""

import io
import math
import tracemalloc
from functools import partial

import gguf
import gguf_builder as build
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.layouts import LAYOUTS
from gguf_kit.quantize import compare, inspect
from inspect_files import finite_blocks, floats, run_inspect, tensor_of, write_model


@pytest.fixture
def run(capsys):
    return partial(run_inspect, capsys)


@pytest.fixture
def write(tmp_path):
    return partial(write_model, tmp_path)


def test_a_file_equals_itself(run, tiny_flux):
    result = run(tiny_flux("Q4_K_S"), "--diff", tiny_flux("Q4_K_S"))
    assert result.status == 0
    assert "96 equal, 0 different" in result.out


def test_errors_across_types_are_those_of_gguf_py(run, tiny_flux):
    path_a, path_b = tiny_flux("BF16"), tiny_flux("Q4_K_S")
    result = run(path_a, "--diff", path_b, "--json")
    assert result.status == 1
    found = {t["name"]: t for t in result.document["diff"]["tensors"]}
    b = {t.name: t for t in gguf.GGUFReader(path_b).tensors}
    errors = norms = 0.0
    for t in gguf.GGUFReader(path_a).tensors:
        weights = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        error = gguf.quants.dequantize(b[t.name].data, b[t.name].tensor_type) - weights
        if not error.any() and t.tensor_type == b[t.name].tensor_type:
            assert found[t.name]["status"] == "equal"
            continue
        assert found[t.name]["status"] == "different"
        expected = np.linalg.norm(error) / np.linalg.norm(weights)
        assert found[t.name]["relative_error"] == pytest.approx(expected, rel=1e-6)
        assert found[t.name]["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-6)
        errors, norms = errors + (error**2).sum(), norms + (weights**2).sum()
    assert result.document["diff"]["relative_error"] == pytest.approx(math.sqrt(errors / norms), rel=1e-6)
    assert sum(t["status"] == "different" for t in found.values()) == 32


def test_worst_tensors_come_first(run, tiny_flux):
    lines = run(tiny_flux("BF16"), "--diff", tiny_flux("Q4_K_S"), "--worst", "5").out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("differs in"))
    errors = [float(line.split()[1]) for line in lines[start + 1 : start + 6]]
    assert errors == sorted(errors, reverse=True)
    assert "and 27 more" in lines[start + 6]
    everything = run(tiny_flux("BF16"), "--diff", tiny_flux("Q4_K_S"), "--worst", "0").out
    assert everything.count("\ntype ") == 32


def test_chunks_do_not_change_the_result(write, monkeypatch):
    blocks = finite_blocks(QType.Q6_K, 10) & 0x3F
    weights = np.random.default_rng(0).standard_normal((10, 256))
    a = GGUFFile(write({"w": floats(weights)}, name="a.gguf"))
    b = GGUFFile(write({"w": tensor_of(QType.Q6_K, blocks)}, name="b.gguf"))
    whole = compare.compare(a, b)
    monkeypatch.setattr(compare, "CHUNK_WEIGHTS", 768)
    monkeypatch.setattr(compare, "CHUNK_BYTES", 1000)
    steps = []
    chunked = compare.compare(a, b, steps.append)
    assert chunked.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
    assert chunked.max_error == whole.max_error
    assert steps == [3072, 3072, 3072, 1024]


def test_chunks_are_whole_blocks_of_every_type():
    assert not [q for q, layout in LAYOUTS.items() if compare.CHUNK_WEIGHTS % layout.block_size]


def test_equal_logical_shapes_are_compared_whatever_the_stored_ones(run, write):
    weights = np.arange(512, dtype=np.float32)
    shape = {"comfy.gguf.orig_shape.w": (build.ARRAY, (build.I32, [64, 2, 2, 2]))}
    a = write({"w": floats(weights, (64, 2, 2, 2))}, name="a.gguf")
    b = write({"w": floats(weights, (2, 256))}, shape, name="b.gguf")
    c = write({"w": floats(weights + 1, (2, 256))}, shape, name="c.gguf")
    result = run(a, "--diff", b, "--json")
    assert (result.status, result.document["diff"]["metadata"]) == (0, [])
    (tensor,) = run(a, "--diff", c, "--json").document["diff"]["tensors"]
    assert (tensor["status"], tensor["max_error"]) == ("different", 1)


def test_structure_that_differs_is_told_apart_and_comes_first(run, write):
    same, integers = floats([1.0, 2.0]), (QType.I32, (2,), bytes(8))
    a = write({"same": same, "gone": same, "shape": floats(np.ones((2, 3))), "ids": integers, "v": same}, name="a.gguf")
    b = write(
        {"v": floats([1.0, 2.5]), "same": same, "ids": (QType.I32, (2,), b"12345678"), "new": same}
        | {"shape": floats(np.ones((3, 2)))},
        name="b.gguf",
    )
    result = run(a, "--diff", b)
    assert result.status == 1
    assert "1 equal, 2 different, 1 of another shape, 1 only in A, 1 only in B" in result.out
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("differs in"))
    assert [line.split()[0] for line in lines[start + 1 :]] == ["presence", "presence", "shape", "bytes", "bytes"]
    assert [line.split()[-1] for line in lines[start + 1 :]] == ["gone", "new", "shape", "ids", "v"]
    status = {
        t["name"]: (t["status"], t["relative_error"]) for t in run(a, "--diff", b, "--json").document["diff"]["tensors"]
    }
    assert status["ids"] == ("different", None)
    assert status["v"] == ("different", pytest.approx(math.sqrt(0.25 / 5)))
    assert (status["gone"][0], status["new"][0], status["shape"][0]) == ("only_a", "only_b", "shape")


def test_same_values_in_another_type_differ_without_an_error(run, write):
    a = write({"w": floats([1.0, -2.0])}, name="a.gguf")
    b = write({"w": (QType.F16, (2,), np.array([1, -2], "<f2").tobytes())}, name="b.gguf")
    result = run(a, "--diff", b, "--json")
    (tensor,) = result.document["diff"]["tensors"]
    assert (result.status, tensor["status"], tensor["relative_error"]) == (1, "different", 0)


def test_nan_is_reported_as_nan_and_listed_before_numbers(run, write):
    a = write({"v": floats([1.0, 1.0]), "w": floats([1.0, 1.0])}, name="a.gguf")
    b = write({"v": floats([100.0, 1.0]), "w": floats([math.nan, 1.0])}, name="b.gguf")
    lines = run(a, "--diff", b).out.splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["w", "v"]
    assert lines[-2].split()[1:3] == ["nan", "nan"]
    diff = run(a, "--diff", b, "--json").document["diff"]
    assert (diff["relative_error"], diff["max_error"]) == ("nan", "nan")


def test_metadata_that_differs_is_listed_but_does_not_count(run, write):
    long, longer = [list(range(n)) for n in (100, 101)]
    same = {"nan": (build.F32, math.nan), "list": (build.ARRAY, (build.I32, long)), "s": (build.STRING, "x")}
    a = write({}, {**same, "n": (build.STRING, "one"), "gone": (build.U32, 1), "l": (build.ARRAY, (build.I32, long))})
    b = write({}, {**same, "n": (build.STRING, "two"), "l": (build.ARRAY, (build.I32, longer))}, name="b.gguf")
    result = run(a, "--diff", b, "--json")
    assert result.status == 0
    assert result.document["diff"]["metadata"] == [
        {"key": "n", "a": "one", "b": "two"},
        {"key": "gone", "a": 1, "b": None},
        {"key": "l", "a": None, "b": None},
    ]
    text = run(a, "--diff", b).out
    assert "array of 100 items  array of 101 items" in text
    assert "missing" in text


def test_check_and_diff_hold_a_chunk_not_a_tensor(tmp_path):
    n_bytes = 1 << 26
    header = build.assemble([], [build.entry("w", [n_bytes // 4], int(QType.F32))])
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + n_bytes)  # a hole, which reads as zeros
    with paths[1].open("r+b") as file:
        file.seek(-4, io.SEEK_END)
        file.write(np.float32(1).tobytes())
    a, b = map(GGUFFile, paths)
    tracemalloc.start()
    try:
        inspect.check(a)
        result = compare.compare(a, b)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (result.relative_error, result.max_error) == (math.inf, 1)
