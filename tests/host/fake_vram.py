# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's dynamic VRAM on a machine without a GPU: the host's own patcher and cast over memory that pretends.

torch.device("cpu", 0) plays the GPU: torch computes on it, and it is not equal to torch.device("cpu"). What comfy_aimdo
does in C (virtual VRAM, pinned memory) is replaced by CPU buffers; every line of the host's Python runs as on a GPU.
"""

from __future__ import annotations

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.pinned_memory
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch

GPU = torch.device("cpu", 0)


class FakeVBAR:
    """Virtual VRAM: `resident` says whether allocations can be faulted in; `evict()` makes the host copy again."""

    resident = True
    generation = 0

    def __init__(self, size, device):
        self.buffers = []

    def prioritize(self):
        pass

    def alloc(self, n_bytes):
        self.buffers.append(torch.full((n_bytes,), 0xAA, dtype=torch.uint8))
        return (self, len(self.buffers) - 1, n_bytes)

    def loaded_size(self):
        return sum(b.numel() for b in self.buffers)

    def free_memory(self, n_bytes):
        return 0

    @classmethod
    def evict(cls):
        cls.generation += 1

    @classmethod
    def fault(cls, allocation):
        return (cls.generation,) if cls.resident else None


class FakeHostBuffer:
    size = 0

    def __init__(self, *sizes):
        pass


def install(monkeypatch):
    """Turn dynamic VRAM on for the test; returns FakeVBAR."""
    FakeVBAR.resident, FakeVBAR.generation = True, 0
    for target, name, value in (
        (comfy_aimdo.model_vbar, "ModelVBAR", FakeVBAR),
        (comfy_aimdo.model_vbar, "vbar_fault", FakeVBAR.fault),
        (comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b),
        (comfy_aimdo.model_vbar, "vbar_unpin", lambda allocation: None),
        (comfy_aimdo.model_vbar, "vbars_analyze", lambda device=None: 0),
        (comfy_aimdo.torch, "aimdo_to_tensor", lambda allocation, device: allocation[0].buffers[allocation[1]]),
        (comfy_aimdo.host_buffer, "HostBuffer", FakeHostBuffer),
        (comfy.pinned_memory, "get_pin", lambda module, subset="weights": None),
        (comfy.pinned_memory, "pin_memory", lambda module, subset="weights", size=None: None),
        (comfy.memory_management, "aimdo_enabled", True),
        (comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic),
        (comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu")),
        (comfy.model_management, "get_torch_device", lambda: GPU),
        (comfy.model_management, "unet_offload_device", lambda: torch.device("cpu")),
        (comfy.model_patcher.ModelPatcherDynamic, "partially_unload_ram", lambda self, n, subsets=(): 0),
    ):
        monkeypatch.setattr(target, name, value)

    cast = comfy.ops.cast_bias_weight

    def cast_on_gpu(s, input=None, dtype=None, device=None, **options):
        if input is not None:
            dtype = dtype or input.dtype
            options.setdefault("bias_dtype", dtype)
        return cast(s, None, dtype=dtype, device=GPU if hasattr(s, "_v") else torch.device("cpu"), **options)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_on_gpu)
    return FakeVBAR
