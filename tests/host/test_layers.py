# SPDX-License-Identifier: Apache-2.0
"""The layers alone: every kind against torch on the dequantized weight, all compute types, compilation."""

import inspect

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import gguf
import numpy as np
import pytest
import torch
from gguf_kit import ops
from gguf_kit.host import product
from gguf_kit.host.compat import as_param, is_quantized, wrap
from gguf_kit.host.lora import PatchRef
from gguf_kit.host.patcher import GGUFPatcher
from gguf_kit.layouts import byte_shape
from gguf_kit.ops import OpsOptions, make_ops
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
QTYPES = [Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.Q6_K, Q.Q4_K, Q.Q3_K, Q.Q2_K, Q.IQ4_XS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(shape, qtype, seed=0, scale=0.05):
    """A weight of this shape for the host, its rows those of a (n, 256) matrix, and its float32 values."""
    generator = np.random.default_rng(seed)
    rows = (generator.standard_normal((int(np.prod(shape)) // 256, 256)) * scale).astype(np.float32)
    data = quantize_with_ggml(rows, qtype)
    values = torch.from_numpy(gguf.quants.dequantize(data, qtype).astype(np.float32).reshape(shape))
    return wrap(torch.from_numpy(data), qtype, shape), values


def layer(kind, *args, qtype=Q.Q4_K, dtype=torch.float32, options=None, **kwargs):
    """A layer of the pack loaded with a quantized weight and a float bias, and its float weight and bias."""
    module = getattr(make_ops(options), kind)(*args, dtype=dtype, **kwargs)
    weight, values = quantized(tuple(module._expected_shapes["weight"]), qtype)
    state = {"weight": weight}
    if "bias" in module._expected_shapes:
        state["bias"] = torch.linspace(-1, 1, module._expected_shapes["bias"][0])
    module.load_state_dict(state)
    return module, values, state.get("bias")


def close(result, reference, tolerance):
    error = torch.linalg.vector_norm(result.float() - reference.float()) / torch.linalg.vector_norm(reference.float())
    return result.isfinite().all() and error.item() <= tolerance


def test_linear_equals_torch_on_the_dequantized_weight(inference_mode):
    for qtype in QTYPES:
        module, weight, bias = layer("Linear", 512, 96, qtype=qtype)
        x = torch.randn(3, 5, 512)
        assert torch.equal(module(x), torch.nn.functional.linear(x, weight, bias)), qtype.name


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_keep_their_shape_over_reshaped_rows(dims):
    module, weight, bias = layer(f"Conv{dims}d", 64, 32, 3 if dims == 1 else 2, padding=1, qtype=Q.Q8_0)
    assert is_quantized(module.weight)
    assert tuple(module.weight.shape) == tuple(weight.shape)
    x = torch.randn(2, 64, *[6] * dims)
    assert torch.equal(module(x), getattr(torch.nn.functional, f"conv{dims}d")(x, weight, bias, padding=1))


def test_embedding_gathers_rows_and_dequantizes_only_those(monkeypatch):
    module, table, _ = layer("Embedding", 1000, 512, qtype=Q.Q6_K)
    seen, dequantize_rows = [], ops.dequantize_rows
    monkeypatch.setattr(ops, "dequantize_rows", lambda rows, *a: seen.append(rows.shape) or dequantize_rows(rows, *a))
    index = torch.tensor([[3, 999, 3], [0, 1, 500]])
    assert torch.equal(module(index, out_dtype=torch.float32), table[index])
    assert seen == [torch.Size([6, 2 * 210])]
    assert module(index, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_norms_and_transposed_convolutions_dequantize_when_loaded():
    weight, values = quantized((256,), Q.Q8_0)
    for kind, module in (
        ("LayerNorm", make_ops().LayerNorm(256)),
        ("GroupNorm", make_ops().GroupNorm(8, 256)),
        ("RMSNorm", make_ops().RMSNorm(256)),
    ):
        module.load_state_dict({"weight": weight, **({"bias": torch.zeros(256)} if module.bias is not None else {})})
        assert type(module.weight) is torch.nn.Parameter, kind
        assert torch.equal(module.weight.float(), values), kind
    module = make_ops().ConvTranspose2d(64, 32, 2)
    weight, values = quantized((64, 32, 2, 2), Q.Q8_0)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(32)})
    assert torch.equal(module.weight.float(), values)


def test_construction_allocates_no_weights():
    for make in (
        lambda: make_ops().Linear(100_000, 100_000, dtype=torch.float32),
        lambda: make_ops().Conv2d(30_000, 30_000, 3, dtype=torch.float32),
        lambda: make_ops().Embedding(10_000_000, 4_096, dtype=torch.float32),
    ):
        assert make().weight is None  # 40, 32 and 164 GB as floats


def test_a_quantized_bias_becomes_a_float_one():
    module = make_ops().Linear(512, 256, dtype=torch.float32)
    weight, _ = quantized((256, 512), Q.Q4_K)
    bias, values = quantized((256,), Q.Q8_0)
    module.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(module.bias, values)


def test_a_wrong_shape_is_an_error_and_a_missing_tensor_is_reported():
    module = make_ops().Linear(512, 128, dtype=torch.float32)
    weight, _ = quantized((256, 512), Q.Q4_K)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(256, 512\) in the file, \(128, 512\)"):
        module.load_state_dict({"weight": weight, "bias": torch.zeros(128)})
    result = module.load_state_dict({"bias": torch.zeros(128), "other": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert module.missing == {"weight"}
    with pytest.raises(RuntimeError, match="other"):
        module.load_state_dict(
            {"weight": quantized((128, 512), Q.Q4_K)[0], "bias": torch.zeros(128), "other": torch.zeros(1)}
        )


def test_loading_some_tensors_leaves_the_others_as_they_are():
    module, weight, _ = layer("Linear", 512, 96)
    module.load_state_dict({"bias": torch.ones(96)}, strict=False)
    assert module.missing == frozenset()
    x = torch.randn(3, 512)
    assert torch.equal(module(x), torch.nn.functional.linear(x, weight, torch.ones(96)))


@pytest.mark.parametrize("n_rows", [120, 136])
@pytest.mark.parametrize("kind", ["quantized", "float", "another model's state"])
def test_a_vocabulary_may_be_padded_to_another_length(kind, n_rows, inference_mode):
    weight, values = quantized((n_rows, 256), Q.Q6_K)
    if kind == "float":
        weight = values.to(torch.bfloat16)
        values = weight.float()
    elif kind != "quantized":
        other = make_ops().Embedding(n_rows, 256, dtype=torch.float32)
        other.load_state_dict({"weight": weight})
        weight = other.state_dict()["weight"]
    module = make_ops().Embedding(128, 256, dtype=torch.float32)
    module.load_state_dict({"weight": weight})
    assert is_quantized(module.weight) == (kind != "float")
    found = module(torch.arange(128), out_dtype=torch.float32)
    assert torch.equal(found[: min(n_rows, 128)], values[:128])
    assert found.shape == (128, 256)
    assert not found[n_rows:].any()


def test_a_padded_table_whose_rows_share_bytes_of_the_file_is_dequantized():
    """Rows of 64 weights, four to a row of the file."""
    data, values = quantized((30, 256), Q.Q4_K)
    module = make_ops().Embedding(128, 64, dtype=torch.float32)
    module.load_state_dict({"weight": wrap(data._qdata, Q.Q4_K, (120, 64), torch.float32)})
    found = module(torch.arange(128), out_dtype=torch.float32)
    assert torch.equal(found[:120], values.reshape(120, 64))
    assert not found[120:].any()


@pytest.mark.parametrize(("n_rows", "n_expected"), [(248, 77), (77, 248), (36, 32), (1200, 96), (40_000, 32_000)])
def test_a_table_of_quite_another_length_is_an_error(n_rows, n_expected):
    """CLIP for long prompts has 248 positions instead of 77, which no padding explains."""
    module = make_ops().Embedding(n_expected, 256, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"weight": torch.zeros(1).expand(n_rows, 256)})


def test_what_a_file_lacks_weighs_nothing_and_is_not_saved():
    module = make_ops().Linear(4096, 4096, dtype=torch.float32)
    module.load_state_dict({"bias": torch.zeros(4096)}, strict=False)
    assert set(module.state_dict()) == {"bias"}
    assert comfy.model_management.module_size(module) == 4096 * 4
    module.to(torch.bfloat16)
    assert tuple(module.weight.shape) == (4096, 4096)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.untyped_storage().nbytes() == 2
    module.load_state_dict({"weight": torch.ones(4096, 4096)}, strict=False)
    assert set(module.state_dict()) == {"weight", "bias"}


def test_a_large_matrix_is_multiplied_in_parts(monkeypatch):
    module, weight, bias = layer("Linear", 512, 96, qtype=Q.Q4_K)
    monkeypatch.setattr(product, "SLICE_BYTES", 40 * 512 * 4)
    for shape in ((3, 5, 512), (1, 512)):
        x = torch.randn(shape)
        assert torch.allclose(module(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    short = torch.randn(3, 512).to(torch.bfloat16)
    assert module(short).dtype == torch.bfloat16
    assert close(module(short), torch.nn.functional.linear(short.float(), weight, bias), 6e-3)


# dequant_dtype x compute dtype x activations: stated error against float64 arithmetic on the same weights and inputs.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.mark.parametrize("scale", [1.0, 3e3], ids=["ordinary activations", "inflated activations"])
@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dequant_dtype", [None, *DTYPES], ids=str)
def test_low_bit_weights_are_finite_and_right_in_every_dtype_on_a_cpu(dequant_dtype, compute_dtype, scale):
    options = OpsOptions(dequant_dtype=dequant_dtype)
    for qtype in (Q.Q2_K, Q.Q3_K, Q.IQ4_XS, Q.Q4_K, Q.Q8_0):
        module, weight, bias = layer("Linear", 512, 96, qtype=qtype, options=options)
        x = (torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * scale).to(compute_dtype)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert exact.abs().max() < 65504
        tolerance = max(TOLERANCE[compute_dtype], TOLERANCE.get(dequant_dtype, 0))
        assert close(module(x), exact, tolerance), (qtype.name, dequant_dtype, compute_dtype)


@pytest.mark.parametrize("kind", ["plain", "with LoRA, side path", "with LoRA, into the weight", "with a difference"])
def test_linear_compiles_without_graph_breaks(kind):
    from comfy.weight_adapter import LoRAAdapter

    torch._dynamo.reset()
    module, _, _ = layer("Linear", 256, 256)
    up, down = torch.randn(256, 4) * 0.1, torch.randn(4, 256) * 0.1
    patches = {
        "plain": [],
        "with a difference": [(1.0, ("diff", (torch.randn(256, 256),)), 1.0, None, None)],
    }.get(kind, [(1.0, LoRAAdapter(set(), (up, down, 4.0, None, None, None)), 1.0, None, None)])
    module._loaded_patch = PatchRef("weight", {"weight": patches}) if patches else None
    x = torch.randn(300 if "into" in kind else 7, 256)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), module(x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(compiled(x[:5]), module(x[:5]), rtol=1e-5, atol=1e-5)


def test_embedding_and_convolution_compile_without_graph_breaks():
    torch._dynamo.reset()
    for module, x in (
        (layer("Conv2d", 64, 32, 2, qtype=Q.Q8_0)[0], torch.randn(1, 64, 5, 5)),
        (layer("Embedding", 64, 256)[0], torch.arange(5)),
    ):
        with torch.no_grad():
            assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_weight_wrappers_of_the_host_run_last():
    module, weight, bias = layer("Linear", 256, 256)
    module.weight_function = [lambda w: w * 2]
    x = torch.randn(3, 256)
    assert torch.equal(module(x), torch.nn.functional.linear(x, weight * 2, bias))


# -- the weight as a tensor: what model code and the host may do with it --


def test_splitting_a_fused_weight_keeps_the_parts_quantized(inference_mode):
    weight, values = quantized((768, 512), Q.Q4_K)
    for parts, expected in (
        (weight.chunk(3), values.chunk(3)),
        (weight.split([256, 512]), values.split([256, 512])),
        ([weight[128:300]], [values[128:300]]),
        ([weight.narrow(0, 5, 7)], [values.narrow(0, 5, 7)]),
        ([torch.cat([weight, weight[:256]])], [torch.cat([values, values[:256]])]),
    ):
        for part, value in zip(parts, expected, strict=True):
            assert is_quantized(part)
            assert torch.equal(part.to(torch.float32).dequantize(), value)


def test_anything_else_sees_the_dequantized_values(inference_mode):
    weight, values = quantized((768, 512), Q.Q4_K)
    exact = weight.to(torch.float32)
    for result, expected in (
        (exact + 1, values + 1),
        (exact[:, 3:9], values[:, 3:9]),
        (exact.chunk(2, dim=1)[1], values.chunk(2, dim=1)[1]),
        (torch.cat([exact, values]), torch.cat([values, values])),
        (torch.nn.functional.linear(values[:4], exact), torch.nn.functional.linear(values[:4], values)),
        (exact[3], values[3]),
    ):
        assert not is_quantized(result)
        assert torch.equal(result, expected)


def test_casting_changes_the_claim_not_the_bytes(inference_mode):
    weight, _ = quantized((768, 512), Q.Q4_K)
    other = weight.to(torch.float16)
    assert other.dtype == torch.float16
    assert torch.equal(other._qdata, weight._qdata)
    assert weight.dtype == torch.bfloat16
    assert tuple(other.shape) == (768, 512)
    assert other.numel() == 768 * 512
    assert other.nbytes == weight._qdata.nbytes == np.prod(byte_shape(Q.Q4_K, (768, 512)))
    parameter = as_param(weight.to(torch.float16))
    assert isinstance(parameter, torch.nn.Parameter)
    assert not parameter.requires_grad
    clone = weight.clone()
    assert clone._qdata.data_ptr() != weight._qdata.data_ptr()
    assert torch.equal(clone._qdata, weight._qdata)


# -- the host's interfaces --


def test_overrides_accept_every_call_that_the_host_makes():
    """Each method of ours takes the host's parameters, by position and by name, in the host's order."""
    pairs = [(GGUFPatcher, comfy.model_patcher.ModelPatcher)]
    for name, cls in ops._QUANTIZED_LAYERS.items():
        theirs = getattr(comfy.ops.manual_cast, name, None) or getattr(comfy.ops.mixed_precision_ops({}), name, None)
        pairs += [(cls, theirs)] if theirs is not None else []
    checked = 0
    for ours, host in pairs:
        for name in {n for cls in ours.__mro__ if cls.__module__.startswith("gguf_kit") for n in vars(cls)}:
            theirs = getattr(host, name, None)
            if not inspect.isfunction(theirs) or name == "__init__":
                continue
            mine, wanted = (inspect.signature(f) for f in (getattr(ours, name), theirs))
            parameters = [p for p in wanted.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            takes_any = any(p.kind == p.VAR_KEYWORD for p in mine.parameters.values())
            assert takes_any or {p.name for p in parameters} <= set(mine.parameters), (ours.__name__, name)
            n_shared = sum(p.name in mine.parameters for p in parameters)
            assert [p.name for p in parameters][:n_shared] == list(mine.parameters)[:n_shared], (ours.__name__, name)
            checked += 1
    assert checked >= 20


def test_what_the_host_reads_from_ops_is_there():
    namespace = make_ops()
    assert issubclass(namespace, comfy.ops.manual_cast)
    assert namespace.conv_nd(2, 4, 4, 1).__class__.__name__ == "GGUFConv2d"
    first, second = make_ops(OpsOptions(patch_on_device=True)), make_ops()
    assert first.Linear is not second.Linear
    assert (first.Linear.options.patch_on_device, second.Linear.options.patch_on_device) == (True, False)
