# SPDX-License-Identifier: Apache-2.0
"""Text encoders through the converter: what is taken from a file, and that the loader gives back what is written."""

import json

import gguf
import model_keys
import numpy as np
import pytest
import torch
from encoder_files import N_TOKENS, TOKENIZERS, WIDTH, save, small_encoder
from gguf_kit.errors import UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_text_encoder
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.quantize.inspect import describe
from gguf_kit.quantize.sources import open_source
from gguf_kit.tools import convert, quantize
from source_files import fail, marker, model, save_shards

Q = gguf.GGMLQuantizationType
NAMES = model_keys.list_encoders()
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
LEFT_OUT = {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids", "lm_head.weight"}


def run(*arguments, tool=convert):
    return tool.main([*map(str, arguments), "--threads", "1", "--engine", "torch"])


def make(path, type_name="", *arguments):
    """Convert a file; the path of what was written."""
    target = path.with_suffix(f".{type_name or 'own'}.gguf")
    assert run("--src", path, "--dst", target, *(["--type", type_name] if type_name else []), *arguments) == 0
    return target


def values_of(path):
    state, info = load_text_encoder(path)
    return {k: v.dequantize() if isinstance(v, QuantizedBytes) else v for k, v in state.items()}, state, info


def through(tensor, qtype):
    """What a tensor is once it is stored in a type, by gguf-py."""
    if qtype in (Q.F32, Q.F16, Q.I8):
        return tensor if qtype is Q.I8 else tensor.to(torch.float16 if qtype is Q.F16 else torch.float32)
    data = gguf.quants.quantize(tensor.float().numpy().reshape(-1, tensor.shape[-1]), qtype)
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, qtype))).reshape(tensor.shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_gives_back_the_keys_and_values_that_were_converted(tmp_path, name):
    state = small_encoder(name)
    path = make(save(tmp_path / "encoder.safetensors", state), "Q8_0")
    values, stored, info = values_of(path)
    qtypes = {t.name: t.qtype for t in GGUFFile(path).tensors.values()}
    assert set(values) == set(state) - LEFT_OUT
    for key, value in values.items():
        wanted = state[key].reshape(tuple(state[key].shape) or (1,))  # GGUF has no scalars
        assert torch.equal(value, through(wanted, qtypes[key])), key
    tokens = next(key for key, shape in state.items() if tuple(shape.shape[:1]) == (N_TOKENS,))
    assert qtypes[tokens] is Q.Q8_0
    assert isinstance(stored[tokens], QuantizedBytes)
    assert info.qtypes["Q8_0"] > 8
    assert describe(GGUFFile(path)).title


@pytest.mark.parametrize("name", NAMES)
def test_without_a_type_every_matrix_keeps_its_values(tmp_path, name):
    state = small_encoder(name, torch.bfloat16)
    values, _, _ = values_of(make(save(tmp_path / "encoder.safetensors", state)))
    for key, value in values.items():
        assert torch.equal(value.float(), state[key].reshape(tuple(state[key].shape) or (1,)).float()), key


@pytest.mark.parametrize("key", TOKENIZERS)
def test_a_tokenizer_keeps_its_bytes_in_as_many(tmp_path, key):
    name = {"spiece_model": "te-gemma2-2b", "tekken_model": "te-mistral3-24b", "tokenizer_json": "te-qwen3-4b"}[key]
    blob = torch.arange(256, dtype=torch.uint8)
    path = make(save(tmp_path / "encoder.safetensors", small_encoder(name) | {key: blob}), "Q8_0")
    info = GGUFFile(path).tensors[key]
    assert (info.qtype, info.n_bytes) == (Q.I8, 256)
    value = load_text_encoder(path)[0][key]
    assert value.dtype is torch.uint8
    assert torch.equal(value, blob)


def test_a_second_step_gives_the_bytes_of_one(tmp_path):
    source = save(tmp_path / "encoder.safetensors", small_encoder("te-umt5xxl"))
    first, once = make(source), make(source, "Q8_0")
    twice = tmp_path / "twice.gguf"
    assert run("--src", first, "--dst", twice, "--type", "Q8_0", tool=quantize) == 0
    one, two = GGUFFile(once), GGUFFile(twice)
    assert list(one.tensors) == list(two.tensors)
    assert two.arch == one.arch == "t5encoder"
    assert all(torch.equal(one.data(name), two.data(name)) for name in one.tensors)


# --- what is taken from a file

RENAMED = {
    "in a wrapper": ("te-t5xxl", lambda key: f"text_encoders.t5xxl.transformer.{key}"),
    "of Stable Diffusion": ("te-clip-l", lambda key: f"cond_stage_model.transformer.{key}"),
    "without text_model": ("te-clip-l", lambda key: key.removeprefix("text_model.")),
    "of a published Gemma 3": ("te-gemma3-12b", lambda key: key.replace("model.", "language_model.model.", 1)),
    "without model": ("te-qwen3-4b", lambda key: key.removeprefix("model.")),
    "of a compiled model": ("te-llama3-8b", lambda key: f"_orig_mod.{key}"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_become_those_of_comfyui(tmp_path, case):
    name, rename = RENAMED[case]
    state = {key: value for key, value in small_encoder(name).items() if "vision" not in key and "multi" not in key}
    path = save(tmp_path / "encoder.safetensors", {k if k in TOKENIZERS else rename(k): v for k, v in state.items()})
    if case == "in a wrapper":
        path = save(tmp_path / "encoder.safetensors", {rename(k): v for k, v in state.items()})
    assert set(open_source(path).tensors) == set(state) - LEFT_OUT
    assert set(load_text_encoder(make(path))[0]) == set(state) - LEFT_OUT


def test_the_vision_part_of_a_published_gemma_gets_comfyui_s_names(tmp_path):
    state = small_encoder("te-gemma3-12b")
    for place in ("vision_tower.", "model.vision_tower."):
        names = {key: f"{place}{key}" if key.startswith("vision_model.") else key for key in state}
        names = {key: f"model.{name}" if name.startswith("multi_") else name for key, name in names.items()}
        path = save(tmp_path / "gemma.safetensors", {names[key]: value for key, value in state.items()})
        assert set(open_source(path).tensors) == set(state)


def test_the_vision_part_of_mistral_is_left_out_as_comfyui_s_class_has_none(tmp_path):
    state = small_encoder("te-mistral3-24b") | {"vision_tower.ln_pre.weight": torch.ones(4)}
    source = open_source(save(tmp_path / "mistral.safetensors", state))
    assert "vision_tower.ln_pre.weight" not in source.tensors
    assert source.notes[0].endswith("left out: vision_tower.ln_pre.weight")


def test_a_full_t5_gives_its_encoder_with_a_note(tmp_path):
    state = small_encoder("te-t5xxl")
    other = {k.replace("encoder.", "decoder.", 1): v.clone() for k, v in state.items() if "block" in k}
    source = open_source(save(tmp_path / "t5.safetensors", state | other | {"lm_head.weight": torch.ones(4, 4)}))
    assert not any(name.startswith(("decoder.", "lm_head.")) for name in source.tensors)
    assert source.notes[0].startswith(f"{len(other) + 2} tensors that ComfyUI's text encoder has no use for left out: ")


def test_shards_of_a_published_model_are_taken_with_their_tokenizer(tmp_path):
    state = small_encoder("te-gemma2-2b")
    blob = state.pop("spiece_model")
    save_shards(tmp_path, state)
    (tmp_path / "tokenizer.model").write_bytes(bytes(blob.tolist()))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        source = open_source(path)
        assert set(source.tensors) == {*state, "spiece_model"}
        assert torch.equal(source.read("spiece_model").view(torch.uint8), blob)


def test_an_encoder_without_the_tokenizer_that_it_needs_is_refused(tmp_path):
    state = small_encoder("te-gemma2-2b")
    del state["spiece_model"]
    (tmp_path / "tokenizer.model").write_bytes(b"of another model")
    message = fail(save(tmp_path / "gemma.safetensors", state), UnsupportedArch)
    assert "this Gemma 2 has no tokenizer (tensor 'spiece_model')" in message
    assert "tokenizer.model" in message


def test_two_encoders_in_one_file_are_refused(tmp_path):
    state = {f"text_encoders.clip_l.transformer.{k}": v for k, v in small_encoder("te-clip-l").items()}
    state |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in small_encoder("te-t5xxl").items()}
    assert "it holds 2 text encoders (behind text_encoders." in fail(save(tmp_path / "both.safetensors", state))


def test_an_encoder_with_a_lora_that_is_not_merged_is_refused(tmp_path):
    state = small_encoder("te-qwen3-4b")
    key = "model.layers.0.self_attn.q_proj"
    state |= {f"{key}.base_layer.weight": state.pop(f"{key}.weight"), f"{key}.lora_A.default.weight": torch.ones(4, 4)}
    assert "a LoRA that is not merged" in fail(save(tmp_path / "qwen.safetensors", state), UnsupportedArch)


def test_a_whole_checkpoint_still_gives_its_diffusion_model(tmp_path):
    inside = {f"model.diffusion_model.{key}": value for key, value in model().items()}
    others = {f"cond_stage_model.transformer.{key}": value for key, value in small_encoder("te-clip-l").items()}
    source = open_source(save(tmp_path / "sd.safetensors", inside | others))
    assert set(source.tensors) == set(model())
    assert "of text encoders left out" in source.notes[0]


def test_a_diffusion_model_around_a_language_model_is_none(tmp_path):
    state = {key.replace("model.", "model.language_model.", 1): v for key, v in small_encoder("te-qwen3-4b").items()}
    state |= {"model.t_embedder1.mlp.0.weight": torch.ones(4, 4), "model.x_embedder.proj1.weight": torch.ones(4, 4)}
    source = open_source(save(tmp_path / "hidream-o1.safetensors", state))
    assert {"t_embedder1.mlp.0.weight", "language_model.embed_tokens.weight"} <= set(source.tensors)


# --- fp8

SCALE = 0.03125


def fp8_encoder(scheme):
    """(tensors of a T5 in fp8, the values that they stand for); vectors and the table of tokens stay in 16 bit."""
    stored, meant = {}, {}
    for key, value in small_encoder("te-umt5xxl").items():
        if ".weight" not in key or value.ndim < 2 or key.startswith("shared") or "bias" in key:
            stored[key], meant[key] = value, value.float() if value.is_floating_point() else value
            continue
        small = value.to(torch.float8_e4m3fn)
        stored[key], meant[key] = small, small.float() * (1 if scheme == "plain" else SCALE)
        layer, scale = key.removesuffix(".weight"), torch.tensor(SCALE)
        if scheme == "scaled_fp8":
            stored[f"{layer}.scale_weight"] = scale
        elif scheme == "comfy_quant":
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": marker({"format": "float8_e4m3fn"})}
    if scheme == "scaled_fp8":
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored, meant


@pytest.mark.parametrize("wrapper", ["", "text_encoders.umt5xxl.transformer."], ids=["no prefix", "wrapped"])
@pytest.mark.parametrize("scheme", ["plain", "scaled_fp8", "comfy_quant"])
def test_fp8_is_undone(tmp_path, scheme, wrapper):
    stored, meant = fp8_encoder(scheme)
    path = save(tmp_path / "umt5.safetensors", {wrapper + key: value for key, value in stored.items()})
    values, _, _ = values_of(make(path, "F32"))
    assert set(values) == set(meant)
    for key, value in values.items():
        assert torch.equal(value, meant[key]), key


# --- what is said about it


def dry_run(path, capsys, *arguments):
    assert run("--src", path, "--dry-run", "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_tells_the_encoder_and_its_roles(tmp_path, capsys):
    path = save(tmp_path / "t5.safetensors", small_encoder("te-t5xxl"))
    plan = dry_run(path, capsys, "--type", "Q4_K_M")
    rows = {row["name"]: row for row in plan["tensors"]}
    assert plan["arch"] == "t5"
    assert (rows["shared.weight"]["category"], rows["shared.weight"]["qtype"]) == ("token_embd", "Q6_K")
    assert (rows[T5]["category"], rows[T5]["qtype"]) == ("attn", "Q4_K")
    assert dry_run(path, capsys, "--type", "Q4_K_M", "--arch", "t5")["tensors"] == plan["tensors"]
    named = dry_run(path, capsys, "--type", "Q4_K_M", "--tensor-type", "^shared=Q8_0")
    assert next(row["qtype"] for row in named["tensors"] if row["name"] == "shared.weight") == "Q8_0"


def test_tables_of_tokens_keep_their_rows(tmp_path, capsys):
    """Rows are read one by one: they cannot be joined to longer ones, as those of other matrices are."""
    state = {key: value[..., : WIDTH - 8] for key, value in small_encoder("te-t5xxl").items() if value.ndim > 1}
    plan = dry_run(save(tmp_path / "t5.safetensors", state), capsys, "--type", "Q4_K_M")
    shapes = {row["name"]: (row["qtype"], row["bytes"]) for row in plan["tensors"]}
    assert shapes["shared.weight"] == ("F16", N_TOKENS * (WIDTH - 8) * 2)
    assert shapes[T5][0] == "Q4_K"


def test_the_architecture_that_is_written(tmp_path):
    for name, tag in (("te-clip-g", "clip_text"), ("te-llama3-8b", "llama-native"), ("te-qwen25-7b", "qwen2vl")):
        path = make(save(tmp_path / f"{name}.safetensors", small_encoder(name)))
        assert GGUFFile(path).arch == tag


@pytest.mark.parametrize("name", ["te-umt5xxl", "te-clip-g", "te-gemma3-12b"])
def test_the_inspector_names_it(tmp_path, name):
    title = {"te-umt5xxl": "UMT5", "te-clip-g": "CLIP-G", "te-gemma3-12b": "Gemma 3"}[name]
    path = make(save(tmp_path / "encoder.safetensors", small_encoder(name)))
    assert describe(GGUFFile(path)).title == title


def write_names(path, names, arch):
    writer = gguf.GGUFWriter(path, arch)
    for name in names:
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize(("arch", "title"), [("qwen3", "Qwen3"), ("qwen3vl", "Qwen3-VL")])
def test_the_inspector_goes_by_the_tag_where_tensors_are_alike(tmp_path, arch, title):
    block = ("attn_norm", "attn_q", "ffn_gate", "ffn_norm", "attn_q_norm")
    names = ["token_embd.weight", *(f"blk.0.{name}.weight" for name in block)]
    assert describe(write_names(tmp_path / "a.gguf", names, arch)).title == title


def test_the_inspector_names_a_vision_part(tmp_path):
    assert describe(write_names(tmp_path / "a.gguf", ["v.blk.0.attn_q.weight"], "clip")).title == "vision part (mmproj)"
