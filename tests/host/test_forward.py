# SPDX-License-Identifier: Apache-2.0
"""A GGUF Flux in a real ComfyUI computes exactly what its dequantized weights compute."""

import math

import comfy.model_management
import comfy.sample
import numpy as np
import pytest
import tiny
import torch
from comfy.cli_args import args
from gguf_kit.dequant import PLAIN_DTYPES
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.host.compat import is_quantized, quantized_modules
from gguf_kit.loader import load_diffusion_model


@pytest.mark.parametrize("type_name", tiny.TYPES)
def test_apply_model_equals_the_dequantized_model(tiny_flux, type_name, inference_mode):
    path = tiny_flux(type_name)
    assert torch.equal(tiny.run(tiny.quantized_model(path)), tiny.run(tiny.float_model(path)))


def _random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32) * np.float32(0.05)


GUIDANCE = {
    "guidance_in.in_layer.weight": _random(256, 256),
    "guidance_in.in_layer.bias": _random(256),
    "guidance_in.out_layer.weight": _random(256, 256, seed=1),
    "guidance_in.out_layer.bias": _random(256, seed=1),
}
LATENT = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("title", "extra", "conditions"),
    [
        ("Flux.1 schnell", {}, {}),
        ("Flux.1 dev", GUIDANCE, {"guidance": torch.tensor([3.5, 3.5])}),
        ("Flux.1 dev", GUIDANCE, {"guidance": torch.tensor([2.5, 2.5]), "ref_latents": [LATENT]}),
        ("Flux.1 Fill", GUIDANCE | {"img_in.weight": _random(256, 384)}, {"c_concat": LATENT.repeat(1, 5, 1, 1)}),
        ("Flux.1 Canny or Depth", GUIDANCE | {"img_in.weight": _random(256, 128)}, {"c_concat": LATENT}),
    ],
    ids=["schnell", "dev", "kontext", "fill", "canny or depth"],
)
def test_every_flux_variant_equals_its_dequantized_model(tiny_flux, tmp_path, title, extra, conditions, prefix):
    path = tiny.copy_file(tiny_flux("Q4_K_S"), tmp_path / "flux.gguf", extra=extra, prefix=prefix)
    assert load_diffusion_model(path)[1].title == title
    if extra:
        conditions = {"guidance": torch.tensor([3.5, 3.5])} | conditions
    expected = tiny.run(tiny.float_model(path), **conditions)
    assert torch.equal(tiny.run(tiny.quantized_model(path), **conditions), expected)
    plain = tiny.run(tiny.quantized_model(tiny_flux("Q4_K_S")))
    assert torch.equal(plain, expected) == (not extra)


def test_a_model_loaded_outside_inference_mode_runs_inside_it(tiny_flux):
    path = tiny_flux("Q4_K_S")
    quantized, dense = tiny.quantized_model(path), tiny.float_model(path)
    with torch.inference_mode():
        inside = tiny.run(quantized)
    assert torch.equal(inside, tiny.run(dense))
    assert torch.equal(tiny.run(quantized), inside)


def test_a_whole_sampling_run_equals_the_dequantized_model(tiny_flux):
    path = tiny_flux("Q4_K_S")
    x, _, context, y = tiny.inputs(1)
    conditioning = [[context, {"pooled_output": y}]]

    def sample(patcher):
        latent = torch.zeros_like(x)
        return comfy.sample.sample(
            patcher, x, 2, 1.0, "euler", "simple", conditioning, conditioning, latent, disable_pbar=True, seed=1
        )

    with torch.inference_mode():
        assert torch.equal(sample(tiny.quantized_model(path)), sample(tiny.float_model(path)))


def test_every_block_matrix_stays_quantized_in_memory(tiny_flux):
    model = tiny.quantized_model(tiny_flux("Q4_K_S")).model
    quantized = {name for name, _ in quantized_modules(model)}
    blocks = {
        name for name, module in model.named_modules() if "_blocks." in name and isinstance(module, torch.nn.Linear)
    }
    assert len(blocks) == 32
    assert quantized == blocks


def test_the_host_counts_the_bytes_of_the_file(tiny_flux):
    path = tiny_flux("Q4_K_S")
    patcher = tiny.quantized_model(path)
    file = GGUFFile(path)
    in_blocks = sum(t.n_bytes for t in file.tensors.values() if t.qtype not in PLAIN_DTYPES)
    others = [p for p in (*patcher.model.parameters(), *patcher.model.buffers()) if not is_quantized(p)]
    assert patcher.model_size() == in_blocks + sum(p.numel() * p.element_size() for p in others)
    assert patcher.model_size() < 1.01 * sum(t.n_bytes for t in file.tensors.values())
    assert sum(p.numel() for p in patcher.model.parameters()) == 9_074_752


def test_the_reserve_covers_the_largest_dequantized_weight_twice(tiny_flux):
    quantized, dense = tiny.quantized_model(tiny_flux("Q2_K")), tiny.float_model(tiny_flux("Q2_K"))
    largest = max(math.prod(p.shape) for p in dense.model.parameters())
    shape = [2, 16, 16, 16]
    assert quantized.model.memory_required(shape) - dense.model.memory_required(shape) == 2 * 4 * largest


def test_two_loaded_models_keep_their_own_options(tiny_flux):
    path = tiny_flux("Q4_K_S")
    exact = tiny.run(tiny.quantized_model(path))
    rounded, default = tiny.quantized_model(path, dequant_dtype=torch.bfloat16), tiny.quantized_model(path)
    assert torch.equal(tiny.run(default), exact)
    assert 1e-5 < tiny.relative(tiny.run(rounded), exact) < 2e-2
    assert torch.equal(tiny.run(default), exact)


@pytest.mark.parametrize("scale", [1.0, 50.0], ids=["ordinary latents", "inflated latents"])
@pytest.mark.parametrize("flag", ["bf16_unet", "fp16_unet", None])
@pytest.mark.parametrize("type_name", ["Q2_K", "Q4_K_S"])
def test_no_black_pictures_in_any_model_dtype_on_a_cpu(tiny_flux, monkeypatch, type_name, flag, scale):
    """The host's own choice of model and compute type for these flags, against float32."""
    path, (x, *others) = tiny_flux(type_name), tiny.inputs(2)
    monkeypatch.setattr(tiny, "inputs", lambda batch: (x * scale, *others))
    expected = tiny.run(tiny.quantized_model(path))
    monkeypatch.setattr(args, "fp32_unet", False)
    if flag:
        monkeypatch.setattr(args, flag, True)
    patcher = tiny.quantized_model(path)
    assert (patcher.model.get_dtype() == torch.float16) == (flag == "fp16_unet")
    result = tiny.run(patcher)
    assert result.isfinite().all()
    assert tiny.relative(result, expected) < 2e-2


def test_moving_the_model_replaces_parameters_and_keeps_results(tiny_flux, inference_mode):
    patcher = tiny.quantized_model(tiny_flux("Q4_K_S"))
    before = tiny.run(patcher)
    patcher.model.to("cpu")
    patcher.model.to(torch.float32)
    assert torch.equal(tiny.run(patcher), before)
    patcher.model.to("meta")
    assert all(p.device.type == "meta" for p in patcher.model.diffusion_model.parameters())


def test_unloading_frees_the_mapped_file(tiny_flux):
    import gc
    import weakref

    patcher = tiny.quantized_model(tiny_flux("Q4_K_S"))
    tiny.run(patcher)
    bytes_of_a_layer = weakref.ref(next(quantized_modules(patcher.model))[1].weight._qdata)
    comfy.model_management.unload_all_models()
    del patcher
    gc.collect()
    assert bytes_of_a_layer() is None
