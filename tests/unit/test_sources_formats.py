# SPDX-License-Identifier: Apache-2.0
"""Sources whose weights are changed on the way: fp8, Flux in diffusers layout; and 16-bit GGUF files."""

from __future__ import annotations

import json
import weakref

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile, UnsupportedArch, UnsupportedQtype
from gguf_kit.quantize.sources import open_source
from safetensors.torch import save_file
from source_files import HIDDEN, diffusers_flux, every_value, fail, finite, marker, model, save, save_gguf

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# --- fp8


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_plain_fp8_becomes_bfloat16_without_loss(tmp_path, dtype):
    source = open_source(save(tmp_path, {"a.weight": every_value(dtype), "scaled_fp8": torch.empty(0, dtype=dtype)}))
    got = source.read("a.weight")
    assert list(source.tensors) == ["a.weight"]
    assert source.tensors["a.weight"].dtype == got.dtype == torch.bfloat16
    wanted = every_value(dtype).float()
    assert torch.equal(got.float().nan_to_num(7e9), wanted.nan_to_num(7e9))
    numbers = ~wanted.isnan()
    assert torch.equal(torch.signbit(got)[numbers], torch.signbit(wanted)[numbers])
    assert "16-bit file would give a better model" in source.notes[0]


SCALES = {
    "one number": ((), ()),
    "one number in a list": ((1,), ()),
    "one per row": ((16, 1), (16, 1)),
    "one per column": ((1, 16), (1, 16)),
}


def named(style, layer, weight, scale):
    """The tensors and metadata of a scaled layer as the three generations of files have them."""
    if style == "scaled_fp8":
        return {
            f"{layer}.weight": weight, f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(2.0),
            "scaled_fp8": torch.empty(2, dtype=E4M3),
        }, None  # fmt: skip
    tensors = {f"{layer}.weight": weight, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(2.0)}
    if style == "comfy_quant":
        return tensors | {f"{layer}.comfy_quant": marker({"format": "float8_e4m3fn"})}, None
    return tensors, {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"}}})}


@pytest.mark.parametrize("style", ["scaled_fp8", "comfy_quant", "metadata"])
@pytest.mark.parametrize("shapes", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scales_are_applied_in_float32_and_left_out(tmp_path, style, shapes, prefix):
    weight, scale = finite(E4M3), torch.rand(shapes[0], generator=torch.Generator().manual_seed(1)) + 1e-3
    tensors, metadata = named(style, "a", weight, scale)
    metadata = {k: v.replace('"a"', f'"{prefix}a"') for k, v in metadata.items()} if metadata else None
    tensors |= {"a.bias": torch.ones(16, dtype=torch.bfloat16), "norm.weight": torch.ones(16)}
    source = open_source(save(tmp_path, {prefix + name: t for name, t in tensors.items()}, metadata=metadata))
    assert set(source.tensors) == {"a.weight", "a.bias", "norm.weight"}
    assert source.tensors["a.weight"].dtype == torch.bfloat16
    got = source.read("a.weight")
    assert got.dtype == torch.float32
    assert torch.equal(got, weight.float() * scale.reshape(shapes[1]))
    assert "fp8 scales applied to 1 weights" in source.notes
    assert not source.metadata


def test_scales_per_block_and_per_matrix_of_a_stack(tmp_path):
    weight, blocks, per_matrix = finite(E5M2), torch.rand(4, 2), torch.rand(4)
    tensors = {"a.weight": weight, "a.weight_scale_inv": blocks}
    tensors |= {"s.weight": finite(E4M3, (4, 8, 8)), "s.weight_scale": per_matrix}
    source = open_source(save(tmp_path, tensors))
    wanted = weight.float() * blocks.repeat_interleave(4, 0).repeat_interleave(8, 1)
    assert torch.equal(source.read("a.weight"), wanted)
    assert torch.equal(source.read("s.weight"), tensors["s.weight"].float() * per_matrix[:, None, None])


def test_a_scale_on_a_wider_weight_is_applied_and_the_file_stays_untouched(tmp_path):
    weight = torch.rand(4, 4)
    path = save(
        tmp_path, {"a.weight": weight, "a.scale_weight": torch.tensor(3.0), "scaled_fp8": torch.empty(0, dtype=E4M3)}
    )
    source = open_source(path)
    for _ in range(2):
        assert torch.equal(source.read("a.weight"), weight * 3)
    assert source.tensors["a.weight"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(16,), (3, 1), (16, 16, 1), (0, 16)])
def test_a_scale_that_does_not_fit_is_refused(tmp_path, shape):
    path = save(tmp_path, {"a.weight": finite(E4M3), "a.weight_scale": torch.ones(shape)})
    with pytest.raises(BadFile, match=r"model.safetensors: the scale of 'a.weight' has shape"):
        open_source(path)


def test_a_scale_without_weight_or_beside_another_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"'b.weight_scale' has no weight"):
        open_source(save(tmp_path, {"a.weight": finite(E4M3), "b.weight_scale": torch.ones(())}))
    both = {"a.weight": finite(E4M3), "a.weight_scale": torch.ones(()), "a.scale_weight": torch.ones(())}
    with pytest.raises(BadFile, match="is a second one"):
        open_source(save(tmp_path, both))


def test_parameters_with_such_names_in_a_float_model_are_kept(tmp_path):
    tensors = {"a.input_scale": torch.ones(1), "a.weight": torch.ones(2, 2), "b.weight_scale": torch.ones(1)}
    assert set(open_source(save(tmp_path, tensors)).tensors) == set(tensors)


BYTES, INT8 = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int8)
FOREIGN = {
    "nvfp4": {"a.weight": BYTES, "a.weight_scale": torch.ones(4).to(E4M3), "a.weight_scale_2": torch.ones(())},
    "mxfp8": {"a.weight": finite(E4M3), "a.weight_scale": torch.zeros(16, 1, dtype=torch.uint8)},
    "int8_tensorwise": {"a.weight": INT8, "a.comfy_quant": marker({"format": "int8_tensorwise"})},
    "convrot_w4a4": {"a.weight": INT8, "a.comfy_quant": marker({"format": "convrot_w4a4"})},
    "int8": {"a.weight": INT8, "a.weight_scale": torch.ones(4, 1)},
    "packed 4-bit": {"a.weight": BYTES},
    "SVDQuant": {"a.qweight": INT8, "a.wscales": torch.ones(4), "a.lora_down": torch.ones(4, 4)},
    "bitsandbytes": {"a.weight": BYTES, "a.weight.absmax": torch.ones(4)},
    "GPTQ": {"a.qweight": torch.zeros(4, 4, dtype=torch.int32), "a.qzeros": torch.zeros(1, dtype=torch.int32)},
    "quanto": {"a.weight._data": INT8, "a.weight._scale": torch.ones(4, 1)},
    "int4": {"a.weight": INT8, "a.weight_s_rel": torch.ones(4).to(E4M3), "a.weight_s_channel": torch.ones(4)},
}


@pytest.mark.parametrize("title", FOREIGN)
def test_other_quantized_formats_are_refused_by_name(tmp_path, title):
    with pytest.raises(
        UnsupportedQtype, match=rf"^model.safetensors: it is already quantized as {title}.*16-bit or the fp8"
    ):
        open_source(save(tmp_path, FOREIGN[title]))


@pytest.mark.parametrize(
    "spoiled", [torch.zeros(9000, dtype=torch.uint8), marker([]), marker({"format": 3}), torch.ones(2), marker({})[:1]]
)
def test_a_marker_that_names_no_format_is_refused(tmp_path, spoiled):
    with pytest.raises(BadFile, match=r"'a.comfy_quant' is not the JSON text"):
        open_source(save(tmp_path, {"a.weight": finite(E4M3), "a.comfy_quant": spoiled}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', "[" * 9999])
def test_quantization_metadata_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(BadFile, match="_quantization_metadata"):
        open_source(save(tmp_path, {"a.weight": finite(E4M3)}, metadata={"_quantization_metadata": text}))


def test_nothing_is_kept_of_a_tensor_that_was_dropped(tmp_path):
    state = diffusers_flux() | {"x_embedder.weight_scale": torch.tensor(2.0)}
    state["x_embedder.weight"] = state["x_embedder.weight"].to(E4M3)
    source = open_source(save(tmp_path, state))
    for name in source.tensors:
        tensor = source.read(name)
        kept = weakref.ref(tensor.untyped_storage()), weakref.ref(tensor)
        del tensor
        assert [ref() for ref in kept] == [None, None], name


# --- Flux in diffusers layout


def native_names(depth, n_single, guidance=True):
    """Names of a native Flux, from the block structure alone."""
    layers = ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [
        f"{part}.{end}"
        for part in ("time_in", "vector_in", *(["guidance_in"] if guidance else []))
        for end in ("in_layer", "out_layer")
    ]
    norms = []
    for i in range(depth):
        for part in ("img", "txt"):
            block = f"double_blocks.{i}.{part}_"
            layers += [block + end for end in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
            norms += [f"{block}attn.norm.{end}_norm.scale" for end in ("query", "key")]
    for i in range(n_single):
        layers += [f"single_blocks.{i}.{end}" for end in ("linear1", "linear2", "modulation.lin")]
        norms += [f"single_blocks.{i}.norm.{end}_norm.scale" for end in ("query", "key")]
    return {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")} | set(norms)


@pytest.mark.parametrize(
    ("depth", "n_single", "in_channels", "guidance"), [(2, 3, 64, True), (1, 1, 384, False), (12, 0, 128, True)]
)
def test_flux_in_diffusers_layout_gets_native_names(tmp_path, depth, n_single, in_channels, guidance):
    state = diffusers_flux(depth, n_single, in_channels, guidance)
    source = open_source(save(tmp_path, state))
    assert set(source.tensors) == native_names(depth, n_single, guidance)
    for name, tensor in source.tensors.items():
        assert source.read(name).shape == tensor.shape
        assert source.read(name).dtype == tensor.dtype == torch.bfloat16
    assert sum(source.read(name).double().sum() for name in source.tensors) == pytest.approx(
        sum(t.double().sum() for t in state.values())
    )
    assert "diffusers layout" in source.notes[0]


@pytest.mark.parametrize("end", ["weight", "bias"])
def test_flux_parts_are_joined_in_the_native_order(tmp_path, end):
    state = diffusers_flux()
    source = open_source(save(tmp_path, state))
    block, single = "transformer_blocks.1.attn.", "single_transformer_blocks.2."
    for native, parts in {
        "double_blocks.1.img_attn.qkv": [block + "to_q", block + "to_k", block + "to_v"],
        "double_blocks.1.txt_attn.qkv": [block + "add_q_proj", block + "add_k_proj", block + "add_v_proj"],
        "single_blocks.2.linear1": [*(f"{single}attn.to_{x}" for x in "qkv"), single + "proj_mlp"],
    }.items():
        assert torch.equal(source.read(f"{native}.{end}"), torch.cat([state[f"{part}.{end}"] for part in parts]))
    scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
    assert torch.equal(source.read(f"final_layer.adaLN_modulation.1.{end}"), torch.cat((shift, scale)))


def test_flux_parts_with_scales_of_their_own_are_joined(tmp_path):
    state = diffusers_flux()
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    scales = dict(zip(names, torch.rand(3) + 0.1, strict=True))
    fp8 = {name: state[name].to(E4M3) for name in names}
    state |= fp8 | {name.removesuffix("weight") + "weight_scale": scale for name, scale in scales.items()}
    source = open_source(save(tmp_path, state))
    wanted = torch.cat([fp8[name].float() * scales[name] for name in names])
    assert torch.equal(source.read("double_blocks.0.img_attn.qkv.weight"), wanted)
    assert source.tensors["double_blocks.0.img_attn.qkv.weight"].dtype == torch.bfloat16


def test_flux_parts_of_different_types_are_joined_without_loss(tmp_path):
    state = diffusers_flux()
    name = "transformer_blocks.0.attn.to_k.weight"
    state[name] = torch.randn(HIDDEN, HIDDEN, dtype=torch.float32)
    source = open_source(save(tmp_path, state))
    joined = source.read("double_blocks.0.img_attn.qkv.weight")
    assert source.tensors["double_blocks.0.img_attn.qkv.weight"].dtype == joined.dtype == torch.float32
    assert torch.equal(joined[HIDDEN : 2 * HIDDEN], state[name])


def test_flux_with_a_part_missing_is_refused(tmp_path):
    state = diffusers_flux()
    del state["single_transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(
        BadFile,
        match=r"parts of 'single_blocks.1.linear1.weight' are missing: single_transformer_blocks.1.attn.to_k.weight",
    ):
        open_source(save(tmp_path, state))


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_k.weight", "norm_out.linear.bias"])
def test_flux_with_parts_that_do_not_fit_is_refused(tmp_path, name):
    state = diffusers_flux()
    state[name] = torch.ones(3, 3) if name.endswith("weight") else torch.ones(3)
    with pytest.raises(BadFile, match="do not fit together"):
        open_source(save(tmp_path, state))


def test_a_flux_variant_with_other_keys_is_refused(tmp_path):
    state = diffusers_flux() | {"transformer_blocks.0.attn.gate.weight": torch.ones(1), "extra.weight": torch.ones(1)}
    with pytest.raises(UnsupportedArch, match=r"2 tensors that Flux.1 does not have: ") as caught:
        open_source(save(tmp_path, state))
    assert "transformer_blocks.0.attn.gate.weight" in str(caught.value)


def test_flux_in_diffusers_layout_in_shards(tmp_path):
    state = diffusers_flux()
    whole = open_source(save(tmp_path, state))
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = list(state)
    weight_map = {}
    for i in range(2):
        part = {name: state[name] for name in names[i::2]}
        save_file(part, folder / f"m-{i + 1:05d}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"m-{i + 1:05d}-of-00002.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(folder)
    assert set(source.tensors) == set(whole.tensors)
    assert all(torch.equal(source.read(name), whole.read(name)) for name in whole.tensors)


# --- GGUF


@pytest.mark.parametrize("qtype", ["BF16", "F16", "F32"])
def test_a_16_bit_gguf_is_a_source(tmp_path, qtype):
    path = save_gguf(tmp_path, qtype=gguf.GGMLQuantizationType[qtype], strings={"config": "{}"})
    source = open_source(path)
    assert source.tensors["blocks.0.b"].dtype == torch.float32
    assert (
        source.tensors["blocks.0.w"].dtype
        == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[qtype]
    )
    for name, wanted in model().items():
        assert torch.equal(source.read(name).float(), wanted.to(source.tensors[name].dtype).float())
    assert dict(source.metadata) == {"config": "{}"}
    assert source.title == "GGUF"


def test_a_gguf_gives_the_shape_that_the_model_knows(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tensor("w", np.arange(48, dtype=np.float32).reshape(2, 24))
    writer.add_array("comfy.gguf.orig_shape.w", [2, 3, 2, 2, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(path)
    assert source.tensors["w"].shape == source.read("w").shape == (2, 3, 2, 2, 2)


def test_a_quantized_gguf_is_refused(tmp_path):
    path = save_gguf(tmp_path, {"w": torch.ones(2, 256), "b": torch.ones(2)}, gguf.GGMLQuantizationType.Q8_0)
    message = fail(path, UnsupportedQtype)
    assert "already quantized as Q8_0" in message
    assert "Start from the original" in message
