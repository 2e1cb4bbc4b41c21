# SPDX-License-Identifier: Apache-2.0
"""What a host's CLIP loader needs to be told about text encoders from GGUF files, and what is checked after it.

The host reads the dtype of a whole encoder from its last norm, which is float32 in GGUF files whatever the rest is:
declare_dtype() shows it the dtype that it would choose itself, restore_floats() puts the exact values back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch

StateDict = dict[str, Any]

# Where hosts read an encoder's dtype. Source: comfy t5_xxl_detect and llama_detect.
DTYPE_KEYS = (
    "encoder.final_layer_norm.weight",
    "model.norm.weight",
    "model.language_model.norm.weight",
    "model.layers.0.input_layernorm.weight",
)
# Parts that encoders run without, and parameters that hosts fill in themselves.
OPTIONAL = re.compile(
    r"visual\.|model\.visual\.|vision_model\.|multi_modal_projector\.|audio_\w+\.|(model\.)?(vision|audio|embed_vision|embed_audio)"
    r"|(.*\.)?(logit_scale|text_projection\.weight|lm_head\.weight|position_ids)$"
)
_KV = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")
_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


def detect(state: StateDict) -> str:
    """What the host takes a state dict for: a key of models.clip_types.ENCODERS, another name of its own, or ""."""
    if any(key.startswith("text_embedding_projection.") for key in state) and "model.norm.weight" not in state:
        return "LTX_PROJECTION"
    if "transformer.resblocks.0.ln_1.weight" in state:  # the host renames these before it looks
        n_layers = sum(key.endswith(".ln_1.weight") for key in state)
        return {12: "CLIP_L", 24: "CLIP_H", 32: "CLIP_G"}.get(n_layers, "")
    model = comfy.sd.detect_te_model(state)
    name = "" if model is None else str(model.name)
    return name.replace("T5_", "UMT5_") if name in ("T5_XXL", "T5_BASE") and _UMT5 in state else name


def declare_dtype(state: StateDict, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Make the norms by which hosts tell an encoder's dtype, in place, `dtype` instead of float32.

    Returns:
        id of each new tensor -> the exact one that it stands for, for restore_floats().
    """
    exact: dict[int, torch.Tensor] = {}
    for key in DTYPE_KEYS:
        if key in state and state[key].dtype == torch.float32 != dtype:
            wide = state[key]
            state[key] = wide.to(dtype)
            exact[id(state[key])] = wide
    return exact


def restore_floats(model: torch.nn.Module, states: Sequence[StateDict], exact: dict[int, torch.Tensor]) -> None:
    """Give parameters that were rounded to an encoder's dtype the float32 values of the file, whatever their module.

    Args:
        model: the host's, loaded from `states`.
        exact: of declare_dtype().
    """
    for encoder, state in encoders_of(model, states):
        for name, param in list(encoder.named_parameters()):
            value = state.get(name)
            value = exact.get(id(value), value)
            if type(value) is torch.Tensor and value.dtype == torch.float32 and param.dtype.itemsize < 4:
                comfy.utils.set_attr_param(encoder, name, value.to(param.device))
                owner, _, last = name.rpartition(".")
                setattr(encoder.get_submodule(owner), f"{last}_comfy_model_dtype", torch.float32)


def missing_parameters(model: torch.nn.Module, states: Sequence[StateDict]) -> list[str]:
    """Names of parameters that encoders need and no state dict had."""
    missing = []
    for encoder, state in encoders_of(model, states):
        config = getattr(getattr(encoder, "model", None), "config", None)
        n_layers, n_shared = (getattr(config, f"num_{name}_layers", 0) for name in ("hidden", "kv_shared"))
        for name, _ in encoder.named_parameters():
            layer = _KV.match(name)  # layers that share keys and values have weights of their own in some files only
            shared = layer is not None and int(layer[1]) >= n_layers - n_shared > 0
            if name not in state and not shared and not OPTIONAL.match(name):
                missing.append(name)
    return missing


def encoders_of(model: torch.nn.Module, states: Sequence[StateDict]) -> Iterator[tuple[torch.nn.Module, StateDict]]:
    """The transformers of a CLIP model, each with the state dict that it was loaded from."""
    for module in model.modules():
        if isinstance(module, comfy.sd1_clip.SDClipModel):
            keys = {name for name, _ in module.transformer.named_parameters()}
            state = max(states, key=lambda state: len(keys & state.keys()))
            if keys & state.keys():
                yield module.transformer, state
