# SPDX-License-Identifier: Apache-2.0
"""Weights that a host uses without our layers: made plain floats of the model's dtype once a model is loaded.

Modules that a host builds itself (torch's own, or with a bare parameter called weight) compute from floats. Some of its
classes also round what they are given to the dtype of a layer's weight, which has to be the model's then.
"""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import Any

import torch

from ..errors import name_list
from .compat import dequantize_weight, filled_from_quantized, is_quantized
from .layer import QuantizedLayer
from .lora import MODEL_PREFIX

log = logging.getLogger("gguf_kit")

# Class of a host (below comfy.ldm) -> its layers whose weight's dtype it reads.
READ_DTYPES = MappingProxyType(
    {
        "cogvideo.model:CogVideoXPatchEmbed": ("proj", "text_proj"),
        "depth_anything_3.camera:CameraEnc": ("pose_branch.fc1",),
        "hunyuan3dv2_1.hunyuandit:TimestepEmbedder": ("mlp.0",),
        "lumina.model:SimpleMLPAdaLN": ("cond_embed",),
        "triposplat.model:TimestepEmbedder": ("mlp.0",),
    }
)


def make_plain(model: torch.nn.Module) -> list[str]:
    """Make floats of a loaded model's weights where the host needs them; names of those that were quantized."""
    found = []
    for path, module in model.named_modules():
        for layer in READ_DTYPES.get(_class_name(module), ()):
            _take_model_dtype(module.get_submodule(layer))
        if _is_ours(module):
            continue
        for name, value in module.named_parameters(recurse=False):
            if is_quantized(value):
                dtype = getattr(module, f"{name}_comfy_model_dtype", None) or torch.get_default_dtype()
                module._parameters[name] = torch.nn.Parameter(dequantize_weight(value, dtype), requires_grad=False)
            elif not filled_from_quantized(value):
                continue
            found.append(f"{path}.{name}".removeprefix(MODEL_PREFIX))
    if found:
        log.info("ComfyUI computes with these weights itself, so they were dequantized: %s", name_list(found))
    return found


def _is_ours(module: Any) -> bool:
    return isinstance(module, QuantizedLayer)


def _class_name(module: Any) -> str:
    return f"{type(module).__module__.removeprefix('comfy.ldm.')}:{type(module).__name__}"


def _take_model_dtype(layer: Any) -> None:
    """Round a float weight of the file to the model's dtype, as the host does with every weight that it loads."""
    weight, dtype, is_ours = layer.weight, getattr(layer, "weight_comfy_model_dtype", None), _is_ours(layer)
    if is_ours and not is_quantized(weight) and dtype not in (None, weight.dtype):
        layer._parameters["weight"] = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
