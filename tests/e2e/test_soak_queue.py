# SPDX-License-Identifier: Apache-2.0
"""Prompts queued together and models loaded together in a real server: each gives to the bit what it gives alone."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gguf_kit.demo.server import ComfyServer
from gguf_kit.demo.workflow import Loader, build_timing_workflow, gguf_loader
from safetensors.numpy import load

pytestmark = pytest.mark.e2e

PROMPT, SEED = "red 0", 23
RUNS = itertools.count()
DEFAULTS = {"dequant_dtype": "default", "patch_dtype": "default", "patch_on_device": False}


def advanced(file: str, **options: Any) -> Loader:
    """The advanced loader's node."""
    return Loader("UnetLoaderGGUFAdvanced", {"unet_name": file, **DEFAULTS, **options})


# What differs in file, in options, or in both; "kept" gives the same numbers as "plain".
LOADERS: Mapping[str, Loader] = {
    "plain": gguf_loader("tiny-flux-Q8_0.gguf"),
    "rounded weights": advanced("tiny-flux-Q8_0.gguf", dequant_dtype="bfloat16"),
    "computed in bfloat16": advanced("tiny-flux-Q8_0.gguf", compute_dtype="bfloat16"),
    "kept": advanced("tiny-flux-Q8_0.gguf", keep_dequantized_mb=64),
    "other file": gguf_loader("tiny-flux-Q4_K_S.gguf"),
}


def workflow(name: str) -> dict[str, Any]:
    """Load, sample, save the latent, so named that older hosts do not take its results from their cache."""
    nodes = build_timing_workflow(LOADERS[name], PROMPT, SEED, steps=4)
    nodes["save_latent"]["inputs"]["filename_prefix"] = f"queue{next(RUNS)}"
    return nodes


def run(server: ComfyServer, nodes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Submit a workflow and wait for it; the latent that each of its nodes saved."""
    outputs = server.submit(nodes)["outputs"]
    return {key: load(server.download(saved["latents"][0]))["latent_tensor"] for key, saved in outputs.items()}


def free(server: ComfyServer) -> None:
    """Ask the server to unload all models and forget all results."""
    body = json.dumps({"unload_models": True, "free_memory": True}).encode()
    request = urllib.request.Request(f"{server.url}/free", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60):
        pass


@pytest.fixture(scope="module")
def alone(server: ComfyServer) -> dict[str, np.ndarray]:
    """The latent of each of LOADERS when nothing else is loaded."""
    latents = {}
    for name in LOADERS:
        free(server)
        latents[name] = run(server, workflow(name))["save_latent"]
    return latents


def test_the_options_matter(alone: dict[str, np.ndarray]) -> None:
    different = [name for name in LOADERS if name not in ("plain", "kept")]
    assert not any(np.array_equal(alone[name], alone["plain"]) for name in different)
    assert np.array_equal(alone["kept"], alone["plain"])


def test_prompts_that_wait_in_the_queue_together_give_what_each_gives_alone(server, alone) -> None:
    names = [*LOADERS, *reversed(LOADERS)]
    workflows = [workflow(name) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda nodes: run(server, nodes), workflows))
    for name, latents in zip(names, results, strict=True):
        assert np.array_equal(latents["save_latent"], alone[name]), name


PAIRS = (("plain", "other file"), ("rounded weights", "plain"), ("computed in bfloat16", "kept"))


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_models_in_one_prompt_give_what_each_gives_alone(server, alone, pair: tuple[str, str]) -> None:
    first, second = (workflow(name) for name in pair)
    nodes = dict(first)
    for key in ("model", "sampled", "save_latent"):
        nodes[f"second_{key}"] = {**second[key], "inputs": dict(second[key]["inputs"])}
    nodes["second_sampled"]["inputs"]["model"] = ["second_model", 0]
    nodes["second_save_latent"]["inputs"]["samples"] = ["second_sampled", 0]
    latents = run(server, nodes)
    for name, key in zip(pair, ("save_latent", "second_save_latent"), strict=True):
        assert np.array_equal(latents[key], alone[name]), name
