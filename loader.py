# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a state dict: keys as ComfyUI expects them, quantized weights as bytes, everything else as tensors.

Knows files and names, no host. Opening touches only the header: the values are views of the mapped file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from .dequant import PLAIN_DTYPES, SUPPORTED_QTYPES, dequantize_rows
from .errors import BadFile, UnsupportedArch, UnsupportedQtype, name_list, plain_text
from .gguf_file import GGUFFile, TensorInfo
from .layouts import LAYOUTS
from .models import archs, text_encoders, tokenizers
from .models.text_encoder_entry import TextEncoder, split_name
from .models.text_encoder_table import TEXT_ENCODERS

log = logging.getLogger("gguf_kit")

MAX_HEADS = 1 << 16


@dataclasses.dataclass(frozen=True)
class QuantizedBytes:
    """A weight as it lies in the file.

    Attributes:
        data: uint8 (n_rows, row_bytes), a view of the mapped file.
        qtype: encoding of the bytes.
        shape: logical shape in torch order; its size is that of the rows, its last dim may differ from a row.
    """

    data: torch.Tensor
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a float tensor of its logical shape."""
        return dequantize_rows(self.data, self.qtype, dtype).reshape(self.shape)


StateDict = dict[str, QuantizedBytes | torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LoadInfo:
    """What a loaded file is.

    Attributes:
        path: the file.
        arch: its `general.architecture`, "" if it has none.
        title: what its tensors say it is, "unrecognised model" if nothing known.
        n_weights: number of weights, n_bytes: their bytes in the file.
        qtypes: number of tensors of each qtype.
        metadata: what was carried along from the model's safetensors file.
    """

    path: str
    arch: str
    title: str
    n_weights: int
    n_bytes: int
    qtypes: Mapping[str, int]
    metadata: Mapping[str, str]

    def summary(self) -> str:
        """One line for the log: file, model, tensors, types, bits per weight."""
        types = ", ".join(f"{name} {n}" for name, n in self.qtypes.items())
        return (
            f"{os.path.basename(self.path)}: {self.title} (tagged {self.arch or 'nothing'}), "
            f"{sum(self.qtypes.values())} tensors ({types}), {self.n_weights / 1e9:.3g} G weights, "
            f"{8 * self.n_bytes / max(self.n_weights, 1):.2f} bits per weight"
        )


def load_diffusion_model(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a diffusion model.

    Returns:
        the state dict, key prefixes of whole checkpoints stripped, and what the file is.

    Raises:
        GGUFError: the file is damaged, holds something else, or has a layout that cannot be loaded.
    """
    file = GGUFFile(path)
    if text_encoders.detect(file.tensors) or "token_embd.weight" in file.tensors:
        raise UnsupportedArch(
            f"it holds a text encoder or language model (general.architecture '{_arch_tag(file)}'), no diffusion model",
            path=path,
            hint='Load it with "CLIPLoader (GGUF)".',
        )
    names = archs.strip_prefix(file.tensors)
    shapes = {key: file.logical_shape(name) for key, name in names.items()}
    arch = archs.detect(shapes)
    if arch is not None and arch.reject:
        raise UnsupportedArch(
            f"it is {arch.title}, which cannot be loaded from GGUF", path=path, hint=f"{arch.reject}."
        )
    return _read(file, names, arch.title if arch else "unrecognised model")


def load_text_encoder(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a text encoder, tensors renamed to ComfyUI's keys and its weights as ComfyUI's class has them.

    Returns:
        the state dict, with the tokenizer's file as uint8 (n_bytes,) where ComfyUI looks for it there, and what it is.

    Raises:
        GGUFError: the file is damaged, or holds no text encoder that is known here.
    """
    file = GGUFFile(path)
    encoder = text_encoders.detect(file.tensors, _tags(file))
    if encoder is None:
        return _read(file, _native_names(file), "text encoder with native names")
    for prefix, reason in encoder.refuse.items():
        if any(name.startswith(prefix) for name in file.tensors):
            raise UnsupportedArch(f"this {encoder.title} cannot be used: {reason}", path=path)
    mapped, unknown = encoder.key_map(file.tensors)
    if unknown:
        raise UnsupportedArch(
            f"{len(unknown)} tensor names match no {encoder.title} rule: {name_list(unknown)}",
            path=path,
            hint="Take the encoder from another source, or its safetensors file.",
        )
    names = {key: name for name, key in mapped.items()}
    state = _values(file, names)
    restore(file, encoder, names, state)
    return state, _describe(file, names, encoder.title)


def _tags(file: GGUFFile) -> tuple[str, ...]:
    """What the file says of itself, as far as it decides between encoders that look alike."""
    values = (file.metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
    return tuple(value for value in values if isinstance(value, str))


def _native_names(file: GGUFFile) -> dict[str, str]:
    """Key to tensor name of a file whose names are the original ones, or the refusal of what is no text encoder."""
    found = text_encoders.find_native(file.tensors)
    if len(found) > 1:
        places = name_list([match.wrapper or "no prefix" for match in found])
        raise UnsupportedArch(
            f"it holds {len(found)} text encoders (behind {places})",
            path=file.path,
            hint="Take a file with one encoder for each input of the loader.",
        )
    if not found or (not found[0].wrapper and _diffusion_arch(file) is not None):
        raise _no_text_encoder(file)
    return dict(found[0].keys)


def _arch_tag(file: GGUFFile) -> str:
    tag = file.metadata.get("general.architecture", "")
    return plain_text(tag) if isinstance(tag, str) else ""


def _diffusion_arch(file: GGUFFile) -> archs.Arch | None:
    names = archs.strip_prefix(file.tensors)
    return archs.detect({key: file.logical_shape(name) for key, name in names.items()})


def _no_text_encoder(file: GGUFFile) -> UnsupportedArch:
    arch = _diffusion_arch(file)
    if arch is not None:
        return UnsupportedArch(
            f"it is a diffusion model ({arch.title}), not a text encoder",
            path=file.path,
            hint='Load it with "Unet Loader (GGUF)".',
        )
    if text_encoders.is_mmproj(file.tensors):
        return UnsupportedArch(
            "it is the vision part (mmproj) of a model, without the text encoder itself",
            path=file.path,
            hint="Choose the model's main file.",
        )
    known = ", ".join(encoder.title for encoder in TEXT_ENCODERS)
    return UnsupportedArch(
        f"it is no text encoder that can be loaded from GGUF here (general.architecture '{_arch_tag(file)}')",
        path=file.path,
        hint=f"Take the safetensors file of this encoder; with llama.cpp's names this version loads: {known}.",
    )


def _read(file: GGUFFile, names: Mapping[str, str], title: str) -> tuple[StateDict, LoadInfo]:
    """Values for a map of key to tensor name, and the record and log line of this load."""
    return _values(file, names), _describe(file, names, title)


def _values(file: GGUFFile, names: Mapping[str, str]) -> StateDict:
    return {key: _read_tensor(file, key, file.tensors[name]) for key, name in names.items()}


def _describe(file: GGUFFile, names: Mapping[str, str], title: str) -> LoadInfo:
    infos = [file.tensors[name] for name in names.values()]
    info = LoadInfo(
        path=str(file.path),
        arch=_arch_tag(file),
        title=title,
        n_weights=sum(math.prod(t.shape) for t in infos),
        n_bytes=sum(t.n_bytes for t in infos),
        qtypes=dict(Counter(t.qtype.name for t in infos).most_common()),
        metadata=file.carried_metadata(),
    )
    log.info(info.summary())
    return info


def _read_tensor(file: GGUFFile, key: str, tensor: TensorInfo) -> QuantizedBytes | torch.Tensor:
    """One value: layer weights keep their bytes; vectors and bare parameters, which models use as floats, do not."""
    shape, data = file.logical_shape(tensor.name), file.data(tensor.name)
    if tensor.qtype in PLAIN_DTYPES:
        return _plain_tensor(data, PLAIN_DTYPES[tensor.qtype]).reshape(shape)
    if tensor.qtype not in SUPPORTED_QTYPES:
        raise UnsupportedQtype(
            f"tensor '{plain_text(tensor.name)}' has qtype {tensor.qtype.name}, which has no dequantizer here",
            path=file.path,
            subject=tensor.name,
            hint=f"Use a file with one of: {', '.join(sorted(q.name for q in SUPPORTED_QTYPES))}.",
        )
    n_rows = math.prod(tensor.shape[:-1])
    weight = QuantizedBytes(data.reshape(n_rows, -1) if data.numel() else data.reshape(n_rows, 0), tensor.qtype, shape)
    return weight if len(shape) > 1 and key.endswith(".weight") else weight.dequantize()


def _plain_tensor(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as 1-D `dtype`, without a copy when they are aligned for it."""
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


# -- Text encoders: what llama.cpp's converter changed in the weights, changed back. --


def restore(file: GGUFFile, encoder: TextEncoder, names: Mapping[str, str], state: StateDict) -> None:
    """Give the weights of a text encoder the order and values that ComfyUI's class expects, in place.

    Rows of quantized weights are moved as bytes. Source: llama.cpp conversion/llama.py LlamaModel.permute,
    conversion/gemma.py Gemma3Model.norm_shift, conversion/gpt_oss.py GptOssModel.modify_tensors, conversion/qwen.py
    Qwen3NextModel.modify_tensors and _LinearAttentionVReorderBase.modify_tensors.
    """
    for key, name in names.items():
        rule, bid = split_name(name)
        value = state[key]
        if rule in encoder.head_counts:
            value = _move_rows(file, name, value, _n_heads(file, encoder.head_counts[rule], bid))
        elif encoder.norm_offset and rule.endswith("norm.weight") and rule not in encoder.unshifted:
            value = _floats(value) - encoder.norm_offset
        elif rule in encoder.value_heads:
            value = _order_value_heads(file, name, value, encoder.value_heads[rule])
        if rule == encoder.decay:
            value = torch.log(-_floats(value))
        elif rule == encoder.conv:
            value = _floats(value).unsqueeze(1)
        state[key] = value
    for joined, parts in encoder.alternate.items():
        _join_alternating(file, joined, parts, state)
    _add_tokenizer(file, encoder, state)


def _floats(value: QuantizedBytes | torch.Tensor) -> torch.Tensor:
    return value.dequantize() if isinstance(value, QuantizedBytes) else value.float()


def _n_heads(file: GGUFFile, count: str, bid: str) -> int:
    """Number of attention heads of a block; one number for all, or one for each."""
    arch = _arch_tag(file)
    # llama.cpp: without a count of its own, k has as many heads as q.
    keys = [f"{arch}.attention.{count}", f"{arch}.attention.head_count"]
    key = next((key for key in keys if key in file.metadata), keys[0])
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and int(bid) < len(value):
        value = int(value[int(bid)])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_HEADS:
        found = f"is {plain_text(str(value))}" if key in file.metadata else "is missing"
        raise BadFile(
            f"metadata key '{plain_text(key)}' {found}, expected the number of attention heads",
            path=file.path,
            hint="Rows of the attention cannot be put in order without it; take a file that llama.cpp has converted.",
        )
    return value


def _move_rows(file: GGUFFile, name: str, value: QuantizedBytes | torch.Tensor, n_heads: int) -> Any:
    """A weight or bias whose rows, counted as (n_heads, n, 2), are put in the order (n_heads, 2, n)."""
    data, n_rows = value.data if isinstance(value, QuantizedBytes) else value, value.shape[0] if value.shape else 0
    if not n_rows or n_rows % (n_heads * 2) or data.shape[0] % n_rows:
        raise BadFile(
            f"tensor '{plain_text(name)}' has {n_rows} rows, expected an even number for each of {n_heads} heads",
            path=file.path,
            subject=name,
            hint="The metadata is of another model; take the file from another source.",
        )
    rows = data.reshape(n_heads, n_rows // n_heads // 2, 2, data.numel() // n_rows)
    moved = rows.transpose(1, 2).reshape(data.shape)
    return dataclasses.replace(value, data=moved) if isinstance(value, QuantizedBytes) else moved


def _order_value_heads(file: GGUFFile, name: str, value: QuantizedBytes | torch.Tensor, where: str) -> Any:
    """Heads of values in the order of the heads of keys that they belong to: (n, n_keys, k) to (n_keys, n, k)."""
    n_keys, n, n_moved = _value_heads(file, name, value, where)
    if n == 1:
        return value
    if where == "columns" and isinstance(value, QuantizedBytes):
        # Blocks that span two heads cannot be parted; such a weight becomes floats, rounded once.
        if n_moved // (n * n_keys) % LAYOUTS[value.qtype].block_size:
            value = value.dequantize(torch.float16)
    data = value.data if isinstance(value, QuantizedBytes) else value
    if where == "columns":
        heads = data.reshape(data.shape[0], n, n_keys, data.shape[1] // (n * n_keys)).transpose(1, 2)
        moved = heads.reshape(data.shape)
    else:
        kept, tail = data[: data.shape[0] - n_moved], data[data.shape[0] - n_moved :]
        heads = tail.reshape(n, n_keys, n_moved // (n * n_keys), *data.shape[1:]).transpose(0, 1)
        moved = torch.cat([kept, heads.reshape(tail.shape)])
    return dataclasses.replace(value, data=moved) if isinstance(value, QuantizedBytes) else moved


def _value_heads(file: GGUFFile, name: str, value: QuantizedBytes | torch.Tensor, where: str) -> tuple[int, int, int]:
    """(heads of keys, heads of values for each, rows or columns of all heads of values) of linear attention."""
    keys = [f"{_arch_tag(file)}.ssm.{part}" for part in ("group_count", "time_step_rank", "inner_size")]
    found = [file.metadata.get(key) for key in keys]
    n_keys, n_values, width = (n if isinstance(n, int) and n > 0 else 0 for n in found)
    data, is_matrix = value.data if isinstance(value, QuantizedBytes) else value, len(value.shape) == 2
    size = value.shape[-1 if where == "columns" else 0] if is_matrix or len(value.shape) == 1 else 0
    n_moved = width if where == "last rows" else size
    sound = n_keys and n_values and n_values % n_keys == 0 and n_moved % n_values == 0 and 0 < n_moved <= size
    if not sound or data.shape[0] != value.shape[0] or (where == "columns" and not is_matrix):
        raise BadFile(
            f"tensor '{plain_text(name)}' of shape {tuple(value.shape)} cannot hold the heads of {', '.join(keys)}, "
            f"which are {plain_text(', '.join(map(str, found)))}",
            path=file.path,
            subject=name,
            hint="The metadata is of another model; take the file from another source.",
        )
    return n_keys, n_values // n_keys, n_moved


def _join_alternating(file: GGUFFile, joined: str, parts: tuple[str, str], state: StateDict) -> None:
    """Put two weights (..., n, k) of each block together as (..., 2n, k), their rows in turn."""
    head, tail = parts[0].split("{bid}")
    for key in [key for key in state if key.startswith(head) and key.endswith(tail)]:
        bid = key[len(head) : len(key) - len(tail)]
        partner = parts[1].replace("{bid}", bid)
        state[joined.replace("{bid}", bid)] = _alternate(file, (key, partner), state.pop(key), state.pop(partner, None))


def _alternate(file: GGUFFile, keys: tuple[str, str], first: Any, second: Any) -> QuantizedBytes | torch.Tensor:
    if type(first) is type(second) and first.shape == second.shape and len(first.shape) > 1:
        if isinstance(first, torch.Tensor):
            return torch.stack((first, second), dim=2).flatten(1, 2)  # weights (experts, n, k), biases (experts, n)
        if first.qtype == second.qtype and first.data.shape == second.data.shape and len(first.shape) > 2:
            rows = torch.stack((first.data, second.data), dim=1).flatten(0, 1)
            return QuantizedBytes(rows, first.qtype, (first.shape[0], 2 * first.shape[1], *first.shape[2:]))
    raise UnsupportedArch(
        f"the tensors of {name_list(list(keys))} differ in type or shape, and ComfyUI needs them in one",
        path=file.path,
        hint="Take a file in which all experts have the same type, such as MXFP4 or Q8_0.",
    )


def _add_tokenizer(file: GGUFFile, encoder: TextEncoder, state: StateDict) -> None:
    """Put the tokenizer's file under the key where ComfyUI looks for it, unless the file brings it as a tensor."""
    key = tokenizers.KINDS[encoder.tokenizer].key if encoder.tokenizer else ""
    if not key or key in state:
        return
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise UnsupportedArch(
            f"this {encoder.title} has no tokenizer (metadata key 'tokenizer.ggml.tokens'), and ComfyUI brings none",
            path=file.path,
            hint="Take a file that llama.cpp has converted.",
        )
    state[key] = tokenizers.build(file, encoder.tokenizer)
