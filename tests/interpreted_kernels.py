# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels in Triton's own interpreter, on a CPU: exact for every qtype, and chosen and refused by the rule.

test_triton_gpu.py runs this file in a process of its own: TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from gguf_kit.dequant import dequantize
from gguf_kit.errors import GGUFError
from gguf_kit.kernels import triton_gpu
from gguf_kit.layouts import LAYOUTS
from quant_data import BLOCK_QTYPES, QTYPES, adversarial_blocks, assert_same_weights, dequantize_with, random_blocks

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}.* encountered:RuntimeWarning") for what in ("overflow", "invalid")
]
by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SOME_QTYPES = [QType.Q4_0, QType.Q4_K, QType.Q6_K, QType.IQ2_XS]


def place(blocks, shift):
    """A copy whose address is so many bytes behind a multiple of 64."""
    buffer = torch.zeros(blocks.size + 128, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + shift
    return buffer[start : start + blocks.size].copy_(torch.from_numpy(blocks.ravel()))


def by_triton(data, qtype, n_blocks, dtype=torch.float16):
    return dequantize(data, qtype, (n_blocks, LAYOUTS[qtype].block_size), dtype, backend="triton")


@by_qtype
@by_dtype
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "one byte off"])
def test_all_blocks_equal_gguf_py(qtype, dtype, shift):
    layout = LAYOUTS[qtype]
    blocks = np.concatenate([random_blocks(layout, 77), *adversarial_blocks(layout).values()])
    assert_same_weights(by_triton(place(blocks, shift), qtype, len(blocks), dtype), blocks, qtype)


@pytest.mark.parametrize("qtype", SOME_QTYPES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("n_blocks", [0, 1, 2, 3, 127, 129])
def test_several_programs_and_a_last_one_that_is_not_full(qtype, n_blocks, monkeypatch):
    monkeypatch.setattr(triton_gpu, "UNITS_INTERPRETED", 256)
    blocks = random_blocks(LAYOUTS[qtype], n_blocks)
    weights = by_triton(place(blocks, 0), qtype, n_blocks)
    assert weights.shape == (n_blocks, LAYOUTS[qtype].block_size)
    if n_blocks:
        assert_same_weights(weights, blocks, qtype)


@pytest.mark.parametrize("qtype", SOME_QTYPES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("shift", [2, 4, 8, 16])
def test_data_may_lie_at_any_address(qtype, shift):
    blocks = random_blocks(LAYOUTS[qtype], 5)
    assert_same_weights(by_triton(place(blocks, shift), qtype, 5), blocks, qtype)


def test_nothing_is_written_behind_the_end(monkeypatch):
    monkeypatch.setattr(triton_gpu, "UNITS_INTERPRETED", 256)
    canvas = torch.full((4096,), 42.0)
    blocks, weights = random_blocks(LAYOUTS[QType.Q4_K], 3), canvas[: 3 * 256].view(3, 256)
    triton_gpu.dequantize_into(place(blocks, 0).view(3, -1), LAYOUTS[QType.Q4_K], weights)
    assert_same_weights(weights, blocks, QType.Q4_K)
    assert canvas[3 * 256 :].unique().tolist() == [42.0]


def test_data_with_gaps_between_rows_is_read_right():
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 4)
    wide = torch.from_numpy(np.concatenate([blocks, blocks], axis=1))
    assert_same_weights(by_triton(wide[:, : blocks.shape[1]], QType.Q4_K, 4), blocks, QType.Q4_K)


@pytest.mark.parametrize("qtype", [QType.F16, QType.IQ2_XS], ids=lambda qtype: qtype.name)
def test_the_result_has_its_own_memory(qtype):
    blocks = random_blocks(LAYOUTS[qtype], 2)
    before = blocks.copy()
    by_triton(torch.from_numpy(blocks), qtype, 2).zero_()
    np.testing.assert_array_equal(blocks, before)
    assert_same_weights(by_triton(torch.from_numpy(blocks), qtype, 2), blocks, qtype)


def test_triton_is_the_fastest_that_is_there():
    assert dequant.choose_backend(LAYOUTS[QType.Q4_K], torch.device("cpu")) == "triton"
    assert triton_gpu.unavailable(LAYOUTS[QType.Q4_K], torch.device("meta")) == "Triton does not run on meta"


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(dequant, "_faults", {})
    monkeypatch.setattr(dequant, "_warned", set())
    monkeypatch.setattr(triton_gpu, "_functions", {})


def break_kernels(monkeypatch, old, new):
    write = triton_gpu.write_kernel

    def write_wrong(*arguments):
        kernel = write(*arguments)
        assert old in kernel.source
        return kernel._replace(source=kernel.source.replace(old, new))

    monkeypatch.setattr(triton_gpu, "write_kernel", write_wrong)


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("& 63", "& 31", "of 33536 weights differ"),
        ("mask=row < n_here", "mask=row < n_here - 1", "of 33536 weights differ"),
        ("tl.store", "tl.no_such_function", "Error: "),
    ],
    ids=["a wrong mask", "a weight short", "does not compile"],
)
def test_a_kernel_that_is_wrong_is_off_with_one_warning(old, new, reason, monkeypatch, caplog):
    break_kernels(monkeypatch, old, new)
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 3)
    for _ in range(2):
        weights = dequantize(torch.from_numpy(blocks), QType.Q4_K, (3, 256), torch.float16)
        assert_same_weights(weights, blocks, QType.Q4_K)
    [record] = [record for record in caplog.records if "'triton'" in record.message]
    assert "'triton' is not used for Q4_K to torch.float16 on cpu" in record.message
    assert reason in record.message
    with pytest.raises(GGUFError, match="'triton' is wrong for Q4_K"):
        by_triton(torch.from_numpy(blocks), QType.Q4_K, 3)


@pytest.mark.usefixtures("untested")
def test_a_weight_that_is_rounded_twice_is_noticed(monkeypatch, caplog):
    break_kernels(monkeypatch, ".to(out.dtype.element_ty)", ".to(tl.float16).to(out.dtype.element_ty)")
    dequantize(torch.zeros(144, dtype=torch.uint8), QType.Q4_K, (256,), torch.float32)
    assert "'triton' is not used for Q4_K to torch.float32" in caplog.text


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("inference", [False, True], ids=["grad mode", "inference mode"])
def test_compiled_code_uses_the_kernels(compiler, inference, monkeypatch):
    torch.compiler.reset()
    launches = []
    run = triton_gpu.dequantize_into
    backend = dequant.BACKENDS["triton"]._replace(dequantize_into=lambda *args: launches.append(1) or run(*args))
    monkeypatch.setattr(dequant, "BACKENDS", {**dequant.BACKENDS, "triton": backend})
    blocks = random_blocks(LAYOUTS[QType.IQ2_XS], 3)

    def weights_twice(data):
        return dequantize(data, QType.IQ2_XS, (3, 256), torch.bfloat16) * 2

    with torch.inference_mode(inference):
        weights = torch.compile(weights_twice, fullgraph=True, backend=compiler)(torch.from_numpy(blocks))
    assert len(launches) == 2  # the self-test and the call
    assert_same_weights(weights / 2, blocks, QType.IQ2_XS)


def test_tables_are_made_once_and_without_the_callers_modes(monkeypatch):
    monkeypatch.setattr(triton_gpu, "_book_words", {})
    layout = LAYOUTS[QType.IQ2_XS]
    blocks = torch.from_numpy(random_blocks(layout, 2))
    with torch.inference_mode():
        dequantize_with(triton_gpu, blocks, layout, torch.float16)
    tables = dict(triton_gpu._book_words)
    dequantize_with(triton_gpu, blocks, layout, torch.float16)
    assert len(tables) == 2  # the grid and the signs
    assert not any(table.is_inference() for table in tables.values())
    assert all(triton_gpu._book_words[key] is table for key, table in tables.items())


def test_every_block_type_has_a_kernel_in_both_widths():
    for qtype in BLOCK_QTYPES:
        for itemsize in (2, 4):
            for alignment in (1, triton_gpu.ALIGNMENT):
                kernel = triton_gpu.write_kernel(LAYOUTS[qtype], itemsize, alignment)
                assert kernel.n_unit * itemsize == 16
