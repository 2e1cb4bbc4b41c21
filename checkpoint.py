# SPDX-License-Identifier: Apache-2.0
"""A whole checkpoint in one GGUF file, as the host's MODEL, CLIP and VAE.

Diffusion model and text encoders stay quantized. The host builds its VAEs from layers of its own, so that of the
checkpoint is dequantized as it is read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import folder_paths
import torch

from .components import check_vae, to_floats
from .errors import UnsupportedArch, name_list
from .host import text_encoders
from .host.compat import accepted
from .host.patcher import adopt
from .loader import LoadInfo, load_checkpoint
from .models.checkpoints import DIFFUSION_PREFIX, VAE_PREFIXES, has_others
from .models.repairs import rename_norms
from .models.values import QuantizedBytes, StateDict, shapes_of
from .ops import make_ops
from .service import (
    HOST_ERRORS,
    build_completed,
    cannot_build,
    incomplete,
    missing_parameters,
    norm_name,
    not_recognised,
    to_host,
)

log = logging.getLogger("gguf_kit")

# The pooled text of these is multiplied with a matrix that others have no use for.
PROJECTED = ("clip_g",)


def load_whole(
    path: str, *, model: bool = True, clip: bool = True, vae: bool = True, disable_dynamic: bool = False
) -> tuple[Any, Any, Any]:
    """Diffusion model, text encoders and VAE of a checkpoint.

    Args:
        model, clip, vae: which of them to load; the others are None.
        disable_dynamic: ask for patchers without dynamic VRAM, on hosts that have it.

    Returns:
        the host's patcher; its CLIP, None if the checkpoint lacks a text encoder; its VAE, which says itself that it is
        none where the checkpoint has none.

    Raises:
        GGUFError: with one sentence for the user.
    """
    values, info = load_checkpoint(path)
    wanted = {"output_model": model, "output_clip": clip, "output_vae": vae}

    def build(whole: StateDict) -> tuple[tuple[Any, Any, Any], list[str]]:
        return _load(path, whole, info, **wanted, disable_dynamic=disable_dynamic)

    found, missing = build_completed(values, info, build, DIFFUSION_PREFIX)
    if missing:
        raise incomplete(path, missing)
    if found[0] is not None:
        adopt(found[0], (reload_model, (path,)))
    return found


def _load(path: str, values: StateDict, info: LoadInfo, **options: bool) -> tuple[tuple[Any, Any, Any], list[str]]:
    """What the host makes of a checkpoint, text encoders and VAE checked, and what its diffusion model lacks."""
    values, config = _prepare(path, values, info)
    vae_prefix = config.vae_key_prefix[0]
    if not options["output_vae"]:
        values = {key: value for key, value in values.items() if not key.startswith(vae_prefix)}
    state = _dequantize_vae(path, values, vae_prefix)
    exact = _declare_dtypes(state, config)
    kept = dict(state)  # the host empties its own
    patcher, encoders, decoder = _build(path, state, info, **options)
    missing = [] if patcher is None else _missing(patcher, kept)
    if encoders is not None:
        encoders = _finish_clip(path, encoders, config.process_clip_state_dict(dict(kept)), exact)
    if decoder is not None and decoder.first_stage_model is not None:  # else the host has said that there is no VAE
        check_vae(path, decoder, shapes_of(_vae_state(kept, config)))
        decoder.patcher.cached_patcher_init = (reload_vae, (path,))
    return (patcher, encoders, decoder), missing


def reload_model(path: str, disable_dynamic: bool = False) -> Any:
    """The patcher of a checkpoint's diffusion model, loaded again."""
    return load_whole(path, clip=False, vae=False, disable_dynamic=disable_dynamic)[0]


def reload_clip(path: str, disable_dynamic: bool = False) -> Any:
    """The patcher of a checkpoint's text encoders, loaded again."""
    return load_whole(path, model=False, vae=False, disable_dynamic=disable_dynamic)[1].patcher


def reload_vae(path: str, disable_dynamic: bool = False) -> Any:
    """The patcher of a checkpoint's VAE, loaded again."""
    return load_whole(path, model=False, clip=False, disable_dynamic=disable_dynamic)[2].patcher


def _prepare(path: str, values: StateDict, info: LoadInfo) -> tuple[StateDict, Any]:
    """The state dict with the names of this host for norms and for the VAE, and the host's configuration of its model.

    Raises:
        UnsupportedArch: the host does not recognise it, and would load it without our layers; or it is no checkpoint.
    """
    diffusion = {k.removeprefix(DIFFUSION_PREFIX): v for k, v in values.items() if k.startswith(DIFFUSION_PREFIX)}
    others = {key: value for key, value in values.items() if not key.startswith(DIFFUSION_PREFIX)}
    renamed = {DIFFUSION_PREFIX + key: value for key, value in rename_norms(diffusion, norm_name()).items()}
    detect = comfy.model_detection.model_config_from_unet
    try:
        config = detect(to_host(renamed | others), DIFFUSION_PREFIX, **accepted(detect, metadata=dict(info.metadata)))
    except HOST_ERRORS as error:
        raise cannot_build(path, error) from error
    if config is None:
        raise not_recognised(path, info, diffusion)
    # Some models need nothing else: for those the host makes up a VAE.
    if not has_others(others) and not config.process_vae_state_dict({}):
        raise _alone(path, info)
    return renamed | _place_vae(others, config.vae_key_prefix[0]), config


def _place_vae(others: StateDict, wanted: str) -> StateDict:
    """The same with the VAE behind the prefix where the host looks for it; of two VAEs the one that was put beside."""
    found = [prefix for prefix in VAE_PREFIXES if any(key.startswith(prefix) for key in others)]
    if wanted not in VAE_PREFIXES or not found:
        return others
    used, unused = found[-1], tuple(found[:-1])
    kept = {key: value for key, value in others.items() if not key.startswith(unused)}
    return {wanted + key.removeprefix(used) if key.startswith(used) else key: value for key, value in kept.items()}


def _dequantize_vae(path: str, values: StateDict, prefix: str) -> dict[str, torch.Tensor]:
    """The state dict for the host, with the VAE's weights as float32."""
    vae = {key: value for key, value in values.items() if key.startswith(prefix)}
    n_quantized = sum(isinstance(value, QuantizedBytes) for value in vae.values())
    if n_quantized:
        name = os.path.basename(path)
        log.info("%s: ComfyUI takes no quantized VAE, so its %d weights were dequantized as read", name, n_quantized)
    return to_host({key: value for key, value in values.items() if key not in vae}) | to_floats(vae)


def _declare_dtypes(state: dict[str, torch.Tensor], config: Any) -> dict[int, torch.Tensor]:
    """Let text encoders have the dtype that the host chooses for them, as those in files of their own have."""
    dtype = comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())
    exact: dict[int, torch.Tensor] = {}
    for key in [key for key in state if key.startswith(tuple(config.text_encoder_key_prefix))]:
        end = next((end for end in text_encoders.DTYPE_KEYS if key.endswith(f".{end}")), "")
        if end:
            norm = {end: state[key]}
            exact |= text_encoders.declare_dtype(norm, dtype)
            state[key] = norm[end]
    return exact


def _alone(path: str, info: LoadInfo) -> UnsupportedArch:
    return UnsupportedArch(
        f"it holds a diffusion model ({info.title}) alone, no whole checkpoint",
        path=path,
        hint='Load it with "Unet Loader (GGUF)".',
    )


def _build(path: str, state: dict[str, torch.Tensor], info: LoadInfo, **options: bool) -> tuple[Any, Any, Any]:
    """What the host makes of the state dict; it empties it."""
    load = comfy.sd.load_state_dict_guess_config
    try:
        found = load(
            state,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options={"custom_operations": make_ops()},
            te_model_options={"custom_operations": make_ops()},
            metadata=dict(info.metadata),
            **accepted(load, **options),
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except HOST_ERRORS as error:
        raise cannot_build(path, error) from error
    return found[0], found[1], found[2]


def _missing(patcher: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Parameters that a diffusion model lacks."""
    found = {k.removeprefix(DIFFUSION_PREFIX): v for k, v in state.items() if k.startswith(DIFFUSION_PREFIX)}
    return missing_parameters(patcher.model, shapes_of(found))


def _finish_clip(path: str, clip: Any, loaded: dict[str, torch.Tensor], exact: dict[int, torch.Tensor]) -> Any:
    """Text encoders that the host has built, checked and adopted; None, with a warning, if one of them is absent."""
    parts = list(_encoders(clip.cond_stage_model, loaded))
    absent = [name for name, _, state in parts if not state]
    if absent:
        log.warning("%s", _absent(path, absent))
        return None
    text_encoders.restore_floats(clip.cond_stage_model, [state for *_, state in parts], exact)
    for name, module, state in parts:
        _check_encoder(path, name, module, state)
    adopt(clip.patcher, (reload_clip, (path,)))
    return clip


def _check_encoder(path: str, name: str, module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Refuse a text encoder that lacks parameters; one that lacks those for pictures or sound goes on without."""
    projection = "text_projection.weight"
    lacks = [projection] if name in PROJECTED and projection not in state else []
    for missing in list(text_encoders.missing_parameters(module, [state])):
        lacks += missing.text
        if missing.vision:
            refusal = _text_only(path, name)
            text_encoders.drop_parts(module, [state], missing, refusal)
            log.warning("%s", refusal)
    if lacks:
        raise incomplete(path, [f"{name}.transformer.{key}" for key in lacks])


def _text_only(path: str, name: str) -> UnsupportedArch:
    return UnsupportedArch(
        f"the text encoder {name} of this checkpoint lacks its part for pictures or sound, so it reads text only",
        path=path,
        hint='For pictures, load it with "CLIPLoader (GGUF)" from a file of its own.',
    )


def _encoders(
    model: torch.nn.Module, loaded: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.nn.Module, dict[str, torch.Tensor]]]:
    """Name of each text encoder in a CLIP model, its module, and what of a state dict for the whole belongs to it."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "transformer", None), torch.nn.Module):
            prefix = f"{name}.transformer."
            yield name, module, {k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)}


def _absent(path: str, names: list[str]) -> UnsupportedArch:
    return UnsupportedArch(
        f"this checkpoint lacks text encoders that its model needs ({name_list(names)}), so the output CLIP is empty",
        path=path,
        hint='Load text encoders with "CLIPLoader (GGUF)" or its siblings.',
    )


def _vae_state(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """What of a state dict the host makes a VAE of. Source: comfy/sd.py load_state_dict_guess_config."""
    prefix = config.vae_key_prefix[0]
    vae = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return dict(config.process_vae_state_dict(vae))
