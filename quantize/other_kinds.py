# SPDX-License-Identifier: Apache-2.0
"""Files that hold tensors but no model that is converted: what they are, told by their names, and what to do.

Text encoders that ComfyUI knows are found before this table is asked (encoder_sources). The table decides nothing about
a file that it does not know: that one is taken for a diffusion model. To have another kind refused, add a row; the key
lists of real models in the tests must stay untouched by it.
Source: ComfyUI comfy/model_detection.py tells which models have diffusers-like names as their native ones (0.33).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedArch
from ..models.encoder_archs import DIFFUSION_PARTS

ONLY_MODELS = "Only diffusion models and text encoders are converted; ComfyUI loads this file as it is."
ORIGINAL_LAYOUT = "Take the file in the original layout, as ComfyUI loads it."
UNKNOWN_ENCODER = "Take the safetensors file of a text encoder that ComfyUI loads, with the names that it has there."
LLAMA_CPP = "Quantize it with llama.cpp's llama-quantize, or start from the safetensors file."


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not converted.

    Attributes:
        title: what it is, with its article.
        hint: what to do.
        marks: patterns of whole names; each must match at least one name.
        absent: pattern of a name that shows that it is something else ("": none).
        share: the first mark must match this fraction of all names.
    """

    title: str
    hint: str
    marks: tuple[str, ...]
    absent: str = ""
    share: float = 0.0

    def matches(self, names: Sequence[str]) -> bool:
        """Whether a file with these names is of this kind."""
        for i, mark in enumerate(self.marks):
            n_found = sum(map(bool, map(re.compile(mark).fullmatch, names)))
            if not n_found or (i == 0 and n_found < self.share * len(names)):
                return False
        return not (self.absent and any(map(re.compile(self.absent).fullmatch, names)))


_BLOCK0 = r"transformer_blocks\.0\."
_LORA = (
    r".*[._](lora_(up|down|mid|A|B|a|b|linear_layer|embedding_[AB])|lokr_\w+|hada_\w+|dora_scale|oft_\w+|lora_magnitude_vector)"
    r"(\..+)?|lora_.*\.alpha|.*\.lora\.(up|down)\.weight|.*\.(diff|diff_b|set_weight)"
)
_VAE = (
    r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_?in\w*|conv_?out\w*|conv[12]|down|up|mid|down_blocks|up_blocks|"
    r"mid_block|middle|downsamples|upsamples|head|norm_out|conv_norm_out|project_\w+|stages?)\..*"
)
LORAS: tuple[Kind, ...] = (
    Kind("a LoRA", ONLY_MODELS, (_LORA + r"|.*alpha",), share=0.5),
    Kind(
        "a model with a LoRA that is not merged into it",
        "Merge it first, or take the model and the LoRA as separate files.",
        (r".*\.base_layer\.weight", _LORA),
    ),
)
KINDS: tuple[Kind, ...] = (
    *LORAS,
    Kind(
        "a ControlNet",
        ONLY_MODELS,
        (
            r"(.*\.)?(control_model|controlnet_blocks|controlnet_single_blocks|controlnet_\w*embed\w*|"
            r"controlnet_down_blocks|controlnet_mid_block|input_hint_block|zero_convs|control_layers)\..*",
        ),
    ),
    Kind("an IP-Adapter", ONLY_MODELS, (r"(ip_adapter|image_proj\w*)\..*",), share=0.5),
    Kind("a Redux style model", ONLY_MODELS, (r"redux_(up|down)\..*",), share=0.5),
    Kind("a T2I-Adapter", ONLY_MODELS, (r"(adapter\.)?(body\.\d+\.(block\d|in_conv|resnets)|conv_in)\..*",), share=0.9),
    Kind("a motion module (AnimateDiff)", ONLY_MODELS, (r".*motion_modules\..*",), share=0.5),
    Kind("an upscale model", ONLY_MODELS, (r"((model\.)?\d+\.sub\.|RRDB_trunk\.|body\.\d+\.rdb\d).*",), share=0.3),
    Kind(
        "a tiny autoencoder (TAESD)",
        ONLY_MODELS,
        (r"((en|de)coder\.layers\.|\w+coder\.)?\d+\.conv\.\d+\.\w+",),
        share=0.5,
    ),
    Kind("a VAE", ONLY_MODELS, (_VAE,), share=0.3),
    Kind(
        "a part of a T5 text encoder",
        UNKNOWN_ENCODER,
        (r"(.*\.)?(en|de)coder\.block\.\d+\.layer\..*",),
        share=0.5,
    ),
    Kind(
        "a CLIP vision model",
        ONLY_MODELS,
        (r"(.*\.)?(vision_model\.(encoder|embeddings)|visual\.transformer)\..*",),
        share=0.4,
        absent=r"(.*\.)?(text_model\.encoder|token_embedding)\..*|" + DIFFUSION_PARTS,
    ),
    Kind(
        "a part of a CLIP text encoder",
        UNKNOWN_ENCODER,
        (r"(.*\.)?(text_model\.(encoder|embeddings)|transformer\.resblocks)\..*",),
        share=0.3,
        absent=DIFFUSION_PARTS,
    ),
    Kind(
        "a language model that ComfyUI has no text encoder for",
        UNKNOWN_ENCODER,
        (
            r"(.*\.)?layers\.\d+\..*",
            r"(.*\.)?layers\.0\.self_attn\.(q_proj|qkv_proj)\.weight",
            r"(.*\.)?embed_tokens\.weight",
        ),
        share=0.5,
        absent=DIFFUSION_PARTS,
    ),
    Kind("a text encoder in llama.cpp's names", LLAMA_CPP, (r"token_embd\.weight", r"(enc\.)?blk\.0\..*")),
    Kind("a vision part of a language model (mmproj)", LLAMA_CPP, (r"v\.blk\.0\..*",)),
    Kind(
        "a textual inversion embedding",
        ONLY_MODELS,
        (r"emb_params|clip_[lgh]|t5xxl|string_to_(param|token)\..*",),
        share=0.5,
    ),
    Kind("the state of an optimizer", "Pass the model that lies beside it.", (r".*exp_avg(_sq)?.*",), share=0.3),
    Kind(
        "a UNet in diffusers layout (Stable Diffusion or SDXL)",
        "Take the checkpoint in the original layout, one .safetensors file.",
        (r"down_blocks\.\d+\.(resnets|attentions)\..*", r"conv_in\.weight"),
    ),
    Kind(
        "a Stable Diffusion 3 in diffusers layout",
        ORIGINAL_LAYOUT,
        (_BLOCK0 + r"attn\.add_q_proj\.weight", r"pos_embed\.proj\.weight"),
    ),
    Kind("an AuraFlow in diffusers layout", ORIGINAL_LAYOUT, (r"joint_transformer_blocks\.0\..*",)),
    Kind(
        "a PixArt in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"adaln_single\.emb\.timestep_embedder\.linear_1\.bias", r"pos_embed\.proj\.bias", _BLOCK0 + ".*"),
    ),
    Kind("a Z-Image in diffusers layout", ORIGINAL_LAYOUT, (r"noise_refiner\.0\.attention\.to_q\.weight",)),
    Kind(
        "a Lumina 2 in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"time_caption_embed\..*", r"layers\.0\.attn\.to_q\.weight"),
        absent=r"(ref_image_refiner|ref_image_patch_embedder|double_stream_layers)\..*",
    ),
    Kind(
        "a Flux.2 in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj\.weight",),
    ),
    Kind("a Chroma in diffusers layout", ORIGINAL_LAYOUT, (r"distilled_guidance_layer\..*", _BLOCK0 + ".*")),
    Kind(
        "a HunyuanVideo in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"context_embedder\.token_refiner\..*", _BLOCK0 + ".*"),
    ),
    Kind("a Wan in diffusers layout", ORIGINAL_LAYOUT, (r"condition_embedder\..*", r"blocks\.0\.attn1\.to_q\.weight")),
    Kind(
        "an LTX-Video in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"time_embed\.emb\.timestep_embedder\.linear_1\.weight", _BLOCK0 + ".*"),
    ),
    Kind("a Cosmos in diffusers layout", ORIGINAL_LAYOUT, (r"time_embed\.t_embedder\.linear_1\.weight",)),
    Kind("a Mochi in diffusers layout", ORIGINAL_LAYOUT, (r"time_embed\.pooler\.to_q\.weight",)),
    Kind(
        "a CogVideoX in diffusers layout",
        ORIGINAL_LAYOUT,
        (r"patch_embed\.text_proj\.weight", _BLOCK0 + r"norm1\.linear\.weight"),
    ),
    Kind("a Hunyuan-DiT in diffusers layout", ORIGINAL_LAYOUT, (r"time_extra_emb\.timestep_embedder\..*",)),
)


def recognise(names: Sequence[str], kinds: Sequence[Kind] = KINDS) -> Kind | None:
    """The kind that a file with these names is of, or None."""
    return next((kind for kind in kinds if kind.matches(names)), None)


def refuse(path: Path, names: Sequence[str], kinds: Sequence[Kind] = KINDS) -> None:
    """Raise UnsupportedArch when the names are those of a kind that is not converted."""
    kind = recognise(names, kinds)
    if kind is not None:
        raise UnsupportedArch(f"it is {kind.title}", path=path, hint=kind.hint)
