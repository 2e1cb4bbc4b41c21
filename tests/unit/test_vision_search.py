# SPDX-License-Identifier: Apache-2.0
"""The search for a vision part beside a text encoder: what fits, by which name, and how little is opened for it."""

import logging
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf_kit import gguf_file
from gguf_kit.errors import UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import vision, vision_search
from gguf_kit.models.values import floats
from vision_parts import Q, open_encoder, write_part, write_text_encoder


class Folder:
    """A folder with a text encoder and other files."""

    def __init__(self, path, name="Qwen2.5-VL-7B-Instruct-UD-Q4_K_XL.gguf", arch="qwen2vl"):
        self.path = path
        self.encoder = open_encoder(write_text_encoder(path / name, arch))

    def add(self, name, kind="qwen2vl", **named):
        write_part(self.path / name, kind, **named)
        return self

    def found(self):
        found = vision_search.find(*self.encoder)
        return found and Path(found.path).name


@pytest.mark.parametrize(
    "name",
    [
        "mmproj-BF16.gguf",
        "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf",
        "Qwen2.5-VL-7B-Instruct.mmproj-Q8_0.gguf",
        "Qwen2.5-VL-7B-Instruct-MMPROJ-F16.GGUF",
        "some other model's mmproj.gguf",
        "vision.gguf",
    ],
)
def test_the_only_part_that_fits_is_taken_whatever_its_name(tmp_path, name):
    folder = Folder(tmp_path).add(name).add("mmproj-gemma-3-4b-it.gguf", "gemma3").add("mmproj-3b.gguf", width=192)
    assert folder.found() == name


def test_the_best_name_wins(tmp_path):
    folder = Folder(tmp_path, "Qwen2.5-VL-7B-Instruct-abliterated.i1-Q4_K_M.gguf")
    folder.add("mmproj-F16.gguf").add("Qwen2.5-VL-7B-Instruct-mmproj-f16.gguf")
    assert folder.found() == "Qwen2.5-VL-7B-Instruct-mmproj-f16.gguf"
    folder.add("Qwen2.5-VL-7B-Instruct-abliterated.mmproj-Q8_0.gguf", qtype=Q.Q8_0)
    assert folder.found() == "Qwen2.5-VL-7B-Instruct-abliterated.mmproj-Q8_0.gguf"


def test_of_equal_names_the_best_type_wins_and_the_log_says_so(tmp_path, caplog):
    folder = Folder(tmp_path)
    for qtype in (Q.F32, Q.Q8_0, Q.F16, Q.BF16, Q.Q4_0):
        folder.add(f"Qwen2.5-VL-7B-Instruct-mmproj-{qtype.name}.gguf", qtype=qtype)
    for best in ("BF16", "F16", "F32", "Q8_0", "Q4_0"):
        with caplog.at_level(logging.INFO, "gguf_kit"):
            assert folder.found() == f"Qwen2.5-VL-7B-Instruct-mmproj-{best}.gguf"
        (tmp_path / f"Qwen2.5-VL-7B-Instruct-mmproj-{best}.gguf").unlink()
    assert "mmproj-BF16.gguf chosen of 5 vision parts that fit" in caplog.text


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen2.5-VL-7B-Instruct-UD-Q4_K_XL.gguf", "qwen25vl7binstruct"),
        ("Qwen2.5-VL-7B-Instruct.i1-IQ3_XXS.gguf", "qwen25vl7binstruct"),
        ("mmproj-Qwen2.5-VL-7B-Instruct-BF16.gguf", "qwen25vl7binstruct"),
        ("Qwen2.5-VL-7B-Instruct-mmproj-fp16.gguf", "qwen25vl7binstruct"),
        ("qwen_2.5_vl_7b_instruct_q8_0.gguf", "qwen25vl7binstruct"),
        ("Qwen2.5-VL-7B-Instruct-Q8_0-00001-of-00002.gguf", "qwen25vl7binstruct"),
        ("mmproj-F16.gguf", ""),
    ],
)
def test_a_model_s_name_is_what_is_left_without_type_and_number(tmp_path, name, model):
    assert vision_search.model_name(tmp_path / name) == model


def test_nothing_that_fits_is_nothing(tmp_path):
    folder = Folder(tmp_path)
    assert folder.found() is None
    assert folder.add("mmproj-gemma.gguf", "gemma3").add("mmproj-3b.gguf", width=192).found() is None
    assert Folder(tmp_path, "llama.gguf", "llama").add("mmproj.gguf").found() is None


def test_damaged_neighbours_are_passed_over_and_logged(tmp_path, caplog):
    folder = Folder(tmp_path)
    (tmp_path / "Qwen2.5-VL-7B-Instruct-mmproj-BF16.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "empty-mmproj.gguf").write_bytes(b"")
    (tmp_path / "folder-mmproj.gguf").mkdir()
    (tmp_path / "gone-mmproj.gguf").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO, "gguf_kit"):
        assert folder.add("mmproj-F16.gguf").found() == "mmproj-F16.gguf"
    assert "not taken for a vision part: Qwen2.5-VL-7B-Instruct-mmproj-BF16.gguf: " in caplog.text


def test_a_crowded_folder_is_not_opened_file_by_file(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    for i in range(100):
        shutil.copyfile(folder.encoder[0].path, tmp_path / f"Qwen2.5-VL-7B-Instruct-{i}.gguf")
        (tmp_path / f"note-{i}.txt").write_text("mmproj")
    opened = []
    real = gguf_file.map_file
    monkeypatch.setattr(gguf_file, "map_file", lambda path: opened.append(path) or real(path))
    assert folder.found() is None
    assert opened == []
    folder.add("zz.gguf")
    assert folder.found() == "zz.gguf"
    assert len(opened) == 1


def split_in_two(path):
    """Write a GGUF file as two parts and take it away."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path, "clip", split_max_tensors=len(reader.tensors) - 3)
    for key in ("general.type", "clip.has_vision_encoder", "clip.vision.projector_type", "clip.projector_type"):
        field = reader.fields.get(key)
        if field is not None:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    return [path.with_name(f"{path.stem}-0000{i}-of-00002.gguf") for i in (1, 2)]


@pytest.mark.parametrize("name", ["mmproj-F16.gguf", "vision.gguf"])
def test_a_part_in_two_files_is_opened_once_and_joined(tmp_path, monkeypatch, name):
    folder = Folder(tmp_path).add(name)
    whole = vision.read(GGUFFile(tmp_path / name), *folder.encoder)
    parts = split_in_two(tmp_path / name)
    opened = []
    real = gguf_file.map_file
    monkeypatch.setattr(gguf_file, "map_file", lambda path: opened.append(path) or real(path))
    found = vision_search.find(*folder.encoder)
    assert sorted(opened) == [str(path) for path in parts]
    state = vision.read(found, *folder.encoder)
    assert sorted(opened) == [str(path) for path in parts]
    assert state.keys() == whole.keys()
    assert all(torch.equal(floats(state[key]), floats(whole[key])) for key in whole)


def test_the_other_parts_of_the_encoder_are_no_neighbours(tmp_path, monkeypatch):
    folder = Folder(tmp_path, "Qwen2.5-VL-00002-of-00003.gguf").add("zz.gguf")
    for i in (1, 3):
        shutil.copyfile(folder.encoder[0].path, tmp_path / f"Qwen2.5-VL-0000{i}-of-00003.gguf")
    looked_at = []
    real = vision_search._said_clip

    def seen(paths):
        looked_at.extend(path.name for path in paths)
        return real(paths)

    monkeypatch.setattr(vision_search, "_said_clip", seen)
    assert folder.found() == "zz.gguf"
    assert looked_at == ["zz.gguf"]


def test_the_search_never_raises_for_an_encoder_without_a_folder(tmp_path):
    folder = Folder(tmp_path)
    shutil.rmtree(tmp_path)
    assert folder.found() is None


def test_a_part_is_checked_before_it_is_found(tmp_path):
    """What the search finds can be read: an incomplete file is not offered."""
    folder = Folder(tmp_path).add("mmproj.gguf", change=lambda shapes: shapes | {"v.blk.0.attn_sinks": (8,)})
    assert folder.found() is None
    with pytest.raises(UnsupportedArch, match="match no rule"):
        vision.read(GGUFFile(tmp_path / "mmproj.gguf"), *folder.encoder)
