# SPDX-License-Identifier: Apache-2.0
"""The node for whole checkpoints: a file chosen by name in, MODEL, CLIP and VAE out.

Node id and input names are public, as those of the other loaders (nodes.py).
"""

from __future__ import annotations

from typing import Any

from .checkpoint import load_whole
from .folders import existing_file, file_state, find_file, list_files
from .node_text import described

FOLDER = "checkpoints_gguf"


class CheckpointLoaderGGUF:
    """Loads a whole checkpoint; its diffusion model and text encoders stay quantized."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        tooltip = "A file in models/checkpoints, or in a folder of extra_model_paths.yaml."
        return {"required": {"ckpt_name": (list_files(FOLDER), {"tooltip": tooltip})}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("The diffusion model.", "The text encoders.", "The VAE, dequantized when it was loaded.")
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders/gguf"
    SEARCH_ALIASES = (
        "gguf",
        "gguf loader",
        "checkpoint",
        "ckpt",
        "load checkpoint",
        "all in one",
        "quant",
        "quantized",
    )
    DESCRIPTION = (
        "Load a GGUF file that holds a diffusion model together with its text encoders and VAE. "
        "The first two stay quantized in memory, the VAE is dequantized at load."
    )

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str | None, **inputs: Any) -> str:  # noqa: N802 (None: the name comes over a link)
        return file_state(find_file(FOLDER, ckpt_name) if ckpt_name else None)

    def load_checkpoint(self, ckpt_name: str) -> tuple[Any, Any, Any]:
        with described():
            model, clip, vae = load_whole(existing_file(FOLDER, ckpt_name))
        return model, clip, vae


NODES = ((CheckpointLoaderGGUF, "Load Checkpoint (GGUF)"),)
