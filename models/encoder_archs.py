# SPDX-License-Identifier: Apache-2.0
"""The text encoders that the quantizer makes files of, under ComfyUI's own names: which they are, and what tensors do.

text_encoders.find_native says where in a file an encoder is and what ComfyUI calls its tensors; the entries here name
it. More special families come first: the first entry that fits is taken. Vision parts are in no block and so keep their
precision, as mmproj files do. Source: ComfyUI comfy/sd.py detect_te_model, comfy/text_encoders (0.33).
"""

from __future__ import annotations

import dataclasses
import re

from .arch_entry import Arch, Category, Rules, Shapes

# What stands around a language model that is part of a diffusion model.
DIFFUSION_PARTS = r"(.*\.)?(x_embedder|t_embedder\d?|time_embed\w*|img_in|final_layer|vae2llm)\..*"
# Tables that classes compute themselves.
_COMPUTED = (r"(.*\.)?position_ids", r"(.*\.)?inv_freq")
_LM_HEAD = r"(.*\.)?lm_head\..*"  # turns states into words; few of ComfyUI's classes do
_OUTPUT_PROJECTION: Rules = ((r"(.*\.)?(o_proj|out_proj)\.weight", Category.ATTN_OUTPUT),)

_T5_BLOCK = "encoder.block.0.layer"
_T5_UNGATED = f"{_T5_BLOCK}.1.DenseReluDense.wi.weight"
_T5 = Arch(
    "t5",
    "T5 v1.1",
    {f"{_T5_BLOCK}.0.SelfAttention.q.weight": None},
    absent=(_T5_UNGATED,),
    shared_tag="t5encoder",
    blocks=(r"encoder\.block\.\d+\.",),
    rules=(
        (r"layer\.0\.SelfAttention\.relative_attention_bias\.weight", Category.EMBED),
        (r"layer\.0\.SelfAttention\.o\.weight", Category.ATTN),  # no more bits for it in llama.cpp's mixtures of T5
        (r"layer\.1\.DenseReluDense\.wo\.weight", Category.FFN_DOWN),
        (r"layer\.1\.DenseReluDense\.wi(_\d)?\.weight", Category.FFN),
    ),
    outer=((r"shared\.weight", Category.TOKEN_EMBD),),
    keep_f32=(r".*\.relative_attention_bias\.weight",),
    # ComfyUI runs the encoder alone and looks tokens up in `shared`.
    drop=(r"decoder\..*", _LM_HEAD, r"encoder\.embed_tokens\.weight"),
    is_encoder=True,
)

_CLIP_G_LAYER = "text_model.encoder.layers.30.mlp.fc1.weight"
_CLIP_H_LAYER = "text_model.encoder.layers.22.mlp.fc1.weight"
_CLIP_TOKENS = "text_model.embeddings.token_embedding.weight"
# llama.cpp's "clip" is a vision part.
_CLIP = Arch(
    "clip_text",
    "CLIP-L",
    {_CLIP_TOKENS: None},
    blocks=(r"text_model\.encoder\.layers\.\d+\.",),
    rules=_OUTPUT_PROJECTION,
    outer=(
        (r"text_model\.embeddings\.token_embedding\.weight", Category.TOKEN_EMBD),
        (r"text_projection\.weight", Category.OUTPUT),
    ),
    drop=(*_COMPUTED, r"vision_model\..*", r"visual_projection\..*"),
    is_encoder=True,
)

_LAYER = "model.layers.0"
_NORM = f"{_LAYER}.input_layernorm.weight"
_Q_NORM = f"{_LAYER}.self_attn.q_norm.weight"
_GEMMA_NORM = f"{_LAYER}.post_feedforward_layernorm.weight"
_DEEPSTACK = "visual.deepstack_merger_list.0.norm.weight"
_DECODER = Arch(
    "llama",
    "Llama",
    {_NORM: None},
    # Of llama.cpp's tags, those whose files have changed weights are not used: programs would change them back.
    shared_tag="llama-native",
    blocks=(r"(model\.)?layers\.\d+\.",),
    rules=_OUTPUT_PROJECTION,
    outer=((r"(model\.)?(embed_tokens(_per_layer)?|lm_head)\.weight", Category.TOKEN_EMBD),),
    drop=(*_COMPUTED, _LM_HEAD),
    is_encoder=True,
)


def _decoder(name: str, title: str, key: str) -> Arch:
    """A decoder that is known by one key."""
    return dataclasses.replace(_DECODER, name=name, title=title, detect={_NORM: None, key: None}, shared_tag="")


def _mistral(title: str, width: int) -> Arch:
    """A decoder that is known by its width, as by the host; its class takes no images."""
    return dataclasses.replace(
        _DECODER,
        name="mistral3",
        title=title,
        detect={_NORM: (width,)},
        shared_tag="mistral3-native",
        drop=(*_DECODER.drop, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
        tokenizer="tekken",
    )


def _qwen3(name: str, title: str, key: str) -> Arch:
    """A decoder whose class has a use for the matrix that turns states into words."""
    return dataclasses.replace(_decoder(name, title, key), drop=_COMPUTED)


def _gemma(name: str, title: str, *keys: str, tokenizer: str = "spiece", shared_tag: str = "") -> Arch:
    detect = dict.fromkeys((_NORM, _GEMMA_NORM, *keys))
    return dataclasses.replace(
        _DECODER, name=name, title=title, detect=detect, tokenizer=tokenizer, shared_tag=shared_tag
    )


ENCODERS: tuple[Arch, ...] = (
    dataclasses.replace(_T5, title="T5 v1.0", detect={**_T5.detect, _T5_UNGATED: None}, absent=()),
    dataclasses.replace(
        _T5,
        name="umt5",
        title="UMT5",
        detect={**_T5.detect, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": None},
        tokenizer="spiece",
    ),
    _T5,
    dataclasses.replace(_CLIP, title="CLIP-G", detect={_CLIP_TOKENS: None, _CLIP_G_LAYER: None}),
    dataclasses.replace(_CLIP, title="CLIP-H", detect={_CLIP_TOKENS: None, _CLIP_H_LAYER: None}),
    _CLIP,
    dataclasses.replace(
        _CLIP,
        title="CLIP in OpenCLIP's names",
        detect={"transformer.resblocks.0.ln_1.weight": None},
        blocks=(r"transformer\.resblocks\.\d+\.",),
        outer=((r"token_embedding\.weight", Category.TOKEN_EMBD),),
        drop=(r"visual\..*",),
    ),
    dataclasses.replace(
        _DECODER,
        name="jina_clip",
        title="Jina CLIP 2",
        detect={"model.encoder.layers.0.mixer.Wqkv.weight": None},
        shared_tag="",
        blocks=(r"model\.encoder\.layers\.\d+\.",),
        rules=((r"mixer\.Wqkv\.weight", Category.ATTN_QKV), *_OUTPUT_PROJECTION),
        outer=((r"model\.embeddings\.word_embeddings\.weight", Category.TOKEN_EMBD),),
        tokenizer="spiece",
    ),
    dataclasses.replace(
        _DECODER,
        name="t5gemma",
        title="T5Gemma",
        detect={"model.encoder.layers.0.pre_self_attn_layernorm.weight": None},
        shared_tag="",
        blocks=(r"model\.encoder\.layers\.\d+\.",),
        outer=((r"model\.encoder\.embed_tokens\.weight", Category.TOKEN_EMBD),),
        drop=(*_COMPUTED, r"model\.decoder\..*", _LM_HEAD),
        tokenizer="spiece",
    ),
    dataclasses.replace(
        _DECODER,
        name="gpt-oss",
        title="GPT-OSS",
        detect={"layers.0.self_attn.sinks": None},
        shared_tag="",
        keep_f32=(r".*\.mlp\.router\.weight",),
        tokenizer="json",
    ),
    dataclasses.replace(
        _DECODER,
        name="qwen35",
        title="Qwen3.5",
        detect={"model.language_model.layers.0.linear_attn.A_log": None},
        shared_tag="qwen35-native",
        blocks=(r"model\.language_model\.layers\.\d+\.",),
        # Few rows that decide about the whole state.
        rules=((r"linear_attn\.(in_proj_[ab]|conv1d)\.weight", Category.EMBED), *_OUTPUT_PROJECTION),
        outer=((r"(model\.)?(language_model\.embed_tokens|lm_head)\.weight", Category.TOKEN_EMBD),),
        drop=(*_COMPUTED, r"mtp\..*"),  # mtp: predicts the token after the next
    ),
    _gemma("gemma4", "Gemma 4", _Q_NORM, f"{_LAYER}.layer_scalar", tokenizer="json"),
    _gemma("gemma3", "Gemma 3", _Q_NORM, shared_tag="gemma3-native"),
    _gemma("gemma2", "Gemma 2", shared_tag="gemma2-native"),
    _decoder("qwen2vl", "Qwen2.5", f"{_LAYER}.self_attn.k_proj.bias"),
    _qwen3("qwen3vl", "Qwen3-VL", f"model.{_DEEPSTACK}"),
    _qwen3("qwen3vl", "Qwen3-VL", _DEEPSTACK),
    _qwen3("qwen3", "Qwen3", _Q_NORM),
    _mistral("Mistral Small", 5120),
    _mistral("Ministral", 3072),
    _DECODER,
)

_is_diffusion_part = re.compile(DIFFUSION_PARTS).fullmatch


def detect_encoder(shapes: Shapes) -> Arch | None:
    """The entry of a text encoder with these keys (as ComfyUI has them) and shapes; None for a diffusion model."""
    found = next((arch for arch in ENCODERS if arch.matches(shapes)), None)
    return None if found is None or any(map(_is_diffusion_part, shapes)) else found
