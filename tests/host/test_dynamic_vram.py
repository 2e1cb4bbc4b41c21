# SPDX-License-Identifier: Apache-2.0
"""Under dynamic VRAM, newer hosts' normal GPU path, results are those of the classic path."""

import comfy.model_patcher
import pytest
import tiny
import torch
from gguf_kit.host import kept_factors
from gguf_kit.host.compat import is_quantized, quantized_modules

DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
pytestmark = pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
EXACT = 1e-6


@pytest.fixture
def vbar(monkeypatch):
    import fake_vram

    return fake_vram.install(monkeypatch)


@pytest.fixture
def pair(tiny_flux):
    """The dequantized reference is loaded before dynamic VRAM is switched on."""
    return tiny.float_model(tiny_flux("Q4_K_S")), tiny_flux("Q4_K_S")


def load(patcher):
    patcher.partially_load(patcher.load_device)


def run(patcher, batch=2):
    return tiny.run(patcher, batch, load=False)


def expected(dense, *patch_sets, batch=2, **options):
    return tiny.run(tiny.with_patches(dense, *patch_sets, **options), batch)


def test_the_model_is_staged_as_bytes(pair, vbar):
    dense, path = pair
    reference = expected(dense)
    patcher = tiny.quantized_model(path)
    assert type(patcher).__name__ == "ModelPatcherDynamic"
    load(patcher)
    assert torch.equal(run(patcher), reference)
    staged = {name: module for name, module in quantized_modules(patcher.model) if hasattr(module, "_v")}
    assert len(staged) == 32
    for module in staged.values():
        assert module._v[2] < module.weight._qdata.nbytes + 2048 + (0 if module.bias is None else module.bias.nbytes)
        assert is_quantized(module._v_weight)
        assert torch.equal(module._v_weight._qdata, module.weight._qdata)


@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
def test_lora_is_applied_and_never_written_back(pair, vbar, resident, batch):
    dense, path = pair
    reference = expected(dense, tiny.lora(), batch=batch)
    vbar.resident = resident
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    load(patcher)
    for _ in range(2):
        assert tiny.relative(run(patcher, batch), reference) < EXACT
    for _, module in quantized_modules(patcher.model):
        if resident and hasattr(module, "_v_weight"):
            assert torch.equal(module._v_weight._qdata, module.weight._qdata)


def test_loras_change_between_prompts_and_after_eviction(pair, vbar):
    dense, path = pair
    plain, first, second = (
        expected(dense),
        expected(dense, tiny.lora(1)),
        expected(dense, tiny.lora(2), tiny.split_lora()),
    )
    base = tiny.quantized_model(path)
    one = tiny.with_patches(base, tiny.lora(1))
    two = tiny.with_patches(base, tiny.lora(2), tiny.split_lora())
    for patcher, reference in ((base, plain), (one, first), (two, second), (base, plain), (one, first)):
        load(patcher)
        assert tiny.relative(run(patcher), reference) < EXACT
        vbar.evict()
        assert tiny.relative(run(patcher), reference) < EXACT


def test_kept_factors_are_freed_when_the_model_is_detached(pair, vbar):
    dense, path = pair
    reference = expected(dense, tiny.lora())
    patcher = tiny.with_patches(tiny.quantized_model(path, patch_on_device=True), tiny.lora())
    load(patcher)
    assert tiny.relative(run(patcher), reference) < EXACT
    refs = [module.base_patch() for _, module in quantized_modules(patcher.model) if module.base_patch()]
    assert all(hasattr(ref, "_gguf_factors") for ref in refs)
    patcher.detach()
    assert len(refs) == 5
    assert not any(hasattr(ref, "_gguf_factors") for ref in refs)


def kept(patcher):
    sets = [vars(m.base_patch() or m).get("_gguf_factors") for _, m in quantized_modules(patcher.model)]
    return [s for s in sets if s is not None]


@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
def test_four_loras_on_whole_and_split_weights(pair, vbar, resident, batch):
    dense, path = pair
    loras = tiny.lora(1), tiny.lora(2, rank=8), tiny.lora(3), tiny.split_lora()
    reference = expected(dense, *loras, batch=batch)
    vbar.resident = resident
    patcher = tiny.with_patches(tiny.quantized_model(path), *loras)
    load(patcher)
    assert tiny.relative(run(patcher, batch), reference) < EXACT
    vbar.evict()
    assert tiny.relative(run(patcher, batch), reference) < EXACT


def test_factors_outlast_loads_with_the_same_patches_and_no_others(pair, vbar):
    """This host makes all its patches anew for each run."""
    dense, path = pair
    first, second = expected(dense, tiny.lora(1)), expected(dense, tiny.lora(2), tiny.lora(1), strength=0.3)
    base = tiny.quantized_model(path)
    patcher = tiny.with_patches(base, tiny.lora(1))
    load(patcher)
    run(patcher)
    made = kept(patcher)
    used = kept_factors.BUDGET.used(tiny.CPU)
    for same in (patcher, patcher.clone()):
        load(same)
        assert len(made) == 5
        assert all(a is b for a, b in zip(kept(same), made, strict=True))
        assert tiny.relative(run(same), first) < EXACT
    other = tiny.with_patches(base, tiny.lora(2), tiny.lora(1), strength=0.3)
    load(other)
    assert not {*map(id, kept(other))} & {*map(id, made)}
    del made
    assert tiny.relative(run(other), second) < EXACT
    assert kept_factors.BUDGET.used(tiny.CPU) == 2 * used
    load(base)
    assert kept(base) == []
    assert kept_factors.BUDGET.used(tiny.CPU) == 0


def test_dora_goes_through_the_host(pair, vbar):
    dense, path = pair
    reference = expected(dense, tiny.lora(dora=True), strength=0.5)
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora(dora=True), strength=0.5)
    load(patcher)
    assert tiny.relative(run(patcher), reference) < EXACT


def test_hooks_get_a_classic_copy_of_the_model(pair, vbar):
    dense, path = pair
    reference = expected(dense, tiny.lora())
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    delegate = patcher.get_non_dynamic_delegate()
    assert type(delegate).__name__ == "GGUFPatcher"
    assert delegate.model is not patcher.model
    delegate.patch_model(tiny.CPU)
    assert tiny.relative(run(delegate), reference) < EXACT


def test_saving_gives_float_weights_with_the_lora_merged(pair, vbar, tmp_path):
    dense, path = pair
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    load(patcher)
    saved = patcher.state_dict_for_saving()
    key = tiny.block_key("double_blocks.1.img_mlp.0")
    merged = tiny.with_patches(dense, tiny.lora()).patch_weight_to_device(key, tiny.CPU, return_weight=True)
    assert tiny.relative(saved[f"model.{key}"].to("cpu"), merged) < EXACT
