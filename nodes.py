# SPDX-License-Identifier: Apache-2.0
"""The nodes: a file chosen by name in, MODEL or CLIP out.

Node ids and input names are public: saved workflows hold them. New inputs come last and are optional. Other packs wrap
these classes through NODE_CLASS_MAPPINGS, so they are ordinary V1 classes.
"""

from __future__ import annotations

import os
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from nodes import CLIPLoader, DualCLIPLoader

from .errors import GGUFError, UnsupportedArch, name_list
from .host.compat import accepted, host_version, wrap
from .host.patcher import adopt
from .loader import load_diffusion_model, load_text_encoder
from .models.values import QuantizedBytes, StateDict
from .ops import OpsOptions, make_ops

# Our folder key -> the host's keys whose folders it looks in.
FOLDER_KEYS = {"unet_gguf": ("diffusion_models",), "clip_gguf": ("text_encoders",)}


def register_folders() -> None:
    """Let ComfyUI list .gguf files in its model folders; repeated, because other packs add folders later."""
    for key, host_keys in FOLDER_KEYS.items():
        paths, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        for host_key in host_keys:
            paths += [path for path in folder_paths.get_folder_paths(host_key) if path not in paths]
        folder_paths.folder_names_and_paths[key] = (paths, {*extensions, ".gguf"})


register_folders()


def list_files(key: str) -> list[str]:
    """Names of the .gguf files below the folders of `key`, subfolders included."""
    register_folders()
    return folder_paths.get_filename_list(key)


def file_state(path: str | None) -> str:
    """What changes when a file is replaced: its size and time; "" for a file that is not there."""
    if path is None or not os.path.isfile(path):
        return ""
    stat = os.stat(path)
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def to_host(state: StateDict) -> dict[str, torch.Tensor]:
    """A state dict of the loader in the host's representation; no weight is copied."""
    return {
        key: wrap(value.data, value.qtype, value.shape) if isinstance(value, QuantizedBytes) else value
        for key, value in state.items()
    }


# -- MODEL --


def load_model(path: str, options: OpsOptions, disable_dynamic: bool = False) -> Any:
    """A GGUF diffusion model as the host's patcher.

    Args:
        disable_dynamic: ask for a patcher without dynamic VRAM, on hosts that have it.

    Raises:
        GGUFError: with one sentence for the user.
    """
    state, info = load_diffusion_model(path)
    load = comfy.sd.load_diffusion_model_state_dict
    try:
        patcher = load(
            to_host(state),
            model_options={"custom_operations": make_ops(options)},
            **accepted(load, disable_dynamic=disable_dynamic, metadata=dict(info.metadata)),
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except HOST_ERRORS as error:
        raise cannot_build(path, error) from error
    if patcher is None:
        raise UnsupportedArch(
            f"ComfyUI {host_version()} does not recognise this model (general.architecture '{info.arch}')",
            path=path,
            hint="This ComfyUI may be too old for it: update ComfyUI, or check that the file is a diffusion model.",
        )
    missing = missing_parameters(patcher.model)
    if missing:
        raise incomplete(path, missing)
    adopt(patcher, (load_model, (path, options)))
    return patcher


# What a host's detection and model building raise when keys or shapes are not what they expect.
HOST_ERRORS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError)


def missing_parameters(model: torch.nn.Module) -> list[str]:
    """State-dict keys that our layers needed and the file did not have."""
    return sorted(f"{name}.{p}" for name, module in model.named_modules() for p in getattr(module, "missing", ()))


def incomplete(path: str, missing: list[str]) -> UnsupportedArch:
    """The refusal of a file without tensors that its model needs."""
    return UnsupportedArch(
        f"{len(missing)} tensors that ComfyUI needs are missing: {name_list(missing)}",
        path=path,
        hint="The file is incomplete or was converted for another program; take another one.",
    )


def cannot_build(path: str, error: Exception) -> UnsupportedArch:
    """A host's failure to fill its model, as one sentence with the first few of its reasons."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    reasons = lines[1:] or [f"{type(error).__name__} {' '.join(lines)}".strip()]
    return UnsupportedArch(
        f"ComfyUI {host_version()} cannot build a model from these tensors: {name_list(reasons)}",
        path=path,
        hint="This ComfyUI may be too old for it, or the file was converted for another program.",
    )


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_CHOICES = ["default", "target", *_DTYPES]


class UnetLoaderGGUF:
    """Loads a GGUF diffusion model and keeps it quantized."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        return {
            "required": {"unet_name": _file_input(list_files("unet_gguf"), "models/diffusion_models or models/unet")}
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_unet"
    CATEGORY = "loaders/gguf"
    DESCRIPTION = (
        "Load a GGUF diffusion model. Its weights stay quantized in memory and are dequantized as they are used."
    )

    @classmethod
    def IS_CHANGED(cls, unet_name: str | None, **inputs: Any) -> str:  # noqa: N802 (None: the name comes over a link)
        return file_state(folder_paths.get_full_path("unet_gguf", unet_name) if unet_name else None)

    def load_unet(
        self,
        unet_name: str,
        dequant_dtype: str | None = None,
        patch_dtype: str | None = None,
        patch_on_device: bool | None = None,
    ) -> tuple[Any]:
        register_folders()
        options = OpsOptions(
            dequant_dtype=_DTYPES.get(dequant_dtype or "default"),
            patch_dtype="target" if patch_dtype == "target" else _DTYPES.get(patch_dtype or "default"),
            patch_on_device=bool(patch_on_device),
        )
        return (load_model(folder_paths.get_full_path_or_raise("unet_gguf", unet_name), options),)


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
                    "tooltip": "Keep plain LoRAs in GPU memory between steps instead of copying them at each step. "
                    "Faster; costs their size, which ComfyUI does not count.",
                },
            ),
        }
        return inputs

    DESCRIPTION = "Load a GGUF diffusion model and choose how its weights and LoRAs are computed."


def _file_input(names: list[str], folders: str) -> tuple[list[str], dict[str, Any]]:
    return names, {"tooltip": f"A file in {folders}, or in a folder of extra_model_paths.yaml."}


# -- CLIP --


def load_clip(paths: tuple[str, ...], clip_type: Any, device: str = "default", disable_dynamic: bool = False) -> Any:
    """Text encoders from GGUF and safetensors files, in the order of the node's inputs, as the host's CLIP.

    Args:
        clip_type: comfy.sd.CLIPType.
        device: "default" or "cpu".

    Raises:
        GGUFError: with one sentence for the user.
    """
    options: dict[str, Any] = {"custom_operations": make_ops()}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    blamed = next((path for path in paths if path.lower().endswith(".gguf")), paths[0])
    load = comfy.sd.load_text_encoder_state_dicts
    try:
        clip = load(
            [_text_encoder_state(path) for path in paths],
            clip_type=clip_type,
            model_options=options,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            **accepted(load, disable_dynamic=disable_dynamic),
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except HOST_ERRORS as error:
        raise cannot_build(blamed, error) from error
    missing = [key for key in missing_parameters(clip.cond_stage_model) if "encoder.block." in key or ".shared." in key]
    if missing:
        raise incomplete(blamed, missing)
    adopt(clip.patcher, (_reload_clip, (paths, clip_type, device)))
    return clip


def _reload_clip(*args: Any, disable_dynamic: bool = False) -> Any:
    return load_clip(*args, disable_dynamic=disable_dynamic).patcher


def _text_encoder_state(path: str) -> dict[str, torch.Tensor]:
    if path.lower().endswith(".gguf"):
        return to_host(load_text_encoder(path)[0])
    state = comfy.utils.load_torch_file(path, safe_load=True)
    if any(key.endswith((".scale_weight", ".weight_scale", ".comfy_quant")) for key in state):
        raise GGUFError(
            "it is quantized with scales (fp8 scaled or similar), which cannot be mixed with a GGUF encoder yet",
            path=path,
            hint="Take its fp16 or plain fp8 file, or load all encoders without GGUF.",
        )
    return state


class CLIPLoaderGGUF:
    """Loads one text encoder, GGUF or safetensors; the siblings below load two to four."""

    N_FILES = 1
    HOST_LOADER: Any = CLIPLoader  # whose list of types is offered; None: the type is fixed
    FIXED_TYPE = ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        names = sorted({*folder_paths.get_filename_list("text_encoders"), *list_files("clip_gguf")})
        inputs = {name: _file_input(names, "models/text_encoders or models/clip") for name in cls._file_inputs()}
        if cls.HOST_LOADER is not None:
            types = cls.HOST_LOADER.INPUT_TYPES()["required"]["type"][0]
            inputs["type"] = (types, {"tooltip": "The kind of model the encoder is for."})
        device = (["default", "cpu"], {"advanced": True, "tooltip": "Where the text encoder runs."})
        return {"required": inputs, "optional": {"device": device}}

    @classmethod
    def _file_inputs(cls) -> list[str]:
        return ["clip_name"] if cls.N_FILES == 1 else [f"clip_name{i + 1}" for i in range(cls.N_FILES)]

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"
    CATEGORY = "loaders/gguf"
    DESCRIPTION = "Load text encoders from GGUF or safetensors files, in any mix."

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:  # noqa: N802
        names = [inputs.get(name) for name in cls._file_inputs()]
        return " ".join(file_state(_encoder_path(name) if name else None) for name in names)

    def load_clip(self, *values: str, type: str = "", device: str = "default", **names: str) -> tuple[Any]:
        """Inputs by name, as ComfyUI gives them, or in the order of the node, as packs that wrap it may."""
        if values:
            named = dict(zip([*self._file_inputs(), "type", "device"], values, strict=False))
            return self.load_clip(**{"type": type, "device": device, **names, **named})
        # A type without a member of its own (sdxl) is told by its encoders, as in the host's loaders.
        clip_type = getattr(comfy.sd.CLIPType, (type or self.FIXED_TYPE).upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
        paths = []
        for name in (names[key] for key in self._file_inputs()):
            path = _encoder_path(name)
            if path is None:
                raise FileNotFoundError(
                    f"{name}: no such file in the text_encoders folders. Refresh the page and choose another."
                )
            paths.append(path)
        return (load_clip(tuple(paths), clip_type, device),)


def _encoder_path(name: str) -> str | None:
    register_folders()
    return folder_paths.get_full_path("clip_gguf" if name.lower().endswith(".gguf") else "text_encoders", name)


class DualCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Two text encoders, as Flux and SDXL need them."""

    N_FILES = 2
    HOST_LOADER = DualCLIPLoader


class TripleCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Three text encoders, as SD3 needs them."""

    N_FILES = 3
    HOST_LOADER = None
    FIXED_TYPE = "sd3"


class QuadrupleCLIPLoaderGGUF(CLIPLoaderGGUF):
    """Four text encoders, as HiDream needs them."""

    N_FILES = 4
    HOST_LOADER = None
    FIXED_TYPE = "hidream"


NODES = (
    (UnetLoaderGGUF, "Unet Loader (GGUF)"),
    (UnetLoaderGGUFAdvanced, "Unet Loader (GGUF/Advanced)"),
    (CLIPLoaderGGUF, "CLIPLoader (GGUF)"),
    (DualCLIPLoaderGGUF, "DualCLIPLoader (GGUF)"),
    (TripleCLIPLoaderGGUF, "TripleCLIPLoader (GGUF)"),
    (QuadrupleCLIPLoaderGGUF, "QuadrupleCLIPLoader (GGUF)"),
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node, _ in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: title for node, title in NODES}
