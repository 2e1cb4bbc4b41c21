# SPDX-License-Identifier: Apache-2.0
"""What people see of a node: names, tooltips, search words, help, translations, its line and its bar while it loads."""

import json
import os
import re
import sys
import types
from pathlib import Path

import app.custom_node_manager
import comfy.model_management
import comfy.utils
import folder_paths
import make_locales
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from gguf_kit import components, folders, loader, node_text, nodes, nodes_components, service
from gguf_kit.errors import GGUFError
from gguf_kit.host import page
from gguf_kit.models.values import QuantizedBytes

NODES = list(nodes.NODE_CLASS_MAPPINGS)
TITLES = nodes.NODE_DISPLAY_NAME_MAPPINGS
PACK = Path(nodes.__file__).parent
DOCS, LOCALES = PACK / "web" / "docs", PACK / "locales"
CATEGORIES = {
    "SaveGGUF": "advanced/model_merging",
    "SaveGGUFCLIP": "advanced/model_merging",
    "ImatrixCollectorGGUF": "advanced/gguf",
}


def inputs_of(node_id):
    groups = nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES().values()
    return {name: options for group in groups for name, (_, options) in group.items()}


def locale(language, name="nodeDefs"):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


# -- definitions --


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_says_what_it_is_and_takes_and_gives(node_id):
    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    assert TITLES.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    assert "GGUF" in TITLES[node_id]
    assert list(TITLES.values()).count(TITLES[node_id]) == 1
    assert node.CATEGORY == CATEGORIES.get(node_id, "loaders/gguf")
    assert node.DESCRIPTION.endswith(".")
    assert callable(getattr(node, node.FUNCTION))
    assert [name for name, options in inputs_of(node_id).items() if not options.get("tooltip", "").endswith(".")] == []
    tooltips = getattr(node, "OUTPUT_TOOLTIPS", ())
    assert len(tooltips) == len(node.RETURN_TYPES)
    assert all(tooltip.endswith(".") for tooltip in tooltips)


@pytest.mark.parametrize("node_id", NODES)
def test_search_words_are_a_tuple_of_lower_case_words_without_repeats(node_id):
    aliases = nodes.NODE_CLASS_MAPPINGS[node_id].SEARCH_ALIASES
    assert isinstance(aliases, tuple)
    assert {"gguf", "quant"} <= {*aliases} or node_id == "ImatrixCollectorGGUF"
    assert len({*aliases}) == len(aliases)
    assert all(alias == alias.lower().strip() for alias in aliases)


@pytest.mark.parametrize(
    ("words", "node_id"),
    [
        ("unet", "UnetLoaderGGUF"),
        ("gguf loader", "UnetLoaderGGUF"),
        ("load model", "UnetLoaderGGUF"),
        ("clip", "CLIPLoaderGGUF"),
        ("text encoder", "DualCLIPLoaderGGUF"),
        ("quantize", "SaveGGUF"),
        ("checkpoint", "CheckpointLoaderGGUF"),
        ("lora", "LoraLoaderModelOnlyGGUF"),
        ("imatrix", "ImatrixCollectorGGUF"),
    ],
)
def test_what_people_type_is_in_a_nodes_words(words, node_id):
    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    assert any(words in text.lower() for text in (TITLES[node_id], *node.SEARCH_ALIASES))


# -- help pages --


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_names_every_input_and_what_to_do_about_errors(node_id, language):
    text = (DOCS / node_id / f"{language}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {locale(language)[node_id]['display_name']}\n")
    named = re.findall(r"\*\*(\w+)\*\*", "".join(line.split("|")[1] for line in text.splitlines() if line[:3] == "| *"))
    assert sorted(named) == sorted(inputs_of(node_id))
    assert ("## When something is wrong" if language == "en" else "## 出错时怎么办") in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert [name for name in pictures if not (DOCS / name).is_file()] == []


@pytest.mark.parametrize("node_id", NODES)
def test_both_languages_have_the_same_parts(node_id):
    texts = [(DOCS / node_id / f"{language}.md").read_text(encoding="utf-8") for language in ("en", "zh")]
    en, zh = (re.findall(r"^(?:#+ |\||\d\. )", text, re.MULTILINE) for text in texts)
    assert en == zh
    assert len(re.findall("[\u4e00-\u9fff]", texts[1])) > 150


def test_no_help_page_is_left_over():
    """The frontend asks for ID/LANGUAGE.md first; a page elsewhere would be seen by nobody, or twice in the pack."""
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages == {f"{node_id}/{language}.md" for node_id in NODES for language in ("en", "zh")}


# -- translations --


def test_english_is_what_the_nodes_say():
    assert locale("en") == make_locales.node_defs(nodes.NODE_CLASS_MAPPINGS, TITLES), (
        "run: COMFYUI_PATH=... python tests/make_locales.py"
    )


def keys_of(value, path=()):
    if isinstance(value, dict):
        return {key for name, inner in value.items() for key in keys_of(inner, (*path, name))}
    return {path}


def texts_of(value):
    return [text for inner in value.values() for text in texts_of(inner)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_chinese_has_the_keys_of_english(name):
    en, zh = locale("en", name), locale("zh", name)
    assert keys_of(zh) == keys_of(en)
    assert all(texts_of(zh))


def test_chinese_descriptions_and_tooltips_are_chinese():
    for node_id, node in locale("zh").items():
        texts = [node["description"], *(item["tooltip"] for item in node["inputs"].values())]
        assert all(re.search("[\u4e00-\u9fff]{2}", text) for text in texts), node_id


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_has_what_the_frontend_takes_for_its_own_syntax(language):
    """{name} is a variable, @:key a link and | separates plurals. Source: vue-i18n's message format."""
    texts = [text for name in ("nodeDefs", "main") for text in texts_of(locale(language, name))]
    assert [text for text in texts if set("{}@|") & set(text)] == []


def test_the_host_serves_the_translations(tmp_path, monkeypatch):
    (tmp_path / "gguf-kit").mkdir()
    os.symlink(LOCALES, tmp_path / "gguf-kit" / "locales")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    served = app.custom_node_manager.CustomNodeManager().build_translations()
    for language in ("en", "zh"):
        assert served[language]["nodeDefs"] == locale(language)
        assert served[language]["nodeCategories"] == {"gguf": "GGUF"}


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


def test_a_file_that_cannot_be_loaded_shows_nothing(folder, server):
    (folder / "m.gguf").write_bytes(b"GGUF")
    with CurrentNodeContext("a prompt", "7"), pytest.raises(GGUFError):
        nodes.UnetLoaderGGUF().load_unet("m.gguf")
    assert server.sent == []


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
    assert {*NODES} - {*LOADERS} == {"SaveGGUF", "SaveGGUFCLIP", "ImatrixCollectorGGUF"}


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
    return heard


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
