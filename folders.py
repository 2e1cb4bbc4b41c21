# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's model folders as the loaders see them: which .gguf files lie there, and whether one has changed.

A key of ours stands for .gguf files alone; its folders are those that the host searches for the same kind of model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

import folder_paths

from .models.split_files import first_part, present_parts, without_later_parts

# Our folder key -> the host's keys whose folders it looks in.
FOLDER_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet_gguf": ("diffusion_models",),
        "clip_gguf": ("text_encoders",),
        "checkpoints_gguf": ("checkpoints",),
        "vae_gguf": ("vae",),
        "clip_vision_gguf": ("clip_vision",),
        "controlnet_gguf": ("controlnet",),
        "lora_gguf": ("loras",),
        "model_patches_gguf": ("model_patches",),
        "latent_upscale_models_gguf": ("latent_upscale_models",),
    }
)


def register_folders() -> None:
    """Let ComfyUI list .gguf files in its model folders; repeated, because other packs add folders later."""
    for key, host_keys in FOLDER_KEYS.items():
        paths, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        for host_key in host_keys:
            paths += [path for path in folder_paths.get_folder_paths(host_key) if path not in paths]
        folder_paths.folder_names_and_paths[key] = (paths, {*extensions, ".gguf"})


class FileNames(list[str]):
    """Names to choose from: later parts of split files are not shown, but a saved workflow may name one."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and super().__contains__(first_part(name)))


def list_files(key: str) -> FileNames:
    """Names of the .gguf files below the folders of `key`, subfolders included; of split files the first part."""
    register_folders()
    return FileNames(without_later_parts(folder_paths.get_filename_list(key)))


def find_file(key: str, name: str) -> str | None:
    """Path of the file that a node's input calls `name`, or None if there is none."""
    register_folders()
    path: str | None = folder_paths.get_full_path(key, name)
    return path


def existing_file(key: str, name: str) -> str:
    """The same of a file that must be there.

    Raises:
        FileNotFoundError: it is not.
    """
    register_folders()
    path: str = folder_paths.get_full_path_or_raise(key, name)
    return path


def file_state(path: str | None) -> str:
    """What changes when a file or a part of it is replaced: sizes and times; "" for a file that is not there."""
    if path is None or not os.path.isfile(path):
        return ""
    stats = [os.stat(part) for part in present_parts(path)]
    return " ".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)
