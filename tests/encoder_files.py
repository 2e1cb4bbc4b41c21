# SPDX-License-Identifier: Apache-2.0
"""Small text encoders in safetensors with the keys of real ones, for the tests of the converter."""

from __future__ import annotations

import re

import model_keys
import torch
from safetensors.torch import save_file

WIDTH, N_TOKENS = 256, 96
BLOCKS = {"0", "1", "30"}  # detection looks at 30 to tell CLIP-G from CLIP-L
TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")
BLOCK = re.compile(r"\.(?:layers|block|blocks)\.(\d+)\.")


def small_shape(key, shape):
    """A shape with the same detection: norms whole, other dims at most WIDTH, vocabularies N_TOKENS."""
    if key.endswith(("norm.weight", "scale")) or not shape:
        return shape
    return tuple(N_TOKENS if n > 30000 else min(n, WIDTH) for n in shape)


def small_encoder(name, dtype=torch.float16, seed=0):
    """key -> random tensor of some blocks of a stored encoder, its tokenizer as bytes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in model_keys.read_keys(name).items():
        block = BLOCK.search(key)
        if block is not None and block[1] not in BLOCKS:
            continue
        if key in TOKENIZERS:
            state[key] = torch.randint(0, 256, (300,), generator=generator, dtype=torch.uint8)
        elif key.endswith("position_ids"):
            state[key] = torch.arange(shape[-1]).reshape(shape)
        else:
            state[key] = torch.randn(small_shape(key, shape), generator=generator).to(dtype)
    return state


def save(path, state, **metadata):
    """A safetensors file of a state dict."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata or None)
    return path
