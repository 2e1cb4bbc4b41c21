# SPDX-License-Identifier: Apache-2.0
"""One copy of a model's bytes in memory: on the device or in the file's map, and beside it only what is pinned.

The device is torch's "meta", which has no values: whatever would be copied out of it fails, but for an empty tensor.
"""

import gc
import weakref

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.host import file_bytes
from gguf_kit.host.compat import is_quantized
from gguf_kit.host.patcher import GGUFPatcher, adopt
from gguf_kit.mapped_file import file_range
from gguf_kit.models.values import read_tensor
from gguf_kit.ops import make_ops
from gguf_kit.service import to_host
from torch.utils._python_dispatch import TorchDispatchMode

META, CPU = torch.device("meta"), torch.device("cpu")
WIDTH = 512
QTYPES = (QType.Q8_0, QType.Q4_0, QType.BF16) * 4  # of one layer each
PART = 2_800_000  # bytes for a part of the stack, with the room that its largest weight takes as floats
LARGE = 100_000  # bytes; every weight of the stack is larger, nothing else is


class EmptyLeavesMeta(TorchDispatchMode):
    """An empty tensor can be moved off a real device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, value = kwargs or {}, args[0] if args else None
        is_empty = isinstance(value, torch.Tensor) and value.device == META and not value.numel()
        if is_empty and kwargs.get("device") == CPU:
            return torch.empty(0, dtype=kwargs.get("dtype") or value.dtype)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def empty_leaves_meta():
    with EmptyLeavesMeta():
        yield


def raw(parameter):
    return parameter._qdata if is_quantized(parameter) else parameter


@pytest.fixture
def path(tmp_path):
    """Square layers of several types, with biases."""
    writer, generator = gguf.GGUFWriter(tmp_path / "stack.gguf", "none"), np.random.default_rng(0)
    for i, qtype in enumerate(QTYPES):
        weight = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32) / 20
        writer.add_tensor(f"{i}.weight", gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
        writer.add_tensor(f"{i}.bias", generator.standard_normal(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "stack.gguf"


def make_patcher(path, load_device=META):
    file, linear = GGUFFile(path), make_ops().Linear
    state = to_host({name: read_tensor(file, name, info) for name, info in file.tensors.items()})
    model = torch.nn.Sequential(*(linear(WIDTH, WIDTH, dtype=torch.float32) for _ in QTYPES))
    model.load_state_dict(state)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device, CPU)
    adopt(patcher, (make_patcher, (path,)))
    assert type(patcher) is GGUFPatcher
    return patcher


def in_file(patcher):
    """Names of the parameters that are views of the file."""
    return {name for name, p in patcher.model.named_parameters() if file_range(raw(p)) is not None}


def ram_bytes():
    """Bytes of all large storages on the CPU that do not lie in a file."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            continue
        try:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
        except RuntimeError:  # sparse, or what a transform wraps: tests of other files leave such tensors
            continue
        if storage.nbytes() > LARGE and not hasattr(storage, "_gguf_origin"):
            found[place] = storage.nbytes()
    return sum(found.values())


class Pins:
    """Stands in for CUDA's pinned memory: what is registered, address -> bytes."""

    def __init__(self, monkeypatch, limit=1 << 40, free_ram=1 << 40):
        self.registered = {}
        management = comfy.model_management
        monkeypatch.setattr(management, "MAX_PINNED_MEMORY", limit)
        monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 0)
        monkeypatch.setattr(management, "PINNED_MEMORY", {})
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(
            management,
            "get_free_memory",
            lambda device, torch_free_too=False: (free_ram,) * 2 if torch_free_too else free_ram,
        )
        monkeypatch.setattr(management, "discard_cuda_async_error", lambda: None, raising=False)

    def cudaHostRegister(self, address, n_bytes, flags):  # noqa: N802
        assert address not in self.registered
        self.registered[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        return 0 if self.registered.pop(address, None) else 1


# -- on a device and back --


def test_unloading_puts_the_bytes_of_the_file_back(path, inference_mode):
    patcher = make_patcher(path)
    before, names = ram_bytes(), in_file(patcher)
    assert names == set(dict(patcher.model.named_parameters()))
    values = patcher.model(torch.ones(1, WIDTH))
    parameters = dict(patcher.model.named_parameters())
    for _ in range(2):
        patcher.partially_load(META, 1e32)
        assert all(p.device == META for p in patcher.model.parameters())
        assert ram_bytes() <= before
        patcher.detach()
        assert ram_bytes() <= before
        assert all(p is parameters[name] for name, p in patcher.model.named_parameters())
    assert torch.equal(patcher.model(torch.ones(1, WIDTH)), values)


def test_a_part_that_is_unloaded_goes_back_to_the_file(path):
    patcher = make_patcher(path)
    before, everything = ram_bytes(), in_file(patcher)
    patcher.partially_load(META, 1e32)
    assert in_file(patcher) == set()
    patcher.partially_unload(CPU, 300_000)
    offloaded = in_file(patcher)
    assert offloaded
    assert offloaded < everything
    assert {p.device for name, p in patcher.model.named_parameters() if name not in offloaded} == {META}
    patcher.partially_load(META, 1e32)
    assert in_file(patcher) == set()
    patcher.detach()
    assert in_file(patcher) == everything
    assert ram_bytes() <= before


def test_conversions_of_a_loaded_model_are_not_undone(path):
    """Where a float weight has another dtype by now, it is copied; a quantized one only claims another."""
    patcher = make_patcher(path, CPU)
    model = patcher.model
    address = model[0].weight._qdata.data_ptr()
    model.to(torch.float64)
    assert model[2].weight.dtype == model[0].weight.dtype == torch.float64
    assert model[0].weight._qdata.data_ptr() == address
    model[0].to(META)
    model[0].to(torch.float16)
    model[0].weight = file_bytes.move(model[0].weight, lambda t: t.to(CPU))
    assert model[0].weight.dtype == torch.float16
    assert model[0].weight._qdata.data_ptr() == address


def test_a_weight_that_was_patched_on_the_device_does_not_come_back_as_the_files(path):
    patcher = make_patcher(path)
    patcher.partially_load(META, 1e32)
    home = patcher.model[2].weight._gguf_home
    patcher.make_writable("2.weight")
    assert not hasattr(patcher.model[2].weight, "_gguf_home")
    assert file_range(home) is not None


def test_the_file_is_let_go_with_the_model(path):
    patcher = make_patcher(path)
    (file,) = map(weakref.ref, file_bytes.mapped_files(patcher.model))
    patcher.partially_load(META, 1e32)
    gc.collect()
    assert file() is not None
    assert file_bytes.mapped_files(patcher.model) == {file()}
    patcher.detach()
    del patcher
    gc.collect()
    assert file() is None


def test_without_maps_nothing_lies_in_the_file(path, monkeypatch):
    values = make_patcher(path, CPU).model(torch.ones(1, WIDTH))
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    patcher = make_patcher(path, CPU)
    assert in_file(patcher) == set()
    assert file_bytes.mapped_files(patcher.model) == set()
    assert torch.equal(patcher.model(torch.ones(1, WIDTH)), values)


def test_pages_are_given_back_after_a_load_to_a_device_only(path, monkeypatch):
    released = []
    monkeypatch.setattr(file_bytes.MappedFile, "release_pages", lambda file: released.append(file.path))
    patcher = make_patcher(path, CPU)
    patcher.partially_load(CPU, 1e32)
    assert not released
    patcher = make_patcher(path)
    patcher.partially_load(META, 1e32)
    assert released == [str(path)]


# -- pinned --


def test_offloaded_weights_are_pinned_in_copies_that_go_when_they_are_loaded(path, monkeypatch, inference_mode):
    patcher = make_patcher(path)
    before, everything, pins = ram_bytes(), in_file(patcher), Pins(monkeypatch)
    patcher.partially_load(META, PART)
    offloaded = {name for name, p in patcher.model.named_parameters() if p.device == CPU}
    assert 0 < len(offloaded) < 2 * len(QTYPES)
    assert patcher.pinned == offloaded
    tensors = {name: raw(dict(patcher.model.named_parameters())[name]) for name in offloaded}
    assert pins.registered == {tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}
    assert not offloaded & in_file(patcher)
    assert ram_bytes() - before == sum(t.nbytes for t in tensors.values() if t.nbytes > LARGE)
    file = GGUFFile(path)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), file.data(name))
    del tensors, tensor
    patcher.partially_load(META, 1e32)
    assert not pins.registered
    assert not patcher.pinned
    assert ram_bytes() <= before
    patcher.partially_unload(CPU, 300_000)
    assert pins.registered
    patcher.detach()
    assert not pins.registered
    assert in_file(patcher) == everything
    assert ram_bytes() <= before


@pytest.mark.parametrize(
    "limits", [{"limit": 0}, {"free_ram": file_bytes.RAM_HEADROOM}], ids=["the host pins nothing", "no RAM left"]
)
def test_where_nothing_can_be_pinned_weights_stay_in_the_file(path, monkeypatch, limits):
    patcher = make_patcher(path)
    before, pins = ram_bytes(), Pins(monkeypatch, **limits)
    patcher.partially_load(META, PART)
    offloaded = {name for name, p in patcher.model.named_parameters() if p.device == CPU}
    assert offloaded == in_file(patcher)
    assert not pins.registered
    assert not patcher.pinned
    assert ram_bytes() <= before


def test_a_weight_that_the_driver_does_not_pin_stays_in_the_file(path, monkeypatch):
    patcher = make_patcher(path)
    before, pins = ram_bytes(), Pins(monkeypatch)
    monkeypatch.setattr(pins, "cudaHostRegister", lambda *args: 1, raising=False)
    patcher.partially_load(META, PART)
    assert not patcher.pinned
    assert ram_bytes() <= before


def test_pinned_weights_that_are_written_to_are_unpinned_first(path, monkeypatch):
    patcher, pins = make_patcher(path), Pins(monkeypatch)
    patcher.partially_load(META, 1)
    n_pinned = len(pins.registered)
    assert n_pinned == 2 * len(QTYPES)
    patcher.make_writable("2.weight")
    assert len(pins.registered) == n_pinned - 1
    parameter = patcher.model[2].weight
    assert file_range(parameter) is None
    parameter.zero_()
    assert GGUFFile(path).data("2.weight").any()
    assert file_bytes.mapped_files(patcher.model).pop().tensor(0, 10**5).any()


# -- a whole model --


@pytest.mark.parametrize("type_name", ["Q4_K_S", "Q8_0"])
def test_results_do_not_depend_on_where_the_bytes_lie(tiny_flux, monkeypatch, type_name):
    path = tiny_flux(type_name)
    in_map = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    in_map.partially_load(CPU, 1e32)
    expected = tiny.run(in_map, load=False)
    pins = Pins(monkeypatch)
    pinned = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    pinned.partially_load(CPU, 1)
    assert len(pins.registered) == len(pinned.pinned) > 30
    assert torch.equal(tiny.run(pinned, load=False), expected)
    pinned.detach()
    assert not pins.registered
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    copied = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    copied.partially_load(CPU, 1)
    assert not in_file(copied)
    assert torch.equal(tiny.run(copied, load=False), expected)
    copied.detach()
    assert not pins.registered


@pytest.mark.parametrize("mode", ["MaxSpeed", "MinVram"])
def test_hooks_on_float_weights_do_not_write_into_the_map(tiny_flux, mode):
    path = tiny_flux("Q4_K_S")
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora(1))
    (file,) = file_bytes.mapped_files(patcher.model)
    patcher.hook_mode, hook, group = comfy.hooks.EnumHookMode[mode], comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    group.add(hook)
    patcher.add_hook_patches(hook, tiny.lora(2) | bias_patches(patcher), 0.6)
    comfy.model_management.load_models_gpu([patcher])
    for hooks in (group, None, group, None):
        patcher.patch_hooks(hooks)
        assert bytes(file[:]) == path.read_bytes()
    patcher.clean_hooks()


def bias_patches(patcher):
    """A difference for a bias and for a norm, which lie in the map as float32."""
    names = [name for name in in_file(patcher) if name.endswith(("img_mlp.0.bias", "query_norm.weight"))]
    assert names
    return {name: ("diff", (torch.ones_like(patcher.model.get_parameter(name)),)) for name in names}


@pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"), reason="this host has no clones for other GPUs"
)
def test_a_clone_for_another_gpu_has_the_same_file_behind_it(tiny_flux):
    path = tiny_flux("Q4_K_S")
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    expected = tiny.run(patcher)
    clone = patcher.deepclone_multigpu(new_load_device=CPU)
    assert type(clone) is GGUFPatcher
    assert clone.model is not patcher.model
    assert in_file(clone) == in_file(patcher)
    assert torch.equal(tiny.run(clone), expected)
