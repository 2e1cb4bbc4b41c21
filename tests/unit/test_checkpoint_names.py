# SPDX-License-Identifier: Apache-2.0
"""The tensors of whole checkpoints under the names that ComfyUI reads, whatever program wrote the file."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import quants
from gguf_builder import ARRAY, I32, build_gguf
from gguf_kit.errors import UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_checkpoint
from gguf_kit.models.checkpoints import Piece, find_parts, flatten_projections, read_others
from gguf_kit.models.values import QuantizedBytes

UNET = "model.diffusion_model."
TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
HF = "transformer.text_model."
LAYER = f"{HF}encoder.layers.7."


def floats(shape):
    """An F32 tensor's (type, shape, bytes)."""
    return Q.F32, shape, np.arange(np.prod(shape, dtype=int), dtype=np.float32).tobytes()


def quantized(shape, stored=None):
    """A Q8_0 tensor's (type, shape, bytes), stored as rows of other lengths if asked for."""
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).reshape(stored or shape)
    return Q.Q8_0, stored or shape, quants.quantize(values, Q.Q8_0).tobytes()


def open_file(path, tensors, context=0, metadata=None, prefix=UNET):
    """A file with a diffusion model that takes a text of width `context`, and more tensors."""
    unet = {f"{prefix}input_blocks.{i}.bias": floats((4,)) for i in range(7)}
    if context:
        unet[prefix + TO_K] = floats((4, context))
    whole = {**unet, **tensors}
    path.write_bytes(build_gguf(metadata or {}, [(name, *tensor) for name, tensor in whole.items()]))
    return GGUFFile(path)


SAME = ""
H, L, G = "cond_stage_model.model.", "conditioner.embedders.0.", "conditioner.embedders.1.model."
PROJECTION = "transformer.text_projection.weight"
# Width of the UNet's text -> name in the file -> key, SAME if that is the name; behind a "^" its matrix is transposed.
NAMES = {
    768: {
        f"cond_stage_model.{LAYER}mlp.fc1.weight": SAME,
        f"cond_stage_model.{HF}embeddings.position_ids": SAME,
        "cond_stage_model.transformer.final_layer_norm.bias": SAME,
        "first_stage_model.decoder.conv_in.weight": SAME,
        "vae.decoder.conv_in.weight": SAME,
    },
    1024: {
        f"{H}ln_final.weight": f"{H}{HF}final_layer_norm.weight",
        f"{L}model.positional_embedding": f"{H}{HF}embeddings.position_embedding.weight",
        f"cond_stage_model.{LAYER}layer_norm1.bias": f"{H}{LAYER}layer_norm1.bias",
        f"{H}text_projection": f"^{H}{PROJECTION}",
        f"{L}open_clip.model.visual.proj": SAME,
    },
    1280: {
        f"{L}model.logit_scale": SAME,
        f"cond_stage_model.{LAYER}mlp.fc2.bias": f"{L}model.{LAYER}mlp.fc2.bias",
    },
    2048: {
        f"cond_stage_model.{HF}final_layer_norm.weight": f"{L}{HF}final_layer_norm.weight",
        f"cond_stage_model.1.{LAYER}mlp.fc1.bias": f"{G}{LAYER}mlp.fc1.bias",
        f"cond_stage_model.1.{HF}text_projection": f"^{G}{PROJECTION}",
        f"{G}text_projection": f"^{G}{PROJECTION}",
        f"{G}text_projection.weight": f"{G}{PROJECTION}",
        f"{G}token_embedding.weight": f"{G}{HF}embeddings.token_embedding.weight",
        f"{G}transformer.resblocks.7.ln_2.bias": f"{G}{LAYER}layer_norm2.bias",
        f"{G}transformer.resblocks.7.mlp.c_fc.weight": f"{G}{LAYER}mlp.fc1.weight",
        f"{G}transformer.resblocks.7.mlp.c_proj.weight": f"{G}{LAYER}mlp.fc2.weight",
        f"{G}transformer.resblocks.7.attn.out_proj.bias": f"{G}{LAYER}self_attn.out_proj.bias",
        f"{G}{LAYER}mlp.fc1.weight": SAME,
        "v_pred": SAME,
    },
    0: {
        f"text_encoders.clip_g.{HF}text_projection": f"text_encoders.clip_g.{PROJECTION}",
        f"text_encoders.clip_g.{PROJECTION}": SAME,
        f"text_encoders.clip_l.{LAYER}mlp.fc1.weight": SAME,
        "text_encoders.qwen3_4b.transformer.model.norm.weight": SAME,
        f"{H}ln_final.weight": SAME,
        "text_encoders.t5xxl.transformer.enc.blk.3.ffn_norm.weight": (
            "text_encoders.t5xxl.transformer.encoder.block.3.layer.1.layer_norm.weight"
        ),
    },
}
CASES = [(context, name, key or name) for context, names in NAMES.items() for name, key in names.items()]


@pytest.mark.parametrize(("context", "name", "key"), CASES, ids=[f"{case[1]} {case[0]}" for case in CASES])
def test_names_of_text_encoders(tmp_path, context, name, key):
    transposed, key = key.startswith("^"), key.removeprefix("^")
    tensors = {name: floats((2, 3))}
    if ".enc." in name:
        tensors["text_encoders.t5xxl.transformer.enc.blk.0.ffn_gate.weight"] = floats((2, 3))
    parts = find_parts(open_file(tmp_path / "all.gguf", tensors, context))
    assert parts.others[key] == Piece(name, transposed=transposed)
    value = read_others(GGUFFile(tmp_path / "all.gguf"), parts)[key]
    assert torch.equal(value, torch.arange(6.0).reshape(2, 3).t() if transposed else torch.arange(6.0).reshape(2, 3))
    assert value.is_contiguous()


FUSED = [
    (1024, "cond_stage_model.model.transformer.resblocks.7.attn.in_proj_", "cond_stage_model.model."),
    (1024, f"cond_stage_model.{LAYER}self_attn.in_proj.", "cond_stage_model.model."),
    (2048, f"cond_stage_model.1.{LAYER}self_attn.in_proj.", "conditioner.embedders.1.model."),
    (2048, f"cond_stage_model.1.{LAYER}attn.in_proj_", "conditioner.embedders.1.model."),
    (2048, "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_", "conditioner.embedders.1.model."),
    (0, f"text_encoders.clip_g.{LAYER}self_attn.in_proj.", "text_encoders.clip_g."),
]


@pytest.mark.parametrize(("context", "name", "head"), FUSED, ids=[f"{n[1]} {n[0]}" for n in FUSED])
def test_queries_keys_and_values_in_one_are_parted_as_bytes(tmp_path, context, name, head):
    tensors = {f"{name}weight": quantized((96, 32)), f"{name}bias": floats((96,))}
    file = open_file(tmp_path / "all.gguf", tensors, context)
    state = read_others(file, find_parts(file))
    whole = torch.from_numpy(np.frombuffer(tensors[f"{name}weight"][2], np.uint8).reshape(96, -1).copy())
    for i, part in enumerate("qkv"):
        key = f"{head}{LAYER}self_attn.{part}_proj."
        weight = state[f"{key}weight"]
        assert isinstance(weight, QuantizedBytes)
        assert weight.shape == (32, 32)
        assert torch.equal(weight.data, whole[32 * i : 32 * i + 32])
        assert torch.equal(state[f"{key}bias"], torch.arange(96.0)[32 * i : 32 * i + 32])


def test_rows_that_span_thirds_are_parted_as_floats(tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.7.attn.in_proj_weight"
    tensor = quantized((6, 16), stored=(1, 96))
    shape = {f"comfy.gguf.orig_shape.{name}": (ARRAY, (I32, [6, 16]))}
    file = open_file(tmp_path / "all.gguf", {name: tensor}, 1024, shape)
    state = read_others(file, find_parts(file))
    dense = torch.from_numpy(quants.dequantize(np.frombuffer(tensor[2], np.uint8), Q.Q8_0).reshape(6, 16).copy())
    parts = [state[f"cond_stage_model.model.{LAYER}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), dense)


def test_the_file_of_a_tokenizer_stays_bytes(tmp_path):
    spiece = Q.I8, (3,), bytes([1, 200, 3])
    file = open_file(tmp_path / "all.gguf", {"text_encoders.spiece_model": spiece})
    value = read_others(file, find_parts(file))["text_encoders.spiece_model"]
    assert value.dtype == torch.uint8
    assert value.tolist() == [1, 200, 3]


def test_averages_of_training_are_left_out(tmp_path):
    tensors = {f"model_ema.diffusion_model{i}": floats((2,)) for i in range(3)} | {"vae.x": floats((2,))}
    parts = find_parts(open_file(tmp_path / "all.gguf", tensors))
    assert set(parts.others) == {"vae.x"}
    assert len(parts.diffusion.names) == 7


@pytest.mark.parametrize("prefix", [UNET, "diffusion_model.", "model.model.", "model.", "net.", ""])
@pytest.mark.parametrize("with_vae", [True, False])
def test_prefixes_of_diffusion_models(tmp_path, prefix, with_vae):
    vae = {"vae.x": floats((2,))} if with_vae else {}
    parts = find_parts(open_file(tmp_path / "all.gguf", vae, prefix=prefix))
    assert list(parts.diffusion.names) == [f"input_blocks.{i}.bias" for i in range(7)]
    assert parts.is_whole is with_vae


def test_convolutions_around_transformers_become_matrices_but_for_sd1():
    def shapes(context, n_dims):
        return {
            "middle_block.1.proj_in.weight": (8, 8, 1, 1)[:n_dims],
            "middle_block.1.proj_out.weight": (8, 8, 1, 1)[:n_dims],
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, context),
            "other.proj_in.weight": (8, 8, 1, 1),
            "input_blocks.0.0.weight": (8, 8, 1, 1),
        }

    for context in (1024, 2048):
        assert flatten_projections(shapes(context, 4)) == shapes(context, 2)
        assert flatten_projections(shapes(context, 2)) == shapes(context, 2)
    assert flatten_projections(shapes(768, 4)) == shapes(768, 4)


def test_a_fused_weight_of_odd_rows_is_refused(tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.7.attn.in_proj_bias"
    file = open_file(tmp_path / "all.gguf", {name: floats((97,))}, 1024)
    with pytest.raises(UnsupportedArch, match=rf"^all\.gguf: tensor '{name}' has 97 rows, expected as many queries as"):
        read_others(file, find_parts(file))


def test_a_file_of_something_else_is_refused(tmp_path):
    open_file(tmp_path / "vae.gguf", {}, prefix="decoder.")
    with pytest.raises(UnsupportedArch, match=r"^vae\.gguf: it is no whole checkpoint of a diffusion model with"):
        load_checkpoint(tmp_path / "vae.gguf")
