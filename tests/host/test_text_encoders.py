# SPDX-License-Identifier: Apache-2.0
"""A T5 as GGUF gives the hidden states of its dequantized weights, by itself and through the CLIP loader nodes."""

import functools

import comfy.sd
import comfy.text_encoders.t5
import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf_kit import nodes
from gguf_kit.host.compat import is_quantized, quantized_modules
from gguf_kit.loader import QuantizedBytes, load_text_encoder
from gguf_kit.nodes import to_host
from gguf_kit.ops import make_ops
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
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


def write_t5(path, config, qtype):
    """Random weights of the host's class, named by gguf-py's table as llama.cpp names them."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config["num_layers"])
    writer = gguf.GGUFWriter(path, "t5encoder")
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
    with pytest.raises(nodes.GGUFError, match=r"t5\.gguf: 1 tensors .* missing: .*block\.5\.layer\.1.*wo\.weight"):
        nodes.load_clip((str(path),), comfy.sd.CLIPType.STABLE_AUDIO)


def test_a_lora_on_the_text_encoder(t5_base):
    clip = nodes.load_clip((str(t5_base),), comfy.sd.CLIPType.STABLE_AUDIO)
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
    clip = nodes.load_clip((str(t5_base),), comfy.sd.CLIPType.STABLE_AUDIO)
    weights = float_state(t5_base)
    for state in (clip.get_sd(), getattr(clip, "state_dict_for_saving", clip.get_sd)()):
        key = next(k for k in state if k.endswith("shared.weight"))
        assert torch.equal(state[key].to("cpu").float(), weights["shared.weight"].to(state[key].dtype).float())
    factory, arguments = clip.patcher.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not clip.patcher.model


def test_flux_takes_a_gguf_t5_beside_a_safetensors_clip(tmp_path, monkeypatch):
    """DualCLIPLoader (GGUF), type flux, with the host's own Flux text model around a smaller T5."""
    t5, clip_l = (
        write_t5(tmp_path / "t5-Q4_K.gguf", SMALL | {"d_model": 4096, "vocab_size": 32128}, Q.Q4_K),
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


def test_scaled_fp8_beside_gguf_is_refused(tmp_path, t5_base):
    path = tmp_path / "clip_l_fp8_scaled.safetensors"
    safetensors.torch.save_file({"x.weight": torch.zeros(4, 4), "x.scale_weight": torch.ones(1)}, path)
    with pytest.raises(nodes.GGUFError, match=r"clip_l_fp8_scaled\.safetensors: .*cannot be mixed"):
        nodes.load_clip((str(path), str(t5_base)), comfy.sd.CLIPType.FLUX)
