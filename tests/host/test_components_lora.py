# SPDX-License-Identifier: Apache-2.0
"""LoRAs from GGUF: the same picture as the LoRA of their dequantized values that the host loads from safetensors."""

import logging

import comfy.lora
import comfy.sd
import comfy.utils
import gguf
import numpy as np
import pytest
import tiny
import torch
from component_files import random_weights, search_in, write_gguf
from gguf_kit import components, nodes, nodes_components
from gguf_kit.errors import UnsupportedArch
from safetensors.torch import save_file

import nodes as host_nodes

LAYERS = ("double_blocks.0.img_attn.proj", "double_blocks.1.txt_mlp.0", "single_blocks.0.linear2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return search_in(monkeypatch, tmp_path)


@pytest.fixture
def model(tiny_flux):
    return tiny.quantized_model(tiny_flux("Q8_0"))


def factors(model, rank=32, names=("{}.lora_up.weight", "{}.lora_down.weight")):
    """A LoRA of some layers of the tiny Flux, strong enough to be seen."""
    shapes = {}
    for layer in LAYERS:
        n_out, n_in = comfy.utils.get_attr(model.model.diffusion_model, layer).weight.shape
        shapes |= {names[0].format(layer): (n_out, rank), names[1].format(layer): (rank, n_in)}
    return random_weights(shapes)


def named(model, rank=32):
    lora = {f"diffusion_model.{key}": value for key, value in factors(model, rank).items()}
    return lora | {f"diffusion_model.{layer}.alpha": torch.tensor(8.0) for layer in LAYERS[:2]}


def write_typed(path, weights, qtype, metadata=()):
    """A file of one type, vectors and scalars F32; what it dequantizes to."""
    writer, exact = gguf.GGUFWriter(path, "flux"), {}
    for key, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for key, weight in weights.items():
        values = np.ascontiguousarray(weight.float().numpy())
        used = qtype if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.atleast_1d(values), used)
        writer.add_tensor(key, data, raw_dtype=used)
        exact[key] = torch.from_numpy(gguf.quants.dequantize(data, used).copy()).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def by_host(folder, model, lora, strength):
    """The host's own loader over the same values in a safetensors file."""
    save_file({key: value.contiguous() for key, value in lora.items()}, folder / "host.safetensors")
    nodes.folder_paths.filename_list_cache.clear()
    return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, "host.safetensors", strength)[0]


def ours(model, strength=1.0, name="lora.gguf"):
    return nodes_components.LoraLoaderModelOnlyGGUF().load_lora_model_only(model, name, strength)[0]


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q5_1"])
def test_a_lora_of_every_type_equals_its_values_from_safetensors(folder, model, type_name, inference_mode):
    exact = write_typed(folder / "lora.gguf", named(model), gguf.GGMLQuantizationType[type_name])
    found = tiny.run(ours(model, 0.8))
    assert torch.equal(found, tiny.run(by_host(folder, model, exact, 0.8)))
    assert tiny.relative(found, tiny.run(model)) > 0.01


def test_pairs_with_one_alpha_for_all_are_read_as_the_host_writes_them(folder, model):
    pairs = factors(model, names=("{}.weight.lora_b", "{}.weight.lora_a"))
    metadata = (("general.type", "adapter"), ("adapter.type", "lora"), ("adapter.lora.alpha", 16.0))
    exact = write_typed(folder / "lora.gguf", pairs, gguf.GGMLQuantizationType.Q8_0, metadata)
    expected = {f"diffusion_model.{layer}.alpha": torch.tensor(16.0) for layer in LAYERS}
    for key, value in exact.items():
        side = "lora_B" if key.endswith("b") else "lora_A"
        expected[f"diffusion_model.{key[: -len('.weight.lora_x')]}.{side}.weight"] = value
    assert torch.equal(tiny.run(ours(model)), tiny.run(by_host(folder, model, expected, 1.0)))


def test_text_encoders_get_their_part_of_a_lora(folder, monkeypatch):
    given = []

    def patch(model, clip, lora, strength_model, strength_clip, lora_metadata=None):
        given.append((lora, strength_model, strength_clip, lora_metadata))
        return model, clip

    monkeypatch.setattr(comfy.sd, "load_lora_for_models", patch)
    pair = {"lora_te1_x.lora_up.weight": torch.ones(64, 32), "lora_te1_x.lora_down.weight": torch.ones(32, 64)}
    write_gguf(folder / "lora.gguf", pair, {"ss_base": "flux"})
    node = nodes_components.LoraLoaderGGUF()
    assert node.load_lora(model="m", clip="c", lora_name="lora.gguf", strength_model=0.5, strength_clip=0) == ("m", "c")
    ((lora, *others),) = given
    assert {*lora} == {*pair}
    assert others == [0.5, 0, {"ss_base": "flux"}]


def test_without_strength_nothing_is_read():
    node = nodes_components.LoraLoaderGGUF()
    assert node.load_lora("model", "clip", "not there.gguf", 0, 0) == ("model", "clip")
    assert node.load_lora("model", None, "not there.gguf", 0) == ("model", None)
    with pytest.raises(FileNotFoundError):
        node.load_lora("model", "clip", "not there.gguf", 0, 1)


def test_the_last_lora_is_kept_until_its_file_changes(folder, model, monkeypatch):
    exact = write_typed(folder / "lora.gguf", named(model), gguf.GGMLQuantizationType.Q8_0)
    reads, load = [], nodes_components.load_lora
    monkeypatch.setattr(nodes_components, "load_lora", lambda path: reads.append(path) or load(path))
    node = nodes_components.LoraLoaderModelOnlyGGUF()
    for strength in (1.0, 0.5):
        node.load_lora_model_only(model, "lora.gguf", strength)
    assert len(reads) == 1
    write_typed(folder / "lora.gguf", {k: -v for k, v in exact.items()}, gguf.GGMLQuantizationType.F16)
    node.load_lora_model_only(model, "lora.gguf", 1.0)
    assert len(reads) == 2


def test_a_quantized_lora_says_that_it_is_dequantized(folder, model, caplog):
    for type_name, says in (("Q8_0", True), ("F16", False)):
        caplog.clear()
        write_typed(folder / "lora.gguf", named(model), gguf.GGMLQuantizationType[type_name])
        with caplog.at_level(logging.INFO, "gguf_kit"):
            ours(model)
        assert "lora.gguf: a LoRA" in caplog.text
        assert ("takes no quantized LoRA, so its weights were dequantized" in caplog.text) == says


def test_a_lora_for_a_language_model_is_refused(folder, model):
    pairs = random_weights({"blk.0.attn_q.weight.lora_a": (8, 32), "blk.0.attn_q.weight.lora_b": (64, 8)})
    write_gguf(folder / "lora.gguf", pairs)
    with pytest.raises(UnsupportedArch, match=r"LoRA for a language model in llama.cpp's names \(blk\.0\.attn_q\)"):
        ours(model)


def test_a_file_without_any_lora_key_is_refused(folder, model):
    write_gguf(folder / "lora.gguf", random_weights({"a.b.weight": (4, 32), "c.bias": (4,)}))
    with pytest.raises(UnsupportedArch, match="does not recognise it as a LoRA"):
        ours(model)


def test_the_names_of_factors_are_sought_at_the_end_of_a_key():
    import time

    dotted = {"a" + ".b" * 20_000 + ".lora_up": (4, 4)}
    start = time.process_time()
    assert not components._is_lora({key: torch.zeros(shape) for key, shape in dotted.items()})
    assert time.process_time() - start < 2
    for up, down in (
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        (".lora_B.default.weight", ".lora_A.default.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_B", ".lora_A"),
        (".lokr_w1", ".lokr_w2"),
        (".diff", ".alpha"),
    ):
        assert components._is_lora({f"a.b.c{up}": torch.zeros(4, 4), f"a.b.c{down}": torch.zeros(1)})


def test_pairs_of_a_text_encoder_reach_it(folder):
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    write_gguf(folder / "lora.gguf", random_weights({f"{layer}.lora_a": (8, 32), f"{layer}.lora_b": (64, 8)}))
    lora, _ = components.load_lora(str(folder / "lora.gguf"))
    assert [*comfy.lora.load_lora(lora, {layer: "there"}, False)] == ["there"]
