# SPDX-License-Identifier: Apache-2.0
"""The tiny Flux of tests/data/tiny-flux as the demo and the tests sample it: its files, prompts and sizes."""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny-flux"
MODEL = DATA / "tiny-flux-bf16.safetensors"
PROMPT_FILES = (DATA / "prompts.json", DATA / "prompts.safetensors")
VAE_FILES = (DATA / "taef1_encoder.safetensors", DATA / "taef1_decoder.safetensors")

# Eight prompts with seeds whose digits are easy to read.
SEEDS = {
    "red 0": 17,
    "green 2": 11,
    "blue 3": 19,
    "yellow 4": 13,
    "magenta 5": 6,
    "cyan 7": 12,
    "white 8": 57,
    "red 9": 17,
}
STEPS = 8
PICTURE_SIZE = 128

# A LATENT between nodes is z / scale + shift of what the model sees (comfy/latent_formats.py, Flux).
LATENT_SCALE = 0.3611
LATENT_SHIFT = 0.1159


def prompt_names() -> list[str]:
    """Names of all prompts the model was trained for, in the order of prompts.safetensors."""
    names: list[str] = json.loads(PROMPT_FILES[0].read_text(encoding="utf-8"))["prompts"]
    return names
