# SPDX-License-Identifier: Apache-2.0
"""The writer: gguf-py reads what it writes, and a file has its final name only when it is complete."""

import errno
import os
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import archs
from gguf_kit.models.archs import Category
from gguf_kit.quantize import writer as writing
from gguf_kit.quantize.plan import Plan, PlannedTensor, stored_shape
from gguf_kit.quantize.writer import PART, Writer, file_size, leftovers, make_header, merged_metadata

LONG = "a" * 300 + ".weight"
SHAPES = {"plain.weight": (3, 5), LONG: (2, 32), "five": (2, 3, 1, 2, 2), "leading": (1, 6, 4), "bias": (7,), "x": (0,)}


def make_plan():
    tensors = tuple(
        PlannedTensor(name, shape, stored_shape(shape), Category.OTHER, QType.Q8_0 if name == LONG else QType.F32)
        for name, shape in SHAPES.items()
    )
    return Plan(archs.named("wan"), "Q8_0", gguf.LlamaFileType.MOSTLY_Q8_0, tensors)


def write_plan(path, metadata=None, **options):
    plan = make_plan()
    header = make_header(plan, "model", metadata or {})
    with Writer(path, file_size(plan, header), **options) as writer:
        writer.write(header)
        for i, tensor in enumerate(plan.tensors):
            writer.write(torch.full((tensor.n_bytes,), i, dtype=torch.uint8))
            writer.end_tensor()
    return plan


def test_gguf_py_and_our_reader_read_names_shapes_metadata_and_data(tmp_path):
    path = tmp_path / "model.gguf"
    plan = write_plan(path, {"config": '{"a": 1}', "größe": "ü"})
    reader = gguf.GGUFReader(path)
    assert {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors} == {
        t.name: t.stored_shape for t in plan.tensors
    }
    for i, tensor in enumerate(reader.tensors):
        assert set(np.asarray(tensor.data).view(np.uint8).ravel().tolist()) == {i}
    file = GGUFFile(path)
    assert file.metadata["config"] == '{"a": 1}'
    assert file.metadata["größe"] == "ü"
    assert file.metadata["general.architecture"] == "wan"
    assert file.metadata["general.file_type"] == 7
    shapes = {name: file.logical_shape(name) for name in file.tensors}
    assert shapes == {**SHAPES, "x": (1,)}
    assert file.metadata.type_of("comfy.gguf.orig_shape.five") is gguf.GGUFValueType.ARRAY
    assert file.metadata["comfy.gguf.orig_shape.five"].dtype == np.int32
    assert [info.n_bytes for info in file.tensors.values()] == [t.n_bytes for t in plan.tensors]


def test_the_announced_size_is_the_file_s(tmp_path):
    path = tmp_path / "model.gguf"
    plan = write_plan(path)
    assert path.stat().st_size == file_size(plan, make_header(plan, "model", {}))
    assert sum(prod(s) for s in SHAPES.values()) == plan.n_weights


def stop_after(writer, data, error):
    writer.write(data)
    assert [p.suffix for p in writer.path.parent.iterdir()] == [PART]
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_it_stops_half_way(tmp_path, error):
    path = tmp_path / "model.gguf"
    with pytest.raises(error), Writer(path, 100) as writer:
        stop_after(writer, b"GGUF", error)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_size_than_announced_never_gets_its_name(tmp_path):
    with pytest.raises(GGUFError, match="wrote 4 bytes, expected 100"), Writer(tmp_path / "m.gguf", 100) as writer:
        writer.write(b"GGUF")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(GGUFError, match=r"model.gguf: the file exists\. Give --overwrite"):
        write_plan(path)
    assert path.read_bytes() == b"precious"
    write_plan(path, overwrite=True)
    assert path.read_bytes().startswith(b"GGUF")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "model.gguf"
    writer = Writer(path, 4)
    writer.__enter__().write(b"GGUF")
    path.write_bytes(b"precious")
    with pytest.raises(GGUFError, match="the file exists"):
        writer.__exit__(None, None, None)
    assert path.read_bytes() == b"precious"


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(GGUFError, match=r"needs .* MB, and the disk has .* MB left"), Writer(tmp_path / "m", 2**60):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    writer = Writer(tmp_path / "m.gguf", 4).__enter__()  # entered by hand, to put the full disk in
    writer._file.close()
    writer._file = Full()
    with pytest.raises(GGUFError, match=r"m.gguf: the disk is full\. Free some space") as caught:
        writer.write(b"GGUF")
    writer.__exit__(GGUFError, caught.value, None)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_and_a_folder_as_name_too(tmp_path):
    with pytest.raises(GGUFError, match="cannot be written: No such file"), Writer(tmp_path / "no" / "m.gguf", 4):
        pass
    for overwrite in (False, True):
        with pytest.raises(GGUFError, match="this is a folder"), Writer(tmp_path, 4, overwrite=overwrite):
            pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_device_or_pipe_is_never_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(GGUFError, match="pipe: this is a device or pipe"), Writer(path, 4, overwrite=True):
        pass
    assert path.is_fifo()


def test_a_name_as_long_as_a_disk_takes_is_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".gguf")
    write_plan(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    write_plan(tmp_path / "model.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_leftovers_of_killed_runs_are_found_by_name(tmp_path):
    path = tmp_path / "mo[d]el.gguf"
    mine = tmp_path / f"{path.name}.12345678{PART}"
    for other in (mine, tmp_path / f"model.gguf.12345678{PART}", path):
        other.touch()
    assert leftovers(path) == [mine]


def test_metadata_that_would_claim_to_be_ours_is_left_out_aloud():
    kept, warnings = merged_metadata({"config": "{}", "format": "pt", "general.architecture": "llama"})
    assert kept == {"config": "{}"}
    assert "general.architecture" in warnings[0]
    assert merged_metadata({"config": "{}"})[1] == ()


def test_a_name_longer_than_any_reader_takes_is_refused():
    tensor = PlannedTensor("n" * 1025, (1,), (1,), Category.OTHER, QType.F32)
    plan = Plan(archs.named("wan"), "", gguf.LlamaFileType.ALL_F32, (tensor,))
    with pytest.raises(GGUFError, match="is 1025 bytes long, more than 1024"):
        make_header(plan, "model", {})


def test_the_writer_leaves_permissions_to_the_system(tmp_path):
    write_plan(tmp_path / "model.gguf")
    other = Path(tmp_path / "other")
    other.touch()
    assert (tmp_path / "model.gguf").stat().st_mode == other.stat().st_mode


def test_alignment_is_ggufs_default():
    assert writing.DEFAULT_ALIGNMENT == gguf.GGUF_DEFAULT_ALIGNMENT
