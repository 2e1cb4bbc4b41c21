# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every kernel is exact there, also in CUDA graphs, compiled code, on side streams and beyond 2**31."""

import logging

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant, layouts
from gguf_kit.dequant import dequantize
from gguf_kit.kernels import torch_reference, triton_gpu
from gguf_kit.layouts import LAYOUTS
from quant_data import QTYPES, adversarial_blocks, assert_same_weights, random_blocks

by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SOME_QTYPES = [QType.Q8_0, QType.Q4_K, QType.IQ2_XS]


def place(blocks, device, shift=0):
    """A copy on the GPU, so many bytes behind an aligned address."""
    buffer = torch.empty(blocks.size + 64, dtype=torch.uint8, device=device)
    return buffer[shift : shift + blocks.size].copy_(torch.from_numpy(blocks.ravel()))


def by_triton(data, qtype, dtype):
    n_blocks = data.numel() // LAYOUTS[qtype].type_size
    return dequantize(data, qtype, (n_blocks, LAYOUTS[qtype].block_size), dtype, backend="triton")


def test_triton_is_there(device):
    assert triton_gpu.unavailable(LAYOUTS[QType.Q4_K], device) == ""
    assert dequant.choose_backend(LAYOUTS[QType.Q4_K], device) == "triton"


@by_qtype
@by_dtype
@pytest.mark.parametrize("shift", [0, 1, 2, 8])
def test_all_blocks_equal_gguf_py(qtype, dtype, shift, device):
    layout = LAYOUTS[qtype]
    blocks = np.concatenate([random_blocks(layout, 4097), *adversarial_blocks(layout).values()])
    assert_same_weights(by_triton(place(blocks, device, shift), qtype, dtype).cpu(), blocks, qtype)


@by_qtype
@by_dtype
def test_the_reference_is_exact_too(qtype, dtype, device):
    blocks = random_blocks(LAYOUTS[qtype], 300)
    data = torch.from_numpy(blocks).to(device)
    assert_same_weights(torch_reference.dequantize(data, LAYOUTS[qtype], dtype).cpu(), blocks, qtype)


@by_qtype
def test_no_self_test_fails(qtype, device, caplog, monkeypatch):
    monkeypatch.setattr(dequant, "_faults", {})
    monkeypatch.setattr(dequant, "_warned", set())
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        data = torch.zeros(LAYOUTS[qtype].type_size, dtype=torch.uint8, device=device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            dequantize(data, qtype, (LAYOUTS[qtype].block_size,), dtype)
    assert not caplog.records


@pytest.mark.parametrize("qtype", SOME_QTYPES, ids=lambda qtype: qtype.name)
def test_a_cuda_graph_replays_on_new_bytes(qtype, device):
    first, second = (random_blocks(LAYOUTS[qtype], 333, seed) for seed in (1, 2))
    data = place(first, device)
    by_triton(data, qtype, torch.float16)  # compiles, tests, makes the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = by_triton(data, qtype, torch.float16)
    for blocks in (second, first):
        data.copy_(torch.from_numpy(blocks.ravel()))
        graph.replay()
        assert_same_weights(weights.cpu(), blocks, qtype)


def test_what_is_new_in_a_capture_takes_the_reference(device, monkeypatch):
    monkeypatch.setattr(dequant, "_faults", {})
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 5)
    data = place(blocks, device)
    torch_reference.dequantize(data.view(blocks.shape), LAYOUTS[QType.Q4_K], torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = dequantize(data, QType.Q4_K, (5, 256), torch.float16)
    graph.replay()
    assert not dequant._faults
    assert_same_weights(weights.cpu(), blocks, QType.Q4_K)


@pytest.mark.parametrize("qtype", SOME_QTYPES, ids=lambda qtype: qtype.name)
def test_nothing_waits_for_the_gpu_after_the_first_use(qtype, device):
    data = place(random_blocks(LAYOUTS[qtype], 333), device)
    by_triton(data, qtype, torch.bfloat16)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_triton(data, qtype, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_equals_gguf_py(mode, device):
    torch.compiler.reset()
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 64)
    data = place(blocks, device)
    compiled = torch.compile(
        lambda bytes_: dequantize(bytes_, QType.Q4_K, (64, 256), torch.float16) * 2, fullgraph=True, mode=mode
    )
    for _ in range(4):
        weights = compiled(data).clone()
    assert_same_weights((weights / 2).cpu(), blocks, QType.Q4_K)


def test_a_side_stream_is_used(device):
    blocks = random_blocks(LAYOUTS[QType.IQ2_XS], 3333)
    data = place(blocks, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        weights = by_triton(data, QType.IQ2_XS, torch.float32)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert_same_weights(weights.cpu(), blocks, QType.IQ2_XS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_data_counts_not_the_current_one(device):
    other = torch.device("cuda", 1 - device.index)
    blocks = random_blocks(LAYOUTS[QType.IQ2_XS], 33)
    weights = by_triton(place(blocks, other), QType.IQ2_XS, torch.float16)
    assert weights.device == other
    assert_same_weights(weights.cpu(), blocks, QType.IQ2_XS)


@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """2**31 + 2**20 weights: 2.3 GB of bytes, 4.3 GB of weights; the bytes pass 2**31 too."""
    n_blocks = ((1 << 31) + (1 << 20)) // 32
    if torch.cuda.mem_get_info(device)[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    layout, n_tail = LAYOUTS[QType.Q8_0], 1000
    data = torch.zeros(n_blocks * layout.type_size, dtype=torch.uint8, device=device)
    tail = random_blocks(layout, n_tail)
    data[-tail.size :].copy_(torch.from_numpy(tail.ravel()))
    assert data.numel() > 1 << 31
    weights = dequantize(data, QType.Q8_0, layouts.weight_shape(QType.Q8_0, (data.numel(),)), torch.float16)
    assert_same_weights(weights[-n_tail * 32 :].cpu(), tail, QType.Q8_0)
    assert not weights[: -n_tail * 32].any()
