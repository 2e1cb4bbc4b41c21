# SPDX-License-Identifier: Apache-2.0
"""The host's text generation over quantized models: the same tokens as from the dequantized weights."""

import dataclasses

import comfy.sd
import comfy.utils
import encoders
import gguf
import numpy as np
import pytest
import torch
from gguf_kit.host import product
from gguf_kit.host.compat import is_quantized, wrap
from gguf_kit.loader import load_text_encoder
from gguf_kit.ops import make_ops
from make_files import quantize_with_ggml
from test_layers import quantized
from test_text_encoders import to_host

Q = gguf.GGMLQuantizationType
QTYPES = [Q.Q4_K, Q.Q6_K, Q.Q8_0]
LM_HEAD = {"lm_head": True}
FAMILIES = {
    "qwen3": encoders.FAMILIES["qwen3 4b"],
    "qwen3 with lm_head": dataclasses.replace(
        encoders.FAMILIES["qwen3 8b"], config=encoders.FAMILIES["qwen3 8b"].config | LM_HEAD
    ),
    "qwen3.5": encoders.FAMILIES["qwen3.5"],
    "gemma 3": encoders.FAMILIES["gemma 3 4b"],
    "gemma 4": encoders.FAMILIES["gemma 4 e4b"],
}

pytestmark = pytest.mark.skipif(not hasattr(comfy.sd.CLIP, "generate"), reason="this ComfyUI generates no text")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """(dense model, quantized model) of a family; the quantized one has its table's type still open."""
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        encoders.without_other_parts(patch)
        path = tmp_path_factory.mktemp("model") / "model.gguf"
        weights = encoders.write_encoder(family, path)
        state = to_host(load_text_encoder(path)[0])
        state = comfy.utils.state_dict_prefix_replace(state, {"model.language_model.": "model."})
        models = family.build(), family.build(make_ops())
    for model, values in zip(models, (weights, state), strict=True):
        assert model.load_state_dict(values, strict=False).missing_keys == []
    return models


def set_tables(models, qtype):
    """Both models get the same tables of vocabularies, in this type and dequantized; returns their modules."""
    dense, ours = models
    names = [name for name in ("embed_tokens", "lm_head") if getattr(dense.model, name, None) is not None]
    for seed, name in enumerate(names):
        table = getattr(dense.model, name).weight
        values = (
            torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)).numpy() * table.shape[1] ** -0.5
        )
        data = quantize_with_ggml(values.astype(np.float32), qtype)
        floats = torch.from_numpy(gguf.quants.dequantize(data, qtype).astype(np.float32))
        getattr(dense.model, name).load_state_dict({"weight": floats})
        getattr(ours.model, name).load_state_dict({"weight": wrap(torch.from_numpy(data), qtype, values.shape)})
    return [getattr(ours.model, name) for name in names]


SAMPLING = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 7},
}


def generate(model, do_sample, temperature=1.0, top_k=50, top_p=1.0, seed=0):
    """Twelve tokens after three, as SDClipModel.generate asks for them.

    Through the base class: families override it only to place the prompt's pictures and their stop tokens.
    """
    from comfy.text_encoders.llama import BaseGenerate

    prompt = torch.tensor([[5, 95, 17]])
    ids = {"initial_input_ids": prompt} if hasattr(model.model, "embed_tokens_per_layer") else {}
    with torch.inference_mode():
        embeds = model.model.embed_tokens(prompt, out_dtype=torch.float32)
        sampling = (do_sample, 12, temperature, top_k, top_p, 0.0, 1.05, seed)
        return BaseGenerate.generate(model, embeds, *sampling, stop_tokens=[-1], **ids)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_tokens_equal_those_of_the_dequantized_model(models, qtype, sampling):
    dense, ours = models
    tables = set_tables(models, qtype)
    assert all(is_quantized(table.weight) for table in tables)
    expected = generate(dense, **SAMPLING[sampling])
    assert len(expected) == 12
    assert generate(ours, **SAMPLING[sampling]) == expected


def test_a_table_is_dequantized_in_parts(models, monkeypatch):
    """So that 262,144 rows of 3840 do not become 4 GB for each token."""
    dense, ours = models
    tables = set_tables(models, Q.Q6_K)
    n_in = tables[0].weight.shape[1]
    monkeypatch.setattr(product, "SLICE_BYTES", 40 * n_in * 4)
    shapes, into = [], product.dequantize_into
    monkeypatch.setattr(product, "dequantize_into", lambda rows, *a: shapes.append(rows.shape) or into(rows, *a))
    x = torch.randn(1, 3, n_in)
    with torch.inference_mode():
        assert torch.allclose(ours.logits(x), dense.logits(x), rtol=1e-5, atol=1e-5)
    row_bytes = tables[-1].weight._qdata.shape[1]
    assert shapes == [(40, row_bytes), (40, row_bytes), (16, row_bytes)]


def test_a_table_of_another_dtype_goes_straight_to_that_of_the_activations(inference_mode, monkeypatch):
    """A float16 model that computes in float32, as text encoders do on a CPU; in parts, as generation always runs."""
    from comfy.text_encoders.llama import BaseGenerate

    table = make_ops().Embedding(96, 256, dtype=torch.float16)
    weight, values = quantized((96, 256), Q.Q6_K)
    table.load_state_dict({"weight": weight})
    assert table.weight.dtype == torch.float16
    model = type("Model", (BaseGenerate,), {})()
    model.model = type("Inner", (), {"embed_tokens": table})()
    x = torch.randn(1, 3, 256)
    assert torch.equal(model.logits(x), torch.nn.functional.linear(x[:, -1:], values))
    if inference_mode:
        seen, into = [], product.dequantize_into
        monkeypatch.setattr(product, "SLICE_BYTES", 50 * 256 * 4)
        monkeypatch.setattr(
            product, "dequantize_into", lambda rows, *a: seen.append((len(rows), a[-1].dtype)) or into(rows, *a)
        )
        model.logits(x)
        assert seen == [(50, torch.float32), (46, torch.float32)]


def test_the_text_generation_node(tmp_path, monkeypatch):
    """File, detection, tokenizer from the file, TextGenerate: the text of the dequantized model."""
    from comfy_extras.nodes_textgen import TextGenerate

    family = encoders.FAMILIES["gemma 3 4b"]
    family = dataclasses.replace(family, config=family.config | {"vocab_size": 264, "num_hidden_layers": 3})
    path = tmp_path / "gemma.gguf"
    with pytest.MonkeyPatch.context() as patch:
        encoders.without_other_parts(patch)
        weights = encoders.write_encoder(family, path)
    state = to_host(load_text_encoder(path)[0])
    weights["spiece_model"] = state["spiece_model"]
    texts = []
    for values, options in ((state, {"custom_operations": make_ops()}), (weights, {"dtype": torch.float32})):
        options |= {"gemma3_4b_model_config": dict(family.config)}
        with pytest.MonkeyPatch.context() as patch:
            encoders.without_other_parts(patch)
            clip = comfy.sd.load_text_encoder_state_dicts([values], None, comfy.sd.CLIPType.LUMINA2, options)
        monkeypatch.setattr(clip.tokenizer, "decode", lambda ids, **_: " ".join(map(str, ids)), raising=False)
        with torch.inference_mode():
            sampling = {"sampling_mode": "on", "temperature": 0.7, "top_k": 64, "top_p": 0.95, "seed": 3}
            texts.append(TextGenerate.execute(clip, "a b", 8, sampling).args[0])
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 1
