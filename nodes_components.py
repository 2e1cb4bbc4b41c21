# SPDX-License-Identifier: Apache-2.0
"""The nodes that load what is neither a diffusion model nor a text encoder: a file chosen by name in, its object out.

Node ids and input names are public, as those of the other loaders (nodes.py); input names are those of the host's own
loaders.
"""

from __future__ import annotations

from typing import Any

from .components import (
    apply_lora,
    load_clip_vision,
    load_controlnet,
    load_latent_upscaler,
    load_lora,
    load_model_patch,
    load_vae,
)
from .folders import existing_file, file_state, find_file, list_files
from .loader import LoadInfo
from .node_text import described

_ALIASES = ("gguf", "gguf loader", "quant", "quantized")
_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
_DEQUANTIZED = "ComfyUI takes no quantized {}, so its weights are dequantized as they are read."


class _FileNode:
    """A node whose input INPUT is a .gguf file in the folders of KEY, FOLDERS for the user."""

    KEY = INPUT = FOLDERS = ""
    CATEGORY = "loaders/gguf"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        return {"required": {cls.INPUT: cls._file_input()}}

    @classmethod
    def _file_input(cls) -> tuple[list[str], dict[str, Any]]:
        tooltip = f"A .gguf file in {cls.FOLDERS}, or in a folder of extra_model_paths.yaml."
        return list_files(cls.KEY), {"tooltip": tooltip}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:  # noqa: N802 (None: the name comes over a link)
        name = inputs.get(cls.INPUT)
        return file_state(find_file(cls.KEY, name) if name else None)

    @classmethod
    def _path(cls, name: str) -> str:
        return existing_file(cls.KEY, name)


class VAELoaderGGUF(_FileNode):
    """Loads a VAE."""

    KEY, INPUT, FOLDERS = "vae_gguf", "vae_name", "models/vae"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The VAE, for nodes that encode or decode pictures, video or sound.",)
    SEARCH_ALIASES = (*_ALIASES, "vae", "load vae", "vae loader", "autoencoder")
    FUNCTION = "load_vae"
    DESCRIPTION = f"Load a VAE from a GGUF file. {_DEQUANTIZED.format('VAE')}"

    def load_vae(self, vae_name: str) -> tuple[Any]:
        with described():
            return (load_vae(self._path(vae_name)),)


class CLIPVisionLoaderGGUF(_FileNode):
    """Loads a CLIP vision model."""

    KEY, INPUT, FOLDERS = "clip_vision_gguf", "clip_name", "models/clip_vision"
    RETURN_TYPES = ("CLIP_VISION",)
    OUTPUT_TOOLTIPS = ("The vision model, for nodes that encode a picture.",)
    SEARCH_ALIASES = (*_ALIASES, "clip vision", "load clip vision", "siglip", "dino", "image encoder", "ip-adapter")
    FUNCTION = "load_clip"
    DESCRIPTION = f"Load a CLIP vision model from a GGUF file. {_DEQUANTIZED.format('CLIP vision model')}"

    def load_clip(self, clip_name: str) -> tuple[Any]:
        with described():
            return (load_clip_vision(self._path(clip_name)),)


class ControlNetLoaderGGUF(_FileNode):
    """Loads a ControlNet, or one that is stored as the difference to a model."""

    KEY, INPUT, FOLDERS = "controlnet_gguf", "control_net_name", "models/controlnet or models/t2i_adapter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        tooltip = "Only for a ControlNet that is stored as the difference to a model: that model."
        return {**super().INPUT_TYPES(), "optional": {"model": ("MODEL", {"tooltip": tooltip})}}

    RETURN_TYPES = ("CONTROL_NET",)
    OUTPUT_TOOLTIPS = ("The ControlNet, for nodes that apply it.",)
    SEARCH_ALIASES = (*_ALIASES, "controlnet", "control net", "load controlnet", "t2i adapter")
    FUNCTION = "load_controlnet"
    DESCRIPTION = (
        "Load a ControlNet from a GGUF file. Its weights stay quantized in memory; those of Control-LoRAs, "
        "T2I-Adapters and files in diffusers' layout for Flux and SD3 are dequantized as they are read."
    )

    def load_controlnet(self, control_net_name: str, model: Any = None) -> tuple[Any]:
        with described():
            return (load_controlnet(self._path(control_net_name), model),)


class LoraLoaderGGUF(_FileNode):
    """Applies a LoRA to a diffusion model and, where they are connected, to text encoders."""

    KEY, INPUT, FOLDERS = "lora_gguf", "lora_name", "models/loras"

    def __init__(self) -> None:
        self._loaded: tuple[tuple[str, str], Any, tuple[LoadInfo, ...]] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = {**_STRENGTH, "tooltip": "How strongly to change the diffusion model. It can be negative."}
        strength_clip = {**_STRENGTH, "tooltip": "How strongly to change the text encoders. It can be negative."}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model that the LoRA is applied to."}),
                cls.INPUT: cls._file_input(),
                "strength_model": ("FLOAT", strength),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoders that the LoRA is applied to."}),
                "strength_clip": ("FLOAT", strength_clip),
            },
        }

    RETURN_TYPES: tuple[str, ...] = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("The diffusion model with the LoRA.", "The text encoders with the LoRA.")
    SEARCH_ALIASES = (*_ALIASES, "lora", "load lora", "apply lora", "lora loader", "dora", "lokr")
    FUNCTION = "load_lora"
    DESCRIPTION = (
        "Apply a LoRA from a GGUF file to a diffusion model and its text encoders. A quantized LoRA is dequantized as "
        "it is read."
    )

    def load_lora(
        self,
        model: Any,
        clip: Any = None,
        lora_name: str = "",
        strength_model: float = 1.0,
        strength_clip: float = 1.0,
    ) -> tuple[Any, ...]:
        """Inputs in the order of the host's loader."""
        with described() as loaded:
            if strength_model == 0 and (strength_clip == 0 or clip is None):
                return model, clip
            path = self._path(lora_name)
            file = (path, file_state(path))
            if self._loaded is None or self._loaded[0] != file:
                self._loaded = None  # the last one's memory is free before the next is read
                lora = load_lora(path)
                self._loaded = (file, lora, tuple(loaded.infos))
            loaded.infos[:] = self._loaded[2]
        return apply_lora(self._loaded[1], model, clip, strength_model, strength_clip)


class LoraLoaderModelOnlyGGUF(LoraLoaderGGUF):
    """The same for the diffusion model alone."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": super().INPUT_TYPES()["required"]}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = LoraLoaderGGUF.OUTPUT_TOOLTIPS[:1]
    FUNCTION = "load_lora_model_only"
    DESCRIPTION = "Apply a LoRA from a GGUF file to a diffusion model. A quantized LoRA is dequantized as it is read."

    def load_lora_model_only(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any]:
        return (self.load_lora(model, None, lora_name, strength_model)[0],)


class ModelPatchLoaderGGUF(_FileNode):
    """Loads a model patch."""

    KEY, INPUT, FOLDERS = "model_patches_gguf", "name", "models/model_patches"
    RETURN_TYPES = ("MODEL_PATCH",)
    OUTPUT_TOOLTIPS = ("The model patch, for the node that applies its kind.",)
    SEARCH_ALIASES = (*_ALIASES, "model patch", "load model patch", "controlnet", "qwen image", "z-image", "multitalk")
    FUNCTION = "load_model_patch"
    DESCRIPTION = "Load a model patch from a GGUF file. Its weights stay quantized in memory."

    def load_model_patch(self, name: str) -> tuple[Any]:
        with described():
            return (load_model_patch(self._path(name)),)


class LatentUpscaleModelLoaderGGUF(_FileNode):
    """Loads a latent upscale model."""

    KEY, INPUT, FOLDERS = "latent_upscale_models_gguf", "model_name", "models/latent_upscale_models"
    RETURN_TYPES = ("LATENT_UPSCALE_MODEL",)
    OUTPUT_TOOLTIPS = ("The upscale model, for nodes that enlarge latents.",)
    SEARCH_ALIASES = (*_ALIASES, "latent upscale", "upscaler", "upscale model", "hunyuan video", "ltx")
    FUNCTION = "load_model"
    DESCRIPTION = f"Load a latent upscale model from a GGUF file. {_DEQUANTIZED.format('latent upscale model')}"

    def load_model(self, model_name: str) -> tuple[Any]:
        with described():
            return (load_latent_upscaler(self._path(model_name)),)


NODES = (
    (VAELoaderGGUF, "Load VAE (GGUF)"),
    (CLIPVisionLoaderGGUF, "Load CLIP Vision (GGUF)"),
    (ControlNetLoaderGGUF, "Load ControlNet Model (GGUF)"),
    (LoraLoaderGGUF, "Load LoRA (GGUF)"),
    (LoraLoaderModelOnlyGGUF, "Load LoRA (GGUF, Model Only)"),
    (ModelPatchLoaderGGUF, "Load Model Patch (GGUF)"),
    (LatentUpscaleModelLoaderGGUF, "Load Latent Upscale Model (GGUF)"),
)
