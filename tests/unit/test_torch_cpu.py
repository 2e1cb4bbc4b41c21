# SPDX-License-Identifier: Apache-2.0
"""The CPU's own torch backend gives the reference's bits: every qtype and dtype, size, place in memory and thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.dequant import BACKENDS
from gguf_kit.kernels import torch_cpu, torch_reference, torch_unpack
from gguf_kit.layouts import LAYOUTS, Code
from quant_data import BLOCK_QTYPES, QTYPES, adversarial_blocks, dequantize_with, random_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
by_block_qtype = pytest.mark.parametrize("qtype", BLOCK_QTYPES, ids=lambda qtype: qtype.name)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
CPU = torch.device("cpu")
FEW_QTYPES = [qtype for qtype in QTYPES if qtype.name in {"Q4_K", "Q5_0", "IQ2_XS", "TQ1_0", "F16"}]


def assert_as_reference(blocks, qtype, dtype=torch.float32):
    """Equal to the bit; any NaN is as good as another."""
    layout = LAYOUTS[qtype]
    weights = dequantize_with(torch_cpu, blocks, layout, dtype)
    expected = torch_reference.dequantize(blocks, layout, dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    same = (weights.view(bits) == expected.view(bits)) | (weights.isnan() & expected.isnan())
    assert weights.dtype == dtype
    assert bool(same.all()), f"{qtype.name}: {int((~same).sum())} of {same.numel()} weights differ"


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_pieces(monkeypatch):
    """Steps of 2 blocks or 512 weights, and groups of few pieces of few steps."""
    monkeypatch.setattr(torch_cpu, "STEP_WEIGHTS", 512)
    monkeypatch.setattr(torch_cpu, "GROUP_WEIGHTS", 4096)


@by_qtype
def test_every_qtype_is_taken_on_the_cpu_alone(qtype):
    assert torch_cpu.unavailable(LAYOUTS[qtype], CPU) == ""
    assert "CPU" in torch_cpu.unavailable(LAYOUTS[qtype], torch.device("meta"))


def test_it_is_chosen_before_the_reference():
    names = [*BACKENDS]
    assert names.index("torch-cpu") < names.index("torch")


@by_qtype
@by_dtype
def test_random_blocks_equal_the_reference(qtype, dtype):
    assert_as_reference(torch.from_numpy(random_blocks(LAYOUTS[qtype], 777)), qtype, dtype)


@by_block_qtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adversarial_blocks_equal_the_reference(qtype, dtype):
    for blocks in adversarial_blocks(LAYOUTS[qtype]).values():
        assert_as_reference(torch.from_numpy(blocks), qtype, dtype)


@by_block_qtype
@pytest.mark.usefixtures("small_pieces", "n_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_blocks_over_the_borders_of_pieces_equals_the_reference(qtype, dtype):
    sizes = torch_cpu._choose_sizes(LAYOUTS[qtype], 1 << 20)
    blocks = torch.from_numpy(random_blocks(LAYOUTS[qtype], 3 * sizes.group + sizes.piece + 1))
    some = {0, 1, len(blocks), 2 * sizes.group, *(size + more for size in sizes for more in (-1, 0, 1))}
    for n_blocks in some:
        assert_as_reference(blocks[:n_blocks], qtype, dtype)


@by_block_qtype
@pytest.mark.usefixtures("n_threads")
def test_full_pieces_of_the_real_sizes_equal_the_reference(qtype):
    sizes = torch_cpu._choose_sizes(LAYOUTS[qtype], 1 << 20)
    n_blocks = sizes.group + sizes.piece + 5
    few = torch.from_numpy(random_blocks(LAYOUTS[qtype], 1021))
    assert_as_reference(few.repeat(n_blocks // 1021 + 1, 1)[:n_blocks], qtype)


@by_qtype
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_data_may_lie_at_any_address(qtype, shift):
    blocks = random_blocks(LAYOUTS[qtype], 5)
    buffer = np.zeros(blocks.size + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + shift
    buffer[start : start + blocks.size] = blocks.ravel()
    for data in (
        torch.from_numpy(buffer)[start : start + blocks.size],
        torch.from_numpy(buffer[start:])[: blocks.size],
    ):
        assert data.data_ptr() % 64 == shift
        assert_as_reference(data.view(5, -1), qtype)


@by_qtype
def test_data_with_gaps_between_blocks_is_read_right(qtype):
    blocks = random_blocks(LAYOUTS[qtype], 6)
    wide = torch.from_numpy(np.concatenate([blocks, blocks], axis=1))
    assert_as_reference(wide[:, : blocks.shape[1]], qtype)


@by_qtype
@by_dtype
def test_the_result_has_its_own_memory(qtype, dtype):
    blocks = torch.from_numpy(random_blocks(LAYOUTS[qtype], 3))
    before = blocks.clone()
    dequantize_with(torch_cpu, blocks, LAYOUTS[qtype], dtype).zero_()
    assert torch.equal(blocks, before)
    assert_as_reference(blocks, qtype, dtype)  # and no table was written to


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("qtype", FEW_QTYPES, ids=lambda qtype: qtype.name)
def test_several_threads_may_call_at_once(qtype, n_threads):
    sets = [torch.from_numpy(random_blocks(LAYOUTS[qtype], 150, seed)) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for check in [threads.submit(assert_as_reference, blocks, qtype) for blocks in sets * 3]:
            check.result()


@pytest.mark.usefixtures("small_pieces", "n_threads")
@by_block_qtype
def test_inference_mode_is_kept_and_left_behind(qtype):
    blocks = torch.from_numpy(random_blocks(LAYOUTS[qtype], 70))
    with torch.inference_mode():
        inside = dequantize_with(torch_cpu, blocks, LAYOUTS[qtype], torch.float32)
        assert inside.is_inference()
        assert_as_reference(blocks.clone(), qtype)
    weights = dequantize_with(torch_cpu, blocks, LAYOUTS[qtype], torch.float32)
    assert not weights.is_inference()
    factor = torch.ones(weights.shape[1], requires_grad=True)
    (weights * factor).sum().backward()
    assert factor.grad is not None


def test_constants_made_in_inference_mode_serve_outside_of_it():
    torch_unpack.constant.cache_clear()
    with torch.inference_mode():
        number = torch_unpack.constant(7, torch.int64)
    assert not number.is_inference()
    assert torch_unpack.constant(7, torch.int64) is number


class LongestOperation(TorchDispatchMode):
    """Notes the most elements that an operation wrote."""

    VIEWS = ("view", "split", "slice", "unbind", "empty", "as_strided", "unflatten", "detach", "reshape", "alias")

    def __init__(self):
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(name in func.__name__ for name in self.VIEWS):
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.n_elements = max([self.n_elements, *sizes])
        return result


@by_block_qtype
def test_no_operation_is_longer_than_a_step_which_bounds_the_memory(qtype):
    layout = LAYOUTS[qtype]
    blocks = torch.from_numpy(random_blocks(layout, (1 << 21) // layout.block_size))
    dequantize_with(torch_cpu, blocks[:1], layout, torch.bfloat16)  # makes the tables
    out = torch.empty(len(blocks), layout.block_size, dtype=torch.bfloat16)
    with LongestOperation() as longest:
        torch_cpu.dequantize_into(blocks, layout, out)
    assert 0 < longest.n_elements <= torch_cpu.STEP_WEIGHTS


def test_a_code_that_it_cannot_unpack_is_left_to_the_reference():
    layout = LAYOUTS[QType.Q4_0]
    doubled = replace(layout, quants=replace(layout.quants, mul=2))
    wide = replace(LAYOUTS[QType.Q8_0], fields=(layout.fields[0], replace(LAYOUTS[QType.Q8_0].fields[1], element="u8")))
    assert not isinstance(layout.d, Code)
    for unknown in (doubled, wide):
        assert "only the reference" in torch_cpu.unavailable(unknown, CPU)
