# SPDX-License-Identifier: Apache-2.0
"""The text encoders that are read from llama.cpp's files, one entry per family, as immutable data.

Keys are those of ComfyUI's classes (comfy/text_encoders). Names, interleaved rows and shifted norms are those of
llama.cpp's converter. To add an encoder, add an entry; where the tensors of two families look alike and the tags do not
tell, the first of them is taken.
"""

from __future__ import annotations

from types import MappingProxyType

from .text_encoder_entry import TextEncoder

# -- T5: an encoder with relative positions. --

_T5_BLOCK = "encoder.block.{bid}.layer"
_T5_KEYS = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "enc.blk.{bid}.attn_q.weight": f"{_T5_BLOCK}.0.SelfAttention.q.weight",
    "enc.blk.{bid}.attn_k.weight": f"{_T5_BLOCK}.0.SelfAttention.k.weight",
    "enc.blk.{bid}.attn_v.weight": f"{_T5_BLOCK}.0.SelfAttention.v.weight",
    "enc.blk.{bid}.attn_o.weight": f"{_T5_BLOCK}.0.SelfAttention.o.weight",
    "enc.blk.{bid}.attn_rel_b.weight": f"{_T5_BLOCK}.0.SelfAttention.relative_attention_bias.weight",
    "enc.blk.{bid}.attn_norm.weight": f"{_T5_BLOCK}.0.layer_norm.weight",
    "enc.blk.{bid}.ffn_down.weight": f"{_T5_BLOCK}.1.DenseReluDense.wo.weight",
    "enc.blk.{bid}.ffn_norm.weight": f"{_T5_BLOCK}.1.layer_norm.weight",
}
_T5_GATED_KEYS = {
    **_T5_KEYS,
    "enc.blk.{bid}.ffn_gate.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi_0.weight",
    "enc.blk.{bid}.ffn_up.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi_1.weight",
}
FULL_T5 = "it is a full encoder-decoder; take a file with the encoder only (general.architecture t5encoder)"
_T5_REFUSE = MappingProxyType({"dec.": FULL_T5})

# -- Decoders: the names that all of them share, then what each family adds. --

_LAYER = "model.layers.{bid}"
_DECODER_KEYS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{bid}.attn_norm.weight": f"{_LAYER}.input_layernorm.weight",
    "blk.{bid}.attn_q.weight": f"{_LAYER}.self_attn.q_proj.weight",
    "blk.{bid}.attn_k.weight": f"{_LAYER}.self_attn.k_proj.weight",
    "blk.{bid}.attn_v.weight": f"{_LAYER}.self_attn.v_proj.weight",
    "blk.{bid}.attn_output.weight": f"{_LAYER}.self_attn.o_proj.weight",
    "blk.{bid}.ffn_gate.weight": f"{_LAYER}.mlp.gate_proj.weight",
    "blk.{bid}.ffn_up.weight": f"{_LAYER}.mlp.up_proj.weight",
    "blk.{bid}.ffn_down.weight": f"{_LAYER}.mlp.down_proj.weight",
}
_LLAMA_KEYS = {**_DECODER_KEYS, "blk.{bid}.ffn_norm.weight": f"{_LAYER}.post_attention_layernorm.weight"}
_QKV_BIAS_KEYS = {
    "blk.{bid}.attn_q.bias": f"{_LAYER}.self_attn.q_proj.bias",
    "blk.{bid}.attn_k.bias": f"{_LAYER}.self_attn.k_proj.bias",
    "blk.{bid}.attn_v.bias": f"{_LAYER}.self_attn.v_proj.bias",
}
_QK_NORM_KEYS = {
    "blk.{bid}.attn_q_norm.weight": f"{_LAYER}.self_attn.q_norm.weight",
    "blk.{bid}.attn_k_norm.weight": f"{_LAYER}.self_attn.k_norm.weight",
}
_GEMMA_KEYS = {
    **_DECODER_KEYS,
    "blk.{bid}.post_attention_norm.weight": f"{_LAYER}.post_attention_layernorm.weight",
    "blk.{bid}.ffn_norm.weight": f"{_LAYER}.pre_feedforward_layernorm.weight",
    "blk.{bid}.post_ffw_norm.weight": f"{_LAYER}.post_feedforward_layernorm.weight",
}
_GEMMA4_KEYS = {
    **_GEMMA_KEYS,
    **_QK_NORM_KEYS,
    "blk.{bid}.layer_output_scale.weight": f"{_LAYER}.layer_scalar",
    "blk.{bid}.inp_gate.weight": f"{_LAYER}.per_layer_input_gate.weight",
    "blk.{bid}.proj.weight": f"{_LAYER}.per_layer_projection.weight",
    "blk.{bid}.post_norm.weight": f"{_LAYER}.post_per_layer_input_norm.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
# ComfyUI's GPT-OSS has no "model." in front, and one weight for gate and up, their rows in turn.
_GPT_OSS_LAYER = "layers.{bid}"
_EXPERTS = f"{_GPT_OSS_LAYER}.mlp.experts"
_GPT_OSS_KEYS = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "blk.{bid}.attn_norm.weight": f"{_GPT_OSS_LAYER}.input_layernorm.weight",
    "blk.{bid}.post_attention_norm.weight": f"{_GPT_OSS_LAYER}.post_attention_layernorm.weight",
    "blk.{bid}.attn_sinks.weight": f"{_GPT_OSS_LAYER}.self_attn.sinks",
    **{
        f"blk.{{bid}}.{name}.{part}": f"{_GPT_OSS_LAYER}.{module}.{part}"
        for name, module in (
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate_inp", "mlp.router"),
            ("ffn_gate_exps", "mlp.experts.gate_proj"),
            ("ffn_up_exps", "mlp.experts.up_proj"),
            ("ffn_down_exps", "mlp.experts.down_proj"),
        )
        for part in ("weight", "bias")
    },
}

# ComfyUI detects Qwen3.5 by its longer prefix, which it then shortens itself.
_QWEN35_LAYER = "model.language_model.layers.{bid}"
_QWEN35_KEYS = {
    **{name: key.replace("model.", "model.language_model.", 1) for name, key in _DECODER_KEYS.items()},
    **{name: key.replace("model.", "model.language_model.", 1) for name, key in _QK_NORM_KEYS.items()},
    "output.weight": "model.lm_head.weight",
    "blk.{bid}.post_attention_norm.weight": f"{_QWEN35_LAYER}.post_attention_layernorm.weight",
    "blk.{bid}.attn_qkv.weight": f"{_QWEN35_LAYER}.linear_attn.in_proj_qkv.weight",
    "blk.{bid}.attn_gate.weight": f"{_QWEN35_LAYER}.linear_attn.in_proj_z.weight",
    "blk.{bid}.ssm_beta.weight": f"{_QWEN35_LAYER}.linear_attn.in_proj_b.weight",
    "blk.{bid}.ssm_alpha.weight": f"{_QWEN35_LAYER}.linear_attn.in_proj_a.weight",
    "blk.{bid}.ssm_out.weight": f"{_QWEN35_LAYER}.linear_attn.out_proj.weight",
    "blk.{bid}.ssm_conv1d.weight": f"{_QWEN35_LAYER}.linear_attn.conv1d.weight",
    "blk.{bid}.ssm_norm.weight": f"{_QWEN35_LAYER}.linear_attn.norm.weight",
    "blk.{bid}.ssm_dt.bias": f"{_QWEN35_LAYER}.linear_attn.dt_bias",
    "blk.{bid}.ssm_a": f"{_QWEN35_LAYER}.linear_attn.A_log",
}

# Factors of llama.cpp's rope, which ComfyUI computes itself, and the matrix that turns states into words.
_ROPE_FREQS = "rope_freqs.weight"
_LM_HEAD = "output.weight"
_UNUSED = (_ROPE_FREQS, _LM_HEAD)
_KEEP_LM_HEAD = {_LM_HEAD: "model.lm_head.weight"}

_PERMUTED = MappingProxyType(
    {
        f"blk.{{bid}}.attn_{projection}.{part}": count
        for projection, count in (("q", "head_count"), ("k", "head_count_kv"))
        for part in ("weight", "bias")
    }
)
_DECODER_HAS = ("token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate.weight")
_NO_LLAMA = ("blk.0.attn_q_norm.weight", "blk.0.post_attention_norm.weight", "blk.0.attn_sinks.weight")
_GEMMA_HAS = (*_DECODER_HAS, "blk.0.post_ffw_norm.weight")

TEXT_ENCODERS: tuple[TextEncoder, ...] = (
    TextEncoder(
        title="T5 v1.1",
        has=("enc.blk.0.ffn_gate.weight",),
        absent=("enc.blk.1.attn_rel_b.weight",),
        keys=MappingProxyType(_T5_GATED_KEYS),
        refuse=_T5_REFUSE,
    ),
    TextEncoder(
        title="T5 v1.0",
        has=("enc.blk.0.ffn_up.weight",),
        absent=("enc.blk.0.ffn_gate.weight",),
        keys=MappingProxyType({**_T5_KEYS, "enc.blk.{bid}.ffn_up.weight": f"{_T5_BLOCK}.1.DenseReluDense.wi.weight"}),
        refuse=_T5_REFUSE,
    ),
    TextEncoder(
        title="UMT5",
        has=("enc.blk.0.ffn_gate.weight", "enc.blk.1.attn_rel_b.weight"),
        keys=MappingProxyType(_T5_GATED_KEYS),
        refuse=_T5_REFUSE,
        tokenizer="spiece",
    ),
    TextEncoder(
        title="Qwen2",
        has=(*_DECODER_HAS, "blk.0.ffn_norm.weight", "blk.0.attn_k.bias"),
        absent=_NO_LLAMA,
        tags=("qwen2", "qwen2vl"),
        keys=MappingProxyType({**_LLAMA_KEYS, **_QKV_BIAS_KEYS}),
        leave_out=_UNUSED,
        vision="qwen2vl",
    ),
    TextEncoder(
        title="Llama",
        has=(*_DECODER_HAS, "blk.0.ffn_norm.weight"),
        absent=_NO_LLAMA,
        tags=("llama",),
        keys=MappingProxyType({**_LLAMA_KEYS, **_QKV_BIAS_KEYS}),
        leave_out=_UNUSED,
        head_counts=_PERMUTED,
    ),
    TextEncoder(
        title="Mistral",
        has=(*_DECODER_HAS, "blk.0.ffn_norm.weight"),
        absent=_NO_LLAMA,
        tags=("mistral3", "tekken"),
        keys=MappingProxyType(_LLAMA_KEYS),
        leave_out=_UNUSED,
        head_counts=_PERMUTED,
        tokenizer="tekken",
    ),
    TextEncoder(
        title="Qwen3",
        has=(*_DECODER_HAS, "blk.0.ffn_norm.weight", "blk.0.attn_q_norm.weight"),
        absent=("blk.0.post_ffw_norm.weight", "blk.0.ssm_a"),
        tags=("qwen3",),
        keys=MappingProxyType({**_LLAMA_KEYS, **_QK_NORM_KEYS, **_KEEP_LM_HEAD}),
        leave_out=(_ROPE_FREQS,),
    ),
    TextEncoder(
        title="Qwen3-VL",
        has=(*_DECODER_HAS, "blk.0.ffn_norm.weight", "blk.0.attn_q_norm.weight"),
        absent=("blk.0.post_ffw_norm.weight", "blk.0.ssm_a"),
        tags=("qwen3vl",),
        keys=MappingProxyType({**_LLAMA_KEYS, **_QK_NORM_KEYS, **_KEEP_LM_HEAD}),
        leave_out=(_ROPE_FREQS,),
        vision="qwen3vl",
    ),
    TextEncoder(
        title="Gemma 2",
        has=_GEMMA_HAS,
        absent=("blk.0.attn_q_norm.weight",),
        keys=MappingProxyType(_GEMMA_KEYS),
        leave_out=_UNUSED,
        norm_offset=1.0,
        tokenizer="spiece",
    ),
    TextEncoder(
        title="Gemma 3",
        has=(*_GEMMA_HAS, "blk.0.attn_q_norm.weight"),
        absent=("blk.0.layer_output_scale.weight",),
        keys=MappingProxyType({**_GEMMA_KEYS, **_QK_NORM_KEYS}),
        leave_out=_UNUSED,
        norm_offset=1.0,
        tokenizer="spiece",
        vision="gemma3",
    ),
    TextEncoder(
        title="Gemma 4",
        has=(*_GEMMA_HAS, "blk.0.layer_output_scale.weight"),
        keys=MappingProxyType(_GEMMA4_KEYS),
        leave_out=_UNUSED,
        tokenizer="json",
        vision="gemma4",
    ),
    TextEncoder(
        title="GPT-OSS",
        has=("token_embd.weight", "blk.0.attn_sinks.weight", "blk.0.ffn_gate_exps.weight"),
        keys=MappingProxyType(_GPT_OSS_KEYS),
        leave_out=_UNUSED,
        alternate=MappingProxyType(
            {
                f"{_EXPERTS}.gate_up_proj.{part}": (f"{_EXPERTS}.gate_proj.{part}", f"{_EXPERTS}.up_proj.{part}")
                for part in ("weight", "bias")
            }
        ),
        tokenizer="json",
    ),
    TextEncoder(
        title="Qwen3.5",
        has=("token_embd.weight", "blk.0.attn_qkv.weight", "blk.0.ssm_a", "blk.0.ssm_alpha.weight"),
        keys=MappingProxyType(_QWEN35_KEYS),
        # A block that predicts the token after the next.
        leave_out=tuple(
            f"blk.{{bid}}.nextn.{name}.weight"
            for name in ("eh_proj", "embed_tokens", "enorm", "hnorm", "shared_head_head", "shared_head_norm")
        ),
        norm_offset=1.0,
        unshifted=("blk.{bid}.ssm_norm.weight",),
        value_heads=MappingProxyType(
            {
                "blk.{bid}.attn_qkv.weight": "last rows",
                "blk.{bid}.ssm_conv1d.weight": "last rows",
                "blk.{bid}.attn_gate.weight": "rows",
                "blk.{bid}.ssm_beta.weight": "rows",
                "blk.{bid}.ssm_alpha.weight": "rows",
                "blk.{bid}.ssm_dt.bias": "rows",
                "blk.{bid}.ssm_a": "rows",
                "blk.{bid}.ssm_out.weight": "columns",
            }
        ),
        decay="blk.{bid}.ssm_a",
        conv="blk.{bid}.ssm_conv1d.weight",
        vision="qwen35",
    ),
)
