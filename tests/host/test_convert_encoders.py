# SPDX-License-Identifier: Apache-2.0
"""Text encoders that the converter wrote from safetensors give the hidden states of their dequantized weights.

The sources are reduced-size models of the host's own classes, in float16 and in scaled fp8, as ComfyUI ships encoders.
"""

import dataclasses
import functools

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.t5
import encoders
import folder_paths
import pytest
import torch
from gguf_kit import nodes
from gguf_kit.host.compat import is_quantized, quantized_modules, wrap
from gguf_kit.loader import load_text_encoder
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.ops import make_ops
from gguf_kit.quantize.convert import Conversion, convert
from gguf_kit.quantize.encode import TorchEngine
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.sources import open_source
from safetensors.torch import save_file

CPU = torch.device("cpu")
T5 = {
    "num_layers": 3, "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 512, "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True, "model_type": "t5", "vocab_size": 500,
}  # fmt: skip
# A size that the host's detection knows: T5 base, without a gate.
T5_BASE = T5 | {"num_layers": 12, "d_model": 768, "num_heads": 12, "d_ff": 3072, "vocab_size": 32128}
T5_BASE |= {"dense_act_fn": "relu", "is_gated_act": False}
CLIP = {
    "num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "hidden_act": "quick_gelu", "vocab_size": 96, "max_position_embeddings": 77, "eos_token_id": 95,
}  # fmt: skip


def _t5(config):
    return lambda operations: comfy.text_encoders.t5.T5(dict(config), torch.float32, CPU, operations)


def _clip(operations):
    return comfy.clip_model.CLIPTextModel(dict(CLIP), torch.float32, CPU, operations)


MODELS = {"t5": _t5(T5), "umt5": _t5(T5 | {"model_type": "umt5"}), "clip-l": _clip}
FAMILIES = ("qwen3 4b", "llama 3", "mistral small", "qwen2.5-vl 7b", "gemma 2", "gemma 3 4b", "gemma 4 e2b", "qwen3.5")
MODELS |= {name: encoders.FAMILIES[name].build for name in FAMILIES if encoders.FAMILIES[name].known()}
TOKENIZER = torch.arange(256, dtype=torch.uint8)
TOKENIZER_KEYS = {"umt5": "spiece_model", "gemma 2": "spiece_model", "gemma 3 4b": "spiece_model"}
TOKENIZER_KEYS |= {"mistral small": "tekken_model", "gemma 4 e2b": "tokenizer_json"}
# Positions and CLIP's projection, and what decides about the states of linear attention.
KEPT = ("position", "relative", "text_projection", "in_proj_a.", "in_proj_b.", "per_layer_model_projection")


def random_state(model, dtype=torch.float16):
    """The model's keys with random values, norms around what is usual for them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in model.state_dict().items():
        spread = 0.1 if value.dim() < 2 else value.shape[-1] ** -0.5
        state[key] = (torch.randn(value.shape, generator=generator) * spread).to(dtype)
    return state


def write(path, state, type_name):
    """Save a state dict as safetensors, convert it, and return the path of the GGUF file."""
    save_file({key: value.contiguous() for key, value in state.items()}, path.with_suffix(".safetensors"))
    source = open_source(path.with_suffix(".safetensors"))
    convert(Conversion(source, make_plan(source, Choices(type_name)), path.stem), path, TorchEngine(), overwrite=True)
    return path


def dense_state(path):
    state, _ = load_text_encoder(path)
    return {k: v.dequantize() if isinstance(v, QuantizedBytes) else v for k, v in state.items()}


def host_state(path):
    state, _ = load_text_encoder(path)
    return {k: wrap(v.data, v.qtype, v.shape) if isinstance(v, QuantizedBytes) else v for k, v in state.items()}


def hidden_states(model, name):
    if name == "clip-l":
        return model(torch.tensor([[1, 2, 94, *[95] * 74]]))[0]
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    tokens = torch.tensor([[5, 95, 0, 17, 3]])
    if "t5" in name:
        return model(tokens, mask)[0]
    named = {"input_ids": tokens} if hasattr(model.model, "embed_tokens_per_layer") else {}
    run = model.model if named or name == "qwen3.5" else model
    return run(tokens, attention_mask=mask, dtype=torch.float32, **named)[0]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M", ""], ids=["Q8_0", "Q4_K_M", "as it is"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_equal_those_of_the_dequantized_file(tmp_path, monkeypatch, name, type_name):
    encoders.without_other_parts(monkeypatch)
    dense, quantized = MODELS[name](comfy.ops.manual_cast), MODELS[name](make_ops())
    state = random_state(dense)
    published = {
        k.replace("model.", "model.language_model.", 1) if name == "qwen3.5" else k: v for k, v in state.items()
    }
    blobs = {TOKENIZER_KEYS[name]: TOKENIZER} if name in TOKENIZER_KEYS else {}
    path = write(tmp_path / "encoder.gguf", published | blobs, type_name)
    loaded = host_state(path)
    assert comfy.sd.detect_te_model(loaded) == comfy.sd.detect_te_model(published)
    assert loaded.keys() == published.keys() | blobs.keys()
    for key in blobs:
        assert torch.equal(loaded[key], TOKENIZER)
    decoded = dense_state(path)
    for key, value in published.items():
        error = (decoded[key].float() - value.float()).norm() / value.float().norm()
        assert error <= {"": 0, "Q8_0": 0.01, "Q4_K_M": 0.1}[type_name], key
    for model, values in ((dense, decoded), (quantized, loaded)):
        named = {k.replace("language_model.", ""): v for k, v in values.items() if k not in blobs}  # as the host does
        result = model.load_state_dict(named, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
    n_matrices = sum(v.dim() == 2 and not any(part in k for part in KEPT) for k, v in state.items())
    assert len(list(quantized_modules(quantized))) == (n_matrices if type_name else 0)
    with torch.inference_mode():
        expected, actual = (hidden_states(model, name) for model in (dense, quantized))
    assert expected.isfinite().all()
    assert torch.equal(actual, expected)


def test_scaled_fp8_gives_what_the_host_computes_from_it(tmp_path):
    """The values are those that the host's own reading of the file has."""
    state, stored = random_state(MODELS["t5"](comfy.ops.manual_cast)), {}
    scales = {key: value.abs().max().float() / 448 for key, value in state.items() if "block" in key and ".w" in key}
    for key, value in state.items():
        is_linear = value.dim() == 2 and "relative" not in key and "block" in key
        stored[key] = (value.float() / scales[key]).to(torch.float8_e4m3fn) if is_linear else value
        if is_linear:
            stored[key.replace(".weight", ".scale_weight")] = scales[key]
    stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    values = dense_state(write(tmp_path / "t5xxl_fp8_e4m3fn_scaled.gguf", stored, "F32"))
    assert values.keys() == state.keys()
    for key, value in values.items():
        expected = stored[key].float() * (scales[key] if stored[key].dtype is torch.float8_e4m3fn else 1)
        assert torch.equal(value, expected), key


# -- through the nodes


def load_in_node(monkeypatch, path, clip_type):
    paths, extensions = folder_paths.folder_names_and_paths["clip_gguf"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "clip_gguf", ([*paths, str(path.parent)], {*extensions, ".gguf"})
    )
    (clip,) = nodes.CLIPLoaderGGUF().load_clip(clip_name=path.name, type=clip_type)
    return clip


def encode(clip, text="a red seven on black ground, 7"):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text))


def by_host(path, clip_type):
    return comfy.sd.load_text_encoder_state_dicts(
        [dense_state(path)],
        clip_type=getattr(comfy.sd.CLIPType, clip_type.upper()),
        model_options={"dtype": torch.float32},
    )


def test_a_converted_t5_in_the_node(tmp_path, monkeypatch):
    state = random_state(_t5(T5_BASE)(comfy.ops.manual_cast))
    path = write(tmp_path / "t5-base.gguf", state, "Q8_0")
    clip = load_in_node(monkeypatch, path, "stable_audio")
    assert len(list(quantized_modules(clip.cond_stage_model))) == 1 + 12 * 6
    assert torch.equal(encode(clip), encode(by_host(path, "stable_audio")))


def test_a_converted_clip_l_in_the_node(tmp_path, monkeypatch):
    config = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32).transformer
    path = write(tmp_path / "clip_l.gguf", random_state(config), "Q8_0")
    clip = load_in_node(monkeypatch, path, "stable_diffusion")
    assert len(list(quantized_modules(clip.cond_stage_model))) == 1 + 12 * 6
    assert torch.equal(encode(clip), encode(by_host(path, "stable_diffusion")))


def small_host(monkeypatch, config):
    """Let the host build reduced models."""
    small = {f"{name}_model_config": dict(config) for name in ("gemma2_2b", "qwen3_4b")}
    load = comfy.sd.load_text_encoder_state_dicts

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | small, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)


@pytest.mark.parametrize("name", ["gemma 2", "qwen3 4b"])
def test_a_converted_language_model_in_the_node(tmp_path, monkeypatch, name):
    """With Gemma's tokenizer, which the host reads from the converted file."""
    family = encoders.FAMILIES[name]
    family = dataclasses.replace(family, config=family.config | {"vocab_size": 320, "num_hidden_layers": 3})
    state = random_state(family.build())
    if family.tokenizer:
        encoders.write_encoder(family, tmp_path / "llama-cpp.gguf")
        state["spiece_model"] = load_text_encoder(tmp_path / "llama-cpp.gguf")[0]["spiece_model"]
    path = write(tmp_path / "encoder.gguf", state, "Q4_K_M")
    small_host(monkeypatch, family.config)
    clips = load_in_node(monkeypatch, path, family.clip_type), by_host(path, family.clip_type)
    models = [next(m for m in c.cond_stage_model.modules() if type(m) is family.host_class()) for c in clips]
    assert is_quantized(models[0].model.embed_tokens.weight)
    tokens = torch.tensor([[5, 319, 0, 17, 3]])
    with torch.inference_mode():
        actual, expected = (model(tokens, attention_mask=None, dtype=torch.float32)[0] for model in models)
    assert torch.equal(actual, expected)
    if family.tokenizer:
        assert torch.equal(*(encode(clip, "a b") for clip in clips))
