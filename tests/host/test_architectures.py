# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the host loads from GGUF through the pack and computes what its dequantized weights compute."""

from __future__ import annotations

import comfy.supported_models
import pytest
import torch
from gguf_kit.loader import load_diffusion_model
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from small_model_table import SMALL_MODELS as SMALL_PICTURE_MODELS
from small_models import forward, host_model, make_file, narrow_detection
from small_video_table import SMALL_VIDEO_MODELS

SMALL_MODELS = SMALL_PICTURE_MODELS | SMALL_VIDEO_MODELS


def test_every_class_of_the_host_has_a_row():
    named = {small.host_class for small in SMALL_MODELS.values()}
    assert [model.__name__ for model in comfy.supported_models.models if model.__name__ not in named] == []
    assert not set(SMALL_PICTURE_MODELS) & set(SMALL_VIDEO_MODELS)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_small_model_equals_its_dequantized_weights(name, tmp_path, monkeypatch):
    small = SMALL_MODELS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    path = str(tmp_path / "small.gguf")
    found = narrow_detection(monkeypatch, small)
    weights = make_file(small, path)
    with torch.no_grad():  # in which the host's nodes run; some classes write into their parameters
        patcher, reference = load_model(path, OpsOptions()), host_model(weights, small.metadata)
    assert type(patcher.model.model_config).__name__ == small.host_class
    assert load_diffusion_model(path)[1].title == small.title
    wrong = {
        key: (found[0].get(key), value)
        for key, value in small.found.items()
        if key not in small.fixed and found[0].get(key, value) != value
    }
    assert not wrong
    result = forward(patcher, small)
    assert result.isfinite().all()
    assert result.abs().max() > 0
    assert torch.equal(result, forward(reference, small))
