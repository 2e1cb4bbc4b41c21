# SPDX-License-Identifier: Apache-2.0
"""A text encoder with its vision part, without it, and with another: the whole way from files to a CLIP."""

import functools
import logging
import os
import shutil

import comfy.sd
import comfy.sd1_clip
import encoders
import pytest
import torch
import vision_files
from gguf_kit import nodes
from gguf_kit.errors import GGUFError
from gguf_kit.host.text_encoders import AbsentPart
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.service import load_clip, load_text_encoder

NAME = "qwen2.5-vl 7b"  # every host has it
TOWER = vision_files.TOWERS[NAME]
PICTURE = torch.linspace(0, 100, 96 * 144 * 3).reshape(1, 96, 144, 3).sin().abs()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Paths of an encoder and of its vision part in another folder, in the sizes that the host is made to build."""
    TOWER.shrink(monkeypatch)
    load = comfy.sd.load_text_encoder_state_dicts
    sizes = {f"{name}_model_config": dict(TOWER.family.config) for name in (TOWER.clip_name, "llama")}

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | sizes, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)
    (tmp_path / "elsewhere").mkdir()
    encoder, part = tmp_path / "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", tmp_path / "elsewhere" / "mmproj-F16.gguf"
    with pytest.MonkeyPatch.context() as patch:
        encoders.without_other_parts(patch)
        encoders.write_encoder(TOWER.family, encoder)
    vision_files.write_mmproj(TOWER, TOWER.family.build(), part)
    return encoder, part


def encoder_of(clip):
    return next(m for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel))


def hidden_states(clip, *middle):
    with torch.inference_mode():
        return encoder_of(clip).encode_token_weights([[(5, 1.0), *middle, (17, 1.0), (3, 1.0)]])[0]


SEEN = ({"type": "image", "data": PICTURE, "original_type": "image"}, 1.0)


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "found"])
def test_pictures_reach_an_encoder_through_its_vision_part(files, chosen, caplog):
    encoder, part = files
    if not chosen:
        part = shutil.copy(part, encoder.with_name("Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf"))
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        clip = load_clip((str(encoder),), "qwen_image", vision=str(part) if chosen else "auto")
    assert not caplog.records
    state, info = load_text_encoder(encoder, part)
    assert info.vision == str(part)
    dense = comfy.sd.load_text_encoder_state_dicts(
        [{k: v.dequantize() if isinstance(v, QuantizedBytes) else v.float() for k, v in state.items()}],
        clip_type=comfy.sd.CLIPType.QWEN_IMAGE,
        model_options={"dtype": torch.float32},
    )
    expected, actual = (hidden_states(loaded, SEEN) for loaded in (dense, clip))
    assert expected.isfinite().all()
    assert expected.shape[1] > 3
    assert torch.equal(actual, expected)


def test_without_its_vision_part_an_encoder_reads_text_and_says_so_once(files, caplog):
    encoder, part = files
    shutil.copy(part, encoder.parent)
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        clip = load_clip((str(encoder),), "qwen_image", vision="none")
    words = (
        "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf: this encoder has no vision part (mmproj), so it reads text only. "
        "For pictures, put the vision part beside it or choose it as vision_name."
    )
    assert [record.getMessage() for record in caplog.records if record.name == "gguf_kit"] == [words]
    visual = encoder_of(clip).transformer.visual
    assert isinstance(visual, AbsentPart)
    assert not list(visual.parameters())
    assert hidden_states(clip).isfinite().all()
    with pytest.raises(GGUFError) as caught:
        hidden_states(clip, SEEN)
    assert str(caught.value) == words


def test_a_text_encoder_is_no_vision_part(files):
    encoder, _ = files
    other = shutil.copy(encoder, encoder.with_name("other.gguf"))
    with pytest.raises(GGUFError, match=r"^other\.gguf: it is no vision part .*Qwen2\.5-VL-7B-Instruct-Q4_K_M\.gguf"):
        load_clip((str(encoder),), "qwen_image", vision=str(other))


def test_the_node_passes_on_the_part_that_was_chosen_and_sees_a_new_one(files, monkeypatch):
    encoder, part = files
    folders = [str(encoder.parent), str(part.parent)]
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "clip_gguf", (folders, {".gguf"}))
    inputs = {"clip_name": encoder.name, "type": "qwen_image"}
    (clip,) = nodes.CLIPLoaderGGUF().load_clip(**inputs, vision_name=part.name)
    assert hidden_states(clip, SEEN).shape[1] > 3
    (without,) = nodes.CLIPLoaderGGUF().load_clip(encoder.name, "qwen_image", "cpu", "none")
    assert isinstance(encoder_of(without).transformer.visual, AbsentPart)
    before = [nodes.CLIPLoaderGGUF.IS_CHANGED(**inputs, vision_name=name) for name in ("auto", "none", part.name)]
    shutil.copy(part, encoder.parent)
    os.utime(part, (0, 0))
    after = [nodes.CLIPLoaderGGUF.IS_CHANGED(**inputs, vision_name=name) for name in ("auto", "none", part.name)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]
