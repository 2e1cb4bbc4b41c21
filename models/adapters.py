# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as GGUF files have them: under their own names, or as pairs WEIGHT.lora_a and WEIGHT.lora_b.

Owns the second form, which came from llama.cpp: one alpha for all pairs in the metadata, and no prefix that would tell
which model of a pipeline a weight is of. Source of the form: llama.cpp src/llama-adapter.cpp llama_adapter_lora_init.
"""

from __future__ import annotations

import re

import torch

from ..errors import UnsupportedArch, plain_text
from ..gguf_file import GGUFFile
from .values import StateDict

ALPHA_KEY = "adapter.lora.alpha"
_PAIR = re.compile(r"(?P<layer>.+?)(\.weight)?\.lora_(?P<side>[ab])(\.weight)?")
# Beginnings of names by which ComfyUI knows whose layer it is; any other is of the diffusion model.
_PREFIXES = (
    "diffusion_model.",
    "text_encoders.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "transformer.",
    "unet.",
    "lora_",
    "lycoris_",
    "base_model.",
)
_CHECKPOINT_PREFIX = "model.diffusion_model."
_OF_LAYERS = ("alpha", "dora_scale")  # what a file may have beside a pair
# Names of layers in llama.cpp's own models.
_LLAMA_CPP = re.compile(r"(enc\.|dec\.|v\.)?blk\.\d+\..*|token_embd|output(_norm)?")


def with_host_names(file: GGUFFile, state: StateDict) -> StateDict:
    """The same adapter with pairs renamed to X.lora_A.weight and X.lora_B.weight, and the alpha of all beside each.

    Raises:
        UnsupportedArch: it is for a language model in llama.cpp's names.
    """
    pairs = {key: match for key in state if (match := _PAIR.fullmatch(key))}
    if not pairs:
        return state
    foreign = next((match["layer"] for match in pairs.values() if _LLAMA_CPP.fullmatch(match["layer"])), None)
    if foreign is not None:
        raise UnsupportedArch(
            f"it is a LoRA for a language model in llama.cpp's names ({plain_text(foreign)}), which ComfyUI cannot use",
            path=file.path,
            hint="Take a LoRA for the diffusion model.",
        )
    alpha = file.metadata.get(ALPHA_KEY)
    names = {match["layer"]: _host_name(match["layer"]) for match in pairs.values()}
    renamed: StateDict = {}
    for key, value in state.items():
        match = pairs.get(key)
        if match is None:
            layer, _, last = key.rpartition(".")
            renamed[f"{names[layer]}.{last}" if layer in names and last in _OF_LAYERS else key] = value
            continue
        name = names[match["layer"]]
        renamed[f"{name}.lora_{match['side'].upper()}.weight"] = value
        if isinstance(alpha, float) and f"{match['layer']}.alpha" not in state:
            renamed[f"{name}.alpha"] = torch.tensor(alpha)
    return renamed


def _host_name(layer: str) -> str:
    """The name of a pair's layer under which ComfyUI looks for it."""
    if layer.startswith(_CHECKPOINT_PREFIX):
        return layer.removeprefix("model.")
    return layer if layer.startswith(_PREFIXES) else f"diffusion_model.{layer}"
