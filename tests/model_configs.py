# SPDX-License-Identifier: Apache-2.0
"""Published models and the arguments that build them from ComfyUI's classes. make_keys.py uses these tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A published name and the one that ComfyUI gives it when it loads the file.
Rename = tuple[str, str]


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        title: what it is called.
        host_class: the name of ComfyUI's class for it in comfy.supported_models.
        built_by: module and class below comfy.ldm, as `flux.model:Flux`.
        config: arguments of that class.
        renames: patterns of ComfyUI's keys and what stands there in published files, each applied in turn.
        computes: building it needs the values of some small tensors; the others take address space, no memory.
    """

    title: str
    host_class: str
    built_by: str
    config: Mapping[str, Any]
    renames: tuple[Rename, ...] = ()
    computes: bool = False


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX | {
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "patch_size": 1,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}
FLUX2_DEV = {"context_in_dim": 15360, "hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48}
FLUX2_4B = {"context_in_dim": 7680, "depth": 5, "depth_single_blocks": 20, "guidance_embed": False}
FLUX2_9B = {
    "context_in_dim": 12288,
    "hidden_size": 4096,
    "num_heads": 32,
    "depth": 8,
    "depth_single_blocks": 24,
    "guidance_embed": False,
}
CHROMA = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | {
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
RADIANCE = CHROMA | {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 4,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
SD1 = UNET | {"context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False}
SD2 = UNET | {"context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True}
SDXL = SD2 | {
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "context_dim": 2048,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
CASCADE_B = {
    "c_hidden": [320, 576, 1152, 1152],
    "nhead": [-1, 9, 18, 18],
    "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}
CASCADE_C = {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}
UNCLIP = {"num_classes": "sequential", "adm_in_channels": 1536}
REFINER = SDXL | {
    "adm_in_channels": 2560,
    "model_channels": 384,
    "context_dim": 1280,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_middle": 4,
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
}
SSD_1B = {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_middle": -1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
}


def mmdit(depth: int, max_size: int, **more: Any) -> dict[str, Any]:
    """Stable Diffusion 3: hidden size 64 * depth, a position table of max_size * max_size patches."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return {
        "input_size": None,
        "in_channels": 16,
        "out_channels": 16,
        "depth": depth,
        "adm_in_channels": 2048,
        "context_embedder_config": context,
        "num_patches": max_size**2,
        "pos_embed_max_size": max_size,
    } | more


HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "use_adaln_lora": True,
    "pos_emb_cls": "rope3d",
}
COSMOS1_7B = COSMOS | {
    "model_channels": 4096,
    "num_blocks": 28,
    "num_heads": 32,
    "affline_emb_norm": True,
    "block_x_format": "THWBD",
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
PREDICT2_2B = COSMOS | {"model_channels": 2048, "num_blocks": 28, "num_heads": 16, "pos_emb_learnable": True}
LTXV_13B = {"cross_attention_dim": 4096, "attention_head_dim": 128, "num_layers": 48}
LTX23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_layers": 8,
    "connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN15 = HUNYUAN | {
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "hidden_size": 2048,
    "num_heads": 16,
    "depth": 54,
    "depth_single_blocks": 0,
    "patch_size": [1, 1, 1],
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}
HUNYUAN_IMAGE = HUNYUAN | {
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "hidden_size": 3584,
    "num_heads": 28,
    "axes_dim": [64, 64],
    "patch_size": [1, 1],
    "guidance_embed": False,
    "byt5": True,
}
HUNYUAN_REFINER = HUNYUAN_IMAGE | {
    "in_channels": 128,
    "hidden_size": 3328,
    "num_heads": 26,
    "depth_single_blocks": 40,
    "axes_dim": [16, 56, 56],
    "patch_size": [1, 1, 1],
    "byt5": False,
}
WAN_1B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
WAN_5B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48}
WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
WAN_I2V = WAN_14B | {"model_type": "i2v", "in_dim": 36}
LUMINA2 = {
    "in_channels": 16,
    "dim": 2304,
    "n_layers": 26,
    "n_heads": 24,
    "n_kv_heads": 8,
    "cap_feat_dim": 2304,
    "axes_dims": [32, 32, 32],
    "qk_norm": True,
}
ZIMAGE = LUMINA2 | {
    "dim": 3840,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}
NEWBIE = LUMINA2 | {"n_layers": 36, "cap_feat_dim": 2560, "clip_text_dim": 1024}
ZIMAGE_PIXELS = ZIMAGE | {"in_channels": 3, "patch_size": 32, "decoder_hidden_size": 3840}
KANDINSKY5_IMAGE = {
    "model_dim": 2560,
    "ff_dim": 10240,
    "visual_embed_dim": 64,
    "num_visual_blocks": 50,
    "axes_dims": (32, 48, 48),
}
OMNIGEN2 = {
    "hidden_size": 2520,
    "num_layers": 32,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "axes_dim_rope": (40, 40, 40),
    "text_feat_dim": 2048,
}
MOCHI = {
    "depth": 48,
    "num_heads": 24,
    "hidden_size_x": 3072,
    "hidden_size_y": 1536,
    "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "use_t5": True,
}
HUNYUAN_DIT = {"depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
SEEDVR2_3B = {"num_layers": 32, "norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True}
ACE_STEP = {
    "attention_head_dim": 128,
    "inner_dim": 2560,
    "mlp_ratio": 2.5,
    "num_attention_heads": 20,
    "num_layers": 24,
    "ssl_encoder_depths": [8, 8],
    "lyric_encoder_vocab_size": 6693,
}
SEEDVR2_7B = {
    "vid_dim": 3072,
    "heads": 24,
    "num_layers": 36,
    "norm_eps": 1e-5,
    "rope_type": "rope3d",
    "rope_dim": 64,
}
SVD = UNET | {
    "in_channels": 8,
    "context_dim": 1024,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 768,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
}
STABLE_AUDIO3 = {
    "num_memory_tokens": 64,
    "attn_kwargs": {"qk_norm": "rms", "differential": True},
    "norm_type": "rms_norm",
    "timestep_features_type": "expo",
    "local_add_cond_dim": 65,
    "global_cond_shared_embed": True,
    "global_cond_type": "adaLN",
}
COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

SCALE_NORMS = ((r"(\.(?:query|key)_norm|\.norms\.\d+|nerf_.*\.norm)\.weight$", r"\1.scale"),)
TENCENT = (
    (r"^(txt_in\.individual_.*)\.norm\.(query|key)_norm\.", r"\1.\2_norm."),
    (r"(img|txt)_attn\.norm\.query_norm\.", r"\1_attn_q_norm."),
    (r"(img|txt)_attn\.norm\.key_norm\.", r"\1_attn_k_norm."),
    (r"\.norm\.query_norm\.", ".q_norm."),
    (r"\.norm\.key_norm\.", ".k_norm."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_mod\.lin\.", "_mod.linear."),
    (r"\.modulation\.lin\.", ".modulation.linear."),
    (r"(_mlp|\.mlp)\.0\.", r"\1.fc1."),
    (r"(_mlp|\.mlp)\.2\.", r"\1.fc2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"^txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
    (r"^txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
    (r"^(time|guidance)_in\.in_layer\.", r"\1_in.mlp.0."),
    (r"^(time|guidance)_in\.out_layer\.", r"\1_in.mlp.2."),
)

FLUX_CLASS, UNET_CLASS = "flux.model:Flux", "modules.diffusionmodules.openaimodel:UNetModel"
MMDIT_CLASS, WAN_CLASS = "modules.diffusionmodules.mmdit:MMDiT", "wan.model:WanModel"
HUNYUAN_CLASS, LUMINA_CLASS = "hunyuan_video.model:HunyuanVideo", "lumina.model:NextDiT"
LTXAV_CLASS, QWEN_CLASS = "lightricks.av_model:LTXAVModel", "qwen_image.model:QwenImageTransformer2DModel"
CHROMA_CLASS, PREDICT2_CLASS = "chroma.model:Chroma", "cosmos.predict2:MiniTrainDIT"
PIXART_CLASS = "pixart.pixartms:PixArtMS"
RADIANCE_CLASS = "chroma_radiance.model:ChromaRadiance"
AUDIO_CLASS, SEEDVR_CLASS = "audio.dit:AudioDiffusionTransformer", "seedvr.model:NaDiT"
COGVIDEO_CLASS = "cogvideo.model:CogVideoXTransformer3DModel"

MODELS: dict[str, Model] = {
    "flux-dev": Model("FLUX.1 dev", "Flux", FLUX_CLASS, FLUX, SCALE_NORMS),
    "flux-schnell": Model("FLUX.1 schnell", "FluxSchnell", FLUX_CLASS, FLUX | {"guidance_embed": False}, SCALE_NORMS),
    "flux-fill": Model("FLUX.1 Fill", "FluxInpaint", FLUX_CLASS, FLUX | {"in_channels": 96}, SCALE_NORMS),
    "flux-canny": Model("FLUX.1 Canny or Depth", "Flux", FLUX_CLASS, FLUX | {"in_channels": 32}, SCALE_NORMS),
    "flux-lite-8b": Model("Flux.1 lite 8B", "Flux", FLUX_CLASS, FLUX | {"depth": 8}, SCALE_NORMS),
    "flux-ovis": Model(
        "Ovis-Image 7B",
        "FluxSchnell",
        FLUX_CLASS,
        FLUX
        | {"context_in_dim": 2048, "vec_in_dim": None, "guidance_embed": False}
        | {"depth": 6, "depth_single_blocks": 27, "yak_mlp": True, "txt_norm": True},
        SCALE_NORMS,
    ),
    "flux-longcat": Model(
        "LongCat-Image",
        "LongCatImage",
        FLUX_CLASS,
        FLUX
        | {"context_in_dim": 3584, "vec_in_dim": None, "guidance_embed": False}
        | {"depth": 10, "depth_single_blocks": 20},
    ),
    "flux2-dev": Model("FLUX.2 dev", "Flux2", FLUX_CLASS, FLUX2 | FLUX2_DEV, SCALE_NORMS),
    "flux2-klein-4b": Model("FLUX.2 klein 4B", "Flux2", FLUX_CLASS, FLUX2 | FLUX2_4B, SCALE_NORMS),
    "flux2-klein-9b": Model("FLUX.2 klein 9B", "Flux2", FLUX_CLASS, FLUX2 | FLUX2_9B, SCALE_NORMS),
    "chroma": Model("Chroma", "Chroma", CHROMA_CLASS, CHROMA, SCALE_NORMS),
    "chroma-radiance": Model("Chroma Radiance", "ChromaRadiance", RADIANCE_CLASS, RADIANCE, SCALE_NORMS),
    "sd1": Model("Stable Diffusion 1.5", "SD15", UNET_CLASS, SD1),
    "sd1-inpaint": Model("Stable Diffusion 1.5 inpainting", "SD15", UNET_CLASS, SD1 | {"in_channels": 9}),
    "sd2": Model("Stable Diffusion 2.1", "SD20", UNET_CLASS, SD2),
    "sdxl": Model("Stable Diffusion XL", "SDXL", UNET_CLASS, SDXL),
    "sdxl-refiner": Model("Stable Diffusion XL refiner", "SDXLRefiner", UNET_CLASS, REFINER),
    "sdxl-ssd-1b": Model("SSD-1B", "SSD1B", UNET_CLASS, SDXL | SSD_1B),
    "sd21-unclip-l": Model("Stable Diffusion 2.1 unCLIP L", "SD21UnclipL", UNET_CLASS, SD2 | UNCLIP),
    "sd21-unclip-h": Model(
        "Stable Diffusion 2.1 unCLIP H", "SD21UnclipH", UNET_CLASS, SD2 | UNCLIP | {"adm_in_channels": 2048}
    ),
    "lotus-d": Model("Lotus D", "LotusD", UNET_CLASS, SD2 | UNCLIP | {"adm_in_channels": 4}),
    "cascade-b": Model("Stable Cascade B lite", "Stable_Cascade_B", "cascade.stage_b:StageB", CASCADE_B),
    "cascade-c": Model("Stable Cascade C lite", "Stable_Cascade_C", "cascade.stage_c:StageC", CASCADE_C),
    "sd3-medium": Model("Stable Diffusion 3 medium", "SD3", MMDIT_CLASS, mmdit(24, 192)),
    "sd35-medium": Model(
        "Stable Diffusion 3.5 medium",
        "SD3",
        MMDIT_CLASS,
        mmdit(24, 384, qk_norm="rms", x_block_self_attn_layers=list(range(13))),
    ),
    "sd35-large": Model("Stable Diffusion 3.5 large", "SD3", MMDIT_CLASS, mmdit(38, 192, qk_norm="rms")),
    "aura": Model("AuraFlow 0.3", "AuraFlow", "aura.mmdit:MMDiT", {"max_seq": 9216}),
    "hidream": Model("HiDream I1", "HiDream", "hidream.model:HiDreamImageTransformer2DModel", HIDREAM),
    "cosmos1-7b": Model("Cosmos 1 7B text to video", "CosmosT2V", "cosmos.model:GeneralDIT", COSMOS1_7B),
    "cosmos-predict2-2b": Model("Cosmos Predict2 2B text to image", "CosmosT2IPredict2", PREDICT2_CLASS, PREDICT2_2B),
    "anima": Model("Anima", "Anima", "anima.model:Anima", PREDICT2_2B),
    "ltxv-2b": Model("LTX-Video 2B", "LTXV", "lightricks.model:LTXVModel", {}),
    "ltxv-13b": Model("LTX-Video 13B", "LTXV", "lightricks.model:LTXVModel", LTXV_13B),
    "ltx2": Model("LTX-2", "LTXAV", LTXAV_CLASS, {}),
    "ltx23": Model("LTX-2.3", "LTXAV", LTXAV_CLASS, LTX23),
    "hyvid": Model("HunyuanVideo", "HunyuanVideo", HUNYUAN_CLASS, HUNYUAN, TENCENT),
    "hyvid-comfy": Model("HunyuanVideo in ComfyUI's names", "HunyuanVideo", HUNYUAN_CLASS, HUNYUAN),
    "hyvid15": Model("HunyuanVideo 1.5", "HunyuanVideo15", HUNYUAN_CLASS, HUNYUAN15),
    "hyimg21": Model("HunyuanImage 2.1", "HunyuanImage21", HUNYUAN_CLASS, HUNYUAN_IMAGE),
    "hyimg21-refiner": Model("HunyuanImage 2.1 refiner", "HunyuanImage21Refiner", HUNYUAN_CLASS, HUNYUAN_REFINER),
    "wan21-1.3b": Model("Wan 2.1 T2V 1.3B", "WAN21_T2V", WAN_CLASS, WAN_1B),
    "wan21-14b": Model("Wan 2.1 or 2.2 T2V 14B", "WAN21_T2V", WAN_CLASS, WAN_14B),
    "wan21-i2v": Model("Wan 2.1 I2V 14B", "WAN21_I2V", WAN_CLASS, WAN_I2V),
    "wan22-i2v": Model("Wan 2.2 I2V 14B", "WAN21_T2V", WAN_CLASS, WAN_14B | {"in_dim": 36}),
    "wan22-5b": Model("Wan 2.2 TI2V 5B", "WAN22_T2V", WAN_CLASS, WAN_5B),
    "wan21-vace": Model(
        "Wan 2.1 VACE 14B", "WAN21_Vace", "wan.model:VaceWanModel", WAN_14B | {"vace_layers": 8, "vace_in_dim": 96}
    ),
    "wan22-s2v": Model("Wan 2.2 S2V 14B", "WAN22_S2V", "wan.model:WanModel_S2V", WAN_14B),
    "wan22-animate": Model(
        "Wan 2.2 Animate 14B", "WAN22_Animate", "wan.model_animate:AnimateWanModel", WAN_14B | {"in_dim": 36}
    ),
    "wan21-humo": Model("HuMo 17B", "WAN21_HuMo", "wan.model:HumoWanModel", WAN_14B | {"in_dim": 36}),
    "wan21-camera": Model(
        "Wan 2.1 Fun Camera",
        "WAN21_Camera",
        "wan.model:CameraWanModel",
        WAN_14B | {"model_type": "camera", "in_dim": 32},
    ),
    "wan21-scail": Model("SCAIL 14B", "WAN21_SCAIL", "wan.model:SCAILWanModel", WAN_14B | {"in_dim": 20}),
    "wan21-scail2": Model("SCAIL 2 14B", "WAN21_SCAIL2", "wan.model:SCAIL2WanModel", WAN_14B | {"in_dim": 20}),
    "wan22-dancer": Model(
        "WanDancer 14B", "WAN22_WanDancer", "wan.model_wandancer:WanDancerModel", WAN_14B | {"in_dim": 36}
    ),
    "lumina2": Model("Lumina Image 2.0", "Lumina2", LUMINA_CLASS, LUMINA2),
    "newbie": Model("NewBie image", "Lumina2", LUMINA_CLASS, NEWBIE),
    "zimage": Model("Z-Image", "ZImage", LUMINA_CLASS, ZIMAGE),
    "zimage-pixels": Model(
        "Z-Image in pixel space", "ZImagePixelSpace", "lumina.model:NextDiTPixelSpace", ZIMAGE_PIXELS
    ),
    "qwen-image": Model("Qwen-Image", "QwenImage", QWEN_CLASS, {}),
    "omnigen2": Model("OmniGen2", "Omnigen2", "omnigen.omnigen2:OmniGen2Transformer2DModel", OMNIGEN2),
    "krea2": Model("Krea 2", "Krea2", "krea2.model:SingleStreamDiT", {}),
    "kandinsky5": Model("Kandinsky 5 lite video", "Kandinsky5", "kandinsky5.model:Kandinsky5", {}),
    "kandinsky5-image": Model(
        "Kandinsky 5 lite image", "Kandinsky5Image", "kandinsky5.model:Kandinsky5", KANDINSKY5_IMAGE
    ),
    "pixart-alpha": Model(
        "PixArt Alpha",
        "PixArtAlpha",
        PIXART_CLASS,
        {"depth": 28, "num_heads": 16, "micro_condition": True},
        computes=True,
    ),
    "pixart-sigma": Model(
        "PixArt Sigma",
        "PixArtSigma",
        PIXART_CLASS,
        {"depth": 28, "num_heads": 16, "micro_condition": False, "model_max_length": 300},
        computes=True,
    ),
    "ideogram4": Model("Ideogram 4", "Ideogram4", "ideogram4.model:Ideogram4Transformer2DModel", {}),
    "boogu": Model("Boogu-Image", "Boogu", "boogu.model:BooguTransformer2DModel", {}),
    "mochi": Model("Mochi 1 preview", "GenmoMochi", "genmo.joint_model.asymm_models_joint:AsymmDiTJoint", MOCHI),
    "hunyuan-dit": Model("Hunyuan-DiT 1.2", "HunyuanDiT", "hydit.models:HunYuanDiT", HUNYUAN_DIT),
    "ernie-image": Model("ERNIE-Image", "ErnieImage", "ernie.model:ErnieImageModel", {}),
    "lens": Model("Lens", "Lens", "lens.model:LensTransformer2DModel", {}),
    "mage-flow": Model("Mage-Flow", "MageFlow", "mage_flow.model:MageFlowTransformer2DModel", {}),
    "joyimage": Model("JoyImage", "JoyImage", "joyimage.model:JoyImageTransformer3DModel", {}),
    "minimax-h3": Model("MiniMax H3", "MiniMaxH3", "minimax.model:MiniMaxH3Model", {}),
    "pixeldit": Model("PixelDiT", "PixelDiTT2I", "pixeldit.model:PixDiT_T2I", {}, ((r"^", "core."),)),
    "pid": Model("PiD, decoder of Flux latents", "PiD", "pixeldit.pid:PidNet", {}),
    "seedvr2-3b": Model("SeedVR2 3B", "SeedVR2", "seedvr.model:NaDiT", SEEDVR2_3B),
    "hidream-o1": Model("HiDream-O1", "HiDreamO1", "hidream_o1.model:HiDreamO1Transformer", {}),
    "ace-step": Model("ACE-Step 1", "ACEStep", "ace.model:ACEStepTransformer2DModel", ACE_STEP),
    "cogvideox-5b": Model("CogVideoX 5B", "CogVideoX_T2V", "cogvideo.model:CogVideoXTransformer3DModel", COGVIDEOX_5B),
    "cogvideox15-i2v": Model(
        "CogVideoX 1.5 5B I2V",
        "CogVideoX_I2V",
        COGVIDEO_CLASS,
        COGVIDEOX_5B | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 512},
    ),
    "svd": Model("Stable Video Diffusion", "SVD_img2vid", UNET_CLASS, SVD),
    "stable-audio": Model("Stable Audio Open 1.0", "StableAudio", AUDIO_CLASS, {}),
    "stable-audio3": Model("Stable Audio 3 in the size of Open 1.0", "StableAudio3", AUDIO_CLASS, STABLE_AUDIO3),
    "ace-step15": Model(
        "ACE-Step 1.5", "ACEStep15", "ace.ace_step15:AceStepConditionGenerationModel", {}, computes=True
    ),
    "minimax-music3": Model("MiniMax Music 3", "MiniMaxMusic3", "minimax_music.dit:MiniMaxMusic3DiT", {}),
    "seedvr2-7b": Model("SeedVR2 7B", "SeedVR2", SEEDVR_CLASS, SEEDVR2_7B | {"mm_layers": 36, "mlp_type": "normal"}),
    "seedvr2-7b-shared": Model(
        "SeedVR2 7B, text and video sharing layers",
        "SeedVR2",
        SEEDVR_CLASS,
        SEEDVR2_7B | {"mm_layers": 10, "mlp_type": "swiglu"},
    ),
    "hunyuan3d": Model("Hunyuan3D 2", "Hunyuan3Dv2", "hunyuan3d.model:Hunyuan3Dv2", {}),
    "hunyuan3d21": Model("Hunyuan3D 2.1", "Hunyuan3Dv2_1", "hunyuan3dv2_1.hunyuandit:HunYuanDiTPlain", {}),
    "triposplat": Model("TripoSplat", "TripoSplat", "triposplat.model:LatentSeqMMFlowModel", {}),
    # No entry of the pack names these; they stand for what people bring of their own.
    "other-depth-anything3": Model(
        "Depth Anything 3, metric", "DepthAnything3", "depth_anything_3.model:DepthAnything3Net", {}
    ),
    "other-sam3": Model("SAM 3", "SAM3", "sam3.detector:SAM3Model", {}),
    "other-sam31": Model("SAM 3.1", "SAM31", "sam3.detector:SAM3Model", {"image_model": "SAM31"}),
}


@dataclass(frozen=True)
class Encoder:
    """A published text encoder.

    Attributes:
        title: what it is called.
        detected: the name of ComfyUI's TEModel for it.
        built_by: module and class below comfy, as `text_encoders.t5:T5`.
        config: its configuration, or the path below comfy of the JSON file that has it.
        extra: tensors that published files have beside the class's own, with their shapes.
    """

    title: str
    detected: str
    built_by: str
    config: Mapping[str, Any] | str
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_T5 = "text_encoders.t5:T5"
_CLIP = "clip_model:CLIPTextModel"

# What files that ComfyUI's examples link to hold; sizes of tokenizers are rounded.
ENCODERS: Mapping[str, Encoder] = {
    "te-t5xxl": Encoder(
        "T5 v1.1 XXL",
        "T5_XXL",
        _T5,
        "text_encoders/t5_config_xxl.json",
        {"encoder.embed_tokens.weight": (32128, 4096)},
    ),
    "te-umt5xxl": Encoder(
        "UMT5-XXL", "T5_XXL", _T5, "text_encoders/umt5_config_xxl.json", {"spiece_model": (4_548_313,)}
    ),
    "te-clip-l": Encoder(
        "CLIP-L", "CLIP_L", _CLIP, "sd1_clip_config.json", {"text_model.embeddings.position_ids": (1, 77)}
    ),
    "te-clip-g": Encoder("CLIP-G", "CLIP_G", _CLIP, "clip_config_bigg.json", {"logit_scale": ()}),
    "te-qwen25-7b": Encoder(
        "Qwen2.5-VL 7B", "QWEN25_7B", "text_encoders.llama:Qwen25_7BVLI", {}, {"lm_head.weight": (152064, 3584)}
    ),
    "te-qwen3-4b": Encoder("Qwen3 4B", "QWEN3_4B", "text_encoders.llama:Qwen3_4B", {}),
    "te-llama3-8b": Encoder("Llama 3.1 8B", "LLAMA3_8", "text_encoders.llama:Llama2", {}),
    "te-gemma2-2b": Encoder(
        "Gemma 2 2B", "GEMMA_2_2B", "text_encoders.llama:Gemma2_2B", {}, {"spiece_model": (4_241_003,)}
    ),
    "te-gemma3-12b": Encoder(
        "Gemma 3 12B", "GEMMA_3_12B", "text_encoders.llama:Gemma3_12B", {}, {"spiece_model": (4_689_074,)}
    ),
    "te-mistral3-24b": Encoder(
        "Mistral Small 3.2 24B, the layers that Flux.2 uses",
        "MISTRAL3_24B_PRUNED_FLUX2",
        "text_encoders.llama:Mistral3Small24B",
        {"num_hidden_layers": 30},
        {"tekken_model": (19_399_895,)},
    ),
}
