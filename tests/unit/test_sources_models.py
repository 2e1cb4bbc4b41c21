# SPDX-License-Identifier: Apache-2.0
"""Where the diffusion model is in a file of names: prefixes, leftovers of training, and files that hold none."""

from __future__ import annotations

import json

import pytest
import torch
from gguf_kit.errors import BadFile, UnsupportedArch
from gguf_kit.quantize import diffusers_keys, fp8, other_kinds, sources
from gguf_kit.quantize.containers import StoredTensor
from gguf_kit.quantize.sources import open_source
from model_keys import list_names, read_keys
from source_files import check_same, fail, model, save, save_torch

# --- prefixes and leftovers


@pytest.mark.parametrize("prefix", ["", *sources.PREFIXES])
def test_a_checkpoint_gives_its_diffusion_model_without_prefix(tmp_path, prefix):
    others = {"vae.decoder.conv_in.weight": torch.ones(1), "text_encoders.clip_l.x": torch.ones(1)} if prefix else {}
    tensors = model() | {"scalar": torch.tensor(1.0)}
    stored = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    source = open_source(save(tmp_path, stored | others))
    assert set(source.tensors) == set(tensors)
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)
    assert len(source.notes) == bool(prefix)
    assert not prefix or "2 tensors of VAE and text encoders left out" in source.notes[0]


def test_large_other_parts_do_not_hide_the_model(tmp_path):
    others = {f"conditioner.embedders.0.layer{i}": torch.ones(1) for i in range(100)}
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in model().items()}
    check_same(open_source(save(tmp_path, inside | others)), model())


@pytest.mark.parametrize("prefix", sources.PREFIXES)
def test_a_stray_key_under_a_prefix_takes_nothing_away(tmp_path, prefix):
    tensors = model() | {f"{prefix}stray": torch.ones(1)}
    assert set(open_source(save(tmp_path, tensors)).tensors) == set(tensors)


def test_a_stray_key_outside_the_prefix_is_left_out_and_counted(tmp_path):
    inside = {f"net.{name}": tensor for name, tensor in model().items()}
    source = open_source(save(tmp_path, inside | {"loss.logvar": torch.ones(1), "vae.x": torch.ones(1)}))
    check_same(source, model())
    assert "2 tensors of VAE and others left out" in source.notes[0]


def test_layers_that_only_metadata_names_are_not_counted_as_left_out(tmp_path):
    inside = {f"net.{name}": tensor for name, tensor in model().items()}
    layers = {"text_encoders.a": {"format": "float8_e4m3fn"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    assert open_source(save(tmp_path, inside, metadata=metadata)).notes == ()


def test_training_leftovers_are_taken_off(tmp_path):
    stored = {
        f"module._orig_mod.model.diffusion_model.{name.replace('blocks.', 'blocks._orig_mod.')}": t
        for name, t in model().items()
    }
    ema = {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in model(1).items()}
    source = open_source(save(tmp_path, stored | ema))
    check_same(source, model())
    assert source.notes == ("8 tensors with an average of the weights (EMA) left out",)


def test_names_that_fall_together_are_refused(tmp_path):
    stored = {f"module.{name}": tensor for name, tensor in model().items()} | {"blocks.0.w": torch.ones(1)}
    assert "names occur twice once prefixes are taken off: blocks.0.w." in fail(save(tmp_path, stored), BadFile)


@pytest.mark.parametrize("names", [("",), tuple(f"net.{x}" for x in ("", "a", "b"))])
def test_a_tensor_without_name_is_refused(tmp_path, names):
    assert "no name" in fail(save(tmp_path, {name: torch.ones(1) for name in names}), BadFile)


@pytest.mark.parametrize("name", list_names())
def test_real_models_are_let_through_under_any_prefix(name):
    keys = read_keys(name)
    stored = {key: StoredTensor(torch.bfloat16, shape, lambda: torch.empty(0)) for key, shape in keys.items()}
    for prefix in ("", "model.diffusion_model.", "model.", "module._orig_mod."):
        tensors, _ = sources._clean_names("x", {prefix + key: tensor for key, tensor in stored.items()})
        tensors, _ = sources._take_model("x", tensors)
        tensors, notes = fp8.undo_fp8("x", tensors)
        other_kinds.refuse("x", list(tensors))
        assert list(tensors) == list(keys)
        assert not notes
        assert not diffusers_keys.is_flux(tensors)


# --- what is no diffusion model

# What the message says, and some names of such a file.
NAMES = (
    ("a LoRA", "lora_unet_blocks_0_q.lora_up.weight lora_unet_blocks_0_q.lora_down.weight lora_unet_blocks_0_q.alpha"),
    ("a LoRA", "diffusion_model.blocks.0.q.lora_A.weight diffusion_model.blocks.0.q.lora_B.weight"),
    ("a LoRA", "transformer.blocks.0.q.lora_A.default.weight transformer.blocks.0.q.lora_B.default.weight"),
    ("a LoRA", "lycoris_blocks_0.lokr_w1 lycoris_blocks_0.lokr_w2 lycoris_blocks_0.alpha"),
    ("not merged", "blocks.0.q.base_layer.weight blocks.0.q.lora_A.default.weight a b c"),
    ("a ControlNet", "controlnet_cond_embedding.conv_in.weight down_blocks.0.resnets.0.conv1.weight conv_in.weight"),
    ("a ControlNet", "control_model.input_blocks.0.0.weight control_model.zero_convs.0.0.weight"),
    ("a ControlNet", "controlnet_blocks.0.weight x_embedder.weight transformer_blocks.0.attn.add_q_proj.weight"),
    ("a VAE", "encoder.conv_in.weight decoder.conv_in.weight decoder.up.0.block.0.conv1.weight quant_conv.weight"),
    ("a VAE", "first_stage_model.decoder.conv_in.weight first_stage_model.quant_conv.weight"),
    ("a VAE", "decoder.conv1.weight encoder.middle.0.residual.0.gamma conv1.weight"),
    ("TAESD", "1.weight 3.conv.0.weight 3.conv.0.bias"),
    ("only the text encoders", "cond_stage_model.transformer.x conditioner.embedders.0.y"),
    ("only the VAE and text encoders", "conditioner.embedders.0.y audio_vae.z"),
    ("an upscale model", "model.0.weight model.1.sub.0.RDB1.conv1.0.weight model.1.sub.0.RDB1.conv2.0.weight"),
    ("a part of a T5", "decoder.block.0.layer.0.SelfAttention.q.weight decoder.block.0.layer.0.layer_norm.weight x"),
    (
        "a part of a CLIP text",
        "text_model.encoder.layers.0.mlp.fc1.weight text_model.encoder.layers.0.mlp.fc2.weight x",
    ),
    ("a CLIP vision", "vision_model.encoder.layers.0.mlp.fc1.weight vision_model.embeddings.patch_embedding.weight"),
    (
        "a language model",
        "model.layers.0.self_attn.q_proj.weight model.embed_tokens.weight model.layers.0.mlp.w",
    ),
    ("a text encoder", "token_embd.weight blk.0.attn_q.weight"),
    ("a textual inversion", "clip_l clip_g"),
    ("an optimizer", "exp_avg.0 exp_avg_sq.0 step"),
    ("a motion module", "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"),
    ("an IP-Adapter", "image_proj.proj.weight ip_adapter.1.to_k_ip.weight"),
    ("a T2I-Adapter", "body.0.block1.weight body.0.in_conv.weight conv_in.weight"),
    ("a Redux", "redux_up.weight redux_down.weight"),
    ("a UNet in diff", "conv_in.weight down_blocks.0.resnets.0.conv1.weight time_embedding.linear_1.weight"),
    (
        "a Stable Diffusion 3 in diff",
        "transformer_blocks.0.attn.add_q_proj.weight pos_embed.proj.weight proj_out.w",
    ),
    ("a Flux.2 in diff", "x_embedder.weight single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"),
    ("a Chroma in diff", "distilled_guidance_layer.in_proj.weight transformer_blocks.0.attn.to_q.weight"),
    ("an AuraFlow in diff", "joint_transformer_blocks.0.attn.add_k_proj.weight single_transformer_blocks.0.x"),
    (
        "a PixArt in diff",
        "adaln_single.emb.timestep_embedder.linear_1.bias pos_embed.proj.bias transformer_blocks.0.attn1.to_q.weight",
    ),
    ("a Z-Image in diff", "noise_refiner.0.attention.to_q.weight layers.0.attention.to_q.weight"),
    ("a Lumina 2 in diff", "time_caption_embed.timestep_embedder.linear_1.weight layers.0.attn.to_q.weight"),
    ("a Wan in diff", "condition_embedder.time_embedder.linear_1.weight blocks.0.attn1.to_q.weight"),
    ("a HunyuanVideo in diff", "context_embedder.token_refiner.x.weight transformer_blocks.0.attn.to_q.weight"),
    ("an LTX-Video in diff", "time_embed.emb.timestep_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight"),
    ("a Cosmos in diff", "time_embed.t_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight"),
    ("a Mochi in diff", "time_embed.pooler.to_q.weight transformer_blocks.0.attn1.to_q.weight"),
    ("a CogVideoX in diff", "patch_embed.text_proj.weight transformer_blocks.0.norm1.linear.weight"),
    ("a Hunyuan-DiT in diff", "time_extra_emb.timestep_embedder.linear_1.weight blocks.0.attn1.to_q.weight"),
)


@pytest.mark.parametrize("as_checkpoint", [False, True])
@pytest.mark.parametrize(("said", "names"), NAMES, ids=[f"{i} {said}" for i, (said, _) in enumerate(NAMES)])
def test_what_is_no_diffusion_model_is_named_for_what_it_is(tmp_path, said, names, as_checkpoint):
    tensors = {name: torch.ones(1) for name in names.split()}
    path = save_torch(tmp_path, {"state_dict": tensors}) if as_checkpoint else save(tmp_path, tensors)
    assert said in fail(path, UnsupportedArch)


@pytest.mark.parametrize(
    "names",
    [
        "time_caption_embed.timestep_embedder.linear_1.weight layers.0.attn.to_q.weight ref_image_refiner.0.x",
        "layers.0.self_attn.q_proj.weight embed_tokens.weight layers.0.mlp.w t_embedder1.mlp.0.weight",
        "text_model.encoder.layers.0.x img_in.weight",
        "vision_model.encoder.layers.0.x x_embedder.proj.weight",
    ],
)
def test_a_diffusion_model_around_such_parts_is_let_through(tmp_path, names):
    assert set(open_source(save(tmp_path, {name: torch.ones(1) for name in names.split()})).tensors) == set(
        names.split()
    )


def test_every_kind_is_tested():
    titles = {other_kinds.recognise([n.removeprefix("model.") for n in names.split()]) for _, names in NAMES}
    untested = {"a vision part of a language model (mmproj)"}
    assert {kind.title for kind in other_kinds.KINDS} - {kind.title for kind in titles if kind} == untested
