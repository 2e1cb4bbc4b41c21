# SPDX-License-Identifier: Apache-2.0
"""inspect_gguf.py --check finds every number that is not finite, in every type, and nothing else."""

from functools import partial

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.layouts import LAYOUTS, Code
from gguf_kit.quantize import inspect
from inspect_files import finite_blocks, floats, run_inspect, tensor_of, write_model
from quant_data import BLOCK_QTYPES, QTYPES, dequantize_by_gguf, f16_sources, random_blocks, write_codes, write_f16

F16_NAN, F16_INF, F16_MINUS_INF = 0x7E01, 0x7C00, 0xFC00
ONE_SCALE = [q for q in BLOCK_QTYPES if len(f16_sources(LAYOUTS[q])) == 1]
TWO_SCALES = [q for q in BLOCK_QTYPES if len(f16_sources(LAYOUTS[q])) == 2]
# (qtype, scale byte, which of a block's, n_nan, n_inf), as far as the installed gguf has the types
BYTE_SCALES = [
    row
    for row in (
        ("MXFP4", 0xFF, 0, 1, 0),
        ("MXFP4", 0xFE, 0, 0, 1),
        ("MXFP4", 0xFD, 0, 0, 1),
        ("MXFP4", 0xFC, 0, 0, 0),
        ("NVFP4", 0x7F, 0, 1, 0),
        ("NVFP4", 0xFF, 3, 1, 0),
        ("NVFP4", 0x7E, 2, 0, 0),
    )
    if row[0] in QType.__members__
]


@pytest.fixture
def run(capsys):
    return partial(run_inspect, capsys)


@pytest.fixture
def write(tmp_path):
    return partial(write_model, tmp_path)


def test_sound_files_pass(run, tiny_flux):
    for type_name in ("BF16", "Q4_K_S"):
        result = run(tiny_flux(type_name), "--check")
        assert result.status == 0
        assert "96 tensors" in result.out
        assert "every scale and plain weight is finite" in result.out


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_finite_blocks_of_every_type_pass(write, qtype):
    result = inspect.check(GGUFFile(write({"w": tensor_of(qtype, finite_blocks(qtype, 200))})))
    assert (result.n_tensors, result.problems, dict(result.unchecked)) == (1, (), {})


@pytest.mark.parametrize("bits", [F16_NAN, F16_INF, F16_MINUS_INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("qtype", [*ONE_SCALE, *TWO_SCALES], ids=lambda q: q.name)
def test_one_bad_f16_scale_is_found_and_only_there(write, qtype, bits):
    layout = LAYOUTS[qtype]
    for source, part in zip(f16_sources(layout), [p for p in ("d", layout.dmin, layout.m) if p], strict=True):
        blocks = finite_blocks(qtype, 40)
        write_f16(blocks[17:18], layout, source, np.array([bits], np.uint16))
        clean = tensor_of(qtype, finite_blocks(qtype, 40, seed=1))
        path = write({"before": clean, "victim": tensor_of(qtype, blocks), "after": clean})
        (problem,) = inspect.check(GGUFFile(path)).problems
        n_nan = int(bits == F16_NAN)
        assert problem == inspect.NonFinite("victim", qtype, part, n_nan, 1 - n_nan, 40, 17)


@pytest.mark.parametrize(
    ("qtype", "byte", "column", "n_nan", "n_inf"),
    BYTE_SCALES,
)
def test_special_values_of_byte_scales_are_found(write, qtype, byte, column, n_nan, n_inf):
    qtype = QType[qtype]
    code = LAYOUTS[qtype].d
    blocks = finite_blocks(qtype, 40)
    scales = blocks[:, : LAYOUTS[qtype].n_codes(code)].copy()
    scales[17, column] = byte
    write_codes(blocks, LAYOUTS[qtype], code, scales)
    found = [(p.part, p.n_nan, p.n_inf, p.first_block) for p in check_one(write, qtype, blocks)]
    assert found == ([("d", n_nan, n_inf, 17)] if n_nan or n_inf else [])


def check_one(write, qtype, blocks):
    return inspect.check(GGUFFile(write({"w": tensor_of(qtype, blocks)}))).problems


@pytest.mark.parametrize("qtype", [q for q in QTYPES if q.name != "NVFP4"], ids=lambda q: q.name)
def test_as_many_blocks_are_found_as_gguf_py_dequantizes_to_something_not_finite(write, qtype):
    layout = LAYOUTS[qtype]
    rng = np.random.default_rng(int(qtype))
    for source in f16_sources(layout) or [None]:
        blocks = random_blocks(layout, 3000)
        if source is None or layout.quants is None:
            blocks = rng.integers(0, 256, blocks.shape, dtype=np.uint8)
        else:
            write_f16(blocks, layout, source, rng.integers(0, 1 << 16, 3000, dtype=np.uint16))
        n_bad = int((~np.isfinite(dequantize_by_gguf(blocks, qtype))).any(axis=1).sum())
        assert n_bad
        assert sum(p.n_nan + p.n_inf for p in check_one(write, qtype, blocks)) == n_bad


@pytest.mark.parametrize(
    ("qtype", "dtype", "bits"),
    [
        ("F32", "<u4", (0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF)),
        ("BF16", "<u2", (0x7F80, 0xFF80, 0x7F81, 0xFFFF)),
        ("F16", "<u2", (0x7C00, 0xFC00, 0x7C01, 0xFFFF)),
    ],
)
def test_plain_weights_are_checked_for_both_signs(write, qtype, dtype, bits):
    for i, word in enumerate(bits):
        weights = np.zeros(100, dtype)
        weights[60] = word
        path = write({"w": (QType[qtype], (10, 10), weights.tobytes())})
        (problem,) = inspect.check(GGUFFile(path)).problems
        assert problem == inspect.NonFinite("w", QType[qtype], "weights", int(i > 1), int(i < 2), 100, 60)


@pytest.mark.parametrize("qtype", [QType.Q4_K, QType.F16, QType.IQ1_M], ids=lambda q: q.name)
def test_counts_add_up_over_chunks(write, monkeypatch, qtype):
    layout = LAYOUTS[qtype]
    monkeypatch.setattr(inspect, "CHUNK_BYTES", 7 * layout.type_size + 1)
    blocks = finite_blocks(qtype, 50)
    for i in (13, 14, 20, 49):
        write_f16(blocks[i : i + 1], layout, layout.d, np.array([F16_NAN if i == 14 else F16_INF], np.uint16))
    steps = []
    path = write({"w": tensor_of(qtype, blocks), "i": (QType.I8, (5,), bytes(5)), "q": (QType.Q8_1, (32,), bytes(40))})
    result = inspect.check(GGUFFile(path), steps.append)
    (problem,) = result.problems
    assert (problem.n_nan, problem.n_inf, problem.n_numbers, problem.first_block) == (1, 3, 50, 13)
    assert len(steps) == 8 + 2
    assert sum(steps) == blocks.nbytes + 5 + 40


def test_problems_are_listed_and_set_the_status(run, write):
    blocks = finite_blocks(QType.Q4_K, 4)
    write_f16(blocks[2:3], LAYOUTS[QType.Q4_K], "dmin", np.array([F16_INF], np.uint16))
    path = write({"good": floats([1.0]), "bad": tensor_of(QType.Q4_K, blocks)})
    result = run(path, "--check")
    assert result.status == 1
    assert "2 tensors" in result.out
    assert result.out.splitlines()[-1].split() == ["Q4_K", "dmin", "0", "1", "4", "2", "bad"]
    assert run(path, "--check", "--json").document["check"]["problems"] == [
        {"name": "bad", "qtype": "Q4_K", "part": "dmin", "nan": 0, "inf": 1, "numbers": 4, "first_block": 2}
    ]


def test_tensors_that_cannot_be_checked_are_named_and_integers_need_no_check(run, write):
    path = write(
        {
            "i": (QType.I32, (2,), b"\xff" * 8),
            "act": (QType.Q8_1, (32,), b"\xff" * 40),
            "e": (QType.Q4_K, (0, 256), b""),
        }
    )
    result = run(path, "--check")
    assert result.status == 0
    assert "not checked: act, Q8_1: holds activations" in result.out
    assert "check    2 tensors" in result.out


def test_every_code_book_of_scales_has_its_special_codes():
    books = {layout.d.book.name for layout in LAYOUTS.values() if isinstance(layout.d, Code) and layout.d.book}
    assert books <= set(inspect.SPECIAL_CODES)
