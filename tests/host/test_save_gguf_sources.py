# SPDX-License-Identifier: Apache-2.0
"""Save GGUF takes models as they come: of the host, in fp8, merged, with any adapter, under dynamic VRAM."""

import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import pytest
import tiny
import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models.repairs import rename_norms
from gguf_kit.ops import OpsOptions
from gguf_kit.quantize.sources import open_source
from gguf_kit.saver import save_model
from gguf_kit.service import load_model
from safetensors.torch import save_file
from small_model_table import SMALL_MODELS
from small_models import build_shapes, make_file, narrow_detection
from test_save_gguf import check_error, patched_floats

DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")


def lokr(seed=3):
    """Patches of a LoKr for the layers of tiny.LORA_SHAPES."""
    patches, generator = {}, torch.Generator().manual_seed(seed)
    for key, (rows, columns) in tiny.LORA_SHAPES.items():
        w1 = torch.randn(4, 4, generator=generator) * 0.05
        w2 = torch.randn(rows // 4, columns // 4, generator=generator) * 0.05
        patches[key] = LoKrAdapter(set(), (w1, w2, None, None, None, None, None, None, None))
    return patches


def saved(patcher, tmp_path, type_name="Q8_0"):
    path = tmp_path / f"saved-{type_name}.gguf"
    save_model(patcher, path, type_name)
    return path


@pytest.mark.parametrize(
    "patches", [tiny.lora(dora=True), lokr(), tiny.split_lora()], ids=["DoRA", "LoKr", "LoRA on parts"]
)
def test_every_adapter_is_merged_as_the_host_merges_it(tiny_flux, tmp_path, patches):
    source = tiny_flux("Q4_K_S")
    patcher = tiny.with_patches(tiny.quantized_model(source), patches)
    tiny.run(patcher)
    path = saved(patcher, tmp_path)
    check_error(path, patched_floats(source, patches))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_of_the_host_in_any_float_type(tiny_flux, tmp_path, dtype, loaded):
    """Saved from what was loaded, not from what the patched weights were rounded to."""
    weights = {key: value.to(dtype) for key, value in tiny.float_weights(tiny_flux("BF16")).items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": dtype})
    patcher = tiny.with_patches(patcher, tiny.lora())
    with torch.inference_mode():  # as nodes run
        if loaded:
            comfy.model_management.load_models_gpu([patcher])
        check_error(saved(patcher, tmp_path), patched_floats_of(weights, tiny.lora()))


def patched_floats_of(weights, patches):
    """As patched_floats, for weights in memory."""
    from gguf_kit.host.lora import patch_weight

    result = {key: value.float() for key, value in weights.items()}
    for key, adapter in patches.items():
        name = key.removeprefix("diffusion_model.")
        result[name] = patch_weight(result[name].clone(), [(0.8, adapter, 1.0, None, None)], key, result[name])
    return result


def test_scaled_fp8_of_the_host_is_what_the_converter_makes_of_the_file(tiny_flux, tmp_path):
    state = {}
    for key, value in tiny.float_weights(tiny_flux("BF16")).items():
        if value.dim() == 2 and "blocks" in key:
            scale = value.abs().max() / 448
            state[key] = (value / scale).to(torch.float8_e4m3fn)
            state[key.replace(".weight", ".scale_weight")] = scale.float()
        else:
            state[key] = value.bfloat16()
    scaled = {key.removesuffix("_weight") for key in state if key.endswith(".scale_weight")}
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = tmp_path / "scaled.safetensors"
    save_file(state, path)
    source = open_source(path)
    expected = {name: source.read(name).float() for name in source.tensors}
    patcher = comfy.sd.load_diffusion_model(str(path))
    # Older hosts hold what is not scaled in fp8 too.
    held = rename_norms(patcher.model.diffusion_model.state_dict(), "scale")
    expected |= {name: held[name].float() for name in expected if f"{name.removesuffix('.weight')}.scale" not in scaled}
    check_error(saved(patcher, tmp_path), expected)


def test_a_lora_that_widens_a_layer_makes_another_model(tiny_flux, tmp_path):
    """As those of Flux Canny and Depth do with img_in."""
    source, key = tiny_flux("Q4_K_S"), tiny.block_key("img_in")
    up, down = tiny.factors((256, 128), 1)
    wide = LoRAAdapter(set(), (up, down, 4.0, None, None, [256, 128]))
    patcher = tiny.with_patches(tiny.quantized_model(source), {key: wide}, strength=1.0)
    path = saved(patcher, tmp_path, "F32")
    expected = torch.cat([tiny.float_weights(source)["img_in.weight"], torch.zeros(256, 64)], 1) + up @ down
    found = tiny.float_weights(path)["img_in.weight"]
    assert tiny.relative(found, expected) < 1e-6
    assert load_model(str(path), OpsOptions()).model.model_config.unet_config["in_channels"] == 32


@pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
@pytest.mark.parametrize("of_host", [False, True], ids=["GGUF", "safetensors"])
@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
def test_under_dynamic_vram(tiny_flux, tmp_path, monkeypatch, of_host, resident):
    import fake_vram

    source = tiny_flux("BF16" if of_host else "Q4_K_S")
    vbar = fake_vram.install(monkeypatch)
    vbar.resident = resident
    patcher = (tiny.float_model if of_host else tiny.quantized_model)(source)
    assert patcher.is_dynamic()
    patcher = tiny.with_patches(patcher, tiny.lora())
    patcher.partially_load(patcher.load_device)
    before = tiny.run(patcher, load=False)
    check_error(saved(patcher, tmp_path), patched_floats(source, tiny.lora()))
    assert torch.equal(tiny.run(patcher, load=False), before)


@pytest.mark.parametrize("part", ["diffusion_model", "diffusion_model.double_blocks.0"])
@pytest.mark.parametrize("order", ["compiled after loading", "LoRA after compiling", "only a clone is compiled"])
def test_a_compiled_part_has_its_names_and_its_patches(tiny_flux, tmp_path, part, order):
    """As nodes compile: the module is replaced by one that holds it under another name."""
    source = tiny_flux("Q4_K_S")
    plain = tiny.quantized_model(source)
    patcher = plain.clone() if order == "LoRA after compiling" else tiny.with_patches(plain, tiny.lora())
    compiled = patcher.clone()
    compiled.add_object_patch(part, torch.compile(compiled.get_model_object(part), backend="eager"))
    comfy.model_management.load_models_gpu([compiled])
    assert any("_orig_mod" in key for key in plain.model.state_dict())
    if order == "LoRA after compiling":  # the host knows the keys as they are now
        now = {key.replace("._orig_mod", ""): key for key in plain.model.state_dict()}
        compiled.add_patches({now[key]: adapter for key, adapter in tiny.lora().items()}, 0.8)
    check_error(
        saved(patcher if order == "only a clone is compiled" else compiled, tmp_path),
        patched_floats(source, tiny.lora()),
    )


@pytest.mark.parametrize("of_host", [False, True], ids=["GGUF", "safetensors"])
def test_a_model_of_the_host_that_was_patched_before_a_part_was_compiled(tiny_flux, tmp_path, of_host):
    """The host keeps what a weight was under the name that it had then."""
    source = tiny_flux("BF16" if of_host else "Q4_K_S")
    patcher = tiny.with_patches((tiny.float_model if of_host else tiny.quantized_model)(source), tiny.lora())
    comfy.model_management.load_models_gpu([patcher])
    blocks = patcher.model.diffusion_model.double_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    check_error(saved(patcher, tmp_path), patched_floats(source, tiny.lora()))


@pytest.mark.parametrize("loaded_in_inference", [False, True])
@pytest.mark.parametrize("saved_in_inference", [False, True])
def test_loaded_in_one_inference_mode_and_saved_in_another(
    tiny_flux, tmp_path, loaded_in_inference, saved_in_inference
):
    source = tiny_flux("Q4_K_S")
    with torch.inference_mode(loaded_in_inference):
        patcher = tiny.with_patches(tiny.quantized_model(source), tiny.lora())
    with torch.inference_mode(saved_in_inference):
        path = saved(patcher, tmp_path)
    check_error(path, patched_floats(source, tiny.lora()))


# -- what is not in the weights --


def test_what_changes_a_model_only_while_it_runs_is_named(tiny_flux, tmp_path, caplog):
    patcher = tiny.quantized_model(tiny_flux("Q2_K"))
    with caplog.at_level("WARNING", "gguf_kit"):
        saved(patcher, tmp_path)
    assert "not saved" not in caplog.text
    patcher = patcher.clone()
    patcher.set_injections("bypass_lora", [])
    patcher.hook_patches["a hook"] = {}
    with caplog.at_level("WARNING", "gguf_kit"):
        saved(patcher, tmp_path, "F32")
    told = [record.message for record in caplog.records if "not saved" in record.message]
    wanted = "what changes the model only while it runs is not saved: bypass_lora, patches of hooks"
    assert told == [f"saved-F32.gguf: {wanted}"]


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no bypass LoRAs")
def test_a_bypass_lora_is_named(tiny_flux, tmp_path, caplog):
    up, down = tiny.factors((1024, 256), 1)
    name = "diffusion_model.double_blocks.1.img_mlp.0"
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    patcher, _ = comfy.sd.load_bypass_lora_for_models(tiny.quantized_model(tiny_flux("Q2_K")), None, lora, 1.0, 0.0)
    with caplog.at_level("WARNING", "gguf_kit"):
        saved(patcher, tmp_path)
    assert "what changes the model only while it runs is not saved: bypass_lora" in caplog.text


MARKS = {
    "v-prediction": ["v_pred"],
    "v-prediction with zero terminal SNR": ["v_pred", "ztsnr"],
    "EDM v-prediction": ["edm_vpred.sigma_max", "edm_vpred.sigma_min"],
    "Playground 2.5": ["edm_mean", "edm_std"],
    "epsilon": [],
}


@pytest.mark.parametrize("kind", MARKS)
def test_how_a_model_samples_is_saved(tmp_path, monkeypatch, kind):
    small = SMALL_MODELS["sdxl"]
    narrow_detection(monkeypatch, small)
    weights = make_file(small, str(tmp_path / "m.gguf"))
    marks = {name: torch.tensor([] if name in ("v_pred", "ztsnr") else 3.5) for name in MARKS[kind]}
    if kind == "Playground 2.5":
        marks = {name: torch.zeros(1, 4, 1, 1) for name in marks}
    first = comfy.sd.load_diffusion_model_state_dict({**weights, **marks}, model_options={"dtype": torch.float32})
    path = saved(first, tmp_path, "Q8_0")
    assert set(MARKS[kind]) == set(GGUFFile(path).tensors) - set(build_shapes(small)[0])
    again = load_model(str(path), OpsOptions())
    assert again.model.model_type is first.model.model_type
    assert type(again.model.latent_format) is type(first.model.latent_format)
    found, wanted = (p.model.model_sampling for p in (again, first))
    for name in ("sigma_max", "sigma_min", "zsnr"):
        assert getattr(found, name, None) == getattr(wanted, name, None)


def test_the_config_of_an_ltx_model_whose_file_is_not_known(tmp_path, monkeypatch):
    small = SMALL_MODELS["ltxv"]
    narrow_detection(monkeypatch, small)
    weights = make_file(small, str(tmp_path / "m.gguf"))
    metadata = {"config": '{"transformer": {"positional_embedding_theta": 123.0}}'}
    options = {"dtype": torch.float32}
    first = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options, metadata=metadata)
    again = load_model(str(saved(first, tmp_path)), OpsOptions())
    found, wanted = (p.model.model_config.unet_config for p in (again, first))
    assert found == wanted | {"dtype": found["dtype"]}
    assert found["positional_embedding_theta"] == 123.0
