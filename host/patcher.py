# SPDX-License-Identifier: Apache-2.0
"""The host's ModelPatcher for models with quantized weights: patches stay beside the bytes, nothing is requantized.

adopt() turns a freshly loaded patcher into a GGUFPatcher. A dynamic patcher (dynamic VRAM) keeps its class: its weights
are right through the layout and the layers alone. `reload`, given by the nodes, loads the model again where the host
wants a second copy.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import BadFile
from .compat import accepted, is_quantized, quantized_modules
from .file_bytes import check_files, own_copy, pin, release_pages, settle, unpin
from .kept_factors import ExpectedFactors, drop_factors
from .kept_weights import KeptWeights
from .lora import PatchRef, is_patch
from .native import mark_scaled_fp8
from .plain import make_plain
from .product import release_buffers

_CALLBACK_KEY = "gguf_kit"
log = logging.getLogger("gguf_kit")


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

    def model_size(self) -> int:
        """Bytes of the model and of what it keeps dequantized, or will: the host makes room for both alike."""
        loaded = self.model.model_loaded_weight_memory > 0 and not self.model.model_lowvram
        return self.bytes_size() + (_kept(self.model).size() if loaded else _kept_plan(self.model))

    def bytes_size(self) -> int:
        """Bytes of the model alone."""
        return super().model_size()

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for _, module in quantized_modules(self.model):
                module._loaded_patch = None
        super().unpatch_model(device_to, unpatch_weights)

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        """What the host does before a model is used, loaded or not."""
        try:
            check_files(self.model)
        except BadFile:
            self.detach()  # the host does not list it any more, so nothing else would take it off its device
            raise
        return super().partially_load(*args, **kwargs)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> float:
        """Kept weights go first and do not come back before the next load: bytes that are offloaded cost more."""
        freed = _kept(self.model).release(memory_to_free)
        self.model.model_loaded_weight_memory -= freed
        if 0 < memory_to_free <= freed:
            return freed
        freed += super().partially_unload(device_to, memory_to_free - freed, force_patch_weights)
        for _, module in quantized_modules(self.model):
            if any(is_patch(function) for function in module.weight_function):
                module._loaded_patch = None  # the host has taken its place, and the factors that it kept are freed
        return freed

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

    # -- offloaded weights: what of the file is pinned is a copy of its bytes --

    def pin_weight_to_device(self, key: str) -> None:
        pinned = pin(comfy.utils.get_attr(self.model, key))
        if pinned is not None:
            set_parameter(self.model, key, pinned)
            self.pinned.add(key)

    def unpin_weight(self, key: str) -> None:
        if key in self.pinned:
            set_parameter(self.model, key, unpin(comfy.utils.get_attr(self.model, key)))
            self.pinned.remove(key)

    def make_writable(self, key: str) -> None:
        """Give a float weight memory of its own: the host is about to write into it."""
        self.unpin_weight(key)
        set_parameter(self.model, key, own_copy(comfy.utils.get_attr(self.model, key)))

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
            if key in combined_patches:
                self.make_writable(key)
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
            return
        module._hook_patch = PatchRef(key, combined_patches)
        _prepare_module(self, module, self.load_device)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = (module._hook_patch, None)

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        module = quantized_module(self.model, key)
        if module is not None:
            module._hook_patch = cached_weights[key][0]
            return
        self.make_writable(key)
        super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name, module in quantized_modules(self.model):
            if not whitelist_keys_set or f"{name}.weight" in whitelist_keys_set:
                module._hook_patch = None
        super().unpatch_hooks(whitelist_keys_set)


def set_parameter(model: torch.nn.Module, key: str, value: torch.Tensor) -> None:
    """Put a parameter in the place of the one with this state-dict key."""
    path, _, name = key.rpartition(".")
    model.get_submodule(path)._parameters[name] = value  # type: ignore[assignment]


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's activations: what the host chose for a diffusion model, float32 in text encoders."""
    get_dtype = getattr(model, "get_dtype", None)
    return (model.manual_cast_dtype or get_dtype()) if get_dtype is not None else torch.float32


def adopt(patcher: Any, reload: tuple[Callable[..., Any], tuple[Any, ...]], keep_bytes: int = 0) -> None:
    """Make a patcher that the host has just built over quantized layers ours, and its clones with it.

    Args:
        patcher: of the host; changed in place.
        reload: (function, arguments), where function(*arguments, disable_dynamic=bool) loads the same model again and
            gives its patcher.
        keep_bytes: of weights that may stay dequantized where there is room when the whole model is loaded.
    """
    patcher.cached_patcher_init = reload
    make_plain(patcher.model)
    settle(patcher.model)
    patcher.model._gguf_kept = KeptWeights(patcher.model, keep_bytes)
    _convert(patcher)
    expected = ExpectedFactors(patcher, any(m.options.patch_on_device for _, m in quantized_modules(patcher.model)))
    patcher.model._gguf_expected = expected
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _CALLBACK_KEY, _convert_clone)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _CALLBACK_KEY, lambda _, clone: expected.add(clone))
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY, _check_loaded)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY, _prepare_patches)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY, _keep_weights)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _CALLBACK_KEY, _release_pages)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _CALLBACK_KEY, _drop_factors)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _CALLBACK_KEY, _drop_kept)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, _CALLBACK_KEY, _drop_kept_of_dynamic)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _CALLBACK_KEY, _check_step)
    _reserve_memory(patcher.model, not isinstance(patcher, GGUFPatcher), expected)
    _save_lazily(patcher.model)
    mark_scaled_fp8(patcher.model)


def _check_loaded(patcher: Any, *others: Any) -> None:
    """After a load: what was read may have come from a file that was just being written."""
    check_files(patcher.model)


def _check_step(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a step of sampling: some seconds may have passed since the load, or the host has loaded by itself."""
    check_files(executor.class_obj)
    return executor(*args, **kwargs)


def _convert_clone(patcher: Any, clone: Any) -> None:
    clone.size = patcher.size  # the host passes model_size() on, which is more where weights are kept
    _convert(clone)


def _convert(patcher: Any) -> None:
    if type(patcher) is comfy.model_patcher.ModelPatcher:
        patcher.__class__ = GGUFPatcher
        patcher.size = 0  # the host may have measured it before; ask again with exact bytes


def _prepare_patches(patcher: Any, device_to: Any, *others: Any) -> None:
    """After a load: make the factors of LoRAs now. Steps may run in a compiled or captured graph, which makes none."""
    for _, module in quantized_modules(patcher.model):
        _prepare_module(patcher, module, device_to)
    patcher.model._gguf_expected.made(patcher)


def _prepare_module(patcher: Any, module: Any, device: Any) -> None:
    if device is not None and hasattr(patcher.model, "get_dtype"):  # text encoders do not say what they compute in
        module.prepare_patches(device, compute_dtype(patcher.model))


def _drop_factors(patcher: Any, unpatch_all: bool = True) -> None:
    """Free the factors of LoRAs when a model leaves its device; a clone that takes its place may have the same ones."""
    if unpatch_all:
        patcher.model._gguf_expected.made(None)
        for _, module in quantized_modules(patcher.model):
            drop_factors(module.base_patch())
            drop_factors(module._hook_patch)


def _release_pages(patcher: Any, device_to: Any, *others: Any) -> None:
    """After a load to a device: what was read through the map is there now. Under dynamic VRAM the host does it."""
    if isinstance(patcher, GGUFPatcher) and not comfy.model_management.is_device_cpu(device_to):
        release_pages(patcher.model)


def _kept(model: Any) -> KeptWeights:
    kept: KeptWeights = model._gguf_kept
    return kept


def _kept_plan(model: Any) -> int:
    return _kept(model).planned(compute_dtype(model))


def _keep_weights(patcher: Any, device_to: Any, usable: float, force_patch_weights: bool, full_load: bool) -> None:
    """After a load: keep weights dequantized in what is left beside all of the model's bytes.

    Args:
        usable: bytes that the host gave a model that is not fully loaded.
    """
    model, kept, host = patcher.model, _kept(patcher.model), comfy.model_management
    if not kept.budget:
        return
    room = host.get_free_memory(device_to) + kept.size() - host.minimum_inference_memory()
    is_classic = isinstance(patcher, GGUFPatcher)
    if not is_classic:  # dynamic VRAM: it loads bytes as they are used
        room -= max(0, patcher.model_size() - patcher.loaded_size())
    elif model.model_lowvram:
        room = 0
    elif not full_load:
        room = min(room, usable - model.model_loaded_weight_memory)
    try:
        kept.fill(device_to, compute_dtype(model), room)
    except host.OOM_EXCEPTION:
        kept.release(math.inf)
        log.warning("No memory to keep weights dequantized on %s: they are dequantized as they are used.", device_to)
    if is_classic and not model.model_lowvram:
        loaded = patcher.bytes_size() if full_load else model.model_loaded_weight_memory
        model.model_loaded_weight_memory = loaded + kept.size()


def _drop_kept_of_dynamic(patcher: Any) -> None:
    """After a run: a dynamic patcher has no other moment to give kept weights back. The next load makes them again."""
    if not isinstance(patcher, GGUFPatcher):
        _kept(patcher.model).release(math.inf)


def _drop_kept(patcher: Any, unpatch_all: bool = True) -> None:
    """Free kept weights, unless a clone goes on with them, and the memory that is held for dequantizing on a CPU."""
    if unpatch_all:
        _kept(patcher.model).release(math.inf)
        release_buffers()


def _reserve_memory(model: Any, is_dynamic: bool, expected: ExpectedFactors) -> None:
    """Add what the host does not know of to what it expects a step to need.

    That is the largest weight dequantized, twice for layers that reshape it, the factors of LoRAs that are yet to be
    made, and under dynamic VRAM what is yet to be kept dequantized.
    """
    base = getattr(type(model), "memory_required", None)
    largest = max((m.weight.numel() for _, m in quantized_modules(model)), default=0)
    if base is None or not largest:
        return
    owner = weakref.ref(model)

    def memory_required(*args: Any, **kwargs: Any) -> float:
        dtype = compute_dtype(owner())
        pending = max(0, _kept_plan(owner()) - _kept(owner()).size()) if is_dynamic else 0
        pending += expected.pending(owner(), dtype)
        return base(owner(), *args, **kwargs) + 2 * largest * dtype.itemsize + pending

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
