# SPDX-License-Identifier: Apache-2.0
"""What a host's CLIP loader needs to be told about text encoders from GGUF files, and what is checked after it.

The host reads the dtype of a whole encoder from its last norm, which is float32 in GGUF files whatever the rest is:
declare_dtype() shows it the dtype that it would choose itself, restore_floats() puts the exact values back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import comfy.sd
import comfy.utils
import torch

from ..models.clip_types import ENCODERS, KNOWN_TYPES
from ..models.vision_table import MODULES

StateDict = dict[str, Any]

# Where hosts read an encoder's dtype. Source: comfy t5_xxl_detect and llama_detect.
DTYPE_KEYS = (
    "encoder.final_layer_norm.weight",
    "model.norm.weight",
    "model.language_model.norm.weight",
    "model.layers.0.input_layernorm.weight",
)
# Parameters that hosts fill in themselves, or that nothing but text generation needs.
OPTIONAL = re.compile(r"(.*\.)?(logit_scale|text_projection\.weight|lm_head\.weight)$")
# Beginnings of parameters for pictures; sound has no file of its own yet.
VISION = tuple(f"{name}." for name in MODULES)
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


def newer_than_table() -> bool:
    """Whether the host has types or encoders that models/clip_types.py does not know, so perhaps new uses of others."""
    types = {name.lower() for name in comfy.sd.CLIPType.__members__}
    return not (types <= KNOWN_TYPES and {*comfy.sd.TEModel.__members__} <= {*ENCODERS})


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
    for i, encoder in encoders_of(model, states):
        for name, param in list(encoder.named_parameters()):
            value = states[i].get(name)
            value = exact.get(id(value), value)
            if type(value) is torch.Tensor and value.dtype == torch.float32 and param.dtype.itemsize < 4:
                comfy.utils.set_attr_param(encoder, name, value.to(param.device))
                owner, _, last = name.rpartition(".")
                setattr(encoder.get_submodule(owner), f"{last}_comfy_model_dtype", torch.float32)


@dataclasses.dataclass(frozen=True)
class Missing:
    """Parameters that an encoder has and its state dict lacks.

    Attributes:
        index: of the state dict.
        text: names of those without which it cannot read text.
        vision: names of those for pictures.
    """

    index: int
    text: list[str]
    vision: list[str]


def missing_parameters(model: torch.nn.Module, states: Sequence[StateDict]) -> Iterator[Missing]:
    """What each encoder of a CLIP model that was loaded from state dicts lacks."""
    for i, encoder in encoders_of(model, states):
        config = getattr(getattr(encoder, "model", None), "config", None)
        n_layers, n_shared = (getattr(config, f"num_{name}_layers", 0) for name in ("hidden", "kv_shared"))
        text, vision = [], []
        for name in (name for name, _ in encoder.named_parameters() if name not in states[i]):
            layer = _KV.match(name)  # layers that share keys and values have weights of their own in some files only
            if name.startswith(VISION):
                vision.append(name)
            elif not OPTIONAL.match(name) and not (layer and int(layer[1]) >= n_layers - n_shared > 0):
                text.append(name)
        yield Missing(i, text, vision)


class AbsentPart(torch.nn.Module):
    """Stands in an encoder for a part that no file had; takes no memory, and says so when a picture reaches it.

    Attributes:
        refusal: raised then.
    """

    def __init__(self, refusal: Exception) -> None:
        super().__init__()
        self.refusal = refusal

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self.refusal

    patchify = forward  # Gemma 4's encoder is asked for this first


def drop_parts(model: torch.nn.Module, states: Sequence[StateDict], missing: Missing, refusal: Exception) -> None:
    """Put an AbsentPart in place of each part of which parameters are missing."""
    for i, encoder in encoders_of(model, states):
        if i == missing.index:
            for part in {name.split(".")[0] for name in missing.vision}:
                setattr(encoder, part, AbsentPart(refusal))


def encoders_of(model: torch.nn.Module, states: Sequence[StateDict]) -> Iterator[tuple[int, torch.nn.Module]]:
    """The transformers of a CLIP model, each with the index of the state dict that it was loaded from."""
    for module in model.modules():
        transformer = getattr(module, "transformer", None)
        if isinstance(transformer, torch.nn.Module):
            # Names alone do not tell: those of a CLIP-L are among those of a CLIP-G.
            params = list(transformer.named_parameters())
            n_common = [sum(k in state and state[k].shape == p.shape for k, p in params) for state in states]
            if any(n_common):
                yield n_common.index(max(n_common)), transformer
