# SPDX-License-Identifier: Apache-2.0
"""What a conversion can start from: each container, each layout, and that nothing is read before it is wanted."""

from __future__ import annotations

import gc
import json
import os
import re
import struct
import threading

import numpy as np
import pytest
import torch
from gguf_kit.errors import BadFile, GGUFError
from gguf_kit.quantize.containers import STATE_KEYS
from gguf_kit.quantize.sources import open_source
from source_files import check_same, fail, model, save, save_gguf, save_shards, save_torch, write_raw

# --- safetensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_safetensors_file_gives_its_tensors_in_file_order(tmp_path, dtype):
    tensors = model(dtype=dtype)
    source = open_source(save(tmp_path, tensors, metadata={"format": "pt", "config": "{}"}))
    check_same(source, tensors)
    assert dict(source.metadata) == {"config": "{}"}
    assert (source.title, source.notes) == ("safetensors", ())


def test_file_order_is_the_order_of_the_data(tmp_path):
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in ((1, "a"), (0, "b"))
    }
    source = open_source(write_raw(tmp_path, header, np.array([7, 8], "<f4").tobytes()))
    assert [(name, source.read(name).item()) for name in source.tensors] == [("b", 7), ("a", 8)]


def test_plain_tensors_are_views_of_the_mapped_file(tmp_path):
    source = open_source(save(tmp_path, model()))
    assert source.read("blocks.0.w").data_ptr() == source.read("blocks.0.w").data_ptr()


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path):
    path = save(tmp_path, model())
    before = path.read_bytes()
    if os.name != "nt":  # there the map is read-only
        open_source(path).read("blocks.0.w").zero_()
    assert path.read_bytes() == before


def test_data_that_is_not_aligned_is_read_right(tmp_path):
    header = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    values = np.array([1.5, -2, 3], "<f4")
    for n_spaces in range(4):
        raw = json.dumps(header).encode() + b" " * n_spaces
        source = open_source(write_raw(tmp_path, raw, values.tobytes(), pad=False))
        assert source.read("w").tolist() == values.tolist()
        assert source.read("w").data_ptr() % 4 == 0


def test_markers_scalars_and_integers_are_passed_on(tmp_path):
    tensors = model() | {
        "__x0__": torch.empty(0),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "steps": torch.tensor([1, -1]),
        "flag": torch.tensor([True]),
    }
    source = open_source(save(tmp_path, tensors))
    assert source.tensors["__x0__"].shape == (0,)
    for name in tensors:
        assert torch.equal(source.read(name), tensors[name])
        assert source.read(name).shape == source.tensors[name].shape


def test_float64_is_read_as_float32(tmp_path):
    source = open_source(save(tmp_path, {"w": torch.tensor([1 / 3], dtype=torch.float64)}))
    assert source.tensors["w"].dtype == torch.float32
    assert torch.equal(source.read("w"), torch.tensor([1 / 3]))


def test_a_float64_that_float32_cannot_hold_is_refused_with_its_name(tmp_path):
    source = open_source(save(tmp_path, {"w": torch.tensor([1e300], dtype=torch.float64)}))
    with pytest.raises(BadFile, match="tensor 'w' has float64 values that float32 cannot hold"):
        source.read("w")


def resident_bytes():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_file_larger_than_memory_opens_and_is_not_read(tmp_path):
    n_rows, n_tensors = 2**20, 64  # 4 GB each, 256 GB in all; the file is sparse
    header = {
        f"blocks.{i}.w": {"dtype": "F16", "shape": [n_rows, 2048], "data_offsets": [i << 32, (i + 1) << 32]}
        for i in range(n_tensors)
    }
    path = write_raw(tmp_path, header)
    os.truncate(path, path.stat().st_size + (n_tensors << 32))
    open_source(save(tmp_path, model(), "small.safetensors"))
    before = resident_bytes()
    source = open_source(path)
    views = [source.read(name) for name in source.tensors]
    assert views[-1][-1, -1] == 0
    assert resident_bytes() - before < 2**25


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch", "GGUF", "refused", "damaged"])
def test_nothing_stays_open_when_the_source_and_its_tensors_are_gone(tmp_path, kind):
    path = {
        "safetensors": lambda: save(tmp_path, model()),
        "shards": lambda: save_shards(tmp_path),
        "torch": lambda: save_torch(tmp_path, model()),
        "GGUF": lambda: save_gguf(tmp_path),
        "refused": lambda: save(tmp_path, {"decoder.conv_in.weight": torch.ones(1)}),
        "damaged": lambda: write_raw(tmp_path, b"{no json"),
    }[kind]()
    gc.collect()  # what earlier tests left behind
    n_before = len(os.listdir("/proc/self/fd"))
    try:
        source = open_source(path)
        tensor = source.read("blocks.0.w")
        del source
        assert tensor.float().abs().sum() > 0
        del tensor
    except GGUFError:
        assert kind in ("refused", "damaged")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == n_before
    assert str(tmp_path) not in open("/proc/self/maps").read()


def test_one_thread_reads_while_another_uses_what_it_read_before(tmp_path):
    tensors = {f"w{i}": torch.full((64, 64), float(i)) for i in range(50)}
    source = open_source(save(tmp_path, tensors))
    wrong = []

    def use(name, tensor):
        if not torch.equal(tensor * 1, tensors[name]):
            wrong.append(name)

    threads = [threading.Thread(target=use, args=(name, source.read(name))) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- files that are something else, or damaged


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html>" + b" " * 20, "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x1f\x8b\x08 gzip", "gzip"),
        (b"abcdefghijklmnop", "no known model file"),
        (b"PK\x03\x04" + b"x" * 60, "PyTorch"),
        (b"\x80\x02garbage", "PyTorch"),
        (b"\x80\x02.", "PyTorch"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path, data, said, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(data)
    assert said in fail(path, BadFile)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    raw = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = write_raw(tmp_path, raw.ljust(0x280), np.array([3], "<f4").tobytes(), pad=False)
    assert path.read_bytes().startswith(b"\x80\x02")
    assert open_source(path).read("w").item() == 3


def entry(dtype, shape, start, end):
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'.encode()


@pytest.mark.parametrize(
    "header",
    [
        b"{no json",
        b"{}" * 9,
        b'{"w": 1}',
        b"{" + b'"a":{' * 5000,
        b'{"w": ' + entry("F32", "[4]", 0, 8) + b"}",
        b'{"w": ' + entry("F32", "[-4]", 0, 16) + b"}",
        b'{"w": ' + entry("XX", "[4]", 0, 16) + b"}",
        b'{"w": ' + entry("F32", "[2]", 8, 16) + b"}",
        b'{"a": ' + entry("F32", "[4]", 0, 16) + b', "b": ' + entry("F32", "[2]", 4, 12) + b"}",
        b'{"w": ' + entry("F32", "[9223372036854775807, 4]", 0, 16) + b"}",
        b'{"e": ' + entry("F32", "[0, 4611686018427387904, 4]", 0, 0) + b', "w": ' + entry("F32", "[4]", 0, 16) + b"}",
        b'{"w": ' + entry("F32", "[4]", 0, 16) + b', "__metadata__": {"a": 1}}',
        b'{"\xff": ' + entry("F32", "[4]", 0, 16) + b"}",
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header):
    assert re.search("header is not sound|no tensor can have", fail(write_raw(tmp_path, header, bytes(16)), BadFile))


def test_a_header_length_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"w": 1}')
    assert "header is not sound" in fail(path, BadFile)


def test_a_truncated_download_says_how_much_is_missing(tmp_path):
    path = save(tmp_path, model())
    os.truncate(path, path.stat().st_size - 10)
    assert "10 bytes short" in fail(path, BadFile)
    os.truncate(path, 100)
    assert re.search(r"[1-9]\d* bytes short", fail(path, BadFile))


def test_a_missing_file_a_device_and_an_empty_model_are_refused(tmp_path):
    assert "no such file" in fail(tmp_path / "nothing.safetensors", BadFile)
    assert "no tensors" in fail(write_raw(tmp_path, {}), BadFile)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a file" in fail(tmp_path / "pipe", BadFile)


# --- folders and shards


def test_shards_are_one_model_by_their_index_or_their_folder(tmp_path):
    tensors = model()
    index = save_shards(tmp_path, tensors)
    for path in (index, tmp_path):
        source = open_source(path)
        assert set(source.tensors) == set(tensors)
        assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)
        assert source.title == "safetensors in 3 files"
        assert dict(source.metadata) == {"config": "{}"}


def test_an_index_of_one_file_is_that_file(tmp_path):
    source = open_source(save_shards(tmp_path, n_shards=1))
    check_same(source, model())
    assert source.title == "safetensors"


def test_a_missing_shard_is_named(tmp_path):
    index = save_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = fail(index, BadFile)
    assert "1 of the 3" in message
    assert "model-00002-of-00003.safetensors" in message


def test_a_key_that_its_shard_lacks_is_named(tmp_path):
    index = save_shards(tmp_path, change=lambda m: m.update(lost="model-00001-of-00003.safetensors"))
    assert "lost" in fail(index, BadFile)


def test_a_key_in_two_shards_is_named(tmp_path):
    index = save_shards(tmp_path)
    save(tmp_path, model(), "model-00002-of-00003.safetensors")
    assert re.search(r"both in \S+ and in \S+: blocks", fail(index, BadFile))


def test_a_single_shard_asks_for_its_folder(tmp_path):
    save_shards(tmp_path)
    assert "one of 3 parts" in fail(tmp_path / "model-00001-of-00003.safetensors", BadFile)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "C:x.safetensors", ".."])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    index = save_shards(tmp_path, change=lambda m: m.update(x=name))
    assert "outside its folder" in fail(index, BadFile)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 9999]
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert "index" in fail(index, BadFile)


def test_a_missing_index_is_a_missing_file(tmp_path):
    assert "no such file" in fail(tmp_path / "model.safetensors.index.json", BadFile)


def test_a_folder_with_one_model_is_that_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_torch(tmp_path, model(), "diffusion_pytorch_model.bin")
    check_same(open_source(tmp_path), model())
    save(tmp_path, model(1))
    check_same(open_source(tmp_path), model(1))  # safetensors before anything else
    save(tmp_path, model(), "second.safetensors")
    message = fail(tmp_path, BadFile)
    assert "model.safetensors, second.safetensors" in message


def test_a_folder_without_a_model_says_so(tmp_path):
    assert "no model in this folder" in fail(tmp_path, BadFile)


@pytest.mark.parametrize("inner", ["transformer", "unet"])
def test_of_a_diffusers_folder_the_diffusion_model_is_taken(tmp_path, inner):
    (tmp_path / "model_index.json").write_text("{}")
    assert "no transformer" in fail(tmp_path, BadFile)
    save_shards(tmp_path / "text_encoder")
    (tmp_path / inner).mkdir()
    index = save_shards(tmp_path / inner, model(3))
    source = open_source(tmp_path)
    assert torch.equal(source.read("blocks.0.w"), open_source(index).read("blocks.0.w"))
    assert source.notes == (f"the diffusion model was taken from the folder {inner}",)
    (tmp_path / f"{inner}_2").mkdir()
    assert f"{inner}_2" in open_source(tmp_path).notes[0]


# --- PyTorch files


@pytest.mark.parametrize("wrap", [None, *STATE_KEYS, "anything"])
def test_the_state_dict_of_a_checkpoint_is_found(tmp_path, wrap):
    saved = {wrap: model(), "epoch": 3} if wrap else model() | {"epoch": 3}
    source = open_source(save_torch(tmp_path, saved))
    check_same(source, model())
    assert source.title == "PyTorch checkpoint"


def test_of_several_state_dicts_one_is_taken_and_the_others_are_mentioned(tmp_path):
    source = open_source(save_torch(tmp_path, {"ema": model(1), "model": model(2), "optimizer": {"state": {}}}))
    check_same(source, model(2))
    assert "'model' were taken; 1 other" in source.notes[0]


def test_a_checkpoint_is_mapped_not_read(tmp_path):
    path = save_torch(tmp_path, {"w": torch.ones(1000)})
    tensor = open_source(path).read("w")
    assert str(path) in open("/proc/self/maps").read()
    assert torch.equal(tensor, torch.ones(1000))


def test_tied_and_transposed_weights_are_read_as_they_look(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    source = open_source(save_torch(tmp_path, {"a": shared, "b": shared, "t": shared.t(), "row": shared[1]}))
    assert torch.equal(source.read("b"), shared)
    assert source.read("t").is_contiguous()
    assert torch.equal(source.read("t"), shared.t())
    assert torch.equal(source.read("row"), shared[1])


def test_parameters_and_other_entries_do_not_disturb(tmp_path):
    saved = {"w": torch.nn.Parameter(torch.ones(2)), 3: torch.ones(1), "text": "x", "none": None}
    source = open_source(save_torch(tmp_path, saved))
    assert list(source.tensors) == ["w"]
    assert not source.read("w").requires_grad


def test_the_older_format_is_read_with_a_note(tmp_path):
    source = open_source(save_torch(tmp_path, model(), "old.pt", _use_new_zipfile_serialization=False))
    check_same(source, model())
    assert "older format" in source.notes[0]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_never_runs_code(tmp_path, new_format):
    path = save_torch(tmp_path, {"w": Evil(tmp_path / "ran")}, _use_new_zipfile_serialization=new_format)
    assert "could run code" in fail(path, BadFile)
    assert not (tmp_path / "ran").exists()


def nested(depth):
    return {"model": nested(depth - 1)} if depth else model()


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ([torch.ones(1)], "without any weights"),
        ({"epoch": 3}, "without any weights"),
        ({"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1}]}, "optimizer"),
        ({"w": torch.ones(1).expand(2**40)}, "not stored as plain numbers"),
        ({"w": torch.eye(2).to_sparse()}, "not stored as plain numbers"),
        (nested(30), "without any weights"),
    ],
)
def test_a_checkpoint_without_a_model_is_refused(tmp_path, saved, said):
    assert said in fail(save_torch(tmp_path, saved), BadFile)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path):
    saved = {"w": torch.ones(1)}
    saved["model"] = saved
    assert "without any weights" in fail(save_torch(tmp_path, saved), BadFile)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = save_torch(tmp_path, {"w": torch.ones(1000)})
    os.truncate(path, path.stat().st_size // 2)
    assert "cannot be read as a PyTorch file" in fail(path, BadFile)


def test_content_counts_not_the_suffix(tmp_path):
    check_same(open_source(save_torch(tmp_path, model(), "model.gguf")), model())
    check_same(open_source(save(tmp_path, model(), "model.ckpt")), model())
    assert "Rename it" in fail(save_torch(tmp_path, model(), "model.safetensors"), BadFile)
