# SPDX-License-Identifier: Apache-2.0
"""Text encoders: the key tables against gguf-py's names, what is done to rows and norms, and what is refused."""

import gguf
import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile, GGUFError, UnsupportedArch
from gguf_kit.loader import load_diffusion_model, load_text_encoder
from gguf_kit.models import text_encoders
from gguf_kit.models.text_encoder_table import TEXT_ENCODERS
from gguf_kit.models.values import QuantizedBytes

Q = gguf.GGMLQuantizationType
ARCH = gguf.MODEL_ARCH
ARCHS = {
    "T5 v1.1": (ARCH.T5ENCODER,),
    "UMT5": (ARCH.T5ENCODER,),
    "Qwen2": (ARCH.QWEN2, ARCH.QWEN2VL),
    "Llama": (ARCH.LLAMA,),
    "Mistral": (ARCH.MISTRAL3,),
    "Qwen3": (ARCH.QWEN3,),
    "Qwen3-VL": (ARCH.QWEN3VL,),
    "Gemma 2": (ARCH.GEMMA2,),
    "Gemma 3": (ARCH.GEMMA3,),
    "Gemma 4": (ARCH.GEMMA4,),
    "GPT-OSS": (ARCH.GPT_OSS,),
    "Qwen3.5": (ARCH.QWEN35,),
}
# Tensors that gguf-py lists for an architecture and dense models of it do not have.
EXPERTS = ("ffn_gate_inp", "_exps", "attn_rot_embd", "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
WIDTH = 64
LLAMA = {
    "token_embd.weight": (96, WIDTH),
    "output_norm.weight": (WIDTH,),
    "output.weight": (96, WIDTH),
    "rope_freqs.weight": (8,),
    **{
        f"blk.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (48, WIDTH),
            "attn_k": (16, WIDTH),
            "attn_v": (16, WIDTH),
            "attn_output": (WIDTH, 48),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (32, WIDTH),
            "ffn_up": (32, WIDTH),
            "ffn_down": (WIDTH, 32),
        }.items()
    },
}
BIAS = {f"blk.{i}.attn_{p}.bias": (n,) for i in range(2) for p, n in (("q", 48), ("k", 16), ("v", 16))}
QK_NORM = {f"blk.{i}.attn_{p}_norm.weight": (16,) for i in range(2) for p in "qk"}
GEMMA = {f"blk.{i}.{name}.weight": (WIDTH,) for i in range(2) for name in ("post_attention_norm", "post_ffw_norm")}
KV = {"attention.head_count_kv": 1}
HEADS = {"attention.head_count": 3, **KV}
TOKENS = {"tokenizer.ggml.tokens": ["<unk>", "a"], "tokenizer.ggml.pre": "tekken"}
T5 = {
    "token_embd.weight": (96, WIDTH),
    "enc.blk.0.ffn_gate.weight": (32, WIDTH),
    "enc.blk.0.ffn_up.weight": (32, WIDTH),
}


def write(path, shapes, arch="llama", metadata=None, qtypes=None, extra=None):
    """A file with random tensors, matrices in Q8_0, and extra arrays; (path, {name: float32 values as stored})."""
    writer = gguf.GGUFWriter(path, arch or "none")
    if not arch:
        writer.kv_data[0].pop("general.architecture")
    for key, value in (metadata or {}).items():
        key = key.replace("attention.", f"{arch}.attention.", 1)
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    generator, stored = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        qtype = (qtypes or {}).get(name, Q.Q8_0 if len(shape) > 1 and shape[-1] % 32 == 0 else Q.F32)
        data = gguf.quants.quantize(values, qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
        stored[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, qtype), np.float32))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stored


def load(*args, **kwargs):
    """(float values by key, stored values by name, info, state) of a file from write()."""
    path, stored = write(*args, **kwargs)
    state, info = load_text_encoder(path)
    return {k: v.dequantize() if isinstance(v, QuantizedBytes) else v for k, v in state.items()}, stored, info, state


def in_halves(stored, n_heads):
    """Rows that alternate between the halves of a head, put back half after half."""
    order = torch.arange(stored.shape[0]).reshape(n_heads, -1, 2)
    return stored[torch.cat([order[:, :, 0], order[:, :, 1]], dim=1).reshape(-1)]


# -- tables --


@pytest.mark.parametrize("encoder", TEXT_ENCODERS, ids=lambda e: e.title)
def test_no_two_names_have_the_same_key_and_no_name_is_both_used_and_left_out(encoder):
    assert len(set(encoder.keys.values())) == len(encoder.keys)
    assert not set(encoder.leave_out) & set(encoder.keys)
    assert {*encoder.head_counts} <= {*encoder.keys} | {"blk.{bid}.attn_q.bias", "blk.{bid}.attn_k.bias"}
    assert {part for parts in encoder.alternate.values() for part in parts} <= set(encoder.keys.values())


@pytest.mark.parametrize(("title", "arch"), [(title, arch) for title, archs in ARCHS.items() for arch in archs])
def test_a_table_has_every_tensor_that_gguf_py_lists(title, arch):
    encoder = next(e for e in TEXT_ENCODERS if e.title == title)
    skip = () if title == "GPT-OSS" else EXPERTS
    listed = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]]
    names = {name for name in listed if not name.endswith(skip)}
    if title in ("T5 v1.1", "UMT5"):
        names.remove("output")
    known = {name.removesuffix(".weight").removesuffix(".bias") for name in (*encoder.keys, *encoder.leave_out)}
    assert names <= known
    assert {name for name in known - names if "nextn" not in name} <= {"rope_freqs", "output"}


@pytest.mark.parametrize(("title", "arch"), [(title, arch) for title, archs in ARCHS.items() for arch in archs])
def test_gguf_py_gives_each_key_the_name_that_the_table_reads_it_from(title, arch):
    encoder = next(e for e in TEXT_ENCODERS if e.title == title)
    table = gguf.get_tensor_name_map(arch, 8)
    for rule, key in encoder.keys.items():
        original = key.replace("{bid}", "7").replace("model.lm_head", "lm_head")
        original = f"model.{original}" if title == "GPT-OSS" else original
        original = original.replace("model.language_model.", "model.").replace("dt_bias", "dt_proj.bias")
        if "nextn" in rule or original.endswith("A_log"):
            assert table.get_name(original) in (None, rule.replace("{bid}", "7"))
            continue
        original = original if original.endswith((".weight", ".bias")) else f"{original}.weight"
        assert table.get_name(original, try_suffixes=(".weight", ".bias")) == rule.replace("{bid}", "7"), key


# -- which family --


@pytest.mark.parametrize(
    ("shapes", "tags", "title"),
    [
        (LLAMA, (), "Llama"),
        (LLAMA, ("llama", "llama-bpe"), "Llama"),
        (LLAMA, ("llama", "tekken"), "Mistral"),
        (LLAMA, ("mistral3", "tekken"), "Mistral"),
        (LLAMA | BIAS, ("qwen2vl",), "Qwen2"),
        (LLAMA | BIAS, ("pig",), "Qwen2"),
        (LLAMA | BIAS, ("llama",), "Llama"),
        (LLAMA | QK_NORM, ("qwen3",), "Qwen3"),
        (LLAMA | QK_NORM, ("wan",), "Qwen3"),
        (LLAMA | QK_NORM, ("qwen3vl",), "Qwen3-VL"),
        (LLAMA | GEMMA, ("gemma3",), "Gemma 2"),
        (LLAMA | GEMMA | QK_NORM, ("gemma2",), "Gemma 3"),
        (LLAMA | GEMMA | QK_NORM | {"blk.0.layer_output_scale.weight": (1,)}, (), "Gemma 4"),
        (T5, ("llama",), "T5 v1.1"),
        (T5 | {"enc.blk.1.attn_rel_b.weight": (32, 4)}, ("t5encoder",), "UMT5"),
    ],
)
def test_content_decides_and_tags_only_between_what_looks_alike(shapes, tags, title):
    assert text_encoders.detect(shapes, tags).title == title


# -- what the converter did to the weights --


def test_rows_of_q_and_k_are_put_back_as_bytes_by_the_counts_in_the_file(tmp_path):
    values, stored, info, state = load(tmp_path / "a.gguf", LLAMA, metadata=HEADS)
    assert info.title == "Llama"
    for projection, n_heads in (("q", 3), ("k", 1)):
        key, name = f"model.layers.1.self_attn.{projection}_proj.weight", f"blk.1.attn_{projection}.weight"
        assert isinstance(state[key], QuantizedBytes)
        assert torch.equal(values[key], in_halves(stored[name], n_heads))
        assert not torch.equal(values[key], stored[name])
    assert torch.equal(values["model.layers.1.self_attn.v_proj.weight"], stored["blk.1.attn_v.weight"])
    assert "output.weight" not in values
    assert not any("rope" in key or "lm_head" in key for key in values)


def test_biases_go_with_their_rows_and_plain_weights_are_put_back_too(tmp_path):
    f16 = {"blk.0.attn_q.weight": Q.F16, "blk.0.attn_k.weight": Q.BF16}
    values, stored, _, _ = load(tmp_path / "a.gguf", LLAMA | BIAS, metadata=HEADS, qtypes=f16)
    prefix = "model.layers.0.self_attn"
    assert torch.equal(values[f"{prefix}.q_proj.bias"], in_halves(stored["blk.0.attn_q.bias"], 3))
    assert torch.equal(values[f"{prefix}.k_proj.bias"], stored["blk.0.attn_k.bias"].reshape(8, 2).T.reshape(-1))
    assert torch.equal(values[f"{prefix}.v_proj.bias"], stored["blk.0.attn_v.bias"])
    assert torch.equal(values[f"{prefix}.q_proj.weight"].float(), in_halves(stored["blk.0.attn_q.weight"], 3))


def test_head_counts_may_be_given_for_each_block_and_k_has_those_of_q_without_its_own(tmp_path):
    values, stored, _, _ = load(tmp_path / "a.gguf", LLAMA, metadata={"attention.head_count": [3, 4], **KV})
    for bid, n_heads in ((0, 3), (1, 4)):
        name, key = f"blk.{bid}.attn_q.weight", f"model.layers.{bid}.self_attn.q_proj.weight"
        assert torch.equal(values[key], in_halves(stored[name], n_heads))
    shapes = LLAMA | {f"blk.{i}.attn_k.weight": (48, WIDTH) for i in range(2)}
    values, stored, _, _ = load(tmp_path / "b.gguf", shapes, metadata={"attention.head_count": 3})
    assert torch.equal(values["model.layers.0.self_attn.k_proj.weight"], in_halves(stored["blk.0.attn_k.weight"], 3))


@pytest.mark.parametrize("shapes", [LLAMA | BIAS, LLAMA | QK_NORM], ids=["qwen2", "qwen3"])
def test_rows_of_qwen_stay_where_they_are(tmp_path, shapes):
    values, stored, _, _ = load(tmp_path / "a.gguf", shapes, arch="qwen", metadata=HEADS)
    assert torch.equal(values["model.layers.0.self_attn.q_proj.weight"], stored["blk.0.attn_q.weight"])
    assert ("model.lm_head.weight" in values) == (shapes == LLAMA | QK_NORM)


def test_every_norm_of_gemma_2_and_3_loses_the_one_that_the_host_adds(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_kit.models.tokenizers.build", lambda file, kind: torch.zeros(1, dtype=torch.uint8))
    values, stored, info, _ = load(tmp_path / "a.gguf", LLAMA | GEMMA | QK_NORM, "gemma3", metadata=TOKENS)
    assert info.title == "Gemma 3"
    norms = [key for key in values if key.endswith("norm.weight")]
    assert len(norms) == 1 + 2 * 6
    assert torch.equal(values["model.norm.weight"], stored["output_norm.weight"] - 1)
    key = "model.layers.1.pre_feedforward_layernorm.weight"
    assert torch.equal(values[key], stored["blk.1.ffn_norm.weight"] - 1)
    key = "model.layers.1.post_feedforward_layernorm.weight"
    assert torch.equal(values[key], stored["blk.1.post_ffw_norm.weight"] - 1)
    key = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(values[key], stored["blk.1.post_attention_norm.weight"] - 1)
    assert torch.equal(values["model.layers.0.mlp.up_proj.weight"], stored["blk.0.ffn_up.weight"])


def test_norms_of_gemma_4_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_kit.models.tokenizers.build", lambda file, kind: torch.zeros(1, dtype=torch.uint8))
    shapes = LLAMA | GEMMA | QK_NORM | {"blk.0.layer_output_scale.weight": (1,)}
    values, stored, _, _ = load(tmp_path / "a.gguf", shapes, "gemma4", metadata=TOKENS)
    assert torch.equal(values["model.norm.weight"], stored["output_norm.weight"])
    assert torch.equal(values["model.layers.0.layer_scalar"], stored["blk.0.layer_output_scale.weight"])
    assert values["tokenizer_json"].dtype == torch.uint8


LINEAR = {
    "token_embd.weight": (96, WIDTH),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_qkv.weight": (2 * 2 * 32 + 6 * 128, WIDTH),
    "blk.0.attn_gate.weight": (6 * 128, WIDTH),
    "blk.0.ssm_alpha.weight": (6, WIDTH),
    "blk.0.ssm_a": (6,),
    "blk.0.ssm_norm.weight": (64,),
    "blk.0.ssm_out.weight": (WIDTH, 6 * 128),
    "blk.0.ssm_conv1d.weight": (2 * 2 * 32 + 6 * 128, 4),
}
SSM = {"qwen35.ssm.group_count": 2, "qwen35.ssm.time_step_rank": 6, "qwen35.ssm.inner_size": 6 * 128}
ORDER = [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("qtype", [Q.Q8_0, Q.Q4_K, Q.F16], ids=lambda q: q.name)
def test_heads_of_values_of_linear_attention_follow_their_heads_of_keys(tmp_path, qtype):
    """Three heads of values for each of two of keys; a Q4_K block spans two of them and has to be parted."""
    _, stored = write(tmp_path / "a.gguf", LINEAR, "qwen35", SSM, {"blk.0.ssm_out.weight": Q.Q8_0})
    if qtype == Q.Q4_K:
        path, stored = write_with_q4_k(tmp_path / "a.gguf", stored)
    else:
        path, stored = write(tmp_path / "a.gguf", LINEAR, "qwen35", SSM, {"blk.0.ssm_out.weight": qtype})
    state, info = load_text_encoder(path)
    values = {k: v.dequantize() if isinstance(v, QuantizedBytes) else v for k, v in state.items()}
    assert info.title == "Qwen3.5"
    rows = torch.arange(6 * 128).reshape(6, 128)[ORDER].reshape(-1)
    prefix = "model.language_model.layers.0.linear_attn"
    assert torch.equal(values[f"{prefix}.in_proj_z.weight"], stored["blk.0.attn_gate.weight"][rows])
    assert torch.equal(values[f"{prefix}.in_proj_a.weight"], stored["blk.0.ssm_alpha.weight"][ORDER])
    qkv = torch.cat([torch.arange(128), 128 + rows])
    assert torch.equal(values[f"{prefix}.in_proj_qkv.weight"], stored["blk.0.attn_qkv.weight"][qkv])
    assert torch.equal(values[f"{prefix}.conv1d.weight"], stored["blk.0.ssm_conv1d.weight"][qkv].unsqueeze(1))
    out, expected = values[f"{prefix}.out_proj.weight"], stored["blk.0.ssm_out.weight"][:, rows]
    assert isinstance(state[f"{prefix}.out_proj.weight"], QuantizedBytes) == (qtype == Q.Q8_0)
    assert torch.equal(out.float(), expected.half().float() if qtype == Q.Q4_K else expected)
    assert torch.equal(values[f"{prefix}.norm.weight"], stored["blk.0.ssm_norm.weight"])
    key = "model.language_model.layers.0.input_layernorm.weight"
    assert torch.equal(values[key], stored["blk.0.attn_norm.weight"] - 1)
    decay = torch.log(-stored["blk.0.ssm_a"][ORDER])
    assert torch.equal(values[f"{prefix}.A_log"].nan_to_num(7), decay.nan_to_num(7))


def write_with_q4_k(path, stored):
    """The file of LINEAR again, its output projection in random Q4_K blocks with plain scales."""
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (WIDTH * 3, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    blocks = blocks.reshape(WIDTH, 3 * 144)
    writer = gguf.GGUFWriter(path, "qwen35")
    for key, value in SSM.items():
        writer.add_uint32(key, value)
    for name, values in stored.items():
        if name != "blk.0.ssm_out.weight":
            writer.add_tensor(name, values.numpy())
    writer.add_tensor("blk.0.ssm_out.weight", blocks, raw_dtype=Q.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, Q.Q4_K), np.float32))
    return path, stored | {"blk.0.ssm_out.weight": out}


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float16, np.float32])
def test_a_tokenizer_that_the_file_brings_as_a_tensor_is_taken(tmp_path, dtype):
    """GGUF has no uint8, so that converters store its bytes as one thing or another."""
    blob = bytes([10, 0, 255, 128, 7])
    stored = np.frombuffer(blob, np.int8) if dtype == np.int8 else np.frombuffer(blob, np.uint8).astype(dtype)
    path, _ = write(tmp_path / "a.gguf", LLAMA | GEMMA, arch="gemma2", extra={"spiece_model": stored})
    state, _ = load_text_encoder(path)
    assert state["spiece_model"].dtype == torch.uint8
    assert state["spiece_model"].numpy().tobytes() == blob


def test_a_tokenizer_of_other_numbers_is_refused(tmp_path):
    extra = {"spiece_model": np.array([1, 256], np.int16)}
    path, _ = write(tmp_path / "a.gguf", LLAMA | GEMMA, arch="gemma2", extra=extra)
    with pytest.raises(BadFile, match="'spiece_model' holds a tokenizer, but not only numbers from 0 to 255"):
        load_text_encoder(path)


def test_a_part_of_a_split_file_is_named(tmp_path):
    path, _ = write(tmp_path / "a-00002-of-00003.gguf", LLAMA, metadata={"split.no": 1, "split.count": 3})
    for load in (load_text_encoder, load_diffusion_model):
        with pytest.raises(BadFile, match=r"it is part 2 of 3 of a split file, and a-00001-of-00003\.gguf is missing"):
            load(path)


# -- original names --


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (
            ["layers.0.input_layernorm.weight", "norm.weight"],
            ["model.layers.0.input_layernorm.weight", "model.norm.weight"],
        ),
        (
            ["model.language_model.layers.0.input_layernorm.weight", "model.visual.x", "lm_head.weight"],
            ["model.layers.0.input_layernorm.weight", "model.visual.x", "lm_head.weight"],
        ),
        (
            ["text_encoders.llm.model.layers.0.input_layernorm.weight", "text_encoders.llm.visual.x", "vae.x"],
            ["model.layers.0.input_layernorm.weight", "visual.x"],
        ),
        (["model.layers.0.self_attn.sinks", "model.norm.weight"], ["layers.0.self_attn.sinks", "norm.weight"]),
        (
            ["model.layers.0.linear_attn.A_log", "model.layers.0.input_layernorm.weight"],
            ["model.language_model.layers.0.linear_attn.A_log", "model.language_model.layers.0.input_layernorm.weight"],
        ),
        (
            ["embeddings.token_embedding.weight", "text_projection.weight"],
            ["text_model.embeddings.token_embedding.weight", "text_projection.weight"],
        ),
        (
            ["conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight", "conditioner.embedders.0.x"],
            ["transformer.resblocks.0.ln_1.weight"],
        ),
        (
            ["cond_stage_model.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
            ["encoder.block.0.layer.0.SelfAttention.q.weight"],
        ),
    ],
    ids=["bare", "new hugging face", "sd.cpp", "gpt-oss", "qwen3.5", "clip", "openclip", "t5"],
)
def test_original_names_get_the_prefix_that_comfyui_reads(names, keys):
    (match,) = text_encoders.find_native(names)
    assert list(match.keys) == keys


def test_names_of_vision_parts_are_not_taken_for_a_language_model():
    assert text_encoders.find_native(["vision_model.encoder.layers.0.input_layernorm.weight"]) == []
    assert text_encoders.find_native(["embeddings.patch_embedding.weight"]) == []


# -- refusals: each of them one sentence that names the file, and one that says what to do --

FLUX = {
    "img_in.weight": (64, 64),
    "vector_in.in_layer.weight": (64, 32),
    "double_blocks.0.img_attn.proj.weight": (64, 64),
    "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
}
EXPERT_SHAPES = {
    "token_embd.weight": (96, WIDTH),
    "blk.0.attn_sinks.weight": (4,),
    "blk.0.ffn_gate_exps.weight": (2, 32, WIDTH),
    "blk.0.ffn_up_exps.weight": (2, 32, WIDTH),
}
REFUSED = {
    "full t5": (T5 | {"dec.blk.0.attn_q.weight": (64, 64)}, {}, "T5 v1.1 cannot be used: it is a full encoder-decoder"),
    "mixture of experts": (
        LLAMA | {"blk.0.ffn_gate_inp.weight": (4, WIDTH)},
        HEADS,
        "1 tensor names match no Llama rule: blk.0.ffn_gate_inp.weight",
    ),
    "chat model with fused qkv": (
        {"token_embd.weight": (96, 64), "blk.0.attn_qkv.weight": (64, 64)},
        {},
        "it is no text encoder that can be loaded from GGUF here (general.architecture 'llama')",
    ),
    "vision part alone": (
        {"v.blk.0.attn_q.weight": (64, 64), "mm.0.weight": (64, 64)},
        {},
        "it is the vision part (mmproj) of a text encoder, without the encoder itself",
    ),
    "diffusion model": (FLUX, {}, "it is a diffusion model (Flux.1"),
    "two encoders": (
        {f"text_encoders.{name}.transformer.{key}": (64, 64) for name, key in (
            ("clip_l", "text_model.embeddings.token_embedding.weight"),
            ("t5xxl", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        )},
        {},
        "it holds 2 text encoders (behind text_encoders.t5xxl.transformer., text_encoders.clip_l.transformer.)",
    ),
    "no tokenizer": (LLAMA | GEMMA, {}, "this Gemma 2 has no tokenizer (metadata key 'tokenizer.ggml.tokens')"),
    "no head count": (LLAMA, {}, "metadata key 'llama.attention.head_count' is missing, expected the number"),
    "no heads": (LLAMA, {"attention.head_count": 0}, "'llama.attention.head_count' is 0, expected the number"),
    "head count as text": (LLAMA, {"attention.head_count": "3"}, "head_count' is 3, expected the number"),
    "heads of another model": (
        LLAMA,
        {"attention.head_count": 5},
        "tensor 'blk.0.attn_q.weight' has 48 rows, expected an even number for each of 5 heads",
    ),
    "heads of another linear attention": (
        LINEAR,
        SSM | {"llama.ssm.group_count": 3, "llama.ssm.time_step_rank": 4, "llama.ssm.inner_size": 768},
        "llama.ssm.time_step_rank, llama.ssm.inner_size, which are 3, 4, 768",
    ),
    "experts of two types": (EXPERT_SHAPES, {}, "differ in type or shape, and ComfyUI needs them in one"),
    "experts without partner": (
        {name: shape for name, shape in EXPERT_SHAPES.items() if "up" not in name},
        {},
        "differ in type or shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, case):
    shapes, metadata, sentence = REFUSED[case]
    path, _ = write(tmp_path / "a.gguf", shapes, metadata=metadata, qtypes={"blk.0.ffn_up_exps.weight": Q.Q4_0})
    with pytest.raises(GGUFError) as caught:
        load_text_encoder(path)
    text = str(caught.value)
    assert isinstance(caught.value, (UnsupportedArch, BadFile))
    assert text.startswith("a.gguf: ")
    assert sentence in text
    assert "\n" not in text
    assert len(text) < 400
