# SPDX-License-Identifier: Apache-2.0
"""Diffusion models as stable-diffusion.cpp converts them, through the node: no metadata, a prefix, its own types.

What is rebuilt here: all keys behind model.diffusion_model., no key/value pair at all, five dimensions merged to four,
leading dimensions of one left out, a scalar as one number, and every tensor quantized whose rows are whole blocks, even
norms and bare parameters. Source: stable-diffusion.cpp src/convert.cpp convert_with_components, model_io/gguf_io.cpp
write_gguf_file, model_io/safetensors_io.cpp read_safetensors_file, model_loader.cpp tensor_should_be_converted.
"""

import math

import gguf
import numpy as np
import pytest
import torch
from gguf_kit import nodes
from gguf_kit.gguf_file import GGUFFile
from odd_files import CHECKPOINT, drop_ones, merge_kernels, small_model
from small_models import build_shapes, forward, host_model

Q8_0, BF16, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "BF16", "F16", "F32"))
# Parts of names that it never quantizes.
KEPT = ("_in.", "final_layer.", "_embedder.", "pos_embed", "time_embed.", "label_emb.", "embedding")
MODELS = (
    "flux dev", "flux2", "chroma", "chroma radiance", "sd1", "sd3", "sd3.5", "wan t2v", "wan i2v",
    "wan vace", "wan 2.2 ti2v", "wan animate", "wan s2v", "qwen image", "z-image", "hunyuan video", "krea 2",
    "hidream o1", "hidream", "ernie", "lens",
)  # fmt: skip


def store(key, values):
    """(data, type) of a tensor."""
    whole_blocks = values.shape[-1] % 32 == 0
    if whole_blocks and not key.endswith((".bias", ".scale")) and not any(part in key for part in KEPT):
        return gguf.quants.quantize(values, Q8_0), Q8_0
    qtype = F32 if values.ndim == 1 else (BF16, F16)[len(key) % 2]  # as the source has it
    return gguf.quants.quantize(values, qtype), qtype


def convert(small, path):
    """Write a file of random weights; return them as float32 in the model's own shapes."""
    writer, weights = gguf.GGUFWriter(path, "none"), {}
    writer.kv_data[0].clear()
    for i, (key, shape) in enumerate(build_shapes(small)[0].items()):
        values = np.random.default_rng(i).standard_normal(shape or (1,), dtype=np.float32)
        values /= np.float32(math.sqrt(max(math.prod(shape[1:]), 16)))
        values = np.abs(values) if key.endswith("running_var") else values
        _, values = drop_ones(*merge_kernels(key, values))
        data, qtype = store(key, values) if values.size else (values, F32)
        weights[key] = torch.from_numpy(np.array(gguf.quants.dequantize(data, qtype), np.float32)).reshape(shape)
        writer.add_tensor(CHECKPOINT + key, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the UNet loader searches."""
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_its_dequantized_weights(name, folder, monkeypatch):
    small, _ = small_model(name, folder, monkeypatch)
    weights = convert(small, folder / "sd.gguf")
    file = GGUFFile(folder / "sd.gguf")
    assert not file.metadata
    assert max(len(info.shape) for info in file.tensors.values()) <= 4
    (patcher,) = nodes.UnetLoaderGGUF().load_unet("sd.gguf")
    assert type(patcher.model.model_config).__name__ == small.host_class
    result = forward(patcher, small)
    assert result.isfinite().all()
    assert torch.equal(result, forward(host_model(weights, small.metadata), small))
