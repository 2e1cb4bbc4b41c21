# SPDX-License-Identifier: Apache-2.0
"""Weights that stay dequantized: results are those without, to the bit, and the host knows what they take."""

import copy
import functools

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf_kit.host import compat, product
from gguf_kit.host.compat import quantized_modules, wrap
from gguf_kit.host.kept_weights import KeptWeights, work_per_weight
from gguf_kit.layouts import LAYOUTS
from gguf_kit.ops import OpsOptions, make_ops
from gguf_kit.service import load_model
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
ALL = 1 << 40  # bytes: more than the tiny Flux has
DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")


def keeping(path, keep_bytes=ALL, dtype=None, **options):
    """The tiny Flux with a budget, not yet loaded by the host."""
    return load_model(str(path), OpsOptions(**options), dtype=dtype, keep_bytes=keep_bytes)


def kept(patcher):
    """Name -> kept weight of all layers that keep one."""
    found = {name: module._kept for name, module in quantized_modules(patcher.model)}
    return {name: weight for name, weight in found.items() if weight is not None}


def kept_bytes(patcher):
    return sum(weight.nbytes for weight in kept(patcher).values())


def count_dequantizations(monkeypatch):
    """A list that grows with every weight that is dequantized whole."""
    seen = []
    for module, name in (compat, "dequantize_rows"), (product, "dequantize_rows"), (product, "dequantize_into"):
        function = getattr(module, name)
        spy = functools.partial(lambda f, rows, *a: seen.append(rows.shape) or f(rows, *a), function)
        monkeypatch.setattr(module, name, spy)
    return seen


def small_model(**layers):
    """A model of Linears (in, out, qtype); the weights are random."""
    model = torch.nn.Module()
    for name, (n_in, n_out, qtype) in layers.items():
        rows = np.random.default_rng(0).standard_normal((n_out, n_in)).astype(np.float32)
        module = make_ops().Linear(n_in, n_out, dtype=torch.float32)
        weight = wrap(torch.from_numpy(quantize_with_ggml(rows, qtype)), qtype, (n_out, n_in))
        module.load_state_dict({"weight": weight, "bias": torch.zeros(n_out)})
        setattr(model, name, module)
    return model


# -- which layers --


def test_types_with_more_work_come_first_then_small_layers_then_names():
    layers = {
        "fast": (256, 64, Q.Q8_0),
        "b_slow": (256, 64, Q.Q5_K),
        "a_slow": (256, 64, Q.Q5_K),
        "slow_and_small": (256, 32, Q.Q5_K),
    }
    model = small_model(**layers)
    order, previous = [], set()
    for n_bytes in range(0, 4 * 256 * 256, 256 * 32 * 4):
        weights = KeptWeights(model, n_bytes)
        weights.fill(tiny.CPU, torch.float32, n_bytes)
        now = {name for name in layers if getattr(model, name)._kept is not None}
        assert weights.size() == weights.planned(torch.float32) <= n_bytes
        order += sorted(now - previous)
        previous = now
    assert order == ["slow_and_small", "a_slow", "b_slow", "fast"]


def test_a_layer_that_does_not_fit_leaves_its_place_to_one_that_does():
    model = small_model(large=(256, 512, Q.Q5_K), small=(256, 32, Q.Q8_0))
    weights = KeptWeights(model, 256 * 32 * 4)
    weights.fill(tiny.CPU, torch.float32, ALL)
    assert model.large._kept is None
    assert model.small._kept is not None


def test_every_type_has_its_work():
    work = {qtype.name: work_per_weight(layout) for qtype, layout in LAYOUTS.items()}
    assert min(work, key=work.get) in ("F16", "F32", "BF16")
    assert work["Q8_0"] < work["Q4_K"] < work["Q5_K"]
    assert work["Q8_0"] < work["Q5_0"]
    assert all(work[name] > work["Q8_0"] for name in work if name.startswith("IQ"))


# -- equal results, without the work --


@pytest.mark.parametrize("type_name", tiny.TYPES)
def test_results_are_equal_to_the_bit(tiny_flux, type_name, inference_mode, monkeypatch):
    expected = tiny.run(tiny.quantized_model(tiny_flux(type_name)))
    patcher = keeping(tiny_flux(type_name))
    assert torch.equal(tiny.run(patcher), expected)
    assert len(kept(patcher)) == len(list(quantized_modules(patcher.model))) > 30
    seen = count_dequantizations(monkeypatch)
    assert torch.equal(tiny.run(patcher), expected)
    assert not seen


def test_a_budget_keeps_so_much_and_no_more(tiny_flux, monkeypatch):
    path, budget = tiny_flux("Q4_K_S"), 3 << 20
    expected = tiny.run(tiny.quantized_model(path))
    patcher = keeping(path, budget)
    assert not kept(patcher)  # nothing before the host has loaded the model
    assert torch.equal(tiny.run(patcher), expected)
    assert 0.75 * budget < kept_bytes(patcher) <= budget
    seen, n_modules = count_dequantizations(monkeypatch), len(list(quantized_modules(patcher.model)))
    tiny.run(patcher)
    assert len(seen) == n_modules - len(kept(patcher))


def load_with_room(patcher, monkeypatch, room):
    """Load all of the model where so many bytes are free."""
    free = comfy.model_management.minimum_inference_memory() + room
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_free_memory", lambda *args, **options: free)
        patcher.load(tiny.CPU, full_load=True)


def test_a_full_load_keeps_no_more_than_there_is_room_for(tiny_flux, monkeypatch):
    patcher = keeping(tiny_flux("Q4_K_S"))
    planned = patcher.model_size()
    load_with_room(patcher, monkeypatch, 1 << 20)
    assert 0 < kept_bytes(patcher) <= 1 << 20
    # What found no room is not asked of the host again: it would unload other models for it.
    assert patcher.model_size() == patcher.loaded_size() == patcher.bytes_size() + kept_bytes(patcher)
    assert patcher.model_size() < planned
    patcher.detach()
    assert patcher.model_size() == planned


def test_a_lack_of_memory_for_kept_weights_does_not_end_the_load(tiny_flux, monkeypatch, caplog):
    def fill(*args):
        raise torch.cuda.OutOfMemoryError("no room")

    expected = tiny.run(tiny.quantized_model(tiny_flux("Q4_K_S")))
    patcher = keeping(tiny_flux("Q4_K_S"))
    monkeypatch.setattr(KeptWeights, "fill", fill)
    assert torch.equal(tiny.run(patcher), expected)
    assert not kept(patcher)
    assert "No memory to keep weights dequantized on cpu" in caplog.text


@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_patches_are_added_and_never_written_into_a_kept_weight(tiny_flux, batch, dora):
    path, strength = tiny_flux("Q4_K_S"), 0.5
    expected = tiny.run(tiny.with_patches(tiny.quantized_model(path), tiny.lora(dora=dora), strength=strength), batch)
    base = keeping(path)
    plain = tiny.run(base, batch)
    before = {name: weight.clone() for name, weight in kept(base).items()}
    patched = tiny.with_patches(base, tiny.lora(dora=dora), strength=strength)
    assert torch.equal(tiny.run(patched, batch), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in kept(patched).items())
    assert torch.equal(tiny.run(base, batch), plain)


def test_a_wrapper_of_the_host_may_write_into_the_weight_that_it_gets():
    model = small_model(layer=(256, 64, Q.Q4_K))
    x = torch.randn(3, 256)
    expected = model.layer(x) * 2
    KeptWeights(model, ALL).fill(tiny.CPU, torch.float32, ALL)
    model.layer.weight_function = [lambda weight: weight.mul_(2)]
    for _ in range(2):
        assert torch.allclose(model.layer(x), expected, rtol=1e-6, atol=1e-6)


def test_inputs_of_another_dtype_do_not_get_the_kept_weight():
    model = small_model(layer=(256, 64, Q.Q4_K))
    x = torch.randn(3, 256)
    expected = {dtype: model.layer(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    KeptWeights(model, ALL).fill(tiny.CPU, torch.bfloat16, ALL)
    assert model.layer._kept.dtype == torch.bfloat16
    for dtype, result in expected.items():
        assert torch.equal(model.layer(x.to(dtype)), result)


def test_convolutions_keep_theirs(monkeypatch):
    module = make_ops().Conv2d(64, 32, 2, dtype=torch.float32)
    data = quantize_with_ggml(np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32), Q.Q8_0)
    module.load_state_dict({"weight": wrap(torch.from_numpy(data), Q.Q8_0, (32, 64, 2, 2)), "bias": torch.zeros(32)})
    x = torch.randn(1, 64, 5, 5)
    expected = module(x)
    module.keep(tiny.CPU, torch.float32)
    seen = count_dequantizations(monkeypatch)
    assert torch.equal(module(x), expected)
    assert not seen


def test_gradients_of_the_input_flow_through_a_weight_that_a_node_kept():
    model = small_model(layer=(256, 64, Q.Q4_K))
    with torch.inference_mode():
        KeptWeights(model, ALL).fill(tiny.CPU, torch.float32, ALL)
    x = torch.randn(3, 256, requires_grad=True)
    model.layer(x).sum().backward()
    assert torch.allclose(x.grad, model.layer._kept.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with LoRA"])
def test_a_layer_compiles_without_graph_breaks_and_follows_what_is_kept(with_lora):
    from comfy.weight_adapter import LoRAAdapter
    from gguf_kit.host.lora import PatchRef

    torch._dynamo.reset()
    model = small_model(layer=(256, 64, Q.Q4_K))
    if with_lora:
        factors = torch.randn(64, 4) * 0.1, torch.randn(4, 256) * 0.1
        patches = {"weight": [(1.0, LoRAAdapter(set(), (*factors, 4.0, None, None, None)), 1.0, None, None)]}
        model.layer._loaded_patch = PatchRef("weight", patches)
    compiled = torch.compile(model.layer, backend="aot_eager", fullgraph=True)
    weights, x = KeptWeights(model, ALL), torch.randn(3, 256)
    with torch.no_grad():
        expected = model.layer(x)
        assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-5)
        weights.fill(tiny.CPU, torch.float32, ALL)
        assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-5)
        model.layer._kept.zero_()  # what is kept is what is used
        assert not torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-5)
        weights.release(ALL)
        assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-5)


# -- memory --


def test_the_host_counts_them_as_part_of_the_model(tiny_flux):
    path = tiny_flux("Q4_K_S")
    bytes_alone, budget = tiny.quantized_model(path).model_size(), 3 << 20
    patcher = keeping(path, budget)
    planned = patcher.model_size() - bytes_alone
    assert 0.75 * budget < planned <= budget
    for clone in (patcher.clone(), patcher.clone().clone()):
        assert clone.model_size() == patcher.model_size()
    tiny.run(patcher)
    assert patcher.loaded_size() == patcher.model_size()
    assert kept_bytes(patcher) == planned


def test_they_take_what_the_whole_model_leaves_free(tiny_flux):
    path = tiny_flux("Q4_K_S")
    plain = tiny.quantized_model(path)
    expected = tiny.run(plain)
    patcher = keeping(path)
    bytes_alone, room = plain.model_size(), 12 << 20
    patcher.partially_load(tiny.CPU, extra_memory=bytes_alone + room)
    assert not patcher.model.model_lowvram
    assert 0.8 * room < kept_bytes(patcher) <= room
    assert 0.99 * bytes_alone < patcher.loaded_size() - kept_bytes(patcher) <= bytes_alone
    assert torch.equal(tiny.run(patcher, load=False), expected)


def test_nothing_is_kept_while_a_part_of_the_model_is_offloaded(tiny_flux):
    path = tiny_flux("Q4_K_S")
    expected = tiny.run(tiny.quantized_model(path))
    patcher = keeping(path)
    patcher.partially_load(tiny.CPU, extra_memory=tiny.quantized_model(path).model_size() * 0.9)
    assert patcher.model.model_lowvram
    assert not kept(patcher)
    assert torch.equal(tiny.run(patcher, load=False), expected)


def test_they_go_first_when_the_host_needs_memory(tiny_flux):
    patcher = keeping(tiny_flux("Q4_K_S"))
    expected, before = tiny.run(patcher), kept_bytes(patcher)
    loaded = patcher.loaded_size()
    freed = patcher.partially_unload(tiny.CPU, 1 << 20)
    assert freed >= 1 << 20
    assert kept_bytes(patcher) == before - freed > 0
    assert patcher.loaded_size() == loaded - freed
    assert not patcher.model.model_lowvram
    assert torch.equal(tiny.run(patcher), expected)
    assert kept_bytes(patcher) == before - freed  # they do not come back while the model stays loaded
    more = patcher.partially_unload(tiny.CPU, patcher.loaded_size() * 0.95)
    assert not kept(patcher)
    assert patcher.model.model_lowvram
    assert patcher.loaded_size() == loaded - freed - more
    assert torch.equal(tiny.run(patcher, load=False), expected)


def test_unloading_frees_them_and_loading_makes_them_again(tiny_flux):
    patcher = keeping(tiny_flux("Q4_K_S"))
    expected, before = tiny.run(patcher), kept_bytes(patcher)
    patcher.detach(unpatch_all=False)  # a clone takes over
    assert kept_bytes(patcher) == before
    patcher.detach()
    assert not kept(patcher)
    patcher.partially_load(tiny.CPU, extra_memory=ALL)
    assert kept_bytes(patcher) == before
    assert torch.equal(tiny.run(patcher, load=False), expected)


def test_another_device_drops_them(tiny_flux):
    patcher = keeping(tiny_flux("Q4_K_S"))
    tiny.run(patcher)
    patcher.model.to("cpu")
    assert kept(patcher)
    patcher.model.to("meta")
    assert not kept(patcher)


def test_another_compute_dtype_makes_them_again(tiny_flux):
    patcher = keeping(tiny_flux("Q4_K_S"))
    tiny.run(patcher)
    clone = patcher.clone()
    clone.set_model_compute_dtype(torch.bfloat16)
    assert tiny.run(clone).isfinite().all()
    assert {weight.dtype for weight in kept(clone).values()} == {torch.bfloat16}


def test_two_loaded_models_and_their_copies_are_independent(tiny_flux):
    path = tiny_flux("Q4_K_S")
    keeper, plain = keeping(path), tiny.quantized_model(path)
    assert torch.equal(tiny.run(keeper), tiny.run(plain))
    assert kept(keeper)
    assert not kept(plain)
    layer = keeper.model.diffusion_model.double_blocks[0].img_mod.lin
    assert copy.deepcopy(layer)._kept is None
    assert layer._kept is not None


def test_other_weights_in_the_layer_end_what_was_kept():
    model, other = (small_model(layer=(256, 64, qtype)) for qtype in (Q.Q4_K, Q.Q2_K))
    x = torch.randn(3, 256)
    KeptWeights(model, ALL).fill(tiny.CPU, torch.float32, ALL)
    state = {"weight": other.layer.weight, "bias": torch.zeros(64)}
    model.layer.load_state_dict(state)
    assert torch.equal(model.layer(x), other.layer(x))


def test_what_is_saved_are_the_bytes(tiny_flux):
    patcher = keeping(tiny_flux("Q4_K_S"))
    expected = {key: value.nbytes for key, value in patcher.model.state_dict().items()}
    tiny.run(patcher)
    assert {key: value.nbytes for key, value in patcher.model.state_dict().items()} == expected


# -- dynamic VRAM --


@pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
def test_dynamic_vram_reserves_room_for_them_until_they_are_there(tiny_flux, monkeypatch):
    import fake_vram

    path, budget = tiny_flux("Q4_K_S"), 3 << 20
    expected = tiny.run(tiny.float_model(path))
    fake_vram.install(monkeypatch)
    plain, patcher = tiny.quantized_model(path), keeping(path, budget)
    assert type(patcher).__name__ == "ModelPatcherDynamic"
    shape = [1, 16, 16, 16]
    planned = patcher.model.memory_required(shape) - plain.model.memory_required(shape)
    assert 0.75 * budget < planned <= budget
    for _ in range(2):
        patcher.partially_load(patcher.load_device)
        assert kept_bytes(patcher) == planned
        assert patcher.model.memory_required(shape) == plain.model.memory_required(shape)
        assert torch.equal(tiny.run(patcher, load=False), expected)
    patcher.detach()
    assert not kept(patcher)


@pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
@pytest.mark.parametrize("resident", [True, False], ids=["bytes are in VRAM", "bytes are yet to come"])
def test_dynamic_vram_keeps_none_where_the_model_alone_fills_the_memory(tiny_flux, monkeypatch, resident):
    import comfy.model_management
    import fake_vram

    vbar, patcher = fake_vram.install(monkeypatch), keeping(tiny_flux("Q4_K_S"))
    free = comfy.model_management.minimum_inference_memory()
    if not resident:
        monkeypatch.setattr(vbar, "loaded_size", lambda self: 0)
        free += patcher.model_size()
    for room in (0, 3 << 20):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, room=room: free + room)
        patcher.partially_load(patcher.load_device)
        forced = 0 if resident else patcher.model.model_loaded_weight_memory  # small ones, which the host loads at once
        assert 0.75 * room <= kept_bytes(patcher) <= room + forced
