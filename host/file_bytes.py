# SPDX-License-Identifier: Apache-2.0
"""Parameters whose bytes lie in a mapped file: how they get to the device and back with one copy of them in memory.

- A host with dynamic VRAM reads them from the file itself, to pinned memory or to the device: offer_file_slices().
- A weight on a device knows the one over the map that it was copied from. Where the host moves it back, that one takes
  its place again; nothing is copied out of the device: move().
- Offloaded weights are pinned in a copy, for a map cannot be: on Windows it is read-only, elsewhere each of its pages
  would become a copy that stays when it is unpinned. The copy is made one weight at a time, where the host pins at all
  and RAM is left; it goes when the weight is loaded or unpinned. Otherwise the weight stays in the map: pin(), unpin().
- What was read through the map is given back once a model is on its device: release_pages().
- A file that somebody writes to while it is mapped is noticed before and after each load, and for diffusion models
  before each step: check_files().

With ComfyUI's --disable-mmap no parameter lies in a map, and none of this applies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..mapped_file import MappedFile, file_range
from .compat import as_param, is_quantized, with_bytes, with_dtype

try:
    import comfy.memory_management as host_memory
except ImportError:  # a host without dynamic VRAM
    host_memory = None

# What pinned copies leave free, as newer hosts' own do.
RAM_HEADROOM = 2 << 30
_FILES = "_gguf_files"  # of a model: the maps that its parameters lie in, for check_files()
_HOME = "_gguf_home"  # of a parameter: the one over the map that it is a copy of


def reads_files() -> bool:
    """Whether this host reads weights from their file itself, as it runs now."""
    return hasattr(host_memory, "TensorFileSlice") and bool(getattr(host_memory, "aimdo_enabled", False))


def settle(model: torch.nn.Module) -> None:
    """Let the host read a loaded model's parameters from the file, or copy them out of it if its user wants no maps."""
    if reads_files():
        _replace(model, offer_file_slice)
    elif getattr(comfy.utils, "DISABLE_MMAP", False):
        _replace(model, lambda raw: raw if file_range(raw) is None else raw.clone())
    setattr(model, _FILES, weakref.WeakSet(mapped_files(model)))


def offer_file_slice(raw: torch.Tensor) -> torch.Tensor:
    """The same tensor, with what a host of reads_files() needs to read it from its file, if it lies in one.

    Args:
        raw: bytes of a quantized weight, or a plain tensor. A part of a larger one gets a storage of its own, for the
            host reads whole storages.
    """
    found = file_range(raw)
    opened = None if found is None else found.file.open()
    if found is None or opened is None:
        return raw
    if raw.untyped_storage().nbytes() != found.n_bytes:
        with torch.inference_mode(raw.is_inference()):
            raw = found.tensor().view(raw.dtype).reshape(raw.shape)
    storage: Any = raw.untyped_storage()
    storage._comfy_tensor_file_slice = host_memory.TensorFileSlice(opened, found.file.lock, found.offset, found.n_bytes)
    storage._comfy_tensor_mmap_refs = (found.file,)
    return raw


def move(value: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A parameter moved or converted by `fn`, as Module._apply() does it; one that comes back is the one it was."""
    home: torch.Tensor | None = getattr(value, _HOME, None)
    target = fn(torch.empty(0, dtype=value.dtype, device=value.device))
    stays = target.device == value.device
    if home is not None and not stays and target.device == home.device:
        if home.dtype == target.dtype:
            return home
        if is_quantized(home):
            return as_param(with_dtype(home, target.dtype))
    # The bytes are no floats that could be converted; only what the weight claims to be changes.
    new = fn(value) if not (stays and is_quantized(value)) else with_dtype(value, target.dtype)
    if new is value:
        return value
    moved = as_param(new) if is_quantized(new) else torch.nn.Parameter(new, requires_grad=False)
    if home is None and not stays and file_range(_raw(value)) is not None:
        home = value
    if home is not None:
        setattr(moved, _HOME, home)
    return moved


def pin(value: torch.Tensor) -> torch.Tensor | None:
    """A parameter to take the place of one on the CPU, its bytes pinned by the host; None where they cannot be."""
    raw = _raw(value)
    in_file = file_range(raw) is not None
    if in_file and not _may_copy(raw.nbytes):
        return None
    with torch.inference_mode(raw.is_inference()):
        pinned = raw.clone() if in_file else raw
        if not comfy.model_management.pin_memory(torch.nn.Parameter(pinned, requires_grad=False)):
            return None
    if not in_file:
        return value
    copied = _parameter(value, pinned)
    setattr(copied, _HOME, getattr(value, _HOME, value))
    return copied


def unpin(value: torch.Tensor) -> torch.Tensor:
    """The parameter to take the place of one that pin() gave."""
    home: torch.Tensor | None = getattr(value, _HOME, None)
    unpinned = comfy.model_management.unpin_memory(_raw(value))
    same = home is not None and (home.device, home.dtype) == (value.device, value.dtype)
    return home if unpinned and home is not None and same else value


def own_copy(value: torch.Tensor) -> torch.Tensor:
    """A parameter that may be written to in the place of one that may lie in a map, or come back from there."""
    if not hasattr(value, _HOME) and file_range(_raw(value)) is None:
        return value
    return _parameter(value, _raw(value).clone())


def release_pages(model: torch.nn.Module) -> None:
    """Give back the pages of the map that have been read; what is still used from there is read again."""
    for file in mapped_files(model):
        file.release_pages()


def mapped_files(model: torch.nn.Module) -> set[MappedFile]:
    """The files that a model's parameters lie in, or will come back to."""
    found = (file_range(_raw(getattr(value, _HOME, value))) for _, _, value in _parameters(model))
    return {place.file for place in found if place is not None}


def check_files(model: torch.nn.Module) -> None:
    """Refuse to compute with a model whose file was written to in place since it was loaded.

    Raises:
        BadFile: naming the file.
    """
    files: weakref.WeakSet[MappedFile] = getattr(model, _FILES, weakref.WeakSet())
    for file in files:
        file.check_unchanged()


def _raw(value: Any) -> torch.Tensor:
    raw: torch.Tensor = value._qdata if is_quantized(value) else value
    return raw


def _parameter(like: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """A parameter like another one over other memory, in the mode of that memory."""
    with torch.inference_mode(raw.is_inference()):
        return as_param(with_bytes(like, raw)) if is_quantized(like) else torch.nn.Parameter(raw, requires_grad=False)


def _parameters(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                yield module, name, value


def _replace(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    replaced: dict[int, torch.Tensor] = {}  # modules may share a parameter
    for module, name, value in [*_parameters(model)]:
        raw = _raw(value)
        if id(value) not in replaced:
            changed = change(raw)
            replaced[id(value)] = value if changed is raw else _parameter(value, changed)
        module._parameters[name] = replaced[id(value)]  # type: ignore[assignment]


def _may_copy(n_bytes: int) -> bool:
    """Whether the host would pin so many bytes, and RAM is left for them."""
    host: Any = comfy.model_management
    limit = getattr(host, "MAX_PINNED_MEMORY", 0)
    if limit <= 0:
        return False
    if host.get_free_memory(torch.device("cpu")) - n_bytes < RAM_HEADROOM:
        return False
    make_room = getattr(host, "ensure_pin_registerable", None)  # it may unpin what others have
    return bool(make_room(n_bytes) if make_room is not None else host.TOTAL_PINNED_MEMORY + n_bytes <= limit)
