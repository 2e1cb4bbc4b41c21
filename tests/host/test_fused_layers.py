# SPDX-License-Identifier: Apache-2.0
"""Published files have some attention layers fused (in_proj), and the host cuts them: quantized ones come out right."""

from __future__ import annotations

import re

import pytest
import small_models
import torch
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from small_models import forward, host_model, make_file, narrow_detection
from small_video_table import SMALL_VIDEO_MODELS

# What the host's class has in three parts, and what stands in files.
SPLIT = re.compile(r"((?:music_encoder|detector)\..*\.)([qkv])_proj\.(weight|bias)")


def fuse(shapes, layers):
    """Keys and shapes, and the names of matrices, with q, k and v in one."""
    fused = {}
    for key, shape in shapes.items():
        part = SPLIT.fullmatch(key)
        if part is None:
            fused[key] = shape
        elif part[2] == "q":
            fused[f"{part[1]}in_proj_{part[3]}"] = (3 * shape[0], *shape[1:])
    return fused, layers | {key for key in fused if key.endswith("in_proj_weight")}


@pytest.mark.parametrize("name", ["wandancer", "sam 3"])
def test_fused_quantized_layers_are_cut_by_the_host(name, tmp_path, monkeypatch):
    small = SMALL_VIDEO_MODELS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    narrow_detection(monkeypatch, small)
    build = small_models.build_shapes
    monkeypatch.setattr(small_models, "build_shapes", lambda row: fuse(*build(row)))
    weights = make_file(small, tmp_path / "fused.gguf")
    assert any(key.endswith("in_proj_weight") for key in weights)
    with torch.no_grad():
        patcher, reference = load_model(str(tmp_path / "fused.gguf"), OpsOptions()), host_model(weights)
    assert torch.equal(forward(patcher, small), forward(reference, small))
