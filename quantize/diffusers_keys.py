# SPDX-License-Identifier: Apache-2.0
"""Flux.1 in diffusers layout under its native names: q, k and v joined, the halves of the last modulation swapped.

Knows names and shapes, no file. Native norm weights are called `scale`, as in the original files.
Source: ComfyUI comfy/utils.py flux_to_diffusers (0.3.75).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import BadFile, UnsupportedArch, name_list, plain_text
from .containers import StoredTensor, Tensor, Tensors

# Each maps the diffusers name of a layer to the native one; parts of one native layer are joined in the order here.
TOP_LAYERS: Mapping[str, str] = MappingProxyType({
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
})  # fmt: skip
DOUBLE_LAYERS: Mapping[str, str] = MappingProxyType({
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
})  # fmt: skip
SINGLE_LAYERS: Mapping[str, str] = MappingProxyType({
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
})  # fmt: skip
STACKS: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType({
    "transformer_blocks": ("double_blocks", DOUBLE_LAYERS),
    "single_transformer_blocks": ("single_blocks", SINGLE_LAYERS),
})  # fmt: skip
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers has scale before shift
MARKERS = ("x_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight", "norm_out.linear.weight")

_BLOCK_NAME = re.compile(r"(\w+)\.(\d+)\.(.+)")


def is_flux(names: Iterable[str]) -> bool:
    """Whether these are the keys of a Flux.1 in diffusers layout."""
    present = set(names)
    return all(marker in present for marker in MARKERS)


def to_native(path: Path, tensors: Tensors) -> Tensors:
    """The tensors under native names, joined where the native model has one matrix for several.

    Raises:
        UnsupportedArch: there are keys that Flux.1 does not have.
        BadFile: a part of a joined matrix is missing, or the parts do not fit.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    wanted: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in tensors.items():
        native, siblings = _native_name(name)
        if native:
            parts.setdefault(native, {})[name] = tensor
            wanted[native] = siblings
        else:
            unknown.append(name)
    if unknown:
        problem = f"it is a variant of Flux in diffusers layout with {len(unknown)} tensors that Flux.1 does not have"
        hint = "Take the file in the original layout, as ComfyUI loads it."
        raise UnsupportedArch(f"{problem}: {name_list(unknown)}", path=path, subject=unknown[0], hint=hint)
    return {native: _join(path, native, wanted[native], found) for native, found in parts.items()}


def _native_name(name: str) -> tuple[str, list[str]]:
    """The native name of a tensor and all the tensors that it is joined from, in order; "" for an unknown one."""
    layer, _, end = name.rpartition(".")
    block = _BLOCK_NAME.fullmatch(layer)
    before, native_before, table = "", "", TOP_LAYERS
    if block and block[1] in STACKS:
        stack, table = STACKS[block[1]]
        before, native_before, layer = f"{block[1]}.{block[2]}.", f"{stack}.{block[2]}.", block[3]
    native = table.get(layer)
    if native is None or end not in ("weight", "bias"):
        return "", []
    siblings = [f"{before}{other}.{end}" for other, target in table.items() if target == native]
    if native.endswith("_norm") and end == "weight":
        end = "scale"
    return f"{native_before}{native}.{end}", siblings


def _join(path: Path, native: str, wanted: list[str], found: dict[str, StoredTensor]) -> StoredTensor:
    missing = [name for name in wanted if name not in found]
    if missing:
        problem = f"parts of '{plain_text(native)}' are missing: {name_list(missing)}"
        raise BadFile(problem, path=path, subject=missing[0], hint="Download the model again.")
    parts = [found[name] for name in wanted]
    shapes = [part.shape for part in parts]
    swap = native.rpartition(".")[0] == SWAPPED
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1 or (swap and shapes[0][0] % 2):
        problem = f"the parts of '{plain_text(native)}' have shapes {shapes}, which do not fit together"
        raise BadFile(problem, path=path, subject=wanted[0], hint="Download the model again.")
    if swap:
        return StoredTensor(parts[0].dtype, parts[0].shape, _swapped(parts[0]))
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return StoredTensor(dtype, (sum(shape[0] for shape in shapes), *shapes[0][1:]), _joined(parts))


def _joined(parts: list[StoredTensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([part.read() for part in parts])


def _swapped(part: StoredTensor) -> Callable[[], Tensor]:
    def read() -> Tensor:
        scale, shift = part.read().chunk(2)
        return torch.cat((shift, scale))

    return read
