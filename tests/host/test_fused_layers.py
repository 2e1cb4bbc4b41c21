# SPDX-License-Identifier: Apache-2.0
"""Published files have some layers fused that the host cuts into parts: quantized ones come out right."""

from __future__ import annotations

import re

import pytest
import small_models
import torch
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from small_models import forward, host_model, make_file, narrow_detection
from test_architectures import SMALL_MODELS

# What the host's class has in parts: what comes before, which part it is, what comes behind.
SPLIT = re.compile(r"((?:music_encoder|detector)\..*\.)([qkv])_proj\.(weight|bias)")
MODULATION = re.compile(r"(.*pixel_blocks\..*\.adaLN_modulation)_(msa|mlp)\.(weight|bias)")


def fuse(shapes, layers):
    """Keys and shapes, and the names of matrices, with the parts as one tensor."""
    fused = {}
    for key, shape in shapes.items():
        qkv, modulation = SPLIT.fullmatch(key), MODULATION.fullmatch(key)
        if qkv is None and modulation is None:
            fused[key] = shape
        elif qkv:
            fused[f"{qkv[1]}in_proj_{qkv[3]}"] = (3 * shape[0], *shape[1:])
        else:
            fused[f"{modulation[1]}.0.{modulation[3]}"] = (2 * shape[0], *shape[1:])
    return fused, layers | {key for key in fused.keys() - shapes.keys() if key.endswith("weight")}


@pytest.mark.parametrize("name", ["wandancer", "sam 3", "pixeldit"])
def test_fused_quantized_layers_are_cut_by_the_host(name, tmp_path, monkeypatch):
    small = SMALL_MODELS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    narrow_detection(monkeypatch, small)
    build = small_models.build_shapes
    monkeypatch.setattr(small_models, "build_shapes", lambda row: fuse(*build(row)))
    weights = make_file(small, tmp_path / "fused.gguf")
    assert any(key.endswith(("in_proj_weight", "adaLN_modulation.0.weight")) for key in weights)
    with torch.no_grad():
        patcher, reference = load_model(str(tmp_path / "fused.gguf"), OpsOptions()), host_model(weights)
    assert torch.equal(forward(patcher, small), forward(reference, small))
