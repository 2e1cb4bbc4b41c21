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
_PREFIXES = ("diffusion_model.", "text_encoders.", "transformer.", "unet.", "lora_", "base_model.")
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
    renamed: StateDict = {}
    for key, value in state.items():
        match = pairs.get(key)
        if match is None:
            renamed[key] = value
            continue
        layer = match["layer"] if match["layer"].startswith(_PREFIXES) else f"diffusion_model.{match['layer']}"
        renamed[f"{layer}.lora_{match['side'].upper()}.weight"] = value
        if isinstance(alpha, float) and f"{match['layer']}.alpha" not in state:
            renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    return renamed
