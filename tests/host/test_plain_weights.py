# SPDX-License-Identifier: Apache-2.0
"""Weights that a host uses without our layers arrive as floats, equal to the dequantized ones, and are named once."""

import ast
import importlib
import logging
from pathlib import Path

import comfy
import gguf
import pytest
import torch
from gguf_kit.host.compat import is_quantized, wrap
from gguf_kit.host.plain import READ_DTYPES, make_plain
from gguf_kit.ops import OpsOptions, make_ops
from gguf_kit.service import load_model
from small_model_table import SMALL_MODELS
from small_models import make_file, narrow_detection
from test_layers import quantized

Q = gguf.GGMLQuantizationType


class Scale(torch.nn.Module):
    """A host's module with a bare parameter that is called as a layer's weight is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2, 256), requires_grad=False)


def model_of(dtype):
    """Modules of the host's own and one of ours."""
    return torch.nn.ModuleDict(
        {
            "kinds": torch.nn.Embedding(3, 256, dtype=dtype),
            "out": torch.nn.Linear(256, 4, dtype=dtype),
            "scale": Scale().to(dtype),
            "ours": make_ops().Linear(256, 8, dtype=dtype),
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_modules_of_the_host_get_floats(assign, dtype, inference_mode, caplog):
    model, state, values = model_of(dtype), {}, {}
    shapes = {"kinds.weight": (3, 256), "out.weight": (4, 256), "scale.weight": (2, 256), "ours.weight": (8, 256)}
    for i, (key, shape) in enumerate(shapes.items()):
        state[key], values[key] = quantized(shape, Q.Q8_0, seed=i)
    for name in ("kinds", "out", "scale"):  # as hosts with dynamic VRAM do before they load
        model[name].weight_comfy_model_dtype = dtype
    model.load_state_dict(state | {"out.bias": torch.zeros(4, dtype=dtype), "ours.bias": torch.zeros(8)}, assign=assign)
    with caplog.at_level(logging.INFO, "gguf_kit"):
        assert make_plain(model) == ["kinds.weight", "out.weight", "scale.weight"]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "kinds.weight, out.weight, scale.weight"
    ]
    assert is_quantized(model["ours"].weight)
    for key in ("kinds.weight", "out.weight", "scale.weight"):
        value = model.get_parameter(key)
        assert type(value) is torch.nn.Parameter
        assert torch.equal(value, values[key].to(dtype)), key
    assert model["out"](torch.ones(1, 256, dtype=dtype)).isfinite().all()


def test_nothing_is_said_of_a_model_of_our_layers_alone(caplog):
    model = torch.nn.ModuleDict({"ours": make_ops().Linear(256, 8)})
    model.load_state_dict({"ours.weight": quantized((8, 256), Q.Q8_0)[0], "ours.bias": torch.zeros(8)})
    with caplog.at_level(logging.INFO, "gguf_kit"):
        assert make_plain(model) == []
    assert not caplog.records


def test_the_log_names_what_a_loaded_model_computes_itself(tmp_path, monkeypatch, caplog):
    small = SMALL_MODELS["hunyuan video 1.5"]
    narrow_detection(monkeypatch, small)
    make_file(small, tmp_path / "small.gguf")
    with caplog.at_level(logging.INFO, "gguf_kit"):
        patcher = load_model(str(tmp_path / "small.gguf"), OpsOptions())
    assert [record.getMessage() for record in caplog.records if "dequantized" in record.getMessage()] == [
        "ComfyUI computes with these weights itself, so they were dequantized: cond_type_embedding.weight"
    ]
    assert patcher.model.diffusion_model.cond_type_embedding.weight.dtype == torch.float32


VIEWS = {
    "unsqueeze": lambda w: w.unsqueeze(1).unsqueeze(1),
    "index": lambda w: w[0],
    "mask": lambda w: w[None],
    "columns": lambda w: w[:, :64],
    "rows": lambda w: w[1:3],
    "transpose": lambda w: w.t(),
    "swap": lambda w: w.transpose(0, 1).permute(1, 0),
    "view": lambda w: w.view(2, -1),
    "expand": lambda w: w.expand(4, 256),
    "unbind": lambda w: w.unbind(0)[2],
    "squeeze": lambda w: w.squeeze(0),
    "split": lambda w: w.split(2)[1],
    "chunk": lambda w: w.chunk(2)[0],
}


@pytest.mark.parametrize("made_in_inference_mode", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_host_may_view_the_weight_of_our_layer_as_it_likes(name, made_in_inference_mode, inference_mode):
    with torch.inference_mode(made_in_inference_mode):
        module = make_ops().Embedding(4, 256, dtype=torch.float32)
        weight, values = quantized((4, 256), Q.Q8_0)
        module.load_state_dict({"weight": weight})
    assert is_quantized(module.weight)
    result = VIEWS[name](module.weight)
    result = result.dequantize() if is_quantized(result) else result
    assert torch.equal(result, VIEWS[name](values))


def test_floats_of_a_layer_whose_dtype_the_host_reads_take_the_models(monkeypatch):
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Sequential(*(make_ops().Linear(256, 256, dtype=torch.float32) for _ in range(2)))

    monkeypatch.setattr("gguf_kit.host.plain.READ_DTYPES", {f"{Reader.__module__}:Reader": ("mlp.0",)})
    model = torch.nn.ModuleDict({"in": Reader(), "other": torch.nn.ModuleDict({"mlp": torch.nn.Identity()})})
    values = {name: torch.randn(256, 256).half() for name in ("in.mlp.0.weight", "in.mlp.1.weight")}
    model.load_state_dict(values, strict=False)
    assert make_plain(model) == []
    assert model["in"].mlp[0].weight.dtype == torch.float32
    assert torch.equal(model["in"].mlp[0].weight, values["in.mlp.0.weight"].float())
    assert model["in"].mlp[1].weight.dtype == torch.float16  # still a view of the file


def _class_and_layer(tree):
    """Class and layer of every `self.LAYER.weight.dtype` in a module; `mlp[0]` is called mlp.0."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) and node.attr == "dtype" else ""
            if text.startswith("self.") and text.endswith(".weight.dtype") and "norm" not in text:
                layer = text.removeprefix("self.").removesuffix(".weight.dtype")
                yield owner.name, layer.replace("[", ".").replace("]", "")


def test_the_table_has_every_layer_whose_dtype_this_host_reads():
    root = Path(next(iter(comfy.__path__))) / "ldm"
    found = {}
    for path in sorted(root.rglob("*.py")):
        if "controlnet" in path.name or "vae" in str(path) or path.parent.name == "cascade":
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, layer in _class_and_layer(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(f"{module}:{name}", set()).add(layer)
    assert found
    for place, layers in found.items():
        if place == "lightricks.latent_upsampler:LatentUpsampler":
            continue  # it asks for the dtype of the model first
        # CogVideoX reads that of proj through a name of its own.
        assert layers <= set(READ_DTYPES.get(place, ())), place
    for place in READ_DTYPES:
        module, _, name = place.partition(":")
        if (root / f"{module.replace('.', '/')}.py").exists() and place in found:
            assert hasattr(importlib.import_module(f"comfy.ldm.{module}"), name)


def test_a_weight_in_a_model_is_of_the_hosts_own_class():
    """Pinning and paging go by the class; another one is only for the way into a model."""
    module = make_ops().Linear(256, 8, dtype=torch.float32)
    weight, _ = quantized((8, 256), Q.Q8_0)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(8)})
    assert type(module.weight) in (comfy.quant_ops.QuantizedTensor, type(wrap(weight._qdata, Q.Q8_0, (8, 256))))
    assert type(module.weight).__name__ in ("QuantizedTensor", "GGUFTensor")
