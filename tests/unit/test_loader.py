# SPDX-License-Identifier: Apache-2.0
"""The loader: keys, shapes and kinds of values from files of all sorts, without a host."""

import logging

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile, GGUFError, UnsupportedArch, UnsupportedQtype
from gguf_kit.loader import load_diffusion_model, load_text_encoder
from gguf_kit.models import archs, text_encoders
from gguf_kit.models.values import QuantizedBytes

Q = gguf.GGMLQuantizationType
HIDDEN = 64

FLUX = {
    "img_in.weight": (HIDDEN, 64),
    "vector_in.in_layer.weight": (HIDDEN, 32),
    "guidance_in.in_layer.weight": (HIDDEN, 32),
    "double_blocks.0.img_attn.proj.weight": (HIDDEN, HIDDEN),
    "double_blocks.0.img_attn.norm.query_norm.scale": (HIDDEN,),
    "double_blocks.0.img_attn.proj.bias": (HIDDEN,),
}
T5 = {
    "token_embd.weight": (100, HIDDEN),
    "enc.output_norm.weight": (HIDDEN,),
    **{
        f"enc.blk.{i}.{name}.weight": shape
        for i in range(12)
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (HIDDEN, HIDDEN),
            "attn_v": (HIDDEN, HIDDEN),
            "attn_o": (HIDDEN, HIDDEN),
            "attn_norm": (HIDDEN,),
            "ffn_gate": (128, HIDDEN),
            "ffn_up": (128, HIDDEN),
            "ffn_down": (HIDDEN, 128),
            "ffn_norm": (HIDDEN,),
        }.items()
    },
    "enc.blk.0.attn_rel_b.weight": (32, 4),
}


def write(path, shapes, arch="flux", qtypes=None, metadata=None):
    """A GGUF file with random values: matrices Q8_0 where rows allow it, the rest F32, unless qtypes says otherwise."""
    writer = gguf.GGUFWriter(path, arch if arch is not None else "none")
    if arch is None:
        writer.kv_data[0].pop("general.architecture")
    for key, value in (metadata or {}).items():
        writer.add_array(key, value)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        qtype = (qtypes or {}).get(name, Q.Q8_0 if len(shape) > 1 and shape[-1] % 32 == 0 else Q.F32)
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(path):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_layer_weights_keep_their_bytes_and_the_rest_are_tensors(tmp_path):
    path = write(tmp_path / "a.gguf", FLUX)
    state, _ = load_diffusion_model(path)
    assert {key for key, value in state.items() if isinstance(value, QuantizedBytes)} == {
        key for key, shape in FLUX.items() if len(shape) == 2
    }
    for key, values in reference(path).items():
        value = state[key].dequantize() if isinstance(state[key], QuantizedBytes) else state[key]
        assert tuple(value.shape) == FLUX[key]
        assert np.array_equal(value.numpy(), values.reshape(FLUX[key]))


@pytest.mark.parametrize("prefix", archs.KEY_PREFIXES)
def test_the_prefix_of_a_whole_checkpoint_is_stripped_and_other_parts_are_left_out(tmp_path, prefix):
    shapes = {prefix + key: shape for key, shape in FLUX.items()} | {"first_stage_model.x.weight": (32, 32)}
    state, info = load_diffusion_model(write(tmp_path / "a.gguf", shapes))
    assert set(state) == set(FLUX)
    assert info.title == "Flux.1 dev"


@pytest.mark.parametrize("tag", ["flux", "pig", "cow", "unheard_of", None])
def test_the_architecture_tag_never_decides(tmp_path, tag):
    state, info = load_diffusion_model(write(tmp_path / "a.gguf", FLUX, arch=tag))
    assert set(state) == set(FLUX)
    assert (info.title, info.arch) == ("Flux.1 dev", tag or "")


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({}, "Flux.1 dev"),
        ({"guidance_in.in_layer.weight": None}, "Flux.1 schnell"),
        ({"img_in.weight": (HIDDEN, 384)}, "Flux.1 Fill"),
        ({"img_in.weight": (HIDDEN, 128)}, "Flux.1 Canny or Depth"),
        ({"vector_in.in_layer.weight": None}, None),
    ],
    ids=["dev", "schnell", "fill", "control", "something else"],
)
def test_flux_variants_are_told_apart_by_keys_and_shapes(change, title):
    shapes = {key: shape for key, shape in (FLUX | change).items() if shape is not None}
    found = [arch.title for arch in archs.ARCHS if arch.matches(shapes)]
    assert found == ([title] if title else [])


def test_text_from_a_file_cannot_flood_or_break_a_message(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gguf_kit")
    load_diffusion_model(write(tmp_path / "a.gguf", FLUX, arch="x\n\x1b[31m" + "y" * 100_000))
    assert len(caplog.messages[0]) < 400
    assert caplog.messages[0].isprintable()


def test_an_unknown_model_is_passed_on_to_the_host(tmp_path):
    state, info = load_diffusion_model(write(tmp_path / "a.gguf", {"blocks.0.weight": (32, 32)}))
    assert set(state) == {"blocks.0.weight"}
    assert info.title == "unrecognised model"


def test_reshaped_tensors_get_their_shape_back(tmp_path):
    shapes = {"conv.weight": (9, 64), "a.pos_embed": (4, 32), "plain.weight": (6, 4)}
    metadata = {
        "comfy.gguf.orig_shape.conv.weight": [8, 8, 3, 3],
        "comfy.gguf.orig_shape.a.pos_embed": [1, 4, 32],
        "comfy.gguf.orig_shape.plain.weight": [1, 2, 3, 2, 2],
    }
    path = write(tmp_path / "a.gguf", shapes, metadata=metadata)
    state, _ = load_diffusion_model(path)
    values = reference(path)
    assert isinstance(state["conv.weight"], QuantizedBytes)
    assert np.array_equal(state["conv.weight"].dequantize().numpy(), values["conv.weight"].reshape(8, 8, 3, 3))
    assert np.array_equal(state["a.pos_embed"].numpy(), values["a.pos_embed"].reshape(1, 4, 32))
    assert tuple(state["plain.weight"].shape) == (1, 2, 3, 2, 2)


@pytest.mark.parametrize(
    "shape",
    [[8, 8, 3, 4], [-8, -72], [2**31 - 1] * 4, [1] * 100_000, ["576"], [576.0], [float("nan")], [[576]]],
    ids=["wrong size", "negative", "huge", "many dimensions", "text", "float", "nan", "nested"],
)
def test_an_impossible_original_shape_is_refused(tmp_path, shape):
    path = write(tmp_path / "a.gguf", {"conv.weight": (9, 64)}, metadata={"comfy.gguf.orig_shape.conv.weight": shape})
    with pytest.raises(BadFile, match=r"a\.gguf: .*orig_shape\.conv\.weight"):
        load_diffusion_model(path)


def test_vectors_and_bare_parameters_are_dequantized_when_loaded(tmp_path):
    """A quantized norm, a BF16 norm, and a quantized table that is no layer's weight."""
    shapes = {"norm.weight": (64,), "scale.weight": (64,), "modulation": (6, 64), "lin.weight": (64, 64)}
    qtypes = {"norm.weight": Q.Q8_0, "scale.weight": Q.BF16, "modulation": Q.Q4_0}
    path = write(tmp_path / "a.gguf", shapes, qtypes=qtypes)
    state, _ = load_diffusion_model(path)
    values = reference(path)
    assert state["scale.weight"].dtype == torch.bfloat16
    for key in ("norm.weight", "scale.weight", "modulation"):
        assert np.array_equal(state[key].float().numpy(), values[key])
    assert isinstance(state["lin.weight"], QuantizedBytes)


def test_plain_tensors_are_views_of_the_file(tmp_path):
    shapes = {"a.weight": (256, 1024), "b.weight": (512, 1024)}
    path = write(tmp_path / "a.gguf", shapes, qtypes=dict.fromkeys(shapes, Q.BF16))
    state, _ = load_diffusion_model(path)
    distance = state["b.weight"].data_ptr() - state["a.weight"].data_ptr()
    assert distance == 256 * 1024 * 2


def test_one_line_says_what_was_loaded(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gguf_kit")
    _, info = load_diffusion_model(write(tmp_path / "a.gguf", FLUX))
    assert caplog.messages == [info.summary()]
    assert caplog.messages[0].startswith("a.gguf: Flux.1 dev (tagged flux), 6 tensors (Q8_0 4, F32 2)")


def test_a_type_without_dequantizer_is_refused_by_name(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("x.weight", np.zeros((2, 292), dtype=np.uint8), raw_dtype=Q.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedQtype, match=r"a\.gguf: tensor 'x\.weight' has qtype Q8_K.*Use a file with one of:.*Q4_K"
    ):
        load_diffusion_model(path)


# -- wrong things in the wrong loader --


def test_flux_in_diffusers_layout_is_refused(tmp_path):
    shapes = {
        "single_transformer_blocks.0.attn.to_q.weight": (64, 64),
        "transformer_blocks.0.attn.add_q_proj.weight": (64, 64),
    }
    with pytest.raises(UnsupportedArch, match=r"diffusers layout.*original layout"):
        load_diffusion_model(write(tmp_path / "a.gguf", shapes))


def test_a_text_encoder_in_the_unet_loader_is_sent_to_the_clip_loader(tmp_path):
    with pytest.raises(UnsupportedArch, match=r"a\.gguf: .*t5encoder.*CLIPLoader"):
        load_diffusion_model(write(tmp_path / "a.gguf", T5, arch="t5encoder"))


def test_a_diffusion_model_in_the_clip_loader_is_sent_to_the_unet_loader(tmp_path):
    with pytest.raises(UnsupportedArch, match=r"a\.gguf: .*Flux.1 dev.*Unet Loader"):
        load_text_encoder(write(tmp_path / "a.gguf", FLUX))


# -- text encoders --


@pytest.mark.parametrize("arch", ["t5", "t5encoder", "pig", None])
def test_t5_names_become_those_that_gguf_py_maps_from(tmp_path, arch):
    """gguf-py's table goes from Hugging Face names to llama.cpp's; ours must be its inverse."""
    state, info = load_text_encoder(write(tmp_path / "a.gguf", T5, arch=arch))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 12)
    assert {table.get_name(key, try_suffixes=(".weight",)) for key in state} == set(T5)
    assert info.title == "T5 v1.1"
    assert isinstance(state["shared.weight"], QuantizedBytes)


def test_t5_without_gates_has_the_older_mlp_name():
    names = [name for name in T5 if "ffn_gate" not in name]
    encoder = text_encoders.detect(names)
    mapped, unknown = encoder.key_map(names)
    assert unknown == []
    assert mapped["enc.blk.11.ffn_up.weight"] == "encoder.block.11.layer.1.DenseReluDense.wi.weight"
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 12)
    assert all(table.get_name(key, try_suffixes=(".weight",)) == name for name, key in mapped.items())


def test_a_text_encoder_with_native_names_passes(tmp_path):
    shapes = {"shared.weight": (100, 64), "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}
    assert set(load_text_encoder(write(tmp_path / "a.gguf", shapes, arch=None))[0]) == set(shapes)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (T5 | {"dec.blk.0.attn_q.weight": (64, 64)}, "full encoder-decoder"),
        (T5 | {"enc.blk.1.attn_rel_b.weight": (32, 4)}, "UMT5"),
        (
            T5 | {"enc.blk.3.surprise.weight": (64, 64)},
            r"1 tensor names match no T5 v1.1 rule: enc\.blk\.3\.surprise\.weight",
        ),
        ({"token_embd.weight": (100, 64), "blk.0.attn_q.weight": (64, 64)}, "no text encoder that can be loaded"),
    ],
    ids=["decoder", "umt5", "unknown name", "chat model"],
)
def test_encoders_of_no_use_are_refused_in_one_sentence(tmp_path, shapes, sentence):
    with pytest.raises(UnsupportedArch, match=sentence):
        load_text_encoder(write(tmp_path / "a.gguf", shapes, arch="llama"))


def test_errors_name_the_file_and_are_one_or_two_sentences(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03")
    for load in (load_diffusion_model, load_text_encoder):
        with pytest.raises(GGUFError, match=r"^broken\.gguf: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_strings_of_the_source_are_handed_on_and_others_are_not(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "ltxv")
    writer.add_string("config", '{"transformer": {}}')
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_uint32("steps", 7)
    writer.add_tensor("a.weight", np.zeros((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_diffusion_model(path)[1].metadata == {"config": '{"transformer": {}}'}


def test_one_stray_name_with_a_prefix_does_not_hide_the_model(tmp_path):
    path = write(tmp_path / "model.gguf", FLUX | {"diffusion_model.stray": (HIDDEN,)})
    assert set(load_diffusion_model(path)[0]) == {*FLUX, "diffusion_model.stray"}
