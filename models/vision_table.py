# SPDX-License-Identifier: Apache-2.0
"""The vision parts that are read from llama.cpp's files ("mmproj"), one entry per family, as immutable data.

Keys are those of ComfyUI's classes (comfy/text_encoders, comfy/clip_model.py) as they stand beside the keys of the text
encoder. Names, split weights and shifted norms are those of llama.cpp's converter. Knows no files and no host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from .text_encoder_entry import nothing

# What early files have at the beginning of a name, and what it was meant to be.
SPELLINGS: Mapping[str, str] = MappingProxyType({"v.deepstast.": "v.deepstack."})
# Modules of ComfyUI's encoders that hold what is not the language model.
MODULES = ("visual", "vision_model", "multi_modal_projector", "audio_model", "audio_projector")


@dataclasses.dataclass(frozen=True)
class VisionPart:
    """One family of vision parts. Names and keys have a {bid} slot for the block number.

    Attributes:
        title: what users call the model.
        has: tensor names that the family has, absent: names of which it has none.
        keys: llama.cpp's name to key without prefix.
        width: name of the tensor that ends in the text encoder's width, and the dim which is that width.
        prefix: what all keys have in front; prefix_of: the same by the text encoder's width, where that decides.
        joined: key of a weight to the names of those whose rows make it up, one after the other.
        frames: key of the weight of a convolution over time to the names of its slices, one per frame.
        ranked: beginnings of names whose block number is counted among those that the file has, from 0.
        shifted: names of norm weights to which llama.cpp adds 1 and ComfyUI's class adds it again.
        floats: keys that ComfyUI's class uses as float tensors, or in whose type it computes what follows; float32.
        by_colour: names of weights over the values of a patch, which llama.cpp stores colour by colour and ComfyUI's
            class has pixel by pixel.
        turned: names of tensors whose first two dims llama.cpp exchanges.
        leave_out: names, or their beginnings, that ComfyUI's class has no use for.
        blind: widths of text encoders whose class takes no pictures.
        markers: text encoder's width to the shapes of keys without which ComfyUI does not recognise the model.
    """

    title: str
    has: tuple[str, ...]
    keys: Mapping[str, str]
    width: tuple[str, int]
    absent: tuple[str, ...] = ()
    prefix: str = ""
    prefix_of: Mapping[int, str] = nothing()
    joined: Mapping[str, tuple[str, ...]] = nothing()
    frames: Mapping[str, tuple[str, ...]] = nothing()
    ranked: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    by_colour: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    blind: tuple[int, ...] = ()
    markers: Mapping[int, Mapping[str, tuple[int, ...]]] = nothing()


def _both(names: Mapping[str, str]) -> dict[str, str]:
    """Weight and bias of each layer."""
    return {f"{name}.{part}": f"{key}.{part}" for name, key in names.items() for part in ("weight", "bias")}


def _weights(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.weight": f"{key}.weight" for name, key in names.items()}


_BLOCK, _QWEN_BLOCK = "v.blk.{bid}", "blocks.{bid}"

# -- Qwen: patches of two frames, merged four to a token. --

_QWEN_ATTENTION = _both(
    {f"{_BLOCK}.attn_qkv": f"{_QWEN_BLOCK}.attn.qkv", f"{_BLOCK}.attn_out": f"{_QWEN_BLOCK}.attn.proj"}
)
_QWEN_JOINED = MappingProxyType(
    {
        f"{_QWEN_BLOCK}.attn.qkv.{part}": tuple(f"{_BLOCK}.attn_{letter}.{part}" for letter in "qkv")
        for part in ("weight", "bias")
    }
)
_QWEN_FRAMES = MappingProxyType({"patch_embed.proj.weight": ("v.patch_embd.weight", "v.patch_embd.weight.1")})
_QWEN_HAS = ("v.patch_embd.weight", "v.patch_embd.weight.1", "v.post_ln.weight", "mm.0.weight", "mm.2.weight")

_QWEN2VL_KEYS = {
    **_QWEN_ATTENTION,
    **_both(
        {
            f"{_BLOCK}.ffn_gate": f"{_QWEN_BLOCK}.mlp.gate_proj",
            f"{_BLOCK}.ffn_up": f"{_QWEN_BLOCK}.mlp.up_proj",
            f"{_BLOCK}.ffn_down": f"{_QWEN_BLOCK}.mlp.down_proj",
            "mm.0": "merger.mlp.0",
            "mm.2": "merger.mlp.2",
        }
    ),
    **_weights(
        {
            f"{_BLOCK}.ln1": f"{_QWEN_BLOCK}.norm1",
            f"{_BLOCK}.ln2": f"{_QWEN_BLOCK}.norm2",
            "v.post_ln": "merger.ln_q",
        }
    ),
}
_QWEN35_KEYS = {
    **_QWEN_ATTENTION,
    **_both(
        {
            f"{_BLOCK}.ln1": f"{_QWEN_BLOCK}.norm1",
            f"{_BLOCK}.ln2": f"{_QWEN_BLOCK}.norm2",
            f"{_BLOCK}.ffn_up": f"{_QWEN_BLOCK}.mlp.linear_fc1",
            f"{_BLOCK}.ffn_down": f"{_QWEN_BLOCK}.mlp.linear_fc2",
            "v.post_ln": "merger.norm",
            "mm.0": "merger.linear_fc1",
            "mm.2": "merger.linear_fc2",
        }
    ),
    "v.patch_embd.bias": "patch_embed.proj.bias",
    "v.position_embd.weight": "pos_embed.weight",
}
# Features of some blocks that go into the first blocks of the language model.
_DEEPSTACK, _DEEPSTACK_KEY = "v.deepstack.{bid}", "deepstack_merger_list.{bid}"
_QWEN3VL_KEYS = {
    **_QWEN35_KEYS,
    **_both(
        {
            f"{_DEEPSTACK}.norm": f"{_DEEPSTACK_KEY}.norm",
            f"{_DEEPSTACK}.fc1": f"{_DEEPSTACK_KEY}.linear_fc1",
            f"{_DEEPSTACK}.fc2": f"{_DEEPSTACK_KEY}.linear_fc2",
        }
    ),
}

# -- Gemma 3: SigLIP and a projection. --

_SIGLIP_LAYER = "vision_model.encoder.layers.{bid}"
_GEMMA3_KEYS = {
    **_both(
        {
            "v.patch_embd": "vision_model.embeddings.patch_embedding",
            "v.post_ln": "vision_model.post_layernorm",
            f"{_BLOCK}.ln1": f"{_SIGLIP_LAYER}.layer_norm1",
            f"{_BLOCK}.ln2": f"{_SIGLIP_LAYER}.layer_norm2",
            f"{_BLOCK}.attn_q": f"{_SIGLIP_LAYER}.self_attn.q_proj",
            f"{_BLOCK}.attn_k": f"{_SIGLIP_LAYER}.self_attn.k_proj",
            f"{_BLOCK}.attn_v": f"{_SIGLIP_LAYER}.self_attn.v_proj",
            f"{_BLOCK}.attn_out": f"{_SIGLIP_LAYER}.self_attn.out_proj",
            f"{_BLOCK}.ffn_up": f"{_SIGLIP_LAYER}.mlp.fc1",
            f"{_BLOCK}.ffn_down": f"{_SIGLIP_LAYER}.mlp.fc2",
        }
    ),
    "v.position_embd.weight": "vision_model.embeddings.position_embedding.weight",
    "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
    "mm.soft_emb_norm.weight": "multi_modal_projector.mm_soft_emb_norm.weight",
}

# -- Gemma 4: a tower with clipped linear layers, or, in the 12B model, no tower at all. --

_GEMMA4_LAYER = "vision_model.encoder.layers.{bid}"
_CLIPPED = {
    f"{_BLOCK}.{name}": f"{_GEMMA4_LAYER}.{layer}"
    for name, layer in (
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    )
}
_PROJECTION = {"mm.input_projection.weight": "multi_modal_projector.embedding_projection.weight"}
_GEMMA4_KEYS = {
    **{f"{name}.weight": f"{key}.linear.weight" for name, key in _CLIPPED.items()},
    **{
        f"{name}.{limit}": f"{key}.{limit}"
        for name, key in _CLIPPED.items()
        for limit in ("input_min", "input_max", "output_min", "output_max")
    },
    **_weights(
        {
            f"{_BLOCK}.attn_q_norm": f"{_GEMMA4_LAYER}.self_attn.q_norm",
            f"{_BLOCK}.attn_k_norm": f"{_GEMMA4_LAYER}.self_attn.k_norm",
            f"{_BLOCK}.ln1": f"{_GEMMA4_LAYER}.input_layernorm",
            f"{_BLOCK}.attn_post_norm": f"{_GEMMA4_LAYER}.post_attention_layernorm",
            f"{_BLOCK}.ln2": f"{_GEMMA4_LAYER}.pre_feedforward_layernorm",
            f"{_BLOCK}.ffn_post_norm": f"{_GEMMA4_LAYER}.post_feedforward_layernorm",
            "v.patch_embd": "vision_model.patch_embedder.input_proj",
        }
    ),
    **_PROJECTION,
    "v.position_embd.weight": "vision_model.patch_embedder.position_embedding_table",
}
_GEMMA4_UNIFIED_KEYS = {
    **_both(
        {
            "v.patch_embd": "vision_model.patch_dense",
            "v.patch_norm.1": "vision_model.patch_ln1",
            "v.patch_norm.2": "vision_model.patch_ln2",
            "v.patch_norm.3": "vision_model.pos_norm",
        }
    ),
    **_PROJECTION,
    "v.position_embd.weight": "vision_model.pos_embedding",
    "mm.a.input_projection.weight": "audio_projector.embedding_projection.weight",
}

# The entries, by the `vision` of a text encoder's entry.
VISION_PARTS: Mapping[str, tuple[VisionPart, ...]] = MappingProxyType(
    {
        "qwen2vl": (
            VisionPart(
                title="Qwen2.5-VL",
                has=(*_QWEN_HAS, f"{_BLOCK}.ffn_gate.weight"),
                absent=("v.position_embd.weight",),
                keys=MappingProxyType(_QWEN2VL_KEYS),
                width=("mm.2.weight", 0),
                blind=(2048,),  # the 3B
                prefix="visual.",
                joined=_QWEN_JOINED,
                frames=_QWEN_FRAMES,
            ),
        ),
        "qwen3vl": (
            VisionPart(
                title="Qwen3-VL",
                has=(*_QWEN_HAS, "v.position_embd.weight", f"{_DEEPSTACK}.fc2.weight"),
                keys=MappingProxyType(_QWEN3VL_KEYS),
                width=("mm.2.weight", 0),
                blind=(2048,),  # the 2B
                prefix="model.visual.",
                # ComfyUI shortens the prefix of the smaller two, and expects the short one of the largest.
                prefix_of=MappingProxyType({5120: "visual."}),
                joined=_QWEN_JOINED,
                frames=_QWEN_FRAMES,
                ranked=(_DEEPSTACK,),
                floats=("pos_embed.weight",),
                markers=MappingProxyType(
                    {
                        2560: MappingProxyType(
                            {"deepstack_merger_list.0.norm.weight": (4096,), "merger.linear_fc2.weight": (2560, 4096)}
                        ),
                        4096: MappingProxyType(
                            {"deepstack_merger_list.0.norm.weight": (4608,), "merger.linear_fc2.weight": (4096, 4608)}
                        ),
                        5120: MappingProxyType({"deepstack_merger_list.0.norm.weight": (4608,)}),
                    }
                ),
            ),
        ),
        "qwen35": (
            VisionPart(
                title="Qwen3.5",
                has=(*_QWEN_HAS, "v.position_embd.weight"),
                absent=(f"{_DEEPSTACK}.fc2.weight",),
                keys=MappingProxyType(_QWEN35_KEYS),
                width=("mm.2.weight", 0),
                prefix="model.visual.",
                joined=_QWEN_JOINED,
                frames=_QWEN_FRAMES,
                floats=("pos_embed.weight",),
            ),
        ),
        "gemma3": (
            VisionPart(
                title="Gemma 3",
                has=("mm.input_projection.weight", "mm.soft_emb_norm.weight", "v.position_embd.weight"),
                keys=MappingProxyType(_GEMMA3_KEYS),
                width=("mm.input_projection.weight", 1),
                shifted=("mm.soft_emb_norm.weight",),
                floats=("vision_model.embeddings.position_embedding.weight",),
            ),
        ),
        "gemma4": (
            VisionPart(
                title="Gemma 4",
                has=(
                    "v.patch_embd.weight",
                    "v.position_embd.weight",
                    "mm.input_projection.weight",
                    f"{_BLOCK}.attn_q_norm.weight",
                ),
                absent=("mm.soft_emb_norm.weight",),
                keys=MappingProxyType(_GEMMA4_KEYS),
                width=("mm.input_projection.weight", 0),
                by_colour=("v.patch_embd.weight",),
                floats=("vision_model.patch_embedder.input_proj.weight",),
                # ComfyUI scales nothing after its tower; sound is not read.
                leave_out=("v.std_bias", "v.std_scale", f"{_BLOCK}.out_scale.", "a.", "mm.a."),
            ),
            VisionPart(
                title="Gemma 4 12B",
                has=(
                    "v.patch_embd.weight",
                    "v.patch_norm.1.weight",
                    "v.position_embd.weight",
                    "mm.input_projection.weight",
                ),
                keys=MappingProxyType(_GEMMA4_UNIFIED_KEYS),
                width=("mm.input_projection.weight", 0),
                by_colour=("v.patch_embd.weight", "v.patch_norm.1.weight", "v.patch_norm.1.bias"),
                turned=("v.position_embd.weight",),
                floats=("vision_model.patch_dense.weight", "vision_model.pos_embedding"),
            ),
        ),
    }
)
