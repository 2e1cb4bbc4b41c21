# SPDX-License-Identifier: Apache-2.0
"""Sampling the tiny Flux in this process, with its own prompts, for the tests of the node that records."""

from __future__ import annotations

import functools

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from safetensors.torch import load_file

from demo import tiny_flux

STEPS = 8
LATENT = (16, 16, 16)
PROMPTS = load_file(str(tiny_flux.PROMPT_FILES[1]))


@functools.cache
def source_weights():
    """The tiny Flux's own weights, bfloat16."""
    return load_file(str(tiny_flux.MODEL))


def dense_model(change=None):
    """The host's own patcher over the tiny Flux in float32; change: what is made of its weights before."""
    state = {name: value.float() for name, value in source_weights().items()}
    return comfy.sd.load_diffusion_model_state_dict(change(state) if change else state, {"dtype": torch.float32})


def prompt(*rows):
    """A conditioning of some of the prompts, as a batch."""
    return [[PROMPTS["context"][list(rows)], {"pooled_output": PROMPTS["y"][list(rows)]}]]


def noise(*seeds):
    return torch.stack([torch.randn(LATENT, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(patcher, rows=(3,), seeds=(5,), steps=STEPS, cfg=1.0, negative=(0,), sampler="euler", **options):
    """Latents (n, 16, 16, 16) as the host's KSampler node makes them."""
    start = noise(*seeds)
    return comfy.sample.sample(
        patcher,
        start,
        steps,
        cfg,
        sampler,
        "simple",
        prompt(*rows),
        prompt(*negative),
        torch.zeros_like(start),
        disable_pbar=True,
        seed=0,
        **options,
    )
