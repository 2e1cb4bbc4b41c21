# SPDX-License-Identifier: Apache-2.0
"""Weights that diffusers' layout of Flux and SD3 has in parts, and ComfyUI joins as it loads them."""

from __future__ import annotations

import re
from collections.abc import Collection

_ATTENTION = re.compile(r"(?P<start>(.*\.)?(to_|add_))[qkv](?P<end>(_proj)?\.(weight|bias))", re.DOTALL)
# In Flux's single blocks query, key and value are joined with a part of the MLP.
_SINGLE = re.compile(r"(?P<block>single_transformer_blocks\.\d+\.)(attn\.to_q|proj_mlp)(?P<end>\.(weight|bias))")


def lacking_parts(names: Collection[str]) -> list[str]:
    """Parts that a file with these names lacks of weights of which it has others.

    ComfyUI leaves in their place whatever was in memory. Source: comfy/model_detection.py convert_diffusers_mmdit.
    """
    wanted = set()
    for name in names:
        if part := _ATTENTION.fullmatch(name):
            wanted |= {f"{part['start']}{letter}{part['end']}" for letter in "qkv"}
        if part := _SINGLE.fullmatch(name):
            wanted |= {f"{part['block']}{other}{part['end']}" for other in ("attn.to_q", "proj_mlp")}
    return sorted(wanted - {*names})
