# SPDX-License-Identifier: Apache-2.0
"""Small files of vision parts (mmproj) with random values, and headers of text encoders, as llama.cpp names them."""

import gguf
import numpy as np
import torch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import text_encoders
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
WIDTH, HIDDEN, INNER = 128, 64, 96

TEXT_NAMES = [
    "token_embd.weight",
    *(f"blk.0.{name}.weight" for name in ("attn_norm", "attn_q", "ffn_gate", "ffn_norm")),
]
# general.architecture and what tells the families apart.
ENCODERS = {
    "qwen2vl": ["blk.0.attn_k.bias"],
    "qwen3vl": ["blk.0.attn_q_norm.weight"],
    "gemma3": ["blk.0.attn_q_norm.weight", "blk.0.post_ffw_norm.weight"],
    "llama": [],
}


def write_text_encoder(path, arch="qwen2vl", width=WIDTH):
    writer = gguf.GGUFWriter(path, arch)
    for name in TEXT_NAMES + ENCODERS[arch]:
        writer.add_tensor(name, np.zeros((4, width), np.float32))
    close(writer)
    return path


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def block_shapes(bid):
    """Names and shapes that blocks of all families share."""
    shapes = {f"attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "out")}
    shapes |= {f"attn_{name}.bias": (HIDDEN,) for name in ("q", "k", "v", "out")}
    shapes |= {"ln1.weight": (HIDDEN,), "ln2.weight": (HIDDEN,)}
    shapes |= {"ffn_up.weight": (INNER, HIDDEN), "ffn_up.bias": (INNER,)}
    shapes |= {"ffn_down.weight": (HIDDEN, INNER), "ffn_down.bias": (HIDDEN,)}
    return {f"v.blk.{bid}.{name}": shape for name, shape in shapes.items()}


def part_shapes(kind, width=WIDTH):
    """Names and shapes of a reduced vision part of a kind, as llama.cpp writes them."""
    shapes = block_shapes(0) | block_shapes(1)
    if kind == "gemma3":
        shapes |= {"v.patch_embd.weight": (HIDDEN, 3, 14, 14), "v.patch_embd.bias": (HIDDEN,)}
        shapes |= {"v.position_embd.weight": (256, HIDDEN), "v.post_ln.weight": (HIDDEN,), "v.post_ln.bias": (HIDDEN,)}
        return shapes | {"mm.input_projection.weight": (HIDDEN, width), "mm.soft_emb_norm.weight": (HIDDEN,)}
    size = 14 if kind == "qwen2vl" else 16
    shapes |= {f"v.patch_embd.{end}": (HIDDEN, 3, size, size) for end in ("weight", "weight.1")}
    shapes |= {"mm.0.weight": (4 * HIDDEN, 4 * HIDDEN), "mm.0.bias": (4 * HIDDEN,)}
    shapes |= {"mm.2.weight": (width, 4 * HIDDEN), "mm.2.bias": (width,), "v.post_ln.weight": (HIDDEN,)}
    if kind == "qwen2vl":
        gates = {f"v.blk.{bid}.ffn_gate.weight": (INNER, HIDDEN) for bid in (0, 1)}
        return shapes | gates | {name.replace("weight", "bias"): (INNER,) for name in gates}
    shapes |= {"v.position_embd.weight": (2304, HIDDEN), "v.patch_embd.bias": (HIDDEN,), "v.post_ln.bias": (HIDDEN,)}
    for bid in (5, 11, 17) if kind == "qwen3vl" else ():
        for name, shape in (("norm", ()), ("fc1", (4 * HIDDEN,)), ("fc2", (4 * HIDDEN,))):
            n_out = width if name == "fc2" else 4 * HIDDEN
            shapes |= {f"v.deepstack.{bid}.{name}.weight": (n_out, *shape), f"v.deepstack.{bid}.{name}.bias": (n_out,)}
    return shapes


def write_part(path, kind="qwen2vl", width=WIDTH, qtype=Q.F16, change=None, tags=True, special=None):
    """A vision part with random values; returns these as they are stored, by llama.cpp's name.

    Args:
        change: gets and returns the names and shapes.
        special: name -> qtype, where it is another than qtype.
    """
    generator, values = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "clip")
    if tags:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_clip_has_vision_encoder(True)
    for name, shape in (change or dict)(part_shapes(kind, width)).items():
        array = np.asarray(generator.standard_normal(shape, dtype=np.float32))
        used = (special or {}).get(name, qtype) if array.ndim == 2 else Q.F16 if array.ndim > 2 else Q.F32
        data = quantize_with_ggml(array, used) if used == Q.Q8_0 else gguf.quants.quantize(array, used)
        writer.add_tensor(name, data, raw_dtype=used)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, used).reshape(shape).astype(np.float32))
    close(writer)
    return values


def open_encoder(path):
    file = GGUFFile(path)
    return file, text_encoders.detect(file.tensors, (file.arch,))
