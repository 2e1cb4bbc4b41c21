# SPDX-License-Identifier: Apache-2.0
"""The vision part of a text encoder, which llama.cpp puts into a file of its own ("mmproj"), as ComfyUI's keys.

Split weights are put together as bytes where their types are the same. vision_table.py has the names,
vision_search.py finds the file. Source: llama.cpp conversion/qwenvl.py Qwen2VLVisionModel.modify_tensors,
conversion/qwen3vl.py Qwen3VLVisionModel.modify_tensors, conversion/gemma.py modify_tensors of
Gemma3VisionModel, Gemma4VisionAudioModel and Gemma4UnifiedVisionAudioModel.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import re
from collections.abc import Collection, Mapping

import torch

from ..errors import BadFile, UnsupportedArch, name_list, plain_text
from ..gguf_file import GGUFFile
from . import text_encoder_entry
from .text_encoder_entry import TextEncoder
from .text_encoders import MMPROJ_PREFIXES, is_mmproj
from .values import QuantizedBytes, StateDict, Value, floats, read_tensor
from .vision_table import SPELLINGS, VISION_PARTS, VisionPart

log = logging.getLogger("gguf_kit")

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.\w+\.)")
_TAKE_ANOTHER = "Take the vision part (mmproj) that was published with this text encoder."

_LIMITS = ("_min", "_max")
N_COLOURS = 3

# Key of ComfyUI to the tensors that make it up.
Names = Mapping[str, tuple[str, ...]]


def is_vision_part(file: GGUFFile) -> bool:
    """Whether a file is a vision (or audio) part of a model, by what it says of itself or by its tensors."""
    if not file.tensors:
        return False
    kind, has_encoder = (file.metadata.get(key) for key in ("general.type", "clip.has_vision_encoder"))
    return (isinstance(kind, str) and kind == "mmproj") or has_encoder is True or is_mmproj(file.tensors)


def inside(file: GGUFFile) -> GGUFFile | None:
    """The vision part that a text encoder's own file holds, as a file that has its tensors only; None without one."""
    names = [name for name in file.tensors if name.startswith(MMPROJ_PREFIXES)]
    if not names:
        return None
    part = copy.copy(file)
    part.tensors = {name: file.tensors[name] for name in names}
    return part


def text_width(encoder_file: GGUFFile) -> int:
    """Width of the text encoder in a file with llama.cpp's names, 0 if it has no token embeddings."""
    table = encoder_file.tensors.get("token_embd.weight")
    return table.shape[-1] if table is not None and len(table.shape) == 2 else 0


def read(file: GGUFFile, encoder_file: GGUFFile, encoder: TextEncoder) -> StateDict:
    """Read the vision part that belongs to a text encoder.

    Args:
        file: the mmproj file.
        encoder_file: the text encoder, in llama.cpp's names; encoder: its entry.

    Returns:
        the keys that ComfyUI's class has for it, to be put beside those of the text encoder.

    Raises:
        GGUFError: the file is no vision part, or that of another model.
    """
    part, names = check(file, encoder_file, encoder)
    state = {key: _value(file, part, key, of) for key, of in names.items()}
    n_weights = sum(math.prod(file.tensors[name].shape) for of in names.values() for name in of)
    log.info(
        "%s: vision part of %s (%s), %.3g G weights, for %s",
        *(_base(file), part.title, main_qtype(file), n_weights / 1e9, _base(encoder_file)),
    )
    prefix = part.prefix_of.get(text_width(encoder_file), part.prefix)
    return {prefix + key: value for key, value in state.items()}


def check(file: GGUFFile, encoder_file: GGUFFile, encoder: TextEncoder) -> tuple[VisionPart, Names]:
    """Make sure that a file is the vision part of a text encoder, without touching its data.

    Returns:
        its entry, and key without prefix -> names of the tensors that make it up.

    Raises:
        GGUFError: with one sentence that names both files.
    """
    parts = VISION_PARTS.get(encoder.vision, ())
    if not parts:
        raise UnsupportedArch(
            f"the text encoder {_base(encoder_file)} is {encoder.title}, which takes no vision part here",
            path=file.path,
            hint="Leave the vision part out.",
        )
    part = _found(file)
    if part not in parts:
        known = f"the vision part of {part.title}" if part else "a vision part that is not known here"
        what = known if is_vision_part(file) else f"no vision part (general.architecture '{plain_text(file.arch)}')"
        raise UnsupportedArch(
            f"it is {what}, but the text encoder {_base(encoder_file)} needs that of {parts[0].title}",
            path=file.path,
            hint=_TAKE_ANOTHER,
        )
    name, dim = part.width
    shape, width = file.tensors[name].shape, text_width(encoder_file)
    if width in part.blind:
        raise UnsupportedArch(
            f"ComfyUI's {part.title} that is {width} wide, as {_base(encoder_file)} is, takes no vision part",
            path=file.path,
            hint="Leave the vision part out.",
        )
    if len(shape) != 2 or shape[dim] != width:
        raise UnsupportedArch(
            f"its output '{name}' has shape {shape}, but the text encoder {_base(encoder_file)} is {width} wide",
            path=file.path,
            hint=f"It belongs to another size of {part.title}. {_TAKE_ANOTHER}",
        )
    return part, _key_map(file, part)


def placeholder(encoder_file: GGUFFile, encoder: TextEncoder) -> StateDict:
    """What stands in for a missing vision part so that ComfyUI takes the text encoder for what it is.

    Returns:
        float16 zeros that take no memory, under the few keys that ComfyUI looks at; empty where it needs none.
    """
    width, zero = text_width(encoder_file), torch.zeros((), dtype=torch.float16)
    return {
        part.prefix_of.get(width, part.prefix) + key: zero.expand(shape)
        for part in VISION_PARTS.get(encoder.vision, ())
        for key, shape in part.markers.get(width, {}).items()
    }


def main_qtype(file: GGUFFile) -> str:
    """The type that most weights of a file have."""
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.qtype.name] = counts.get(tensor.qtype.name, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda name: (counts[name], name), default="")


def split_name(name: str) -> tuple[str, str]:
    """As for a text encoder, with the numbers of vision parts, and with misspelt beginnings put right."""
    wrong = next((spelling for spelling in SPELLINGS if name.startswith(spelling)), "")
    name = SPELLINGS[wrong] + name[len(wrong) :] if wrong else name
    return text_encoder_entry.split_name(name, _NUMBER)


def _base(file: GGUFFile) -> str:
    return os.path.basename(file.path)


def _found(file: GGUFFile) -> VisionPart | None:
    """The family that a file's tensors are of."""
    rules = {split_name(name)[0] for name in file.tensors}
    known = (part for parts in VISION_PARTS.values() for part in parts)
    return next((p for p in known if rules.issuperset(p.has) and rules.isdisjoint(p.absent)), None)


def _key_map(file: GGUFFile, part: VisionPart) -> Names:
    """Key without prefix -> tensor names, every tensor used or known to be of no use."""
    whole_of = {name: key for parts in (part.joined, part.frames) for key, of in parts.items() for name in of}
    ranks = {head: _ranks(file.tensors, head) for head in part.ranked}
    swaps = _SWAPS if _is_swapped(file) else {}
    names: dict[str, tuple[str, ...]] = {}
    slices: dict[str, dict[str, str]] = {}
    unknown = []
    for name in file.tensors:
        rule, bid = split_name(name)
        rule = swaps.get(rule, rule)
        bid = next((ranks[head][int(bid)] for head in ranks if rule.startswith(head)), bid)
        if rule in part.keys:
            names[part.keys[rule].replace("{bid}", bid)] = (name,)
        elif rule in whole_of:
            slices.setdefault(whole_of[rule].replace("{bid}", bid), {})[rule] = name
        elif not rule.startswith(part.leave_out or ("\0",)):
            unknown.append(name)
    for key, of in slices.items():
        rules = {**part.joined, **part.frames}[whole_of[next(iter(of))]]
        names[key] = tuple(of[rule] for rule in rules if rule in of)
        unknown += names[key] if len(of) < len(rules) else ()
    if unknown:
        raise UnsupportedArch(
            f"{len(unknown)} tensor names match no rule for the vision part of {part.title}, or stand without those "
            f"that they belong to: {name_list(unknown)}",
            path=file.path,
            hint=_TAKE_ANOTHER,
        )
    return names


def _ranks(names: Collection[str], head: str) -> dict[int, str]:
    """Block number -> its place among the numbers of the names that begin with `head`."""
    numbers = {int(bid) for rule, bid in map(split_name, names) if rule.startswith(head)}
    return {number: str(rank) for rank, number in enumerate(sorted(numbers))}


_MLP = ("v.blk.{bid}.ffn_up", "v.blk.{bid}.ffn_down")
_SWAPS = {f"{one}.{end}": f"{other}.{end}" for one, other in (_MLP, _MLP[::-1]) for end in ("weight", "bias")}


def _is_swapped(file: GGUFFile) -> bool:
    """Whether first and last layer of the MLPs have each other's names, as in older files.

    Source: llama.cpp tools/mtmd/clip.cpp clip_model_loader::load_tensors, is_ffn_swapped.
    """
    last, norm = (file.tensors.get(f"v.blk.0.{name}.weight") for name in ("ffn_down", "ln1"))
    if last is None or norm is None or len(last.shape) != 2:
        return False
    return norm.shape == last.shape[1:] != last.shape[:1]


def _value(file: GGUFFile, part: VisionPart, key: str, of: tuple[str, ...]) -> Value:
    """One value of the state dict from the tensors that make it up."""
    values = [read_tensor(file, key, file.tensors[name]) for name in of]
    if len(values) > 1:
        return _join(file, of, values, by_frame=key in part.frames)
    value, name = values[0], of[0]
    if name in part.shifted:
        return floats(value) - 1.0
    if key in part.floats:
        value = floats(value)
    elif isinstance(value, QuantizedBytes):
        return value
    if name in part.by_colour:
        return _by_pixel(file, name, value)
    if name in part.turned and value.dim() > 1:
        return value.transpose(0, 1)
    return value.reshape(()) if key.endswith(_LIMITS) and value.numel() == 1 else value


def _by_pixel(file: GGUFFile, name: str, value: torch.Tensor) -> torch.Tensor:
    """Weights over the values of a patch, (..., n_colours * n_pixels) or (..., n_colours, h, w), pixel by pixel."""
    n_values = math.prod(value.shape[1:]) if value.dim() > 1 else value.numel()
    if not n_values or n_values % N_COLOURS:
        raise BadFile(
            f"tensor '{plain_text(name)}' has shape {tuple(value.shape)}, expected {N_COLOURS} values for each pixel",
            path=file.path,
            subject=name,
            hint="The file is damaged; take it from another source.",
        )
    colours = value.reshape(-1, N_COLOURS, n_values // N_COLOURS)
    pixels = colours.transpose(1, 2).reshape(-1, n_values)
    return pixels if value.dim() > 1 else pixels[0]


def _join(file: GGUFFile, names: tuple[str, ...], values: list[Value], by_frame: bool) -> Value:
    """Weights put together: rows one after the other, or kernels (n_out, n_in, h, w) along a new dim of time."""
    first = values[0]
    n_dims = {len(value.shape) for value in values}
    if any(value.shape[1:] != first.shape[1:] for value in values) or n_dims != ({4} if by_frame else n_dims - {0}):
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise BadFile(
            f"the tensors {name_list(list(names))} have shapes {shapes}, which do not fit together",
            path=file.path,
            subject=names[0],
            hint="The file is damaged; take it from another source.",
        )
    quantized = [value for value in values if isinstance(value, QuantizedBytes)]
    if len({(q.qtype, q.data.shape[1]) for q in quantized}) == 1 and len(quantized) == len(values) and not by_frame:
        rows = torch.cat([q.data for q in quantized])
        return QuantizedBytes(rows, quantized[0].qtype, (sum(q.shape[0] for q in quantized), *first.shape[1:]))
    tensors = [value.dequantize() if isinstance(value, QuantizedBytes) else value for value in values]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    tensors = [tensor.to(dtype) for tensor in tensors]
    return torch.stack(tensors, dim=2) if by_frame else torch.cat(tensors)
