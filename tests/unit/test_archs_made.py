# SPDX-License-Identifier: Apache-2.0
"""Architectures over a few keys made for the case: near misses, names, ranks, leftovers, models of no known kind."""

import dataclasses

import pytest
from gguf_kit.errors import UnsupportedArch
from gguf_kit.models import archs
from gguf_kit.models.archs import Category, Role

C = Category


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"blocks.0.weight": (32, 32)},
        {"model.layers.0.self_attn.q_proj.weight": (64, 64)},
        {"double_blocks.0.img_attn.proj.weight": (64, 64)},
        {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (64, 4)},
    ],
    ids=["nothing", "blocks", "language model", "part of a Flux", "LoRA"],
)
def test_what_is_no_known_diffusion_model_is_not_recognised(shapes):
    assert archs.detect(shapes) is None


def test_unclip_is_no_video_model():
    unclip = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "label_emb.0.0.weight": (1280, 2048),
    }
    assert [arch.name for arch in archs.find_all(unclip)] == ["sd1"]
    video = unclip | {"input_blocks.1.1.time_stack.0.attn1.to_q.weight": (320, 320)}
    assert [arch.name for arch in archs.find_all(video)] == ["svd"]


@pytest.mark.parametrize(
    "extra", [{"txt_in.weight": (64, 3584)}, {"double_blocks.0.img_mlp.gate_proj.weight": (64, 64)}]
)
def test_a_flux_with_another_text_encoder_is_still_a_flux(extra):
    shapes = {
        "double_blocks.0.img_attn.proj.weight": (64, 64),
        "img_in.weight": (64, 64),
        "vector_in.in_layer.weight": (64, 32),
        "txt_in.weight": (64, 2048),
    }
    assert [arch.title for arch in archs.find_all(shapes | extra)] == ["Flux.1 schnell"]


def test_leftovers_of_training_are_dropped():
    shapes = {
        "accum_iteration": (1,),
        "blocks.0.mlp._extra_state": (1,),
        "blocks.0.norm.num_batches_tracked": (),
        "blocks.0.mlp.layer1.weight": (64, 64),
    }
    assert list(archs.roles(archs.named("cosmos"), shapes)) == ["blocks.0.mlp.layer1.weight"]
    assert list(archs.roles(archs.GENERIC, shapes)) == ["blocks.0.mlp.layer1.weight"]


def test_blocks_are_counted_by_rank_so_a_pruned_model_has_no_holes():
    shapes = {f"double_blocks.{n}.img_attn.qkv.weight": (192, 64) for n in (0, 3, 10, 2)}
    roles = archs.roles(archs.named("flux"), shapes)
    assert [(role.block, role.n_blocks) for role in roles.values()] == [(0, 4), (2, 4), (3, 4), (1, 4)]


@pytest.mark.parametrize("name", ["flux", "FLUX", "z_image", "z-image", "zimage", "Qwen-Image", "generic"])
def test_an_architecture_is_found_by_name(name):
    assert archs.named(name).name.replace("_", "") == name.lower().replace("-", "").replace("_", "")
    assert not archs.named(name).reject


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UnsupportedArch, match=r"^'sd9' is no architecture .* Take one of: flux, flux2, .*, generic\.$"):
        archs.named("sd9")


def test_the_generic_policy_finds_blocks_of_any_name_and_keeps_bare_parameters():
    shapes = {"patcher.weight": (64, 16), "tower.0.scale_shift_table": (6, 64), "tower.0.bank": (64, 64)} | {
        f"tower.{n}.{name}.weight": (64, 64) for n in range(3) for name in ("sa.to_v", "mlp.fc2", "strange")
    }
    roles = archs.roles(archs.GENERIC, shapes)
    assert roles["patcher.weight"] == Role(C.EMBED)
    assert roles["tower.0.scale_shift_table"].f32
    assert roles["tower.0.bank"] == Role(C.EMBED, 0, 3)
    assert roles["tower.2.sa.to_v.weight"] == Role(C.ATTN_V, 2, 3)
    assert roles["tower.1.mlp.fc2.weight"] == Role(C.FFN_DOWN, 1, 3)
    assert roles["tower.1.strange.weight"] == Role(C.OTHER, 1, 3)


def test_entries_cannot_be_changed():
    arch = archs.named("flux")
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.name = "other"
    with pytest.raises(TypeError):
        arch.detect["key"] = None
