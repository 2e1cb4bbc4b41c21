# SPDX-License-Identifier: Apache-2.0
"""The nodes that save: MODEL or CLIP and a type in, a GGUF file in ComfyUI's output folder out.

Node ids and input names are public, as those of the loaders (nodes.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from .errors import GGUFError, plain_text
from .saver import SAVE_TYPES, save_clip, save_model

TYPE_TOOLTIP = (
    "Q8_0: half of 16 bit and hardly a loss; Q4_K_S to Q6_K: smaller, the lower the number the more is lost. "
    "F16, BF16 and F32 quantize nothing."
)
RECIPE_TOOLTIP = (
    "Types of single tensors, which come before the type above: the text of a recipe file of tools/convert.py "
    "(--export-recipe) or tools/tune.py, a line NAME=TYPE for each. Weightings in it need an importance matrix "
    "and are passed over here. Empty: the type decides about all."
)
PREFIX_TOOLTIP = (
    "Beginning of the file's name, below ComfyUI's output folder. Files in its folder {folder} show up in the loaders."
)
_ALIASES = ("gguf", "save gguf", "export gguf", "convert", "quant", "quantize", "quantization")


class SaveGGUF:
    """Saves a diffusion model as GGUF, with its LoRAs and merges."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to save, with its LoRAs."}),
                **_file_inputs("diffusion_models"),
            },
            "optional": _recipe_input(),
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "advanced/model_merging"
    DESCRIPTION = "Save a diffusion model as GGUF. LoRAs and merges become part of its weights."
    SEARCH_ALIASES = (*_ALIASES, "save model", "model save", "unet")

    def save(self, model: Any, filename_prefix: str, type: str, recipe: str = "") -> dict[str, Any]:
        save_model(model, output_path(filename_prefix, type), type, recipe)
        return {}


class SaveGGUFCLIP:
    """Saves text encoders as GGUF, with their LoRAs and merges, each as a file of its own."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoders to save, with their LoRAs."}),
                **_file_inputs("clip"),
            },
            "optional": _recipe_input(),
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "advanced/model_merging"
    DESCRIPTION = (
        "Save text encoders as GGUF, one file for each, with the tokenizer and the part that sees pictures. "
        "LoRAs and merges become part of their weights."
    )
    SEARCH_ALIASES = (*_ALIASES, "save clip", "clip save", "text encoder")

    def save(self, clip: Any, filename_prefix: str, type: str, recipe: str = "") -> dict[str, Any]:
        save_clip(clip, lambda name: output_path(f"{filename_prefix}_{name}", type), type, recipe)
        return {}


def _file_inputs(folder: str) -> dict[str, Any]:
    return {
        "filename_prefix": (
            "STRING",
            {"default": f"{folder}/ComfyUI", "tooltip": PREFIX_TOOLTIP.format(folder=folder)},
        ),
        "type": (list(SAVE_TYPES), {"default": "Q8_0", "tooltip": TYPE_TOOLTIP}),
    }


def _recipe_input() -> dict[str, Any]:
    return {"recipe": ("STRING", {"default": "", "multiline": True, "tooltip": RECIPE_TOOLTIP})}


def output_path(filename_prefix: str, type_name: str) -> Path:
    """A name in the output folder that no file has: PREFIX-TYPE_00001_.gguf; its folder is made if need be.

    Raises:
        GGUFError: the prefix leads out of the output folder.
    """
    folder, name, counter = save_place(filename_prefix, f"-{type_name}", "diffusion_models/NAME")
    return folder / f"{name}_{counter:05}_.gguf"


def save_place(filename_prefix: str, ending: str, example: str) -> tuple[Path, str, int]:
    """Where a node saves: (folder, made if need be; name; a number that no file of that name has).

    Args:
        ending: to stand behind the prefix.
        example: of a good prefix, for errors.
    Raises:
        GGUFError: the prefix leads out of the output folder, or names none.
    """
    output = os.path.abspath(folder_paths.get_output_directory())
    wanted = os.path.abspath(os.path.join(output, filename_prefix + ending))
    if not Path(wanted).is_relative_to(output) or wanted == output:
        what = "names no file" if wanted == output else "leads out of ComfyUI's output folder"
        problem = f"the filename_prefix '{plain_text(filename_prefix)}' {what}"
        raise GGUFError(problem, hint=f"Give a name below it, such as {example}.")
    folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix + ending, output)
    os.makedirs(folder, exist_ok=True)
    return Path(folder), name, counter


NODES = (
    (SaveGGUF, "Save GGUF"),
    (SaveGGUFCLIP, "Save GGUF (CLIP)"),
)
