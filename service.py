# SPDX-License-Identifier: Apache-2.0
"""Files in, the host's MODEL and CLIP out: everything that the nodes do but for choosing files.

Refusals are here: what a host cannot build, does not recognise, or builds from an incomplete file gets one sentence.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import comfy.ldm.flux.layers
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from nodes import CLIPLoader, DualCLIPLoader

from .errors import UnsupportedArch, name_list
from .host import text_encoders
from .host.advice import log_advice
from .host.compat import accepted, host_version, wrap
from .host.lora import MODEL_PREFIX
from .host.native import prepare_state
from .host.page import progress
from .host.patcher import adopt, compute_dtype
from .loader import AUTO, NONE, LoadInfo, load_diffusion_model, load_text_encoder
from .models import kinds
from .models.clip_types import ENCODERS, resolve
from .models.repairs import complete_keys, rename_norms
from .models.values import QuantizedBytes, StateDict, shapes_of
from .ops import OpsOptions, make_ops

log = logging.getLogger("gguf_kit")

T = TypeVar("T")


def to_host(state: StateDict) -> dict[str, torch.Tensor]:
    """A state dict of the loader in the host's representation; no weight is copied."""
    return {
        key: wrap(value.data, value.qtype, value.shape) if isinstance(value, QuantizedBytes) else value
        for key, value in state.items()
    }


# -- MODEL --


def load_model(
    path: str,
    options: OpsOptions,
    extra: str | None = None,
    dtype: torch.dtype | None = None,
    keep_bytes: int = 0,
    disable_dynamic: bool = False,
) -> Any:
    """A GGUF diffusion model as the host's patcher.

    Args:
        extra: GGUF file with modules that are laid over it, such as Wan's VACE.
        dtype: what it computes in; None: what the host chooses.
        keep_bytes: of weights that may stay dequantized where there is room when the whole model is loaded.
        disable_dynamic: ask for a patcher without dynamic VRAM, on hosts that have it.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_diffusion_model(path, extra)

    def build(whole: StateDict) -> tuple[Any, list[str]]:
        return _build_model(path, extra, whole, info, _model_options(options, dtype), disable_dynamic)

    patcher, missing = build_completed(values, info, build)
    if missing:
        raise incomplete(path, missing, extra)
    if extra and info.extra_keys.isdisjoint(name for name, _ in patcher.model.diffusion_model.named_parameters()):
        raise _laid_over_nothing(path, extra, info)
    if dtype is not None and comfy.model_management.is_device_cpu(patcher.load_device):
        patcher.model.manual_cast_dtype = None  # the host would compute in float32 whatever the CPU can do
    adopt(patcher, (load_model, (path, options, extra, dtype, keep_bytes)), keep_bytes)
    log_advice(patcher.load_device, compute_dtype(patcher.model))
    return patcher


def _model_options(options: OpsOptions, dtype: torch.dtype | None) -> dict[str, Any]:
    chosen = {} if dtype is None else {"dtype": dtype}
    return {"custom_operations": make_ops(options), **chosen}


def build_completed(
    values: StateDict, info: LoadInfo, build: Callable[[StateDict], tuple[T, list[str]]], prefix: str = ""
) -> tuple[T, list[str]]:
    """What `build` makes of a state dict and what its model lacks, once more if that tells what cut keys were.

    Args:
        prefix: what the state dict has in front of the keys of the diffusion model.
    """
    built, missing = build(values)
    if missing and info.cut:
        whole = complete_keys(values, info.cut, [prefix + key.removeprefix(MODEL_PREFIX) for key in missing])
        built, missing = build(whole)
    return built, missing


def _build_model(
    path: str, extra: str | None, values: StateDict, info: LoadInfo, options: dict[str, Any], disable_dynamic: bool
) -> tuple[Any, list[str]]:
    """The host's patcher of a state dict, and what its model needs and the state dict does not have."""
    state = to_host(rename_norms(values, norm_name()))
    shapes = shapes_of(state)
    load = comfy.sd.load_diffusion_model_state_dict
    try:
        patcher = load(
            state,
            model_options=options,
            **accepted(load, disable_dynamic=disable_dynamic, metadata=dict(info.metadata)),
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except HOST_ERRORS as error:
        raise cannot_build(path, error, extra) from error
    if patcher is None:
        raise not_recognised(path, info, values)
    return patcher, missing_parameters(patcher.model, shapes)


def not_recognised(path: str, info: LoadInfo, values: StateDict) -> UnsupportedArch:
    """The refusal of what the host's detection has no class for: another kind of model, or a newer one."""
    kind = kinds.what_is(shapes_of(values))
    if kind is not None and kind.node != kinds.DIFFUSION_NODE:
        return UnsupportedArch(f"it is {kind.title}, not a diffusion model", path=path, hint=f'Use "{kind.node}".')
    return UnsupportedArch(
        f"ComfyUI {host_version()} does not recognise this model (general.architecture '{info.arch}')",
        path=path,
        hint="This ComfyUI may be too old for it: update ComfyUI, or check that the file is a diffusion model.",
    )


def _laid_over_nothing(path: str, extra: str, info: LoadInfo) -> UnsupportedArch:
    return UnsupportedArch(
        f"none of its {len(info.extra_keys)} tensors has a place in the model of {os.path.basename(path)}",
        path=extra,
        hint="As extra_name choose a file with modules for this model, such as VACE, or none.",
    )


# What a host's detection and model building raise when keys or shapes are not what they expect.
HOST_ERRORS = (
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StopIteration,
    UnboundLocalError,
)

# Class of a host's model -> parameters that some hosts make and none uses.
UNUSED = MappingProxyType({"NextDiT": {"norm_final.weight"}})


def missing_parameters(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """State-dict keys that a host's model needed and the file did not have, of layers and of models themselves.

    Args:
        model: the host's BaseModel.
        shapes: key -> shape of the state dict that it was loaded from.
    """
    network, prefix = model.diffusion_model, MODEL_PREFIX
    layers = missing_in_layers(model)
    tell = [f"{name}." for name, module in network.named_modules() if hasattr(module, "missing")]
    bare = {name for name, _ in network.named_parameters()}
    # Shapes are all that the host needs to say what it calls the keys itself.
    metas = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = set(model.model_config.process_unet_state_dict(metas))
    bare = bare - found if bare & found else set()  # none: the host converted another layout, so layers alone tell
    own = {prefix + name for name in bare if not name.startswith(tuple(tell))}
    unused = {prefix + name for name in UNUSED.get(type(network).__name__, ())}
    return sorted((layers | own) - unused)


def missing_in_layers(model: torch.nn.Module) -> set[str]:
    """Parameters that layers of ours needed and the file did not have."""
    return {f"{name}.{last}" for name, module in model.named_modules() for last in getattr(module, "missing", ())}


def norm_name() -> str:
    """What the host's Flux calls the weights of its norms: older hosts have a class for them, with another name."""
    own_norm = getattr(comfy.ldm.flux.layers, "RMSNorm", None)
    return "weight" if own_norm is None else "scale"


def incomplete(path: str, missing: list[str], extra: str | None = None) -> UnsupportedArch:
    """The refusal of a file without tensors that its model needs; nor were they in the one laid over it, if any."""
    where = f" here and in {os.path.basename(extra)}" if extra else ""
    return UnsupportedArch(
        f"{len(missing)} tensors that ComfyUI needs are missing{where}: {name_list(missing)}",
        path=path,
        hint="The file is incomplete or was converted for another program; take another one.",
    )


def cannot_build(path: str, error: Exception, extra: str | None = None) -> UnsupportedArch:
    """A host's failure to fill its model, as one sentence with the first few of its reasons."""
    source = f"these tensors and those of {os.path.basename(extra)}" if extra else "these tensors"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    reasons = lines[1:] or [f"{type(error).__name__} {' '.join(lines)}".strip()]
    return UnsupportedArch(
        f"ComfyUI {host_version()} cannot build a model from {source}: {name_list(reasons)}",
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
        type_name: of clip_types(), or "auto"; empty: the first of them.
        device: "default" or "cpu".
        vision: path of the vision part (mmproj) of a GGUF encoder; "auto": looked for beside it; "none": text only.

    Raises:
        GGUFError: with one sentence for the user.
    """
    options: dict[str, Any] = {"custom_operations": make_ops()}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    advance = progress(len(paths) + 1)  # steps of a load that takes seconds: each file, and what is made of them
    states, infos = map(list, zip(*(_text_encoder(path, vision, advance) for path in paths), strict=True))
    if vision not in VISION_CHOICES and not any(info and info.vision for info in infos):
        raise _vision_for_nothing(vision)
    clip_type = _clip_type(paths, type_name, states, infos)
    exact = _declare_dtypes(states, infos, options.get("load_device"))
    clip = _build_clip(paths, states, clip_type, options, disable_dynamic)
    ours = [state if info else {} for state, info in zip(states, infos, strict=True)]  # the rest is as the host has it
    text_encoders.restore_floats(clip.cond_stage_model, ours, exact)
    _check_complete(clip.cond_stage_model, paths, states, infos)
    advance(1)
    adopt(clip.patcher, (_reload_clip, (tuple(paths), type_name, device, vision)))
    log_advice(clip.patcher.load_device)
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


def _text_encoder(path: str, vision: str, advance: Callable[[int], None]) -> tuple[dict[str, Any], LoadInfo | None]:
    """State dict of a file for the host, and what it is if it is GGUF; one step of a progress bar."""
    info: LoadInfo | None = None
    if path.lower().endswith(".gguf"):
        values, info = load_text_encoder(path, vision)
        state = to_host(values)
    else:
        state = prepare_state(*comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True))
    advance(1)
    return state, info


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
    # Packs that wrap the nodes hand on a type of their own where the nodes have no such input.
    type_name = FIXED_TYPES.get(len(paths), (type_name or clip_types(len(paths))[0],))[0]
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
        hint = "Choose another encoder." if len(paths) in FIXED_TYPES else "Choose another type or another encoder."
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
