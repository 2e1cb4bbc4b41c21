# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's dynamic VRAM on a machine without a GPU: the host's own patcher and cast over memory that pretends.

torch.device("cpu", 0) plays the GPU: torch computes on it, and it is not equal to torch.device("cpu"). What comfy_aimdo
does in C (virtual VRAM, pinned memory) is replaced by CPU buffers; the host's Python runs as on a GPU, but for one
branch: where it reads a file to both pinned memory and the device, here the second is a copy of the first.
"""

from __future__ import annotations

import os

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.pinned_memory
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch
from comfy.cli_args import args

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
    """Memory that can be pinned, and that files are read into."""

    def __init__(self, size=0, prewarm=0, max_grow_size=0):
        self.size, self.memory = 0, torch.zeros(int(max_grow_size), dtype=torch.uint8)

    def extend(self, size, reallocate=False, register=True):
        self.size += size

    def truncate(self, size, do_unregister=True):
        self.size = size

    def get_raw_address(self):
        return self.memory.data_ptr()

    def to_tensor(self):
        return self.memory[: self.size]

    def read_file_slice(self, file, file_offset, size, offset=0, stream=0, device_ptr=0, device=None):
        data = bytearray(os.pread(file.fileno(), size, file_offset))
        self.memory[offset : offset + size] = torch.frombuffer(data, dtype=torch.uint8)


class FakeCuda:
    """Registers all memory that it is asked to."""

    def cudaHostRegister(self, address, n_bytes, flags):  # noqa: N802
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        return 0


def install_pins(monkeypatch):
    """Let the host pin all weights that it stages."""
    for target, name, value in (
        (comfy_aimdo.torch, "hostbuf_to_tensor", FakeHostBuffer.to_tensor),
        (torch.cuda, "cudart", FakeCuda),
        (args, "high_ram", True),
        (comfy.model_management, "MAX_PINNED_MEMORY", 1 << 40),
        (comfy.model_management, "TOTAL_PINNED_MEMORY", 0),
    ):
        monkeypatch.setattr(target, name, value)


def record_file_reads(monkeypatch):
    """A list that grows by (offset, n_bytes) of each tensor that the host reads from its file."""
    original, reads = comfy.memory_management.read_tensor_file_slice_into, []

    def read(tensor, destination, stream=None, destination2=None):
        first = destination2 if destination is None else destination
        if not original(tensor, first, stream=stream):
            return False
        if destination is not None and destination2 is not None:
            destination2.copy_(destination)
        if not hasattr(tensor, "_qdata"):
            reads.append(tensor.untyped_storage()._comfy_tensor_file_slice[2:])
        return True

    monkeypatch.setattr(comfy.memory_management, "read_tensor_file_slice_into", read)
    return reads


def install(monkeypatch, pins=False):
    """Turn dynamic VRAM on for the test, with pinned memory or without; returns FakeVBAR."""
    FakeVBAR.resident, FakeVBAR.generation = True, 0
    if pins:
        install_pins(monkeypatch)
    else:
        for name in ("get_pin", "pin_memory"):
            monkeypatch.setattr(comfy.pinned_memory, name, lambda module, subset="weights", size=None: None)
        monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "partially_unload_ram", lambda *args, **kwargs: 0)
    for target, name, value in (
        (comfy_aimdo.model_vbar, "ModelVBAR", FakeVBAR),
        (comfy_aimdo.model_vbar, "vbar_fault", FakeVBAR.fault),
        (comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b),
        (comfy_aimdo.model_vbar, "vbar_unpin", lambda allocation: None),
        (comfy_aimdo.model_vbar, "vbars_analyze", lambda device=None: 0),
        (comfy_aimdo.torch, "aimdo_to_tensor", lambda allocation, device: allocation[0].buffers[allocation[1]]),
        (comfy_aimdo.host_buffer, "HostBuffer", FakeHostBuffer),
        (comfy.memory_management, "aimdo_enabled", True),
        (comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic),
        (comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu")),
        (comfy.model_management, "get_torch_device", lambda: GPU),
        (comfy.model_management, "unet_offload_device", lambda: torch.device("cpu")),
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
