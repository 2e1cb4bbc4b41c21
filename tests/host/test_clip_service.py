# SPDX-License-Identifier: Apache-2.0
"""What the service makes sure of when it builds a CLIP: dtypes, completeness, types, and encoders told apart."""

import dataclasses
import logging

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import encoders
import pytest
import safetensors.torch
import tiny
import torch
from gguf_kit import service
from gguf_kit.errors import GGUFError
from gguf_kit.host import text_encoders
from gguf_kit.host.text_encoders import detect, missing_parameters
from gguf_kit.loader import load_text_encoder
from gguf_kit.ops import make_ops
from gguf_kit.service import load_clip, to_host
from test_text_encoders import BASE, Q, encode, float_state, load_with_config, write_t5

FAMILIES = encoders.FAMILIES


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5") / "t5-base-Q8_0.gguf", BASE, Q.Q8_0)


def test_float32_norms_do_not_make_an_encoder_float32_and_stay_exact(t5_base, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.float16)
    clip = load_clip((str(t5_base),), "stable_audio")
    encoder = next(m for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel))
    assert clip.cond_stage_model.dtypes == {torch.float16}
    assert encoder.transformer.shared.weight.dtype == torch.float16
    weights = float_state(t5_base)
    norms = {key: p for key, p in encoder.transformer.named_parameters() if key.endswith("layer_norm.weight")}
    assert len(norms) == 25
    for key, norm in norms.items():
        assert not torch.equal(weights[key].half().float(), weights[key])  # the test would see a rounding
        assert torch.equal(norm, weights[key])
    dense = comfy.sd.load_text_encoder_state_dicts(
        [weights], clip_type=comfy.sd.CLIPType.STABLE_AUDIO, model_options={"dtype": torch.float32}
    )
    with torch.inference_mode():
        assert torch.equal(encode(clip), encode(dense))


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_an_encoder_with_a_missing_weight_or_norm_is_refused(tmp_path, monkeypatch, name):
    """A norm is a parameter of the host's own class, of which the layers of the pack know nothing."""
    family = encoders.FAMILIES["qwen3 4b"]
    family = dataclasses.replace(family, config=family.config | {"num_hidden_layers": 3})
    encoders.write_encoder(family, tmp_path / "whole.gguf")
    path = tiny.copy_file(tmp_path / "whole.gguf", tmp_path / "part.gguf", keep=lambda n: n != name)
    load_with_config(monkeypatch, family.config)
    with pytest.raises(GGUFError, match=r"part\.gguf: 1 tensors that ComfyUI needs are missing: model\."):
        load_clip((str(path),), "lumina2")


def test_auto_and_types_of_other_encoders(t5_base):
    with pytest.raises(GGUFError, match=r"^t5-base-Q8_0\.gguf: type 'wan' takes UMT5-XXL, and this is T5-base, which"):
        load_clip((str(t5_base),), "wan")
    clip = load_clip((str(t5_base),), "auto")
    assert type(clip.cond_stage_model).__name__ == "SAT5Model"
    with pytest.raises(GGUFError, match=r"type 'sdxl' takes CLIP-L \+ CLIP-G, and this is T5-"):
        load_clip((str(t5_base), str(t5_base)), "sdxl")


@pytest.mark.parametrize("name", ["llama 3", "qwen3 4b"])
def test_the_dtype_of_a_language_model_is_not_that_of_its_norms(tmp_path, monkeypatch, name):
    """Hosts read it from the last norm, and take it for the whole encoder."""
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.bfloat16)
    family = encoders.FAMILIES[name]
    family = dataclasses.replace(family, config=family.config | {"num_hidden_layers": 3})
    weights = encoders.write_encoder(family, tmp_path / "encoder.gguf")
    load_with_config(monkeypatch, family.config)
    clip = load_clip((str(tmp_path / "encoder.gguf"),), family.clip_type)
    model = next(m for m in clip.cond_stage_model.modules() if type(m) is family.host_class())
    assert clip.cond_stage_model.dtypes == {torch.bfloat16}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    for key in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(comfy.utils.get_attr(model, key), weights[key])


def test_umt5_is_told_from_t5(tmp_path, t5_base):
    path = write_t5(tmp_path / "umt5.gguf", BASE | {"model_type": "umt5", "is_gated_act": True}, Q.Q8_0, "t5")
    assert detect(to_host(load_text_encoder(path)[0])) == "UMT5_BASE"
    assert detect(to_host(load_text_encoder(t5_base)[0])) == "T5_BASE"


@pytest.mark.skipif(not encoders.FAMILIES["gemma 4 e2b"].known(), reason="this ComfyUI has no Gemma 4")
def test_only_layers_that_share_keys_and_values_may_lack_them(monkeypatch):
    encoders.without_other_parts(monkeypatch)
    family = encoders.FAMILIES["gemma 4 e2b"]
    options = {"custom_operations": make_ops(), "model_name": "x", "x_model_config": dict(family.config)}
    with torch.device("meta"):
        model = comfy.sd1_clip.SDClipModel(
            device="cpu", textmodel_json_config={}, dtype=torch.float32, model_class=family.host_class(),
            special_tokens={"start": 2, "pad": 0}, model_options=options,
        )  # fmt: skip
    model.transformer.load_state_dict({}, strict=False)  # makes the parameters that layers of ours lack until then
    state = {key: torch.zeros(()).expand(p.shape) for key, p in model.transformer.named_parameters()}
    n_layers, n_shared = 35, model.transformer.model.config.num_kv_shared_layers
    for layer, wanted in ((n_layers - n_shared - 1, True), (n_layers - n_shared, False)):
        key = f"model.layers.{layer}.self_attn.k_proj.weight"
        (missing,) = missing_parameters(model, [{k: v for k, v in state.items() if k != key}])
        assert missing.text == [key] * wanted


def test_a_file_in_original_names_with_llamas_tokenizer_arrays(tmp_path):
    weights = dict.fromkeys(
        ("post_attention_layernorm", "input_layernorm", "post_feedforward_layernorm"), torch.ones(256)
    )
    weights = {f"model.layers.0.{key}.weight": value for key, value in weights.items()}
    path = encoders.write_native(tmp_path / "a.gguf", weights, tag="gemma2-native", tokenizer="llama")
    state, info = load_text_encoder(path)
    assert (info.title, info.family) == ("Gemma 2", "")
    assert state["spiece_model"].dtype == torch.uint8


def test_a_newer_host_decides_about_types_that_it_may_have_given_a_new_use(t5_base, monkeypatch, caplog):
    assert not text_encoders.newer_than_table()
    monkeypatch.setattr(text_encoders, "KNOWN_TYPES", text_encoders.KNOWN_TYPES - {"wan"})
    assert text_encoders.newer_than_table()
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        clip = load_clip((str(t5_base),), "sd3")
    assert type(clip.cond_stage_model).__name__ == "SAT5Model"
    assert "type 'sd3' takes CLIP-L, CLIP-G or T5-XXL, and this is T5-base" in caplog.text
    with pytest.raises(GGUFError, match="type 'auto' cannot tell"):
        service._clip_type(("a.gguf",), "auto", [{"foo": torch.zeros(1)}], [None])


def test_of_safetensors_alone_the_host_says_itself_what_they_lack(t5_base, tmp_path, caplog):
    state = {k: v.half() for k, v in float_state(t5_base).items() if k != "encoder.block.3.layer.0.layer_norm.weight"}
    safetensors.torch.save_file(state, tmp_path / "t5.safetensors")
    assert load_clip((str(tmp_path / "t5.safetensors"),), "wan") is not None
    assert "type 'wan' takes UMT5-XXL" in caplog.text


@pytest.mark.skipif(not hasattr(comfy.sd.TEModel, "GPT_OSS_20B"), reason="this ComfyUI has no GPT-OSS")
def test_gpt_oss_is_loaded_and_checked_like_the_others(tmp_path, monkeypatch):
    """Its class in ComfyUI is none of those that the other encoders are derived from."""
    import comfy.text_encoders.gpt_oss as gpt_oss

    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 320}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    experts = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True).MoEExperts
    ops = type("Ops", (comfy.ops.manual_cast,), {"MoEExperts": experts})
    model = gpt_oss.GptOssModel(gpt_oss.GptOss20BConfig(**sizes), torch.device("cpu"), torch.float32, ops)
    weights = encoders.write_gpt_oss(tmp_path / "whole.gguf", model)
    assert {"layers.0.self_attn.q_proj.weight", "layers.0.mlp.experts.down_proj.weight"} <= weights.keys()
    load = comfy.sd.load_text_encoder_state_dicts
    options = {"gpt_oss_config": sizes, "selected_layers": (0, 2)}
    monkeypatch.setattr(
        comfy.sd,
        "load_text_encoder_state_dicts",
        lambda *args, model_options, **named: load(*args, model_options=model_options | options, **named),
    )
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.bfloat16)
    clip = load_clip((str(tmp_path / "whole.gguf"),), "auto")
    transformer = clip.cond_stage_model.gpt_oss.transformer
    assert transformer.norm.weight.dtype == torch.float32
    assert torch.equal(transformer.norm.weight, weights["norm.weight"])
    keep = lambda name: name not in ("output_norm.weight", "blk.1.attn_k.weight")  # noqa: E731
    part = encoders.copy_with_metadata(tmp_path / "whole.gguf", tmp_path / "part.gguf", keep)
    with pytest.raises(GGUFError, match=r"part\.gguf: 2 tensors that ComfyUI needs are missing: .*k_proj"):
        load_clip((str(part),), "lens")
