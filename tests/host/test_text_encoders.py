# SPDX-License-Identifier: Apache-2.0
"""Text encoders as GGUF give the hidden states of their dequantized weights, by themselves and through the nodes."""

import dataclasses
import functools

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import encoders
import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf_kit import nodes
from gguf_kit.errors import GGUFError
from gguf_kit.host.compat import is_quantized, quantized_modules, wrap
from gguf_kit.loader import load_text_encoder
from gguf_kit.models.clip_types import ENCODERS
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.ops import make_ops
from gguf_kit.service import load_clip, to_host
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
SMALL = {
    "num_layers": 3,
    "d_model": 256,
    "d_kv": 64,
    "num_heads": 4,
    "d_ff": 512,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
    "vocab_size": 500,
}
# A size that the host's detection knows: T5 base, 12 layers of 768, no gate in the MLP.
BASE = SMALL | {"num_layers": 12, "d_model": 768, "num_heads": 12, "d_ff": 3072, "vocab_size": 32128}
BASE |= {"dense_act_fn": "relu", "is_gated_act": False}


def host_model(config, operations=comfy.ops.manual_cast):
    return comfy.text_encoders.t5.T5(config, torch.float32, torch.device("cpu"), operations)


def write_t5(path, config, qtype, tokenizer=""):
    """Random weights of the host's class, named by gguf-py's table as llama.cpp names them."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config["num_layers"])
    writer = gguf.GGUFWriter(path, "t5encoder")
    encoders.add_tokenizer(writer, tokenizer)
    generator = np.random.default_rng(0)
    for key, shape in ((k, tuple(v.shape)) for k, v in host_model(config).state_dict().items()):
        name = table.get_name(key, try_suffixes=(".weight",))
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            used = qtype if shape[-1] % 256 == 0 else Q.F16
            data = gguf.quants.quantize(values, used) if used == Q.F16 else quantize_with_ggml(values, used)
            writer.add_tensor(name, data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def float_state(path):
    state, _ = load_text_encoder(path)
    return {k: v.dequantize() if isinstance(v, QuantizedBytes) else v.float() for k, v in state.items()}


@pytest.mark.parametrize("qtype", [Q.Q8_0, Q.Q4_K, Q.Q3_K], ids=lambda q: q.name)
def test_hidden_states_equal_those_of_the_dequantized_encoder(tmp_path, qtype, inference_mode):
    path = write_t5(tmp_path / "t5.gguf", SMALL, qtype)
    dense, quantized = host_model(SMALL), host_model(SMALL, make_ops())
    dense.load_state_dict(float_state(path))
    result = quantized.load_state_dict(to_host(load_text_encoder(path)[0]))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert is_quantized(quantized.shared.weight)
    assert len(list(quantized_modules(quantized))) == 1 + 3 * 7
    tokens, mask = torch.tensor([[5, 499, 0, 17, 3]]), torch.tensor([[1, 1, 1, 1, 0]])
    for attention_mask in (None, mask):
        expected, actual = (model(tokens, attention_mask)[0] for model in (dense, quantized))
        assert torch.equal(actual, expected)


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5") / "t5-base-Q8_0.gguf", BASE, Q.Q8_0)


def encode(clip, text="a red seven on black ground, 7"):
    return clip.encode_from_tokens(clip.tokenize(text))


def test_the_clip_loader_node_encodes_as_the_host_does_with_dequantized_weights(t5_base, monkeypatch):
    folder_key = nodes.folder_paths.folder_names_and_paths
    monkeypatch.setitem(folder_key, "clip_gguf", ([str(t5_base.parent)], {".gguf"}))
    (clip,) = nodes.CLIPLoaderGGUF().load_clip(clip_name=t5_base.name, type="stable_audio", device="cpu")
    dense = comfy.sd.load_text_encoder_state_dicts(
        [float_state(t5_base)], clip_type=comfy.sd.CLIPType.STABLE_AUDIO, model_options={"dtype": torch.float32}
    )
    assert len(list(quantized_modules(clip.cond_stage_model))) == 1 + 12 * 6
    with torch.inference_mode():
        assert torch.equal(encode(clip), encode(dense))
    (again,) = nodes.CLIPLoaderGGUF().load_clip(t5_base.name, "stable_audio")
    assert type(again.cond_stage_model) is type(clip.cond_stage_model)
    assert type(clip.patcher).__name__ == "GGUFPatcher"
    assert type(clip.clone().patcher).__name__ == "GGUFPatcher"


def test_an_incomplete_t5_is_refused(t5_base, tmp_path):
    import tiny

    path = tiny.copy_file(t5_base, tmp_path / "t5.gguf", keep=lambda name: name != "enc.blk.5.ffn_down.weight")
    with pytest.raises(GGUFError, match=r"t5\.gguf: 1 tensors .* missing: .*block\.5\.layer\.1.*wo\.weight"):
        load_clip((str(path),), "stable_audio")


def test_a_lora_on_the_text_encoder(t5_base):
    clip = load_clip((str(t5_base),), "stable_audio")
    dense = comfy.sd.load_text_encoder_state_dicts(
        [float_state(t5_base)], clip_type=comfy.sd.CLIPType.STABLE_AUDIO, model_options={"dtype": torch.float32}
    )
    key = next(k for k in clip.cond_stage_model.state_dict() if k.endswith("block.3.layer.1.DenseReluDense.wo.weight"))
    outputs = []
    for loaded in (clip, dense):
        patched = loaded.clone()
        generator = torch.Generator().manual_seed(0)
        difference = torch.randn(768, 3072, generator=generator) * 0.02
        assert patched.add_patches({key: ("diff", (difference,))}, 0.5) == [key]
        with torch.inference_mode():
            outputs.append(encode(patched))
            assert not torch.equal(outputs[-1], encode(loaded))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_saving_a_text_encoder_gives_float_weights(t5_base):
    clip = load_clip((str(t5_base),), "stable_audio")
    weights = float_state(t5_base)
    for state in (clip.get_sd(), getattr(clip, "state_dict_for_saving", clip.get_sd)()):
        key = next(k for k in state if k.endswith("shared.weight"))
        assert torch.equal(state[key].to("cpu").float(), weights["shared.weight"].to(state[key].dtype).float())
    factory, arguments = clip.patcher.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not clip.patcher.model


def test_flux_takes_a_gguf_t5_beside_a_safetensors_clip(tmp_path, monkeypatch):
    """DualCLIPLoader (GGUF), type flux, with the host's own Flux text model around a smaller T5."""
    t5, clip_l = (
        write_t5(tmp_path / "t5-Q4_0.gguf", SMALL | {"d_model": 4096, "vocab_size": 32128}, Q.Q4_0),
        tmp_path / "clip_l.safetensors",
    )
    safetensors.torch.save_file(random_clip_l(), clip_l)
    load = comfy.sd.load_text_encoder_state_dicts
    small = {"t5xxl_model_config": SMALL | {"d_model": 4096, "vocab_size": 32128}}

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | small, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)
    for key in ("clip_gguf", "text_encoders"):
        paths, extensions = nodes.folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, key, ([*paths, str(tmp_path)], extensions))
    (clip,) = nodes.DualCLIPLoaderGGUF().load_clip(clip_name1=clip_l.name, clip_name2=t5.name, type="flux")
    dense = load_small(
        [safetensors.torch.load_file(clip_l), float_state(t5)],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options={"dtype": torch.float32},
    )
    with torch.inference_mode():
        actual, expected = (
            loaded.encode_from_tokens(loaded.tokenize("a red 7"), return_pooled=True) for loaded in (clip, dense)
        )
    assert len(list(quantized_modules(clip.cond_stage_model))) == 1 + 3 * 7
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def random_clip_l():
    """Shapes of CLIP-L (12 layers of 768), from the host's class, with small random values."""
    import json
    from pathlib import Path

    import comfy.clip_model
    import comfy.sd1_clip

    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, torch.device("cpu"), comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator) * 0.02 for k, v in model.state_dict().items()}


# -- every family of language models --

KNOWN = [name for name, family in encoders.FAMILIES.items() if family.known()]


@pytest.fixture(scope="module", params=KNOWN)
def written(request, tmp_path_factory):
    """(family, path, the weights that the file stands for)."""
    family = encoders.FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        encoders.without_other_parts(patch)
        path = tmp_path_factory.mktemp("encoder") / "encoder.gguf"
        return family, path, encoders.write_encoder(family, path)


def run_model(model, tokens, mask):
    """Last hidden state of a host's model; Gemma 4 wants the tokens once more for its second embedding."""
    named = {"input_ids": tokens} if hasattr(model.model, "embed_tokens_per_layer") else {}
    run = model.model if named or "Qwen35" in type(model).__name__ else model
    return run(tokens, attention_mask=mask, dtype=torch.float32, **named)[0]


def test_a_family_loads_to_the_hidden_states_of_its_dequantized_weights(written, monkeypatch):
    family, path, weights = written
    encoders.without_other_parts(monkeypatch)
    state, info = load_text_encoder(path)
    state = to_host(state)
    assert comfy.sd.detect_te_model(state).name == family.detected
    assert info.family in ENCODERS[family.detected].families
    state = comfy.utils.state_dict_prefix_replace(state, {"model.language_model.": "model."})  # as the host does
    dense, quantized = family.build(), family.build(make_ops())
    assert dense.load_state_dict(weights, strict=False).unexpected_keys == []
    result = quantized.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    others = [key for key in result.unexpected_keys if "visual." not in key]  # what stands for a vision part
    assert set(others) <= {"spiece_model", "tekken_model", "tokenizer_json"}
    assert is_quantized(quantized.model.embed_tokens.weight)
    n_matrices = sum(value.dim() == 2 for value in weights.values())
    assert len(list(quantized_modules(quantized))) == n_matrices
    tokens, mask = torch.tensor([[5, 95, 0, 17, 3]]), torch.tensor([[1, 1, 1, 1, 0]])
    with torch.inference_mode():
        for attention_mask in (None, mask):
            expected, actual = (run_model(model, tokens, attention_mask) for model in (dense, quantized))
            assert expected.isfinite().all()
            assert torch.equal(actual, expected)


KNOWN_TO_0_3_75 = {"llama 3", "mistral small", "qwen2.5 3b", "qwen2.5-vl 7b", "qwen2.5 without vision", "qwen3 4b"}
KNOWN_TO_0_3_75 |= {"gemma 2", "gemma 3 4b"}


def test_the_families_that_the_running_host_knows_are_all_tested():
    """A misspelt class in the table must not shrink the tests silently."""
    newer = hasattr(comfy.sd.TEModel, "GEMMA_4_E4B")
    assert set(KNOWN) == (set(encoders.FAMILIES) if newer else KNOWN_TO_0_3_75)


def load_with_config(monkeypatch, config):
    """Let the host's service build the models of the tests below with a configuration; returns that service."""
    small = {f"{name}_model_config": dict(config) for name in ("gemma2_2b", "qwen3_4b", "llama")}
    load = comfy.sd.load_text_encoder_state_dicts

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | small, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)
    return load_small


@pytest.mark.parametrize("name", ["gemma 2", "qwen3 4b", "llama 3"])
def test_the_node_service_loads_a_family_with_its_tokenizer(tmp_path, monkeypatch, name):
    """The whole way: file, detection, the host's class, its tokenizer from the file, hidden states."""
    family = encoders.FAMILIES[name]
    family = dataclasses.replace(family, config=family.config | {"vocab_size": 320, "num_hidden_layers": 3})
    weights = encoders.write_encoder(family, tmp_path / "encoder.gguf")
    state = load_text_encoder(tmp_path / "encoder.gguf")[0]
    weights |= {key: value for key, value in state.items() if key == "spiece_model"}
    load_small = load_with_config(monkeypatch, family.config)
    clip_type = getattr(comfy.sd.CLIPType, family.clip_type.upper())
    clip = load_clip((str(tmp_path / "encoder.gguf"),), family.clip_type)
    dense = load_small([weights], clip_type=clip_type, model_options={"dtype": torch.float32})
    assert type(clip.tokenizer) is type(dense.tokenizer)
    models = [loaded.cond_stage_model for loaded in (clip, dense)]
    inner = [next(m for m in model.modules() if type(m) is family.host_class()) for model in models]
    assert all(is_quantized(layer.mlp.up_proj.weight) for layer in inner[0].model.layers)
    tokens = torch.tensor([[5, 319, 0, 17, 3]])
    with torch.inference_mode():
        assert torch.equal(*(run_model(model, tokens, None) for model in inner))
        if name == "gemma 2":
            assert torch.equal(encode(clip, "a b"), encode(dense, "a b"))


@pytest.mark.parametrize("name", ["llama 3", "qwen3 4b", "gemma 2"])
def test_a_chat_model_of_a_size_that_the_host_has_no_class_for_is_refused_in_one_sentence(tmp_path, monkeypatch, name):
    """The tiny model of the other tests, this time with nothing that tells the host about its width."""
    encoders.write_encoder(encoders.FAMILIES[name], tmp_path / "chat.gguf")
    load_with_config(monkeypatch, {"num_hidden_layers": 3})
    with pytest.raises(GGUFError, match=r"^chat\.gguf: ComfyUI .* cannot build a model .*size mismatch") as caught:
        load_clip((str(tmp_path / "chat.gguf"),), encoders.FAMILIES[name].clip_type)
    assert "\n" not in str(caught.value)


def test_umt5_has_positions_in_every_block_and_its_tokenizer_in_the_state_dict(tmp_path):
    config = SMALL | {"model_type": "umt5"}
    path = write_t5(tmp_path / "umt5.gguf", config, Q.Q8_0, tokenizer="t5")
    state = load_text_encoder(path)[0]
    assert state.pop("spiece_model").dtype == torch.uint8
    dense, quantized = host_model(config), host_model(config, make_ops())
    dense.load_state_dict({k: v.dequantize() if isinstance(v, QuantizedBytes) else v for k, v in state.items()})
    quantized.load_state_dict(to_host(state))
    assert sum("relative_attention_bias" in key for key in state) == 3
    tokens = torch.tensor([[5, 499, 0, 17, 3]])
    assert torch.equal(quantized(tokens, None)[0], dense(tokens, None)[0])


@pytest.mark.skipif(not hasattr(comfy.sd.TEModel, "GPT_OSS_20B"), reason="this ComfyUI has no GPT-OSS")
def test_gpt_oss_gets_its_experts_joined(tmp_path):
    """Their values, and hidden states of the layers that keep them quantized."""
    import comfy.text_encoders.gpt_oss as gpt_oss

    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    config = gpt_oss.GptOss20BConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    experts = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True).MoEExperts
    ops = type("Ops", (comfy.ops.manual_cast,), {"MoEExperts": experts})
    model = gpt_oss.GptOssModel(config, CPU, torch.float32, ops)
    weights = encoders.write_gpt_oss(tmp_path / "gpt-oss.gguf", model)
    state = load_text_encoder(tmp_path / "gpt-oss.gguf")[0]
    assert comfy.sd.detect_te_model(to_host(state)).name == "GPT_OSS_20B"
    assert state.pop("tokenizer_json").dtype == torch.uint8
    assert state["layers.1.mlp.experts.gate_up_proj.weight"].qtype == Q.MXFP4
    values = {k: v.dequantize() if isinstance(v, QuantizedBytes) else v.float() for k, v in state.items()}
    assert values.keys() == weights.keys()
    for key, expected in weights.items():
        assert torch.equal(values[key], expected), key
    result = model.load_state_dict(values, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    quantized = gpt_oss.GptOssModel(config, CPU, torch.float32, make_ops())
    result = quantized.load_state_dict(to_host(state), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert is_quantized(quantized.layers[0].mlp.experts.gate_up_proj.weight)
    with torch.inference_mode():
        dense, actual = (m(torch.tensor([[5, 95, 0, 7]]))["last_hidden_state"] for m in (model, quantized))
        assert dense.isfinite().all()
        assert torch.equal(actual, dense)


@pytest.mark.parametrize("n_rows", [90, 100])
@pytest.mark.parametrize("qtype", [Q.Q4_K, Q.F16], ids=lambda q: q.name)
def test_a_vocabulary_may_have_a_few_rows_more_or_fewer_than_the_model(n_rows, qtype):
    layer = make_ops().Embedding(96, 256, dtype=torch.float32)
    values = np.random.default_rng(0).standard_normal((n_rows, 256), dtype=np.float32)
    data = torch.from_numpy(
        gguf.quants.quantize(values, qtype) if qtype == Q.F16 else quantize_with_ggml(values, qtype)
    )
    weight = data if qtype == Q.F16 else wrap(data, qtype, (n_rows, 256))
    assert layer.load_state_dict({"weight": weight}).missing_keys == []
    stored = torch.from_numpy(gguf.quants.dequantize(data.numpy(), qtype).astype(np.float32))
    found = layer(torch.arange(96), out_dtype=torch.float32)
    assert torch.equal(found[: min(n_rows, 96)], stored[:96])
    assert not found[n_rows:].any()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_ops().Embedding(96 + 2000, 256).load_state_dict({"weight": weight})


def test_what_a_file_lacks_takes_no_memory():
    layer = make_ops().Linear(4096, 4096, dtype=torch.float32)
    layer.load_state_dict({}, strict=False)
    assert layer.missing == {"weight", "bias"}
    assert layer.weight.untyped_storage().nbytes() == 4
    assert not layer(torch.ones(1, 4096)).any()


# -- original names --


@pytest.mark.parametrize(("n_layers", "detected"), [(12, "CLIP_L"), (32, "CLIP_G")], ids=["clip-l", "clip-g"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.removeprefix("text_model."),
        lambda key: f"text_encoders.clip_l.transformer.{key}",
    ],
    ids=["as it is", "without prefix", "behind a wrapper"],
)
def test_clip_in_its_own_names(tmp_path, n_layers, detected, rename):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": n_layers}
    config = sizes | {"hidden_act": "quick_gelu", "vocab_size": 96, "max_position_embeddings": 77, "eos_token_id": 95}
    dense, quantized = (
        comfy.clip_model.CLIPTextModel(config, torch.float32, CPU, ops) for ops in (comfy.ops.manual_cast, make_ops())
    )
    generator = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(v.shape, generator=generator) * 0.05 for k, v in dense.state_dict().items()}
    path = encoders.write_native(tmp_path / "clip.gguf", weights, rename)
    state = load_text_encoder(path)[0]
    assert comfy.sd.detect_te_model(to_host(state)).name == detected
    dense.load_state_dict({k: v.dequantize() if isinstance(v, QuantizedBytes) else v.float() for k, v in state.items()})
    quantized.load_state_dict(to_host(state))
    tokens = torch.tensor([[1, 2, 94, *[95] * 74]])
    for actual, expected in zip(quantized(tokens), dense(tokens), strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


@pytest.mark.parametrize("tag", ["", "cow"])
@pytest.mark.parametrize("prefix", ["model.", "", "text_model.", "language_model.model.", "text_encoders.llm.model."])
def test_a_language_model_in_its_own_names_gets_the_prefix_that_the_host_reads(tmp_path, prefix, tag):
    """Without "model." ComfyUI would take it for SD1's CLIP."""
    family = encoders.FAMILIES["llama 3"]
    weights = {key: torch.ones(value.shape) for key, value in family.build().state_dict().items()}
    path = encoders.write_native(tmp_path / "a.gguf", weights, lambda key: prefix + key.removeprefix("model."), tag)
    state = load_text_encoder(path)[0]
    assert state.keys() == weights.keys()
    assert comfy.sd.detect_te_model(to_host(state)).name == "LLAMA3_8"
