# SPDX-License-Identifier: Apache-2.0
"""Saving and cloning a GGUF model in the host gives float weights with the patches merged."""

import copy

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import tiny
import torch
from gguf_kit.host.compat import quantized_modules
from gguf_kit.host.lazy_weight import LazyWeight
from gguf_kit.ops import make_ops


def test_save_and_load_again_equals_the_merged_model(tiny_flux, tmp_path, inference_mode):
    """What the nodes ModelSave and CheckpointSave do."""
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.lora(), tiny.split_lora())
    expected = tiny.run(patcher)
    path = tmp_path / "merged.safetensors"
    comfy.sd.save_checkpoint(str(path), patcher)
    saved = safetensors.torch.load_file(path)
    assert len(saved) >= 96
    assert all(tensor.is_floating_point() for tensor in saved.values())
    loaded = comfy.sd.load_diffusion_model_state_dict(saved, model_options={"dtype": torch.float32})
    assert tiny.relative(tiny.run(loaded), expected) < 1e-6
    assert torch.equal(tiny.run(patcher), expected)


def test_saving_a_partly_loaded_model(tiny_flux):
    """Where the host's patcher has a part in saving, layers that are not on the device take a way of their own."""
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.lora())
    dense = tiny.with_patches(tiny.float_model(tiny_flux("Q4_K_S")), tiny.lora())
    tiny.run(dense)
    by_patcher = hasattr(patcher, "state_dict_for_saving")  # other hosts patch all weights before they save
    patcher.patch_model(tiny.CPU, patcher.model_size() * 0.5, force_patch_weights=not by_patcher)
    assert patcher.model.model_lowvram
    save = (patcher if by_patcher else patcher.model).state_dict_for_saving
    saved, merged = save(), dense.model.diffusion_model.state_dict()
    for key, value in merged.items():
        # img_in is BF16 in the file, and hosts that write layers as they lie in the file round it to that.
        tolerance = 2e-3 if key == "img_in.weight" else 1e-6
        assert tiny.relative(saved[f"model.diffusion_model.{key}"].to("cpu"), value) < tolerance, key


def test_the_state_dict_has_the_hosts_keys_and_loads_into_another_model(tiny_flux):
    path = tiny_flux("Q4_K_S")
    first, dense = tiny.quantized_model(path), tiny.float_model(path)
    state = first.model.diffusion_model.state_dict()
    assert set(state) == set(dense.model.diffusion_model.state_dict())
    second = tiny.quantized_model(tiny_flux("Q2_K"))
    second.model.diffusion_model.load_state_dict(state)
    assert torch.equal(tiny.run(second), tiny.run(first))


def test_a_lazy_weight_weighs_its_bytes_and_becomes_a_float_tensor(tiny_flux):
    model = tiny.quantized_model(tiny_flux("Q4_K_S")).model
    name, module = next(quantized_modules(model))
    weight = model.state_dict()[f"{name}.weight"]
    assert isinstance(weight, LazyWeight)
    assert (tuple(weight.shape), weight.dtype) == (tuple(module.weight.shape), module.weight.dtype)
    assert weight.nbytes == weight.nelement() * weight.element_size() == module.weight._qdata.nbytes
    assert torch.equal(weight.to("cpu"), module.weight.dequantize())


def test_a_lazy_weight_takes_part_in_arithmetic_as_the_merged_float_tensor(tiny_flux):
    """Model subtraction, LoRA extraction and control LoRAs compute with what state_dict() gives."""
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.lora())
    dense = tiny.with_patches(tiny.float_model(tiny_flux("Q4_K_S")), tiny.lora())
    tiny.run(patcher)
    tiny.run(dense)
    key = tiny.block_key("double_blocks.1.img_mlp.0")
    lazy, expected = patcher.model.state_dict()[key], dense.model.state_dict()[key]
    assert lazy.is_contiguous()
    assert lazy.numel() == expected.numel()
    for result in (lazy - 0.0, lazy.float(), lazy.clone(), lazy.contiguous(), torch.cat([lazy])):
        assert type(result) is torch.Tensor
        assert tiny.relative(result, expected) < 1e-6
    stock = comfy.ops.manual_cast.Linear(256, 1024, bias=False, dtype=torch.float32)
    comfy.utils.set_attr_param(stock, "weight", lazy)
    x = torch.ones(2, 256)
    assert tiny.relative(stock(x), torch.nn.functional.linear(x, expected)) < 1e-6


def test_a_plain_layer_is_saved_in_its_own_dtype(tiny_flux, tmp_path):
    """img_in is BF16 in the file and has a patch; the model is float32, and only half of it is loaded."""
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.lora())
    expected = tiny.run(patcher)
    patcher.partially_unload(tiny.CPU, patcher.model_size() * 0.95)
    if not hasattr(patcher, "state_dict_for_saving"):
        comfy.model_management.unload_all_models()
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    path = tmp_path / "partly.safetensors"
    save = (patcher if hasattr(patcher, "state_dict_for_saving") else patcher.model).state_dict_for_saving
    comfy.utils.save_torch_file(save(), str(path))
    loaded = comfy.sd.load_diffusion_model_state_dict(safetensors.torch.load_file(path), {"dtype": torch.float32})
    assert tiny.relative(tiny.run(loaded), expected) < 2e-3  # one rounding of img_in to BF16


def test_a_second_copy_of_the_model_is_loaded_through_the_factory(tiny_flux):
    """The host asks for one for weight hooks under dynamic VRAM and for several GPUs."""
    patcher = tiny.quantized_model(tiny_flux("Q2_K"))
    function, arguments = patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert torch.equal(tiny.run(again), tiny.run(patcher))


def test_deepcloning_uses_the_factory_where_the_host_has_it(tiny_flux):
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q2_K")), tiny.lora())
    try:
        clone = patcher.clone(force_deepcopy=True)
    except TypeError:
        pytest.skip("this host has no clone(force_deepcopy)")
    assert clone.model is not patcher.model
    assert torch.equal(tiny.run(clone), tiny.run(patcher))


def test_a_network_that_is_copied_shares_the_bytes(tiny_flux):
    """The host copies ControlNets so for several GPUs."""
    patcher = tiny.quantized_model(tiny_flux("Q2_K"))
    before, network = tiny.run(patcher), patcher.model.diffusion_model
    copied = copy.deepcopy(network)
    ours, theirs = (net.single_blocks[0].linear1 for net in (network, copied))
    assert ours is not theirs
    assert ours.weight._qdata.data_ptr() == theirs.weight._qdata.data_ptr()
    patcher.model.diffusion_model = copied
    assert torch.equal(tiny.run(patcher), before)


def test_a_stock_patcher_over_our_layers_still_computes_right(tiny_flux):
    """Another pack may build its own ModelPatcher over our model; it costs memory, not correctness."""
    import comfy.model_patcher

    path = tiny_flux("Q4_K_S")
    ours, dense = tiny.quantized_model(path), tiny.float_model(path)
    stock = comfy.model_patcher.ModelPatcher(ours.model, tiny.CPU, tiny.CPU)
    before = tiny.run(stock)
    patched = tiny.with_patches(stock, tiny.lora())
    assert tiny.relative(tiny.run(patched), tiny.run(tiny.with_patches(dense, tiny.lora()))) < 1e-6
    comfy.model_management.unload_all_models()
    assert torch.equal(tiny.run(stock), before)
    assert make_ops().Linear.__name__ == "GGUFLinear"
