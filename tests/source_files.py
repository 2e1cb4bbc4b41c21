# SPDX-License-Identifier: Apache-2.0
"""Makes the small files that a conversion can start from, for the tests of quantize.sources and its neighbours."""

from __future__ import annotations

import json
import re
import struct

import gguf
import pytest
import torch
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.sources import SourceTensor, open_source
from safetensors.torch import save_file

HIDDEN, HEAD = 8, 4  # of the Flux made here


def model(seed=0, dtype=torch.bfloat16):
    """A few weights of no known model, in the order of their names as save_file stores them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"blocks.{i}.{name}": shape for i in range(4) for name, shape in (("w", (4, 6)), ("b", (4,)))}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in sorted(shapes.items())}


def save(folder, tensors, name="model.safetensors", metadata=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def save_torch(folder, saved, name="model.ckpt", **options):
    path = folder / name
    torch.save(saved, path, **options)
    return path


def write_raw(folder, header, data=b"", name="model.safetensors", pad=True):
    """A safetensors file with a header of one's own, a dict or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8 if pad else 0)
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def check_same(source, tensors, dtype=None):
    assert list(source.tensors) == list(tensors)
    for name, wanted in tensors.items():
        got = source.read(name)
        assert source.tensors[name] == SourceTensor(name, dtype or wanted.dtype, tuple(wanted.shape))
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def fail(path, kind=GGUFError):
    """The message with which opening fails: one sentence that starts with the file's name, then what to do."""
    with pytest.raises(kind) as caught:
        open_source(path)
    message = str(caught.value)
    assert re.match(r"[\w.-]+: .*\. [A-Z].*\.$", message), message
    assert "\n" not in message
    return message


def save_shards(folder, tensors=None, n_shards=3, change=None):
    """Shards with an index; change(weight_map) may spoil it."""
    tensors = tensors or model()
    weight_map = {}
    for i in range(n_shards):
        name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::n_shards])
        save(folder, part, name, {"config": "{}", "format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if change:
        change(weight_map)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def save_gguf(folder, tensors=None, qtype=gguf.GGMLQuantizationType.BF16, strings=None):
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_name("name")
    writer.add_string("tokenizer.ggml.model", "t5")
    writer.add_uint32("comfy.number", 3)
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    for name, tensor in (tensors or model()).items():
        used = gguf.GGMLQuantizationType.F32 if tensor.ndim < 2 else qtype
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), used), raw_dtype=used)
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_value(dtype, shape=(16, 16)):
    return torch.arange(256, dtype=torch.uint8).view(dtype).reshape(shape)


def finite(dtype, shape=(16, 16)):
    return every_value(dtype, shape).float().nan_to_num(1, 2, -2).to(dtype)


def marker(config):
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def linear(name, rows, columns=HIDDEN):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def diffusers_flux(depth=2, n_single=3, in_channels=64, guidance=True, seed=0, dtype=torch.bfloat16):
    """Random weights of a tiny FluxTransformer2DModel under its own names."""
    shapes = linear("x_embedder", HIDDEN, in_channels) | linear("context_embedder", HIDDEN, 12)
    for part in ("timestep_embedder", "text_embedder", *(["guidance_embedder"] if guidance else [])):
        shapes |= linear(f"time_text_embed.{part}.linear_1", HIDDEN, 6) | linear(
            f"time_text_embed.{part}.linear_2", HIDDEN
        )
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            shapes |= linear(f"{block}attn.{name}", HIDDEN)
        shapes |= {f"{block}attn.norm_{name}.weight": (HEAD,) for name in ("q", "k", "added_q", "added_k")}
        for end in ("", "_context"):
            shapes |= linear(f"{block}norm1{end}.linear", 6 * HIDDEN) | linear(f"{block}ff{end}.net.0.proj", 4 * HIDDEN)
            shapes |= linear(f"{block}ff{end}.net.2", HIDDEN, 4 * HIDDEN)
    for i in range(n_single):
        block = f"single_transformer_blocks.{i}."
        for name in ("to_q", "to_k", "to_v"):
            shapes |= linear(f"{block}attn.{name}", HIDDEN)
        shapes |= {f"{block}attn.norm_{name}.weight": (HEAD,) for name in ("q", "k")}
        shapes |= linear(f"{block}norm.linear", 3 * HIDDEN) | linear(f"{block}proj_mlp", 4 * HIDDEN)
        shapes |= linear(f"{block}proj_out", HIDDEN, 5 * HIDDEN)
    shapes |= linear("norm_out.linear", 2 * HIDDEN) | linear("proj_out", 64)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
