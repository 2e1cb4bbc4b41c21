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
    (_layer(r"\w*qkv", r"\w*_kv", "qkv_proj"), Category.ATTN_QKV),
    (_layer("v", "v_img", "wv", r"w\dv", r"(\w+_)?v_proj", r"to_v(_t)?(\.0)?", "to_value"), Category.ATTN_V),
    (_layer("[qko]", "k_img", "w[qko]", r"w\d[qko]", r"(\w+_)?[qko]_proj", r"\w+_q"), Category.ATTN),
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
        _SD1, title="Stable Diffusion 2", detect={_UNET_IN: None, _UNET_TEXT: (None, 1024)}, absent=(_UNET_LABEL,)
    ),
    dataclasses.replace(
        _SD1,
        title="Stable Diffusion 2.1 unCLIP",
        detect={_UNET_IN: None, _UNET_TEXT: (None, 1024), _UNET_LABEL: None},
        absent=(_UNET_VIDEO,),
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

# What tells the kinds of Wan from the plain one, each by a key that no other kind has.
_WAN_KINDS = (
    ("Wan VACE", "vace_patch_embedding.weight"),
    ("Wan Camera", "control_adapter.conv.weight"),
    ("Wan S2V", "casual_audio_encoder.encoder.final_linear.weight"),
    ("HuMo", "audio_proj.audio_proj_glob_1.layer.bias"),
    ("Wan Animate", "face_adapter.fuser_blocks.0.k_norm.weight"),
    ("SCAIL", "patch_embedding_pose.weight"),
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
        r"face_adapter\.fuser_blocks\.\d+\.",
    ),
    rules=((r"linear\.weight", Category.MODULATION), (r"linear2\.weight", Category.ATTN)),  # injector, face adapter
    outer=((r"head\..*", Category.OUTPUT),),
    keep_f32=(r"(.*\.)?modulation", r"img_emb\.emb_pos", r".*\.padding_tokens"),
)

_CAPTION = "cap_embedder.1.weight"
_LUMINA2 = Arch(
    "lumina2",
    "Lumina Image 2.0",
    {_CAPTION: (2304, None), "noise_refiner.0.attention.qkv.weight": None},
    blocks=(r"layers\.\d+\.",),
    outer=((r"final_layer\..*", Category.OUTPUT), (r"dec_net\..*", Category.OUTPUT)),
    keep_f32=(r"\w+_pad_token",),
)

ARCHS: tuple[Arch, ...] = (
    *_FLUX_FAMILY,
    *_UNETS,
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
        dataclasses.replace(_WAN, title=title, detect={**_WAN.detect, key: None}, absent=())
        for title, key in _WAN_KINDS
    ),
    _LUMINA2,
    dataclasses.replace(
        _LUMINA2,
        name="z_image",
        title="Z-Image",
        detect={**_LUMINA2.detect, _CAPTION: (3840, None)},
        shared_tag="lumina2",
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
