# SPDX-License-Identifier: Apache-2.0
"""Under dynamic VRAM the host reads weights from the file itself; what comes out equals the classic path to the bit."""

import shutil

import comfy.model_management
import comfy.model_patcher
import pytest
import tiny
import torch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.host import file_bytes
from gguf_kit.host.compat import is_quantized
from gguf_kit.mapped_file import MappedFile

DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
pytestmark = pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")


def load(patcher):
    patcher.partially_load(patcher.load_device)


def run(patcher):
    return tiny.run(patcher, load=False)


def wipe_map(patcher):
    """Zeros in place of the staged weights and biases in the map; the file stays as it is."""
    staged = [module for module in patcher.model.modules() if hasattr(module, "_v")]
    for module in staged:
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                (parameter._qdata if is_quantized(parameter) else parameter).zero_()
    return staged


@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
@pytest.mark.parametrize("pins", [True, False], ids=["pinned", "not pinned"])
def test_weights_come_from_the_file_and_results_are_those_of_the_classic_path(tiny_flux, monkeypatch, pins, resident):
    import fake_vram

    path, patches = tiny_flux("Q4_K_S"), (tiny.lora(), tiny.split_lora())
    classic = tiny.run(tiny.with_patches(tiny.quantized_model(path), *patches))
    vbar, reads = fake_vram.install(monkeypatch, pins), fake_vram.record_file_reads(monkeypatch)
    vbar.resident = resident
    patcher = tiny.with_patches(tiny.quantized_model(path), *patches)
    assert patcher.is_dynamic()
    load(patcher)
    staged = wipe_map(patcher)
    assert len(staged) > 32
    for _ in range(2):
        assert torch.equal(run(patcher), classic)
        vbar.evict()
    names = {name: module for name, module in patcher.model.diffusion_model.named_modules() if module in staged}
    file = GGUFFile(path)
    wanted = {f"{name}.{last}" for name in names for last in ("weight", "bias")} & {*file.tensors}
    assert {(file.tensors[name].offset, file.tensors[name].n_bytes) for name in wanted} <= {*reads}
    assert {file.tensors[name].qtype.name for name in wanted} >= {"Q4_K", "BF16", "F32"}
    assert (len({*reads}) == len(reads)) == pins  # what is pinned is read once
    patcher.unpatch_model(patcher.offload_device)


def test_results_are_right_where_the_file_cannot_be_read_again(tiny_flux, monkeypatch, tmp_path):
    import fake_vram

    path = tmp_path / "model.gguf"
    shutil.copyfile(tiny_flux("Q4_K_S"), path)
    classic = tiny.run(tiny.quantized_model(path))
    monkeypatch.setattr(MappedFile, "open", lambda file: None)
    fake_vram.install(monkeypatch)
    reads = fake_vram.record_file_reads(monkeypatch)
    patcher = tiny.quantized_model(path)
    load(patcher)
    assert torch.equal(run(patcher), classic)
    assert not reads


def test_only_what_lies_in_the_file_as_it_is_used_is_read_from_there(tiny_flux, monkeypatch):
    import comfy.memory_management
    import fake_vram

    fake_vram.install(monkeypatch)
    file = GGUFFile(tiny_flux("Q4_K_S"))
    whole = file.data("double_blocks.0.img_attn.qkv.weight").view(768, -1)
    bias = file.data("double_blocks.0.img_attn.qkv.bias").view(torch.float32)
    part, floats = file_bytes.offer_file_slice(whole[256:512]), file_bytes.offer_file_slice(bias[100:])
    copied = file_bytes.offer_file_slice(whole.clone())
    read = comfy.memory_management.read_tensor_file_slice_into
    for tensor, is_read in ((part, True), (floats, True), (copied, False), (whole, False)):
        expected, out = tensor.clone(), torch.empty_like(tensor)
        if is_read:
            tensor.zero_()
        assert read(tensor, out) == is_read
        assert not is_read or torch.equal(out, expected)


def test_what_the_host_read_through_the_map_is_given_back(tiny_flux, monkeypatch):
    import fake_vram

    fake_vram.install(monkeypatch)
    patcher, bounced = tiny.quantized_model(tiny_flux("Q4_K_S")), []
    monkeypatch.setattr(MappedFile, "bounce", lambda file: bounced.append(file.path))
    weight = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    part, destination = weight[:256], torch.empty(weight._qdata.nbytes, dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([part], destination)
    assert torch.equal(destination[: part._qdata.nbytes], part._qdata.reshape(-1))
    comfy.model_management.reset_cast_buffers()
    assert str(tiny_flux("Q4_K_S")) in bounced  # and of earlier tests what the host had not given back


# -- copies of the model --


@pytest.mark.parametrize("how", ["for another GPU", "deep", "classic"])
def test_copies_of_a_dynamic_model_have_weights_of_their_own(tiny_flux, monkeypatch, how):
    import fake_vram

    path = tiny_flux("Q4_K_S")
    classic = tiny.run(tiny.with_patches(tiny.quantized_model(path), tiny.lora()))
    fake_vram.install(monkeypatch)
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    load(patcher)
    if how == "for another GPU":
        copied = patcher.deepclone_multigpu(new_load_device=fake_vram.GPU)
    else:
        copied = patcher.clone(force_deepcopy=how == "deep", disable_dynamic=how == "classic")
    assert copied.model is not patcher.model
    assert copied.is_dynamic() == (how != "classic")
    if copied.is_dynamic():
        load(copied)
    else:
        copied.patch_model(tiny.CPU)
    assert torch.equal(run(copied), classic)
    load(patcher)
    assert torch.equal(run(patcher), classic)


def test_a_step_reserves_what_it_does_on_the_classic_path(tiny_flux, monkeypatch):
    import fake_vram

    path, shape = tiny_flux("Q4_K_S"), [2, 16, 16, 16]
    classic_patcher = tiny.quantized_model(path)
    classic = classic_patcher.model.memory_required(shape)
    fake_vram.install(monkeypatch)
    patcher = tiny.quantized_model(path)
    load(patcher)
    assert patcher.model.memory_required(shape) == classic
    assert patcher.memory_required(shape) > 1.3 * classic
