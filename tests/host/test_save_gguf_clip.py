# SPDX-License-Identifier: Apache-2.0
"""Save GGUF (CLIP): each encoder a file that loads again, patches merged, its tokenizer with it."""

import types

import comfy.clip_model
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import encoders
import folder_paths
import pytest
import torch
import vision_files
from comfy.weight_adapter import LoRAAdapter
from gguf_kit import nodes_save
from gguf_kit.errors import GGUFError, UnsupportedArch
from gguf_kit.host.compat import dequantize_weight, is_quantized
from gguf_kit.loader import load_text_encoder
from gguf_kit.models.values import floats
from gguf_kit.ops import make_ops
from gguf_kit.saver import save_clip
from gguf_kit.service import to_host
from test_vision_host import Written

CPU = torch.device("cpu")
CLIP = {
    "num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "hidden_act": "quick_gelu", "vocab_size": 96, "max_position_embeddings": 77, "eos_token_id": 95,
}  # fmt: skip
UMT5 = {
    "num_layers": 3, "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 512, "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True, "model_type": "umt5", "vocab_size": 500,
}  # fmt: skip
PATCHED = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
TOKENIZER = torch.arange(256, dtype=torch.uint8)


class Encoders(torch.nn.Module):
    """A CLIP model with encoders of these names."""

    def __init__(self, **transformers):
        super().__init__()
        for name, transformer in transformers.items():
            holder = torch.nn.Module()
            holder.transformer = transformer
            holder.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
            self.add_module(name, holder)


def make_clip(blobs=types.MappingProxyType({"spiece_model": TOKENIZER}), values=True, **transformers):
    """A CLIP as the host has it, as far as it is saved: patcher and tokenizer; with random values, or its own."""
    model, generator = Encoders(**transformers), torch.Generator().manual_seed(0)
    for param in model.parameters() if values else ():
        param.requires_grad_(False)
        param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
    tokenizer = types.SimpleNamespace(state_dict=lambda: dict(blobs))
    return types.SimpleNamespace(patcher=patcher, tokenizer=tokenizer)


def test_each_encoder_becomes_a_file_that_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    ops = comfy.ops.manual_cast
    clip_l = comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, ops)
    umt5 = comfy.text_encoders.t5.T5(dict(UMT5), torch.float32, CPU, ops)
    clip = make_clip(clip_l=clip_l, umt5xxl=umt5)
    up, down = torch.ones(512, 2), torch.ones(2, 256)
    assert clip.patcher.add_patches({PATCHED: LoRAAdapter(set(), (up, down, 2.0, None, None, None))}, 0.5)
    assert nodes_save.SaveGGUFCLIP().save(clip, "clip/test", "Q8_0") == {}
    weights = {key: value.clone() for key, value in clip.patcher.model.state_dict().items()}
    weights[PATCHED] += 1.0
    for name, transformer in (("clip_l", clip_l), ("umt5xxl", umt5)):
        state, info = load_text_encoder(tmp_path / "clip" / f"test_{name}-Q8_0_00001_.gguf")
        assert "Q8_0" in info.qtypes
        if name == "umt5xxl":
            assert torch.equal(state["spiece_model"], TOKENIZER)
        missing = set(transformer.state_dict()) - set(state)
        assert not {key for key in missing if not key.endswith(("position_ids", "logit_scale"))}
        for key, value in transformer.state_dict().items():
            if key in state:
                exact, found = weights[f"{name}.transformer.{key}"], floats(state[key])
                limit = exact.abs().max() / 127 * 0.57 + 1e-6  # half a step, and the rounding of the scale
                assert value.shape == found.shape
                assert (found - exact).abs().max() <= limit, key


KNOWN = [name for name, family in encoders.FAMILIES.items() if family.known()]
TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_is_the_same_encoder_again(tmp_path, monkeypatch, name):
    """Its keys, what the host detects in them, its tokenizer, and with the same types the same bytes."""
    family = encoders.FAMILIES[name]
    encoders.without_other_parts(monkeypatch)
    encoders.write_encoder(family, tmp_path / "first.gguf")
    first = to_host(load_text_encoder(tmp_path / "first.gguf")[0])
    model = family.build(make_ops())
    names = {"model.language_model.": "model."}  # as the host does
    model.load_state_dict(comfy.utils.state_dict_prefix_replace(dict(first), names), strict=False)
    blobs = {key: first[key] for key in TOKENIZERS if key in first}
    clip = make_clip(blobs, values=False, encoder=model)
    (plan,) = save_clip(clip, lambda part: tmp_path / f"{part}.gguf", "F32")
    assert plan.arch.is_encoder
    again = to_host(load_text_encoder(tmp_path / "encoder.gguf")[0])
    assert comfy.sd.detect_te_model(again) == comfy.sd.detect_te_model(first)
    for key in blobs:
        assert torch.equal(again[key], blobs[key])
    other = family.build(make_ops())
    other.load_state_dict(comfy.utils.state_dict_prefix_replace(dict(again), names), strict=False)
    expected, found = model.state_dict(), other.state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].to(torch.float32), merged(model, key, value)), key


TOWERS = [name for name, tower in vision_files.TOWERS.items() if tower.known() and name not in ("qwen3-vl 32b",)]


@pytest.mark.parametrize("name", TOWERS)
def test_the_part_that_sees_pictures_is_saved_too(tmp_path, monkeypatch, name):
    """Loaded by the host from the saved file, the encoder has it, and the same values in it."""
    tower = vision_files.TOWERS[name]
    tower.shrink(monkeypatch)
    written = Written(tower, tmp_path)
    _, model = written.quantized(written.read())
    blobs = {key: written.text[key] for key in TOKENIZERS if key in written.text}
    save_clip(make_clip(blobs, values=False, encoder=model), lambda part: tmp_path / "saved.gguf", "F32")
    state = to_host(load_text_encoder(tmp_path / "saved.gguf")[0])
    assert comfy.sd.detect_te_model(state).name == tower.family.detected
    _, again = written.load(state, custom_operations=make_ops())
    models = [model, again]
    expected, found = (model.state_dict() for model in models)
    assert set(found) == set(expected)
    assert any(map(tower.is_vision, found))
    for key, value in expected.items():
        assert torch.equal(merged(models[1], key, found[key]), merged(models[0], key, value)), key


def merged(model, key, value):
    """A weight as float32."""
    module = comfy.utils.get_attr(model, key.rpartition(".")[0])
    weight = getattr(module, key.rpartition(".")[2])
    return dequantize_weight(weight, torch.float32) if is_quantized(weight) else value.to(torch.float32)


def test_what_is_not_saved_is_told(tmp_path, caplog):
    clip = make_clip(clip_l=comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, comfy.ops.manual_cast))
    clip.patcher.model.connector = torch.nn.Linear(2, 2)
    with caplog.at_level("WARNING", "gguf_kit"):
        save_clip(clip, lambda part: tmp_path / f"{part}.gguf", "Q8_0")
    assert "2 tensors beside the text encoders are not saved: connector.weight, connector.bias" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["clip_l.gguf"]


def test_a_recipe_is_for_the_encoders_that_have_its_names(tmp_path):
    clip = make_clip(
        clip_l=comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, comfy.ops.manual_cast),
        umt5xxl=comfy.text_encoders.t5.T5(dict(UMT5), torch.float32, CPU, comfy.ops.manual_cast),
    )
    name = "text_model.encoder.layers.3.mlp.fc1.weight"
    plans = save_clip(clip, lambda part: tmp_path / f"{part}.gguf", "Q8_0", f"{name}=Q4_0")
    types = [{t.name: t.qtype.name for t in plan.tensors} for plan in plans]
    assert types[0][name] == "Q4_0"
    assert "Q4_0" not in types[1].values()
    with pytest.raises(GGUFError, match="line 1 of the recipe"):
        save_clip(clip, lambda part: tmp_path / f"x-{part}.gguf", "Q8_0", "nonsense")


def test_a_recipe_for_none_of_the_encoders_is_refused(tmp_path):
    clip = make_clip(clip_l=comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, comfy.ops.manual_cast))
    with pytest.raises(GGUFError, match=r"have none of the 1 names in the recipe: nope\.weight\. Take the recipe of"):
        save_clip(clip, lambda part: tmp_path / f"{part}.gguf", "Q8_0", "nope.weight=Q4_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["clip_l", "clip_l.transformer", "clip_l.transformer.text_model"])
def test_a_compiled_encoder_is_saved_under_its_names(tmp_path, part):
    clip = make_clip(clip_l=comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, comfy.ops.manual_cast))
    (plain,) = save_clip(clip, lambda part: tmp_path / f"plain-{part}.gguf", "Q8_0")
    module = torch.compile(comfy.utils.get_attr(clip.patcher.model, part), backend="eager")
    comfy.utils.set_attr(clip.patcher.model, part, module)
    (plan,) = save_clip(clip, lambda part: tmp_path / f"{part}.gguf", "Q8_0")
    assert [t.name for t in plan.tensors] == [t.name for t in plain.tensors]
    assert (tmp_path / "clip_l.gguf").exists()


def test_an_unknown_encoder_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    clip_l = comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, comfy.ops.manual_cast)
    with pytest.raises(UnsupportedArch, match=r"this text encoder is of no kind that can be saved as GGUF"):
        nodes_save.SaveGGUFCLIP().save(make_clip(clip_l=clip_l, other=torch.nn.Linear(4, 4)), "clip/test", "Q8_0")
    assert not list(tmp_path.rglob("*.gguf"))
