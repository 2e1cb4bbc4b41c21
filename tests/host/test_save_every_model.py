# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the host, saved as the node does and loaded again: the same class, keys and results."""

from __future__ import annotations

import pytest
import tiny
import torch
from gguf_kit.loader import load_diffusion_model
from gguf_kit.models.values import floats
from gguf_kit.ops import OpsOptions
from gguf_kit.saver import save_model
from gguf_kit.service import load_model
from small_models import forward, host_model, make_file, narrow_detection
from test_architectures import SMALL_MODELS


@pytest.mark.parametrize("name", list(SMALL_MODELS))
@torch.no_grad()  # in which the host's nodes run; some of its classes write into their parameters
def test_a_saved_model_is_the_same_model(name, tmp_path, monkeypatch):
    small = SMALL_MODELS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    narrow_detection(monkeypatch, small)
    weights = make_file(small, str(tmp_path / "small.gguf"))
    first = load_model(str(tmp_path / "small.gguf"), OpsOptions())
    before = forward(first, small)
    models = {}
    for type_name in ("F32", "Q8_0"):
        path = tmp_path / f"{type_name}.gguf"
        plan = save_model(first, path, type_name)
        assert plan.arch.title == load_diffusion_model(path)[1].title == small.title
        again = models[type_name] = load_model(str(path), OpsOptions())
        assert type(again.model) is type(first.model)
        assert type(again.model.model_config) is type(first.model.model_config)
        assert again.model.model_type == first.model.model_type
        assert set(again.model.state_dict()) == set(first.model.state_dict())
    reference = host_model(weights, small.metadata)
    expected = forward(reference, small)
    weights |= {key: tensor for key, tensor in reference.model.diffusion_model.state_dict().items() if key in weights}
    # In some models the host's own results differ by a few units in the last place from run to run.
    assert tiny.relative(forward(first, small), before) < 1e-6
    assert tiny.relative(forward(models["F32"], small), expected) < 1e-6
    exact, rounded = (load_diffusion_model(tmp_path / f"{type_name}.gguf")[0] for type_name in models)
    assert set(exact) == set(rounded)
    for key, value in exact.items():
        if key in weights:
            assert torch.equal(floats(value), weights[key]), key
        assert tiny.relative(floats(rounded[key]), floats(value)) < 0.01 or not floats(value).any(), key
    assert forward(models["Q8_0"], small).isfinite().all()
