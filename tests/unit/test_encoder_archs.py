# SPDX-License-Identifier: Apache-2.0
"""Text encoders over the key lists of real ones: recognised, every tensor's role, the published sizes of files."""

import functools
from pathlib import Path

import model_keys
import pytest
import torch
from gguf_kit.models import archs, text_encoders
from gguf_kit.models.archs import Category, Role
from gguf_kit.models.encoder_archs import ENCODERS, detect_encoder
from gguf_kit.models.tokenizers import KINDS
from gguf_kit.quantize.containers import StoredTensor
from gguf_kit.quantize.encoder_sources import take_encoder
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.recipes import ENCODER_RECIPES, RECIPES
from gguf_kit.quantize.sources import Source
from gguf_kit.quantize.writer import file_size, make_header

C = Category
# Stored list -> name, title and general.architecture.
KNOWN = {
    "te-clip-g": ("clip_text", "CLIP-G", "clip_text"),
    "te-clip-l": ("clip_text", "CLIP-L", "clip_text"),
    "te-gemma2-2b": ("gemma2", "Gemma 2", "gemma2-native"),
    "te-gemma3-12b": ("gemma3", "Gemma 3", "gemma3-native"),
    "te-llama3-8b": ("llama", "Llama", "llama-native"),
    "te-mistral3-24b": ("mistral3", "Mistral Small", "mistral3-native"),
    "te-qwen25-7b": ("qwen2vl", "Qwen2.5", "qwen2vl"),
    "te-qwen3-4b": ("qwen3", "Qwen3", "qwen3"),
    "te-t5xxl": ("t5", "T5 v1.1", "t5encoder"),
    "te-umt5xxl": ("umt5", "UMT5", "t5encoder"),
}
# City96's, bartowski's and others' files in GB, as far as Hugging Face shows digits.
PUBLISHED = {
    "te-t5xxl": {
        "F32": 19.1, "F16": 9.53, "Q8_0": 5.06, "Q6_K": 3.91, "Q5_K_M": 3.39, "Q5_K_S": 3.29, "Q4_K_M": 2.90,
        "Q4_K_S": 2.74, "IQ4_NL": 2.73, "IQ4_XS": 2.59, "Q3_K_L": 2.46, "Q3_K_M": 2.30, "Q3_K_S": 2.10, "Q2_K": 1.77,
    },
    "te-umt5xxl": {
        "F16": 11.4, "Q8_0": 6.04, "Q6_K": 4.67, "Q5_K_M": 4.15, "Q5_K_S": 4.05, "Q4_K_M": 3.66, "Q4_K_S": 3.50,
        "IQ4_NL": 3.49, "Q3_K_M": 3.06, "Q3_K_S": 2.86,
    },
    "te-gemma2-2b": {"Q4_K_M": 1.71, "Q4_K_S": 1.64},
    "te-qwen3-4b": {"Q8_0": 4.28, "Q5_K_M": 2.89, "Q4_K_M": 2.50},
}  # fmt: skip

read_keys = functools.cache(model_keys.read_keys)


def dtype_of(key):
    return torch.uint8 if key.endswith("_model") else torch.float16


@functools.cache
def source_of(name):
    """A stored list as a source, without data."""
    stored = {key: StoredTensor(dtype_of(key), shape, torch.Tensor) for key, shape in read_keys(name).items()}
    tensors, notes = take_encoder(Path(f"{name}.safetensors"), stored)
    return Source(Path(name), "key list", tensors, {}, notes)


def plan_of(name, type_name):
    return make_plan(source_of(name), Choices(type_name, has_imatrix=True))


def types_of(name, type_name):
    return {t.name: t.qtype.name for t in plan_of(name, type_name).tensors}


@pytest.mark.parametrize("name", model_keys.list_encoders())
def test_a_real_encoder_is_recognised_and_no_diffusion_model(name):
    found = detect_encoder(read_keys(name))
    assert (found.name, found.title, found.tag) == KNOWN[name]
    assert archs.find_all(read_keys(name)) == []
    assert plan_of(name, "").arch is found


@pytest.mark.parametrize("name", model_keys.list_names())
def test_no_diffusion_model_is_taken_for_an_encoder(name):
    stored = {key: StoredTensor(torch.bfloat16, shape, torch.Tensor) for key, shape in read_keys(name).items()}
    assert detect_encoder(read_keys(name)) is None
    for prefix in ("", "model.", "model.diffusion_model."):
        assert take_encoder(Path("x"), {prefix + key: tensor for key, tensor in stored.items()}) is None


@pytest.mark.parametrize("marker", [f"{native.prefix}{native.marker}" for native in text_encoders.NATIVE])
def test_every_encoder_that_loads_is_known_here(marker):
    (match,) = text_encoders.find_native([marker])
    assert detect_encoder(dict.fromkeys(match.keys, (8,))) is not None


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        ({"encoder.block.0.layer.1.DenseReluDense.wi.weight": (1,)}, "T5 v1.0"),
        ({"text_model.encoder.layers.22.mlp.fc1.weight": (1,)}, "CLIP-H"),
        ({"model.layers.0.input_layernorm.weight": (3072,)}, "Ministral"),
        ({"model.layers.0.input_layernorm.weight": (2560,), "model.layers.0.self_attn.q_norm.weight": (1,)}, "Qwen3"),
        ({"visual.deepstack_merger_list.0.norm.weight": (1,)}, "Qwen3-VL"),
        ({"model.visual.deepstack_merger_list.0.norm.weight": (1,)}, "Qwen3-VL"),
    ],
)
def test_variants_without_a_stored_list(keys, title):
    base = {
        "T5 v1.0": {"encoder.block.0.layer.0.SelfAttention.q.weight": (1,)},
        "CLIP-H": {"text_model.embeddings.token_embedding.weight": (1,)},
    }
    norm = {"model.layers.0.input_layernorm.weight": (4096,)}
    assert detect_encoder({**base.get(title, norm), **keys}).title == title


def test_gemma_4_is_told_from_gemma_3():
    layer = "model.layers.0"
    gemma3 = {
        f"{layer}.{x}.weight": (4,) for x in ("input_layernorm", "self_attn.q_norm", "post_feedforward_layernorm")
    }
    assert detect_encoder(gemma3).name == "gemma3"
    assert detect_encoder(gemma3 | {f"{layer}.layer_scalar": (1,)}).name == "gemma4"


def test_tags_of_llama_cpp_are_used_where_its_files_have_the_same_weights_only():
    """A loader that sees them would put rows in another order, or take 1 from the norms."""
    changed = {"llama", "mistral3", "gemma2", "gemma3", "qwen35"}
    assert {arch.name for arch in ENCODERS if arch.tag.endswith("-native")} == changed
    assert {arch.tag for arch in ENCODERS if arch.name in changed} == {f"{name}-native" for name in changed}
    assert "clip" not in {arch.tag for arch in ENCODERS}


def test_every_kind_of_tokenizer_that_an_entry_names_exists():
    assert {arch.tokenizer for arch in ENCODERS} - {""} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "key", "category", "block", "n_blocks"),
    [
        ("te-t5xxl", "shared.weight", C.TOKEN_EMBD, -1, 0),
        ("te-t5xxl", "encoder.block.23.layer.0.SelfAttention.v.weight", C.ATTN_V, 23, 24),
        ("te-t5xxl", "encoder.block.2.layer.0.SelfAttention.k.weight", C.ATTN, 2, 24),
        ("te-t5xxl", "encoder.block.2.layer.0.SelfAttention.o.weight", C.ATTN, 2, 24),
        ("te-t5xxl", "encoder.block.2.layer.1.DenseReluDense.wo.weight", C.FFN_DOWN, 2, 24),
        ("te-t5xxl", "encoder.block.2.layer.1.DenseReluDense.wi_1.weight", C.FFN, 2, 24),
        ("te-clip-l", "text_model.embeddings.token_embedding.weight", C.TOKEN_EMBD, -1, 0),
        ("te-clip-l", "text_model.embeddings.position_embedding.weight", C.EMBED, -1, 0),
        ("te-clip-g", "text_projection.weight", C.OUTPUT, -1, 0),
        ("te-clip-g", "text_model.encoder.layers.31.self_attn.v_proj.weight", C.ATTN_V, 31, 32),
        ("te-clip-g", "text_model.encoder.layers.31.self_attn.out_proj.weight", C.ATTN_OUTPUT, 31, 32),
        ("te-clip-g", "text_model.encoder.layers.3.mlp.fc1.weight", C.FFN, 3, 32),
        ("te-clip-g", "text_model.encoder.layers.3.mlp.fc2.weight", C.FFN_DOWN, 3, 32),
        ("te-qwen25-7b", "model.embed_tokens.weight", C.TOKEN_EMBD, -1, 0),
        ("te-qwen25-7b", "model.layers.27.mlp.down_proj.weight", C.FFN_DOWN, 27, 28),
        ("te-qwen25-7b", "model.layers.27.self_attn.o_proj.weight", C.ATTN_OUTPUT, 27, 28),
        ("te-qwen25-7b", "visual.blocks.3.attn.qkv.weight", C.EMBED, -1, 0),
        ("te-gemma3-12b", "vision_model.encoder.layers.3.mlp.fc2.weight", C.EMBED, -1, 0),
        ("te-gemma3-12b", "model.layers.3.mlp.gate_proj.weight", C.FFN, 3, 48),
        ("te-mistral3-24b", "model.layers.3.self_attn.q_proj.weight", C.ATTN, 3, 30),
    ],
)
def test_role(name, key, category, block, n_blocks):
    assert archs.roles(detect_encoder(read_keys(name)), read_keys(name))[key] == Role(category, block, n_blocks)


@pytest.mark.parametrize("name", model_keys.list_encoders())
def test_every_matrix_of_a_block_has_a_role(name):
    roles = archs.roles(detect_encoder(read_keys(name)), read_keys(name))
    matrices = [key for key, shape in read_keys(name).items() if len(shape) > 1 and key in roles]
    assert [key for key in matrices if roles[key].category is C.OTHER] == []
    assert sum(roles[key].category is C.TOKEN_EMBD for key in matrices) == 1


@pytest.mark.parametrize(("name", "type_name"), [(name, t) for name, sizes in PUBLISHED.items() for t in sizes])
def test_files_have_the_published_sizes(name, type_name):
    plan = plan_of(name, type_name)
    gigabytes = file_size(plan, make_header(plan, name, {})) / 1e9
    # Half a unit of the last digit that is shown, or 0.7 % where an eighth of the blocks is no whole number.
    tolerance = 0.005 if name in ("te-t5xxl", "te-umt5xxl") else 0.007
    assert gigabytes == pytest.approx(PUBLISHED[name][type_name], rel=tolerance, abs=0.005)


@pytest.mark.parametrize("type_name", RECIPES)
def test_tables_of_tokens_are_quantized_and_never_below_q5_k(type_name):
    wanted = {"Q8_0": "Q8_0", "IQ3_XXS": "Q5_K", "IQ2_S": "Q5_K", "IQ2_XS": "Q5_K"}.get(type_name, "Q6_K")
    assert types_of("te-umt5xxl", type_name)["shared.weight"] == wanted
    assert types_of("te-gemma3-12b", type_name)["model.embed_tokens.weight"] == wanted


@pytest.mark.parametrize("type_name", RECIPES)
def test_vision_positions_and_projections_keep_their_precision(type_name):
    types = types_of("te-qwen25-7b", type_name) | types_of("te-clip-g", type_name) | types_of("te-t5xxl", type_name)
    kept = ("visual.", "text_model.embeddings.position", "text_projection.")
    matrices = {t.name for name in ("te-qwen25-7b", "te-clip-g") for t in plan_of(name, "").tensors if len(t.shape) > 1}
    assert {types[key] for key in matrices if key.startswith(kept)} == {"F16"}
    assert types["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == "F32"


def test_encoders_have_a_recipe_of_every_type_and_diffusion_models_keep_theirs():
    assert list(ENCODER_RECIPES) == list(RECIPES)
    for name, recipe in ENCODER_RECIPES.items():
        assert (recipe.base, recipe.file_type) == (RECIPES[name].base, RECIPES[name].file_type)
    diffusion = Role(C.FFN_DOWN, 0, 24)
    assert RECIPES["Q4_K_M"].qtype(diffusion).name == "Q5_K"
    assert ENCODER_RECIPES["Q4_K_M"].qtype(diffusion).name == "Q6_K"


def test_better_types_are_larger():
    rising = "IQ2_XS IQ2_S Q2_K IQ3_XXS Q3_K_S Q3_K_M Q3_K_L IQ4_XS Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K Q8_0 F16".split()
    sizes = [plan_of("te-t5xxl", name).data_bytes for name in rising]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["t5", "umt5", "clip_text", "qwen2vl", "llama"])
def test_an_encoder_is_found_by_name(name):
    assert archs.named(name).is_encoder
