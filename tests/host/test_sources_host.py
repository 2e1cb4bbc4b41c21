# SPDX-License-Identifier: Apache-2.0
"""What quantize.sources reads against what ComfyUI itself makes of the same files."""

from __future__ import annotations

import json

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from gguf_kit.quantize import sources
from gguf_kit.quantize.sources import open_source
from make_files import MODEL
from model_keys import list_names, read_keys
from safetensors.torch import load_file
from source_files import diffusers_flux, finite, marker, model, save

E4M3 = torch.float8_e4m3fn
CASES = {
    "dev": (4, 5, 64, True),
    "schnell": (1, 2, 64, False),
    "Fill": (2, 3, 384, True),
    "more than ten blocks": (11, 12, 64, True),
}


def as_here(key):
    """A key of the host; newer ones call the scale of a norm its weight."""
    return key.replace("_norm.weight", "_norm.scale")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flux_in_diffusers_layout_becomes_what_the_host_makes_of_it(tmp_path, case, dtype):
    state = diffusers_flux(*case, seed=5, dtype=dtype)
    copies = {name: tensor.clone() for name, tensor in state.items()}  # the host swaps halves in place
    wanted = {as_here(key): t for key, t in comfy.model_detection.convert_diffusers_mmdit(copies).items()}
    source = open_source(save(tmp_path, state))
    assert set(source.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert source.tensors[name].dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor), name


def to_diffusers(native):
    """The tiny Flux in diffusers layout, taken apart by the host's own table."""
    config = {
        "depth": comfy.model_detection.count_blocks(native, "double_blocks.{}."),
        "depth_single_blocks": comfy.model_detection.count_blocks(native, "single_blocks.{}."),
        "hidden_size": native["img_in.weight"].shape[0],
    }
    state = {}
    for name, target in comfy.utils.flux_to_diffusers(config).items():
        key, offset, change = (*((target,) if isinstance(target, str) else target), None, None)[:3]
        tensor = native.get(as_here(key))
        if tensor is not None and "linear_in" not in name and "linear_out" not in name and "to_qkv_mlp" not in name:
            tensor = tensor.narrow(*offset) if offset else tensor
            state[name] = (change(tensor) if change else tensor).contiguous()
    state = {name: t for name, t in state.items() if not (name.startswith("single_") and ".attn.to_out." in name)}
    return state


def test_the_tiny_flux_taken_apart_is_put_together_again(tmp_path):
    native = load_file(MODEL)
    source = open_source(save(tmp_path, to_diffusers(native)))
    assert set(source.tensors) == set(native)
    for name, tensor in native.items():
        assert torch.equal(source.read(name), tensor), name
    state = {name: source.read(name) for name in source.tensors}
    assert comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32}) is not None


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model."])
@pytest.mark.parametrize("name", ["flux-dev", "sd1", "aura", "cosmos-predict2-2b", "zimage"])
def test_prefixes_are_taken_off_as_in_the_host(name, prefix):
    assert name in list_names()
    state = {prefix + key: torch.empty(0) for key in read_keys(name)}
    found = comfy.model_detection.unet_prefix_from_state_dict(state)
    inside = comfy.utils.state_dict_prefix_replace(dict(state), {found: ""}, filter_keys=True)
    stored = {key: sources.StoredTensor(t.dtype, (0,), t.clone) for key, t in state.items()}
    assert set(sources._take_model("x", stored)[0]) == set(inside) == set(read_keys(name))


def host_weight(state, metadata):
    """The weight of layer a, as float32, that the host's own Linear holds after loading the state dict."""
    if hasattr(comfy.utils, "convert_old_quants"):
        state, _ = comfy.utils.convert_old_quants(dict(state), "", metadata)
        ops = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)
    elif "scaled_fp8" in state:
        ops = comfy.ops.scaled_fp8_ops(override_dtype=state["scaled_fp8"].dtype)
    else:
        pytest.skip("this host knows no newer scales")
    layer = ops.Linear(16, 16, bias=False, device="cpu", dtype=torch.float32)
    layer.load_state_dict({k.removeprefix("a."): v for k, v in state.items() if k.startswith("a.")}, strict=False)
    if hasattr(layer, "convert_weight") and hasattr(layer, "scale_weight"):
        return layer.convert_weight(layer.weight)
    return layer.weight.dequantize()


@pytest.mark.parametrize("style", ["scaled_fp8", "comfy_quant", "metadata"])
@pytest.mark.parametrize("seed", range(3))
def test_scaled_fp8_is_what_the_host_computes_in_float32(tmp_path, style, seed):
    scale = torch.rand((), generator=torch.Generator().manual_seed(seed)) * 1e-2
    state = {"a.weight": finite(E4M3)}
    metadata = None
    if style == "scaled_fp8":
        state |= {"a.scale_weight": scale, "scaled_fp8": torch.empty(0, dtype=E4M3)}
    else:
        state |= {"a.weight_scale": scale}
        if style == "comfy_quant":
            state["a.comfy_quant"] = marker({"format": "float8_e4m3fn"})
        else:
            metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})}
    path = save(tmp_path, state | {"b.weight": torch.ones(1)}, metadata=metadata)
    got = open_source(path).read("a.weight")
    wanted = host_weight(state, metadata)
    assert got.dtype == wanted.dtype == torch.float32
    assert torch.equal(got, wanted.detach())


def test_files_are_read_as_the_host_reads_them(tmp_path):
    path = save(tmp_path, model())
    state = comfy.utils.load_torch_file(str(path))
    source = open_source(path)
    assert all(torch.equal(source.read(name), state[name]) for name in source.tensors)
    torch.save({"state_dict": model(), "epoch": 1}, tmp_path / "model.ckpt")
    state = comfy.utils.load_torch_file(str(tmp_path / "model.ckpt"))
    source = open_source(tmp_path / "model.ckpt")
    assert set(source.tensors) == set(state)
