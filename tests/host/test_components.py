# SPDX-License-Identifier: Apache-2.0
"""VAEs, CLIP vision models and latent upscale models from GGUF: what the host makes of the same weights as floats."""

import json
import logging
import os
from types import SimpleNamespace

import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy import diffusers_convert
from comfy.ldm.cascade.stage_c_coder import StageC_coder
from component_files import (
    copies,
    load,
    load_host_node,
    module_weights,
    random_weights,
    search_in,
    tiny_autoencoder,
    write_gguf,
)
from gguf_kit import components, nodes
from gguf_kit.errors import GGUFError, UnsupportedArch

DEQUANTIZED = "so its weights were dequantized"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return search_in(monkeypatch, tmp_path)


def spoken(caplog):
    return [record.message for record in caplog.records if DEQUANTIZED in record.message]


# -- VAE --


def test_a_vae_encodes_and_decodes_as_its_dequantized_weights(folder, caplog, inference_mode):
    exact = write_gguf(folder / "tae.gguf", tiny_autoencoder())
    generator = torch.Generator().manual_seed(0)
    picture, latent = torch.rand(1, 64, 64, 3, generator=generator), torch.randn(1, 16, 8, 8, generator=generator)
    with caplog.at_level(logging.INFO, "gguf_kit"):
        vae = load("VAELoaderGGUF", vae_name="tae.gguf")
    assert len(spoken(caplog)) == 1
    expected = comfy.sd.VAE(sd=copies(exact))
    assert torch.equal(vae.decode(latent), expected.decode(latent))
    assert torch.equal(vae.encode(picture), expected.encode(picture))
    assert vae.decode(latent).std() > 0.05


def wan_weights():
    config = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    model = comfy.ldm.wan.vae.WanVAE(**config, temperal_downsample=[False, True, True], dropout=0.0)
    return module_weights(model)


def decoded(vae):
    latent = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return vae.decode(latent)


@pytest.mark.parametrize("form", ["5-D kernels", "kernels with two dimensions merged", "behind a prefix"])
def test_a_vae_of_videos_in_all_forms_of_its_kernels(folder, form):
    weights = wan_weights()
    exact = {key: value.half().float() if value.ndim > 1 else value for key, value in weights.items()}
    stored = {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}
    if form.endswith("merged"):
        # Of three outputs and three frames, a merged kernel looks like one of pictures that is transposed.
        stored = {k: v.flatten(0, 1) if v.ndim == 5 and len(v) != 3 else v for k, v in stored.items()}
    prefix = "first_stage_model." if form == "behind a prefix" else ""
    write_floats(folder / "wan.gguf", {prefix + key: value for key, value in stored.items()})
    result = decoded(load("VAELoaderGGUF", vae_name="wan.gguf"))
    assert torch.equal(result, decoded(comfy.sd.VAE(sd=copies(exact))))
    assert result.isfinite().all()


def write_floats(path, weights):
    """A file with all tensors in their own type, as some converters write VAEs."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "pig")
    for key, value in weights.items():
        writer.add_tensor(key, np.atleast_1d(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_vae_of_floats_says_nothing_of_dequantizing(folder, caplog):
    write_floats(folder / "wan.gguf", wan_weights())
    with caplog.at_level(logging.INFO, "gguf_kit"):
        load("VAELoaderGGUF", vae_name="wan.gguf")
    assert "wan.gguf: a VAE (tagged pig)" in caplog.text
    assert not spoken(caplog)


def test_a_vae_that_lacks_a_weight_is_refused_and_one_without_encoder_is_not(folder):
    weights = wan_weights()
    gone = "decoder.middle.0.residual.2.weight"
    write_gguf(folder / "cut.gguf", {key: value for key, value in weights.items() if key != gone})
    with pytest.raises(UnsupportedArch, match=f"1 tensors that ComfyUI needs are missing: {gone}"):
        load("VAELoaderGGUF", vae_name="cut.gguf")
    parts = ("decoder.", "conv2.", "encoder.conv1.")
    decoder = {key: value for key, value in weights.items() if key.startswith(parts)}
    del decoder["encoder.conv1.bias"]
    write_gguf(folder / "part.gguf", decoder)
    with pytest.raises(UnsupportedArch, match="are missing: encoder"):
        load("VAELoaderGGUF", vae_name="part.gguf")
    tae = {key: value for key, value in tiny_autoencoder().items() if "encoder" not in key}
    exact = write_gguf(folder / "decoder.gguf", tae)
    latent = torch.randn(1, 16, 8, 8)
    vae = load("VAELoaderGGUF", vae_name="decoder.gguf")
    assert torch.equal(vae.decode(latent), comfy.sd.VAE(sd=copies(exact)).decode(latent))


def test_keys_are_compared_without_what_the_host_puts_in_front():
    model = torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({x: torch.nn.Linear(1, 1, False) for x in "ab"})})
    for keys in ({"a.weight", "b.weight"}, {"vae.decoder.a.weight", "vae.decoder.b.weight"}, {"encoder.c.weight"}):
        assert not components._missing_in_parts(model, keys)
    for keys in ({"a.weight"}, {"vae.decoder.a.weight"}, {"decoder.a.weight"}):
        assert components._missing_in_parts(model, keys) == ["decoder.b.weight"]


def test_the_host_can_load_a_vae_again(folder):
    exact = write_gguf(folder / "tae.gguf", tiny_autoencoder())
    vae = load("VAELoaderGGUF", vae_name="tae.gguf")
    function, arguments = vae.patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again is not vae.patcher
    weight = again.model.state_dict()["taesd_decoder.1.weight"]
    assert torch.equal(weight, exact["taesd_decoder.1.weight"].to(weight.dtype))


def test_a_vae_gets_what_its_safetensors_file_said_of_it(folder, monkeypatch):
    given = []
    build = comfy.sd.VAE.__init__

    def init(self, sd=None, metadata=None):
        given.append(metadata)
        build(self, sd=sd)

    monkeypatch.setattr(comfy.sd.VAE, "__init__", init)
    write_gguf(folder / "tae.gguf", tiny_autoencoder(), {"config": "{}"})
    load("VAELoaderGGUF", vae_name="tae.gguf")
    assert given == [{"config": "{}"}]


def test_the_keys_of_a_vae_in_the_layout_of_diffusers_are_those_of_the_model():
    config = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    config |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        model = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=config, embed_dim=4)
    attention = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
    diffusers = {}
    for key, value in model.state_dict().items():
        name = key
        for native, theirs in diffusers_convert.vae_conversion_map:
            name = name.replace(native, theirs)
        if "attentions" in name:
            for native, theirs in attention:
                name = name.replace(f".{native}.", f".{theirs}.")
        diffusers[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    assert not {*model.state_dict()} <= {*diffusers}
    vae = SimpleNamespace(first_stage_model=model)
    shapes = {name: tuple(value.shape) for name, value in diffusers.items()}
    components.check_vae("vae.gguf", vae, shapes)
    shapes.pop("decoder.mid_block.resnets.0.norm1.weight")
    with pytest.raises(
        GGUFError, match=r"1 tensors that ComfyUI needs are missing: decoder\.mid\.block_1\.norm1\.weight"
    ):
        components.check_vae("vae.gguf", vae, shapes)


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM")
def test_a_vae_under_dynamic_vram_decodes_the_same(folder, monkeypatch):
    import fake_vram

    exact = write_gguf(folder / "tae.gguf", tiny_autoencoder())
    latent = torch.randn(1, 16, 8, 8)
    expected = comfy.sd.VAE(sd=copies(exact)).first_stage_model.decode(latent)
    fake_vram.install(monkeypatch)
    monkeypatch.setattr(comfy.model_management, "vae_device", lambda: fake_vram.GPU)
    vae = load("VAELoaderGGUF", vae_name="tae.gguf")
    assert vae.patcher.is_dynamic()
    vae.patcher.partially_load(vae.patcher.load_device)
    assert torch.equal(vae.first_stage_model.decode(latent), expected)
    clone = vae.patcher.clone(disable_dynamic=True)
    assert not clone.is_dynamic()
    assert torch.equal(clone.model.decode(latent), expected)


# -- CLIP vision --


@pytest.fixture
def small_vision(tmp_path_factory, monkeypatch):
    """The host's vision models, 64 wide; they have as many layers as the host counts."""
    place = tmp_path_factory.mktemp("vision")
    config = {
        "hidden_size": 64,
        "image_size": 28,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
        "model_type": "clip_vision_model",
    }
    (place / "clip_vision_config_vitl.json").write_text(json.dumps(config))
    monkeypatch.setattr(comfy.clip_vision, "__file__", str(place / "clip_vision.py"))
    return module_weights(comfy.clip_vision.ClipVisionModel(str(place / "clip_vision_config_vitl.json")).model)


def open_clip_names(weights):
    """The same weights under the names of OpenCLIP, with query, key and value in one."""
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.post_layernorm.": "ln_post.",
        "vision_model.pre_layrnorm.": "ln_pre.",
        "vision_model.encoder.layers.": "transformer.resblocks.",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed = {}
    for key, value in weights.items():
        if key == "visual_projection.weight":
            renamed["visual.proj"] = value.T.contiguous()
            continue
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = torch.cat([weights[key.replace(".q_", f".{x}_")] for x in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in names.items():
            key = key.replace(old, new)
        renamed["visual." + key] = value
    return renamed


@pytest.mark.parametrize("form", ["the host's names", "OpenCLIP's names"])
def test_a_vision_model_sees_as_its_dequantized_weights(folder, small_vision, form, caplog, inference_mode):
    weights = open_clip_names(small_vision) if form == "OpenCLIP's names" else small_vision
    exact = write_gguf(folder / "vision.gguf", weights)
    with caplog.at_level(logging.INFO, "gguf_kit"):
        model = load("CLIPVisionLoaderGGUF", clip_name="vision.gguf")
    assert len(spoken(caplog)) == 1
    state = copies(exact)
    is_open_clip = form == "OpenCLIP's names"
    given = ("visual.", True) if is_open_clip else ()
    expected = comfy.clip_vision.load_clipvision_from_sd(state, *given)
    image = torch.rand(1, 40, 32, 3, generator=torch.Generator().manual_seed(0))
    found, wanted = model.encode_image(image), expected.encode_image(image)
    for name in ("last_hidden_state", "image_embeds", "penultimate_hidden_states"):
        assert torch.equal(found[name], wanted[name])
    assert found["image_embeds"].std() > 0


def test_a_vision_model_that_lacks_a_weight_is_refused(folder, small_vision):
    del small_vision["vision_model.encoder.layers.3.mlp.fc1.weight"]
    write_gguf(folder / "vision.gguf", small_vision)
    with pytest.raises(UnsupportedArch, match=r"are missing: vision_model\.encoder\.layers\.3\.mlp\.fc1\.weight"):
        load("CLIPVisionLoaderGGUF", clip_name="vision.gguf")


# -- latent upscale models --


def upscaler_720p():
    from comfy.ldm.hunyuan_video.upsampler import SRModel3DV2

    return module_weights(SRModel3DV2(4, 4, hidden_channels=32, num_blocks=2))


def upscaler_1080p():
    from comfy.ldm.hunyuan_video.upsampler import Upsampler

    weights = module_weights(Upsampler(4, 4, (64, 32)))
    return {key.replace("nin_shortcut.conv", "nin_shortcut"): value for key, value in weights.items()}


@pytest.mark.parametrize("weights", [upscaler_720p, upscaler_1080p])
def test_a_latent_upscale_model_equals_its_dequantized_weights(folder, weights, caplog, inference_mode):
    node = load_host_node("LatentUpscaleModelLoader", "nodes_hunyuan")
    exact = write_gguf(folder / "up.gguf", weights())
    with caplog.at_level(logging.INFO, "gguf_kit"):
        model = load("LatentUpscaleModelLoaderGGUF", model_name="up.gguf")
    assert len(spoken(caplog)) == 1
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in exact.items()}, folder / "up.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nodes.folder_paths.folder_names_and_paths, "latent_upscale_models", ([str(folder)], {".gguf"}))
        expected = node.execute("up.safetensors")[0]
    latent = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    result = model.resample_latent(latent)
    assert torch.equal(result, expected.resample_latent(latent))
    assert result.std() > 0


def test_the_upscaler_of_ltx_gets_its_config(folder):
    load_host_node("LatentUpscaleModelLoader", "nodes_hunyuan")
    upsampler = pytest.importorskip("comfy.ldm.lightricks.latent_upsampler", reason="this ComfyUI has no such model")
    config = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3}
    config |= {"spatial_upsample": True, "temporal_upsample": False}
    import comfy.ops

    model = upsampler.LatentUpsampler.from_config(config, operations=comfy.ops.disable_weight_init)
    exact = write_gguf(folder / "ltx.gguf", module_weights(model), {"config": json.dumps(config)})
    patcher = load("LatentUpscaleModelLoaderGGUF", model_name="ltx.gguf")
    model.load_state_dict(exact)
    latent = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(patcher.model(latent.to(patcher.model_dtype())), model(latent))


# -- refusals --


def test_a_model_of_another_kind_is_named_with_its_node(folder, tiny_flux):
    os.link(tiny_flux("Q8_0"), folder / "flux.gguf")
    load_host_node("LatentUpscaleModelLoader", "nodes_hunyuan")
    load_host_node("ModelPatchLoader", "nodes_model_patch")
    diffusion = r"flux\.gguf: it is a diffusion model \(.*Flux.*\), not a .*\. Use \"Unet Loader \(GGUF\)\"\.$"
    for node_id, name in (
        ("VAELoaderGGUF", "vae_name"),
        ("CLIPVisionLoaderGGUF", "clip_name"),
        ("ControlNetLoaderGGUF", "control_net_name"),
        ("ModelPatchLoaderGGUF", "name"),
        ("LatentUpscaleModelLoaderGGUF", "model_name"),
    ):
        with pytest.raises(UnsupportedArch, match=diffusion):
            load(node_id, **{name: "flux.gguf"})
    with pytest.raises(UnsupportedArch, match=diffusion):
        load("LoraLoaderGGUF", lora_name="flux.gguf", model=None)
    write_gguf(folder / "tae.gguf", wan_weights())
    with pytest.raises(UnsupportedArch, match=r'it is a VAE, not a ControlNet. Use "Load VAE \(GGUF\)"'):
        load("ControlNetLoaderGGUF", control_net_name="tae.gguf")


def test_a_file_that_nobody_knows_is_refused_in_one_sentence(folder):
    write_gguf(folder / "strange.gguf", random_weights({"a.weight": (4, 32), "b.bias": (4,)}), tag="odd")
    for node_id, name in (("VAELoaderGGUF", "vae_name"), ("CLIPVisionLoaderGGUF", "clip_name")):
        with pytest.raises(UnsupportedArch, match=r"does not recognise it as a .* \(general.architecture 'odd'\)"):
            load(node_id, **{name: "strange.gguf"})


def test_a_host_that_reads_models_in_another_way_is_told_apart(folder, monkeypatch):
    node = load_host_node("LatentUpscaleModelLoader", "nodes_hunyuan")
    write_gguf(folder / "up.gguf", upscaler_720p())
    monkeypatch.setattr(node, "execute", classmethod(lambda cls, model_name: model_name))
    with pytest.raises(GGUFError, match="has no loader for a latent upscale model that GGUF Kit can use"):
        load("LatentUpscaleModelLoaderGGUF", model_name="up.gguf")


def test_every_kind_names_a_node_there_is():
    from gguf_kit.models import kinds

    named = {kind.node for kind in (*kinds.KINDS, kinds.TEXT_ENCODER)} | {kinds.DIFFUSION_NODE}
    assert named <= {*nodes.NODE_DISPLAY_NAME_MAPPINGS.values()}


def test_a_file_that_is_replaced_is_loaded_again(folder):
    write_gguf(folder / "tae.gguf", tiny_autoencoder())
    before = nodes.NODE_CLASS_MAPPINGS["VAELoaderGGUF"].IS_CHANGED(vae_name="tae.gguf")
    assert before == nodes.NODE_CLASS_MAPPINGS["VAELoaderGGUF"].IS_CHANGED(vae_name="tae.gguf")
    os.utime(folder / "tae.gguf", (1, 1))
    assert nodes.NODE_CLASS_MAPPINGS["VAELoaderGGUF"].IS_CHANGED(vae_name="tae.gguf") != before


def test_floats_in_own_memory_leave_the_file_alone(folder):
    write_gguf(folder / "tae.gguf", tiny_autoencoder())
    values, _ = components.load_component(str(folder / "tae.gguf"))
    floats = components.to_floats(values, own_memory=True)
    for value in floats.values():
        value.zero_()
    assert all(value.any() for key, value in components.to_floats(values).items() if key.endswith("1.weight"))


def test_a_whole_model_is_refused_before_it_is_dequantized(folder, tiny_flux, monkeypatch):
    os.link(tiny_flux("Q8_0"), folder / "flux.gguf")
    load_host_node("LatentUpscaleModelLoader", "nodes_hunyuan")
    monkeypatch.setattr(components, "to_floats", lambda *args, **options: pytest.fail("dequantized"))
    for node_id, name in (
        ("VAELoaderGGUF", "vae_name"),
        ("CLIPVisionLoaderGGUF", "clip_name"),
        ("LatentUpscaleModelLoaderGGUF", "model_name"),
        ("LoraLoaderModelOnlyGGUF", "lora_name"),
    ):
        inputs = {"model": None, "strength_model": 1.0} if "Lora" in node_id else {}
        with pytest.raises(UnsupportedArch, match="it is a diffusion model"):
            load(node_id, **{name: "flux.gguf"}, **inputs)


def refused(shapes, kind):
    values = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    info = SimpleNamespace(path="a.gguf")
    try:
        return components._refuse_models(info, values, kind) is not None
    except UnsupportedArch:
        return True


def test_a_vision_model_beside_its_text_model_is_not_refused_by_its_names():
    from model_keys import read_keys

    names = {"vision_model.encoder.layers.0.layer_norm1.weight": (32,), "blk.0.attn_q.weight": (32, 32)}
    names |= {f"text_model.encoder.layers.{i}.mlp.fc1.weight": (32, 32) for i in range(12)}
    assert not refused(names, components.kinds.CLIP_VISION)
    assert refused(read_keys("flux-dev"), components.kinds.CLIP_VISION)
    assert refused({"encoder.block.0.layer.0.SelfAttention.q.weight": (32, 32)}, components.kinds.VAE)


def test_parameters_that_hosts_fill_or_never_use_may_be_missing(folder):
    coder = StageC_coder().state_dict()
    encoder = {key.removeprefix("encoder."): value for key, value in coder.items() if key.startswith("encoder.")}
    for filled in ("mean", "std"):
        del encoder[filled]
    write_floats(folder / "encoder.gguf", encoder)
    vae = load("VAELoaderGGUF", vae_name="encoder.gguf")
    assert isinstance(vae.first_stage_model, StageC_coder)
    model = torch.nn.ModuleDict({"embeddings": torch.nn.Linear(1, 1)})
    model.embeddings.register_parameter("mask_token", torch.nn.Parameter(torch.zeros(1)))
    assert not components._missing_in_parts(model, {"embeddings.weight", "embeddings.bias"})
    assert components._missing_in_parts(model, {"embeddings.weight"}) == ["embeddings.bias"]


def test_a_vision_model_whose_joined_weights_have_another_shape_is_refused(folder):
    write_gguf(folder / "v.gguf", {components._OPEN_CLIP: torch.zeros(1)})
    with pytest.raises(UnsupportedArch):
        load("CLIPVisionLoaderGGUF", clip_name="v.gguf")
