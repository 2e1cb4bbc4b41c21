# SPDX-License-Identifier: Apache-2.0
"""The host's MODEL and CLIP in, GGUF files out: weights with the patches that they have, one tensor at a time.

A weight is taken as it was loaded, before the host patched it, so that what is saved does not hang on what is on which
device: patches are added in float32, and the sum is rounded once. A weight without patches that is quantized as wanted
already keeps its bytes.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.weight_adapter import LoRAAdapter
from safetensors import SafetensorError, safe_open

from .dequant import PLAIN_DTYPES
from .errors import GGUFError, UnsupportedArch, name_list, plain_text
from .host.compat import dequantize_weight, is_quantized
from .host.lora import MODEL_PREFIX, PatchList, patch_weight
from .host.page import progress
from .models import archs
from .models.repairs import rename_norms
from .models.split_files import open_gguf
from .models.tokenizers import KINDS
from .models.vision_table import VISION_PARTS
from .quantize import ggml
from .quantize.containers import Blocks, StoredTensor, Tensors
from .quantize.convert import Conversion, convert, encoded_qtypes
from .quantize.encode import Engine, GgmlEngine, TorchEngine, useful_threads
from .quantize.encoder_sources import take_encoder
from .quantize.fp8 import FILE_MARKER, INPUT_SUFFIXES, LAYER_MARKER, SCALE_SUFFIXES
from .quantize.plan import STORED_TYPES, Choices, Plan, PlannedTensor, make_plan
from .quantize.recipe_files import RecipeFile, parse_recipe
from .quantize.recipes import RECIPES, TYPE_NAMES
from .quantize.sources import NOT_CARRIED, Source

log = logging.getLogger("gguf_kit")

# What can be asked for without an importance matrix.
SAVE_TYPES = tuple(name for name in TYPE_NAMES if name not in RECIPES or not RECIPES[name].needs_imatrix)
TRANSFORMER = "transformer"  # in the host's text encoders the part that files hold
COMPILED = "_orig_mod"  # what torch.compile puts between the name of a module and the names in it
# Keys beside a weight that the host itself quantized; the weight is saved as what it stands for.
SCALES = (*SCALE_SUFFIXES, ".weight_scale_2", *INPUT_SUFFIXES, LAYER_MARKER)
# image_model of the host -> what it takes off all keys when it loads such a model, and needs to recognise it.
TAKEN_OFF: Mapping[str, str] = MappingProxyType({"pixeldit_t2i": "core."})
# Parts of the host's models beside the network -> what files have in front of their keys.
# Source: get_model() of Stable_Zero123, StableAudio and StableAudio3 in the host's supported_models.py.
BESIDE_NETWORK: Mapping[str, str] = MappingProxyType(
    {
        "cc_projection.": "cc_projection.",
        "seconds_start_embedder.": "conditioner.conditioners.seconds_start.",
        "seconds_total_embedder.": "conditioner.conditioners.seconds_total.",
        "padding_embedding": "conditioner.conditioners.prompt.padding_embedding",
    }
)
QWEN_NORM, VISUAL = "model.layers.0.input_layernorm.weight", "visual."  # in the host's encoders
UNSAVED = ("logit_scale",)  # beside the host's text encoders; a constant of CLIP's training
GPU_KINDS = ("cuda", "xpu")  # where the torch encoder may compute; NVIDIA and AMD are both cuda
GPU_ENCODER_BYTES = 4 << 30  # room for chunks on the device
# Part of an error's hint, most often an option of the command lines -> what to do in a node instead.
_NODE_HINTS = (
    ("--tensor-type", "Give it another type: a line NAME=BF16 in the input recipe."),
    ("another disk", "Free some space, or start ComfyUI with another --output-directory."),
    ("--imatrix", "Choose a type that needs none, such as IQ4_XS, Q3_K_S or Q2_K."),
)
_OPTION = re.compile(r"[;.] [^;.]*--[^;.]*")


def save_model(patcher: Any, path: Path, type_name: str, recipe: str = "") -> Plan:
    """Write a diffusion model with its patches.

    Args:
        patcher: the host's MODEL.
        type_name: one of SAVE_TYPES.
        recipe: text of a recipe file; its types come before type_name's.
    Returns:
        what was written.
    Raises:
        GGUFError: with one sentence for the user.
    """
    warn_of_unsaved(patcher, path.name)
    stored = rename_norms(patched_tensors(patcher, MODEL_PREFIX), "scale")  # their name in published files
    prefix = TAKEN_OFF.get(_unet_config(patcher.model).get("image_model", ""), "")
    stored = (
        {prefix + key: tensor for key, tensor in stored.items()} | _beside_network(patcher) | sampling_marks(patcher)
    )
    source = Source(path, "MODEL", stored, carried_metadata(patcher), ())
    return write_gguf(source, path, type_name, parse_recipe(recipe))


def save_clip(clip: Any, path_of: Callable[[str], Path], type_name: str, recipe: str = "") -> tuple[Plan, ...]:
    """Write each text encoder of a CLIP with its patches, as a file of its own that the CLIP loaders take.

    Args:
        clip: the host's CLIP.
        path_of: gives a file for the host's name of an encoder, such as "t5xxl".
        type_name: one of SAVE_TYPES.
        recipe: text of a recipe file, for the encoders that have its names.
    Raises:
        GGUFError: with one sentence for the user; nothing is written if an encoder is of an unknown kind, or the recipe
            is for none of them.
    """
    wanted = parse_recipe(recipe)
    model, sources = clip.patcher.model, []
    prefixes = [f"{name}.{TRANSFORMER}." if name else f"{TRANSFORMER}." for name in encoder_names(model)]
    for prefix in prefixes:
        path = path_of(prefix.split(".")[-3] if prefix.count(".") > 1 else "encoder")
        encoder = model.get_submodule(prefix.rstrip("."))
        kind = type(getattr(encoder, COMPILED, encoder)).__module__
        stored = with_vision_names(patched_tensors(clip.patcher, prefix), kind)
        sources.append(Source(path, "CLIP", _named_encoder(path, stored, clip.tokenizer), {}, ()))
    keys = map(plain_key, model.state_dict())
    outside = [key for key in keys if not key.startswith(tuple(prefixes)) and not key.endswith(UNSAVED)]
    if outside:
        log.warning("%d tensors beside the text encoders are not saved: %s", len(outside), name_list(outside))
    if wanted.types and not any(wanted.types.keys() & source.tensors.keys() for source in sources):
        names = [*wanted.types]
        problem = f"the text encoders have none of the {len(names)} names in the recipe: {name_list(names)}"
        raise GGUFError(problem, hint="Take the recipe of one of them.")
    warn_of_unsaved(clip.patcher, ", ".join(source.path.name for source in sources))
    return tuple(
        write_gguf(source, source.path, type_name, wanted if wanted.types.keys() & source.tensors else RecipeFile())
        for source in sources
    )


def encoder_names(model: torch.nn.Module) -> list[str]:
    """Where a CLIP model has its encoders: the names of the modules that have a transformer."""
    found = (
        name for name, part in model.named_modules() if isinstance(getattr(part, TRANSFORMER, None), torch.nn.Module)
    )
    return list(dict.fromkeys(map(plain_key, found)))


def with_vision_names(stored: Tensors, module: str) -> Tensors:
    """An encoder's tensors such that the host finds the vision part of a Qwen3-VL, or what tells that it has one.

    Args:
        module: name of the module with the encoder's class. The host takes it for a Qwen3 without such a part.
    """
    if not module.endswith(".qwen3vl") or QWEN_NORM not in stored:
        return stored
    width = stored[QWEN_NORM].shape[0]
    part = next(part for part in VISION_PARTS["qwen3vl"] if part.markers)
    prefix = part.prefix_of.get(width, part.prefix)
    names = {key: f"{prefix}{key.removeprefix(VISUAL)}" if key.startswith(VISUAL) else key for key in stored}
    found = {names[key]: tensor for key, tensor in stored.items()}
    for key, shape in part.markers.get(width, {}).items():
        zeros = StoredTensor(torch.float16, shape, functools.partial(torch.zeros, shape, dtype=torch.float16))
        found.setdefault(prefix + key, zeros)
    return found


def _named_encoder(path: Path, stored: Tensors, tokenizer: Any) -> Tensors:
    """An encoder's tensors as the converter would store them, with the tokenizer that it needs."""
    arch = archs.detect_encoder({name: tensor.shape for name, tensor in stored.items()})
    key = KINDS[arch.tokenizer].key if arch and arch.tokenizer else ""
    if key and key not in stored:
        raw = tokenizer.state_dict().get(key)
        if raw is not None:
            stored[key] = StoredTensor(torch.uint8, tuple(raw.shape), lambda: raw)
    found = take_encoder(path, stored)
    if found is None:
        raise UnsupportedArch("this text encoder is of no kind that can be saved as GGUF", path=path)
    for note in found[1]:
        log.warning("%s: %s", path.name, note)
    return found[0]


# -- weights --


def patched_tensors(patcher: Any, prefix: str = "") -> Tensors:
    """Every tensor of a patcher's model whose key has a prefix, under its key without it; computed when read."""
    keys = {plain_key(key): key for key in patcher.model_state_dict(prefix.partition(".")[0])}
    kept = [name for name in keys if name.startswith(prefix) and not name.endswith((*SCALES, FILE_MARKER))]
    return {name.removeprefix(prefix): _patched_tensor(patcher, keys[name]) for name in kept}


def plain_key(key: str) -> str:
    """A key as it is where nothing is compiled; files and patches have such names."""
    return ".".join(name for name in key.split(".") if name != COMPILED)


def warn_of_unsaved(patcher: Any, file_name: str) -> None:
    """Name what changes a model only while it runs, and is in none of its weights: bypass LoRAs and hooks."""
    found = [plain_text(str(name)) for name in patcher.injections]
    found += ["patches of hooks"] if patcher.hook_patches else []
    if found:
        log.warning("%s: what changes the model only while it runs is not saved: %s", file_name, name_list(found))


def _beside_network(patcher: Any) -> Tensors:
    """The tensors of a model that are not its network's, as files name them."""
    return {
        files + rest: tensor
        for host, files in BESIDE_NETWORK.items()
        for rest, tensor in patched_tensors(patcher, host).items()
    }


def _patched_tensor(patcher: Any, key: str) -> StoredTensor:
    weight, _ = _unpatched(patcher, key)
    patches = patches_of(patcher, key)
    # The precision that it had, also with patches; bfloat16 holds every fp8 value.
    dtype = torch.bfloat16 if is_quantized(weight) or weight.dtype not in STORED_TYPES else weight.dtype
    blocks = None
    if is_quantized(weight) and not patches:
        blocks = Blocks(weight._params.qtype, lambda: _unpatched(patcher, key)[0]._qdata)
    return StoredTensor(dtype, _patched_shape(weight, patches), functools.partial(_read, patcher, key), blocks)


def patches_of(patcher: Any, key: str) -> PatchList:
    """Patches of a weight; of those of a compiled part some nodes have added before it was compiled, others after."""
    return [patch for name in dict.fromkeys((plain_key(key), key)) for patch in patcher.patches.get(name, ())]


def _patched_shape(weight: torch.Tensor, patches: PatchList) -> tuple[int, ...]:
    """Shape with patches; LoRAs for other tasks can widen a layer. Source: the host's comfy.lora.calculate_shape."""
    shape = tuple(weight.shape)
    for _, patch, _, offset, _ in patches:
        if offset is not None or isinstance(patch, list):
            continue
        if isinstance(patch, LoRAAdapter):
            shape = tuple(patch.weights[5] or shape)
        elif isinstance(patch, tuple) and patch[0] == "diff" and len(patch[1]) > 1 and patch[1][1]["pad_weight"]:
            shape = tuple(patch[1][0].shape)
    return shape


def _unpatched(patcher: Any, key: str) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor] | None]:
    """A weight without patches, and what makes floats of it. Source: the host's ModelPatcher.get_key_patches."""
    weight, _, to_float = comfy.model_patcher.get_key_weight(patcher.model, key)
    for name in dict.fromkeys((key, plain_key(key))):
        if name in patcher.backup:
            weight = patcher.backup[name].weight
        if name in patcher.hook_backup:
            weight = patcher.hook_backup[name][0]
    # A quantized weight needs no detach, and torch refuses it where the weight was made in another inference mode.
    return weight.detach() if weight.requires_grad else weight, to_float


def _read(patcher: Any, key: str) -> torch.Tensor:
    """A weight on the CPU: its patches added in float32, or as it is if it has none."""
    patches = patches_of(patcher, key)
    weight, to_float = _unpatched(patcher, key)
    if not patches and to_float is None:
        plain: torch.Tensor = weight if weight.dtype in STORED_TYPES else weight.float()
        return plain.cpu().contiguous()
    if not patches or patcher.load_device == torch.device("cpu"):
        return _merged(weight, to_float, patches, key).cpu().contiguous()
    try:
        return _merged(weight.to(patcher.load_device), to_float, patches, key).cpu().contiguous()
    except comfy.model_management.OOM_EXCEPTION:
        return _merged(weight.cpu(), to_float, patches, key).contiguous()


def _merged(
    weight: torch.Tensor, to_float: Callable[[torch.Tensor], torch.Tensor] | None, patches: PatchList, key: str
) -> torch.Tensor:
    """A private float32 tensor of a weight with its patches, on the weight's device."""
    if is_quantized(weight):
        own = dequantize_weight(weight, torch.float32)
    else:
        wide = weight.to(torch.float32, copy=True)  # of what the host quantized it claims the type, and holds the bytes
        own = to_float(wide).to(torch.float32) if to_float else wide
    return patch_weight(own, patches, key, weight) if patches else own


# -- what is not in the weights --


def sampling_marks(patcher: Any) -> Tensors:
    """Small tensors by which the host knows how the model samples, as its own node CheckpointSave writes them.

    Source: comfy_extras/nodes_model_merging.py save_checkpoint(), comfy/supported_models.py SDXL.model_type().
    """
    model_type, sampling = patcher.model.model_type, patcher.get_model_object("model_sampling")
    marks: dict[str, torch.Tensor] = {}
    is_v = isinstance(sampling, comfy.model_sampling.V_PREDICTION) and not isinstance(
        sampling, comfy.model_sampling.EDM
    )
    if is_v and isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
        for name in ("sigma_max", "sigma_min"):
            marks[f"edm_vpred.{name}"] = torch.as_tensor(float(getattr(sampling, name)))
    if model_type is comfy.model_base.ModelType.V_PREDICTION:
        marks["v_pred"] = torch.zeros(0)
        if getattr(sampling, "zsnr", False):
            marks["ztsnr"] = torch.zeros(0)
    latent_format = patcher.model.latent_format
    if isinstance(latent_format, comfy.latent_formats.SDXL_Playground_2_5):
        marks["edm_mean"] = latent_format.latents_mean.float()
        marks["edm_std"] = latent_format.latents_std.float()
    return {
        key: StoredTensor(mark.dtype, tuple(mark.shape), functools.partial(torch.clone, mark))
        for key, mark in marks.items()
    }


def carried_metadata(patcher: Any) -> Mapping[str, str]:
    """The strings that the file of a model carries about it, such as the config of LTX; {} where it is not known."""
    arguments = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[1]
    path = arguments[0] if arguments and isinstance(arguments[0], str) and os.path.isfile(arguments[0]) else ""
    try:
        if path.lower().endswith(".gguf"):
            return open_gguf(path).carried_metadata()
        if path.lower().endswith((".safetensors", ".sft")):
            with safe_open(path, framework="pt") as file:
                return {key: text for key, text in (file.metadata() or {}).items() if key not in NOT_CARRIED}
    except (GGUFError, SafetensorError, OSError) as error:
        log.warning("%s: what this file says about its model is not carried along: %s", os.path.basename(path), error)
    return _config_of(patcher.model)


def _config_of(model: Any) -> dict[str, str]:
    """The config of an LTX model whose file is not known, as the host has it; others are told by keys and shapes."""
    config = _unet_config(model)
    if not str(config.get("image_model", "")).startswith("ltx"):
        return {}
    known = {key: value for key, value in config.items() if isinstance(value, (bool, int, float, str, list, tuple))}
    return {"config": json.dumps({"transformer": known})}


def _unet_config(model: Any) -> dict[str, Any]:
    """Arguments with which the host has built a diffusion model."""
    return getattr(getattr(model, "model_config", None), "unet_config", None) or {}


# -- writing --


def write_gguf(source: Source, path: Path, type_name: str, recipe: RecipeFile) -> Plan:
    """Write a source as a file of a type, with the host's progress bar; a cancelled prompt leaves nothing.

    Args:
        recipe: types of single tensors, which come before type_name's.
    """
    try:
        plan = make_plan(source, Choices(type_name=type_name, exact=recipe.types))
        if recipe.weightings:
            n_named = len(recipe.weightings)
            log.warning(
                "%s: saved without the importance matrix by which the recipe weighs %d tensors", path.name, n_named
            )
        for note in plan.warnings:
            log.warning("%s: %s", path.name, _OPTION.sub("", note))
        engine, n_threads = choose_engine(source, plan)
        _make_room(engine, plan)
        convert(Conversion(source, plan, path.stem), path, engine, n_threads=n_threads, progress=_progress(plan))
    except GGUFError as error:
        hint = next((hint for part, hint in _NODE_HINTS if part in error.hint), "")
        if not hint and "--" not in error.hint:
            raise
        hint = hint.replace("NAME", error.subject or "NAME")
        problem = str(error).removesuffix(error.hint).strip()
        raise type(error)(f"{problem} {hint}".rstrip(), subject=error.subject) from error
    log.info("%s: %s, %d tensors, %.2f bits per weight", path, plan.arch.title, len(plan.tensors), plan.bpw)
    return plan


def choose_engine(source: Source, plan: Plan) -> tuple[Engine, int]:
    """A GPU if there is one, else ggml if it was built before, else torch; and the threads that it takes.

    All give the same bytes. Nothing is built by a node.

    Raises:
        GGUFError: only ggml encodes a type of the plan, and it is not there.
    """
    wanted = encoded_qtypes(source, plan) - set(PLAIN_DTYPES)
    device = comfy.model_management.get_torch_device()
    engine = TorchEngine(device if device.type in GPU_KINDS else "cpu")
    lacking = sorted(qtype.name for qtype in wanted - engine.qtypes)
    if not wanted:
        return TorchEngine(), 1
    if engine.device.type != "cpu" and not lacking:
        return engine, useful_threads(engine, os.cpu_count() or 1)
    library = ggml.find_library()
    if library is not None:
        return GgmlEngine(library), os.cpu_count() or 1
    if lacking:
        raise GGUFError(
            f"{plan.type_name} needs ggml's encoder for {', '.join(lacking)}, which is not built yet",
            hint="Build it by converting any model to this type with tools/convert.py, or choose Q8_0 or Q4_K_S.",
        )
    return engine, 1


def _make_room(engine: Engine, plan: Plan) -> None:
    """Let the host unload models from the device on which weights are patched and encoded."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        largest = max((prod(t.shape) for t in plan.tensors), default=0)
        n_bytes = 4 * largest * torch.float32.itemsize + (GPU_ENCODER_BYTES if engine.device.type != "cpu" else 0)
        comfy.model_management.free_memory(n_bytes, device)


def _progress(plan: Plan) -> Callable[[PlannedTensor, int], None]:
    advance = progress(plan.data_bytes)
    return lambda _, n_bytes: advance(n_bytes)
