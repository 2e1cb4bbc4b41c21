# SPDX-License-Identifier: Apache-2.0
"""ControlNets from GGUF: bytes in memory where the host takes our layers, else floats; the same results either way."""

import logging

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.t2i_adapter.adapter
import comfy.utils
import pytest
import torch
from component_files import copies, load, module_weights, random_weights, search_in, write_gguf
from gguf_kit import components
from gguf_kit.errors import UnsupportedArch
from gguf_kit.host.compat import is_quantized, quantized_modules

NAME = "control.gguf"
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
FLUX |= {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__ else {}
FLOATS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return search_in(monkeypatch, tmp_path)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_unet(control):
    """Residuals of a ControlNet of Stable Diffusion's UNet."""
    model = control.control_model
    with torch.inference_mode():
        return flat(
            model(x=noise(1, 4, 8, 8), hint=noise(1, 3, 64, 64), timesteps=torch.tensor([3.0]), context=CONTEXT)
        )


def run_flux(control):
    """Residuals of a ControlNet of Flux; one that takes latents has four channels of them for each of its own."""
    latent = control.control_model.latent_input
    hint = noise(1, 16, 16, 16) if latent else noise(1, 3, 128, 128)
    conditions = {"context": noise(1, 2, 64), "y": noise(1, 64), "guidance": torch.tensor([3.0]), "hint": hint}
    if control.control_model.num_union_modes:
        conditions["control_type"] = [1]
    with torch.inference_mode():
        return flat(control.control_model(x=noise(1, 16, 16, 16), timesteps=torch.tensor([0.5]), **conditions))


CONTEXT = noise(1, 4, 64, seed=7)


def flat(result):
    """All residuals one after the other."""
    tensors = [t for group in result.values() for t in group if t is not None]
    return torch.cat([t.flatten() for t in tensors])


def unet_weights():
    config = {"image_size": 32, "in_channels": 4, "model_channels": 64, "hint_channels": 3, "num_res_blocks": [1, 1]}
    config |= {"channel_mult": (1, 2), "transformer_depth": [1, 1], "transformer_depth_middle": 1, "context_dim": 64}
    model = comfy.cldm.cldm.ControlNet(
        **config, num_head_channels=64, use_spatial_transformer=True, operations=comfy.ops.disable_weight_init
    )
    return module_weights(model)


def flux_names(weights):
    """As files have them: newer hosts call the weights of norms otherwise."""
    return {key.replace("_norm.weight", "_norm.scale"): value for key, value in weights.items()}


def xlabs_weights():
    return flux_names(module_weights(comfy.ldm.flux.controlnet.ControlNetFlux(**FLUX, **FLOATS)))


def instantx_weights():
    """A Flux ControlNet for several kinds of pictures in diffusers' layout, where q, k and v are apart."""
    model = comfy.ldm.flux.controlnet.ControlNetFlux(
        latent_input=True, num_union_modes=3, control_latent_channels=16, **FLUX, **FLOATS
    )
    native = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    native |= {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in native.items()}
    shapes = {key: shape for key, shape in native.items() if key.startswith("controlnet")}
    for key, target in comfy.utils.flux_to_diffusers(FLUX).items():
        name, part = (target, None) if isinstance(target, str) else (target[0], target[1])
        if name in native:
            shapes[key] = (part[2], *native[name][1:]) if part else native[name]
    return random_weights(shapes)


KEEP_BYTES = {"Stable Diffusion": (unet_weights, run_unet), "Flux (XLabs)": (xlabs_weights, run_flux)}


@pytest.mark.parametrize("kind", KEEP_BYTES)
def test_a_controlnet_stays_quantized_and_equals_its_dequantized_weights(folder, kind, caplog, inference_mode):
    weights, run = KEEP_BYTES[kind]
    exact = write_gguf(folder / NAME, weights())
    with caplog.at_level(logging.INFO, "gguf_kit"):
        control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    assert len([*quantized_modules(control.control_model)]) > 5
    assert "were dequantized" not in caplog.text
    result = run(control)
    assert torch.equal(result, run(comfy.controlnet.load_controlnet_state_dict(copies(exact))))
    assert result.isfinite().all()
    assert result.std() > 0


def test_copies_of_a_controlnet_share_its_bytes_and_survive_loading(folder):
    exact = write_gguf(folder / NAME, unet_weights())
    control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    expected = run_unet(comfy.controlnet.load_controlnet_state_dict(copies(exact)))
    twin = control.copy().set_cond_hint(noise(1, 3, 64, 64), strength=0.5)
    assert twin.get_models() == control.get_models()
    n_bytes = control.control_model_wrapped.model_size()
    assert n_bytes < 0.7 * sum(value.nbytes for value in exact.values())
    comfy.model_management.load_models_gpu(twin.get_models(), force_full_load=True)
    assert torch.equal(run_unet(twin), expected)
    comfy.model_management.unload_all_models()
    assert control.control_model_wrapped.model_size() == n_bytes
    assert torch.equal(run_unet(control), expected)


def test_a_controlnet_steers_a_quantized_flux_through_the_host(folder, tiny_flux):
    import tiny

    exact = write_gguf(folder / NAME, xlabs_weights())
    patcher = tiny.quantized_model(tiny_flux("Q8_0"))
    results = []
    for control in (
        load("ControlNetLoaderGGUF", control_net_name=NAME),
        comfy.controlnet.load_controlnet_state_dict(copies(exact)),
    ):
        control = control.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        x, t, context, y = tiny.inputs(batch=1)
        comfy.model_management.load_models_gpu([patcher, *control.get_models()])
        control.pre_run(patcher.model, lambda percent: 1.0 - percent)
        cond = {"c_crossattn": context, "y": y, "guidance": torch.tensor([3.0])}
        with torch.inference_mode():
            results.append(flat(control.get_control(x[..., :8, :8], t, cond, 1, {})))
    assert torch.equal(*results)
    assert results[0].std() > 0


def test_the_host_can_load_a_controlnet_again(folder):
    exact = write_gguf(folder / NAME, unet_weights())
    control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    function, arguments = control.control_model_wrapped.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not control.control_model
    control.control_model = again.model
    assert torch.equal(run_unet(control), run_unet(comfy.controlnet.load_controlnet_state_dict(copies(exact))))


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM")
def test_under_dynamic_vram_results_are_the_same(folder, monkeypatch):
    import fake_vram

    exact = write_gguf(folder / NAME, unet_weights())
    expected = run_unet(comfy.controlnet.load_controlnet_state_dict(copies(exact)))
    fake_vram.install(monkeypatch)
    control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    patcher = control.control_model_wrapped
    assert patcher.is_dynamic()
    patcher.partially_load(patcher.load_device)
    staged = [module for _, module in quantized_modules(patcher.model) if hasattr(module, "_v")]
    assert len(staged) > 5
    assert torch.equal(run_unet(control), expected)
    function, arguments = patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert not again.is_dynamic()
    control.control_model = again.model
    assert torch.equal(run_unet(control), expected)


# -- where the host computes with the tensors itself --


def test_a_controlnet_of_sdxl_in_the_layout_of_diffusers_keeps_its_bytes():
    names = ("conv_in.weight", "controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight")
    names += ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "time_embedding.linear_1.weight")
    assert components._converted({name: torch.zeros(4, 32) for name in names}) is None


def dequantized(caplog):
    return "takes no quantized ControlNet of this kind, so its weights were dequantized" in caplog.text


def test_a_flux_controlnet_in_the_layout_of_diffusers_is_dequantized(folder, caplog, inference_mode):
    exact = write_gguf(folder / NAME, instantx_weights())
    with caplog.at_level(logging.INFO, "gguf_kit"):
        control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    assert dequantized(caplog)
    result = run_flux(control)
    assert torch.equal(result, run_flux(comfy.controlnet.load_controlnet_state_dict(copies(exact))))
    assert result.std() > 0


def test_a_t2i_adapter_is_dequantized(folder, caplog, inference_mode):
    model = comfy.t2i_adapter.adapter.Adapter(
        cin=192, channels=[32, 64, 128, 128], nums_rb=2, ksize=1, sk=True, use_conv=False
    )
    exact = write_gguf(folder / NAME, module_weights(model))
    with caplog.at_level(logging.INFO, "gguf_kit"):
        control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    assert dequantized(caplog)
    expected = comfy.controlnet.load_controlnet_state_dict(copies(exact))
    hint = noise(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(flat(control.t2i_model(hint)), flat(expected.t2i_model(hint)))


def test_a_control_lora_is_dequantized(folder, caplog):
    shapes = {"input_hint_block.0.weight": (16, 3, 3, 3), "input_blocks.1.0.in_layers.2.up": (64, 32)}
    weights = random_weights(shapes | {"middle_block_out.0.weight": (64, 64, 1, 1)})
    exact = write_gguf(folder / NAME, weights | {"lora_controlnet": torch.zeros(1)})
    with caplog.at_level(logging.INFO, "gguf_kit"):
        control = load("ControlNetLoaderGGUF", control_net_name=NAME)
    assert dequantized(caplog)
    assert isinstance(control, comfy.controlnet.ControlLora)
    for key in weights:
        assert not is_quantized(control.control_weights[key])
        assert torch.equal(control.control_weights[key].float(), exact[key].float())


def test_a_difference_is_added_to_the_model_it_is_given(folder):
    weights = {f"control_model.{key}": value for key, value in unet_weights().items()}
    exact = write_gguf(folder / NAME, weights | {"difference": torch.zeros(1)})
    with pytest.raises(UnsupportedArch, match=r"stored as the difference to a model\. Connect that model"):
        load("ControlNetLoaderGGUF", control_net_name=NAME)
    base = torch.nn.Module()
    base.diffusion_model = torch.nn.Module()
    base.diffusion_model.time_embed = torch.nn.Sequential(torch.nn.Linear(64, 256))
    patcher = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    found = run_unet(load("ControlNetLoaderGGUF", control_net_name=NAME, model=patcher))
    assert torch.equal(found, run_unet(comfy.controlnet.load_controlnet_state_dict(copies(exact), patcher)))
    assert torch.equal(found, run_unet(load("ControlNetLoaderGGUF", control_net_name=NAME, model=patcher)))
    del exact["difference"]
    assert not torch.equal(found, run_unet(comfy.controlnet.load_controlnet_state_dict(copies(exact))))


# -- names and missing weights --


@pytest.mark.parametrize(
    ("name", "averaged"),
    [("a_shuffle.gguf", True), ("a_shuffle_fp16.gguf", True), ("a_shuffle-Q8_0.gguf", True), ("a_canny.gguf", False)],
)
def test_outputs_are_averaged_by_the_name_of_the_file(folder, name, averaged):
    write_gguf(folder / name, unet_weights())
    assert load("ControlNetLoaderGGUF", control_net_name=name).global_average_pooling == averaged


def test_a_controlnet_that_lacks_a_weight_is_refused(folder):
    weights = unet_weights()
    for gone in ("input_blocks.1.0.in_layers.2.weight", "time_embed.0.bias", "input_blocks.1.0.out_layers.0.weight"):
        write_gguf(folder / NAME, {key: value for key, value in weights.items() if key != gone})
        with pytest.raises(UnsupportedArch, match=f"1 tensors that ComfyUI needs are missing: {gone}"):
            load("ControlNetLoaderGGUF", control_net_name=NAME)


FLUX_PARTS = (
    "context_embedder.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.0.attn.to_k.bias",
    "transformer_blocks.0.attn.add_v_proj.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
    "single_transformer_blocks.0.attn.to_v.weight",
    "transformer_blocks.0.attn.norm_q.weight",
    "controlnet_mode_embedder.weight",
    "controlnet_blocks.0.bias",
)


@pytest.mark.parametrize("gone", FLUX_PARTS)
def test_a_flux_controlnet_in_the_layout_of_diffusers_that_lacks_a_weight_is_refused(folder, gone):
    weights = instantx_weights()
    weights.pop(gone)
    write_gguf(folder / NAME, weights)
    if gone == "controlnet_mode_embedder.weight":  # one for a single kind of pictures
        assert load("ControlNetLoaderGGUF", control_net_name=NAME).control_model.num_union_modes == 0
        return
    with pytest.raises(UnsupportedArch, match="tensors that ComfyUI needs are missing"):
        load("ControlNetLoaderGGUF", control_net_name=NAME)


SD3 = {"pos_embed.proj.weight": "x_embedder.proj.weight", "pos_embed.proj.bias": "x_embedder.proj.bias"}


def sd3_weights():
    """A ControlNet of Stable Diffusion 3 in diffusers' layout, one of two blocks, 128 wide."""
    config = {"patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": 2048, "qkv_bias": True}
    config |= {"input_size": None, "pos_embed_max_size": 192, "num_patches": 192 * 192}
    config |= {"context_embedder_config": {"params": {"in_features": 4096, "out_features": 128}}}
    config["context_embedder_config"]["target"] = "torch.nn.Linear"
    model = comfy.cldm.mmdit.ControlNet(num_blocks=1, control_latent_channels=16, device="cpu", **config, **FLOATS)
    native = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = {key: shape for key, shape in native.items() if key.startswith(("controlnet", "pos_embed_input"))}
    for key, target in comfy.utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 1}).items():
        name, part = (target, None) if isinstance(target, str) else (target[0], target[1])
        if name in native:
            shapes[key] = (part[2], *native[name][1:]) if part else native[name]
    return random_weights(shapes)


def test_an_sd3_controlnet_in_the_layout_of_diffusers_loads_and_refuses_what_lacks_a_weight(folder):
    weights = sd3_weights()
    exact = write_gguf(folder / NAME, weights)
    found = load("ControlNetLoaderGGUF", control_net_name=NAME).control_model.state_dict()
    expected = comfy.controlnet.load_controlnet_state_dict(copies(exact)).control_model.state_dict()
    assert {*found} == {*expected}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for gone in (
        "context_embedder.bias",
        "transformer_blocks.0.attn.to_q.weight",
        "time_text_embed.timestep_embedder.linear_1.bias",
    ):
        write_gguf(folder / NAME, {key: value for key, value in weights.items() if key != gone})
        with pytest.raises(UnsupportedArch, match="tensors that ComfyUI needs are missing"):
            load("ControlNetLoaderGGUF", control_net_name=NAME)


def test_floats_are_of_the_dtype_that_the_host_computes_in(folder, monkeypatch):
    exact = write_gguf(folder / NAME, instantx_weights())
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *args, **kwargs: torch.bfloat16)
    seen, to_floats = [], components.to_floats

    def spy(values, dtype=torch.float32, **options):
        seen.append(dtype)
        return to_floats(values, dtype, **options)

    monkeypatch.setattr(components, "to_floats", spy)
    found = load("ControlNetLoaderGGUF", control_net_name=NAME).control_model.state_dict()
    expected = comfy.controlnet.load_controlnet_state_dict(copies(exact)).control_model.state_dict()
    assert seen == [torch.bfloat16]
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def union_weights():
    """A ControlNet of Stable Diffusion's UNet for several kinds of pictures."""
    config = {"image_size": 32, "in_channels": 4, "model_channels": 64, "hint_channels": 3, "num_res_blocks": [1, 1]}
    config |= {"channel_mult": (1, 2), "transformer_depth": [1, 1], "transformer_depth_middle": 1, "context_dim": 64}
    config |= {"num_head_channels": 64, "use_spatial_transformer": True, "union_controlnet_num_control_type": 6}
    return comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init)


def test_a_parameter_of_the_model_itself_is_missed_under_any_prefix():
    from types import SimpleNamespace

    control = SimpleNamespace(control_model=union_weights())
    keys = {*control.control_model.state_dict()}
    components._check_control("a.gguf", control, {f"control_model.{key}" for key in keys}, renamed=False)
    with pytest.raises(UnsupportedArch, match="1 tensors that ComfyUI needs are missing: task_embedding"):
        components._check_control("a.gguf", control, keys - {"task_embedding"}, renamed=False)


def embedder_weights(double=False):
    """A ControlNet of Stable Diffusion 3.5, one block of 256."""
    config = {"img_size": None, "patch_size": 2, "in_chans": 16, "num_layers": 1, "main_model_double": 4}
    config |= {"attention_head_dim": 64, "num_attention_heads": 4, "adm_in_channels": 2048}
    model = comfy.cldm.dit_embedder.ControlNetEmbedder(**config, double_y_emb=double, device="cpu", **FLOATS)
    return module_weights(model)


def test_what_the_host_takes_from_the_model_may_be_missing(folder):
    weights = embedder_weights()
    own = {key: value for key, value in weights.items() if not key.startswith("x_embedder.")}
    assert len(own) < len(weights)
    write_gguf(folder / NAME, own)
    assert isinstance(load("ControlNetLoaderGGUF", control_net_name=NAME), comfy.controlnet.ControlNetSD35)
    own.pop("t_embedder.mlp.0.weight")
    write_gguf(folder / NAME, own)
    with pytest.raises(UnsupportedArch, match=r"missing: t_embedder\.mlp\.0\.weight"):
        load("ControlNetLoaderGGUF", control_net_name=NAME)


@pytest.mark.parametrize(
    ("double", "taken", "own"), [(0, "x_embedder", "y_embedder"), (1, "orig_y_embedder", "x_embedder")]
)
def test_only_what_the_host_takes_from_the_model_may_be_missing(folder, double, taken, own):
    weights = embedder_weights(bool(double))
    for part, is_taken in ((taken, True), (own, False)):
        left = {key: value for key, value in weights.items() if not key.startswith(f"{part}.")}
        assert len(left) < len(weights)
        left |= {k: v for k, v in weights.items() if k == "y_embedder.mlp.0.weight"}  # the host reads its shape
        write_gguf(folder / NAME, left)
        if is_taken:
            load("ControlNetLoaderGGUF", control_net_name=NAME)
            continue
        with pytest.raises(UnsupportedArch, match=rf"missing: {own}\."):
            load("ControlNetLoaderGGUF", control_net_name=NAME)


def test_a_controlnet_alone_is_no_model_patch():
    assert components.kinds.what_is({"controlnet_blocks.0.weight": (4, 4)}).title == "a ControlNet"
    assert components.kinds.what_is({"controlnet_blocks.0.y_rms.weight": (4,)}).title == "a model patch"
