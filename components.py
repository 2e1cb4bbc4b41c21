# SPDX-License-Identifier: Apache-2.0
"""Files in, the host's objects out, for all that is neither a diffusion model nor a text encoder.

VAEs, CLIP vision models, ControlNets, LoRAs, model patches, latent upscale models. Where the host lets us choose the
layers of a kind, weights stay quantized in memory; else they are dequantized as they are read, and the log says so.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MethodType
from typing import Any, TypeVar

import comfy.clip_vision
import comfy.controlnet
import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .dequant import PLAIN_NAMES
from .errors import UnsupportedArch
from .host.compat import accepted, host_version, is_quantized, wrap
from .host.layer import QuantizedLayer
from .host.node_functions import find_loader, run_loader
from .host.page import progress
from .host.patcher import adopt
from .loader import LoadInfo, load_component
from .models import kinds
from .models.arch_entry import Shapes
from .models.checkpoints import VAE_PREFIXES
from .models.joined import lacking_parts
from .models.kinds import Kind
from .models.values import QuantizedBytes, StateDict, shapes_of
from .ops import make_ops
from .service import HOST_ERRORS, cannot_build, incomplete, missing_in_layers, to_host

log = logging.getLogger("gguf_kit")

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")

# Host's parameters with other keys in older files, which torch itself renames as it loads them.
_RENAMED_BY_TORCH = ".parametrizations."
# Parameters that files may lack: hosts fill them themselves (Stable Cascade), or use them only in training (DINO).
_NOT_NEEDED = frozenset({"encoder.mean", "encoder.std", "embeddings.mask_token"})


# -- what the kinds share --


def to_floats(values: StateDict, dtype: torch.dtype = torch.float32, *, own_memory: bool = False) -> Tensors:
    """A state dict without quantized weights: those in `dtype`, all others as stored; moves a progress bar.

    Args:
        own_memory: nothing is a view of the file, for code that computes in place.
    """
    advance = progress(sum(value.data.numel() for value in values.values() if isinstance(value, QuantizedBytes)))
    floats: Tensors = {}
    for key, value in values.items():
        if not isinstance(value, QuantizedBytes):
            floats[key] = value.clone() if own_memory else value
            continue
        floats[key] = value.dequantize(dtype)
        advance(value.data.numel())
    return floats


def _say_dequantized(info: LoadInfo, what: str) -> None:
    """Tell, once a load, that a quantized file saves disk space here and no memory."""
    if {*info.qtypes} - PLAIN_NAMES:
        name = os.path.basename(info.path)
        log.info("%s: ComfyUI takes no quantized %s, so its weights were dequantized as they were read", name, what)


def _build(info: LoadInfo, values: StateDict, kind: Kind, build: Callable[[], T | None]) -> T:
    """What the host builds, or one sentence about why it cannot."""
    error: Exception | None = None
    try:
        built = build()
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except UnboundLocalError:  # what is left of a host's chain of ifs when none of them fits
        built = None
    except HOST_ERRORS as failure:
        built, error = None, failure
    if built is not None:
        return built
    found = kinds.what_is(shapes_of(values))
    if found is not None and found is not kind:
        raise _wrong_kind(info, found, kind)
    if error is not None:
        raise cannot_build(info.path, error) from error
    raise UnsupportedArch(
        f"ComfyUI {host_version()} does not recognise it as {kind.title} (general.architecture '{info.arch}')",
        path=info.path,
        hint="This ComfyUI may be too old for it, or the file was converted for another program.",
    )


def _refuse_models(info: LoadInfo, values: StateDict, kind: Kind) -> None:
    """Refuse whole models, which may be too large to be dequantized, by their names; of all else the host decides."""
    shapes = shapes_of(values)
    found = None if kind.matches(shapes) else kinds.what_is(shapes)
    if found is not None and found.node in kinds.WHOLE_MODELS:
        raise _wrong_kind(info, found, kind)


def _wrong_kind(info: LoadInfo, found: Kind, wanted: Kind) -> UnsupportedArch:
    return UnsupportedArch(f"it is {found.title}, not {wanted.title}", path=info.path, hint=f'Use "{found.node}".')


def _missing_in_parts(model: torch.nn.Module, keys: Collection[str]) -> list[str]:
    """Parameters that a file lacks of the parts that it has; a part is all that has the same first name.

    A whole part may be absent: there are VAEs without encoder, and the host says so itself. It also may put or take a
    name in front of the file's keys, so keys are compared by their ends.
    """
    ends = {end for key in keys for end in _ends(key)}
    missing: dict[str, list[str]] = {}
    present = set()
    for name, _ in model.named_parameters():
        part = name.partition(".")[0]
        if name in ends or any(end in keys for end in _ends(name)):
            present.add(part)
        elif _RENAMED_BY_TORCH not in name and name not in _NOT_NEEDED:
            missing.setdefault(part, []).append(name)
    return sorted(name for part, names in missing.items() if part in present for name in names)


def _ends(name: str) -> Iterable[str]:
    """The name and what is left of it without its first, its first two, ... parts."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _without_dynamic(patcher: Any, disable_dynamic: bool) -> Any:
    """The same model under the host's ordinary patcher, if that is asked for."""
    if not disable_dynamic or not getattr(patcher, "is_dynamic", bool)():
        return patcher
    return comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)


# -- VAE --


def load_vae(path: str) -> Any:
    """A VAE of a GGUF file as the host's VAE; its quantized weights pass through float32 to the dtype the host chooses.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    values = _strip_common(values, VAE_PREFIXES)
    _refuse_models(info, values, kinds.VAE)
    state, shapes = to_floats(values), shapes_of(values)
    metadata = dict(info.metadata) or None

    def build() -> Any:
        vae = comfy.sd.VAE(sd=state, **accepted(comfy.sd.VAE.__init__, metadata=metadata))
        return vae if vae.first_stage_model is not None else None

    vae = _build(info, values, kinds.VAE, build)
    check_vae(path, vae, shapes)
    vae.patcher.cached_patcher_init = (_vae_patcher, (path,))
    _say_dequantized(info, "VAE")
    return vae


def _vae_patcher(path: str, disable_dynamic: bool = False) -> Any:
    vae = load_vae(path)
    if disable_dynamic:  # until they are used, weights under dynamic VRAM have the types of the file
        vae.first_stage_model.to(vae.vae_dtype)
    return _without_dynamic(vae.patcher, disable_dynamic)


def check_vae(path: str, vae: Any, shapes: Shapes) -> None:
    """Refuse a VAE that the host has built of a state dict with these keys, if that lacks parameters."""
    keys = {*shapes}
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:  # those of diffusers are renamed by the host
        metas = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        keys |= {*comfy.sd.diffusers_convert.convert_vae_state_dict(metas)}
    missing = _missing_in_parts(vae.first_stage_model, keys)
    if missing:
        raise incomplete(path, missing)


def _strip_common(values: StateDict, prefixes: Iterable[str]) -> StateDict:
    """The same without a prefix that all keys have."""
    for prefix in prefixes:
        if all(key.startswith(prefix) for key in values):
            return {key.removeprefix(prefix): value for key, value in values.items()}
    return values


# -- CLIP vision --

_OPEN_CLIP = "visual.transformer.resblocks.0.attn.in_proj_weight"


def load_clip_vision(path: str) -> Any:
    """A vision model of a GGUF file as the host's CLIP_VISION, dequantized in the dtype that the host computes in.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    _refuse_models(info, values, kinds.CLIP_VISION)
    device = comfy.model_management.text_encoder_device()
    state = to_floats(values, comfy.model_management.text_encoder_dtype(device))
    keys: set[str] = set()

    def build() -> Any:
        named = comfy.clip_vision.convert_to_transformers(state, "visual.") if _OPEN_CLIP in state else state
        keys.update(named)
        return comfy.clip_vision.load_clipvision_from_sd(named)

    model = _build(info, values, kinds.CLIP_VISION, build)
    missing = _missing_in_parts(model.model, keys)
    if missing:
        raise incomplete(path, missing)
    _say_dequantized(info, "CLIP vision model")
    return model


# -- ControlNet --

# Of these the host takes the tensors as they are: Control-LoRAs, T2I-Adapters.
_FLOAT_CONTROLS = re.compile(r"lora_controlnet|(adapter\.)?body\..*|backbone\..*")
_DIFFERENCE = "difference"
# By the name of the file the host knows a ControlNet whose outputs it has to average; a type may follow in ours.
_AVERAGED = re.compile(r".*_shuffle(_fp16)?([-_.]+(I?Q\d\w*|B?F16|F32))?", re.IGNORECASE | re.DOTALL)
# Parameters of models themselves, not of their layers, of ControlNets whose names the host keeps.
_BARE = ("task_embedding", "text_embedding_padding", "pooler.positional_embedding")


def load_controlnet(path: str, model: Any = None) -> Any:
    """A ControlNet, Control-LoRA or T2I-Adapter of a GGUF file as the host's control object.

    Args:
        model: the host's MODEL, for a ControlNet that is stored as the difference to its weights.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    if _DIFFERENCE in values and model is None:
        raise UnsupportedArch(
            "this ControlNet is stored as the difference to a model", path=path, hint="Connect that model to the node."
        )
    options: dict[str, Any] = {"custom_operations": make_ops()}
    if _AVERAGED.fullmatch(os.path.splitext(os.path.basename(path))[0]):
        options["global_average_pooling"] = True
    converted = _converted(values)
    keeps_bytes = converted is None and _DIFFERENCE not in values and not any(map(_FLOAT_CONTROLS.fullmatch, values))
    state = to_host(values) if keeps_bytes else _control_floats(info, values, converted)
    load = comfy.controlnet.load_controlnet_state_dict
    control = _build(info, values, kinds.CONTROLNET, lambda: load(state, model, options))
    _check_control(path, control, {*values, *(converted or ())}, renamed=converted is not None)
    if keeps_bytes:
        adopt(control.control_model_wrapped, (_controlnet_patcher, (path,)))
    else:
        _take_model_dtype(getattr(control, "control_model", None))
        _say_dequantized(info, "ControlNet of this kind")
    return control


def _controlnet_patcher(path: str, disable_dynamic: bool = False) -> Any:
    patcher = _without_dynamic(load_controlnet(path).control_model_wrapped, disable_dynamic)
    adopt(patcher, (_controlnet_patcher, (path,)))
    return patcher


def _converted(values: StateDict) -> Tensors | None:
    """What the host makes of a ControlNet in diffusers' layout of Flux and SD3, without values; None: of any other.

    With these tensors the host computes before it puts them into layers.
    """
    metas = {key: torch.empty(value.shape, device="meta") for key, value in values.items()}
    try:
        converted: Tensors | None = comfy.model_detection.convert_diffusers_mmdit(metas, "")
    except HOST_ERRORS:  # not for this kind; what it cannot convert, it does not convert when it loads either
        return None
    return converted


def _control_floats(info: LoadInfo, values: StateDict, converted: Tensors | None) -> Tensors:
    """The floats of a ControlNet in the dtype that the host will choose, where it can be asked; else in float32."""
    _refuse_models(info, values, kinds.CONTROLNET)
    dtype = torch.float32
    if converted is not None:
        lacking = lacking_parts(values)
        if lacking:
            raise incomplete(info.path, lacking)
        try:
            dtype = comfy.controlnet.controlnet_config(converted)[3]
        except HOST_ERRORS as error:  # it then fails in the same way when it loads
            log.debug("%s: ComfyUI tells no dtype: %s", info.path, error)
    return to_floats(values, dtype, own_memory=_DIFFERENCE in values)


def _take_model_dtype(model: torch.nn.Module | None) -> None:
    """Round layers to the dtype that the host chose, as its own would: ours keep what they are given."""
    for module in () if model is None else model.modules():
        if isinstance(module, QuantizedLayer) and module.weight_comfy_model_dtype is not None:
            module.to(module.weight_comfy_model_dtype)


def _check_control(path: str, control: Any, keys: Collection[str], *, renamed: bool) -> None:
    """Refuse a ControlNet that lacks parameters which nothing else fills.

    Args:
        renamed: the keys hold all names that the host gave its model, so that each of its parameters can be looked up.
    """
    model = getattr(control, "control_model", None)
    if model is None:  # a T2I-Adapter, which the host refuses itself, or a Control-LoRA, which is no whole model
        return
    missing = missing_in_layers(model)
    layers = {name for name, module in model.named_modules() if hasattr(module, "missing")}
    bare = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers}
    ends = {*keys} if renamed else {end for key in keys for end in _ends(key)}
    missing |= {name for name in bare - ends if renamed or name in _BARE}
    if isinstance(control, comfy.controlnet.ControlNetSD35):  # takes it from the diffusion model when it is used
        taken = "orig_y_embedder." if model.double_y_emb else "x_embedder."
        missing = {name for name in missing if not name.startswith(taken)}
    if missing:
        raise incomplete(path, sorted(missing))


# -- LoRA --

# Dots of the longest names of factors: .lora_linear_layer.up.weight
_LORA_DOTS = 3


def load_lora(path: str) -> tuple[Tensors, Mapping[str, str]]:
    """A LoRA of a GGUF file: tensors under the keys of its safetensors file, quantized ones in float32, and metadata.

    float32 because the factors of a Q8_0 block, a scale in float16 and integers of 8 bits, have products of 18 bits.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    _build(info, values, kinds.LORA, lambda: _is_lora(values) or None)
    _say_dequantized(info, "LoRA")
    return to_floats(values), info.metadata


def _is_lora(values: StateDict) -> bool:
    """Whether the host reads a patch from any of these keys, whatever model it is for."""
    zero = torch.zeros(())  # seen everywhere: names and shapes tell
    converted = comfy.lora_convert.convert_lora({key: zero.expand(value.shape) for key, value in values.items()})
    return any(comfy.lora.load_lora(converted, {x: x for x in _layer_names(key)}, False) for key in converted)


def _layer_names(key: str) -> Iterable[str]:
    """What a key may begin with in front of the name of a factor."""
    for _ in range(_LORA_DOTS):
        key, dot, _last = key.rpartition(".")
        if dot:
            yield key
            yield key.removesuffix("_lora")


def apply_lora(
    lora: tuple[Tensors, Mapping[str, str]], model: Any, clip: Any, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """Clones of the host's MODEL and CLIP (either may be None) with a LoRA of load_lora()."""
    tensors, metadata = lora
    load = comfy.sd.load_lora_for_models
    patched: tuple[Any, Any] = load(
        model, clip, tensors, strength_model, strength_clip, **accepted(load, lora_metadata=dict(metadata) or None)
    )
    return patched


# -- model patches and latent upscale models --

# What a patch keeps of these for later, the host uses as plain tensors.
_HELD_BACK = "first_stage_model."


def load_model_patch(path: str, *, disable_dynamic: bool = False) -> Any:
    """A model patch (a ControlNet, adapter or head beside a diffusion model) of a GGUF file as the host's patcher.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    loader = _host_loader(path, "ModelPatchLoader", kinds.MODEL_PATCH)
    state, metadata, ops = _patch_state(values), dict(info.metadata) or None, make_ops()
    patcher = _build(info, values, kinds.MODEL_PATCH, lambda: run_loader(loader, path, state, metadata, ops))
    _take_default_dtype(patcher.model)
    patcher = _without_dynamic(patcher, disable_dynamic)
    adopt(patcher, (load_model_patch, (path,)))
    return patcher


def _patch_state(values: StateDict) -> Tensors:
    """A model patch for the host: quantized, and claiming float32, lest newer hosts round all else to bfloat16."""
    held_back = to_floats({key: value for key, value in values.items() if key.startswith(_HELD_BACK)})
    as_bytes = {
        key: wrap(value.data, value.qtype, value.shape, torch.float32) if isinstance(value, QuantizedBytes) else value
        for key, value in values.items()
    }
    return as_bytes | held_back


def _take_default_dtype(model: torch.nn.Module) -> None:
    """Give layers that a host makes without a dtype the one that its own would have: some code computes in it."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.weight_comfy_model_dtype is None:
            if not is_quantized(module.weight):
                weight: Any = module.weight
                floats = weight.to(torch.get_default_dtype())
                module._parameters["weight"] = torch.nn.Parameter(floats, requires_grad=False)


def load_latent_upscaler(path: str) -> Any:
    """A latent upscale model of a GGUF file as the host's own object.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_component(path)
    loader = _host_loader(path, "LatentUpscaleModelLoader", kinds.LATENT_UPSCALER)
    _refuse_models(info, values, kinds.LATENT_UPSCALER)
    state, metadata = to_floats(values), dict(info.metadata) or None
    model = _build(info, values, kinds.LATENT_UPSCALER, lambda: run_loader(loader, path, state, metadata))
    _say_dequantized(info, "latent upscale model")
    return model


def _host_loader(path: str, node_id: str, kind: Kind) -> MethodType:
    loader = find_loader(node_id)
    if loader is None:
        raise UnsupportedArch(
            f"ComfyUI {host_version()} has no loader for {kind.title} that GGUF Kit can use",
            path=path,
            hint="Update ComfyUI and GGUF Kit.",
        )
    return loader
