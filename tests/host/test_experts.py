# SPDX-License-Identifier: Apache-2.0
"""Stacked experts over one quantized weight, alone and with what the host asks of such a layer."""

import comfy.ops
import gguf
import pytest
import torch
from gguf_kit import ops
from gguf_kit.host.compat import is_quantized
from gguf_kit.host.layer import OpsOptions
from gguf_kit.host.lora import PatchRef
from gguf_kit.ops import make_ops
from test_layers import quantized

Q = gguf.GGMLQuantizationType
N_EXPERTS, N_IN, N_OUT = 4, 256, 96


def bank(weight, dtype=torch.float32, options=None):
    """A layer of the pack with this weight (n_experts, out, in) and a bias for each expert, and the bias."""
    module = make_ops(options).MoEExperts(num_experts=N_EXPERTS, in_features=N_IN, out_features=N_OUT, dtype=dtype)
    bias = torch.randn(N_EXPERTS, N_OUT, generator=torch.Generator().manual_seed(1))
    module.load_state_dict({"weight": weight, "bias": bias})
    return module, bias


def expected(x, values, bias):
    return [torch.nn.functional.linear(x, w, b) for w, b in zip(values, bias, strict=True)]


@pytest.mark.parametrize("qtype", [Q.MXFP4, Q.Q4_K, Q.Q8_0], ids=lambda q: q.name)
def test_each_expert_equals_torch_on_its_dequantized_weight(qtype, inference_mode):
    weight, values = quantized((N_EXPERTS, N_OUT, N_IN), qtype)
    module, bias = bank(weight)
    assert is_quantized(module.weight)
    x = torch.randn(5, N_IN)
    with module.bank_resident(x) as resident:
        inside = [resident.expert_linear(x, i) for i in range(N_EXPERTS)]
    for actual, alone, wanted in zip(
        inside, (module.expert_linear(x, i) for i in range(N_EXPERTS)), expected(x, values, bias), strict=True
    ):
        assert torch.equal(actual, wanted)
        assert torch.equal(alone, wanted)


def test_only_the_expert_that_is_used_is_dequantized(monkeypatch):
    weight, _ = quantized((N_EXPERTS, N_OUT, N_IN), Q.Q4_K)
    module, _ = bank(weight)
    seen, dequantize_rows = [], ops.dequantize_rows
    monkeypatch.setattr(ops, "dequantize_rows", lambda rows, *a: seen.append(rows.shape) or dequantize_rows(rows, *a))
    module.expert_linear(torch.randn(5, N_IN), 2)
    assert seen == [(N_OUT, 144)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float_bank_of_another_dtype_computes_in_that_of_the_input(dtype):
    """BF16 or F16 experts of a file, in an encoder that computes in float32."""
    values = torch.randn(N_EXPERTS, N_OUT, N_IN).to(dtype)
    module, bias = bank(values, dtype=dtype)
    x = torch.randn(5, N_IN)
    for i, wanted in enumerate(expected(x, values.float(), bias)):
        assert torch.equal(module.expert_linear(x, i), wanted)
    assert module.weight.dtype == dtype


def test_a_bank_inside_a_bank_stays_resident():
    weight, values = quantized((N_EXPERTS, N_OUT, N_IN), Q.Q8_0)
    module, bias = bank(weight)
    x = torch.randn(5, N_IN)
    with module.bank_resident(x):
        resident = module._bank
        with module.bank_resident(x):
            pass
        assert module._bank is resident
        assert torch.equal(module.expert_linear(x, 3), expected(x, values, bias)[3])
    assert module._bank is None


def test_patches_on_the_experts():
    weight, values = quantized((N_EXPERTS, N_OUT, N_IN), Q.Q8_0)
    module, bias = bank(weight)
    difference = torch.randn(values.shape)
    module._loaded_patch = PatchRef("weight", {"weight": [(0.5, ("diff", (difference,)), 1.0, None, None)]})
    x = torch.randn(5, N_IN)
    for i, wanted in enumerate(expected(x, values + 0.5 * difference, bias)):
        assert torch.allclose(module.expert_linear(x, i), wanted, rtol=1e-5, atol=1e-5)


def test_a_failure_within_leaves_no_bank():
    weight, _ = quantized((N_EXPERTS, N_OUT, N_IN), Q.Q8_0)
    module, _ = bank(weight)
    module.weight_function = [lambda w: 1 / 0]
    with pytest.raises(ZeroDivisionError), module.bank_resident(torch.randn(5, N_IN)):
        pass
    assert module._bank is None


def test_the_state_dict_weighs_its_bytes_and_gives_floats():
    weight, values = quantized((N_EXPERTS, N_OUT, N_IN), Q.Q4_K)
    module, _ = bank(weight, options=OpsOptions())
    state = module.state_dict()
    assert state["weight"].nbytes == weight._qdata.nbytes
    assert torch.equal(state["weight"].to("cpu"), values)


@pytest.mark.skipif(
    not hasattr(comfy.ops.mixed_precision_ops({}), "MoEExperts"), reason="this ComfyUI has no stacked experts"
)
def test_experts_that_the_host_quantized_are_the_hosts_own():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((N_EXPERTS, N_OUT, N_IN), generator=generator)
    scale = values.abs().max() / 448
    quant = torch.tensor(list(b'{"format": "float8_e4m3fn", "num_experts": 4}'), dtype=torch.uint8)
    state = {
        "weight": (values / scale).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "comfy_quant": quant,
        "bias": torch.randn(N_EXPERTS, N_OUT, generator=generator),
    }
    native = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    ours, theirs = (
        namespace.MoEExperts(N_EXPERTS, N_IN, N_OUT, device=torch.device("cpu"), dtype=torch.float32)
        for namespace in (make_ops(), native)
    )
    for module in (ours, theirs):
        module.load_state_dict(dict(state))
    x = torch.randn(5, N_IN)
    with ours.bank_resident(x) as mine, theirs.bank_resident(x) as host:
        for i in range(N_EXPERTS):
            assert torch.equal(mine.expert_linear(x, i), host.expert_linear(x, i))
