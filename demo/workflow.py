# SPDX-License-Identifier: Apache-2.0
"""The workflow of the demo and the tests in ComfyUI's API form, and what comes back from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load

from . import tiny_flux
from .server import ComfyServer, WorkflowError, execution_seconds

Workflow = dict[str, Any]


@dataclass(frozen=True)
class Loader:
    """A node that turns a file into a MODEL.

    Attributes:
        node: class id.
        inputs: its inputs, the file among them.
    """

    node: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one run of a workflow gave.

    Attributes:
        latent: float32 (1, 16, height, width), as VAE Decode takes it.
        picture: float32 (height, width, 3) in [0, 1], before it was rounded to 8 bits.
        png: the picture as ComfyUI's own SaveImage wrote it.
    """

    latent: np.ndarray
    picture: np.ndarray
    png: bytes


def gguf_loader(file: str) -> Loader:
    """The pack's loader node for a file name as the node lists it."""
    return Loader("UnetLoaderGGUF", {"unet_name": file})


def safetensors_loader(file: str) -> Loader:
    """ComfyUI's own loader node, the reference."""
    return Loader("UNETLoader", {"unet_name": file, "weight_dtype": "default"})


def build_workflow(loader: Loader, prompt: str, seed: int, steps: int = tiny_flux.STEPS) -> Workflow:
    """Load, sample one picture of the tiny Flux, decode it, and save picture and latent."""
    return {
        **_sampling_nodes(loader, prompt, seed, steps),
        "vae": _node("VAELoader", vae_name="taef1"),
        "picture": _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "save_picture": _node("SaveImage", images=["picture", 0], filename_prefix="picture"),
        "save_tensor": _node("SaveImageTensor", images=["picture", 0], filename_prefix="tensor"),
    }


def build_collecting_workflow(loader: Loader, prompt: str, seed: int, batch: int, options: dict[str, Any]) -> Workflow:
    """Sample a batch while the node "GGUF Imatrix Collector" records, decode nothing; options: the node's inputs."""
    workflow = _sampling_nodes(loader, prompt, seed, tiny_flux.STEPS)
    workflow["collector"] = _node("ImatrixCollectorGGUF", model=["model", 0], **options)
    workflow["sampled"]["inputs"]["model"] = ["collector", 0]
    workflow["empty"]["inputs"]["batch_size"] = batch
    return workflow


def build_timing_workflow(loader: Loader, prompt: str, seed: int, steps: int) -> Workflow:
    """Load and sample as build_workflow does, but decode nothing."""
    return _sampling_nodes(loader, prompt, seed, steps)


def run_workflow(server: ComfyServer, workflow: Workflow) -> Result:
    """Submit a workflow of build_workflow and fetch its results.

    Raises:
        WorkflowError: a node failed, or the last run was the same and ComfyUI answers from its cache, without outputs.
    """
    outputs = server.submit(workflow)["outputs"]
    if "save_latent" not in outputs:
        raise WorkflowError("nothing was executed, ComfyUI found all of it in its cache")
    latent = load(server.download(outputs["save_latent"]["latents"][0]))["latent_tensor"]
    picture = load(server.download(outputs["save_tensor"]["tensors"][0]))["images"][0]
    return Result(latent, picture, server.download(outputs["save_picture"]["images"][0]))


def seconds_per_step(server: ComfyServer, loader: Loader, repeats: int = 3, steps: tuple[int, int] = (4, 36)) -> float:
    """Median time of one sampling step, in seconds.

    Two runs with a loaded model differ only in their number of steps; the difference of their times by the server's
    clock, divided by the difference in steps, holds no loading, decoding, saving or polling.
    """
    prompt, times = next(iter(tiny_flux.SEEDS)), []
    for repeat in range(repeats):
        few, many = (
            execution_seconds(server.submit(build_timing_workflow(loader, prompt, 1000 + repeat, n))) for n in steps
        )
        times.append((many - few) / (steps[1] - steps[0]))
    return float(np.median(times))


def _sampling_nodes(loader: Loader, prompt: str, seed: int, steps: int) -> Workflow:
    size = tiny_flux.PICTURE_SIZE
    return {
        "model": _node(loader.node, **loader.inputs),
        "prompt": _node("TinyFluxConditioning", prompt=prompt),
        "empty": _node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampled": _node(
            "KSampler",
            model=["model", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "save_latent": _node("SaveLatent", samples=["sampled", 0], filename_prefix="latent"),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
