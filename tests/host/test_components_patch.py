# SPDX-License-Identifier: Apache-2.0
"""Model patches from GGUF: built by the host's own loader over our layers, equal to the same patch from safetensors."""

import functools
import logging

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from component_files import load, load_host_node, module_of, module_weights, search_in, write_gguf
from gguf_kit import components, nodes
from gguf_kit.errors import UnsupportedArch
from gguf_kit.host.compat import is_quantized, quantized_modules
from safetensors.torch import save_file

NAME = "patch.gguf"
FLOATS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32}


@pytest.fixture
def node():
    return load_host_node("ModelPatchLoader", "nodes_model_patch")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "model_patches", ([str(tmp_path)], {".safetensors"}))
    return search_in(monkeypatch, tmp_path)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shrink(monkeypatch, node, name, **sizes):
    """Let the host's loader build a class of its module in a small size, which it otherwise knows by heart."""
    original = getattr(module_of(node), name)
    monkeypatch.setattr(module_of(node), name, functools.partial(original, **sizes))
    return original


def by_host(folder, node, exact):
    """The host's own loader over the same values in a safetensors file."""
    save_file({key: value.contiguous() for key, value in exact.items()}, folder / "host.safetensors")
    nodes.folder_paths.filename_list_cache.clear()
    return node().load_model_patch("host.safetensors")[0]


def blockwise(monkeypatch, node):
    """DiffSynth's ControlNet for Qwen-Image."""
    sizes = {"num_layers": 2, "dim": 256}
    original = shrink(monkeypatch, node, "QwenImageBlockWiseControlNet", **sizes)

    def run(model):
        hidden = model.process_input_latent_image(noise(1, 16, 1, 8, 8))
        return model.control_block(hidden, noise(*hidden.shape, seed=1), 1)

    return module_weights(original(additional_in_dim=0, **sizes, **FLOATS)), run


def siglip(monkeypatch, node):
    """The style projection of USO."""
    sizes = {"siglip_token_nums": 50, "style_token_nums": 32, "siglip_token_dims": 64, "hidden_size": 64}
    original = shrink(monkeypatch, node, "SigLIPMultiFeatProjModel", **sizes)
    weights = {f"feature_embedder.{key}": value for key, value in module_weights(original(**sizes, **FLOATS)).items()}
    features = [noise(1, 50, 64, seed=i) for i in range(3)]

    def run(model):
        return model(
            [f.to(torch.bfloat16) for f in features]
        )  # it computes in the type of a weight, whatever these have

    return weights, run


def uni3c(monkeypatch, node):
    """The ControlNet of camera paths for Wan."""
    module = pytest.importorskip("comfy.ldm.wan.uni3c", reason="this ComfyUI has no such patch")
    sizes = {"in_channels": 20, "conv_out_dim": 256, "dim": 256, "ffn_dim": 64, "num_layers": 2, "time_embed_dim": 64}
    sizes |= {"out_proj_dim": 64, "add_channels": 7, "mid_channels": 32}
    weights = module_weights(module.WanUni3CControlnet(**sizes, **FLOATS))

    def run(model):
        hidden = model.controlnet_patch_embedding(noise(1, 20, 1, 4, 4)).flatten(2).transpose(1, 2)
        return torch.cat([out(hidden) for out in model.proj_out], -1)

    return weights, run


def duration(monkeypatch, node):
    """The head of LTX that tells how long a video should be, made of torch's own layers."""
    module = pytest.importorskip("comfy.ldm.lightricks.duration_head", reason="this ComfyUI has no such patch")

    def run(model):
        return model(noise(1, 3, 4096), noise(1, 5, 2048))

    return module_weights(module.DurationHead()), run


KEEP_BYTES = (blockwise, siglip, uni3c)


@pytest.mark.parametrize("kind", [*KEEP_BYTES, duration])
def test_a_model_patch_equals_its_dequantized_weights(folder, node, monkeypatch, kind, inference_mode):
    weights, run = kind(monkeypatch, node)
    exact = write_gguf(folder / NAME, weights)
    patcher = load("ModelPatchLoaderGGUF", name=NAME)
    assert bool([*quantized_modules(patcher.model)]) == (kind in KEEP_BYTES)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    result = run(patcher.model)
    assert torch.equal(result, run(by_host(folder, node, exact).model))
    assert result.isfinite().all()
    assert result.abs().max() > 0


def test_a_model_patch_stays_small_and_can_be_loaded_again(folder, node, monkeypatch):
    weights, run = blockwise(monkeypatch, node)
    exact = write_gguf(folder / NAME, weights)
    patcher = load("ModelPatchLoaderGGUF", name=NAME)
    assert patcher.model_size() < 0.4 * sum(value.nbytes for value in exact.values())
    function, arguments = patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert torch.equal(run(again.model), run(patcher.model))


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM")
@pytest.mark.parametrize("kind", [blockwise, uni3c, duration])
def test_under_dynamic_vram_results_are_the_same(folder, node, monkeypatch, kind):
    import fake_vram

    weights, run = kind(monkeypatch, node)
    exact = write_gguf(folder / NAME, weights)
    with torch.inference_mode():
        expected = run(by_host(folder, node, exact).model)
        fake_vram.install(monkeypatch)
        patcher = load("ModelPatchLoaderGGUF", name=NAME)
        assert patcher.is_dynamic()
        patcher.partially_load(patcher.load_device)
        assert torch.equal(run(patcher.model), expected)
        function, arguments = patcher.cached_patcher_init
        again = function(*arguments, disable_dynamic=True)
        assert not again.is_dynamic()
        assert torch.equal(run(again.model), expected)


def test_a_patch_of_torch_s_own_layers_says_that_it_is_dequantized(folder, node, monkeypatch, caplog):
    weights, _ = duration(monkeypatch, node)
    write_gguf(folder / NAME, weights)
    with caplog.at_level(logging.INFO, "gguf_kit"):
        load("ModelPatchLoaderGGUF", name=NAME)
    assert "computes with these weights itself, so they were dequantized: video_input_proj.weight" in caplog.text


def test_a_patch_that_lacks_a_weight_is_refused(folder, node, monkeypatch):
    weights, _ = blockwise(monkeypatch, node)
    for gone in ("controlnet_blocks.1.input_proj.weight", "controlnet_blocks.0.x_rms.weight"):
        write_gguf(folder / NAME, {key: value for key, value in weights.items() if key != gone})
        with pytest.raises(UnsupportedArch, match=f'Missing key.*"{gone}"'):
            load("ModelPatchLoaderGGUF", name=NAME)


def test_tensors_that_a_patch_keeps_for_later_are_floats(folder, node, monkeypatch):
    seen = []
    monkeypatch.setattr(components, "run_loader", lambda loader, path, state, *others: seen.append(state) or 1 / 0)
    write_gguf(folder / NAME, {"first_stage_model.a.weight": torch.ones(4, 32), "b.weight": torch.ones(4, 32)})
    with pytest.raises(UnsupportedArch):
        load("ModelPatchLoaderGGUF", name=NAME)
    assert [is_quantized(value) for value in seen[0].values()] == [False, True]


def test_the_host_s_own_loader_stays_as_it_is(folder, node, monkeypatch):
    weights, _ = blockwise(monkeypatch, node)
    exact = write_gguf(folder / NAME, weights)
    before = dict(vars(module_of(node)))
    load("ModelPatchLoaderGGUF", name=NAME)
    assert vars(module_of(node)) == before
    assert not [*quantized_modules(by_host(folder, node, exact).model)]


def test_a_patch_that_this_host_does_not_know_is_refused(folder, node):
    write_gguf(folder / NAME, {"feature_embedder.strange.weight": torch.ones(4, 32)}, tag="odd")
    with pytest.raises(UnsupportedArch, match="does not recognise it as a model patch"):
        load("ModelPatchLoaderGGUF", name=NAME)
