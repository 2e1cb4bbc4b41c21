# SPDX-License-Identifier: Apache-2.0
"""The converter's command line on small models: bytes against ggml, order of writing, refusals, interruptions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import make_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_diffusion_model
from gguf_kit.quantize.convert import (
    CHUNK_WEIGHTS,
    CHUNKS_PER_THREAD,
    MAX_WEIGHTS_IN_FLIGHT,
    MIN_CHUNK_WEIGHTS,
    chunk_weights,
)
from gguf_kit.quantize.encode import TorchEngine
from gguf_kit.quantize.recipes import RECIPES
from gguf_kit.tools import convert, quantize
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "convert.py")]
WIDTH = 256


def run(*arguments, tool=convert):
    """Exit code of a tool; options that are not under test are set to what is quickest."""
    return tool.main([*map(str, arguments), "--threads", "2"])


def small_model(rows=512, blocks=2, dtype=torch.bfloat16, seed=0):
    """Random weights with the keys of an unrecognised transformer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    state = {"patch_embed.proj.weight": random(WIDTH, 16, 1, 2, 2), "patch_embed.proj.bias": random(WIDTH)}
    for i in range(blocks):
        state |= {
            f"blocks.{i}.attn.to_q.weight": random(rows, WIDTH),
            f"blocks.{i}.attn.to_v.weight": random(rows, WIDTH),
            f"blocks.{i}.ffn.net.2.weight": random(WIDTH, 2 * WIDTH),
            f"blocks.{i}.ffn.net.2.bias": random(WIDTH),
            f"blocks.{i}.modulation": random(1, 6, WIDTH),
        }
    return state | {"final_layer.linear.weight": random(64, WIDTH)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(small_model(), path, metadata={"format": "pt", "config": '{"a": 1}'})
    return path


def stored(path):
    """name -> (qtype, bytes) of a file, read by gguf-py."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type, np.ascontiguousarray(t.data).view(np.uint8).tobytes()) for t in tensors}


def by_ggml(weights, qtype, importance=None):
    """The bytes of ggml's own quantizer, called directly."""
    rows = weights.float().numpy().reshape(-1, weights.shape[-1])
    if qtype in (QType.F32, QType.F16):
        return gguf.quants.quantize(rows, qtype).tobytes()
    return make_files.quantize_with_ggml(rows, qtype, importance).tobytes()


def check_bytes(path, state, importance=None):
    importance = importance or {}
    for name, (qtype, data) in stored(path).items():
        assert data == by_ggml(state[name], qtype, importance.get(name)), (name, qtype)


@pytest.fixture(scope="session")
def flux_part(tmp_path_factory):
    """The first rows of one double and one single block of the tiny Flux, and what is around the blocks."""
    wanted = re.compile(r"(?!(double|single)_blocks\.[1-9])")
    state = {name: t[:48].clone() for name, t in load_file(make_files.MODEL).items() if wanted.match(name)}
    path = tmp_path_factory.mktemp("part") / "flux-part.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="session")
def imatrix(tmp_path_factory):
    """An importance matrix for the tiny Flux, and its values."""
    path = tmp_path_factory.mktemp("imatrix") / "tiny.gguf"
    rng = np.random.default_rng(5)
    writer, values = gguf.GGUFWriter(path, "imatrix"), {}
    for name, tensor in load_file(make_files.MODEL).items():
        if tensor.ndim == 2:
            values[name] = rng.exponential(size=tensor.shape[1]).astype(np.float32)
            writer.add_tensor(f"{name}.in_sum2", values[name].reshape(1, -1) * np.float32(4))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


@pytest.mark.parametrize("type_name", [name for name, recipe in RECIPES.items() if not recipe.needs_imatrix])
@pytest.mark.parametrize("engine", ["ggml", "torch"])
def test_every_tensor_has_ggmls_bytes(tmp_path, flux_part, type_name, engine):
    path = tmp_path / "tiny.gguf"
    assert run("--src", flux_part, "--dst", path, "--type", type_name, "--engine", engine) == 0
    check_bytes(path, load_file(flux_part))
    assert GGUFFile(path).metadata["general.file_type"] == RECIPES[type_name].file_type


@pytest.mark.parametrize("type_name", RECIPES)
def test_with_an_importance_matrix_too(tmp_path, flux_part, imatrix, type_name):
    path = tmp_path / "tiny.gguf"
    options = "--type", type_name, "--engine", "ggml", "--imatrix", imatrix[0]
    assert run("--src", flux_part, "--dst", path, *options) == 0
    check_bytes(path, load_file(flux_part), imatrix[1])
    assert GGUFFile(path).metadata["quantize.imatrix.file"] == "tiny.gguf"


@pytest.mark.parametrize("type_name", [name for name, recipe in RECIPES.items() if not recipe.needs_imatrix])
def test_both_engines_write_the_same_file(tmp_path, flux_part, imatrix, type_name):
    for engine in ("ggml", "torch"):
        options = "--type", type_name, "--imatrix", imatrix[0], "--engine", engine
        assert run("--src", flux_part, "--dst", tmp_path / f"{engine}.gguf", *options) == 0
    assert (tmp_path / "ggml.gguf").read_bytes() == (tmp_path / "torch.gguf").read_bytes()


def test_the_torch_engine_says_which_types_it_cannot_make(tmp_path, flux_part, imatrix, capsys):
    options = "--type", "IQ3_S", "--imatrix", imatrix[0], "--engine", "torch"
    assert run("--src", flux_part, "--dst", tmp_path / "a.gguf", *options) == 2
    assert "the torch engine cannot make IQ3_S. Use --engine ggml" in capsys.readouterr().err


def test_an_importance_matrix_of_another_model_is_refused_before_writing(tmp_path, source, capsys):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_tensor("blocks.0.attn.to_q.weight.in_sum2", np.ones((1, 2 * WIDTH), np.float32))
    writer.add_tensor("blocks.0.attn.to_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run("--src", source, "--type", "Q4_K_S", "--imatrix", path) == 2
    assert "has 512 columns, expected 256" in capsys.readouterr().err
    options = "--tensor-type", "to_v=IQ2_XS", "--tensor-type", "0.attn.to_q=F16", "--imatrix", path
    assert run("--src", source, "--type", "Q4_K_S", *options) == 2
    assert "2 tensors are to have a type that needs importance" in capsys.readouterr().err


WITHOUT_IMATRIX = ["BF16", *(name for name, recipe in RECIPES.items() if not recipe.needs_imatrix)]


@pytest.mark.parametrize("type_name", [name for name in make_files.TYPES if name in WITHOUT_IMATRIX])
def test_the_tiny_flux_agrees_with_files_made_by_ggml_alone(tmp_path, tiny_flux, type_name):
    path = tmp_path / "tiny.gguf"
    assert run("--src", make_files.MODEL, "--dst", path, "--type", type_name) == 0
    assert stored(path) == stored(tiny_flux(type_name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_a_type_nothing_is_lost(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    state = small_model(dtype=dtype)
    save_file(state, path)
    assert run("--src", path) == 0
    label = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    loaded, info = load_diffusion_model(tmp_path / f"model-{label}.gguf")
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].shape == tensor.shape
        is_layer = tensor.ndim > 1 and name.endswith(".weight")
        assert loaded[name].dtype == (
            dtype if is_layer or (tensor.ndim > 1 and dtype is torch.float16) else torch.float32
        )
        assert torch.equal(loaded[name].to(dtype), tensor)
    assert info.qtypes[label] >= 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_a_marker_of_any_type_is_one_zero(tmp_path, dtype):
    save_file({"__x0__": torch.empty(0, dtype=dtype), **small_model()}, tmp_path / "model.safetensors")
    assert run("--src", tmp_path / "model.safetensors", "--type", "Q8_0", "--engine", "torch") == 0
    file = GGUFFile(tmp_path / "model-Q8_0.gguf")
    assert file.tensors["__x0__"].shape == (1,)
    assert not file.data("__x0__").any()


def test_names_metadata_markers_and_shapes_come_through(tmp_path):
    state = {"blocks.0." + "n" * 200 + ".weight": torch.ones(8, 256), "__x0__": torch.empty(0), **small_model()}
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"config": '{"transformer": {"a": 1}}'})
    assert run("--src", path, "--type", "Q8_0") == 0
    loaded, info = load_diffusion_model(tmp_path / "model-Q8_0.gguf")
    assert info.metadata == {"config": '{"transformer": {"a": 1}}'}
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {name: tuple(t.shape) for name, t in state.items()}


def test_two_steps_give_the_bytes_of_one(tmp_path, source):
    assert run("--src", source, "--type", "Q4_K_M") == 0
    assert run("--src", source) == 0
    two = tmp_path / "two.gguf"
    assert run("--src", tmp_path / "model-BF16.gguf", "--dst", two, "--type", "Q4_K_M", tool=quantize) == 0
    assert stored(two) == stored(tmp_path / "model-Q4_K_M.gguf")
    assert GGUFFile(two).metadata["config"] == '{"a": 1}'


def test_quantize_names_its_file_after_the_model(tmp_path, source):
    assert run("--src", source) == 0
    assert run("--src", tmp_path / "model-BF16.gguf", "--type", "Q8_0", tool=quantize) == 0
    assert (tmp_path / "model-Q8_0.gguf").is_file()


def test_the_number_of_threads_and_chunks_does_not_change_a_byte(tmp_path, monkeypatch, source):
    assert run("--src", source, "--type", "Q4_K_S") == 0
    monkeypatch.setattr("gguf_kit.quantize.convert.chunk_weights", lambda *_: 3 * WIDTH)
    other = tmp_path / "other.gguf"
    assert convert.main(["--src", str(source), "--dst", str(other), "--type", "Q4_K_S", "--threads", "5"]) == 0
    assert other.read_bytes() == (tmp_path / "model-Q4_K_S.gguf").read_bytes()
    assert CHUNK_WEIGHTS > WIDTH


def test_a_dry_run_of_a_large_model_reads_no_data_and_prints_the_plan(tmp_path, capsys):
    path = sparse_model(tmp_path / "large.safetensors", n_blocks=40, rows=2**18)
    started = time.process_time()
    assert run("--src", path, "--type", "Q4_K_M", "--dry-run", "--json") == 0
    assert time.process_time() - started < 20
    plan = json.loads(capsys.readouterr().out)
    assert {"arch", "file_bytes", "bpw", "tensors"} <= set(plan)
    assert set(plan["tensors"][0]) == {"name", "shape", "category", "qtype", "bytes"}
    assert sum(t["bytes"] for t in plan["tensors"]) < plan["file_bytes"] < path.stat().st_size / 2
    assert list(tmp_path.iterdir()) == [path]


def sparse_model(path, n_blocks, rows):
    """A safetensors file of zeros in BF16 that takes no room on the disk."""
    header, offset = {}, 0
    for i in range(n_blocks):
        n_bytes = rows * WIDTH * 2
        header[f"blocks.{i}.attn.to_q.weight"] = {
            "dtype": "BF16", "shape": [rows, WIDTH], "data_offsets": [offset, offset + n_bytes],
        }  # fmt: skip
        offset += n_bytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path


def test_the_dry_run_announces_the_size_that_is_written(tmp_path, source, capsys):
    run("--src", source, "--type", "Q5_K_M", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert run("--src", source, "--type", "Q5_K_M") == 0
    path = tmp_path / "model-Q5_K_M.gguf"
    assert path.stat().st_size == plan["file_bytes"]
    assert {t["name"]: t["qtype"] for t in plan["tensors"]} == {n: q.name for n, (q, _) in stored(path).items()}


def test_the_plan_is_also_a_table(source, capsys):
    assert run("--src", source, "--type", "Q4_K_S", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "model-Q4_K_S.gguf" in shown
    assert "bits per weight" in shown
    assert "attn_v" in shown


def test_an_exported_recipe_makes_the_same_file_again(tmp_path, source):
    recipe = tmp_path / "mine.recipe"
    options = "--type", "Q3_K_M", "--tensor-type", "ffn=Q6_K"
    assert run("--src", source, *options, "--export-recipe", recipe) == 0
    assert run("--src", source, "--recipe", recipe) == 0
    assert stored(tmp_path / "model-mine.gguf") == stored(tmp_path / "model-Q3_K_M.gguf")
    assert stored(tmp_path / "model-mine.gguf")["blocks.0.ffn.net.2.weight"][0] is QType.Q6_K


@pytest.mark.parametrize("engine", ["ggml", "torch"])
@pytest.mark.parametrize(
    ("value", "type_name", "problem"),
    [
        (3e8, "Q8_0", "weights up to 3e.08, too large for Q8_0"),
        (1e30, "Q4_K_S", "too large for Q4_K"),
        (1e6, "F16", "too large for F16"),
        (float("nan"), "Q4_0", "NaN or infinite"),
        (float("-inf"), "Q6_K", "NaN or infinite"),
    ],
)
def test_weights_that_a_type_cannot_hold_are_refused_with_the_name(tmp_path, capsys, engine, value, type_name, problem):
    state = small_model(dtype=torch.float32)
    state["blocks.1.attn.to_q.weight"][7, 9] = value
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert run("--src", path, "--type", type_name, "--engine", engine) == 2
    error = capsys.readouterr().err
    assert "model.safetensors: tensor 'blocks.1.attn.to_q.weight' has weights" in error
    assert re.search(problem, error)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--type", "Q4_K_S", "--tensor-type", "attn"], "not of the form REGEX=QTYPE"),
        (["--type", "Q4_K_S", "--tensor-type", "(=Q8_0"], "'\\(=Q8_0'"),
        (["--type", "Q4_K_S", "--tensor-type", "attn=Q9"], "'Q9' is no type"),
        (["--arch", "sd99"], "sd99"),
        (["--recipe", "none.recipe"], "none.recipe: the recipe cannot be read"),
        (["--imatrix", "none.dat"], "none.dat: there is no such file"),
        (["--type", "Q4_K"], "--type 'Q4_K' is not known. Types: .*Q4_K_S"),
        (["--type", "Q4_0", "--engine", "torch", "--device", "foo"], "--device foo cannot be used"),
        (["--type", "Q4_0", "--engine", "ggml", "--device", "cpu"], "--device is for the torch engine"),
        (["--dst", "n" * 300], "File name too long"),
        (["--type", "IQ2_XS"], "needs an importance matrix"),
        (["--threads", "0"], "--threads 0"),
        (["--dst", "no/such/model.gguf"], "there is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line_and_exit_code_two(source, capsys, arguments, problem):
    assert convert.main(["--src", str(source), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(problem, error)
    assert error.splitlines()[-1].startswith("convert: ")
    assert "Traceback" not in error
    assert len(list(source.parent.iterdir())) == 1


def test_an_existing_file_is_kept_unless_asked(tmp_path, source, capsys):
    path = tmp_path / "model-Q8_0.gguf"
    path.write_bytes(b"precious")
    assert run("--src", source, "--type", "Q8_0") == 2
    assert "the file exists. Give --overwrite" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert run("--src", source, "--type", "Q8_0", "--overwrite") == 0


def test_a_link_gives_its_own_name_and_folder(tmp_path, source):
    folder = tmp_path / "snapshots"
    folder.mkdir()
    link = folder / "flux1-dev.safetensors"
    link.symlink_to(source)
    assert run("--src", link, "--type", "Q8_0") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["flux1-dev-Q8_0.gguf", "flux1-dev.safetensors"]
    assert GGUFFile(folder / "flux1-dev-Q8_0.gguf").metadata["general.name"] == "flux1-dev"


def test_a_link_as_destination_stays_a_link(tmp_path, source):
    target, link = tmp_path / "elsewhere.gguf", tmp_path / "link.gguf"
    link.symlink_to(target)
    assert run("--src", source, "--dst", link, "--type", "Q8_0") == 0
    assert link.is_symlink()
    assert target.read_bytes()[:4] == b"GGUF"
    assert run("--src", source, "--dst", link, "--type", "Q8_0") == 2


def test_an_importance_matrix_that_fits_nothing_is_refused_even_in_a_dry_run(tmp_path, imatrix, capsys):
    path = tmp_path / "model.safetensors"
    save_file({"layers.0.proj.weight": torch.ones(64, WIDTH)}, path)
    assert run("--src", path, "--type", "Q4_0", "--imatrix", imatrix[0], "--dry-run") == 2
    assert "none of its entries is a tensor of the model" in capsys.readouterr().err


def test_the_plan_may_be_piped_into_a_reader_that_stops(source):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "--src", str(source), "--type", "Q8_0", "--dry-run", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("n_threads", [1, 2, 16, 64])
def test_what_is_in_flight_does_not_grow_with_the_threads(n_threads):
    in_flight = CHUNKS_PER_THREAD * n_threads * chunk_weights(TorchEngine("cpu"), n_threads)
    assert in_flight <= max(MAX_WEIGHTS_IN_FLIGHT, CHUNKS_PER_THREAD * n_threads * MIN_CHUNK_WEIGHTS)


def test_a_source_is_never_its_own_destination(source, capsys):
    assert run("--src", source, "--dst", source, "--overwrite") == 2
    assert "the same file" in capsys.readouterr().err


def start(path, *options):
    """A converter in a process of its own, in its own time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--src", str(path), "--type", "Q4_K_S", "--engine", "torch", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture
def slow_source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(small_model(rows=2**15, blocks=8), path)
    return path


def wait_for(found, process):
    deadline = time.monotonic() + 120
    while not found() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_leaves_nothing_under_the_final_name_and_the_next_says_what_it_left(slow_source):
    folder = slow_source.parent
    for delay in (0.0, 0.3):
        process = start(slow_source)
        before = len(list(folder.glob("*.part")))
        wait_for(lambda before=before: len(list(folder.glob("*.part"))) > before, process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(folder.glob("*.gguf"))
    process = start(slow_source)
    wait_for(lambda: len(list(folder.glob("*.part"))) == 3, process)
    process.send_signal(signal.SIGHUP)
    said = process.communicate()[1].decode()
    assert "unfinished files of earlier runs" in said
    assert "stopped; nothing was written" in said
    assert process.returncode == 128 + signal.SIGHUP, said
    assert len(list(folder.glob("*.part"))) == 2  # its own is gone
    assert not list(folder.glob("*.gguf"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    path = sparse_model(tmp_path / "large.safetensors", n_blocks=6, rows=2**19)  # 1.6 GB, the largest 0.5 in float32
    process = start(path, "--threads", "2", "--type", "Q8_0")
    peak = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    assert peak < 700_000  # kB, of which torch itself has about 250
