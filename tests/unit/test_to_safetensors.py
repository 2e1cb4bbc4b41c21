# SPDX-License-Identifier: Apache-2.0
"""GGUF to safetensors: values against gguf-py, shapes, types and names, refusals, and what an interruption leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import encoder_files
import gguf
import gguf_builder
import numpy as np
import pytest
import quant_data
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import ORIG_SHAPE_KEY
from gguf_kit.layouts import LAYOUTS
from gguf_kit.loader import load_text_encoder
from gguf_kit.models.values import QuantizedBytes, floats
from gguf_kit.quantize import to_safetensors as library
from gguf_kit.quantize.to_safetensors import FLOAT_TYPES, write_safetensors
from gguf_kit.tools import convert, to_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "to_safetensors.py")]
STRING, ARRAY, INT32 = 8, 9, 5


def run(*arguments):
    """Exit code of the tool."""
    return to_safetensors.main([*map(str, arguments)])


def write_file(path, tensors, strings=None, arrays=None):
    """A GGUF file of (name, qtype, shape, bytes)."""
    metadata = {"general.architecture": (STRING, "flux")}
    metadata |= {key: (STRING, text) for key, text in (strings or {}).items()}
    metadata |= {key: (ARRAY, (INT32, numbers)) for key, numbers in (arrays or {}).items()}
    path.write_bytes(gguf_builder.build_gguf(metadata, tensors))
    return path


@pytest.mark.parametrize("name", FLOAT_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.qtype.name)
def test_every_qtype_is_what_gguf_py_dequantizes_rounded_once(tmp_path, monkeypatch, layout, name):
    """Also where a tensor is written in several pieces."""
    monkeypatch.setattr(library, "PIECE_WEIGHTS", 3 * layout.block_size)
    blocks = quant_data.random_blocks(layout, 300)
    fits = np.abs(quant_data.dequantize_by_gguf(blocks, layout.qtype)).max(axis=1) < torch.finfo(torch.float16).max
    blocks, shape = blocks[fits][:14], (7, 2 * layout.block_size)
    src = write_file(tmp_path / "m.gguf", [("x.weight", layout.qtype, shape, blocks.tobytes())])
    exact = torch.from_numpy(np.array(quant_data.dequantize_by_gguf(blocks, layout.qtype))).reshape(shape)
    expected = exact.to(FLOAT_TYPES[name])
    assert run("--src", src, "--dtype", name) == 0
    found = load_file(tmp_path / f"m-{name}.safetensors")["x.weight"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_shapes_names_types_and_metadata(tmp_path):
    """A reshaped kernel, a vector, a scalar, integers and an empty tensor, in an order that would not be aligned."""
    kernel = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.float16).reshape(2, 3, 4, 5, 6)
    tensors = [
        ("bytes", QType.I8, (3,), bytes([1, 2, 255])),
        ("model.diffusion_model.patch.weight", QType.F16, (2, 360), kernel.numpy().tobytes()),
        ("ids", QType.I64, (2,), np.array([5, -7], dtype="<i8").tobytes()),
        ("norm.scale", QType.F32, (2,), np.array([1.5, 1 + 2**-20], dtype="<f4").tobytes()),
        ("one", QType.F32, (), np.array([0.25], dtype="<f4").tobytes()),
    ]
    shapes = {ORIG_SHAPE_KEY + "model.diffusion_model.patch.weight": [2, 3, 4, 5, 6]}
    strings = {"config": '{"a": "\u00e4"}', "general.name": "not carried"}
    src = write_file(tmp_path / "m.gguf", tensors, strings, shapes)
    assert run("--src", src, "--dst", tmp_path / "out.safetensors") == 0
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {name for name, *_ in tensors}
    assert torch.equal(found["model.diffusion_model.patch.weight"], kernel.bfloat16())
    assert found["ids"].tolist() == [5, -7]
    assert found["bytes"].tolist() == [1, 2, -1]
    assert found["norm.scale"].tolist() == [1.5, 1.0]
    assert found["one"].shape == ()
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"config": '{"a": "\u00e4"}', "format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    state = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(5, dtype=torch.int64),
        "c": torch.ones(1, 3),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "m.safetensors"
    write_safetensors(state, path, dtype=torch.float16)
    raw = path.read_bytes()
    n_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_bytes])
    sizes = {"U8": 1, "I64": 8, "F16": 2}
    assert all(
        (8 + n_bytes + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
        for key, entry in header.items()
        if key != "__metadata__"
    )
    assert load_file(path)["empty"].shape == (0, 4)


def test_a_whole_model_survives_the_way_there_and_back(tmp_path, tiny_flux):
    """safetensors to GGUF in its own precision, and back: the same tensors."""
    state = {"blocks.0.conv.weight": torch.randn(256, 3, 1, 2, 2).bfloat16(), "blocks.0.b.bias": torch.randn(7)}
    state["blocks.0.b.bias"] = state["blocks.0.b.bias"].bfloat16()
    save_file(state, tmp_path / "m.safetensors")
    assert convert.main(["--src", str(tmp_path / "m.safetensors"), "--dst", str(tmp_path / "m.gguf")]) == 0
    assert run("--src", tmp_path / "m.gguf") == 0
    found = load_file(tmp_path / "m-BF16.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    expected = {t.name: t for t in gguf.GGUFReader(tiny_flux("Q4_K_S")).tensors}
    assert run("--src", tiny_flux("Q4_K_S"), "--dst", tmp_path, "--dtype", "F32") == 0
    for name, tensor in load_file(tmp_path / "tiny-flux-Q4_K_S-F32.safetensors").items():
        exact = gguf.quants.dequantize(expected[name].data, expected[name].tensor_type)
        assert np.array_equal(tensor.numpy(), exact.reshape(tensor.shape)), name
    assert len(expected) == len(load_file(tmp_path / "tiny-flux-Q4_K_S-F32.safetensors"))


def test_a_text_encoder_with_native_names_keeps_its_tokenizer_as_bytes(tmp_path):
    src = encoder_files.save(tmp_path / "e.safetensors", encoder_files.small_encoder("te-umt5xxl"))
    assert convert.main(["--src", str(src), "--dst", str(tmp_path / "e.gguf")]) == 0
    assert run("--src", tmp_path / "e.gguf", "--dtype", "F16") == 0
    found, expected = load_file(tmp_path / "e-F16.safetensors"), load_file(src)
    assert found["spiece_model"].dtype == torch.uint8
    assert torch.equal(found["spiece_model"], expected["spiece_model"])
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in expected.items()}


def test_too_large_for_float16_is_refused_and_leaves_nothing(tmp_path, capsys):
    content = np.array([[1.0, 70000.0]], dtype="<f4").tobytes()
    src = write_file(tmp_path / "m.gguf", [("x.weight", QType.F32, (1, 2), content)])
    assert run("--src", src, "--dtype", "F16") == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert "'x.weight' has weights up to 7e+04, which F16 cannot hold" in message[0]
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_an_existing_file_is_replaced_only_when_asked(tmp_path, tiny_flux, capsys):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"mine")
    assert run("--src", tiny_flux("Q2_K"), "--dst", path) == 2
    assert "Give --overwrite to replace it." in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert run("--src", tiny_flux("Q2_K"), "--dst", path, "--overwrite") == 0
    assert len(load_file(path)) > 90


@pytest.mark.parametrize("name", ["same", "link", "folder", "part", "later part", "vision"])
def test_a_source_is_never_written_over(tmp_path, capsys, name):
    """By whatever name it is called, and whichever part of it it is."""
    tensor = ("x.weight", QType.F32, (1,), bytes(4))
    src = dst = write_file(tmp_path / "m.gguf", [tensor])
    options = []
    if name == "link":
        dst = tmp_path / "link.safetensors"
        dst.symlink_to(src)
    if name == "folder":
        (tmp_path / "folder").mkdir()
        dst = tmp_path / "folder" / ".." / "m.gguf"
    if "part" in name:
        parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
        for i, part in enumerate(parts):
            tensors = [(f"x{i}.weight", *tensor[1:])]
            part.write_bytes(gguf_builder.build_gguf({"split.count": (2, 2), "split.no": (2, i)}, tensors))
        src, dst = parts[0], parts[name == "later part"]
    if name == "vision":
        dst = tmp_path / "mmproj.gguf"
        dst.write_bytes(b"vision")
        options = ["--vision", dst]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    assert run("--src", src, "--dst", dst, "--overwrite", *options) == 2
    assert "source and destination are the same file. Name another." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.gguf")} == before
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("case", ["no file", "not gguf", "part"])
def test_refusals_are_one_line(tmp_path, capsys, case):
    src = tmp_path / "m.gguf"
    if case == "not gguf":
        src.write_bytes(b"PK\x03\x04" + bytes(100))
    if case == "part":
        src.write_bytes(gguf_builder.build_gguf({"split.count": (2, 3)}, [("x", 0, (1,), bytes(4))]))
    assert run("--src", src) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("to_safetensors: m.gguf: ")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        with self._disk_errors():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library.Writer, "write", full)
    with pytest.raises(GGUFError, match="the disk is full"):
        write_safetensors({"x": torch.zeros(4)}, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_leaves_nothing_under_the_name(tmp_path):
    """SIGTERM cleans up; after SIGKILL only a .part file is there, which the next run names."""
    n_rows = 2**17
    content = np.zeros((n_rows, 34 * 8), dtype=np.uint8).tobytes()  # 67 MB as BF16
    src = write_file(tmp_path / "m.gguf", [("x.weight", QType.Q8_0, (n_rows, 256), content)])
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([*COMMAND, "--src", src], stderr=subprocess.PIPE, text=True)
        while not list(tmp_path.glob("*.part")) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert not (tmp_path / "m-BF16.safetensors").exists()
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number
            assert "stopped; nothing was written" in errors
            assert os.listdir(tmp_path) == ["m.gguf"]
    done = subprocess.run([*COMMAND, "--src", src], capture_output=True, text=True, check=True)
    assert "unfinished files of earlier runs may be deleted" in done.stderr


def test_llama_cpp_names_become_comfyui_keys(tmp_path):
    """The state that CLIPLoader loads from the GGUF file, rounded."""
    src = gguf_encoder(tmp_path / "t5.gguf")
    assert run("--src", src) == 0
    found, (state, _) = load_file(tmp_path / "t5-BF16.safetensors"), load_text_encoder(src)
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in found
    assert set(found) == set(state)
    assert any(isinstance(value, QuantizedBytes) for value in state.values())
    assert all(torch.equal(found[key], floats(value).bfloat16()) for key, value in state.items())


def gguf_encoder(path):
    """One block of a small T5 in llama.cpp's names."""
    generator = np.random.default_rng(0)
    shapes = {"token_embd.weight": (96, 64), "enc.output_norm.weight": (64,), "enc.blk.0.attn_norm.weight": (64,)}
    shapes |= {f"enc.blk.0.attn_{part}.weight": (64, 64) for part in "qkvo"}
    shapes |= {"enc.blk.0.attn_rel_b.weight": (32, 2), "enc.blk.0.ffn_norm.weight": (64,)}
    shapes |= {f"enc.blk.0.ffn_{part}.weight": (64, 64) for part in ("gate", "up", "down")}
    writer = gguf.GGUFWriter(path, "t5encoder")
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        qtype = QType.Q8_0 if len(shape) == 2 and shape[1] % 32 == 0 else QType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
