# SPDX-License-Identifier: Apache-2.0
"""What a node shows of what it loads: a line of text, and a bar while it does."""

import os
import re
import sys
import types
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from gguf_kit import components, folders, loader, node_text, nodes, nodes_components, service
from gguf_kit.errors import GGUFError
from gguf_kit.host import page
from gguf_kit.models.values import QuantizedBytes

# -- the line on the node --


class Server:
    """Stands for the host's PromptServer: keeps what is sent to the page."""

    client_id = "the page"

    def __init__(self):
        self.sent = []

    def send_progress_text(self, text, node_id, sid=None):
        self.sent.append((text, node_id, sid))


@pytest.fixture
def server(monkeypatch):
    instance = Server()
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", module)
    return instance


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for key in ("unet_gguf", "lora_gguf", "vae_gguf"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path)], {".gguf"}))
    return tmp_path


FLUX_LINE = re.compile(r"Flux[^,]*, Q4_K_S, \d\.\d\d MB: \d+ Q4_K, .*F32.*")


def test_the_running_node_shows_what_it_has_loaded(folder, tiny_flux, server):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    with CurrentNodeContext("a prompt", "7:3"):
        nodes.UnetLoaderGGUF().load_unet("m.gguf")
    ((text, node_id, client),) = server.sent
    assert FLUX_LINE.fullmatch(text)
    assert (node_id, client) == ("7:3", "the page")


def test_nothing_is_shown_outside_of_a_prompt_or_without_a_server(folder, tiny_flux, server, monkeypatch):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    nodes.UnetLoaderGGUF().load_unet("m.gguf")
    assert server.sent == []
    monkeypatch.delitem(sys.modules, "server")
    with CurrentNodeContext("a prompt", "7"):
        nodes.UnetLoaderGGUF().load_unet("m.gguf")


def test_a_model_that_is_loaded_again_for_another_node_shows_nothing_there(folder, tiny_flux, server):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    (model,) = nodes.UnetLoaderGGUF().load_unet("m.gguf")
    with CurrentNodeContext("a prompt", "the sampler"):
        model.cached_patcher_init[0](*model.cached_patcher_init[1])
    assert server.sent == []


def test_a_node_that_cannot_load_does_not_keep_the_line_of_the_file_before(folder, tiny_flux, server):
    (folder / "m.gguf").write_bytes(b"GGUF")
    os.link(tiny_flux("Q4_K_S"), folder / "good.gguf")
    for load in (
        lambda: nodes.UnetLoaderGGUF().load_unet("m.gguf"),
        lambda: nodes.UnetLoaderGGUF().load_unet("good.gguf", extra_name="missing.gguf"),
        lambda: nodes.CLIPLoaderGGUF().load_clip("missing.gguf", "sd3"),
        lambda: nodes.CLIPLoaderGGUF().load_clip(clip_name="missing.safetensors"),
        lambda: nodes_components.LoraLoaderGGUF().load_lora("model", None, "missing.gguf"),
    ):
        with CurrentNodeContext("a prompt", "7"), pytest.raises((GGUFError, FileNotFoundError)):
            load()
    assert server.sent == [("not loaded", "7", "the page")] * 5


def test_a_file_that_the_host_reads_is_named(tmp_path, tiny_flux, server, monkeypatch):
    for key in ("clip_gguf", "text_encoders"):
        extensions = {".gguf", ".safetensors"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path)], extensions))
    (tmp_path / "l.safetensors").write_bytes(bytes(2000))
    os.link(tiny_flux("Q4_K_S"), tmp_path / "m.gguf")
    monkeypatch.setattr(nodes, "load_clip", lambda paths, *_: paths[1:] and loader.load_diffusion_model(paths[1]))
    with CurrentNodeContext("a prompt", "7"):
        nodes.CLIPLoaderGGUF().load_clip("l.safetensors", "sd3")
        nodes.DualCLIPLoaderGGUF().load_clip("l.safetensors", "m.gguf", "flux")
    (alone, *_), (both, *_) = server.sent
    assert alone == "l.safetensors: as ComfyUI reads it, 2.00 kB"
    assert both.startswith("m.gguf: Flux")
    assert both.endswith("\nl.safetensors: as ComfyUI reads it, 2.00 kB")


def test_a_lora_that_is_kept_has_its_line_again_after_another_was_missing(folder, tiny_flux, server, monkeypatch):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    monkeypatch.setattr(nodes_components, "load_lora", loader.load_diffusion_model)
    monkeypatch.setattr(nodes_components, "apply_lora", lambda *args: ("model", "clip"))
    node = nodes_components.LoraLoaderGGUF()
    with CurrentNodeContext("a prompt", "7"):
        node.load_lora("model", None, "m.gguf")
        with pytest.raises((GGUFError, FileNotFoundError)):
            node.load_lora("model", None, "missing.gguf")
        node.load_lora("model", None, "m.gguf", 0.0)
        node.load_lora("model", None, "m.gguf")
    first, missing, unused, again = (text for text, *_ in server.sent)
    assert FLUX_LINE.fullmatch(first)
    assert (missing, unused, again) == ("not loaded", "not loaded", first)


LOADERS = {
    "UnetLoaderGGUF": (nodes, "load_model", ["m.gguf"]),
    "UnetLoaderGGUFAdvanced": (nodes, "load_model", ["m.gguf"]),
    "CLIPLoaderGGUF": (nodes, "load_clip", ["m.gguf", "sd3"]),
    "DualCLIPLoaderGGUF": (nodes, "load_clip", ["m.gguf", "m.gguf", "flux"]),
    "TripleCLIPLoaderGGUF": (nodes, "load_clip", ["m.gguf"] * 3),
    "QuadrupleCLIPLoaderGGUF": (nodes, "load_clip", ["m.gguf"] * 4),
    "CheckpointLoaderGGUF": (nodes.nodes_checkpoint, "load_whole", ["m.gguf"]),
    "VAELoaderGGUF": (nodes_components, "load_vae", ["m.gguf"]),
    "CLIPVisionLoaderGGUF": (nodes_components, "load_clip_vision", ["m.gguf"]),
    "ControlNetLoaderGGUF": (nodes_components, "load_controlnet", ["m.gguf"]),
    "LoraLoaderGGUF": (nodes_components, "load_lora", ["model", "clip", "m.gguf"]),
    "LoraLoaderModelOnlyGGUF": (nodes_components, "load_lora", ["model", "m.gguf", 1.0]),
    "ModelPatchLoaderGGUF": (nodes_components, "load_model_patch", ["m.gguf"]),
    "LatentUpscaleModelLoaderGGUF": (nodes_components, "load_latent_upscaler", ["m.gguf"]),
}


@pytest.mark.parametrize("node_id", LOADERS)
def test_every_loader_shows_its_line(node_id, tiny_flux, server, monkeypatch, tmp_path):
    """Whatever a loader builds: here only the file is read."""
    os.link(tiny_flux("Q4_K_S"), tmp_path / "m.gguf")
    for key in folders.FOLDER_KEYS:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path)], {".gguf"}))
    module, function, values = LOADERS[node_id]

    def read(paths, *args, **kwargs):
        for path in [paths] if isinstance(paths, str) else paths:
            loader.load_diffusion_model(path)
        return (1, 2, 3)

    monkeypatch.setattr(module, function, read)
    monkeypatch.setattr(nodes_components, "apply_lora", lambda *args: ("model", "clip"))
    node = nodes.NODE_CLASS_MAPPINGS[node_id]()
    with CurrentNodeContext("a prompt", "7"):
        getattr(node, node.FUNCTION)(*values)
    ((text, *_),) = server.sent
    lines = text.splitlines()
    assert len(lines) == values.count("m.gguf")
    names = "m.gguf: " if len(lines) > 1 else ""
    assert all(line.startswith(names) and FLUX_LINE.fullmatch(line.removeprefix(names)) for line in lines)


def test_all_nodes_but_those_that_save_are_loaders_with_a_line():
    assert {*nodes.NODE_CLASS_MAPPINGS} - {*LOADERS} == {"SaveGGUF", "SaveGGUFCLIP", "ImatrixCollectorGGUF"}


def info(**known):
    values = {
        "path": "folder/m.gguf",
        "arch": "flux",
        "title": "Flux",
        "n_weights": 1,
        "n_bytes": 6_797_000_000,
        "qtypes": {"F32": 471, "Q4_K": 304},
        "type_bytes": {"F32": 5, "Q4_K": 900},
        "metadata": {},
    }
    return loader.LoadInfo(**values | known)


@pytest.mark.parametrize(
    ("known", "line"),
    [
        ({"file_type": "Q4_K_S"}, "Flux, Q4_K_S, 6.80 GB: 304 Q4_K, 471 F32"),
        ({"file_type": "F16"}, "Flux, Q4_K, 6.80 GB: 304 Q4_K, 471 F32"),  # left over from before it was quantized
        (  # the same, with tensors that were left in it
            {"file_type": "F16", "qtypes": {"F16": 3, "Q8_0": 304}, "type_bytes": {"F16": 5, "Q8_0": 900}},
            "Flux, Q8_0, 6.80 GB: 304 Q8_0, 3 F16",
        ),
        ({}, "Flux, Q4_K, 6.80 GB: 304 Q4_K, 471 F32"),
        ({"extra": "a/vace.gguf"}, "Flux with vace.gguf, Q4_K, 6.80 GB: 304 Q4_K, 471 F32"),
        ({"vision": "a/mmproj.gguf"}, "Flux with mmproj.gguf, Q4_K, 6.80 GB: 304 Q4_K, 471 F32"),
        ({"qtypes": {}, "type_bytes": {}, "n_bytes": 0}, "Flux, no tensors, 0 bytes: none"),
        (
            {
                "qtypes": dict.fromkeys("ABCDEF", 1),
                "type_bytes": dict.fromkeys("ABCDEF", 1),
                "n_bytes": 12_340_000,
            },
            "Flux, A, 12.3 MB: 1 A, 1 B, 1 C, 1 D, 2 more types",
        ),
    ],
)
def test_the_line(known, line):
    assert node_text.line_of(info(**known)) == line


def test_the_hosts_server_packs_the_text_as_the_frontend_reads_it():
    """The one thing of the host that the line needs: send_progress_text(text, node id, client)."""
    source = (Path(comfy.__path__[0]).parent / "server.py").read_text(encoding="utf-8")
    body = source.partition("def send_progress_text(")[2].partition("\n    def ")[0]
    assert re.search(r"text: .*, node_id: str, sid=None", body)
    assert 'struct.pack(">I", len(node_id_bytes)) + node_id_bytes + text' in body


# -- progress --


@pytest.fixture
def steps(monkeypatch):
    """(done, total) as the host's hook hears them while the node that loads is running."""
    heard = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, node_id=None: heard.append((done, total))
    )
    with CurrentNodeContext("a prompt", "7"):
        yield heard


def test_outside_of_a_prompt_nothing_moves_in_any_page(monkeypatch):
    heard = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: heard.append(values))
    page.progress(1)(1)
    assert heard == []


@pytest.mark.parametrize("n_files", [1, 2, 3, 4])
def test_a_clip_loader_leaves_the_type_that_was_not_given_to_the_service(n_files, monkeypatch):
    resolved = []
    monkeypatch.setattr(service.text_encoders, "detect", lambda state: "CLIP_L")
    monkeypatch.setattr(service, "resolve", lambda name, *_: resolved.append(name) or (name, ""))
    for given in ("", "flux"):
        service._clip_type(["a.safetensors"] * n_files, given, [{}] * n_files, [None] * n_files)
    first = service.clip_types(n_files)[0]
    assert resolved == [first, "flux" if n_files < 3 else first]


def test_dequantizing_at_load_shows_how_far_it_is(tiny_flux, steps):
    values, _ = loader.load_component(tiny_flux("Q4_K_S"))
    n_bytes = sum(value.data.numel() for value in values.values() if isinstance(value, QuantizedBytes))
    floats = components.to_floats(values)
    assert list(floats) == list(values)
    assert all(isinstance(value, torch.Tensor) for value in floats.values())
    assert steps[-1] == (n_bytes, n_bytes)
    assert steps[0][0] < n_bytes


def test_a_load_can_be_cancelled(tiny_flux, steps):
    values, _ = loader.load_component(tiny_flux("Q4_K_S"))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        components.to_floats(values)
    assert steps == []


def test_every_encoder_is_a_step_and_the_last_is_building(monkeypatch, steps):
    monkeypatch.setattr(service, "load_text_encoder", lambda path, vision: ({}, info()))
    advance = page.progress(3)
    for name in ("a.gguf", "b.gguf"):
        service._text_encoder(name, "none", advance)
    assert steps == [(1, 3), (2, 3)] or steps == [(1, 3)]  # newer hosts do not tell steps that follow at once
    advance(1)
    assert steps[-1] == (3, 3)
