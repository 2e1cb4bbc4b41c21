# SPDX-License-Identifier: Apache-2.0
"""Files of any kind: what they are, and their tensors under the names and in the shapes that ComfyUI reads."""

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import UnsupportedArch
from gguf_kit.loader import load_component
from gguf_kit.models import kinds
from gguf_kit.models.joined import lacking_parts
from gguf_kit.models.values import QuantizedBytes
from model_keys import list_encoders, list_names, read_keys


def write(path, tensors, metadata=()):
    writer = gguf.GGUFWriter(path, "pig")
    for key, value in metadata:
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_array if isinstance(value, list) else add)(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, gguf.quants.quantize(*value), raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_all_tensors_keep_their_names_and_kernels_get_their_dimensions(tmp_path, caplog):
    kernel = np.arange(144, dtype=np.float32).reshape(2, 3, 3, 2, 4)
    matrix = np.ones((2, 64), np.float32)
    tensors = {
        "decoder.conv_in.weight": kernel.reshape(6, 3, 2, 4),
        "decoder.conv_in.bias": np.zeros(2, np.float32),
        "decoder.mid.attn_1.q.weight": (matrix, gguf.GGMLQuantizationType.Q8_0),
        "model.diffusion_model.other": np.zeros(1, np.float32),
    }
    path = write(tmp_path / "vae.gguf", tensors, [("comfy.gguf.orig_shape.decoder.mid.attn_1.q.weight", [2, 64, 1, 1])])
    with caplog.at_level("INFO", "gguf_kit"):
        state, info = load_component(path)
    assert {*state} == {*tensors}
    assert torch.equal(state["decoder.conv_in.weight"], torch.from_numpy(kernel))
    assert isinstance(state["decoder.mid.attn_1.q.weight"], QuantizedBytes)
    assert state["decoder.mid.attn_1.q.weight"].shape == (2, 64, 1, 1)
    assert info.title == "a VAE"
    assert "vae.gguf: a VAE (tagged pig), 4 tensors" in caplog.text


PAIR = ("double_blocks.0.proj.weight.lora_a", "double_blocks.0.proj.weight.lora_b")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "text_encoders.t5xxl.transformer."])
def test_pairs_of_factors_get_the_names_and_the_alpha_that_comfyui_reads(tmp_path, prefix):
    values = [np.full((4, 8), float(i), np.float32) for i in range(2)]
    tensors = {prefix + name: value for name, value in zip(PAIR, values, strict=True)}
    state, info = load_component(write(tmp_path / "lora.gguf", tensors, [("adapter.lora.alpha", 8.0)]))
    layer = (prefix or "diffusion_model.") + "double_blocks.0.proj"
    assert {*state} == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.alpha"}
    assert state[f"{layer}.alpha"].item() == 8.0
    for side, value in zip("AB", values, strict=True):
        assert torch.equal(state[f"{layer}.lora_{side}.weight"], torch.from_numpy(value))
    assert info.title == "a LoRA"


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", None),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", None),
        ("lycoris_blocks_0_x", None),
        ("model.diffusion_model.blocks.0.x", "diffusion_model.blocks.0.x"),
        ("text_encoding.x", "diffusion_model.text_encoding.x"),
    ],
)
def test_names_that_comfyui_knows_stay(tmp_path, layer, name):
    value, alpha = np.zeros((4, 8), np.float32), np.full(1, 2, np.float32)
    tensors = {f"{layer}.lora_a": value, f"{layer}.lora_b": value, f"{layer}.alpha": alpha}
    state, _ = load_component(write(tmp_path / "lora.gguf", tensors, [("adapter.lora.alpha", 8.0)]))
    name = name or layer
    assert {*state} == {f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"}
    assert state[f"{name}.alpha"].item() == 2.0


def test_pairs_without_alpha_get_none(tmp_path):
    state, _ = load_component(write(tmp_path / "lora.gguf", {name: np.zeros((4, 8), np.float32) for name in PAIR}))
    assert not [key for key in state if key.endswith("alpha")]


def test_a_lora_in_its_own_names_stays_as_it_is(tmp_path):
    names = ("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight", "lora_unet_x.alpha", "y.lora_A.weight")
    state, _ = load_component(write(tmp_path / "lora.gguf", {name: np.zeros((4, 8), np.float32) for name in names}))
    assert {*state} == {*names}


def test_a_lora_for_llama_cpp_s_models_is_refused(tmp_path):
    tensors = {
        name: np.zeros((4, 8), np.float32) for name in ("token_embd.weight.lora_a", "blk.3.ffn_up.weight.lora_b")
    }
    with pytest.raises(UnsupportedArch, match=r"lora\.gguf: it is a LoRA for a language model in llama.cpp's names"):
        load_component(write(tmp_path / "lora.gguf", tensors))


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["encoder.conv_in.weight", "decoder.conv_out.bias"], "a VAE"),
        (["decoder.middle.0.residual.0.gamma"], "a VAE"),
        (["taesd_decoder.1.weight"], "a VAE"),
        (["vision_model.embeddings.class_embedding"], "a CLIP vision model"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "a CLIP vision model"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"], "a ControlNet"),
        (["lora_controlnet", "input_blocks.1.0.in_layers.2.up"], "a ControlNet"),
        (["lora_unet_a.lora_up.weight", "lora_unet_a.alpha"], "a LoRA"),
        (["diffusion_model.a.lokr_w1"], "a LoRA"),
        (["a.weight.lora_a"], "a LoRA"),
        (["controlnet_blocks.0.y_rms.weight", "img_in.weight"], "a model patch"),
        (["control_model.input_hint_block.0.weight", "project_modules.0.param"], "a model patch"),
        (["blocks.0.block.0.conv.weight", "in_conv.conv.weight"], "a latent upscale model"),
        (["v.blk.0.attn_q.weight", "mm.0.weight"], "the vision part (mmproj) of a text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder"),
    ],
)
def test_kinds_are_told_by_their_names(names, title):
    assert kinds.what_is({name: (4, 4) for name in names}).title == title


def test_diffusion_models_and_checkpoints_are_told_apart():
    shapes = read_keys("flux-dev")
    assert kinds.what_is(shapes).title.startswith("a diffusion model (")
    prefixed = {f"model.diffusion_model.{key}": shape for key, shape in shapes.items()}
    assert kinds.what_is(prefixed).title.startswith("a diffusion model (")
    prefixed["first_stage_model.decoder.conv_in.weight"] = (512, 16, 3, 3)
    assert kinds.what_is(prefixed).title == "a whole checkpoint"
    assert kinds.what_is({"unknown": (4,)}) is None


@pytest.mark.parametrize("name", [*list_names(), *list_encoders()])
def test_no_model_that_has_another_loader_is_taken_for_a_component(name):
    kind = kinds.what_is(read_keys(name))
    assert kind is None or kind.title.startswith("a diffusion model (" if name in list_names() else "a text encoder")


def test_parts_of_joined_weights_are_all_there_or_none():
    block, single = "transformer_blocks.0.attn", "single_transformer_blocks.3."
    whole = [f"{block}.to_{x}.weight" for x in "qkv"] + [f"{block}.add_{x}_proj.bias" for x in "qkv"]
    whole += [f"{single}attn.to_{x}.weight" for x in "qkv"] + [f"{single}proj_mlp.weight", f"{block}.to_out.0.weight"]
    assert not lacking_parts(whole)
    for name in whole[:-1]:
        assert lacking_parts([other for other in whole if other != name]) == [name]
