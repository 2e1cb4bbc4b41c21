# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp's converter changed in the weights of a text encoder, changed back.

Rows of quantized weights are moved as bytes. text_encoder_table.py says what is to be done to which tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import BadFile, UnsupportedArch, name_list, plain_text
from ..gguf_file import GGUFFile
from ..layouts import LAYOUTS
from . import tokenizers
from .text_encoder_entry import TextEncoder, split_name
from .values import QuantizedBytes, StateDict, Value, floats

MAX_HEADS = 1 << 16


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
            value = floats(value) - encoder.norm_offset
        elif rule in encoder.value_heads:
            value = _order_value_heads(file, name, value, encoder.value_heads[rule])
        if rule == encoder.decay:
            value = torch.log(-floats(value))
        elif rule == encoder.conv:
            value = floats(value).unsqueeze(1)
        state[key] = value
    for joined, parts in encoder.alternate.items():
        _join_alternating(file, joined, parts, state)


def _n_heads(file: GGUFFile, count: str, bid: str) -> int:
    """Number of attention heads of a block; one number for all, or one for each."""
    arch = file.arch
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


def _move_rows(file: GGUFFile, name: str, value: Value, n_heads: int) -> Any:
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


def _order_value_heads(file: GGUFFile, name: str, value: Value, where: str) -> Any:
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


def _value_heads(file: GGUFFile, name: str, value: Value, where: str) -> tuple[int, int, int]:
    """(heads of keys, heads of values for each, rows or columns of all heads of values) of linear attention."""
    keys = [f"{file.arch}.ssm.{part}" for part in ("group_count", "time_step_rank", "inner_size")]
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


def _alternate(file: GGUFFile, keys: tuple[str, str], first: Any, second: Any) -> Value:
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


def add_tokenizer(file: GGUFFile, title: str, kind: str, state: StateDict) -> None:
    """Put the tokenizer's file under the key where ComfyUI looks for it, unless the file brings it as a tensor.

    Args:
        title: what the encoder is, for the message.
        kind: a key of tokenizers.KINDS, or "" for encoders whose tokenizer ComfyUI has.
    Raises:
        UnsupportedArch: the file has none, or one that ComfyUI's class cannot use.
    """
    key = tokenizers.KINDS[kind].key if kind else ""
    if not key or key in state:
        return
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise UnsupportedArch(
            f"this {title} has no tokenizer (metadata key 'tokenizer.ggml.tokens'), and ComfyUI brings none",
            path=file.path,
            hint="Take a file that llama.cpp has converted.",
        )
    state[key] = tokenizers.build(file, kind)
