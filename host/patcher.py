# SPDX-License-Identifier: Apache-2.0
"""The host's ModelPatcher for models with quantized weights: patches stay beside the bytes, nothing is requantized.

adopt() turns a freshly loaded patcher into a GGUFPatcher. A dynamic patcher (dynamic VRAM) keeps its class: its weights
are right through the layout and the layers alone. `reload`, given by the nodes, loads the model again where the host
wants a second copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from .compat import accepted, is_quantized, quantized_modules
from .lora import PatchRef
from .native import mark_scaled_fp8
from .plain import make_plain

_CALLBACK_KEY = "gguf_kit"


def quantized_module(model: torch.nn.Module, key: str) -> Any:
    """The module whose quantized weight has this state-dict key, or None."""
    path, _, name = key.rpartition(".")
    if name != "weight":
        return None
    module = model
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module if is_quantized(getattr(module, "weight", None)) else None


class GGUFPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher that leaves quantized weights as they are and lets their layers apply the patches."""

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, **host_options: Any
    ) -> torch.Tensor | None:
        module = quantized_module(self.model, key)
        if module is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, **host_options)
        if host_options.get("return_weight"):
            return module.merged_weight(self.patches.get(key, []), key, device_to)
        module._loaded_patch = PatchRef(key, self.patches) if key in self.patches else None
        return module.weight

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for _, module in quantized_modules(self.model):
                module._loaded_patch = None
        super().unpatch_model(device_to, unpatch_weights)

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The host's list, with the dequantized weight as what an offloaded layer needs on the device."""
        itemsize = compute_dtype(self.model).itemsize
        entries = []
        for entry in super()._load_list(*args, **kwargs):
            offload_bytes, module_bytes, _, module, *_ = entry
            if is_quantized(getattr(module, "weight", None)):
                offload_bytes = module_bytes + module.weight.numel() * itemsize
            entries.append((offload_bytes, *entry[1:]))
        return entries

    # -- hooks: patches that come and go while sampling --

    def patch_hook_weight_to_device(
        self,
        hooks: Any,
        combined_patches: dict[str, Any],
        key: str,
        original_weights: dict[str, Any],
        memory_counter: Any,
    ) -> None:
        module = quantized_module(self.model, key)
        if module is None or key not in combined_patches:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
            return
        module._hook_patch = PatchRef(key, combined_patches)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = (combined_patches, None)

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        module = quantized_module(self.model, key)
        if module is not None:
            module._hook_patch = PatchRef(key, cached_weights[key][0])
            return
        if key not in self.hook_backup:
            # The host writes into the parameter, which may be a read-only view of the file.
            comfy.utils.set_attr_param(self.model, key, comfy.utils.get_attr(self.model, key).clone())
        super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name, module in quantized_modules(self.model):
            if not whitelist_keys_set or f"{name}.weight" in whitelist_keys_set:
                module._hook_patch = None
        super().unpatch_hooks(whitelist_keys_set)


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's activations: what the host chose for a diffusion model, float32 in text encoders."""
    get_dtype = getattr(model, "get_dtype", None)
    return (model.manual_cast_dtype or get_dtype()) if get_dtype is not None else torch.float32


def adopt(patcher: Any, reload: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    """Make a patcher that the host has just built over quantized layers ours, and its clones with it.

    Args:
        patcher: of the host; changed in place.
        reload: (function, arguments), where function(*arguments, disable_dynamic=bool) loads the same model again and
            gives its patcher.
    """
    patcher.cached_patcher_init = reload
    make_plain(patcher.model)
    _convert(patcher)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _CALLBACK_KEY, lambda _, clone: _convert(clone))
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _CALLBACK_KEY, _drop_factors)
    _reserve_memory(patcher.model)
    _save_lazily(patcher.model)
    mark_scaled_fp8(patcher.model)


def _convert(patcher: Any) -> None:
    if type(patcher) is comfy.model_patcher.ModelPatcher:
        patcher.__class__ = GGUFPatcher
        patcher.size = 0  # the host may have measured it before; ask again with exact bytes


def _drop_factors(patcher: Any, unpatch_all: bool = True) -> None:
    """Free LoRA factors that patch_on_device kept; layers that still need them make them again."""
    for _, module in quantized_modules(patcher.model):
        vars(module.base_patch() or module).pop("_gguf_factors", None)


def _reserve_memory(model: Any) -> None:
    """Add the largest weight dequantized, twice for layers that reshape it, to what the host expects a step to need."""
    base = getattr(type(model), "memory_required", None)
    largest = max((m.weight.numel() for _, m in quantized_modules(model)), default=0)
    if base is None or not largest:
        return
    owner = weakref.ref(model)

    def memory_required(*args: Any, **kwargs: Any) -> float:
        return base(owner(), *args, **kwargs) + 2 * largest * compute_dtype(owner()).itemsize

    model.memory_required = memory_required


def _save_lazily(model: Any) -> None:
    """Let nothing but our lazy weights stand for quantized ones in what the host saves.

    Some hosts put the quantized tensor itself there for a layer that is not fully loaded.
    """
    base = getattr(type(model), "state_dict_for_saving", None)
    if base is None or not accepted(base, unet_state_dict=None):  # older hosts save model.state_dict() as it is
        return
    owner = weakref.ref(model)

    def state_dict_for_saving(unet_state_dict: dict[str, Any], **others: Any) -> dict[str, Any]:
        modules = quantized_modules(owner().diffusion_model)
        lazy = {f"{name}.weight": module.lazy_weight() for name, module in modules}
        return base(owner(), unet_state_dict | lazy, **others)

    model.state_dict_for_saving = state_dict_for_saving
