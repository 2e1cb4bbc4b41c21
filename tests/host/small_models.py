# SPDX-License-Identifier: Apache-2.0
"""Small models of every architecture that a host can build: files for the pack, weights for the host, inputs for both.

A row names the host's class and the arguments that build it. Where the host reads an argument from shapes, the row
gives a small value, and detection has to find it again. What detection states whatever the shapes are (`fixed`) is
made small as well, in detection's answer.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import gguf
import numpy as np
import torch

Shape = tuple[int, ...]
Weights = dict[str, torch.Tensor]
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


@dataclass(frozen=True)
class Integers:
    """Random integers below `high`."""

    shape: Shape
    high: int


@dataclass(frozen=True)
class Small:
    """A small model.

    Attributes:
        host_class: name in comfy.supported_models.
        title: of the pack's entry (models/arch_table.py).
        found: arguments that the host reads from keys and shapes.
        fixed: arguments that the host knows beforehand, made small.
        latent: shape of the noisy input.
        context: shape of the text, None without.
        conditions: what else a forward needs: a shape for random numbers, Integers, or the value itself.
        extra: tensors beside the class's own that tell its kind.
        prefix: what keys in files begin with.
        newer_than: a class that hosts which build this have, where its own class is older than that.
        metadata: what the file carries along from its safetensors file; the host's detection reads `config`.
        shrink: what stands in place of the host's own ("module:name"), where its class takes no arguments to be small.
        stated: what the host's class says of itself to be told by, made small.
        is_network: the host's nodes call the network itself, not apply_model, and get a dictionary of results.
    """

    host_class: str
    title: str
    found: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    latent: Shape = (1, 16, 8, 8)
    context: Shape | None = (1, 3, 64)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Shape] = field(default_factory=dict)
    prefix: str = ""
    newer_than: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    shrink: Mapping[str, Any] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    is_network: bool = False

    @property
    def known(self) -> bool:
        """Whether this host has the class."""
        return all(
            hasattr(comfy.supported_models, name) for name in (self.host_class, self.newer_than or self.host_class)
        )


@torch.no_grad()  # some write into their parameters
def build_network(small: Small, operations: Any = None) -> torch.nn.Module:
    """The host's network with given operations; an older host's has fewer arguments, those it refuses are left out."""
    arguments = {**small.found, **small.fixed}
    while True:
        config = getattr(comfy.supported_models, small.host_class)(dict(arguments))
        config.set_inference_dtype(torch.float32, None)
        config.custom_operations = operations
        try:
            state = {key: torch.zeros(shape) for key, shape in small.extra.items()}
            return config.get_model(state, "", device=torch.device("cpu")).diffusion_model
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            arguments.pop(unknown[1])


def build_shapes(small: Small) -> tuple[dict[str, Shape], set[str]]:
    """Keys and shapes of the host's own model, and which of them are matrices of layers."""
    model = build_network(small)
    layers = {f"{small.prefix}{name}.weight" for name, module in model.named_modules() if _is_layer(module)}
    shapes = {small.prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return {**shapes, **small.extra}, layers


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether some program's file has it quantized: any matrix or table, whoever makes the module and reads it."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding))


def make_file(small: Small, path: Any, tag: str | None = None, seed: int = 0) -> Weights:
    """Write a file of random weights: matrices quantized, vectors F32, the rest F16; return them as float32."""
    shapes, layers = build_shapes(small)
    writer, weights = gguf.GGUFWriter(path, tag or "none"), {}
    if tag is None:
        writer.kv_data[0].pop("general.architecture")
    for name, text in small.metadata.items():
        writer.add_string(name, text)
    for i, (key, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng(i + seed * len(shapes))
        if not math.prod(shape):  # a mark; ggml has no empty tensors
            weights[key] = torch.empty(shape)
            writer.add_tensor(key, np.zeros(1, np.float32))
            continue
        if key in layers and shape[1] % 32 == 0:
            qtype = (Q8_0, Q4_0)[i % 2]
            data = _random_blocks(rng, shape, qtype)
            weights[key] = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy())
            writer.add_tensor(key, data, raw_dtype=qtype)
            continue
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(max(math.prod(shape[1:]), 16)))
        values = values if len(shape) == 1 else values.astype(np.float16)
        values = np.abs(values) if key.endswith("running_var") else values
        weights[key] = torch.from_numpy(np.asarray(values, np.float32))
        writer.add_tensor(key, np.atleast_1d(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _random_blocks(rng: np.random.Generator, shape: Shape, qtype: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of blocks with random bits and one scale that keeps activations near 1, in place of quantizing."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    d = np.float16((0.013 if qtype == Q8_0 else 0.2) / math.sqrt(shape[1]))
    blocks[..., :2] = np.frombuffer(d.tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


def narrow_detection(monkeypatch: Any, small: Small) -> list[dict[str, Any]]:
    """Let the host have the row's `fixed` values from now on; the list will have what detection found by itself."""
    for place, value in small.shrink.items():
        module, _, name = place.partition(":")
        monkeypatch.setattr(importlib.import_module(module), name, value, raising=False)
    host_class = getattr(comfy.supported_models, small.host_class)
    constants = {key: small.fixed.get(key, value) for key, value in host_class.unet_extra_config.items()}
    monkeypatch.setattr(host_class, "unet_extra_config", constants)
    monkeypatch.setattr(host_class, "unet_config", {**host_class.unet_config, **small.stated})
    detect, answers = comfy.model_detection.detect_unet_config, []

    def detect_narrow(*positional: Any, **named: Any) -> Any:
        config = detect(*positional, **named)
        answers.append(dict(config) if config else {})
        return config and {**config, **small.fixed}

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_narrow)
    return answers


def host_model(weights: Weights, metadata: Mapping[str, str] | None = None) -> Any:
    """The host's own model of float weights, in float32."""
    load = comfy.sd.load_diffusion_model_state_dict
    given = {"metadata": dict(metadata)} if metadata and "metadata" in inspect.signature(load).parameters else {}
    patcher = load(dict(weights), model_options={"dtype": torch.float32}, **given)
    # As newer hosts do. With a weight that asks for gradients torch may add the products up in another order.
    patcher.model.requires_grad_(False)
    return patcher


def _value(wanted: Any, generator: torch.Generator) -> Any:
    if isinstance(wanted, Integers):
        return torch.randint(0, wanted.high, wanted.shape, generator=generator)
    if isinstance(wanted, tuple):
        return torch.randn(wanted, generator=generator)
    return wanted


def forward(patcher: Any, small: Small) -> torch.Tensor:
    """One apply_model on random inputs, the same for every model of a row."""
    generator = torch.Generator().manual_seed(1)
    comfy.model_management.load_models_gpu([patcher])
    x = torch.randn(small.latent, generator=generator)
    context = None if small.context is None else torch.randn(small.context, generator=generator)
    conditions = {name: _value(wanted, generator) for name, wanted in small.conditions.items()}
    t = torch.full((small.latent[0],), 0.5)
    with torch.inference_mode():
        if small.is_network:
            return _flat(patcher.model.diffusion_model(x, **conditions))
        return patcher.model.apply_model(x, t, c_crossattn=context, **conditions)


def _flat(results: Any) -> torch.Tensor:
    """All numbers of a network's results (a dictionary or list of tensors), one after the other."""
    if torch.is_tensor(results):
        return results.flatten().float()
    parts = results.values() if isinstance(results, dict) else results
    return torch.cat([_flat(part) for part in parts])
