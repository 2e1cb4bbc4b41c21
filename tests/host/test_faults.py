# SPDX-License-Identifier: Apache-2.0
"""Bad days: a model's file is replaced, deleted, cut or written to while it is used; a disk that fails or is full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import pytest
import tiny
import torch
from gguf_kit import nodes, nodes_save
from gguf_kit.errors import BadFile, GGUFError
from gguf_kit.host.file_bytes import check_files, mapped_files

ROOT = Path(__file__).resolve().parents[2]
DYNAMIC = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="the system refuses this while the file is mapped")


@pytest.fixture
def path(tiny_flux, tmp_path):
    """A copy of the tiny Flux that a test may spoil."""
    return Path(shutil.copy(tiny_flux("Q4_K_S"), tmp_path / "model.gguf"))


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


def sample(patcher, **options):
    """Two steps of the host's sampler."""
    _, _, context, y = tiny.inputs(batch=1)
    condition = [[context, {"pooled_output": y}]]
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    run = patcher, noise, 2, 1.0, "euler", "simple", condition, condition, torch.zeros_like(noise)
    return comfy.sample.sample(*run, disable_pbar=True, seed=1, **options)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def longer(path):
    with path.open("ab") as file:
        file.write(bytes(100))


def other_bytes(path):
    """Of the same size, by another program that opened it for writing."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(500))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


IN_PLACE = {"cut": cut, "emptied": empty, "longer": longer, "other bytes": other_bytes}


def replace(path):
    other = path.with_name("incoming")
    other.write_bytes(b"something else")
    other.replace(path)


STILL_THERE = {"replaced": replace, "deleted": Path.unlink, "renamed": lambda path: path.rename(path.with_name("b"))}


# -- while a model is loaded --


@posix_only
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("loaded", [False, True], ids=["before its first use", "between two uses"])
def test_a_file_that_is_written_to_is_an_error_in_one_sentence(path, change, loaded):
    patcher = tiny.quantized_model(path)
    if loaded:
        sample(patcher)
    change(path)
    for _ in range(2):
        with pytest.raises(BadFile, match=r"^model\.gguf: the file .* while its model was loaded\. Run the workflow"):
            sample(patcher)


@posix_only
def test_a_file_that_is_written_to_while_sampling_is_an_error_at_the_next_step(path):
    patcher, steps = tiny.quantized_model(path), []

    def spoil(step, *others):
        steps.append(step)
        other_bytes(path)

    with pytest.raises(BadFile, match="was written to while"):
        sample(patcher, callback=spoil)
    assert steps == [0]


@posix_only
def test_whatever_the_host_loads_is_looked_at(path):
    """Text encoders have no steps: the host loads them before each prompt, loaded or not."""
    patcher = tiny.quantized_model(path)
    comfy.model_management.load_models_gpu([patcher])
    comfy.model_management.load_models_gpu([patcher])
    longer(path)
    with pytest.raises(BadFile, match=r"went from \d+ to \d+ bytes while"):
        comfy.model_management.load_models_gpu([patcher])


@posix_only
def test_a_model_whose_file_was_written_to_leaves_its_device(path):
    """The host takes a model off its list before it loads it anew, and would never unload it again."""
    patcher = tiny.quantized_model(path)
    comfy.model_management.load_models_gpu([patcher])
    assert patcher.loaded_size() > 0
    longer(path)
    with pytest.raises(BadFile):
        comfy.model_management.load_models_gpu([patcher])
    assert patcher.loaded_size() == 0
    assert patcher.model not in [loaded.real_model() for loaded in comfy.model_management.current_loaded_models]


@posix_only
@pytest.mark.skipif(not DYNAMIC, reason="this host has no dynamic VRAM")
def test_under_dynamic_vram_a_file_that_is_written_to_is_the_same_error(path, monkeypatch):
    import fake_vram

    fake_vram.install(monkeypatch)
    patcher = tiny.quantized_model(path)
    assert patcher.is_dynamic()
    sample(patcher)
    other_bytes(path)
    with pytest.raises(BadFile, match="was written to while"):
        sample(patcher)


@posix_only
def test_clones_with_loras_look_too(path):
    patcher = tiny.with_patches(tiny.quantized_model(path), tiny.lora())
    sample(patcher)
    other_bytes(path)
    with pytest.raises(BadFile, match="was written to while"):
        sample(patcher)


@posix_only
def test_after_the_error_the_model_is_unloaded_and_another_one_works(path, tiny_flux):
    expected = sample(tiny.quantized_model(tiny_flux("Q8_0")))
    patcher = tiny.quantized_model(path)
    sample(patcher)
    cut(path)
    with pytest.raises(BadFile):
        sample(patcher)
    assert torch.equal(sample(tiny.quantized_model(tiny_flux("Q8_0"))), expected)
    comfy.model_management.unload_all_models()
    with pytest.raises(BadFile, match="bytes short"):
        tiny.quantized_model(path)


@posix_only
@pytest.mark.parametrize("change", STILL_THERE.values(), ids=STILL_THERE)
def test_a_file_that_is_no_longer_at_its_path_is_still_computed_with(path, change):
    patcher = tiny.quantized_model(path)
    expected = sample(patcher)
    change(path)
    assert torch.equal(sample(patcher), expected)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patcher), expected)


def test_a_file_whose_access_time_changes_is_as_it_was(path):
    patcher = tiny.quantized_model(path)
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    path.chmod(0o600)
    check_files(patcher.model)
    assert {file.path for file in mapped_files(patcher.model)} == {str(path)}


# -- between two runs of a workflow --


@pytest.fixture
def node(path, monkeypatch):
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(path.parent)], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})
    return nodes.UnetLoaderGGUF


@pytest.mark.parametrize("change", [*IN_PLACE.values(), replace, Path.unlink], ids=[*IN_PLACE, "replaced", "deleted"])
def test_the_host_is_told_that_a_file_has_changed(path, node, change):
    before = node.IS_CHANGED(unet_name=path.name)
    assert node.IS_CHANGED(unet_name=path.name) == before
    change(path)
    assert node.IS_CHANGED(unet_name=path.name) != before


@pytest.mark.parametrize(
    ("change", "said"),
    {"cut": (cut, "bytes short"), "emptied": (empty, "is empty"), "replaced": (replace, "instead of b'GGUF'")}.values(),
    ids=["cut", "emptied", "replaced"],
)
def test_the_next_run_says_what_the_file_is_now(path, node, change, said):
    node().load_unet(path.name)
    change(path)
    with pytest.raises(GGUFError, match=r"^model\.gguf: ") as error:
        node().load_unet(path.name)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["../secret.gguf", "{folder}/secret.gguf", "a/../../secret.gguf"])
def test_a_name_that_leads_out_of_the_model_folders_is_not_found(path, node, name, monkeypatch):
    inside = path.parent / "models"
    inside.mkdir()
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(inside)], {".gguf"}))
    path.rename(path.with_name("secret.gguf"))
    with pytest.raises(FileNotFoundError):
        node().load_unet(name.format(folder=path.parent))


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_disk_that_fails_is_an_error_in_one_sentence(path, node, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    from gguf_kit import mapped_file

    if call == "stat":
        monkeypatch.setattr(mapped_file.os, "stat", fail)
    else:
        monkeypatch.setattr(mapped_file, "open", fail, raising=False)
    with pytest.raises(BadFile, match=r"^model\.gguf: the file cannot be opened: Input/output error\. Check"):
        tiny.quantized_model(path)


# -- saving and converting --

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_disk_that_takes_no_more_leaves_no_file_of_the_converter(path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    argv = [str(ROOT / "tools" / "to_safetensors.py"), "--src", str(path), "--dst", str(out / "model.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=1 << 20, argv=argv)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "model.safetensors: cannot be written: File too large. Check" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.iterdir())


def test_a_full_disk_leaves_no_file_of_the_save_node(path, monkeypatch, tmp_path):
    from gguf_kit.quantize import writer

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(nodes_save.folder_paths, "get_output_directory", lambda: str(out))
    written = []

    def write(self, data, _whole=writer.Writer.write):
        if len(written) == 5:
            with self._disk_errors():
                raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        _whole(self, data)

    monkeypatch.setattr(writer.Writer, "write", write)
    with pytest.raises(GGUFError, match=r"\.gguf: the disk is full\. Free some space") as error:
        nodes_save.SaveGGUF().save(tiny.quantized_model(path), "saved", "Q8_0")
    assert "saved" in str(error.value)
    assert not [file for file in out.rglob("*") if file.is_file()]
