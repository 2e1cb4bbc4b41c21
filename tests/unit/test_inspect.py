# SPDX-License-Identifier: Apache-2.0
"""tools/inspect_gguf.py lists a file as it is, in text and in JSON, and says in one line why it cannot."""

import io
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import gguf_builder as build
import inspect_gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import Metadata
from inspect_files import floats, run_inspect, write_model

HOSTILE = "a\nb\x1b[31m\u202ec"


@pytest.fixture
def run(capsys):
    return partial(run_inspect, capsys)


@pytest.fixture
def write(tmp_path):
    return partial(write_model, tmp_path)


def test_listing_agrees_with_gguf_py(run, tiny_flux):
    path = tiny_flux("Q4_K_S")
    listed = run(path, "--json").document
    reader = gguf.GGUFReader(path)
    assert [
        (t["name"], t["stored_shape"], t["qtype"], t["bytes"], t["weights"], t["offset"]) for t in listed["tensors"]
    ] == [
        (t.name, t.shape.tolist()[::-1], t.tensor_type.name, t.n_bytes, t.n_elements, t.data_offset)
        for t in reader.tensors
    ]
    fields = [(key, field) for key, field in reader.fields.items() if not key.startswith("GGUF.")]
    assert [(m["key"], m["type"], m["value"]) for m in listed["metadata"]] == [
        (key, field.types[0].name, field.contents()) for key, field in fields
    ]
    assert listed["alignment"] == reader.alignment
    assert listed["file_bytes"] == path.stat().st_size


def test_text_says_what_the_file_is(run, tiny_flux):
    lines = run(tiny_flux("Q4_K_S")).out.splitlines()
    assert lines[0].endswith("tiny-flux-Q4_K_S.gguf")
    assert "model    Flux.1 schnell (tagged 'flux')" in lines
    assert "weights  9,074,752 in 96 tensors, 5.092 bits per weight" in lines
    start = lines.index("Q4_K        32  8,650,752  4,866,048   4.500  84.3 %")
    assert [line.split()[0] for line in lines[start : start + 3]] == ["Q4_K", "BF16", "F32"]
    assert sum(line.startswith(("Q4_K ", "BF16 ", "F32 ")) for line in lines) == 96 + 3


def test_model_is_recognised_by_content_under_a_checkpoints_prefix(run, write):
    keys = ["double_blocks.0.img_attn.proj.weight", "vector_in.in_layer.weight", "img_in.weight", *"abc"]
    path = write({f"model.diffusion_model.{key}": floats(np.zeros((2, 64))) for key in keys})
    assert run(path, "--json").document["model"] == "Flux.1 schnell"


def test_unknown_model_without_tag_is_listed(run, write):
    text = run(write({"x": floats([1.0])})).out
    assert "model    not recognised (no architecture tag)" in text


def test_file_without_tensors_or_metadata_is_listed(run, write):
    assert "weights  0 in 0 tensors, 0.000 bits per weight" in run(write({})).out


def test_original_shape_is_shown_beside_the_stored_one(run, write):
    key = "comfy.gguf.orig_shape.conv.weight"
    metadata = {key: (build.ARRAY, (build.I32, [4, 2, 1, 1])), "general.name": (build.STRING, "x")}
    path = write({"conv.weight": floats(np.zeros((4, 2))), "b": floats(np.zeros(()))}, metadata)
    text = run(path).out
    assert "4x2x1x1 (stored 4x2)" in text
    assert "scalar" in text
    assert key not in text
    assert "and 1 x comfy.gguf.orig_shape.*" in text
    row = run(path, "--json").document["tensors"][0]
    assert (row["shape"], row["stored_shape"]) == ([4, 2, 1, 1], [4, 2])


def test_long_arrays_are_counted_but_not_decoded(run, write, monkeypatch):
    metadata = {
        "tokens": (build.ARRAY, (build.STRING, [f"t{i}" for i in range(1234)])),
        "short": (build.ARRAY, (build.I32, [1, 2])),
    }
    path = write({}, metadata)
    decoded = []
    original = Metadata.__getitem__
    monkeypatch.setattr(Metadata, "__getitem__", lambda self, key: decoded.append(key) or original(self, key))
    text = run(path).out
    assert "array of 1,234 items" in text
    assert "[1, 2]" in text
    assert "tokens" not in decoded
    assert [m["value"] for m in run(path, "--json").document["metadata"]] == [None, [1, 2]]


def test_metadata_option_shows_every_value_in_full(run, write):
    tokens = [f"t{i}" for i in range(1234)]
    metadata = {"tokens": (build.ARRAY, (build.STRING, tokens)), "text": (build.STRING, "x" * 500 + HOSTILE)}
    path = write({"a": floats([1.0])}, metadata)
    result = run(path, "--metadata")
    assert len(result.out.splitlines()) == 2
    assert "'t1233'" in result.out
    assert "x" * 500 in result.out
    document = run(path, "--metadata", "--json").document
    assert [m["value"] for m in document["metadata"]] == [tokens, "x" * 500 + HOSTILE]
    assert "tensors" not in document


def test_no_tensors_leaves_out_the_table(run, tiny_flux):
    assert "single_blocks" not in run(tiny_flux("BF16"), "--no-tensors").out
    assert "tensors" not in run(tiny_flux("BF16"), "--no-tensors", "--json").document


def test_text_from_a_file_cannot_break_lines_or_drive_the_terminal(run, write):
    metadata = {
        "general.architecture": (build.STRING, HOSTILE),
        f"key{HOSTILE}": (build.STRING, HOSTILE),
        "list": (build.ARRAY, (build.STRING, [HOSTILE])),
    }
    path = write({f"bad{HOSTILE}": floats([math.nan]), f"q{HOSTILE}": (QType.Q8_1, (32,), bytes(40))}, metadata)
    other = write({f"bad{HOSTILE}": floats([1.0])}, name=f"o{HOSTILE}.gguf")
    for arguments in ((path,), (path, "--metadata"), (path, "--check"), (path, "--diff", other), (other,)):
        text = run(*arguments).out
        assert not [c for c in text.replace("\n", "") if not c.isprintable()]
        assert not [line for line in text.splitlines() if line.startswith(("b?", "b\x1b"))]


def test_long_names_are_listed_in_full_in_json_only(run, write):
    name = "n" * 500
    path = write({name: floats([1.0])})
    assert name not in run(path).out
    assert run(path, "--json").document["tensors"][0]["name"] == name


def test_characters_that_the_output_lacks_are_escaped(write, monkeypatch):
    path = write({"\u6743\u91cd": floats([1.0])})
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert inspect_gguf.main([str(path)]) == 0
    assert b"\\u6743\\u91cd" in raw.getvalue()


def test_json_fields_stay_as_documented(run, write):
    path = write({"a": floats([1.0, math.nan])}, {"k": (build.F32, math.inf)})
    other = write({"a": floats([1.0, 2.0])}, name="other.gguf")
    summary = "file files file_bytes version alignment arch model weights tensor_bytes bpw qtypes"
    document = run(path, "--check", "--json").document
    assert list(document) == ["schema", *summary.split(), "metadata", "tensors", "check"]
    assert document["schema"] == 1
    assert document["metadata"] == [{"key": "k", "type": "FLOAT32", "items": 1, "value": "inf"}]
    assert list(document["qtypes"][0]) == "qtype tensors weights bytes bpw".split()
    assert list(document["tensors"][0]) == "name qtype shape stored_shape bytes weights offset".split()
    assert list(document["check"]) == "tensors bytes unchecked problems".split()
    assert list(document["check"]["problems"][0]) == "name qtype part nan inf numbers first_block".split()
    document = run(path, "--diff", other, "--json").document
    assert list(document) == ["schema", "a", "b", "diff"]
    assert list(document["a"]) == list(document["b"]) == summary.split()
    assert list(document["diff"]) == "equal relative_error max_error metadata tensors".split()
    assert list(document["diff"]["tensors"][0]) == "name status relative_error max_error a b".split()
    assert list(document["diff"]["tensors"][0]["a"]) == "qtype shape stored_shape bytes".split()
    assert document["diff"]["relative_error"] == "nan"
    for field in f"{summary} metadata tensors check unchecked problems first_block relative_error max_error".split():
        assert field in inspect_gguf.EPILOG


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "bytes short"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "a PyTorch checkpoint"),
        (lambda path: path.write_bytes(b"hello"), "instead of b'GGUF'"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "a folder"),
        (lambda path: path.write_bytes(build.assemble([], [build.entry("w", [32], 999)], bytes(99))), "type id 999"),
    ],
    ids=["truncated", "checkpoint", "no-gguf", "empty", "missing", "folder", "unknown-type"],
)
def test_broken_file_is_one_line_on_stderr(run, write, spoil, reason):
    sound = write({"w": floats(np.zeros(64))}, name="sound.gguf")
    path = write({"w": floats(np.zeros(64))}, name="broken.gguf")
    spoil(path)
    for arguments in ((path,), (path, "--check"), (path, "--json"), (sound, "--diff", path)):
        result = run(*arguments)
        assert (result.status, result.out) == (2, "")
        assert len(result.err.splitlines()) == 1
        assert result.err.startswith("broken.gguf: ")
        assert reason in result.err


@pytest.mark.parametrize("arguments", [[], ["x", "--check", "--metadata"], ["x", "--worst", "-1"], ["x", "--colour"]])
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        inspect_gguf.main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("n_tensors", [1, 4000], ids=["before-the-output", "within-the-output"])
def test_a_reader_that_leaves_early_is_no_error(write, n_tensors):
    path = write({f"tensor-{i}-{'x' * 80}": floats([1.0]) for i in range(n_tensors)})
    command = [sys.executable, inspect_gguf.__file__, str(path)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        if n_tensors > 1:
            assert process.stdout.readline().startswith(b"file ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
