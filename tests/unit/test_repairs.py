# SPDX-License-Identifier: Apache-2.0
"""Names and shapes that other programs changed: the real models' keys come back, and keys that are right stay."""

import re

import model_keys
import numpy as np
import pytest
from gguf_builder import STRING, build_gguf
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_diffusion_model, load_text_encoder
from gguf_kit.models import repairs
from gguf_kit.models.values import QuantizedBytes

F32, F16, Q8_0 = 0, 1, 8
REGISTER = "txt_in.individual_token_refiner.blocks."
# Norms of Flux, Chroma and Hunyuan: two names for one thing.
FLUX_NORM = re.compile(r".*\.(query_norm|key_norm|norms\.\d+)\.(scale|weight)|nerf_.*norm\.(scale|weight)")
AV = "audio_embeddings_connector.transformer_1d_blocks."


def open_file(path, tensors):
    """A file of (name, shape), float32 zeros."""
    entries = [(name, F32, shape, bytes(4 * int(np.prod(shape)))) for name, shape in tensors]
    path.write_bytes(build_gguf({"general.architecture": (STRING, "x")}, entries))
    return GGUFFile(path)


class Header:
    """As much of a file as names and shapes are."""

    def __init__(self, shapes):
        self.tensors = shapes

    def logical_shape(self, name):
        return self.tensors[name]


def cut(name, n_bytes=63):
    return name.encode()[:n_bytes].decode()


# Of models that no entry knows nothing tells the shape, but what their own converter notes of it.
MODELS = [name for name in model_keys.list_names() if not name.startswith("other-")]


@pytest.mark.parametrize("model", MODELS)
def test_shapes_of_real_models_stay_and_come_back(model):
    keys = model_keys.read_keys(model)
    assert repairs.restore_shapes(keys) == keys
    if model.startswith("other-"):  # no program that leaves out dimensions writes them
        return
    dropped = {}
    for key, shape in keys.items():
        first = next((i for i, n in enumerate(shape) if n != 1), max(len(shape) - 1, 0))
        dropped[key] = shape[first:] or (1,)  # ggml_n_dims counts no dimension beyond the last that is not 1
    assert repairs.restore_shapes(dropped) == keys


@pytest.mark.parametrize("model", MODELS)
def test_merged_kernels_of_video_come_apart(model):
    keys = model_keys.read_keys(model)
    merged = {k: (s[0] * s[1], *s[2:]) if len(s) == 5 and k.endswith(".weight") else s for k, s in keys.items()}
    assert repairs.restore_shapes(merged) == keys


@pytest.mark.parametrize(
    ("key", "stored", "expected"),
    [
        ("x_pad_token", (64,), (1, 64)),
        ("cap_pad_token", (1, 1, 64), (1, 64)),
        ("blocks.3.modulation", (6, 64), (1, 6, 64)),
        ("modulation", (6, 64), (6, 64)),
        ("lq_proj.gate_modules.0.log_alpha", (1,), ()),
        ("a.lin.weight", (1, 64), (1, 64)),
        ("a.weight", (64, 2, 2, 2), (64, 2, 2, 2)),
        ("__x0__", (1,), (0,)),
        ("__x0__", (0,), (0,)),
        ("__index_timestep_zero__", (), (0,)),
        ("__table__", (2,), (2,)),
    ],
)
def test_shapes_of_single_tensors(key, stored, expected):
    assert repairs.restore_shapes({key: stored}) == {key: expected}


@pytest.mark.parametrize("shape", [(32, 16, 2, 2), (16, 32, 2, 2), (24, 4, 2, 2)])
def test_kernels_of_pictures_stay(shape):
    shapes = {"a.weight": shape, "a.bias": (16,)}
    assert repairs.restore_shapes(shapes) == shapes


def test_values_have_the_restored_shapes(tmp_path):
    rng = np.random.default_rng(0)
    kernel, token = rng.standard_normal((32, 1, 2, 2)).astype(np.float16), rng.standard_normal(64).astype(np.float32)
    blocks = rng.integers(0, 127, (2 * 4 * 2, 34), dtype=np.uint8)
    tensors = [
        ("patch_embedding.weight", F16, (32, 1, 2, 2), kernel.tobytes()),
        ("patch_embedding.bias", F32, (8,), bytes(32)),
        ("wide.weight", Q8_0, (8, 1, 2, 32), blocks.tobytes()),
        ("wide.bias", F32, (4,), bytes(16)),
        ("x_pad_token", F32, (64,), token.tobytes()),
        ("__x0__", F32, (1,), bytes(4)),
    ]
    (tmp_path / "a.gguf").write_bytes(build_gguf({}, tensors))
    state, _ = load_diffusion_model(tmp_path / "a.gguf")
    assert np.array_equal(state["patch_embedding.weight"].numpy(), kernel.reshape(8, 4, 1, 2, 2))
    assert np.array_equal(state["x_pad_token"].numpy(), token[None])
    assert state["__x0__"].shape == (0,)
    assert isinstance(state["wide.weight"], QuantizedBytes)
    assert state["wide.weight"].shape == (4, 2, 1, 2, 32)
    assert np.array_equal(state["wide.weight"].data.numpy().reshape(-1, 34), blocks)


WHOLE = f"{REGISTER}0.adaLN_modulation.1.weight"  # 66 bytes
MIDDLE = f"{AV}0.attn1.q_norm.weight"  # 71 bytes, cut in the middle of its name


def test_a_cut_end_of_a_layer_is_completed(tmp_path):
    names = [WHOLE, f"{REGISTER}1.adaLN_modulation.1.bias"]
    file = open_file(tmp_path / "a.gguf", [(cut(names[0]), (4, 4)), (cut(names[1]), (4,))])
    assert repairs.whole_names(file) == {name: cut(name) for name in names}
    assert repairs.find_keys(file).cut == frozenset()


@pytest.mark.parametrize("end", [".weight", ".bias", ".scale"])
@pytest.mark.parametrize("n_bytes", [63, 127])
def test_every_length_of_an_end_is_completed(tmp_path, end, n_bytes):
    for n in range(2, len(end)):  # with the dot alone a vector can be any of them
        whole = "a" * (n_bytes - n) + end
        file = open_file(tmp_path / "a.gguf", [(cut(whole, n_bytes), (4,))])
        assert list(repairs.whole_names(file)) == [whole]
        shorter = open_file(tmp_path / "b.gguf", [(cut(whole, n_bytes)[1:], (4,))])
        assert list(repairs.whole_names(shorter)) == [cut(whole, n_bytes)[1:]]


def test_names_that_are_whole_stay(tmp_path):
    exact = "a" * (63 - len(".weight")) + ".weight"
    bare = "blocks.0." + "b" * (63 - 9)
    names = [exact, bare, "short.weight", WHOLE]
    file = open_file(tmp_path / "a.gguf", [(name, (4,)) for name in names])
    assert repairs.whole_names(file) == {name: name for name in names}
    assert repairs.find_keys(file).cut == {bare}  # it may be one, if the model has no such key


def test_a_matrix_is_a_weight(tmp_path):
    dot = "b" * 62 + "."
    file = open_file(tmp_path / "a.gguf", [(dot, (4, 4))])
    assert repairs.whole_names(file) == {f"{dot}weight": dot}
    file = open_file(tmp_path / "b.gguf", [(dot, (4,))])
    assert repairs.whole_names(file) == {dot: dot}


def test_a_name_that_is_there_already_stays(tmp_path):
    names = [cut(WHOLE), WHOLE]
    file = open_file(tmp_path / "a.gguf", [(name, (4, 4)) for name in names])
    assert repairs.whole_names(file) == {name: name for name in names}


@pytest.mark.parametrize("model", model_keys.list_names())
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_real_models_with_cut_names_come_back(model, prefix):
    """Wherever cutting leaves different names; the others cannot be in a file."""
    keys = {key: (2,) * min(len(shape), 2) for key, shape in model_keys.read_keys(model).items()}
    names = {key: cut(prefix + key) for key in keys}
    if len(set(names.values())) < len(names):
        names = {key: prefix + key for key in names}
    found = repairs.find_keys(Header({names[key]: shape for key, shape in keys.items()}))
    missing = [key for key in keys if key not in found.names]
    completed = repairs.complete_keys(found.names, found.cut, missing)
    assert completed == names
    assert set(missing) <= set(completed) - set(found.names)


def test_a_cut_key_becomes_the_only_missing_one_that_begins_so():
    state = {"a.wh": 1, "b.x": 2, "c.y": 3, "d": 4}
    missing = ["a.whole.weight", "b.x1", "b.x2", "d.weight"]
    assert repairs.complete_keys(state, {"a.wh", "b.x", "c.y"}, missing) == {
        "a.whole.weight": 1, "b.x": 2, "c.y": 3, "d": 4,
    }  # fmt: skip


def test_names_behind_a_prefix_are_completed_first(tmp_path):
    prefix = "model.diffusion_model."
    long = f"{prefix}joint_blocks.1.x_block.adaLN_modulation.x.weight"
    long = long.replace(".x.", f".{'y' * (65 - len(long))}.")
    names = [long, *(f"{prefix}a{i}.weight" for i in range(6))]
    file = open_file(tmp_path / "a.gguf", [(cut(name), (4, 4)) for name in names])
    keys = repairs.find_keys(file)
    assert set(keys.names) == {name.removeprefix(prefix) for name in names}
    assert keys.names[long.removeprefix(prefix)] == cut(long)


def test_a_cut_name_of_a_text_encoder_is_completed(tmp_path):
    prefix = "text_encoders.llm.model."
    names = [f"{prefix}{n}" for n in ("embed_tokens.weight", "norm.weight")]
    norms = ("input_layernorm", "post_attention_layernorm")
    names += [f"{prefix}layers.{i}.{norm}.weight" for i in (0, 10) for norm in norms]
    assert len(names[-1]) > 63
    open_file(tmp_path / "a.gguf", [(cut(name), (4,)) for name in names])
    state, _ = load_text_encoder(tmp_path / "a.gguf")
    assert state.keys() >= {f"model.{name.removeprefix(prefix)}" for name in names}


@pytest.mark.parametrize("model", model_keys.list_names())
def test_a_sound_model_is_not_changed(model):
    keys = model_keys.read_keys(model)
    found = repairs.find_keys(Header(keys))
    assert found.names == {key: key for key in keys}
    assert found.shapes == keys
    assert repairs.whole_names(Header(keys)) == {key: key for key in keys}
    for last in ("weight", "scale"):
        renamed = repairs.rename_norms(keys, last)
        assert list(repairs.rename_norms(renamed, "scale").values()) == list(keys.values())
        changed = {new: old for new, old in zip(renamed, keys, strict=True) if new != old}
        assert all(FLUX_NORM.fullmatch(key) for key in changed.values())
        assert repairs.rename_norms(renamed, last) == renamed


@pytest.mark.parametrize("last", ["weight", "scale"])
def test_norms_of_flux_get_the_name_that_is_asked_for(last):
    norms = [
        f"{at}.norm.{kind}_norm" for kind in ("query", "key") for at in ("double_blocks.1.txt_attn", "single_blocks.2")
    ]
    norms += ["distilled_guidance_layer.norms.4", "nerf_blocks.0.norm", "nerf_final_layer_conv.norm"]
    other = {"txt_norm.weight": 1, "blocks.0.norm.weight": 2, "single_blocks.0.linear1.scale": 3}
    state = {f"{norm}.{'weight' if i % 2 else 'scale'}": norm for i, norm in enumerate(norms)} | other
    assert repairs.rename_norms(state, last) == {f"{norm}.{last}": norm for norm in norms} | other


def test_a_norm_under_both_names_loses_neither():
    state = {f"double_blocks.0.img_attn.norm.key_norm.{last}": last for last in ("weight", "scale")}
    assert repairs.rename_norms(state, "scale") == state
