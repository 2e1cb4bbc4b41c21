# SPDX-License-Identifier: Apache-2.0
"""Nodes beside the six loaders in a real ComfyUI server: a VAE and a LoRA from GGUF, and models saved as GGUF."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_kit.demo import metrics, tiny_flux
from gguf_kit.demo.server import ComfyServer
from gguf_kit.demo.workflow import Result, build_workflow, gguf_loader, run_workflow
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.e2e

PROMPT, SEED = "green 2", 11
RUNS = itertools.count()
LORA_LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear2")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A GGUF file of tensors as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "none")
    for name, values in tensors.items():
        writer.add_tensor(name, np.atleast_1d(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(server: ComfyServer, model: str = "tiny-flux-Q8_0.gguf", **nodes: Mapping[str, Any]) -> Result:
    """The workflow of the demo with other nodes in it; a node called lora stands behind the model."""
    workflow = {**build_workflow(gguf_loader(model), PROMPT, SEED), **nodes}
    workflow["save_latent"]["inputs"]["filename_prefix"] = f"latent{next(RUNS)}"  # older hosts skip what they know
    if "lora" in nodes:
        workflow["sampled"]["inputs"]["model"] = ["lora", 0]
    return run_workflow(server, workflow)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def lora(base: Path) -> str:
    """Name without suffix of one LoRA as safetensors and as GGUF."""
    rng, tensors = np.random.default_rng(3), {}
    for layer in LORA_LAYERS:
        n_out, n_in = shape_of(layer)
        down = rng.standard_normal((4, n_in)) / n_in**0.5
        up = rng.standard_normal((n_out, 4)) / 4
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = down.astype(np.float16)
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = up.astype(np.float16)
    folder = base / "models" / "loras"
    write_tensors(folder / "tiny.gguf", tensors)
    save_file(tensors, folder / "tiny.safetensors")
    return "tiny"


def shape_of(layer: str) -> tuple[int, int]:
    """(n_out, n_in) of a layer of the tiny Flux."""
    with safe_open(tiny_flux.MODEL, "np") as file:
        n_out, n_in = file.get_slice(f"{layer}.weight").get_shape()
    return n_out, n_in


def test_a_vae_from_gguf_gives_the_picture_that_the_hosts_own_gives(server: ComfyServer, base: Path) -> None:
    parts = {
        f"taesd_{part}.{key}": values
        for part, path in zip(("encoder", "decoder"), tiny_flux.VAE_FILES, strict=True)
        for key, values in load_file(path).items()
    }
    scale = {"vae_scale": np.float32(0.3611), "vae_shift": np.float32(0.1159)}
    write_tensors(base / "models" / "vae" / "taef1.gguf", {**parts, **scale})
    found = run(server, vae=node("VAELoaderGGUF", vae_name="taef1.gguf"))
    assert np.array_equal(found.picture, run(server).picture)


def test_a_lora_from_gguf_changes_a_model_as_the_same_from_safetensors(server: ComfyServer, lora: str) -> None:
    inputs = {"model": ["model", 0], "strength_model": 0.7}
    found = run(server, lora=node("LoraLoaderModelOnlyGGUF", lora_name=f"{lora}.gguf", **inputs))
    wanted = run(server, lora=node("LoraLoaderModelOnly", lora_name=f"{lora}.safetensors", **inputs))
    assert np.array_equal(found.latent, wanted.latent)
    assert not np.array_equal(found.latent, run(server).latent)


def save(server: ComfyServer, base: Path, type_name: str, *, lora: str = "") -> Path:
    """Save the Q8_0 file through the node, with a LoRA in it if one is named; the new file."""
    folder = base / "output" / "diffusion_models"
    before = {*folder.glob("*.gguf")}
    model = gguf_loader("tiny-flux-Q8_0.gguf")
    workflow = {
        "model": node(model.node, **model.inputs),
        "save": node("SaveGGUF", model=["model", 0], filename_prefix="diffusion_models/saved", type=type_name),
    }
    if lora:
        inputs = {"model": ["model", 0], "lora_name": f"{lora}.gguf", "strength_model": 0.7}
        workflow["lora"] = node("LoraLoaderModelOnlyGGUF", **inputs)
        workflow["save"]["inputs"]["model"] = ["lora", 0]
    server.submit(workflow)
    (path,) = {*folder.glob("*")} - before
    return path


def test_a_saved_model_is_listed_and_samples_as_before(server: ComfyServer, base: Path) -> None:
    path = save(server, base, "Q8_0")
    assert path.name in server.object_info()["UnetLoaderGGUF"]["input"]["required"]["unet_name"][0]
    assert np.array_equal(run(server, path.name).latent, run(server).latent)


def test_a_lora_is_part_of_a_saved_model(server: ComfyServer, base: Path, lora: str) -> None:
    path = save(server, base, "F32", lora=lora)
    inputs = {"model": ["model", 0], "lora_name": f"{lora}.gguf", "strength_model": 0.7}
    wanted = run(server, lora=node("LoraLoaderModelOnlyGGUF", **inputs))
    assert metrics.latent_error(run(server, path.name).latent, wanted.latent) < 1e-3
