# SPDX-License-Identifier: Apache-2.0
"""What a newcomer sees: the real page in headless Chromium, over a server with the pack and demo/install.py's files.

The frontend is the one that the host's requirements name. Skipped where there is no Chromium; the templates are judged
against the host's nodes without one too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from browser import ComfyPage
from gguf_kit.demo import host
from gguf_kit.demo.server import ComfyServer
from PIL import Image

pytestmark = pytest.mark.e2e

TEMPLATES = sorted((host.PACK / "example_workflows").glob("*.json"))
NAMES = [path.stem for path in TEMPLATES]
PAGE_ONLY = {"MarkdownNote"}  # nodes that the frontend brings
MODEL_ENDS = (".gguf", ".safetensors")
CONTROL = ("fixed", "increment", "decrement", "randomize")  # widget after a seed, which the server does not know
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CARD_WIDTH = 480
PNG_START = b"\x89PNG"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with browser.newcomer_server(tmp_path_factory.mktemp("newcomer")) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[ComfyPage]:
    pytest.importorskip("playwright", reason="the browser tests need playwright from PyPI")
    chromium = browser.find_browser()
    if chromium is None:
        pytest.skip(f"no {', '.join(browser.BROWSERS)} on the PATH; install Chromium or set CHROMIUM to one")
    with browser.comfy_page(server, chromium) as opened:
        yield opened


# -- templates against the host's nodes --


def read_template(name: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((host.PACK / "example_workflows" / f"{name}.json").read_text("utf-8"))
    return template


def inputs_of(description: dict[str, Any]) -> dict[str, Any]:
    """A node's inputs in order: name -> (type or choices, options)."""
    both = description["input"].get("required", {}), description["input"].get("optional", {})
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for part in both for name, spec in part.items()}


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def fits(kind: Any, options: dict[str, Any], value: Any) -> bool:
    """Whether the host takes a widget's value; files of models need not be there."""
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options["options"]
        return value in choices or (isinstance(value, str) and value.endswith(MODEL_ENDS))
    if kind in ("INT", "FLOAT"):
        right = isinstance(value, int if kind == "INT" else (int, float))
        return right and options.get("min", value) <= value <= options.get("max", value)
    return isinstance(value, str if kind == "STRING" else bool)


def widget_faults(node: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    """What the host would not take of a node's widget values, and how many are missing or too many."""
    values, faults = list(node["widgets_values"]), []
    widgets = {name: spec for name, spec in inputs.items() if is_widget(*spec)}
    for name, (kind, options) in widgets.items():
        if not values:
            faults += [] if "default" in options else [f"{node['type']}.{name}: no value"]
            continue
        value = values.pop(0)
        faults += [] if fits(kind, options, value) else [f"{node['type']}.{name}: {value!r}"]
        if options.get("control_after_generate"):
            faults += [] if values and values.pop(0) in CONTROL else [f"{node['type']}.{name}: no control"]
    return faults + [f"{node['type']}: {value!r} too many" for value in values]


@pytest.mark.parametrize("name", NAMES)
def test_template_has_only_nodes_and_values_that_the_host_takes(nodes: dict[str, Any], name: str) -> None:
    faults = []
    for node in read_template(name)["nodes"]:
        if node["type"] in nodes:
            faults += widget_faults(node, inputs_of(nodes[node["type"]]))
        elif node["type"] not in PAGE_ONLY:
            faults.append(f"{node['type']}: no such node")
    assert not faults


@pytest.mark.parametrize("name", NAMES)
def test_template_is_linked_by_inputs_and_outputs_that_the_host_has(nodes: dict[str, Any], name: str) -> None:
    template = read_template(name)
    by_id = {node["id"]: node for node in template["nodes"]}
    for number, source, output, target, slot, kind in template["links"]:
        assert nodes[by_id[source]["type"]]["output"][output] == kind
        entry = by_id[target]["inputs"][slot]
        assert entry["link"] == number
        assert inputs_of(nodes[by_id[target]["type"]])[entry["name"]][0] == kind
        assert number in by_id[source]["outputs"][output]["links"]


@pytest.mark.parametrize("name", NAMES)
def test_template_leaves_no_required_input_open(nodes: dict[str, Any], name: str) -> None:
    for node in read_template(name)["nodes"]:
        required = nodes.get(node["type"], {"input": {}})["input"].get("required", {})
        linked = {entry["name"] for entry in node["inputs"]}
        plugs = {key for key, spec in required.items() if not is_widget(spec[0], spec[1] if len(spec) > 1 else {})}
        assert plugs <= linked


# -- the page --


@pytest.mark.parametrize("text", ["gguf", "unet", "quant"])
def test_search_finds_the_loader(page: ComfyPage, nodes: dict[str, Any], text: str) -> None:
    node = nodes["UnetLoaderGGUF"]
    if text not in node["display_name"].lower() and "search_aliases" not in node:
        pytest.skip("this ComfyUI searches in names only: it has no search_aliases")
    assert node["display_name"] in page.search(text, node["display_name"])


def test_templates_dialog_lists_every_template_with_its_picture(page: ComfyPage) -> None:
    page.browse_templates()
    for name in NAMES:
        page.wait_for_card_picture(name, CARD_WIDTH)
    page.close_dialogs()


def count_red(page: ComfyPage) -> int:
    """Pixels of the page in the red of the tiny model's "red 0"."""
    shown = np.asarray(Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")).astype(int)
    return int(((shown[..., 0] > 200) & (shown[..., 1:].max(axis=-1) < 40)).sum())


def test_tiny_template_runs_and_its_picture_is_shown(page: ComfyPage, server: ComfyServer) -> None:
    page.open_template(browser.TINY_TEMPLATE)
    before = count_red(page)
    page.run()
    page.wait_for_picture()
    for _ in range(40):  # until the canvas has drawn it
        if count_red(page) > before + 500:
            break
        page.page.wait_for_timeout(250)
    else:
        pytest.fail("no red digit in the page")
    saved = next(iter(page.page.evaluate("() => window.app.nodeOutputs").values()))["images"][0]
    assert server.download(saved).startswith(PNG_START)


@pytest.mark.parametrize("name", [name for name in NAMES if name != browser.TINY_TEMPLATE])
def test_template_opens_whole(page: ComfyPage, name: str) -> None:
    page.load_template(name)
    known = "node => [node.type, node.type in window.LiteGraph.registered_node_types]"
    found = page.page.evaluate(f"() => window.app.graph._nodes.map({known})")
    wanted = sorted(node["type"] for node in read_template(name)["nodes"])
    assert sorted(kind for kind, _ in found) == wanted
    assert not [kind for kind, is_known in found if not is_known]


def test_help_page_of_the_loader_is_rendered(page: ComfyPage) -> None:
    page.load_template(browser.TINY_TEMPLATE)
    text = page.read_help("UnetLoaderGGUF")
    assert text.startswith("Unet Loader (GGUF)")
    for name in ("unet_name", "extra_name", "models/diffusion_models"):
        assert name in text
    assert "**" not in text, "Markdown that was not rendered"


def test_error_from_a_cut_off_file_is_readable(page: ComfyPage, server: ComfyServer) -> None:
    folder: Path = server.base / "models" / "diffusion_models"
    content = (folder / "tiny-flux-Q4_K_S.gguf").read_bytes()
    (folder / "cut-off.gguf").write_bytes(content[: len(content) // 2])
    page.load_template(browser.TINY_TEMPLATE)
    page.set_widget("UnetLoaderGGUF", "unet_name", "cut-off.gguf")
    page.run()
    message = page.read_error("cut-off.gguf: ")
    assert "bytes short" in message
    assert "Download it again." in message
