# SPDX-License-Identifier: Apache-2.0
"""LoRA factors are made once for a patch set, stay within their budget, are never stale, and go with their patches."""

import collections
import gc
import weakref

import comfy.hooks
import comfy.model_management
import pytest
import tiny
import torch
from gguf_kit.host import kept_factors
from gguf_kit.host.compat import quantized_modules
from gguf_kit.host.kept_factors import BUDGET
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 1e-6
N_LAYERS = 5  # of tiny.lora() that are quantized


@pytest.fixture
def pair(tiny_flux):
    path = tiny_flux("Q4_K_S")
    return tiny.quantized_model(path), tiny.float_model(path)


@pytest.fixture(autouse=True)
def nothing_kept_before():
    """Models of other tests are gone, so that what is used is what this test keeps."""
    comfy.model_management.unload_all_models()
    gc.collect()
    assert BUDGET.used(tiny.CPU) == 0


def refs(patcher):
    """What refers to patches in each layer that has some."""
    modules = [m for _, m in quantized_modules(patcher.model)]
    return [ref for m in modules for ref in (m.base_patch(), m._hook_patch) if ref is not None]


def kept(patcher):
    """The sets of factors that are kept now."""
    sets = [vars(ref).get("_gguf_factors") for ref in refs(patcher)]
    return [s for s in sets if s is not None and s.factors]


def n_bytes(sets):
    return sum(t.nbytes for s in sets for f in s.factors for t in (f.down, *(part.up for part in f.parts)))


def agrees(quantized, dense, **options):
    return tiny.relative(tiny.run(quantized, **options), tiny.run(dense, **options)) < EXACT


class _Operations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def operations(patcher, batch):
    with torch.no_grad(), _Operations() as operations:
        tiny.run(patcher, batch, load=False)
    return operations.count


@pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])
def test_a_step_with_four_loras_only_multiplies(pair, batch):
    """No copy, no conversion and no constant: a captured graph may hold it. One pair of products for all four."""
    base = pair[0]
    comfy.model_management.load_models_gpu([base])
    without = operations(base, batch)
    patched = tiny.with_patches(base, *(tiny.lora(seed) for seed in range(4)))
    comfy.model_management.load_models_gpu([patched])
    added = operations(patched, batch) - without
    made = {"_to_copy", "copy_", "clone", "cat", "empty", "full", "lift_fresh", "mul", "add", "add_"}
    assert not made & {*added}
    products = sum(n for name, n in added.items() if name in ("mm", "addmm", "addmm_"))
    assert N_LAYERS <= products <= 2 * N_LAYERS


def test_loading_a_model_makes_its_factors(pair):
    patched = tiny.with_patches(pair[0], tiny.lora(1), tiny.lora(2, rank=8))
    comfy.model_management.load_models_gpu([patched])
    made = kept(patched)
    assert len(made) == N_LAYERS
    assert {f.down.shape[0] for s in made for f in s.factors} == {12}
    assert BUDGET.used(tiny.CPU) == n_bytes(made)
    tiny.run(patched, load=False)
    assert all(a is b for a, b in zip(kept(patched), made, strict=True))


def test_the_budget_is_a_part_of_the_memory_of_the_device():
    total = comfy.model_management.get_total_memory(tiny.CPU)
    assert kept_factors.budget_bytes(tiny.CPU) == total // kept_factors.BUDGET_PART


def test_the_host_leaves_room_for_factors_until_they_are_made(pair, monkeypatch):
    """Of the clone with most of them, and within the budget."""
    shape = [2, 16, 16, 16]
    plain = pair[0].model.memory_required(shape)
    one = tiny.with_patches(pair[0], tiny.lora(1))
    two = tiny.with_patches(one, tiny.lora(2))
    room = pair[0].model.memory_required(shape) - plain
    tiny.run(two)
    made = BUDGET.used(tiny.CPU)
    assert made < room < 1.1 * made  # one layer of the LoRA is a float layer, to which the host adds it
    assert pair[0].model.memory_required(shape) == plain
    comfy.model_management.unload_all_models()
    assert pair[0].model.memory_required(shape) - plain == room
    monkeypatch.setattr(kept_factors, "budget_bytes", lambda device: 1000)
    assert pair[0].model.memory_required(shape) - plain == 1000
    del two
    gc.collect()
    monkeypatch.undo()
    assert pair[0].model.memory_required(shape) - plain == room / 2
    del one
    gc.collect()
    assert pair[0].model.memory_required(shape) == plain


@pytest.mark.parametrize("room", [0, 60_000, 10**9])
def test_what_does_not_fit_the_budget_is_made_in_each_forward(pair, monkeypatch, room):
    monkeypatch.setattr(kept_factors, "budget_bytes", lambda device: room)
    quantized, dense = (tiny.with_patches(p, tiny.lora(1), tiny.lora(2)) for p in pair)
    assert agrees(quantized, dense)
    assert agrees(quantized, dense, batch=16)
    assert BUDGET.used(tiny.CPU) == n_bytes(kept(quantized)) <= room
    n_kept = len(kept(quantized))
    assert n_kept == {0: 0, 10**9: N_LAYERS}.get(room, n_kept)
    assert room != 60_000 or 0 < n_kept < N_LAYERS


def test_patch_on_device_keeps_all_without_a_budget(tiny_flux, monkeypatch):
    monkeypatch.setattr(kept_factors, "budget_bytes", lambda device: 0)
    patched = tiny.with_patches(tiny.quantized_model(tiny_flux("Q8_0"), patch_on_device=True), tiny.lora())
    tiny.run(patched)
    assert len(kept(patched)) == N_LAYERS


def test_loras_swapped_and_strengths_changed_between_prompts(pair):
    """Each prompt has a clone of the model with its own patches, as the host's nodes make it."""
    used = set()
    for seed, strength in ((1, 0.8), (1, 0.3), (2, 0.8), (2, -0.5), (1, 0.8)):
        quantized, dense = (tiny.with_patches(p, tiny.lora(seed), strength=strength) for p in pair)
        assert agrees(quantized, dense)
        used.add(BUDGET.used(tiny.CPU))
    assert len(used) == 1
    assert agrees(*pair)
    assert BUDGET.used(tiny.CPU) == 0


def test_clones_with_different_loras_take_turns(pair):
    clones = [[tiny.with_patches(p, tiny.lora(seed), *more) for p in pair] for seed, more in ((1, ()), (2, ()))]
    used = set()
    for _ in range(3):
        for quantized, dense in clones:
            assert agrees(quantized, dense)
            used.add(BUDGET.used(tiny.CPU))
    assert len(used) == 1


def test_a_clone_with_the_same_patches_goes_on_with_the_same_factors(pair):
    patched = tiny.with_patches(pair[0], tiny.lora())
    tiny.run(patched)
    made = kept(patched)
    clone = patched.clone()
    tiny.run(clone)
    assert len(made) == N_LAYERS
    assert all(a is b for a, b in zip(kept(clone), made, strict=True))


def test_patches_added_to_a_loaded_model_are_seen(pair):
    quantized, dense = (tiny.with_patches(p, tiny.lora(1)) for p in pair)
    assert agrees(quantized, dense)
    more = {key: adapter for key, adapter in tiny.lora(2).items() if "img_in" not in key}
    for patcher in (quantized, dense):
        patcher.add_patches(more, 0.7)
    expected = tiny.run(dense)
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT  # the host's lists grew in place
    assert tiny.relative(tiny.run(quantized), expected) < EXACT


@pytest.mark.parametrize("leave", ["detach", "unload", "another model"])
def test_factors_are_freed_when_the_model_leaves_its_device(pair, leave):
    patched = tiny.with_patches(pair[0], tiny.lora(), tiny.split_lora())
    with torch.no_grad():
        tiny.run(patched)
    tensors = [weakref.ref(part.up) for s in kept(patched) for f in s.factors for part in f.parts]
    assert len(tensors) == N_LAYERS + 4
    if leave == "detach":
        patched.detach()
    elif leave == "unload":
        comfy.model_management.unload_all_models()
    else:
        tiny.run(pair[0])
    assert all(tensor() is None for tensor in tensors)
    assert BUDGET.used(tiny.CPU) == 0


def test_partial_unload_does_not_keep_two_sets(pair):
    quantized, dense = (tiny.with_patches(p, tiny.lora(), tiny.split_lora()) for p in pair)
    expected = tiny.run(dense)
    assert tiny.relative(tiny.run(quantized), expected) < EXACT
    used = BUDGET.used(tiny.CPU)
    quantized.partially_unload(tiny.CPU, quantized.model_size() // 2)
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT
    assert BUDGET.used(tiny.CPU) == used == n_bytes(kept(quantized))
    quantized.partially_load(tiny.CPU, extra_memory=1e12)
    assert tiny.relative(tiny.run(quantized, load=False), expected) < EXACT
    assert BUDGET.used(tiny.CPU) == used


def _hooked(patcher, mode):
    """A clone with a LoRA, and a hook whose LoRA has other strengths at 30 % and 60 % of a run."""
    clone = tiny.with_patches(patcher, tiny.lora(1))
    clone.hook_mode = comfy.hooks.EnumHookMode[mode]
    hook, group = comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    for strength, start in ((1.0, 0.0), (0.4, 0.3), (-0.7, 0.6)):
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength, start, guarantee_steps=0))
    group.add(hook)
    clone.add_hook_patches(hook, tiny.lora(2), 0.6)
    hook.initialize_timesteps(clone.model)
    comfy.model_management.load_models_gpu([clone])
    return clone, group


def _steps(clone, group, after_step=lambda: None):
    """Results with and without the hook at each step of a run, as a sampler alternates."""
    results, sigmas = [], torch.tensor([1.0, 0.9, 0.6, 0.5, 0.3, 0.1])
    for sigma in sigmas:
        clone.prepare_hook_patches_current_keyframe(
            sigma[None], group, {"transformer_options": {"sample_sigmas": sigmas}}
        )
        for hooks in (group, None):
            clone.patch_hooks(hooks)
            results.append(tiny.run(clone, load=False))
        after_step()
    clone.clean_hooks()
    return results


@pytest.mark.parametrize("mode", ["MaxSpeed", "MinVram"])
def test_hooks_with_scheduled_strengths(pair, mode):
    expected = _steps(*_hooked(pair[1], mode))
    clone, group = _hooked(pair[0], mode)
    base, used = BUDGET.used(tiny.CPU), []
    found = _steps(clone, group, lambda: used.append(BUDGET.used(tiny.CPU)))
    assert all(tiny.relative(a, b) < EXACT for a, b in zip(found, expected, strict=True))
    assert len({round(tiny.relative(step, found[1]), 6) for step in found[::2]}) == 3
    assert {*used} == {2 * base if mode == "MaxSpeed" else base}
    assert BUDGET.used(tiny.CPU) == base > 0


def test_hooks_that_come_back_find_their_factors(pair):
    clone, group = _hooked(pair[0], "MaxSpeed")
    sets = []
    for hooks in (group, None, group):
        clone.patch_hooks(hooks)
        sets.append(kept(clone))
    assert [len(s) for s in sets] == [2 * N_LAYERS, N_LAYERS, 2 * N_LAYERS]
    assert all(a is b for a, b in zip(sets[0], sets[2], strict=True))


def test_dora_beside_plain_loras_keeps_nothing(pair):
    quantized, dense = (tiny.with_patches(p, tiny.lora(1), tiny.lora(2, dora=True)) for p in pair)
    assert agrees(quantized, dense)
    assert kept(quantized) == []


def test_blocks_share_compiled_code_and_a_new_lora_needs_no_other(pair):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    for seed in (1, 2):
        patches = {
            tiny.block_key(f"single_blocks.{i}.linear1"): tiny.lora(seed + i)[tiny.block_key("single_blocks.2.linear1")]
            for i in range(4)
        }
        patched = tiny.with_patches(pair[0], patches)
        comfy.model_management.load_models_gpu([patched])
        with torch.inference_mode():
            for block in patched.model.diffusion_model.single_blocks[:4]:
                compiled = torch.compile(block.linear1, backend=counter, fullgraph=True)
                assert torch.equal(compiled(x), block.linear1(x))
        assert counter.frame_count == 1
