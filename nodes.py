# SPDX-License-Identifier: Apache-2.0
"""The nodes: a file chosen by name in, MODEL or CLIP out.

Node ids and input names are public: saved workflows hold them. New inputs come last and are optional. Other packs wrap
these classes through NODE_CLASS_MAPPINGS, so they are ordinary V1 classes.
"""

from __future__ import annotations

import os
from typing import Any

import folder_paths
import torch

from . import nodes_checkpoint, nodes_components, nodes_imatrix, nodes_save
from .folders import FileNames, existing_file, file_state, find_file, list_files, register_folders
from .loader import AUTO, NONE
from .node_text import described
from .ops import OpsOptions
from .service import FIXED_TYPES, VISION_CHOICES, clip_types, load_clip, load_model

register_folders()

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_CHOICES = ["default", "target", *_DTYPES]
_MAX_KEEP_MB = 1 << 20

EXTRA_TOOLTIP = "A second file with modules that are laid over the model, such as Wan's VACE. none: the model as it is."

COMPUTE_TOOLTIP = (
    "Type in which the model computes, if the device has it. default: what ComfyUI chooses, on a CPU float32. "
    "bfloat16 is less exact and pays on CPUs that multiply it natively (AVX512-BF16, AMX): the log says by how much."
)
KEEP_TOOLTIP = (
    "Megabytes of weights that may stay dequantized in VRAM (on a CPU: RAM), those first that cost the most time. "
    "Faster, with equal results. ComfyUI makes room for them as for the model; they take only what the whole model "
    "leaves free. 0: every weight is dequantized when it is used."
)


class UnetLoaderGGUF:
    """Loads a GGUF diffusion model and keeps it quantized."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        names = list_files("unet_gguf")
        extra = {"default": NONE, "advanced": True, "tooltip": EXTRA_TOOLTIP}
        return {
            "required": {"unet_name": _file_input(names, "models/diffusion_models or models/unet")},
            "optional": {"extra_name": (FileNames([NONE, *names]), extra)},
        }

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The diffusion model, for LoRAs and samplers.",)
    FUNCTION = "load_unet"
    CATEGORY = "loaders/gguf"
    SEARCH_ALIASES: tuple[str, ...] = (
        "gguf",
        "gguf loader",
        "load gguf",
        "unet",
        "unet gguf",
        "load diffusion model",
        "diffusion model",
        "load model",
        "model loader",
        "quant",
        "quantized",
        "quantization",
    )
    DESCRIPTION = (
        "Load a GGUF diffusion model. Its weights stay quantized in memory and are dequantized as they are used."
    )

    @classmethod
    def IS_CHANGED(cls, unet_name: str | None, **inputs: Any) -> str:  # noqa: N802 (None: the name comes over a link)
        names = [name for name in (unet_name, inputs.get("extra_name")) if name and name != NONE]
        return " ".join(file_state(find_file("unet_gguf", name)) for name in names)

    def load_unet(
        self,
        unet_name: str,
        dequant_dtype: str | None = None,
        patch_dtype: str | None = None,
        patch_on_device: bool | None = None,
        extra_name: str | None = None,
        compute_dtype: str | None = None,
        keep_dequantized_mb: int | None = None,
    ) -> tuple[Any]:
        options = OpsOptions(
            dequant_dtype=_DTYPES.get(dequant_dtype or "default"),
            patch_dtype="target" if patch_dtype == "target" else _DTYPES.get(patch_dtype or "default"),
            patch_on_device=bool(patch_on_device),
        )
        dtype = _DTYPES.get(compute_dtype or "default")
        keep_bytes = (keep_dequantized_mb or 0) << 20
        with described():
            extra = existing_file("unet_gguf", extra_name) if extra_name and extra_name != NONE else None
            return (load_model(existing_file("unet_gguf", unet_name), options, extra, dtype, keep_bytes),)


class UnetLoaderGGUFAdvanced(UnetLoaderGGUF):
    """The same with a say in how it computes."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        inputs = super().INPUT_TYPES()
        inputs["required"] |= {
            "dequant_dtype": (
                _DTYPE_CHOICES,
                {
                    "default": "default",
                    "tooltip": "Type that weights are rounded to before the model's own compute type. default, target "
                    "and float32 give the same: computed in float32, rounded once to the compute type. float16 and "
                    "bfloat16 round once more; they exist for comparison, not for speed.",
                },
            ),
            "patch_dtype": (
                _DTYPE_CHOICES,
                {
                    "default": "default",
                    "tooltip": "Type in which LoRAs and other patches are computed. default: the compute type for "
                    "plain LoRAs, float32 for patches that change the weight itself. target: always the compute type.",
                },
            ),
            "patch_on_device": (
                "BOOLEAN",
                {
                    "default": False,
                    "tooltip": "Keep all plain LoRAs in GPU memory between steps. Without it they are kept in up to a "
                    "sixteenth of the GPU's memory, and the rest is copied at each step.",
                },
            ),
        }
        inputs["optional"] |= {
            "compute_dtype": (
                ["default", *_DTYPES],
                {"default": "default", "advanced": True, "tooltip": COMPUTE_TOOLTIP},
            ),
            "keep_dequantized_mb": (
                "INT",
                {"default": 0, "min": 0, "max": _MAX_KEEP_MB, "step": 64, "advanced": True, "tooltip": KEEP_TOOLTIP},
            ),
        }
        return inputs

    DESCRIPTION = "Load a GGUF diffusion model and choose how its weights and LoRAs are computed."
    SEARCH_ALIASES = (*UnetLoaderGGUF.SEARCH_ALIASES, "advanced", "dequantize", "compute dtype")


def _file_input(names: list[str], folders: str) -> tuple[list[str], dict[str, Any]]:
    return names, {"tooltip": f"A file in {folders}, or in a folder of extra_model_paths.yaml."}


# -- CLIP --

VISION_TOOLTIP = (
    "The vision part (mmproj) of a text encoder that sees pictures. "
    "auto: the one in its folder that fits. none: text only."
)


class CLIPLoaderGGUF:
    """Loads one text encoder, GGUF or safetensors; the siblings below load two to four."""

    N_FILES = 1

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        gguf_names = list_files("clip_gguf")
        names = FileNames(sorted({*folder_paths.get_filename_list("text_encoders"), *gguf_names}))
        inputs = {name: _file_input(names, "models/text_encoders or models/clip") for name in cls._file_inputs()}
        optional = {"device": (["default", "cpu"], {"advanced": True, "tooltip": "Where the text encoder runs."})}
        if cls.N_FILES not in FIXED_TYPES:
            tooltip = "The kind of model the encoder is for. auto: what the files serve, if they serve one kind only."
            inputs["type"] = ([*clip_types(cls.N_FILES), AUTO], {"tooltip": tooltip})
            choices = FileNames([*VISION_CHOICES, *gguf_names])
            optional["vision_name"] = (choices, {"default": choices[0], "advanced": True, "tooltip": VISION_TOOLTIP})
        return {"required": inputs, "optional": optional}

    @classmethod
    def _file_inputs(cls) -> list[str]:
        return ["clip_name"] if cls.N_FILES == 1 else [f"clip_name{i + 1}" for i in range(cls.N_FILES)]

    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoders, for nodes that encode a prompt.",)
    FUNCTION = "load_clip"
    CATEGORY = "loaders/gguf"
    SEARCH_ALIASES: tuple[str, ...] = (
        "gguf",
        "gguf loader",
        "clip gguf",
        "clip loader",
        "load clip",
        "text encoder",
        "quant",
        "quantized",
        "t5",
        "umt5",
        "qwen",
        "llama",
        "gemma",
        "mistral",
        "mmproj",
    )
    DESCRIPTION = "Load a text encoder from a GGUF or safetensors file. Its weights stay quantized in memory."

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:  # noqa: N802
        names = [inputs.get(name) for name in cls._file_inputs()]
        paths = [_encoder_path(name) if name else None for name in names]
        return " ".join([*map(file_state, paths), *_vision_states(inputs.get("vision_name", AUTO), paths)])

    def load_clip(
        self, *values: str, type: str = "", device: str = "default", vision_name: str = AUTO, **names: str
    ) -> tuple[Any]:
        """Inputs by name, as ComfyUI gives them, or in the order files, type, device, as packs that wrap it may."""
        given = {"type": type, "device": device, "vision_name": vision_name, **names}
        if values:
            order = [*self._file_inputs(), *given]
            return self.load_clip(**{**given, **dict(zip(order, values, strict=False))})
        with described() as loaded:
            paths = tuple(_existing_path(names[key]) for key in self._file_inputs())
            loaded.by_host.extend(path for path in paths if not path.lower().endswith(".gguf"))
            vision = vision_name if vision_name in VISION_CHOICES else _existing_path(vision_name)
            return (load_clip(paths, type, device, vision),)


def _vision_states(choice: str | None, paths: list[str | None]) -> list[str]:
    """States of the vision part that was chosen, or of those that may be found beside the encoders."""
    if choice not in VISION_CHOICES:
        return [file_state(_encoder_path(choice) if choice else None)]
    folders = sorted({os.path.dirname(path) for path in paths if path}) if choice == AUTO else []
    names = [
        os.path.join(folder, name) for folder in folders for name in os.listdir(folder) if "mmproj" in name.lower()
    ]
    return [file_state(name) for name in sorted(names)]


def _encoder_path(name: str) -> str | None:
    register_folders()
    return folder_paths.get_full_path("clip_gguf" if name.lower().endswith(".gguf") else "text_encoders", name)


def _existing_path(name: str) -> str:
    path = _encoder_path(name)
    if path is None:
        raise FileNotFoundError(
            f"{name}: no such file in the text_encoders folders. Refresh the page and choose another."
        )
    return path


class DualCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Two text encoders, as Flux and SDXL need them."""

    N_FILES = 2
    DESCRIPTION = (
        "Load two text encoders from GGUF or safetensors files, in any mix and order: Flux, SDXL, HunyuanVideo."
    )
    SEARCH_ALIASES = (*CLIPLoaderGGUF.SEARCH_ALIASES, "dual clip", "flux", "sdxl", "hunyuan video")


class TripleCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Three text encoders, as SD3 needs them."""

    N_FILES = 3
    DESCRIPTION = "Load three text encoders for SD3 from GGUF or safetensors files, in any mix and order."
    SEARCH_ALIASES = (*CLIPLoaderGGUF.SEARCH_ALIASES, "triple clip", "sd3")


class QuadrupleCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Four text encoders, as HiDream needs them."""

    N_FILES = 4
    DESCRIPTION = "Load four text encoders for HiDream from GGUF or safetensors files, in any mix and order."
    SEARCH_ALIASES = (*CLIPLoaderGGUF.SEARCH_ALIASES, "quadruple clip", "hidream")


NODES = (
    (UnetLoaderGGUF, "Unet Loader (GGUF)"),
    (UnetLoaderGGUFAdvanced, "Unet Loader (GGUF/Advanced)"),
    (CLIPLoaderGGUF, "CLIPLoader (GGUF)"),
    (DualCLIPLoaderGGUF, "DualCLIPLoader (GGUF)"),
    (TripleCLIPLoaderGGUF, "TripleCLIPLoader (GGUF)"),
    (QuadrupleCLIPLoaderGGUF, "QuadrupleCLIPLoader (GGUF)"),
    *nodes_checkpoint.NODES,
    *nodes_components.NODES,
    *nodes_save.NODES,
    *nodes_imatrix.NODES,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node, _ in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: title for node, title in NODES}
