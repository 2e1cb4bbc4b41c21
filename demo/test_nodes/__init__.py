# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes for the demo and the tests only: the tiny Flux's conditioning, and a picture saved as it is in memory.

A server loads this folder as a node pack beside the real one. Its files lie in models/tiny_flux of the server's base
directory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import comfy.model_detection
import folder_paths
import torch
from safetensors.torch import load_file, save_file

DATA = Path(folder_paths.models_dir) / "tiny_flux"


class TinyFluxConditioning:
    """One of the prompts the tiny Flux was trained for, as conditioning, without a text encoder."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "look_up"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"prompt": (_prompt_names(),)}}

    def look_up(self, prompt: str) -> tuple[list[list[Any]]]:
        row = _prompt_names().index(prompt)
        vectors = load_file(DATA / "prompts.safetensors")
        return ([[vectors["context"][row : row + 1], {"pooled_output": vectors["y"][row : row + 1]}]],)


class SaveImageTensor:
    """Saves pictures as float32 (pictures, height, width, 3) in [0, 1], where SaveImage rounds to 8 bits."""

    CATEGORY = "testing"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "image"})}}

    def save(self, images: torch.Tensor, filename_prefix: str) -> dict[str, Any]:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        save_file({"images": images.float().contiguous()}, Path(folder) / file)
        return {"ui": {"tensors": [{"filename": file, "subfolder": subfolder, "type": "output"}]}}


def _prompt_names() -> list[str]:
    names: list[str] = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    return names


def _detect_with_heads(*args: Any, **kwargs: Any) -> Any:
    """ComfyUI's detection, but with Flux's heads counted from the hidden size, as hosts newer than 0.3.75 do."""
    config = _detect(*args, **kwargs)
    if config and config.get("image_model") == "flux":
        config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
    return config


def _end_with_parent() -> None:
    """End this server when the process that started it is gone, which closes the pipe at standard input."""
    sys.stdin.buffer.read()
    os._exit(1)


_detect = comfy.model_detection.detect_unet_config
comfy.model_detection.detect_unet_config = _detect_with_heads
if os.environ.get("GGUF_KIT_TEST_SERVER"):
    threading.Thread(target=_end_with_parent, daemon=True).start()

NODE_CLASS_MAPPINGS = {"TinyFluxConditioning": TinyFluxConditioning, "SaveImageTensor": SaveImageTensor}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TinyFluxConditioning": "Tiny Flux Conditioning",
    "SaveImageTensor": "Save Image Tensor",
}
