# SPDX-License-Identifier: Apache-2.0
"""What tools/to_safetensors.py writes is, in ComfyUI's own loader, the model of the dequantized weights."""

import comfy.sd
import pytest
import tiny
import torch
from gguf_kit.tools import convert, to_safetensors
from safetensors.torch import load_file
from small_models import forward, host_model, make_file, narrow_detection
from test_architectures import SMALL_MODELS

# A pad token with a dimension that ggml leaves out, a mark without numbers, a config in the metadata, a 5-D kernel.
ROWS = ("z-image", "chroma radiance", "ltxv", "wan 2.1 t2v")


def run(tool, *arguments):
    assert tool.main([*map(str, arguments)]) == 0


def load(path):
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    patcher.model.requires_grad_(False)  # see tiny.float_model
    return patcher


@pytest.mark.parametrize("type_name", ["BF16", "Q4_K_S"])
def test_a_flux_there_and_back(tiny_flux, tmp_path, type_name):
    source = tiny_flux(type_name)
    run(to_safetensors, "--src", source, "--dst", tmp_path / "m.safetensors", "--dtype", "F32")
    assert torch.equal(tiny.run(load(tmp_path / "m.safetensors")), tiny.run(tiny.float_model(source)))
    # A 16-bit model comes back as it was.
    if type_name == "BF16":
        run(to_safetensors, "--src", source, "--dst", tmp_path / "b.safetensors")
        run(convert, "--src", tmp_path / "b.safetensors", "--dst", tmp_path / "b.gguf")
        run(to_safetensors, "--src", tmp_path / "b.gguf", "--dst", tmp_path / "c.safetensors")
        first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "bc")
        assert set(first) == set(second)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", [name for name in ROWS if name in SMALL_MODELS and SMALL_MODELS[name].known])
def test_shapes_marks_and_metadata_are_those_of_the_model(tmp_path, monkeypatch, name):
    small = SMALL_MODELS[name]
    narrow_detection(monkeypatch, small)
    weights = make_file(small, str(tmp_path / "m.gguf"))
    run(to_safetensors, "--src", tmp_path / "m.gguf", "--dst", tmp_path / "m.safetensors", "--dtype", "F32")
    found = load_file(tmp_path / "m.safetensors")
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        key: tuple(value.shape) for key, value in weights.items()
    }
    result = forward(load(tmp_path / "m.safetensors"), small)
    assert tiny.relative(result, forward(host_model(weights, small.metadata), small)) < 1e-6
