# SPDX-License-Identifier: Apache-2.0
"""Files as other programs write them, made out of sound ones, and the check that both compute the same."""

from __future__ import annotations

import dataclasses
import re

import comfy.ldm.chroma.model
import comfy.ldm.chroma_radiance.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import gguf
import numpy as np
import pytest
import torch
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from small_model_table import SMALL_MODELS
from small_models import forward, make_file, narrow_detection

CHECKPOINT = "model.diffusion_model."  # what keys begin with in whole checkpoints
F32 = gguf.GGMLQuantizationType.F32
NORM = re.compile(r"(.*_norm|.*\.norms\.\d+|nerf\w*(\.\d+)?\.norm)\.(scale|weight)")


def rewrite(source, path, change, split_max_tensors=0, extra=(), metadata=()):
    """A copy in which `change` gives each tensor (name, array) another name and array, or None to leave it out."""
    writer = gguf.GGUFWriter(path, "odd", split_max_tensors=split_max_tensors)
    for key, numbers in dict(metadata).items():
        writer.add_array(key, numbers)
    stored = [(t.name, np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(source).tensors]
    for name, data, qtype in [*stored, *((name, data, F32) for name, data in extra)]:
        changed = change(name, data)
        if changed is not None:
            writer.add_tensor(changed[0], np.ascontiguousarray(changed[1]), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def rename_norms(last):
    """Change norms of Flux to end in `last`."""
    return lambda name, data: (f"{match[1]}.{last}" if (match := NORM.fullmatch(name)) else name, data)


def drop_ones(name, data):
    """As ggml writes a tensor: without leading dimensions of one."""
    while data.ndim > 1 and data.shape[0] == 1:
        data = data[0]
    return name, data


def merge_kernels(name, data):
    """As programs write kernels of video that know four dimensions."""
    return name, data.reshape(-1, *data.shape[2:]) if data.ndim == 5 else data


PARAMS = {
    "flux": comfy.ldm.flux.model.FluxParams,
    "chroma": comfy.ldm.chroma.model.ChromaParams,
    "chroma_radiance": comfy.ldm.chroma_radiance.model.ChromaRadianceParams,
    "hunyuan_video": comfy.ldm.hunyuan_video.model.HunyuanVideoParams,
}


def small_model(name, tmp_path, monkeypatch):
    """(row, path) of a small model that this host knows, built from the arguments that its class takes there."""
    small = SMALL_MODELS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    params = PARAMS.get(small.found.get("image_model"))
    if params is not None:
        known = {"image_model", *(field.name for field in dataclasses.fields(params))}
        found, fixed = ({k: v for k, v in values.items() if k in known} for values in (small.found, small.fixed))
        heads = {"num_heads": found["num_heads"]}  # older hosts do not count them
        small = dataclasses.replace(small, found=found, fixed=fixed | heads)
    narrow_detection(monkeypatch, small)
    make_file(small, tmp_path / "plain.gguf")
    return small, tmp_path / "plain.gguf"


def assert_same(small, path, plain):
    """Both load, and compute the same from the same tensors."""
    odd, expected = load_model(path, OpsOptions()), load_model(str(plain), OpsOptions())
    keys = odd.model.diffusion_model.state_dict().keys()
    assert keys == expected.model.diffusion_model.state_dict().keys()
    result = forward(odd, small)
    assert result.isfinite().all()
    assert torch.equal(result, forward(expected, small))
