# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's dynamic VRAM on a real GPU: the same results as on the classic path, and the memory that was promised.

tests/host/test_dynamic_vram.py has the same on a CPU, with what comfy_aimdo does replaced.
"""

import pytest
import torch

EXACT = 1e-5  # float32, products summed in another order
BATCHES = pytest.mark.parametrize("batch", [1, 16], ids=["few tokens", "many tokens"])


@pytest.fixture
def tiny(host):
    """tests/host/tiny.py, which imports the host. Everything runs in inference mode, as the host's nodes do."""
    import tiny

    with torch.inference_mode():
        yield tiny


@pytest.fixture
def load(tiny, tiny_flux):
    """Loads the tiny Flux through the pack, under dynamic VRAM or classically."""
    from gguf_kit.ops import OpsOptions
    from gguf_kit.service import load_model

    def load(dynamic=True, **options):
        patcher = load_model(str(tiny_flux("Q4_K_S")), OpsOptions(**options), disable_dynamic=not dynamic)
        assert patcher.is_dynamic() == dynamic
        return patcher

    return load


@pytest.fixture
def never_resident(host, monkeypatch):
    """Tells the host that no weight finds room in VRAM."""
    import comfy_aimdo.model_vbar

    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda allocation: None)


def run(tiny, patcher, batch=2, load=True):
    """One apply_model on the GPU, after the host has loaded the patcher (load=False: as it is)."""
    import comfy.model_management

    if load:
        comfy.model_management.load_models_gpu([patcher])
    x, t, context, y = (tensor.to(patcher.load_device) for tensor in tiny.inputs(batch))
    return patcher.model.apply_model(x, t, c_crossattn=context, y=y).cpu()


def evict(patcher):
    """Let the host take back all VRAM of a dynamic model."""
    patcher._vbar_get().free_memory(1 << 40)


# 1: dynamic VRAM with a LoRA, weights resident or not.


@BATCHES
def test_lora_with_resident_weights_equals_the_classic_path(tiny, load, batch):
    expected = run(tiny, tiny.with_patches(load(dynamic=False), tiny.lora()), batch)
    patcher = tiny.with_patches(load(), tiny.lora())
    for _ in range(3):
        assert tiny.relative(run(tiny, patcher, batch), expected) < EXACT
    assert patcher._vbar_get().loaded_size() > 0


@BATCHES
def test_lora_without_room_equals_the_classic_path(tiny, load, batch, never_resident):
    expected = run(tiny, tiny.with_patches(load(dynamic=False), tiny.lora()), batch)
    patcher = tiny.with_patches(load(), tiny.lora())
    for _ in range(3):
        assert tiny.relative(run(tiny, patcher, batch), expected) < EXACT


def test_the_bytes_in_vram_stay_those_of_the_file(tiny, load):
    from gguf_kit.host.compat import quantized_modules

    patcher = tiny.with_patches(load(), tiny.lora())
    run(tiny, patcher)
    staged = [module for _, module in quantized_modules(patcher.model) if hasattr(module, "_v_weight")]
    assert staged
    for module in staged:
        assert torch.equal(module._v_weight._qdata.cpu(), module.weight._qdata.cpu())


def test_dora_equals_the_classic_path(tiny, load):
    expected = run(tiny, tiny.with_patches(load(dynamic=False), tiny.lora(dora=True), strength=0.5))
    patcher = tiny.with_patches(load(), tiny.lora(dora=True), strength=0.5)
    assert tiny.relative(run(tiny, patcher), expected) < EXACT


# 2: other LoRAs with the next prompt.


def test_loras_change_between_prompts(tiny, load):
    def patched(base):
        one = tiny.with_patches(base, tiny.lora(1))
        return base, one, tiny.with_patches(base, tiny.lora(2), tiny.split_lora())

    expected = [run(tiny, patcher) for patcher in patched(load(dynamic=False))]
    patchers = patched(load())
    for i in (0, 1, 2, 0, 1):
        for _ in range(2):
            assert tiny.relative(run(tiny, patchers[i]), expected[i]) < EXACT
            evict(patchers[i])


# 3: weight hooks, for which the host loads a classic copy.


def test_weight_hooks_run_on_a_classic_copy(tiny, load):
    import comfy.hooks
    import comfy.model_management

    plain = run(tiny, load(dynamic=False))
    hooked = run(tiny, tiny.with_patches(load(dynamic=False), tiny.lora(2), strength=0.6))
    dynamic = load()
    assert tiny.relative(run(tiny, dynamic), plain) < EXACT
    delegate = dynamic.get_non_dynamic_delegate()
    assert type(delegate).__name__ == "GGUFPatcher"
    hook, group = comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    group.add(hook)
    assert len(delegate.add_hook_patches(hook, tiny.lora(2), 0.6)) == len(tiny.LORA_SHAPES)
    comfy.model_management.load_models_gpu([delegate])
    for hooks, expected in ((None, plain), (group, hooked), (None, plain), (group, hooked)):
        delegate.patch_hooks(hooks)
        assert tiny.relative(run(tiny, delegate, load=False), expected) < EXACT
    delegate.clean_hooks()
    assert tiny.relative(run(tiny, dynamic), plain) < EXACT


# 4: text generation with the host's CUDA graphs.


@pytest.fixture
def text_model(host, monkeypatch, tmp_path):
    """A small Gemma 4 under dynamic VRAM, the one encoder whose decoding the host captures; and its patcher."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.utils
    import encoders
    from gguf_kit.loader import load_text_encoder
    from gguf_kit.ops import make_ops
    from gguf_kit.service import to_host

    family = encoders.FAMILIES["gemma 4 e4b"]
    if not family.known():
        pytest.skip("this ComfyUI has no Gemma 4")
    encoders.without_other_parts(monkeypatch)
    with monkeypatch.context() as without_dynamic_vram:  # with it the host's layers have no weights to take shapes from
        without_dynamic_vram.setattr(comfy.memory_management, "aimdo_enabled", False)
        encoders.write_encoder(family, tmp_path / "model.gguf")
    state = to_host(load_text_encoder(tmp_path / "model.gguf")[0])
    model = family.build(make_ops())
    missing = model.load_state_dict(
        comfy.utils.state_dict_prefix_replace(state, {"model.language_model.": "model."}), strict=False
    ).missing_keys
    assert missing == []
    holder = TextModel(model)
    patcher = comfy.model_patcher.CoreModelPatcher(holder, host.device, torch.device("cpu"))
    assert patcher.is_dynamic()
    comfy.model_management.load_models_gpu([patcher])
    yield model
    del patcher


class TextModel(torch.nn.Module):
    """What the host asks of a text encoder that it holds."""

    def __init__(self, model):
        super().__init__()
        self.transformer = model

    def get_dynamic_vram__units(self):
        return self.transformer.model.get_dynamic_vram__units()


def generate(model, device, n_tokens=24):
    """Tokens after three, greedily, in float32."""
    from comfy.text_encoders.llama import BaseGenerate

    prompt = torch.tensor([[5, 95, 17]], device=device)
    embeds = model.model.embed_tokens(prompt, out_dtype=torch.float32)
    return BaseGenerate.generate(
        model, embeds, False, n_tokens, stop_tokens=[-1], execution_dtype=torch.float32, initial_input_ids=prompt
    )


def test_captured_text_generation_gives_the_same_tokens(host, text_model, monkeypatch):
    import comfy.model_prefetch

    with torch.inference_mode():
        monkeypatch.setattr(host.args, "disable_cuda_graphs", True)
        expected = generate(text_model, host.device)
        comfy.model_prefetch.cleanup_prefetch_queues()
        monkeypatch.setattr(host.args, "disable_cuda_graphs", False)
        for _ in range(2):
            assert generate(text_model, host.device) == expected
        captured = [layer for layer in text_model.model.layers if hasattr(layer, "_comfy_graph")]
        comfy.model_prefetch.cleanup_prefetch_queues()
    assert len(expected) == 24
    assert captured, "no layer was captured: the test shows nothing"


# 5: memory.


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "classic"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
def test_a_step_needs_no_more_memory_than_was_reserved(tiny, load, dynamic, with_lora):
    batch = 16
    patcher = load(dynamic=dynamic)
    if with_lora:
        patcher = tiny.with_patches(patcher, tiny.lora())
    run(tiny, patcher, batch)  # compiles kernels, makes tables and factors
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(tiny, patcher, batch)
    torch.cuda.synchronize()
    needed = torch.cuda.max_memory_allocated() - before
    shape = list(tiny.inputs(batch)[0].shape)
    assert 0 < needed <= patcher.model.memory_required(shape)


def test_the_classic_path_holds_bytes_and_not_weights(tiny, load):
    import comfy.model_management

    patcher = load(dynamic=False)
    before = torch.cuda.memory_allocated()
    comfy.model_management.load_models_gpu([patcher])
    grown = torch.cuda.memory_allocated() - before
    assert grown < 1.2 * patcher.model_size() + (1 << 20)
