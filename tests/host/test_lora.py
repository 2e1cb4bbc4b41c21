# SPDX-License-Identifier: Apache-2.0
"""Patches on quantized weights equal the host's own patches on the dequantized weights, whichever way they take."""

import comfy.hooks
import comfy.model_management
import pytest
import tiny
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter
from gguf_kit.host.compat import quantized_modules

EXACT = 1e-6  # float32


@pytest.fixture
def pair(tiny_flux):
    path = tiny_flux("Q4_K_S")
    return tiny.quantized_model(path), tiny.float_model(path)


@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
def test_plain_lora_equals_the_patched_float_model(pair, batch, inference_mode):
    """Both batch sizes matter: with few tokens the side path serves, with many the weight itself is patched."""
    quantized, dense = (tiny.with_patches(p, tiny.lora(1), tiny.lora(2, rank=8)) for p in pair)
    expected = tiny.run(dense, batch)
    assert tiny.relative(expected, tiny.run(pair[1], batch)) > 1e-2
    assert tiny.relative(tiny.run(quantized, batch), expected) < EXACT


@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
def test_lora_on_parts_of_a_fused_weight(pair, batch):
    quantized, dense = (tiny.with_patches(p, tiny.split_lora()) for p in pair)
    expected = tiny.run(dense, batch)
    assert tiny.relative(expected, tiny.run(pair[1], batch)) > 1e-3
    assert tiny.relative(tiny.run(quantized, batch), expected) < EXACT


def _adapters(kind):
    key, shape = tiny.block_key("double_blocks.1.img_mlp.0"), (1024, 256)
    generator = torch.Generator().manual_seed(3)

    def rand(*size):
        return torch.randn(*size, generator=generator) * 0.1

    if kind == "full difference":
        return {key: ("diff", (rand(*shape),))}
    if kind == "LoKr":
        return {key: LoKrAdapter(set(), (rand(4, 4), rand(256, 64), 1.0, None, None, None, None, None, None))}
    return {key: LoHaAdapter(set(), (rand(1024, 4), rand(4, 256), 1.0, rand(1024, 4), rand(4, 256), None, None, None))}


@pytest.mark.parametrize("kind", ["full difference", "LoKr", "LoHa"])
def test_other_adapters_go_through_the_host_exactly(pair, kind):
    quantized, dense = (tiny.with_patches(p, _adapters(kind), tiny.lora(4)) for p in pair)
    expected = tiny.run(dense)
    assert tiny.relative(expected, tiny.run(pair[1])) > 1e-3
    assert tiny.relative(tiny.run(quantized), expected) < EXACT


def test_dora_and_model_strength(pair):
    for options in ({"strength": 0.5}, {"strength_model": 0.7}):
        quantized, dense = (tiny.with_patches(p, tiny.lora(5, dora=True), **options) for p in pair)
        assert tiny.relative(tiny.run(quantized), tiny.run(dense)) < EXACT


def test_without_its_lora_the_model_is_exactly_itself_again(pair):
    quantized, _ = pair
    before = tiny.run(quantized)
    patched = tiny.run(tiny.with_patches(quantized, tiny.lora()))
    assert not torch.equal(patched, before)
    assert torch.equal(tiny.run(quantized), before)
    assert all(module._loaded_patch is None for _, module in quantized_modules(quantized.model))


def test_two_clones_with_different_loras_do_not_mix(pair):
    clones = [[tiny.with_patches(p, tiny.lora(seed)) for p in pair] for seed in (1, 2)]
    for _ in range(2):
        for quantized, dense in clones:
            assert tiny.relative(tiny.run(quantized), tiny.run(dense)) < EXACT


@pytest.mark.parametrize("patch_dtype", [None, "target", torch.float32, torch.bfloat16])
def test_patch_dtype_says_how_exactly_patches_are_computed(tiny_flux, patch_dtype):
    path = tiny_flux("Q8_0")
    quantized = tiny.with_patches(tiny.quantized_model(path, patch_dtype=patch_dtype), tiny.lora(), tiny.split_lora())
    dense = tiny.with_patches(tiny.float_model(path), tiny.lora(), tiny.split_lora())
    error = tiny.relative(tiny.run(quantized), tiny.run(dense))
    assert error < (2e-2 if patch_dtype == torch.bfloat16 else EXACT)
    assert error > 1e-5 or patch_dtype != torch.bfloat16


def test_patch_on_device_keeps_the_factors_until_the_patches_change(tiny_flux):
    path = tiny_flux("Q8_0")
    base, dense = tiny.quantized_model(path, patch_on_device=True), tiny.float_model(path)
    for seed in (1, 2, 1):
        quantized = tiny.with_patches(base, tiny.lora(seed))
        for _ in range(2):
            assert tiny.relative(tiny.run(quantized), tiny.run(tiny.with_patches(dense, tiny.lora(seed)))) < EXACT
        refs = [m._loaded_patch for _, m in quantized_modules(base.model) if m._loaded_patch]
        assert len([ref for ref in refs if ref._gguf_factors.factors]) == 5


def _partial(patcher, n_bytes):
    """Load so many bytes of the model, as the host does when the device is too small."""
    patcher.model.to(patcher.offload_device)
    patcher.patch_model(tiny.CPU, lowvram_model_memory=n_bytes)
    return patcher


def test_partial_load_keeps_lora_and_results(pair, inference_mode):
    quantized, dense = (tiny.with_patches(p, tiny.lora()) for p in pair)
    expected, plain = tiny.run(dense), tiny.run(pair[0])
    comfy.model_management.unload_all_models()
    size = quantized.model_size()
    _partial(quantized, size * 0.7)
    assert quantized.model.model_lowvram
    assert 0 < quantized.loaded_size() < size
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT
    quantized.detach()
    assert torch.equal(tiny.run(pair[0]), plain)


def test_full_load_then_partial_unload_then_full_load(pair):
    quantized, dense = (tiny.with_patches(p, tiny.lora(), tiny.split_lora()) for p in pair)
    expected, plain = tiny.run(dense), tiny.run(pair[0])
    assert tiny.relative(tiny.run(quantized), expected) < EXACT
    freed = quantized.partially_unload(tiny.CPU, quantized.model_size() // 2)
    assert freed > quantized.model_size() // 4
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT
    quantized.partially_load(tiny.CPU, extra_memory=1e12)
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT
    quantized.detach()
    assert all(m._loaded_patch is None and m.weight_function == [] for _, m in quantized_modules(quantized.model))
    assert torch.equal(tiny.run(pair[0]), plain)


def test_partial_load_budget_counts_the_dequantized_weight(pair):
    quantized, _ = pair
    entries = {entry[2]: entry for entry in quantized._load_list()}
    offload_bytes, module_bytes, *_ = entries["diffusion_model.double_blocks.0.img_mlp.0"]
    assert module_bytes == 1024 * (256 // 256 * 144) + 1024 * 4
    assert offload_bytes == module_bytes + 1024 * 256 * 4


@pytest.mark.parametrize("mode", ["MaxSpeed", "MinVram"])
def test_weight_hooks_come_and_go(pair, mode):
    outputs = []
    for patcher in pair:
        clone = tiny.with_patches(patcher, tiny.lora(1))
        clone.hook_mode = comfy.hooks.EnumHookMode[mode]
        hook = comfy.hooks.WeightHook()
        group = comfy.hooks.HookGroup()
        group.add(hook)
        added = clone.add_hook_patches(hook, tiny.lora(2), 0.6)
        assert len(added) == len(tiny.LORA_SHAPES)
        comfy.model_management.load_models_gpu([clone])
        results = []
        for hooks in (None, group, None, group, group, None):
            clone.patch_hooks(hooks)
            results.append(tiny.run(clone, load=False))
        clone.clean_hooks()
        outputs.append(results)
    for quantized, dense in zip(*outputs, strict=True):
        assert tiny.relative(quantized, dense) < EXACT
    off, on = outputs[0][0], outputs[0][1]
    assert tiny.relative(on, off) > 1e-2
    assert torch.equal(outputs[0][2], off)
    assert torch.equal(outputs[0][5], off)


def test_model_merge_of_two_quantized_models(tiny_flux):
    """ModelMergeSimple: 0.5 of one model, 0.5 of another."""
    merged = []
    for load in (tiny.quantized_model, tiny.float_model):
        first, second = load(tiny_flux("Q4_K_S")).clone(), load(tiny_flux("Q2_K"))
        for key, patch in second.get_key_patches("diffusion_model.").items():
            first.add_patches({key: patch}, 0.5, 0.5)
        merged.append(tiny.run(first))
    assert tiny.relative(*merged) < EXACT


def test_a_lora_reaches_every_key_it_names_through_the_host_key_map(pair):
    import comfy.lora

    maps = [comfy.lora.model_lora_keys_unet(p.model, {}) for p in pair]
    assert maps[0] == maps[1]
    assert "lora_unet_double_blocks_0_img_attn_qkv" in maps[0]


def test_a_clone_is_ours_too(pair):
    clone = pair[0].clone()
    assert type(clone) is type(pair[0])
    assert clone.model is pair[0].model
