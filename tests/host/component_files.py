# SPDX-License-Identifier: Apache-2.0
"""GGUF files of small VAEs, ControlNets, LoRAs and the like, and the weights that a host should compute with."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import gguf
import make_files
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import nodes, nodes_components

import nodes as host_nodes

Weights = dict[str, torch.Tensor]
TAE = Path(make_files.MODEL).parent


def random_weights(shapes: Mapping[str, Iterable[int]], seed: int = 0) -> Weights:
    """Weights that keep activations near 1, float32; vectors are near 1 in norms and near 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape), generator=generator)
        fan_in = max(16, value[0].numel()) if value.ndim > 1 else 100
        weights[key] = value / fan_in**0.5 + (value.ndim == 1 and "norm" in key and key.endswith("weight"))
    return weights


def module_weights(module: torch.nn.Module, seed: int = 0) -> Weights:
    """random_weights() for all parameters and the buffers that are saved."""
    return random_weights({key: value.shape for key, value in module.state_dict().items()}, seed)


def write_gguf(path: Any, weights: Weights, metadata: Mapping[str, str] | None = None, tag: str = "pig") -> Weights:
    """Write matrices as Q8_0 and Q4_K by turns, kernels as F16 and vectors as F32; what they dequantize to.

    A kernel whose values for one output fill blocks is stored as a Q8_0 matrix with its shape beside it.
    """
    writer, exact, n_quantized = gguf.GGUFWriter(path, tag), {}, 0
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for key, weight in weights.items():
        values = weight.float().numpy()
        row = values[0].size if values.ndim > 1 and key.endswith(".weight") else 0
        if row and row % 32 == 0:
            qtype = QType.Q4_K if row % 256 == 0 and n_quantized % 2 else QType.Q8_0
            data = make_files.quantize_with_ggml(values.reshape(len(values), row), qtype)
            n_quantized += 1
            if values.ndim > 2:
                writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(n) for n in values.shape])
            writer.add_tensor(key, data, raw_dtype=qtype)
            exact[key] = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy()).reshape(values.shape)
            continue
        values = values if values.ndim < 2 else values.astype(np.float16)
        writer.add_tensor(key, np.atleast_1d(values))
        exact[key] = torch.from_numpy(np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def copies(weights: Weights) -> Weights:
    """A state dict that the host may empty and compute in."""
    return {key: value.clone() for key, value in weights.items()}


def tiny_autoencoder() -> Weights:
    """The tiny VAE of Flux, as the host's loader joins it from two files."""
    from safetensors.torch import load_file

    state = {"vae_scale": torch.tensor([0.3611]), "vae_shift": torch.tensor([0.1159])}
    for part in ("encoder", "decoder"):
        state |= {f"taesd_{part}.{k}": v for k, v in load_file(TAE / f"taef1_{part}.safetensors").items()}
    return state


def load_host_node(node_id: str, module: str) -> Any:
    """A node of the host that its server loads when it starts, from a file of comfy_extras."""
    if node_id not in host_nodes.NODE_CLASS_MAPPINGS:
        path = Path(host_nodes.__file__).parent / "comfy_extras" / f"{module}.py"
        asyncio.run(host_nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    return host_nodes.NODE_CLASS_MAPPINGS[node_id]


def module_of(node: Any) -> Any:
    """The module that a node's class is defined in."""
    return sys.modules[node.__module__]


def search_in(monkeypatch: Any, folder: Path) -> Path:
    """Let all loaders of components look in one folder."""
    for node, _ in nodes_components.NODES:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, node.KEY, ([str(folder)], {".gguf"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


def load(node_id: str, **inputs: Any) -> Any:
    """First output of a node of ours."""
    node = nodes.NODE_CLASS_MAPPINGS[node_id]()
    return getattr(node, node.FUNCTION)(**inputs)[0]
