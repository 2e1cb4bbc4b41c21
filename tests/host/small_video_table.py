# SPDX-License-Identifier: Apache-2.0
"""Rows like those of small_model_table.py: models of video, sound, space and vision, and variants of them."""

from __future__ import annotations

import builtins
import json

import torch
from small_model_table import COSMOS, HUNYUAN, SMALL_MODELS, VIDEO, WAN, WAN_TEXT, wan
from small_models import Small

CLIP = (1, 257, 1280)


def config(**transformer: object) -> dict[str, str]:
    """Metadata with which a file says what its keys do not."""
    return {"config": json.dumps({"transformer": transformer})}


def one_block(*bounds: int) -> range:
    """In place of the built-in range where a class counts its blocks by it."""
    return builtins.range(min(bounds[0], 1)) if len(bounds) == 1 else builtins.range(*bounds)


def wandancer(conditions: dict) -> Small:
    inputs = {"c_concat": (1, 20, 1, 4, 8), "clip_fea": CLIP, "audio_embed": (1, 8, 35)}
    return Small(
        "WAN22_WanDancer",
        "WanDancer",
        WAN | {"model_type": "wandancer", "in_dim": 36},
        {"audio_inject_layers": [0]},
        (1, 16, 1, 4, 8),
        WAN_TEXT,
        inputs | conditions,
    )


I2V = {"model_type": "i2v", "in_dim": 36}
WAN_ROWS = {
    "wan camera 2.2": wan(
        "WAN22_Camera",
        "Wan Camera",
        {"model_type": "camera_2.2", "in_dim": 36},
        {"c_concat": (1, 20, 1, 4, 4), "camera_conditions": (1, 24, 1, 32, 32)},
    ),
    "wan fun control": wan(
        "WAN21_FunControl2V",
        "Wan",
        {"model_type": "i2v", "in_dim": 48},
        {"c_concat": (1, 32, 1, 4, 4), "clip_fea": CLIP},
    ),
    "wan fun control with a reference": wan(
        "WAN21_T2V",
        "Wan",
        {"in_dim": 52, "in_dim_ref_conv": 16},
        {"c_concat": (1, 36, 1, 4, 4), "reference_latent": (1, 16, 4, 4)},
    ),
    "wan 2.2 i2v": wan("WAN21_T2V", "Wan", {"in_dim": 36}, {"c_concat": (1, 20, 1, 4, 4)}),
    "wan first and last frame": wan(
        "WAN21_I2V",
        "Wan",
        I2V | {"flf_pos_embed_token_number": 8},
        {"c_concat": (1, 20, 1, 4, 4), "clip_fea": (1, 8, 1280)},
    ),
    "phantom": wan("WAN21_T2V", "Wan", {}, {"time_dim_concat": (1, 16, 1, 4, 4)}),
    "wan causal": Small("WAN21_CausalAR_T2V", "Wan", WAN, {}, VIDEO, WAN_TEXT, metadata=config(causal_ar=True)),
    "wan flow rvs": Small(
        "WAN21_FlowRVS",
        "Wan",
        WAN | {"model_type": "flow_rvs"},
        {},
        VIDEO,
        WAN_TEXT,
        metadata=config(model_type="flow_rvs"),
    ),
    "wan animate 2": Small(
        "WAN_Animate2",
        "Wan",
        WAN | I2V | {"model_type": "animate2"},
        {},
        (1, 16, 2, 4, 4),
        WAN_TEXT,
        {"c_concat": (1, 20, 2, 4, 4), "clip_fea": CLIP, "pose_latents": (1, 16, 1, 4, 4)},
        metadata=config(model_type="animate2"),
    ),
    "wan animate with a face": Small(
        "WAN22_Animate",
        "Wan Animate",
        WAN | {"model_type": "animate", "in_dim": 36, "num_layers": 5},
        {},
        (1, 16, 2, 4, 4),
        WAN_TEXT,
        {
            "c_concat": (1, 20, 2, 4, 4),
            "clip_fea": CLIP,
            "pose_latents": (1, 16, 1, 4, 4),
            "face_pixel_values": (1, 3, 1, 512, 512),
        },
    ),
    "wan vace with two contexts": wan(
        "WAN21_Vace",
        "Wan VACE",
        {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        {"vace_context": (1, 2, 96, 1, 4, 4), "vace_strength": [1.0, 0.5]},
    ),
    "wan s2v with motion": Small(
        "WAN22_S2V",
        "Wan S2V",
        WAN | {"model_type": "s2v"},
        {"audio_inject_layers": [0], "audio_dim": 1024, "num_audio_token": 4},
        (1, 16, 1, 8, 8),
        WAN_TEXT,
        {
            "audio_embed": (1, 25, 1024, 4),
            "reference_latent": (1, 16, 1, 8, 8),
            "reference_motion": (1, 16, 19, 8, 8),
            "control_video": (1, 16, 1, 8, 8),
        },
    ),
    "humo small": wan(
        "WAN21_HuMo",
        "HuMo",
        {"model_type": "humo"},
        {"audio_embed": (1, 1, 8, 5, 1280), "reference_latent": (1, 16, 1, 4, 4)},
    ),
    "scail with a pose": wan(
        "WAN21_SCAIL",
        "SCAIL",
        {"model_type": "scail", "in_dim": 20},
        {
            "clip_fea": CLIP,
            "c_concat": (1, 4, 1, 4, 4),
            "pose_latents": (1, 20, 1, 2, 2),
            "reference_latent": (1, 20, 1, 4, 4),
        },
    ),
    "scail 2": wan(
        "WAN21_SCAIL2",
        "SCAIL 2",
        {"model_type": "scail2", "in_dim": 20},
        {
            "clip_fea": CLIP,
            "c_concat": (1, 4, 1, 4, 4),
            "pose_latents": (1, 20, 1, 2, 2),
            "reference_latent": (1, 20, 1, 4, 4),
            "sam_latents": (1, 28, 1, 2, 2),
            "ref_mask_latents": (1, 28, 2, 4, 4),
        },
    ),
    "wandancer": wandancer({"clip_fea_ref": CLIP}),
    "wandancer at another rate": wandancer({"fps": 24}),
}

SCHEDULE = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([0.5, 0.0])}
HUNYUAN_INPUTS = {"y": (1, 768), "guidance": (1,)}
HUNYUAN15 = SMALL_MODELS["hunyuan video 1.5"].found
HUNYUAN_ROWS = {
    "hunyuan video i2v": Small(
        "HunyuanVideoI2V",
        "HunyuanVideo",
        HUNYUAN | {"in_channels": 33},
        latent=VIDEO,
        conditions=HUNYUAN_INPUTS | {"c_concat": (1, 17, 1, 4, 4), "guiding_frame_index": (1,)},
    ),
    "skyreels": Small(
        "HunyuanVideoSkyreelsI2V",
        "HunyuanVideo",
        HUNYUAN | {"in_channels": 32},
        latent=VIDEO,
        conditions=HUNYUAN_INPUTS | {"c_concat": (1, 16, 1, 4, 4)},
    ),
    "hunyuan custom": Small(
        "HunyuanVideo",
        "HunyuanVideo",
        HUNYUAN | {"guidance_embed": False},
        latent=VIDEO,
        conditions={"y": (1, 768), "ref_latent": (1, 16, 1, 4, 4)},
    ),
    "hunyuan video 1.5 i2v": Small(
        "HunyuanVideo15",
        "HunyuanVideo 1.5",
        HUNYUAN15 | {"meanflow": True},
        latent=(1, 32, 1, 4, 4),
        conditions={
            "c_concat": (1, 33, 1, 4, 4),
            "txt_byt5": (1, 3, 1472),
            "clip_fea": (1, 9, 1152),
            "transformer_options": SCHEDULE,
        },
    ),
    "hunyuan video 1.5 sr": Small(
        "HunyuanVideo15_SR_Distilled",
        "HunyuanVideo 1.5",
        HUNYUAN15 | {"in_channels": 98},
        latent=(1, 32, 1, 4, 4),
        conditions={"c_concat": (1, 66, 1, 4, 4), "txt_byt5": (1, 3, 1472), "disable_time_r": False},
    ),
}

COSMOS1 = SMALL_MODELS["cosmos 1"]
COSMOS_ROWS = {
    "cosmos 1 i2v": Small(
        "CosmosI2V",
        "Cosmos 1",
        dict(COSMOS1.found) | {"in_channels": 17},
        COSMOS1.fixed,
        VIDEO,
        (1, 3, 1024),
        {"fps": 24.0, "c_concat": (1, 1, 1, 4, 4)},
    ),
    "cosmos predict2 i2v": Small(
        "CosmosI2VPredict2",
        "Cosmos Predict2",
        COSMOS | {"in_channels": 17},
        {"num_blocks": 1, "num_heads": 1, "adaln_lora_dim": 32, "extra_per_block_abs_pos_emb": False},
        VIDEO,
        (1, 3, 1024),
        {"c_concat": (1, 1, 1, 4, 4), "denoise_mask": (1, 1, 1, 4, 4), "fps": 24.0},
    ),
}

# The least of what the host tells these by: 320 channels and eight blocks, six of them with attention.
SVD = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 8,
    "out_channels": 4, "num_classes": "sequential", "adm_in_channels": 768, "use_temporal_attention": True,
    "use_temporal_resblock": True, "model_channels": 320, "num_res_blocks": [8], "channel_mult": [1],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": -1, "context_dim": 1024,
    "transformer_depth_output": [0] * 9, "use_linear_in_transformer": True, "extra_ff_mix_layer": True,
    "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
}  # fmt: skip


def svd(host_class: str, n_vector: int) -> Small:
    return Small(
        host_class,
        "Stable Video Diffusion",
        SVD | {"adm_in_channels": n_vector},
        {},
        (2, 4, 8, 8),
        (2, 1, 1024),
        {"y": (2, n_vector), "c_concat": (2, 4, 8, 8), "num_video_frames": 2},
    )


SVD_ROWS = {
    "svd": svd("SVD_img2vid", 768),
    "sv3d": svd("SV3D_u", 256),
    "sv3d with a path": svd("SV3D_p", 1280),
}

SECONDS = {
    "embedder.embedding.0.weights": (128,),
    "embedder.embedding.1.weight": (768, 257),
    "embedder.embedding.1.bias": (768,),
}
STABLE_AUDIO = {
    "audio_model": "dit1.0", "global_cond_dim": 64, "project_cond_tokens": False, "embed_dim": 128,
    "timestep_features_type": "learned", "io_channels": 64, "input_concat_dim": 0, "depth": 1,
}  # fmt: skip
AUDIO_ROWS = {
    "stable audio": Small(
        "StableAudio",
        "Stable Audio",
        STABLE_AUDIO,
        {"num_heads": 2, "cond_token_dim": 64, "embed_dim": 128, "global_cond_dim": 64, "depth": 1},
        (1, 64, 10),
        (1, 3, 64),
        {"global_embed": (1, 64)},
        {
            f"conditioner.conditioners.{name}.{key}": shape
            for name in ("seconds_start", "seconds_total")
            for key, shape in SECONDS.items()
        },
    ),
    "stable audio 3": Small(
        "StableAudio3",
        "Stable Audio",
        STABLE_AUDIO
        | {
            "num_memory_tokens": 4,
            "attn_kwargs": {"qk_norm": "rms", "differential": True},
            "norm_type": "rms_norm",
            "num_heads": 2,
            "timestep_features_type": "expo",
            "local_add_cond_dim": 65,
            "global_cond_shared_embed": True,
            "global_cond_type": "adaLN",
        },
        {"cond_token_dim": 64},
        (1, 64, 10),
        (1, 3, 64),
        {"global_embed": (1, 64), "local_add_cond": (1, 65, 10)},
        {
            "conditioner.conditioners.seconds_total.embedder.embedding.1.weight": (768, 256),
            "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": (768,),
            "conditioner.conditioners.prompt.padding_embedding": (64,),
        },
    ),
    "minimax music 3": Small(
        "MiniMaxMusic3",
        "MiniMax Music 3",
        {"audio_model": "minimax_music3"},
        {},
        (1, 128, 10),
        (1, 3, 32768),
        {"conditioning_scale": (1, 1, 1)},
        shrink={"comfy.ldm.minimax_music.dit:range": one_block},
    ),
}

H3 = SMALL_MODELS["minimax h3"]
H3_ROWS = {
    "minimax h3 with curves": Small(
        H3.host_class,
        H3.title,
        {key: value for key, value in H3.found.items() if key not in ("timestep_input_dim", "time_embed_hidden_size")}
        | {"adaln_curve_grid": 16},
        H3.fixed,
        H3.latent,
        H3.context,
        H3.conditions,
    ),
}

LTX2 = SMALL_MODELS["ltx-2"]
LTX23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True,
}
LTX25 = LTX23 | {"ff_bias": False, "audio_ff_bias": False}
LTX_ROWS = {
    "ltx-2.3": Small(
        LTX2.host_class,
        LTX2.title,
        dict(LTX2.found) | LTX23,
        LTX2.fixed,
        LTX2.latent,
        (1, 3, 256 + 128),
        LTX2.conditions,
        metadata=config(**LTX23),
    ),
    "ltx-2.5": Small(
        LTX2.host_class,
        LTX2.title,
        dict(LTX2.found) | LTX25 | {"use_keyframes_abs_pos_embedding": True},
        LTX2.fixed,
        LTX2.latent,
        (1, 3, 256 + 128),
        LTX2.conditions,
        metadata=config(**LTX25),
    ),
}

HUNYUAN3D = {
    "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0,
    "depth": 1, "depth_single_blocks": 1, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
SPACE_ROWS = {
    "hunyuan 3d 2": Small(
        "Hunyuan3Dv2", "Hunyuan3D 2", HUNYUAN3D, {"num_heads": 2}, (1, 64, 4), conditions={"guidance": (1,)}
    ),
    "hunyuan 3d 2 mini": Small(
        "Hunyuan3Dv2mini",
        "Hunyuan3D 2",
        HUNYUAN3D | {"depth": 8, "guidance_embed": True},
        {"num_heads": 2},
        (1, 64, 4),
        conditions={"guidance": (1,)},
    ),
    "hunyuan 3d 2.1": Small(
        "Hunyuan3Dv2_1",
        "Hunyuan3D 2.1",
        {"image_model": "hunyuan3d2_1", "in_channels": 64, "hidden_size": 128, "depth": 3, "qkv_bias": False},
        {"num_heads": 2, "context_dim": 64, "num_moe_layers": 1, "guidance_cond_proj_dim": None},
        (2, 64, 4),
        (2, 3, 64),
    ),
    "triposplat": Small(
        "TripoSplat",
        "TripoSplat",
        {"image_model": "triposplat"},
        {
            "q_token_length": 4,
            "model_channels": 128,
            "cond_channels": 64,
            "num_blocks": 1,
            "num_refiner_blocks": 1,
            "num_heads": 2,
        },
        (1, 1, 4 * 16 + 5),
        (1, 6, 64),
        {"latent_shapes": [[1, 4, 16], [1, 1, 5]], "ref_latents": None},
    ),
}

COGVIDEO = SMALL_MODELS["cogvideox"].found
COGVIDEO_ROWS = {
    "cogvideox i2v": Small(
        "CogVideoX_I2V",
        "CogVideoX",
        dict(COGVIDEO) | {"in_channels": 32},
        {},
        VIDEO,
        conditions={"c_concat": (1, 16, 1, 4, 4)},
    ),
    "cogvideox 1.5 i2v": Small(
        "CogVideoX_I2V",
        "CogVideoX",
        dict(COGVIDEO) | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 64},
        {},
        (1, 16, 2, 4, 4),
        conditions={"c_concat": (1, 16, 2, 4, 4), "ofs": (1,)},
    ),
    "cogvideox inpainting": Small(
        "CogVideoX_Inpaint",
        "CogVideoX",
        dict(COGVIDEO) | {"in_channels": 48},
        {},
        VIDEO,
        conditions={"c_concat": (1, 32, 1, 4, 4)},
    ),
}

SEEDVR = SMALL_MODELS["seedvr2"]
SEEDVR_7B = {
    "image_model": "seedvr2",
    "num_layers": 36,
    "mm_layers": 36,
    "norm_eps": 1e-5,
    "rope_type": "rope3d",
    "rope_dim": 64,
    "mlp_type": "normal",
}
SEEDVR_ROWS = {
    "seedvr2 7b": Small(
        "SeedVR2",
        "SeedVR2",
        SEEDVR_7B,
        {"vid_dim": 128, "heads": 1},
        SEEDVR.latent,
        SEEDVR.context,
        SEEDVR.conditions,
        # The host tells it by its 3072 channels, which are no test's.
        shrink={"comfy.model_detection:detect_unet_config": lambda *args, **options: dict(SEEDVR_7B)},
    ),
    "seedvr2 7b shared": Small(
        "SeedVR2",
        "SeedVR2",
        SEEDVR_7B | {"mm_layers": 10, "mlp_type": "swiglu"},
        {"vid_dim": 128, "heads": 1},
        SEEDVR.latent,
        SEEDVR.context,
        SEEDVR.conditions,
    ),
}


def sam(name: str) -> Small:
    return Small(
        name,
        "unrecognised model",
        {"image_model": name},
        {
            "embed_dim": 128,
            "d_model": 64,
            "depth": 2,
            "global_att_blocks": (1,),
            "window_size": 8,
            "img_size": 224,
            "pretrain_img_size": 56,
        },
        (1, 3, 224, 224),
        None,
        {"text_embeddings": (1, 3, 128)},
        is_network=True,
    )


VISION_ROWS = {
    "depth anything 3": Small(
        "DepthAnything3",
        "unrecognised model",
        {
            "image_model": "DepthAnything3",
            "backbone_name": "vits",
            "out_layers": [5, 7, 9, 11],
            "head_type": "dpt",
            "head_dim_in": 384,
            "head_features": 64,
            "head_out_channels": [48, 96, 192, 384],
            "head_output_dim": 1,
            "head_use_sky_head": True,
        },
        {},
        (1, 3, 28, 28),
        None,
        is_network=True,
    ),
    "rt-detr": Small(
        "RT_DETR_v4",
        "unrecognised model",
        {"image_model": "RT_DETR_v4", "enc_h": 256},
        {},
        (1, 3, 640, 640),
        None,
        is_network=True,
    ),
    "sam 3": sam("SAM3"),
    "sam 3.1": sam("SAM31"),
}

SMALL_VIDEO_MODELS: dict[str, Small] = {
    **WAN_ROWS,
    **HUNYUAN_ROWS,
    **COSMOS_ROWS,
    **SVD_ROWS,
    **AUDIO_ROWS,
    **H3_ROWS,
    **LTX_ROWS,
    **SPACE_ROWS,
    **COGVIDEO_ROWS,
    **SEEDVR_ROWS,
    **VISION_ROWS,
}
