# SPDX-License-Identifier: Apache-2.0
"""Beside other packs, in the host's own start: the log says once who serves the ids that both have."""

import asyncio
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from aiohttp import web
from gguf_kit import nodes
from gguf_kit.demo.host import PACK, get_host, make_base
from gguf_kit.demo.server import SERVER_ENVIRONMENT
from gguf_kit.host import other_packs, replacements
from gguf_kit.host.replacements import REPLACEMENTS

SHARED = ["UnetLoaderGGUF", "CLIPLoaderGGUF"]
# Another pack as its users have it: it makes the same folder keys, over the host's own lists of folders.
THEIRS = """
import folder_paths
for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
    folder_paths.folder_names_and_paths[key] = (folder_paths.folder_names_and_paths[host_key][0], {".gguf"})
NODE_CLASS_MAPPINGS = {name: type(name, (), {}) for name in ("UnetLoaderGGUF", "CLIPLoaderGGUF", "TheirsAlone")}
"""
# A pack that puts classes made of others' in their place.
WRAPPER = """
import nodes
found = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]
NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": type("Wrapped", (found,), {}), "WrappedLoader": type("Wrapped", (found,), {})}
"""
BROKEN = 'raise ImportError("no module named gguf")'
SCENARIOS = {
    "alone": ["ours"],
    "theirs last": ["ours", "theirs"],
    "ours last": ["theirs", "ours"],
    "theirs does not load": ["broken", "ours"],
    "wrapped": ["ours", "wrapper"],
    "ours twice": ["ours", "copy"],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What each of SCENARIOS comes to (load_packs.start)."""
    base = tmp_path_factory.mktemp("packs")
    packs = {"ours": ("gguf-kit", PACK), "copy": ("gguf-kit-main", PACK)}
    for place, (name, text) in {
        "theirs": ("ComfyUI-GGUF", THEIRS),
        "broken": ("ComfyUI-GGUF", BROKEN),
        "wrapper": ("Wrapper", WRAPPER),
    }.items():
        folder = base / "sources" / place
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text, encoding="utf-8")
        packs[place] = (name, folder)
    places = {place: make_base(base / place, dict([pack]), {}) / "custom_nodes" for place, pack in packs.items()}
    scenarios = {name: [str(places[place]) for place in order] for name, order in SCENARIOS.items()}
    script = Path(__file__).with_name("load_packs.py")
    command = [sys.executable, str(script), str(get_host()), json.dumps(scenarios)]
    environment = {**os.environ, **SERVER_ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=base, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said(result):
    """What our pack has logged."""
    return [message for name, message in result["said"] if name == "gguf_kit"]


@pytest.mark.parametrize("scenario", ["alone", "theirs does not load", "wrapped"])
def test_without_another_pack_that_serves_our_ids_nothing_is_said(started, scenario):
    result = started[scenario]
    assert said(result) == []
    assert set(nodes.NODE_CLASS_MAPPINGS) <= set(result["served"])
    modules = {module for name, module in result["served"].items() if name != "UnetLoaderGGUF"}
    assert "custom_nodes.gguf-kit" in modules


@pytest.mark.parametrize(
    ("scenario", "winner", "sentence"),
    [
        (
            "theirs last",
            "custom_nodes.ComfyUI-GGUF",
            "ComfyUI-GGUF serves UnetLoaderGGUF, CLIPLoaderGGUF, GGUF Kit does not.",
        ),
        (
            "ours last",
            "custom_nodes.gguf-kit",
            "GGUF Kit serves UnetLoaderGGUF, CLIPLoaderGGUF, ComfyUI-GGUF does not.",
        ),
    ],
)
def test_one_message_says_which_pack_serves_what_and_what_to_do(started, scenario, winner, sentence):
    result = started[scenario]
    assert {result["served"][name] for name in SHARED} == {winner}
    assert result["served"]["TripleCLIPLoaderGGUF"] == "custom_nodes.gguf-kit"
    (message,) = said(result)
    assert sentence in message
    assert "disable the other one" in message
    assert "\n" not in message


def test_the_pack_twice_in_two_folders_is_told_as_well(started):
    messages = said(started["ours twice"])
    assert messages
    assert all(name in messages[0] for name in nodes.NODE_CLASS_MAPPINGS)
    assert "gguf-kit-main serves" in messages[0] or "gguf-kit does not" in messages[0]


@pytest.mark.parametrize("scenario", ["theirs last", "ours last"])
def test_both_packs_together_leave_the_hosts_folders_as_they_are(started, scenario):
    folders, before = started[scenario]["folders"], started[scenario]["folders_before"]
    assert {name: folders[name] for name in before if name != "custom_nodes"} == {
        name: value for name, value in before.items() if name != "custom_nodes"
    }
    for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
        assert folders[key] == [before[host_key][0], [".gguf"]]


def test_replacements_are_registered_where_the_host_has_them(started):
    """They are for packs that are absent; the host itself leaves alone what another pack serves."""
    for result in started.values():
        assert result["replacements"] is None or set(REPLACEMENTS) <= set(result["replacements"])
    has_them = (get_host() / "app" / "node_replace_manager.py").is_file()
    assert (started["alone"]["replacements"] is not None) == has_them


def test_without_a_server_the_packs_that_came_before_are_told_at_once(monkeypatch, caplog):
    theirs = type("Theirs", (), {"RELATIVE_PYTHON_MODULE": "custom_nodes.ComfyUI-GGUF"})
    monkeypatch.setattr(other_packs, "call_when_started", lambda function: False)
    monkeypatch.setattr(other_packs.host_nodes, "NODE_CLASS_MAPPINGS", {"UnetLoaderGGUF": theirs})
    other_packs.watch(nodes.NODE_CLASS_MAPPINGS)
    assert "GGUF Kit serves UnetLoaderGGUF, ComfyUI-GGUF does not" in caplog.text
    caplog.clear()
    monkeypatch.setattr(other_packs.host_nodes, "NODE_CLASS_MAPPINGS", {})
    other_packs.watch(nodes.NODE_CLASS_MAPPINGS)
    assert caplog.text == ""


def test_an_id_that_comfyui_itself_has_taken_is_told(caplog):
    other_packs.report({"UnetLoaderGGUF": nodes.UnetLoaderGGUF}, {}, {"UnetLoaderGGUF": object})
    assert "ComfyUI serves UnetLoaderGGUF, GGUF Kit does not" in caplog.text


# -- node replacement --

MANAGER = get_host() / "app" / "node_replace_manager.py"
needs_manager = pytest.mark.skipif(not MANAGER.is_file(), reason="this ComfyUI has no node replacement")


@pytest.fixture
def manager(monkeypatch):
    """The host's own, with ours registered, in a host that has our nodes."""
    found = importlib.import_module("app.node_replace_manager").NodeReplaceManager()
    handlers = []
    server = types.SimpleNamespace(node_replace_manager=found, add_on_prompt_handler=handlers.append)
    monkeypatch.setattr(replacements, "running_server", lambda: server)
    monkeypatch.setattr(other_packs.host_nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))
    replacements.offer_replacements()
    (found.on_prompt,) = handlers
    return found


def old_node(old_id):
    """A node of another pack as a prompt has it, each input with its name as value."""
    inputs = {theirs: f"<{theirs}>" for theirs, _ in REPLACEMENTS[old_id][1]}
    return {"class_type": old_id, "inputs": inputs, "_meta": {"title": "GGUF Loader"}}


def widget_inputs(class_type):
    inputs = nodes.NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()
    return list(inputs["required"]), list(inputs.get("optional", {}))


@pytest.mark.parametrize("old_id", REPLACEMENTS)
def test_a_replacement_fills_all_that_our_node_requires(old_id):
    new_id, pairs = REPLACEMENTS[old_id]
    assert old_id not in nodes.NODE_CLASS_MAPPINGS
    assert [ours for _, ours in pairs] == widget_inputs(new_id)[0]


@needs_manager
@pytest.mark.parametrize("old_id", REPLACEMENTS)
def test_the_host_puts_our_node_in_place_of_a_missing_one(manager, old_id):
    reader = {"class_type": "Reader", "inputs": {"model": ["1", 0]}, "_meta": {}}
    prompt = {"1": old_node(old_id), "2": reader}
    manager.apply_replacements(prompt)
    new_id, pairs = REPLACEMENTS[old_id]
    assert prompt["1"]["class_type"] == new_id
    assert prompt["1"]["inputs"] == {ours: f"<{theirs}>" for theirs, ours in pairs}
    assert prompt["2"]["inputs"] == {"model": ["1", 0]}


@needs_manager
def test_a_prompt_of_a_script_without_titles_is_replaced_as_well(manager):
    prompt = {"1": old_node("LoaderGGUF"), "2": {"class_type": "Unknown", "inputs": {}}, "3": None}
    del prompt["1"]["_meta"]
    request = manager.on_prompt({"prompt": prompt})
    assert request == {"prompt": prompt}
    assert "_meta" not in prompt["2"]
    manager.apply_replacements({"1": prompt["1"], "2": prompt["2"]})
    assert manager.on_prompt({"client_id": "a page"}) == {"client_id": "a page"}


@needs_manager
def test_nodes_that_another_pack_serves_are_left_alone(manager):
    other_packs.host_nodes.NODE_CLASS_MAPPINGS["LoaderGGUF"] = object
    prompt = {"1": old_node("LoaderGGUF")}
    manager.apply_replacements(prompt)
    assert prompt["1"] == old_node("LoaderGGUF")


@needs_manager
def test_the_page_is_told_of_the_replacements(manager):
    """GET /node_replacements, which the page asks for when a workflow has missing nodes."""
    routes = web.RouteTableDef()
    manager.add_routes(routes)
    (route,) = routes
    told = json.loads(asyncio.run(route.handler(None)).body)
    assert told["LoaderGGUFAdvanced"] == [
        {
            "new_node_id": "UnetLoaderGGUFAdvanced",
            "old_node_id": "LoaderGGUFAdvanced",
            "old_widget_ids": ["gguf_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
            "input_mapping": [
                {"new_id": "unet_name", "old_id": "gguf_name"},
                *({"new_id": name, "old_id": name} for name in ("dequant_dtype", "patch_dtype", "patch_on_device")),
            ],
            "output_mapping": [{"new_idx": 0, "old_idx": 0}],
        }
    ]


def test_a_host_without_node_replacement_is_left_as_it_is(monkeypatch):
    for server in (None, object()):
        monkeypatch.setattr(replacements, "running_server", lambda server=server: server)
        replacements.offer_replacements()
