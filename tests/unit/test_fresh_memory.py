# SPDX-License-Identifier: Apache-2.0
"""Results have memory of their own, and large ones get that of an earlier one which is gone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.dequant import dequantize
from gguf_kit.kernels import fresh_memory
from gguf_kit.layouts import LAYOUTS
from quant_data import random_blocks

CPU = torch.device("cpu")
SHAPE = (1024, 1024)  # 4 MB as float32


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(fresh_memory, "_held", [])


def make(shape=SHAPE, dtype=torch.float32):
    return fresh_memory.empty(shape, dtype, CPU)


def test_memory_of_a_result_that_is_gone_is_used_again():
    first = make()
    place = first.data_ptr()
    del first
    assert make().data_ptr() == place


def test_it_may_get_another_dtype_and_shape():
    place = make().data_ptr()
    found = make((2048, 1024), torch.bfloat16)
    assert (found.data_ptr(), found.shape, found.dtype) == (place, (2048, 1024), torch.bfloat16)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[5:7, 3],
        lambda t: t.numpy(),
        lambda t: t.detach(),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.untyped_storage(),
        lambda t: memoryview(t.numpy())[1:],
        lambda t: (t * torch.ones(1, requires_grad=True)).sum(),
        lambda t: torch.utils.dlpack.to_dlpack(t),
    ],
    ids=["itself", "a view", "numpy", "detached", "a parameter", "its storage", "a buffer", "autograd", "dlpack"],
)
def test_memory_that_anybody_has_is_not_used_again(keep):
    first = make().fill_(3)
    place, kept = first.data_ptr(), keep(first)
    del first
    second = make()
    assert second.data_ptr() != place
    assert kept is not None


def test_memory_that_another_process_may_read_is_not_used_again():
    first = make().share_memory_()
    place = first.data_ptr()
    del first
    assert make().data_ptr() != place


@pytest.mark.parametrize("shape", [(1024, 1023), (2048, 1024)], ids=["smaller", "larger"])
def test_memory_of_another_size_is_let_go(shape):
    place = make((2048, 1024)).data_ptr() if shape[0] == 1024 else make().data_ptr()
    found = make((1025, 1024))
    assert found.untyped_storage().nbytes() == 1025 * 1024 * 4
    assert len(fresh_memory._held) == 1
    assert place


def test_small_and_huge_results_are_torchs_own(monkeypatch):
    monkeypatch.setattr(fresh_memory, "MAX_BYTES", 8 << 20)
    make((1024, 1023))
    make((4096, 1024))
    assert not fresh_memory._held


def test_without_a_way_to_count_users_nothing_is_held(monkeypatch):
    monkeypatch.setattr(fresh_memory, "_count_users", None)
    assert make().shape == SHAPE
    assert not fresh_memory._held


@pytest.mark.parametrize("inference", [True, False])
def test_memory_used_in_one_mode_serves_in_the_other(inference):
    with torch.inference_mode(inference):
        place = make().fill_(1).data_ptr()
    with torch.inference_mode(not inference):
        assert make().fill_(2).data_ptr() == place


def test_threads_never_get_the_same_memory():
    def run(number):
        result = make().fill_(number)
        return bool(result.eq(number).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(200)))


def test_weights_of_two_tensors_do_not_mix():
    layout = LAYOUTS[QType.Q4_K]
    first, second = (torch.from_numpy(random_blocks(layout, 4096, seed)) for seed in (1, 2))
    weights = dequantize(first, QType.Q4_K, SHAPE)
    copy = weights.clone()
    others = dequantize(second, QType.Q4_K, SHAPE)
    assert torch.equal(weights, copy)
    assert not torch.equal(weights, others)
    del weights
    assert torch.equal(dequantize(first, QType.Q4_K, SHAPE), copy)
    assert torch.equal(dequantize(second, QType.Q4_K, SHAPE), others)
