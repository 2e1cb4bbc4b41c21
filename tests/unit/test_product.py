# SPDX-License-Identifier: Apache-2.0
"""A product with a quantized weight by parts of it equals the product with all of it dequantized."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.dequant import dequantize_rows
from gguf_kit.host import product
from gguf_kit.host.product import multiply_rows
from gguf_kit.layouts import LAYOUTS
from quant_data import random_blocks

N_OUT, N_IN = 37, 512


def make_rows(qtype=QType.Q4_K, seed=0, n_out=N_OUT):
    layout = LAYOUTS[qtype]
    blocks = torch.from_numpy(random_blocks(layout, n_out * N_IN // layout.block_size, seed)) & 0x3F
    return blocks.view(n_out, -1)


def expected(x, rows, bias, dtype=torch.float32, qtype=QType.Q4_K):
    weight = dequantize_rows(rows, qtype, dtype).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@pytest.fixture(params=["on a CPU", "elsewhere"])
def small_slices(request, monkeypatch):
    """Ten rows at a time, in both ways; how a CPU goes is told by the buffer that it keeps."""
    monkeypatch.setattr(product, "SLICE_BYTES", 10 * N_IN * 4)
    if request.param == "elsewhere":
        monkeypatch.setattr(product, "_is_overwritable", lambda *tensors: False)
        monkeypatch.setattr(product, "_buffer", None)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(2, 3, N_IN), (1, N_IN), (N_IN,)], ids=str)
def test_parts_equal_the_whole(shape, with_bias, dtype):
    x, rows = torch.randn(shape).to(dtype), make_rows()
    bias = torch.randn(N_OUT).to(dtype) if with_bias else None
    found = multiply_rows(x, rows, QType.Q4_K, bias, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, expected(x, rows, bias, dtype), rtol=2e-2 if dtype != x.float().dtype else 1e-5, atol=1e-1
    )


@pytest.mark.usefixtures("small_slices")
def test_rows_are_changed_with_their_place_in_the_whole_weight():
    x, rows, added = torch.randn(4, N_IN), make_rows(), torch.randn(N_OUT, N_IN)
    places = []

    def change(part, first):
        places.append((first, part.shape[0]))
        return part.add_(added[first : first + part.shape[0]])

    found = multiply_rows(x, rows, QType.Q4_K, None, torch.float32, change)
    weight = dequantize_rows(rows, QType.Q4_K) + added
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-3)
    assert places == [(0, 10), (10, 10), (20, 10), (30, 7)]


def test_one_part_is_the_very_product_of_torch():
    x, rows, bias = torch.randn(3, N_IN), make_rows(), torch.randn(N_OUT)
    assert torch.equal(multiply_rows(x, rows, QType.Q4_K, bias, torch.float32), expected(x, rows, bias))


def test_layers_share_the_buffer_and_not_their_results():
    x = torch.randn(3, N_IN)
    first = multiply_rows(x, make_rows(seed=1), QType.Q4_K, None, torch.float32)
    kept = first.clone()
    multiply_rows(x, make_rows(seed=2, n_out=80), QType.Q4_K, None, torch.bfloat16)
    assert torch.equal(first, kept)
    assert torch.equal(multiply_rows(x, make_rows(seed=1), QType.Q4_K, None, torch.float32), kept)


def test_a_buffer_made_in_inference_mode_serves_outside_of_it():
    def run():
        x, rows = torch.randn(3, N_IN), make_rows(seed=3)
        with torch.inference_mode():
            inside = multiply_rows(x, rows, QType.Q4_K, None, torch.float32)
        return torch.equal(inside, multiply_rows(x, rows, QType.Q4_K, None, torch.float32))

    with ThreadPoolExecutor(1) as thread:  # one that has no buffer yet
        assert thread.submit(run).result()


def test_threads_have_their_own_buffers():
    x, weights = torch.randn(64, N_IN), [make_rows(seed=seed) for seed in range(8)]
    wanted = [expected(x, rows, None) for rows in weights]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda rows: multiply_rows(x, rows, QType.Q4_K, None, torch.float32), weights * 4)
    for result, right in zip(found, wanted * 4, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-3)


def test_gradients_pass_through(monkeypatch):
    monkeypatch.setattr(product, "SLICE_BYTES", 10 * N_IN * 4)
    x, rows = torch.randn(3, N_IN, requires_grad=True), make_rows()
    bias = torch.zeros(N_OUT, requires_grad=True)
    multiply_rows(x.detach(), rows, QType.Q4_K, bias, torch.float32).sum().backward()
    assert torch.equal(bias.grad, torch.full((N_OUT,), 3.0))
    multiply_rows(x, rows, QType.Q4_K, None, torch.float32).sum().backward()
    torch.testing.assert_close(x.grad, dequantize_rows(rows, QType.Q4_K).sum(0).expand(3, -1), rtol=1e-5, atol=1e-3)


def test_compiled_code_does_not_share_a_buffer():
    x, rows = torch.randn(3, N_IN), make_rows()
    compiled = torch.compile(
        lambda x: multiply_rows(x, rows, QType.Q4_K, None, torch.float32), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), expected(x, rows, None))
