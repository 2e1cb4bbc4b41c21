# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints, diffusion model, text encoders and VAE in one file: which tensor is what, under ComfyUI's keys.

Owns the names of their parts. Files keep those of the safetensors file they were made of, or have the own ones of
stable-diffusion.cpp, which differ where encoders were in open_clip's layout. Source: stable-diffusion.cpp model.cpp
convert_tensor_name and preprocess_tensor (until 2025-11), src/name_conversion.cpp convert_tensor_name, src/convert.cpp.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from ..errors import UnsupportedArch, plain_text
from ..gguf_file import GGUFFile
from . import text_encoders
from .arch_entry import Shapes
from .archs import KEY_PREFIXES, MIN_PREFIXED, strip_prefix
from .repairs import Keys, cut_keys, restore_shapes, whole_names
from .tokenizers import BYTE_KEYS
from .values import QuantizedBytes, StateDict, Value, read_tensor

DIFFUSION_PREFIX = KEY_PREFIXES[0]
ENCODER_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.")
# The first of two has the VAE that a file was made of, the second one that was put beside it.
VAE_PREFIXES = ("first_stage_model.", "vae.")
OTHER_PREFIXES = (*ENCODER_PREFIXES, *VAE_PREFIXES, "pretransform.")
AVERAGES = "model_ema."  # of the weights while they were trained; nobody reads them
# What some models have in front of all their keys. Source: comfy/model_detection.py unet_prefix_from_state_dict.
RARE_PREFIXES = ("model.model.", "net.", "model.")

# Width of the text that a UNet takes -> what ComfyUI has in front of its CLIPs. Source: comfy/supported_models.py
# process_clip_state_dict of SD15, SD20, SDXLRefiner and SDXL.
UNET_ENCODERS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        768: ("cond_stage_model.",),
        1024: ("cond_stage_model.model.",),
        1280: ("conditioner.embedders.0.model.",),
        2048: ("conditioner.embedders.0.", "conditioner.embedders.1.model."),
    }
)
CONV_CONTEXT = 768  # the UNets for this width have convolutions around their transformers, the others matrices
_TO_K = "transformer_blocks.0.attn2.to_k.weight"

# -- CLIP's names: open_clip's and the half of them that stable-diffusion.cpp makes, to those of ComfyUI's class. --

_CLIP = re.compile(
    r"(?P<head>text_encoders\.\w+\.|cond_stage_model\.(?P<second>1\.)?"
    r"|conditioner\.embedders\.(?P<index>[01])\.(?:open_clip\.)?)(?P<rest>(?:model|transformer)\..+)"
)
_TEXT = "transformer.text_model."
_LAYER = rf"(?:model\.transformer\.resblocks|{re.escape(_TEXT)}encoder\.layers)\.(\d+)\."
_FUSED = re.compile(_LAYER + r"(?:self_)?attn\.in_proj[._](weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"model\.positional_embedding", f"{_TEXT}embeddings.position_embedding.weight"),
        (r"model\.token_embedding\.", f"{_TEXT}embeddings.token_embedding."),
        (r"model\.ln_final\.", f"{_TEXT}final_layer_norm."),
        (r"model\.transformer\.resblocks\.(\d+)\.ln_([12])\.", rf"{_TEXT}encoder.layers.\1.layer_norm\2."),
        (r"model\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", rf"{_TEXT}encoder.layers.\1.mlp.fc1."),
        (r"model\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", rf"{_TEXT}encoder.layers.\1.mlp.fc2."),
        (r"model\.transformer\.resblocks\.(\d+)\.attn\.", rf"{_TEXT}encoder.layers.\1.self_attn."),
        (r"model\.text_projection\.weight", "transformer.text_projection.weight"),
        (r"model\.logit_scale", "logit_scale"),
        (rf"model\.(?={re.escape(_TEXT)})", ""),
    )
)
# A bare matrix that open_clip multiplies from the other side.
_PROJECTIONS = ("model.text_projection", f"{_TEXT}text_projection")
_PROJECTION_KEY = "transformer.text_projection.weight"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where the value of a key comes from.

    Attributes:
        name: of the tensor.
        third: which third of its rows, from 0; None: all of them.
        transposed: its rows and columns change places.
    """

    name: str
    third: int | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of a whole checkpoint.

    Attributes:
        diffusion: of the diffusion model, keys without a prefix.
        others: key -> where its value comes from, of everything else; the VAE under any of VAE_PREFIXES.
    """

    diffusion: Keys
    others: Mapping[str, Piece]

    @property
    def is_whole(self) -> bool:
        """Whether there is a diffusion model, and a text encoder or VAE beside it."""
        return bool(self.diffusion.names) and has_others(self.others)


def has_others(keys: Iterable[str]) -> bool:
    """Whether there is a text encoder or VAE among the keys of a checkpoint."""
    return any(key.startswith(OTHER_PREFIXES) for key in keys)


def find_parts(file: GGUFFile) -> Parts:
    """Tell the parts of a checkpoint apart."""
    whole = {key: name for key, name in whole_names(file).items() if not key.startswith(AVERAGES)}
    inside = _diffusion_names(whole)
    shapes = restore_shapes({key: file.logical_shape(whole[name]) for key, name in inside.items()})
    names = {key: whole[name] for key, name in inside.items()}
    diffusion = Keys(names, flatten_projections(shapes), cut_keys(names))
    used = set(inside.values())
    others = {key: whole[name] for key, name in _t5_keys(name for name in whole if name not in used).items()}
    prefixes = UNET_ENCODERS.get(_context_width(shapes), ())
    pieces = [_encoder_pieces(key, name, prefixes) for key, name in others.items()]
    return Parts(diffusion, {key: piece for found in pieces for key, piece in found.items()})


def read_others(file: GGUFFile, parts: Parts) -> StateDict:
    """The values of everything but the diffusion model."""
    return {key: _read_piece(file, key, piece) for key, piece in parts.others.items()}


def flatten_projections(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes with matrices where stable-diffusion.cpp made convolutions of 1 x 1 of those around transformers."""
    flat = dict(shapes)
    for key, shape in shapes.items():
        head, _, last = key.rpartition(".proj_")
        context = shapes.get(f"{head}.{_TO_K}", ()) if last in ("in.weight", "out.weight") else ()
        if len(context) == 2 and context[1] != CONV_CONTEXT and len(shape) == 4 and shape[2:] == (1, 1):
            flat[key] = shape[:2]
    return flat


def _diffusion_names(names: Iterable[str]) -> dict[str, str]:
    """Key to name of the diffusion model's tensors; without a prefix of its own it is all that nothing else is."""
    names = list(names)
    inside = strip_prefix(names)
    if any(key != name for key, name in inside.items()):
        return inside
    rest = [name for name in names if not name.startswith(OTHER_PREFIXES)]
    prefix = next((prefix for prefix in RARE_PREFIXES if all(name.startswith(prefix) for name in rest)), "")
    return {name.removeprefix(prefix): name for name in rest} if len(rest) >= MIN_PREFIXED else {}


def _context_width(shapes: Shapes) -> int:
    """Width of the text that a UNet takes, 0 for other models."""
    found = (shape for key, shape in shapes.items() if key.endswith(f".{_TO_K}") and len(shape) == 2)
    return next((shape[1] for shape in found), 0)


def _t5_keys(names: Iterable[str]) -> dict[str, str]:
    """Key to name, with those of a T5 in llama.cpp's names, as it may be put beside a model, as ComfyUI has them."""
    heads: dict[str, list[str]] = defaultdict(list)
    keys: dict[str, str] = {}
    for name in names:
        head, found, _ = name.partition(".transformer.")
        is_encoder = bool(found) and head.startswith("text_encoders.")
        heads[head + found if is_encoder else ""].append(name)
    for head, members in heads.items():
        rests = {name.removeprefix(head): name for name in members}
        entry = text_encoders.detect(rests) if head else None
        mapped = entry.key_map(rests)[0] if entry is not None and entry.title.startswith("T5") else {}
        keys |= {head + mapped.get(rest, rest): name for rest, name in rests.items()}
    return keys


def _encoder_pieces(key: str, name: str, prefixes: tuple[str, ...]) -> dict[str, Piece]:
    """What a tensor is in ComfyUI's names: itself for most, three of a CLIP for one with queries, keys and values."""
    clip = _CLIP.fullmatch(key)
    if clip is None or clip["rest"].startswith("model.visual."):
        return {key: Piece(name)}
    head, rest = clip["head"], clip["rest"]
    is_bare = not head.startswith("text_encoders.")
    if is_bare:
        number = 1 if clip["second"] or clip["index"] == "1" else 0
        if number >= len(prefixes):
            return {key: Piece(name)}
        head = prefixes[number]
    fused = _FUSED.fullmatch(rest)
    if fused:
        layer = f"{head}{_TEXT}encoder.layers.{fused[1]}.self_attn."
        return {f"{layer}{part}.{fused[2]}": Piece(name, third=i) for i, part in enumerate(_PARTS)}
    if rest in _PROJECTIONS:
        return {head + _PROJECTION_KEY: Piece(name, transposed=is_bare)}
    for pattern, replacement in _OPEN_CLIP:
        rest = pattern.sub(replacement, rest) if pattern.match(rest) else rest
    return {head + rest: Piece(name)}


def _read_piece(file: GGUFFile, key: str, piece: Piece) -> Value:
    last = key.rpartition(".")[2]
    value = read_tensor(file, last if last in BYTE_KEYS else key, file.tensors[piece.name])
    if piece.third is not None:
        value = _third(file, piece, value)
    if piece.transposed and len(value.shape) == 2:
        value = _dense(value).t().contiguous()
    return value


def _third(file: GGUFFile, piece: Piece, value: Value) -> Value:
    """One third of the rows; those of quantized weights stay bytes."""
    n_rows, i = value.shape[0] if value.shape else 0, piece.third or 0
    if n_rows % 3:
        raise UnsupportedArch(
            f"tensor '{plain_text(piece.name)}' has {n_rows} rows, expected as many queries as keys and values",
            path=file.path,
            subject=piece.name,
            hint="The file is damaged or was converted for another program; take another one.",
        )
    if isinstance(value, QuantizedBytes) and value.data.shape[0] % 3 == 0:
        n = value.data.shape[0] // 3
        return dataclasses.replace(value, data=value.data[i * n : (i + 1) * n], shape=(n_rows // 3, *value.shape[1:]))
    return _dense(value)[i * n_rows // 3 : (i + 1) * n_rows // 3]


def _dense(value: Value) -> torch.Tensor:
    return value.dequantize() if isinstance(value, QuantizedBytes) else value
