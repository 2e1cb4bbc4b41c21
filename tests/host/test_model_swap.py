# SPDX-License-Identifier: Apache-2.0
"""Two models used in turns in one prompt, as Wan 2.2's for high and low noise: each computes what it computes alone."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import pytest
import tiny
import torch
from comfy.weight_adapter import LoRAAdapter
from gguf_kit import nodes
from gguf_kit.host.compat import quantized_modules
from small_model_table import VIDEO, WAN_TEXT, wan
from small_models import host_model, make_file

EXPERT = wan("WAN21_T2V", "Wan", {"num_layers": 3, "ffn_dim": 256})
N_STEPS = 4
SWITCH = 2  # the step from which the model for low noise takes over
IN_TURNS = ("high", "low", "high", "high", "low", "low", "high")
GPU = torch.device("cpu", 0)  # torch computes on it, and for the host it is no CPU
BF16 = {"dequant_dtype": "bfloat16", "patch_dtype": "default", "patch_on_device": True}
DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with high.gguf and low.gguf, one architecture with different weights; name -> float weights."""
    folder = tmp_path_factory.mktemp("experts")
    return folder, {name: make_file(EXPERT, folder / f"{name}.gguf", seed=i) for i, name in enumerate(("high", "low"))}


@pytest.fixture(autouse=True)
def as_in_a_prompt():
    """The host runs all nodes of a prompt in inference mode, loaders among them."""
    with torch.inference_mode():
        yield


@pytest.fixture
def load(experts, monkeypatch):
    """load(name, **inputs): the MODEL of the loader node, of the advanced one where there are inputs."""
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(experts[0])], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})

    def load_unet(name, **inputs):
        node = nodes.UnetLoaderGGUFAdvanced if inputs else nodes.UnetLoaderGGUF
        return node().load_unet(f"{name}.gguf", **inputs)[0]

    yield load_unet
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture
def small_gpu(monkeypatch):
    """small_gpu(n_bytes): from now on there is a GPU with so much memory, all of it for weights."""
    host = comfy.model_management

    def install(n_bytes):
        def free(device=None, torch_free_too=False):
            loaded = [m for m in host.current_loaded_models if m.model is not None and m.device == GPU]
            left = max(n_bytes - sum(m.model_loaded_memory() for m in loaded), 0)
            # Attention asks too, with a tensor's device, and would add up in smaller pieces.
            left = left if device is GPU else 1 << 40
            return (left, left) if torch_free_too else left

        for name, value in (
            ("get_free_memory", free),
            ("get_torch_device", lambda: GPU),
            ("unet_offload_device", lambda: tiny.CPU),
            ("is_device_cpu", lambda device: device == tiny.CPU),
            ("minimum_inference_memory", lambda: 0),
            ("extra_reserved_memory", lambda: 0),
            ("vram_state", host.VRAMState.NORMAL_VRAM),
        ):
            monkeypatch.setattr(host, name, value)
        monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *args: (0, 0))

    return install


def denoise(patcher, latent, first=0, last=N_STEPS):
    """Steps `first` to `last` of a sampling run, as the host's node for a part of the steps does them."""
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(VIDEO, generator=generator), torch.randn(WAN_TEXT, generator=generator)
    noise = noise if first == 0 else torch.zeros_like(noise)
    options = {
        "start_step": first,
        "last_step": last,
        "disable_noise": first > 0,
        "force_full_denoise": last == N_STEPS,
    }
    run = patcher, noise, N_STEPS, 1.0, "euler", "simple", [[text, {}]], [[text, {}]], latent
    return comfy.sample.sample(*run, **options, disable_pbar=True, seed=1)


def start():
    return torch.zeros(VIDEO)


def alone(load, name, patches=None, **inputs):
    """What a model gives when it is the only one."""
    patcher = load(name, **inputs)
    result = denoise(tiny.with_patches(patcher, patches) if patches else patcher, start())
    comfy.model_management.unload_all_models()
    return result


def lora():
    """A plain LoRA on every matrix of the first and the last block."""
    patches = {}
    for i, place in enumerate(
        f"blocks.{n}.{layer}" for n in (0, 2) for layer in ("self_attn.q", "cross_attn.v", "ffn.0")
    ):
        shape = (256, 128) if place.endswith("ffn.0") else (128, 128)
        patches[tiny.block_key(place)] = LoRAAdapter(set(), (*tiny.factors(shape, i), 4.0, None, None, None))
    return patches


def test_a_prompt_with_two_models_equals_their_dequantized_weights(load, experts):
    def prompt(high, low):
        return denoise(low, denoise(high, start(), 0, SWITCH), SWITCH, N_STEPS)

    high, low = load("high"), load("low")
    floats = [host_model(experts[1][name]) for name in ("high", "low")]
    expected = prompt(*floats)
    assert torch.equal(prompt(high, low), expected)
    assert torch.equal(prompt(high, low), expected)
    assert not torch.equal(prompt(low, high), expected)
    assert torch.equal(prompt(low, high), prompt(*floats[::-1]))


# Part of one model's bytes that fits into memory.
ROOMS = {"a part of one": 0.6, "one": 1.2, "one and most of the other": 1.95, "both": 3.0}


@pytest.mark.parametrize("room", [None, *ROOMS.values()], ids=["no GPU", *ROOMS])
def test_models_in_turns_give_what_each_gives_alone(load, small_gpu, room):
    expected = {name: alone(load, name) for name in ("high", "low")}
    if room is not None:
        small_gpu(load("high").model_size() * room)
    patchers = {name: load(name) for name in ("high", "low")}
    others = []
    for name in IN_TURNS:
        assert torch.equal(denoise(patchers[name], start()), expected[name])
        parts = {name: patcher.loaded_size() / patcher.model_size() for name, patcher in patchers.items()}
        assert (parts.pop(name) < 1) == (room is not None and room < 1)
        others += parts.values()
    assert any(0.1 < part < 1 for part in others) == (room == ROOMS["one and most of the other"])


@pytest.mark.parametrize("room", [None, 0.6, 1.95], ids=["no GPU", "a part of one", "one and most of the other"])
def test_a_lora_stays_with_its_model(load, small_gpu, room):
    expected = {"high": alone(load, "high"), "low": alone(load, "low"), "patched": alone(load, "high", lora())}
    assert not torch.equal(expected["patched"], expected["high"])
    if room is not None:
        small_gpu(load("high").model_size() * room)
    patchers = {"high": load("high"), "low": load("low")}
    patchers["patched"] = tiny.with_patches(patchers["high"], lora())
    for name in ("patched", "low", "patched", "high", "low", "patched", "low", "high", "patched"):
        assert torch.equal(denoise(patchers[name], start()), expected[name]), name


@pytest.mark.parametrize("room", [None, 0.6], ids=["no GPU", "a part of one"])
@pytest.mark.parametrize("swapped", [False, True], ids=["the first", "the second"])
def test_options_stay_with_their_model(load, small_gpu, swapped, room):
    inputs = {"high": {} if swapped else BF16, "low": BF16 if swapped else {}}
    expected = {name: alone(load, name, lora(), **inputs[name]) for name in inputs}
    for name in inputs:
        without = alone(load, name, lora(), **({} if inputs[name] else BF16))
        assert 1e-5 < tiny.relative(without, expected[name]) < 0.1
    if room is not None:
        small_gpu(load("high").model_size() * room)
    patchers = {name: tiny.with_patches(load(name, **inputs[name]), lora()) for name in inputs}
    for name in IN_TURNS:
        assert torch.equal(denoise(patchers[name], start()), expected[name])
    for name, patcher in patchers.items():
        wanted = torch.bfloat16 if inputs[name] else None
        assert {module.options.dequant_dtype for _, module in quantized_modules(patcher.model)} == {wanted}


def test_one_file_twice_with_other_options(load):
    expected = {False: alone(load, "high"), True: alone(load, "high", **BF16)}
    patchers = {False: load("high"), True: load("high", **BF16)}
    for is_rounded in (False, True, False, True, True, False):
        assert torch.equal(denoise(patchers[is_rounded], start()), expected[is_rounded])


@pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
def test_models_in_turns_under_dynamic_vram(load, monkeypatch, resident):
    import fake_vram

    names = {"high": None, "low": None, "patched": lora()}
    classic = {name: alone(load, name.replace("patched", "high"), patches) for name, patches in names.items()}
    vbar = fake_vram.install(monkeypatch)
    vbar.resident = resident
    expected = {name: alone(load, name.replace("patched", "high"), patches) for name, patches in names.items()}
    assert all(tiny.relative(expected[name], classic[name]) < 1e-6 for name in names)
    assert torch.equal(expected["low"], classic["low"])
    patchers = {"high": load("high"), "low": load("low", **BF16 | {"dequant_dtype": "default"})}
    patchers["patched"] = tiny.with_patches(patchers["high"], lora())
    for name in ("patched", "low", "high", "low", "patched", "high", "patched"):
        assert patchers[name].is_dynamic()
        assert torch.equal(denoise(patchers[name], start()), expected[name]), name
        vbar.evict()
