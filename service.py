# SPDX-License-Identifier: Apache-2.0
"""Files in, the host's MODEL and CLIP out: everything that the nodes do but for choosing files.

Refusals are here: what a host cannot build, does not recognise, or builds from an incomplete file gets one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from nodes import CLIPLoader, DualCLIPLoader

from .errors import UnsupportedArch, name_list
from .host import text_encoders
from .host.compat import accepted, host_version, wrap
from .host.native import prepare_state
from .host.patcher import adopt
from .loader import AUTO, NONE, LoadInfo, load_diffusion_model, load_text_encoder
from .models.clip_types import ENCODERS, resolve
from .models.values import QuantizedBytes, StateDict
from .ops import OpsOptions, make_ops

log = logging.getLogger("gguf_kit")


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


# -- CLIP --

VISION_CHOICES = (AUTO, NONE)
# Types of the loaders for three and four files, which have no such input.
FIXED_TYPES = {3: ("sd3",), 4: ("hidream",)}


def clip_types(n_files: int) -> tuple[str, ...]:
    """The types that the host's loader for so many files offers."""
    loader = {1: CLIPLoader, 2: DualCLIPLoader}.get(n_files)
    return FIXED_TYPES[n_files] if loader is None else tuple(loader.INPUT_TYPES()["required"]["type"][0])


def load_clip(
    paths: Sequence[str],
    type_name: str,
    device: str = "default",
    vision: str = AUTO,
    *,
    disable_dynamic: bool = False,
) -> Any:
    """Text encoders from GGUF and safetensors files, in the order of the node's inputs, as the host's CLIP.

    Args:
        type_name: of clip_types(), or "auto".
        device: "default" or "cpu".
        vision: path of the vision part (mmproj) of a GGUF encoder; "auto": looked for beside it; "none": text only.

    Raises:
        GGUFError: with one sentence for the user.
    """
    options: dict[str, Any] = {"custom_operations": make_ops()}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    states, infos = map(list, zip(*(_text_encoder(path, vision) for path in paths), strict=True))
    if vision not in VISION_CHOICES and not any(info and info.vision for info in infos):
        raise _vision_for_nothing(vision)
    clip_type = _clip_type(paths, type_name, states, infos)
    exact = _declare_dtypes(states, infos, options.get("load_device"))
    clip = _build_clip(paths, states, clip_type, options, disable_dynamic)
    ours = [state if info else {} for state, info in zip(states, infos, strict=True)]  # the rest is as the host has it
    text_encoders.restore_floats(clip.cond_stage_model, ours, exact)
    _check_complete(clip.cond_stage_model, paths, states, infos)
    adopt(clip.patcher, (_reload_clip, (tuple(paths), type_name, device, vision)))
    return clip


def _build_clip(
    paths: Sequence[str],
    states: list[dict[str, Any]],
    clip_type: Any,
    options: dict[str, Any],
    disable_dynamic: bool,
) -> Any:
    """The host's CLIP of state dicts; the host may put others into the list, with keys of its own."""
    load = comfy.sd.load_text_encoder_state_dicts
    try:
        return load(
            states,
            clip_type=clip_type,
            model_options=options,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            **accepted(load, disable_dynamic=disable_dynamic),
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except HOST_ERRORS as error:
        raise cannot_build(_first_gguf(paths), error) from error


def _reload_clip(*args: Any, disable_dynamic: bool = False) -> Any:
    return load_clip(*args, disable_dynamic=disable_dynamic).patcher


def _declare_dtypes(
    states: Sequence[dict[str, Any]], infos: Sequence[LoadInfo | None], device: torch.device | None
) -> dict[int, torch.Tensor]:
    """Let GGUF encoders have the dtype that the host chooses for a device; what restore_floats() needs of them."""
    dtype = comfy.model_management.text_encoder_dtype(device or comfy.model_management.text_encoder_device())
    exact: dict[int, torch.Tensor] = {}
    for state, info in zip(states, infos, strict=True):
        exact |= text_encoders.declare_dtype(state, dtype) if info else {}
    return exact


def _first_gguf(paths: Sequence[str]) -> str:
    return next((path for path in paths if path.lower().endswith(".gguf")), paths[0])


def _text_encoder(path: str, vision: str) -> tuple[dict[str, Any], LoadInfo | None]:
    """State dict of a file for the host, and what it is if it is GGUF."""
    if path.lower().endswith(".gguf"):
        gguf_state, info = load_text_encoder(path, vision)
        return to_host(gguf_state), info
    state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return prepare_state(state, metadata), None


def _vision_for_nothing(path: str) -> UnsupportedArch:
    return UnsupportedArch(
        "it was chosen as vision part, but none of the encoders is a GGUF file in llama.cpp's names that takes one",
        path=path,
        hint="Set the vision part to auto or none.",
    )


def _check_complete(
    model: torch.nn.Module,
    paths: Sequence[str],
    states: Sequence[dict[str, Any]],
    infos: Sequence[LoadInfo | None],
) -> None:
    """Refuse GGUF encoders that lack parameters; those that lack the ones for pictures go on, with one warning."""
    for missing in list(text_encoders.missing_parameters(model, states)):
        path, info = paths[missing.index], infos[missing.index]
        if info is None:
            continue  # of other files the host says itself what they lack
        if missing.text:
            raise incomplete(path, missing.text)
        if not missing.vision:
            continue
        is_sound = all(name.startswith("audio") for name in missing.vision)
        if info.vision and not is_sound:
            raise incomplete(info.vision, missing.vision)
        refusal = _absent_part(path, is_sound)
        text_encoders.drop_parts(model, states, missing, refusal)
        if not is_sound:
            log.warning("%s", refusal)


def _absent_part(path: str, is_sound: bool) -> UnsupportedArch:
    """What a user reads who gives pictures or sound to an encoder without the part for them."""
    if is_sound:
        return UnsupportedArch("the part of this encoder that hears sound is not read from GGUF", path=path)
    return UnsupportedArch(
        "this encoder has no vision part (mmproj), so it reads text only",
        path=path,
        hint="For pictures, put the vision part beside it or choose it as vision_name.",
    )


def _clip_type(
    paths: Sequence[str], type_name: str, states: Sequence[dict[str, Any]], infos: Sequence[LoadInfo | None]
) -> Any:
    """The host's CLIPType for a type, which must fit what the host detects in the files."""
    names = [text_encoders.detect(state) for state in states]
    for path, name, info in zip(paths, names, infos, strict=True):
        families = ENCODERS[name].families if name in ENCODERS else ()
        if info is not None and (not name or (families and info.family and info.family not in families)):
            raise _unknown_size(path, info.title)
    chosen, problem = (type_name, "") if type_name != AUTO else ("", "type 'auto' cannot tell what these files are for")
    if all(name in ENCODERS for name in names):
        chosen, problem = resolve(type_name, names, clip_types(len(names)))
    if problem and len(names) > 1:  # T5 in another size than the type wants: the host names the shapes that differ
        names = ["T5_XXL" if name in ("T5_BASE", "T5_XL") else name for name in names]
        chosen = resolve(type_name, names, clip_types(len(names)))[0] if {*names} <= {*ENCODERS} else ""
    if not chosen:
        hint = "Choose another type or another encoder."
        mismatch = UnsupportedArch(problem, path=_first_gguf(paths), hint=hint)
        # Of safetensors alone, and where the host knows more than the table, the host decides.
        if type_name == AUTO or (any(infos) and not text_encoders.newer_than_table()):
            raise mismatch
        log.warning("%s", mismatch)
    # A type without a member of its own (sdxl) is told by its encoders, as in the host's loaders.
    return getattr(comfy.sd.CLIPType, (chosen or type_name).upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)


def _unknown_size(path: str, title: str) -> UnsupportedArch:
    """The refusal of a model of a known family in a size that is no text encoder of this host."""
    known = [encoder.title for name, encoder in ENCODERS.items() if title in encoder.families and _in_host(name)]
    hint = f"Of this family it has {', '.join(known)}." if known else "Update ComfyUI."
    return UnsupportedArch(
        f"ComfyUI {host_version()} has no text encoder that is a {title} of this size", path=path, hint=hint
    )


def _in_host(name: str) -> bool:
    return name.removeprefix("UM") in comfy.sd.TEModel.__members__
