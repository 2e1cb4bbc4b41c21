# SPDX-License-Identifier: Apache-2.0
"""The architectures, and what the tensors of a block are called. To add one, add an entry; order does not matter.

Which tensors stay in high precision follows the files that people use (city96/ComfyUI-GGUF tools/lcpp.patch and
convert.py, silveroxides' Chroma, molbal's LTX-2): embedders, final layers, and what a host keeps as bare parameters.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from .arch_entry import Arch, Category, Rules


def _layer(*names: str) -> str:
    """Pattern of a layer of one of these names (patterns themselves), however deep in its block."""
    return rf"(.*\.)?({'|'.join(names)})\.weight"


_MLP = r"\w*(mlp|ff|ffn|feed_forward)\w*\."
_ATTENTION = r"\w*(attn|attention)\w*[._]"

# What follows the block's number in a key, in all architectures. The first pattern that fits the whole of it wins.
BLOCK_RULES: Rules = (
    (_layer(r"(\w*mod|mod[CX]+|\w*modulation\w*|ada[lL][nN]\w*|emb_layers)(\.\w+)*"), Category.MODULATION),
    (_layer(r"norm\d*\.linear"), Category.MODULATION),
    (_layer(r"\w*qkv", r"(\w+_)?kv(_proj|_linear)?", "qkv_proj"), Category.ATTN_QKV),
    (_layer("v", "value", "v_img", "wv", r"w\dv", r"(\w+_)?v_proj", r"to_v(_t)?(\.0)?", "to_value"), Category.ATTN_V),
    (_layer("[qko]", "k_img", "w[qko]", r"w\d[qko]", r"(\w+_)?[qko]_proj", r"\w+_q"), Category.ATTN),
    (_layer("query", "key", r"attention\.output\.dense"), Category.ATTN),
    (_layer(r"to_[qk](_t)?(\.0)?", "to_query", "to_key", r"to_out(_t)?(\.0)?", "to_add_out"), Category.ATTN),
    (_layer("output_proj", "out_proj", _ATTENTION + "(proj|out|out_layer|gate)"), Category.ATTN),
    (_layer("down", "down_proj", "(linear_)?fc2", "w2", "linear_?2", "layer2"), Category.FFN_DOWN),
    (_layer(_MLP + r"((net\.)?2|c_proj|out_layer)"), Category.FFN_DOWN),
    (_layer("up", "gate", "(gate_)?up_proj", "gate_proj", "(linear_)?fc[13]", "w[13]", "linear_?[13]"), Category.FFN),
    (_layer("layer1", _MLP + r"((net\.)?0(\.proj)?|c_fc\d?|in_layer)"), Category.FFN),
    (_layer(r"(in|out)_layers\.\d", "skip_connection", "op", r"\w*conv\w*"), Category.CONV),
)

# Leftovers of training frameworks, in any model.
LEFTOVERS = (r"(.*\.)?_extra_state", r"accum_.*", r"(.*\.)?num_batches_tracked")

_FLUX_BLOCK = "double_blocks.0.img_attn.proj.weight"
_FLUX_VECTOR = "vector_in.in_layer.weight"  # Chroma, Flux.2 and what followed have no such key
_FLUX_GUIDANCE = "guidance_in.in_layer.weight"
_PACKED_LATENT = (None, 64)  # 16 channels in 2x2 patches

_FLUX = Arch(
    "flux",
    "Flux.1 dev",
    {_FLUX_BLOCK: None, _FLUX_VECTOR: None, _FLUX_GUIDANCE: None, "img_in.weight": _PACKED_LATENT},
    blocks=(r"double_blocks\.\d+\.", r"single_blocks\.\d+\."),
    rules=((r"linear1\.weight", Category.ATTN_QKV),),  # q, k, v and the first half of the MLP
    outer=((r"final_layer\..*", Category.OUTPUT),),
)
_CHROMA = dataclasses.replace(
    _FLUX,
    name="chroma",
    title="Chroma",
    detect={"distilled_guidance_layer.in_proj.weight": None, _FLUX_BLOCK: None, "img_in.weight": None},
    shared_tag="flux",
    keep_f32=(r"distilled_guidance_layer\.in_proj\.weight", r"img_in\.weight", r"final_layer\.linear\.weight"),
)
_FLUX_FAMILY = (
    _FLUX,
    dataclasses.replace(
        _FLUX,
        title="Flux.1 schnell",
        detect={_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": _PACKED_LATENT},
        absent=(_FLUX_GUIDANCE,),
    ),
    dataclasses.replace(
        _FLUX, title="Flux.1 Fill", detect={_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": (None, 384)}
    ),
    dataclasses.replace(
        _FLUX,
        title="Flux.1 Canny or Depth",
        detect={_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": (None, 128)},
    ),
    dataclasses.replace(
        _FLUX,
        title="Ovis-Image",
        detect={_FLUX_BLOCK: None, "double_blocks.0.img_mlp.gate_proj.weight": None, "txt_in.weight": (None, 2048)},
        absent=(_FLUX_VECTOR,),
    ),
    dataclasses.replace(
        _FLUX,
        title="LongCat-Image",
        detect={_FLUX_BLOCK: None, "img_in.weight": _PACKED_LATENT, "txt_in.weight": (None, 3584)},
        absent=(_FLUX_VECTOR,),
    ),
    Arch(
        "flux",
        "Flux.1 in diffusers layout",
        {"single_transformer_blocks.0.attn.to_q.weight": None, "transformer_blocks.0.attn.add_q_proj.weight": None},
        reject="Take a file in the original layout (double_blocks, single_blocks), or make one from it",
    ),
    dataclasses.replace(
        _FLUX,
        name="flux2",
        title="Flux.2",
        detect={_FLUX_BLOCK: None, "double_stream_modulation_img.lin.weight": None},
        shared_tag="flux",
        outer=(
            (r"final_layer\..*", Category.OUTPUT),
            (r"(double|single)_stream_modulation\w*\.lin\.weight", Category.MODULATION),  # one for all blocks
        ),
    ),
    _CHROMA,
    dataclasses.replace(
        _CHROMA,
        title="Chroma Radiance",
        detect={"distilled_guidance_layer.in_proj.weight": None, "nerf_blocks.0.param_generator.weight": None},
        absent=("img_in.weight",),
        outer=((r"nerf_(blocks|final_layer\w*)\..*", Category.OUTPUT),),
        keep_f32=(r"distilled_guidance_layer\.in_proj\.weight",),
    ),
)

_UNET_IN = "input_blocks.0.0.weight"
_UNET_TEXT = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_UNET_LABEL = "label_emb.0.0.weight"
_UNET_VIDEO = "input_blocks.1.1.time_stack.0.attn1.to_q.weight"

_SD1 = Arch(
    "sd1",
    "Stable Diffusion 1",
    {_UNET_IN: None, _UNET_TEXT: (None, 768)},
    (_UNET_LABEL,),
    blocks=(
        r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.transformer_blocks\.\d+\.",
        r"(input_blocks\.[1-9]\d*|middle_block\.\d+|output_blocks\.\d+)\.",
    ),
    rules=((r"(1\.)?proj_(in|out)\.weight", Category.ATTN),),
    outer=((r"out\..*", Category.OUTPUT),),
    reshape_conv=True,
)
_UNETS = (
    _SD1,
    dataclasses.replace(
        _SD1,
        name="svd",
        title="Stable Video Diffusion",
        detect={_UNET_IN: None, _UNET_VIDEO: None},
        absent=(),
        shared_tag="sd1",
        blocks=(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.time_stack\.\d+\.", *_SD1.blocks),
        rules=(*_SD1.rules, (r"(1\.)?time_pos_embed\.\d\.weight", Category.MODULATION)),  # of a frame, in each block
    ),
    dataclasses.replace(
        _SD1, title="Stable Diffusion 2", detect={_UNET_IN: None, _UNET_TEXT: (None, 1024)}, absent=(_UNET_LABEL,)
    ),
    *(
        dataclasses.replace(
            _SD1,
            title=title,
            detect={_UNET_IN: None, _UNET_TEXT: (None, 1024), _UNET_LABEL: (None, n_label)},
            absent=(_UNET_VIDEO,),
        )
        for title, n_label in (
            ("Stable Diffusion 2.1 unCLIP L", 1536),
            ("Stable Diffusion 2.1 unCLIP H", 2048),
            ("Lotus", 4),
        )
    ),
    dataclasses.replace(
        _SD1, name="sdxl", title="Stable Diffusion XL", detect={_UNET_IN: None, _UNET_LABEL: (None, 2816)}, absent=()
    ),
    dataclasses.replace(
        _SD1,
        name="sdxl",
        title="Stable Diffusion XL refiner",
        detect={_UNET_IN: None, _UNET_LABEL: (None, 2560)},
        absent=(),
    ),
)

_SD3_BLOCK = "joint_blocks.0.x_block.attn.qkv.weight"
_SD3_NORM = "joint_blocks.0.x_block.attn.ln_q.weight"
_SD3 = Arch(
    "sd3",
    "Stable Diffusion 3",
    {_SD3_BLOCK: None, "x_embedder.proj.weight": None},
    (_SD3_NORM,),
    blocks=(r"joint_blocks\.\d+\.",),
    outer=((r"final_layer\..*", Category.OUTPUT),),
    keep_f32=(r"register",),
)

_COSMOS = Arch(
    "cosmos",
    "Cosmos 1",
    {"blocks.block0.blocks.0.block.attn.to_q.0.weight": None, "x_embedder.proj.1.weight": None},
    blocks=(r"blocks\.(block)?\d+\.", r"llm_adapter\.blocks\.\d+\."),
    outer=((r"final_layer\..*", Category.OUTPUT),),
    keep_f32=(r"(extra_)?pos_embedder\..*",),
)
_PREDICT2 = MappingProxyType(
    {"blocks.0.mlp.layer1.weight": None, "blocks.0.adaln_modulation_cross_attn.1.weight": None}
)
_LLM_ADAPTER = "llm_adapter.blocks.0.cross_attn.q_proj.weight"

_LTX_AUDIO = "audio_adaln_single.linear.weight"
_LTXV = Arch(
    "ltxv",
    "LTX-Video",
    {"patchify_proj.weight": None, "transformer_blocks.0.scale_shift_table": None},
    (_LTX_AUDIO,),
    blocks=(
        r"transformer_blocks\.\d+\.",
        r"audio_embeddings_connector\.transformer_1d_blocks\.\d+\.",
        r"video_embeddings_connector\.transformer_1d_blocks\.\d+\.",
    ),
    outer=((r"(audio_)?proj_out\..*", Category.OUTPUT), (r"(audio_)?scale_shift_table", Category.OUTPUT)),
    keep_f32=(
        r"(.*\.)?\w*scale_shift_table\w*",
        r".*\.learnable_registers",
        r"keyframes_abs_pos_embedding",
        r".*\.to_gate_logits\.weight",
    ),
)

_HYVID_REFINER = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_HYVID_VISION = "vision_in.proj.0.weight"
_HYVID = Arch(
    "hyvid",
    "HunyuanVideo",
    {_HYVID_REFINER: None, _FLUX_VECTOR: None},
    blocks=_FLUX.blocks,
    rules=_FLUX.rules,
    outer=((r"final_layer\..*", Category.OUTPUT),),
)

_SCAIL2_KEY = "patch_embedding_mask.weight"  # SCAIL 2 has all that SCAIL has, and this
# What tells the kinds of Wan from the plain one, each by a key that no other kind has.
_WAN_KINDS = (
    ("Wan VACE", "vace_patch_embedding.weight"),
    ("Wan Camera", "control_adapter.conv.weight"),
    ("Wan S2V", "casual_audio_encoder.encoder.final_linear.weight"),
    ("HuMo", "audio_proj.audio_proj_glob_1.layer.bias"),
    ("Wan Animate", "face_adapter.fuser_blocks.0.k_norm.weight"),
    ("SCAIL 2", _SCAIL2_KEY),
    ("SCAIL", "patch_embedding_pose.weight"),
    ("WanDancer", "patch_embedding_global.weight"),
)
_WAN = Arch(
    "wan",
    "Wan",
    {"head.modulation": None, "blocks.0.self_attn.norm_q.weight": None, "blocks.0.ffn.0.weight": None},
    tuple(key for _, key in _WAN_KINDS),
    blocks=(
        r"blocks\.\d+\.",
        r"vace_blocks\.\d+\.",
        r"audio_injector\.injector\.\d+\.",
        r"audio_injector\.injector_adain_layers\.\d+\.",
        r"music_injector\.injector\.\d+\.",
        r"face_adapter\.fuser_blocks\.\d+\.",
    ),
    rules=((r"linear\.weight", Category.MODULATION), (r"linear2\.weight", Category.ATTN)),  # injector, face adapter
    outer=((r"head(_global)?\..*", Category.OUTPUT),),
    keep_f32=(r"(.*\.)?modulation", r"img_emb\.emb_pos", r".*\.padding_tokens"),
)

_CAPTION = "cap_embedder.1.weight"
_ZIMAGE_PIXELS = "dec_net.cond_embed.weight"
_NEWBIE_KEY = "clip_text_pooled_proj.0.weight"
_LUMINA2 = Arch(
    "lumina2",
    "Lumina Image 2.0",
    {_CAPTION: (2304, None), "noise_refiner.0.attention.qkv.weight": None},
    (_NEWBIE_KEY,),
    blocks=(r"layers\.\d+\.",),
    outer=((r"final_layer\..*", Category.OUTPUT),),
)
_ZIMAGE = dataclasses.replace(
    _LUMINA2,
    name="z_image",
    title="Z-Image",
    detect={**_LUMINA2.detect, _CAPTION: (3840, None)},
    absent=(_ZIMAGE_PIXELS,),
    shared_tag="lumina2",
    keep_f32=(r"\w+_pad_token",),
)

_FINAL_LAYER: Rules = ((r"final_layer\..*", Category.OUTPUT),)
_OMNIGEN2_KEY = "time_caption_embed.timestep_embedder.linear_1.weight"
_BOOGU_KEY = "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight"

_PIXELDIT = Arch(
    "pixeldit",
    "PixelDiT",
    {"core.pixel_embedder.proj.weight": None, "core.patch_blocks.0.attn.qkv_x.weight": None},
    blocks=(r"(core\.)?patch_blocks\.\d+\.", r"(core\.)?pixel_blocks\.\d+\."),
    rules=(
        (_layer("qkv_[xy]"), Category.ATTN_QKV),
        (_layer("proj_[xy]", "compress_to_attn", "expand_from_attn"), Category.ATTN),
    ),
    outer=((r"(core\.)?final_layer\..*", Category.OUTPUT),),
    keep_f32=(r"(core\.)?y_pos_embedding",),
)
_CASCADE = Arch(
    "cascade",
    "Stable Cascade C",
    {"clf.1.weight": None, "clip_txt_mapper.weight": None},
    blocks=(r"down_blocks\.\d+\.\d+\.", r"up_blocks\.\d+\.\d+\."),
    rules=(
        (_layer(r"channelwise\.0"), Category.FFN),
        (_layer(r"channelwise\.4"), Category.FFN_DOWN),
        (_layer(r"kv_mapper\.1"), Category.ATTN),
        (_layer(r"mapper(_\w+)?"), Category.MODULATION),
        (_layer("depthwise"), Category.CONV),
    ),
    outer=((r"clf\..*", Category.OUTPUT),),
)

# Models that few programs write files of; those that exist keep the same tensors.
_OTHERS = (
    Arch(
        "krea2",
        "Krea 2",
        {"txtfusion.projector.weight": None, "first.weight": None, "blocks.0.attn.wq.weight": None},
        blocks=(r"blocks\.\d+\.", r"txtfusion\.layerwise_blocks\.\d+\.", r"txtfusion\.refiner_blocks\.\d+\."),
        outer=((r"last\..*", Category.OUTPUT),),
        keep_f32=(r"last\.modulation\.lin",),
    ),
    Arch(
        "ideogram4",
        "Ideogram 4",
        {"embed_image_indicator.weight": None, "layers.0.attention.qkv.weight": None},
        blocks=(r"layers\.\d+\.",),
        outer=_FINAL_LAYER,
    ),
    Arch(
        "omnigen2",
        "OmniGen2",
        {_OMNIGEN2_KEY: None, "layers.0.attn.to_q.weight": None},
        (_BOOGU_KEY,),
        blocks=(r"layers\.\d+\.",),
        outer=((r"norm_out\..*", Category.OUTPUT),),
        keep_f32=(r"image_index_embedding",),
    ),
    Arch(
        "boogu",
        "Boogu-Image",
        {_OMNIGEN2_KEY: None, _BOOGU_KEY: None},
        blocks=(r"double_stream_layers\.\d+\.", r"single_stream_layers\.\d+\."),
        rules=(
            (_layer(r"(img|instruct)_to_v"), Category.ATTN_V),
            (_layer(r"(img|instruct)_(to_[qk]|out)"), Category.ATTN),
            (_layer(r"\w+_norm\d\.linear"), Category.MODULATION),
        ),
        outer=((r"norm_out\..*", Category.OUTPUT),),
        keep_f32=(r"image_index_embedding",),
    ),
    Arch(
        "kandinsky5",
        "Kandinsky 5",
        {
            "visual_transformer_blocks.0.cross_attention.key_norm.weight": None,
            "visual_embeddings.in_layer.weight": None,
        },
        blocks=(r"visual_transformer_blocks\.\d+\.",),
        outer=((r"out_layer\..*", Category.OUTPUT),),
    ),
    Arch(
        "mochi",
        "Mochi",
        {"t5_yproj.weight": None, "blocks.0.attn.qkv_x.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=(
            (_layer("mod_[xy]"), Category.MODULATION),
            (_layer("qkv_[xy]"), Category.ATTN_QKV),
            (_layer("proj_[xy]"), Category.ATTN),
        ),
        outer=_FINAL_LAYER,
        keep_f32=(r"pos_frequencies",),
    ),
    Arch(
        "pixart",
        "PixArt",
        {"t_block.1.weight": None, "blocks.0.cross_attn.kv_linear.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=((_layer("q_linear"), Category.ATTN),),
        outer=_FINAL_LAYER,
        keep_f32=(r"(.*\.)?scale_shift_table", r"y_embedder\.y_embedding", r"pos_embed"),
    ),
    Arch(
        "hydit",
        "Hunyuan-DiT",
        {"mlp_t5.0.weight": None, "blocks.0.attn1.Wqkv.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=((_layer("skip_linear"), Category.FFN),),
        outer=_FINAL_LAYER,
        keep_f32=(r"text_embedding_padding", r"pooler\.positional_embedding"),
    ),
    Arch(
        "ernie_image",
        "ERNIE-Image",
        {"layers.0.mlp.linear_fc2.weight": None, "text_proj.weight": None, "final_linear.weight": None},
        blocks=(r"layers\.\d+\.",),
        outer=((r"final_(norm|linear)\..*", Category.OUTPUT),),
    ),
    Arch(
        "lens",
        "Lens",
        {
            "transformer_blocks.0.attn.norm_added_q.weight": None,
            "transformer_blocks.0.img_mlp.w1.weight": None,
            "transformer_blocks.0.attn.img_qkv.weight": None,
        },
        blocks=(r"transformer_blocks\.\d+\.",),
        outer=((r"(norm_out|proj_out)\..*", Category.OUTPUT),),
    ),
    Arch(
        "mage_flow",
        "Mage-Flow",
        {
            "txt_norm.weight": (2560,),
            "proj_out.weight": (128, None),
            "transformer_blocks.0.attn.add_v_proj.weight": None,
        },
        blocks=(r"transformer_blocks\.\d+\.",),
        outer=((r"(norm_out|proj_out)\..*", Category.OUTPUT),),
    ),
    Arch(
        "joyimage",
        "JoyImage",
        {
            "double_blocks.0.attn.img_attn_qkv.weight": None,
            "condition_embedder.time_embedder.linear_1.weight": None,
            "img_in.weight": (None, None, None, None, None),
        },
        blocks=(r"double_blocks\.\d+\.",),
        outer=((r"proj_out\..*", Category.OUTPUT),),
        keep_f32=(r".*\.modulate_table",),
    ),
    Arch(
        "minimax_h3",
        "MiniMax H3",
        {"video_patch_proj.weight": None, "audio_patch_proj.weight": None, "blocks.0.attn.qkv_proj.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=((_layer("adaln_proj.linear"), Category.MODULATION),),
        outer=_FINAL_LAYER,
        keep_f32=(r"adaln_t_table", r"(video|audio)_patch_proj\.weight", r"final_layer\.(video|audio)_out\.weight"),
    ),
    _PIXELDIT,
    dataclasses.replace(
        _PIXELDIT,
        name="pid",
        title="PiD",
        detect={"lq_proj.latent_proj.0.weight": None, "pixel_embedder.proj.weight": None},
    ),
    Arch(
        "seedvr2",
        "SeedVR2",
        {"vid_in.proj.weight": None, "emb_in.proj_hid.weight": None, "blocks.0.attn.norm_q.vid.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=(
            (_layer(r"proj_qkv\.(vid|txt|all)"), Category.ATTN_QKV),
            (_layer(r"attn\.proj_out\.(vid|txt|all)"), Category.ATTN),
            (_layer(r"mlp\.(vid|txt|all)\.proj_out"), Category.FFN_DOWN),
            (_layer(r"mlp\.(vid|txt|all)\.proj_in(_gate)?"), Category.FFN),
        ),
        outer=((r"vid_out\w*\..*", Category.OUTPUT),),
        keep_f32=(r"(positive|negative)_conditioning",),
    ),
    Arch(
        "hidream_o1",
        "HiDream-O1",
        {"t_embedder1.mlp.0.weight": None, "x_embedder.proj1.weight": None},
        blocks=(r"language_model\.layers\.\d+\.",),  # what sees pictures keeps its precision, as in text encoders
        outer=(
            (r"final_layer\d\..*", Category.OUTPUT),
            (r"language_model\.embed_tokens\.weight", Category.TOKEN_EMBD),
        ),
    ),
    Arch(
        "ace",
        "ACE-Step",
        {"genre_embedder.weight": None, "lyric_embs.weight": None, "transformer_blocks.0.attn.to_q.weight": None},
        blocks=(r"transformer_blocks\.\d+\.", r"lyric_encoder\.encoders\.\d+\."),
        rules=(
            (_layer(r"self_attn\.linear_v", r"add_v_proj"), Category.ATTN_V),
            (_layer(r"self_attn\.linear_(q|k|out|pos)"), Category.ATTN),
            (_layer(r"feed_forward\.w_2"), Category.FFN_DOWN),
            (_layer(r"feed_forward\.w_1"), Category.FFN),
        ),
        outer=_FINAL_LAYER,
        keep_f32=(r"(.*\.)?scale_shift_table", r".*\.pos_bias_[uv]"),
    ),
    Arch(
        "ace15",
        "ACE-Step 1.5",
        {
            "encoder.lyric_encoder.layers.0.input_layernorm.weight": None,
            "decoder.layers.0.self_attn.q_proj.weight": None,
            "decoder.condition_embedder.weight": None,
        },
        blocks=(r"decoder\.layers\.\d+\.", r"encoder\.(lyric|timbre)_encoder\.layers\.\d+\."),
        outer=((r"decoder\.(norm_out|proj_out)\..*", Category.OUTPUT),),
        keep_f32=(r"(.*\.)?scale_shift_table", r".*special_tokens?", r"null_condition_emb"),
    ),
    Arch(
        "stable_audio",
        "Stable Audio",
        {
            "transformer.rotary_pos_emb.inv_freq": None,
            "to_global_embed.0.weight": None,
            "transformer.layers.0.cross_attn.to_kv.weight": None,
        },
        blocks=(r"transformer\.layers\.\d+\.",),
        rules=((_layer(r"to_local_embed\.\d"), Category.MODULATION),),
        outer=((r"(transformer\.project_out|postprocess_conv)\..*", Category.OUTPUT),),
        keep_f32=(r"transformer\.memory_tokens", r"timestep_features\.weight"),
    ),
    Arch(
        "minimax_music3",
        "MiniMax Music 3",
        {"cond_layer_logits": None, "latent_conditioners.0.weight": None},
        blocks=(r"diffusion_transformer\.transformer\.layers\.\d+\.",),
        outer=((r"diffusion_transformer\.(transformer\.project_out|postprocess_conv)\..*", Category.OUTPUT),),
        keep_f32=(r"diffusion_transformer\.timestep_features\.weight",),
    ),
    Arch(
        "hunyuan3d",
        "Hunyuan3D 2",
        {_FLUX_BLOCK: None, "latent_in.weight": None, "cond_in.weight": None},
        blocks=_FLUX.blocks,
        rules=_FLUX.rules,
        outer=_FINAL_LAYER,
    ),
    Arch(
        "hunyuan3d",
        "Hunyuan3D 2.1",
        {
            "blocks.0.attn1.k_norm.weight": None,
            "blocks.0.attn2.to_v.weight": None,
            "t_embedder.mlp.2.weight": None,
            "x_embedder.weight": (None, None),
        },
        blocks=(r"blocks\.\d+\.",),
        rules=(
            (_layer("skip_linear"), Category.FFN),
            (_layer(r"moe\.(shared_experts|experts\.\d+)\.net\.0\.proj"), Category.FFN),
            (_layer(r"moe\.(shared_experts|experts\.\d+)\.net\.2"), Category.FFN_DOWN),
        ),
        outer=_FINAL_LAYER,
        keep_f32=(r".*\.moe\.gate\.weight",),
    ),
    Arch(
        "triposplat",
        "TripoSplat",
        {"cam_out_layer.weight": None, "repo_layers.0.final_map.weight": None},
        blocks=(r"blocks\.\d+\.",),
        outer=((r"(cam_)?out_layer\..*", Category.OUTPUT),),
        keep_f32=(r"(.*\.)?shift_table", r".*\.[qk]_norm\.gamma"),
    ),
    Arch(
        "cogvideox",
        "CogVideoX",
        {"blocks.0.norm1.linear.weight": None, "blocks.0.attn_out.weight": None, "patch_embed.text_proj.weight": None},
        blocks=(r"blocks\.\d+\.",),
        rules=(
            (r"attn_out\.weight", Category.ATTN),
            (r"ff_out\.weight", Category.FFN_DOWN),
            (r"ff_proj\.weight", Category.FFN),
        ),
        outer=((r"(norm_final|norm_out|proj_out)\..*", Category.OUTPUT),),
        keep_f32=(r"patch_embed\.pos_embedding",),
    ),
)

ARCHS: tuple[Arch, ...] = (
    *_FLUX_FAMILY,
    *_UNETS,
    _CASCADE,
    dataclasses.replace(_CASCADE, title="Stable Cascade B", detect={"clf.1.weight": None, "clip_mapper.weight": None}),
    _SD3,
    dataclasses.replace(
        _SD3,
        title="Stable Diffusion 3.5",
        detect={_SD3_BLOCK: None, "x_embedder.proj.weight": None, _SD3_NORM: None},
        absent=(),
    ),
    Arch(
        "aura",
        "AuraFlow",
        {"double_layers.0.modX.1.weight": None, "double_layers.0.attn.w1q.weight": None},
        blocks=(r"double_layers\.\d+\.", r"single_layers\.\d+\."),
        outer=((r"final_linear\..*", Category.OUTPUT), (r"modF\..*", Category.OUTPUT)),
        keep_f32=(r"register_tokens",),
    ),
    Arch(
        "hidream",
        "HiDream",
        {
            "caption_projection.0.linear.weight": None,
            "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight": None,
        },
        blocks=(r"double_stream_blocks\.\d+\.", r"single_stream_blocks\.\d+\."),
        outer=((r"final_layer\..*", Category.OUTPUT),),
        keep_f32=(r".*\.ff_i\.gate\.weight",),
    ),
    _COSMOS,
    dataclasses.replace(_COSMOS, title="Cosmos Predict2", detect=_PREDICT2, absent=(_LLM_ADAPTER,)),
    dataclasses.replace(_COSMOS, title="Anima", detect={**_PREDICT2, _LLM_ADAPTER: None}),
    _LTXV,
    dataclasses.replace(_LTXV, title="LTX-2", detect={**_LTXV.detect, _LTX_AUDIO: None}, absent=()),
    _HYVID,
    dataclasses.replace(
        _HYVID,
        title="HunyuanVideo 1.5",
        detect={_HYVID_REFINER: None, _HYVID_VISION: None},
        absent=(_FLUX_VECTOR,),
    ),
    dataclasses.replace(
        _HYVID,
        title="HunyuanImage 2.1",
        detect={_HYVID_REFINER: None, "img_in.proj.weight": (None, None, None, None)},
        absent=(_FLUX_VECTOR, _HYVID_VISION),
    ),
    dataclasses.replace(
        _HYVID,
        title="HunyuanImage 2.1 refiner",
        detect={_HYVID_REFINER: None, "img_in.proj.weight": (None, None, None, None, None)},
        absent=(_FLUX_VECTOR, _HYVID_VISION),
    ),
    _WAN,
    *(
        dataclasses.replace(
            _WAN,
            title=title,
            detect={**_WAN.detect, key: None},
            absent=(_SCAIL2_KEY,) if title == "SCAIL" else (),
        )
        for title, key in _WAN_KINDS
    ),
    _LUMINA2,
    dataclasses.replace(_LUMINA2, title="NewBie", detect={**_LUMINA2.detect, _NEWBIE_KEY: None}, absent=()),
    _ZIMAGE,
    dataclasses.replace(
        _ZIMAGE,
        title="Z-Image in pixel space",
        detect={**_ZIMAGE.detect, _ZIMAGE_PIXELS: None},
        absent=(),
        outer=((r"dec_net\..*", Category.OUTPUT),),
    ),
    Arch(
        "qwen_image",
        "Qwen-Image",
        {
            "txt_norm.weight": (3584,),
            "transformer_blocks.0.img_mod.1.weight": None,
            "transformer_blocks.0.attn.add_v_proj.weight": None,
        },
        blocks=(r"transformer_blocks\.\d+\.",),
        outer=((r"norm_out\..*", Category.OUTPUT), (r"proj_out\..*", Category.OUTPUT)),
    ),
    *_OTHERS,
)

# The policy for a model that no entry knows: its stacks of blocks are found by size, the rest is kept.
GENERIC = Arch(
    "generic",
    "unrecognised model",
    {},
    # A bare parameter belongs to no layer, and no layer would dequantize it.
    rules=((r"(?!.*\.weight$).*", Category.EMBED),),
    outer=((r"(out|output|final|last|head|proj_out|norm_out|conv_out|decoder)(_\w+)?\..*", Category.OUTPUT),),
    keep_f32=(
        r"(.*\.)?(\w*scale_shift_table\w*|modulation|registers?|\w+_tokens?)",
        r".*\.(to_gate_logits|router)\.weight",
    ),
)
