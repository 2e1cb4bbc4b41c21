# SPDX-License-Identifier: Apache-2.0
"""Models in several files, split by gguf-py's own writer: one model whichever part is opened, else one sentence."""

import gguf
import inspect_gguf
import numpy as np
import pytest
import torch
from gguf_builder import F32, I32, STRING, U16, build_gguf
from gguf_kit.errors import BadFile
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_diffusion_model, load_text_encoder
from gguf_kit.mapped_file import file_range
from gguf_kit.models.split_files import SplitFile, first_part, open_gguf, paths_of, without_later_parts
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.quantize.sources import open_source
from inspect_files import run_inspect

NAMES = (
    "img_in.weight",
    "vector_in.in_layer.weight",
    "guidance_in.in_layer.weight",
    "double_blocks.0.img_attn.proj.weight",
    "double_blocks.0.img_attn.norm.query_norm.scale",
)
PARTS = [f"flux-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def write(path, split_max_tensors=0, matrices=gguf.GGMLQuantizationType.Q8_0):
    """A file of five tensors, or its parts of so many tensors each, in which one is another shape in truth."""
    writer = gguf.GGUFWriter(path, "flux", split_max_tensors=split_max_tensors)
    writer.add_string("config", "carried")
    writer.add_array("comfy.gguf.orig_shape.double_blocks.0.img_attn.proj.weight", [64, 32, 2])
    generator = np.random.default_rng(0)
    for name in NAMES:
        values = generator.standard_normal((64, 64) if name.endswith("weight") else (64,)).astype(np.float32)
        qtype = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path):
    """A folder with the model in one file, whole.gguf, and in PARTS."""
    write(tmp_path / "whole.gguf")
    write(tmp_path / "flux.gguf", split_max_tensors=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*PARTS, "whole.gguf"]
    return tmp_path


def plain(state):
    return {key: v.dequantize() if isinstance(v, QuantizedBytes) else v for key, v in state.items()}


def test_a_tensor_lies_in_the_part_that_has_it(folder):
    split = open_gguf(folder / PARTS[2])
    for part in split.parts:
        for name, info in part.tensors.items():
            found = file_range(split.data(name))
            assert (found.file.path, found.offset, found.n_bytes) == (part.path, info.offset, info.n_bytes)


@pytest.mark.parametrize("part", PARTS)
def test_any_part_stands_for_the_whole_model(folder, part):
    whole, split = GGUFFile(folder / "whole.gguf"), open_gguf(folder / part)
    assert isinstance(split, SplitFile)
    assert (split.path, split.arch, len(split.parts)) == (str(folder / part), "flux", 3)
    assert list(split.tensors) == list(whole.tensors) == list(NAMES)
    for name in NAMES:
        assert torch.equal(split.data(name), whole.data(name))
        assert split.logical_shape(name) == whole.logical_shape(name)
    assert split.logical_shape(NAMES[3]) == (64, 32, 2)
    assert split.carried_metadata() == whole.carried_metadata() == {"config": "carried"}


@pytest.mark.parametrize("part", PARTS)
def test_the_loader_joins_parts(folder, part):
    state, info = load_diffusion_model(folder / part)
    expected, about = load_diffusion_model(folder / "whole.gguf")
    assert (info.title, info.n_bytes, info.qtypes) == (about.title, about.n_bytes, about.qtypes)
    assert info.path == str(folder / part)
    values, wanted = plain(state), plain(expected)
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("part", PARTS)
def test_a_conversion_starts_from_any_part(tmp_path, part):
    write(tmp_path / "whole.gguf", matrices=gguf.GGMLQuantizationType.F16)
    write(tmp_path / "flux.gguf", split_max_tensors=2, matrices=gguf.GGMLQuantizationType.F16)
    source, expected = open_source(tmp_path / part), open_source(tmp_path / "whole.gguf")
    assert (source.title, expected.title) == ("GGUF in 3 files", "GGUF")
    assert source.tensors == expected.tensors
    assert source.metadata == expected.metadata == {"config": "carried"}
    assert all(torch.equal(source.read(name), expected.read(name)) for name in NAMES)


def test_parts_are_described_as_one_file(folder, capsys):
    split, whole = (run_inspect(capsys, folder / name, "--json").document for name in (PARTS[1], "whole.gguf"))
    assert (split["files"], whole["files"]) == (3, 1)
    assert split["file_bytes"] == sum((folder / part).stat().st_size for part in PARTS)
    for key in ("arch", "model", "weights", "tensor_bytes", "bpw", "qtypes"):
        assert split[key] == whole[key]
    assert [t["name"] for t in split["tensors"]] == list(NAMES)
    assert " in 3 files, GGUF 3" in run_inspect(capsys, folder / PARTS[2]).out


def test_parts_equal_the_file_that_they_were_made_of(folder, capsys):
    document = run_inspect(capsys, folder / "whole.gguf", "--diff", folder / PARTS[0], "--json").document
    assert document["diff"]["equal"]


def test_all_parts_are_checked(folder, capsys):
    assert run_inspect(capsys, folder / PARTS[0], "--check").status == 0
    last = open_gguf(folder / PARTS[0]).tensors[NAMES[4]]
    raw = bytearray((folder / PARTS[2]).read_bytes())
    raw[last.offset : last.offset + 4] = np.float32("nan").tobytes()
    (folder / PARTS[2]).write_bytes(raw)
    result = run_inspect(capsys, folder / PARTS[0], "--check", "--json")
    assert result.status == 1
    assert [(p["name"], p["nan"]) for p in result.document["check"]["problems"]] == [(NAMES[4], 1)]


def test_the_command_line_says_which_part_is_missing(folder, capsys):
    (folder / PARTS[2]).unlink()
    assert inspect_gguf.main([str(folder / PARTS[0])]) == 2
    assert f"part 1 of 3 of a split file, and {PARTS[2]} is missing" in capsys.readouterr().err


def test_names_of_later_parts_are_left_out_where_the_first_is_there():
    names = ["a/x-00001-of-00002.gguf", "a/x-00002-of-00002.gguf", "x-00002-of-00002.gguf", "y.gguf", "y-1-of-2.gguf"]
    assert without_later_parts(names) == [names[0], *names[2:]]
    assert first_part(names[2]) == "x-00001-of-00002.gguf"
    assert [first_part(name) for name in names[3:]] == names[3:]


def test_paths_of_a_file(folder):
    assert paths_of(open_gguf(folder / "whole.gguf")) == [str(folder / "whole.gguf")]
    assert paths_of(open_gguf(folder / PARTS[1])) == [str(folder / part) for part in PARTS]


def test_a_file_that_is_not_split_is_opened_as_it_is(folder):
    assert type(open_gguf(folder / "whole.gguf")) is GGUFFile


@pytest.mark.parametrize("missing", PARTS[1:])
def test_a_missing_part_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(BadFile) as caught:
        open_gguf(folder / PARTS[0])
    assert str(caught.value) == (
        f"{PARTS[0]}: it is part 1 of 3 of a split file, and {missing} is missing. Put all parts into one folder."
    )


def test_a_part_under_another_name(folder):
    (folder / PARTS[1]).rename(folder / "second.gguf")
    with pytest.raises(BadFile) as caught:
        open_gguf(folder / "second.gguf")
    assert str(caught.value) == (
        "second.gguf: it is part 2 of 3 of a split file, and its name does not say so. "
        "Give it back a name that ends in -00002-of-00003.gguf, and the other parts theirs."
    )


def write_part(path, number, n_parts, names, n_tensors=None):
    metadata = {"general.architecture": (STRING, "flux"), "split.no": (U16, number), "split.count": (U16, n_parts)}
    if n_tensors is not None:
        metadata["split.tensors.count"] = (I32, n_tensors)
    path.write_bytes(build_gguf(metadata, [(name, 0, (8,), bytes(32)) for name in names]))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ((0, 2, ["b"]), "a-00002-of-00002.gguf: it is part 1 of 2, expected part 2 of 2"),
        ((1, 3, ["b"]), "a-00002-of-00002.gguf: it is part 2 of 3, expected part 2 of 2"),
        ((0, 0, ["b"]), "a-00002-of-00002.gguf: it is no part of a split file, expected part 2 of 2"),
        ((1, 2, ["a"]), "a-00002-of-00002.gguf: 1 of its tensors are in a-00001-of-00002.gguf too: a"),
        ((1, 2, ["b", "c"]), "a-00001-of-00002.gguf: its 2 parts hold 3 tensors, expected 2"),
    ],
    ids=["another number", "another count", "no part", "the same tensor", "too many tensors"],
)
def test_parts_of_different_models(tmp_path, second, words):
    write_part(tmp_path / "a-00001-of-00002.gguf", 0, 2, ["a"], n_tensors=2)
    write_part(tmp_path / "a-00002-of-00002.gguf", *second)
    with pytest.raises(BadFile) as caught:
        open_gguf(tmp_path / "a-00001-of-00002.gguf")
    assert str(caught.value) == f"{words}. The parts are not of one model; download them again."


@pytest.mark.parametrize("count", [(STRING, "3"), (F32, 3.0), (9, (U16, [3, 3]))], ids=["text", "float", "array"])
def test_a_count_that_is_no_number_splits_nothing(tmp_path, count):
    path = tmp_path / "a.gguf"
    path.write_bytes(build_gguf({"split.count": count}, [("a", 0, (8,), bytes(32))]))
    assert type(open_gguf(path)) is GGUFFile


@pytest.mark.parametrize("part", [1, 2])
def test_a_text_encoder_in_parts(tmp_path, part):
    layers = [f"enc.blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up")]
    names = [*layers, "enc.blk.0.ffn_down.weight", "token_embd.weight", "enc.blk.0.attn_rel_b.weight"]
    vectors = ["enc.output_norm.weight", "enc.blk.0.attn_norm.weight", "enc.blk.0.ffn_norm.weight"]
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder", split_max_tensors=6)
    for name in (*names, *vectors):
        writer.add_tensor(name, np.zeros((64,) if name in vectors else (64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state, info = load_text_encoder(tmp_path / f"t5-0000{part}-of-00002.gguf")
    assert info.family == "T5 v1.1"
    assert {"shared.weight", "encoder.final_layer_norm.weight"} <= state.keys()
