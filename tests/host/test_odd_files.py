# SPDX-License-Identifier: Apache-2.0
"""Files that other programs changed load as the ones that they were made of."""

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import comfy.model_detection
import convert
import execution
import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf_kit import nodes
from gguf_kit.errors import UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_diffusion_model
from gguf_kit.models import archs
from gguf_kit.models.repairs import CUT_BYTES
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from odd_files import CHECKPOINT, assert_same, drop_ones, merge_kernels, rename_norms, rewrite, small_model
from safetensors.torch import save_file
from small_models import forward, make_file

import nodes as host_nodes


@pytest.mark.parametrize("last", ["weight", "scale"])
def test_norms_of_the_tiny_flux_by_either_name(tiny_flux, tmp_path, last):
    plain = tiny_flux("Q8_0")
    path = rewrite(plain, tmp_path / "odd.gguf", rename_norms(last))
    result = tiny.run(tiny.quantized_model(path))
    assert result.isfinite().all()
    assert torch.equal(result, tiny.run(tiny.quantized_model(plain)))


@pytest.mark.parametrize("last", ["weight", "scale"])
@pytest.mark.parametrize("name", ["chroma", "chroma radiance", "hunyuan video", "longcat"])
def test_norms_of_its_kin_by_either_name(name, tmp_path, monkeypatch, last):
    small, plain = small_model(name, tmp_path, monkeypatch)
    path = rewrite(plain, tmp_path / "odd.gguf", rename_norms(last))
    renamed = {t.name for t in gguf.GGUFReader(path).tensors} ^ {t.name for t in gguf.GGUFReader(plain).tensors}
    other = rewrite(plain, tmp_path / "other.gguf", rename_norms("scale" if last == "weight" else "weight"))
    assert renamed or {t.name for t in gguf.GGUFReader(other).tensors} != {
        t.name for t in gguf.GGUFReader(plain).tensors
    }
    assert_same(small, path, plain)


@pytest.mark.parametrize("name", ["wan t2v", "wan vace", "wan s2v", "wan animate", "z-image", "aura", "sd3.5"])
def test_leading_dimensions_of_one_that_ggml_drops(name, tmp_path, monkeypatch):
    small, plain = small_model(name, tmp_path, monkeypatch)
    assert_same(small, rewrite(plain, tmp_path / "odd.gguf", drop_ones), plain)


@pytest.mark.parametrize("name", ["wan t2v", "wan vace", "hunyuan video"])
def test_kernels_of_video_with_merged_dimensions(name, tmp_path, monkeypatch):
    small, plain = small_model(name, tmp_path, monkeypatch)
    path = rewrite(plain, tmp_path / "odd.gguf", merge_kernels)
    assert max(len(t.shape) for t in gguf.GGUFReader(path).tensors) == 4
    assert_same(small, path, plain)


@pytest.mark.parametrize(("name", "mark"), [("chroma radiance", "__x0__"), ("qwen image", "__index_timestep_zero__")])
@pytest.mark.parametrize("size", [0, 1])
def test_marks_of_any_size(name, mark, size, tmp_path, monkeypatch):
    small, plain = small_model(name, tmp_path, monkeypatch)
    path = rewrite(plain, tmp_path / "odd.gguf", lambda *t: t, extra=[(mark, np.zeros(size, np.float32))])
    assert forward(load_model(path, OpsOptions()), small).isfinite().all()


MARKS = [
    ("chroma radiance", "__x0__", ("use_x0", True)),
    ("chroma radiance", "__sequential__", ("use_sequential_txt_ids", True)),
    ("qwen image", "__index_timestep_zero__", ("default_ref_method", "index_timestep_zero")),
]


@pytest.mark.parametrize(("name", "mark", "expected"), MARKS, ids=lambda v: v if isinstance(v, str) else v[0])
@pytest.mark.parametrize("value", [torch.zeros(0), torch.zeros(0, dtype=torch.uint8), torch.tensor(1.0)], ids=repr)
def test_marks_survive_a_conversion(name, mark, expected, value, tmp_path, monkeypatch):
    """What a model predicts or how it counts time hangs on an empty tensor; GGUF readers know none without elements."""
    if mark not in Path(comfy.model_detection.__file__).read_text(encoding="utf-8"):
        pytest.skip(f"this ComfyUI knows no {mark}")
    small, plain = small_model(name, tmp_path, monkeypatch)
    weights = make_file(small, plain)
    save_file({**weights, mark: value}, tmp_path / "model.safetensors")
    arguments = ["--src", tmp_path / "model.safetensors", "--dst", tmp_path / "odd.gguf", "--type", "Q8_0"]
    assert convert.main([*map(str, arguments), "--engine", "torch"]) == 0
    assert {t.name: t.data.size for t in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}[mark] == 1
    patcher = load_model(str(tmp_path / "odd.gguf"), OpsOptions())
    key, wanted = expected
    assert patcher.model.model_config.unet_config[key] == wanted
    assert load_model(str(plain), OpsOptions()).model.model_config.unet_config.get(key) != wanted
    assert forward(patcher, small).isfinite().all()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("hunyuan video", ""),  # cut within the end of a layer's parameter
        ("flux dev", CHECKPOINT),  # 41 bytes are left: norms end in "query_norm."
        ("cosmos predict2", CHECKPOINT),
        ("wan camera", CHECKPOINT),
        ("anima", CHECKPOINT),
        ("minimax h3", CHECKPOINT),
    ],
)
def test_names_that_were_cut(name, prefix, tmp_path, monkeypatch):
    small, plain = small_model(name, tmp_path, monkeypatch)
    names = [prefix + t.name for t in gguf.GGUFReader(plain).tensors]
    assert max(map(len, names)) > CUT_BYTES[0]
    path = rewrite(plain, tmp_path / "odd.gguf", lambda name, data: ((prefix + name)[: CUT_BYTES[0]], data))
    assert_same(small, path, plain)


def test_a_cut_name_that_could_be_two_of_the_model_s_keys_is_refused(tmp_path, monkeypatch):
    """Both the weight and the bias of a layer are gone, and one vector is there that could be either."""
    _, plain = small_model("wan t2v", tmp_path, monkeypatch)
    layer, prefix = "blocks.0.norm3.", "x" * (63 - 15)
    assert len(prefix + layer) == CUT_BYTES[0]
    monkeypatch.setattr(archs, "KEY_PREFIXES", (prefix,))

    def change(name, data):
        short = prefix + (layer if name.startswith(layer) else name)
        return None if name == f"{layer}bias" else (short, data)

    path = rewrite(plain, tmp_path / "odd.gguf", change)
    with pytest.raises(UnsupportedArch, match=r"2 tensors .* missing: diffusion_model\.blocks\.0\.norm3\.bias, "):
        load_model(path, OpsOptions())


@pytest.mark.parametrize("tag", [None, "pig", "cow", "wan", "ltx2", "llama", " ", "no such thing \u2603"])
@pytest.mark.parametrize("name", ["flux dev", "wan t2v", "joyimage", "minimax h3", "qwen image"])
def test_any_tag_or_none(name, tag, tmp_path, monkeypatch):
    """Files of JoyAI are tagged wan, of MiniMax ltx2, of any model pig or cow."""
    small, plain = small_model(name, tmp_path, monkeypatch)
    make_file(small, tmp_path / "odd.gguf", tag)
    assert GGUFFile(tmp_path / "odd.gguf").arch == (tag or "")
    assert_same(small, str(tmp_path / "odd.gguf"), plain)


@pytest.mark.parametrize("prefix", ["net.", f"{CHECKPOINT}net.", "diffusion_model.", "model.model."])
def test_prefixes(prefix, tmp_path, monkeypatch):
    small, plain = small_model("cosmos predict2", tmp_path, monkeypatch)
    path = rewrite(plain, tmp_path / "odd.gguf", lambda name, data: (prefix + name, data))
    assert load_diffusion_model(path)[1].title == small.title
    assert_same(small, path, plain)


@pytest.mark.parametrize("name", ["wan t2v", "wan vace", "hunyuan video"])
@pytest.mark.parametrize("as_rows", [False, True], ids=["five dimensions", "rows"])
def test_kernels_of_video_in_full_or_as_rows_with_their_shape_beside_them(name, as_rows, tmp_path, monkeypatch):
    small, plain = small_model(name, tmp_path, monkeypatch)
    stored = gguf.GGUFReader(plain).tensors
    kernels = {t.name: tuple(t.data.shape) for t in stored if t.data.ndim == 5}
    assert kernels
    shapes = {f"comfy.gguf.orig_shape.{key}": shape for key, shape in kernels.items()} if as_rows else {}

    def change(key, data):
        return key, data.reshape(data.shape[0], -1) if as_rows and key in kernels else data

    path = rewrite(plain, tmp_path / "odd.gguf", change, metadata=shapes)
    assert_same(small, path, plain)
    network = load_model(path, OpsOptions()).model.diffusion_model.state_dict()
    assert all(tuple(network[key].shape) == shape for key, shape in kernels.items())


def test_the_config_of_a_model_arrives_in_the_host(tmp_path, monkeypatch):
    """LTX-2 says in it what keys and shapes do not, and ComfyUI 0.33 and older ask for it."""
    small, _ = small_model("ltxv", tmp_path, monkeypatch)
    config = {"transformer": {"positional_embedding_max_pos": [7, 8, 9], "novel": 1}}
    make_file(dataclasses.replace(small, metadata={"config": json.dumps(config)}), tmp_path / "odd.gguf", "ltxv")
    seen = []
    detect = comfy.model_detection.detect_unet_config

    def spy(state_dict, prefix, metadata=None):
        seen.append(metadata)
        return detect(state_dict, prefix, metadata=metadata)

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", spy)
    with contextlib.suppress(UnsupportedArch):  # its class may refuse what is novel
        load_model(str(tmp_path / "odd.gguf"), OpsOptions())
    assert json.loads(seen[0]["config"]) == config


def test_a_model_in_parts(tiny_flux, tmp_path):
    plain = tiny_flux("Q8_0")
    rewrite(plain, tmp_path / "odd.gguf", lambda *t: t, split_max_tensors=40)
    parts = sorted(tmp_path.glob("odd-*.gguf"))
    assert len(parts) > 1
    expected = tiny.run(tiny.quantized_model(plain))
    for part in (parts[0], parts[-1]):
        assert torch.equal(tiny.run(tiny.quantized_model(part)), expected)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("UnetLoaderGGUF", {"unet_name": "sub/a-00002-of-00003.gguf"}),
        ("CLIPLoaderGGUF", {"clip_name": "sub/a-00003-of-00003.gguf", "type": "sd3"}),
        (
            "CLIPLoaderGGUF",
            {"clip_name": "b.gguf", "type": "sd3", "vision_name": "sub/a-00002-of-00003.gguf"},
        ),
    ],
)
def test_only_the_first_part_is_offered_and_any_part_is_accepted(node, inputs, tmp_path, monkeypatch):
    """A saved workflow may name a part that is not listed any more."""
    (tmp_path / "sub").mkdir()
    names = [*(f"sub/a-0000{i}-of-00003.gguf" for i in (1, 2, 3)), "b.gguf", "lone-00002-of-00002.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    for key in ("unet_gguf", "clip_gguf"):
        monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, key, ([str(tmp_path)], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node, nodes.NODE_CLASS_MAPPINGS[node])
    kind = nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    choices = {**kind["required"], **kind.get("optional", {})}
    for key, value in inputs.items():
        if value.endswith(".gguf"):
            listed = json.loads(json.dumps(choices[key][0]))  # as the browser gets it
            assert {name.replace("\\", "/") for name in listed} >= {names[0], *names[3:]}
            assert not {name.replace("\\", "/") for name in listed} & {names[1], names[2]}
    for changed, valid in (({}, True), (dict.fromkeys(inputs, "nowhere.gguf"), False)):
        prompt = {"1": {"class_type": node, "inputs": {**inputs, **changed}}}
        assert asyncio.run(execution.validate_inputs("p", prompt, "1", {}))[0] is valid
