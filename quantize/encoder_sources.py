# SPDX-License-Identifier: Apache-2.0
"""Text encoders as sources: found in a file by the loader's own table, under ComfyUI's names, with their tokenizer.

Owns what is taken and what is left out; files are opened by shards and containers. Which families ComfyUI has no
tokenizer for is asked of models/encoder_archs.py, how it calls theirs of models/tokenizers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import BadFile, UnsupportedArch, name_list
from ..models import archs, text_encoders
from ..models.tokenizers import BYTE_KEYS, KINDS
from . import other_kinds
from .containers import StoredTensor, Tensor, Tensors

# Kind of tokenizer -> how its file is called beside the shards of a published model.
TOKENIZER_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "spiece": ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        "tekken": ("tekken.json",),
        "json": ("tokenizer.json",),
    }
)
MAX_TOKENIZER_BYTES = 2**27


def take_encoder(path: Path, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]] | None:
    """The tensors of a text encoder as ComfyUI calls them, and what was left out; None for any other file.

    Raises:
        UnsupportedArch: it holds several encoders, a LoRA on one, or one without the tokenizer that it needs.
        BadFile: its tokenizer cannot be read.
    """
    found = text_encoders.find_native(tensors)
    inside = [{name for name in tensors if name.startswith(match.wrapper)} for match in found]
    if not found or len(set().union(*inside)) < len(tensors):
        return None  # a whole checkpoint has more than its encoders
    if len(found) > 1:
        places = name_list([match.wrapper or "no prefix" for match in found])
        hint = "Pass a file with one of them."
        raise UnsupportedArch(f"it holds {len(found)} text encoders (behind {places})", path=path, hint=hint)
    kept = {key: tensors[name] for key, name in found[0].keys.items()}
    shapes = {key: tensor.shape for key, tensor in kept.items()}
    arch = archs.detect_encoder(shapes)
    around = {key: tensors[name].shape for key, name in archs.strip_prefix(tensors).items()}
    if arch is None or archs.detect(around):
        return None  # a diffusion model with a language model in it
    other_kinds.refuse(path, list(tensors), other_kinds.LORAS)
    wanted = archs.roles(arch, shapes)
    notes = _left_out([key for key in kept if key not in wanted])
    return _with_tokenizer(path, arch, {key: kept[key] for key in wanted}), notes


def _left_out(keys: list[str]) -> tuple[str, ...]:
    return (f"{len(keys)} tensors that ComfyUI's text encoder has no use for left out: {name_list(keys)}",) * bool(keys)


def _with_tokenizer(path: Path, arch: archs.Arch, tensors: Tensors) -> Tensors:
    """The tensors with the tokenizer that ComfyUI looks for among them, its bytes as int8: GGUF has no uint8."""
    key = KINDS[arch.tokenizer].key if arch.tokenizer else ""
    if key and key not in tensors:
        tensors = tensors | {key: _read_tokenizer(path, arch, key)}
    return {name: _signed(tensor) if name in BYTE_KEYS else tensor for name, tensor in tensors.items()}


def _signed(tensor: StoredTensor) -> StoredTensor:
    if tensor.dtype is not torch.uint8:
        return tensor
    return StoredTensor(torch.int8, tensor.shape, lambda: tensor.read().view(torch.int8))


def _read_tokenizer(path: Path, arch: archs.Arch, key: str) -> StoredTensor:
    """The tokenizer's file that lies beside the shards of a model."""
    names = TOKENIZER_FILES[arch.tokenizer]
    folder = path if path.is_dir() else path.parent if path.suffix == ".json" else None
    file = next((folder / name for name in names if folder and (folder / name).is_file()), None)
    if file is None:
        problem = f"this {arch.title} has no tokenizer (tensor '{key}'), and ComfyUI brings none"
        hint = f"Take the file that ComfyUI's examples link to, or pass a folder with the model and its {names[0]}."
        raise UnsupportedArch(problem, path=path, hint=hint)
    n_bytes = file.stat().st_size
    if not 0 < n_bytes <= MAX_TOKENIZER_BYTES:
        raise BadFile(f"a tokenizer of {n_bytes} bytes cannot be one", path=file, hint="Download it again.")
    return StoredTensor(torch.uint8, (n_bytes,), lambda: _read_bytes(file))


def _read_bytes(file: Path) -> Tensor:
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
