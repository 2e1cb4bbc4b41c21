# SPDX-License-Identifier: Apache-2.0
"""A newcomer's ComfyUI in headless Chromium: an empty base directory, the pack, demo/install.py, and the real page.

For tests/e2e/test_browser.py and tests/make_screenshots.py. The browser is the one that CHROMIUM names, else one found
on the PATH; playwright drives it and brings none of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf_kit.demo import host
from gguf_kit.demo.server import ComfyServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# As root Chromium starts without its sandbox only; without the others it asks the network for things of its own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VIEWPORT = {"width": 1280, "height": 800}
# A first visit opens the templates by itself, after a while; canvas figures and minimap are in the way of pictures.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}
TINY_TEMPLATE = "GGUF-tiny-Flux-runs-as-it-is"
START_MS = 180_000
STEP_MS = 30_000
TRY_MS = 3_000
EMPTY_SPOT = (300, 740)  # of the canvas, below the nodes of every template and of the workflow that opens first
DIALOGS = ".p-dialog-mask, [data-testid='dialog-overlay']"

_READY = "() => window.LiteGraph?.registered_node_types['UnetLoaderGGUF'] && window.app?.graph"
_IS_OPEN = "name => window.app.extensionManager.workflow.activeWorkflow?.path?.includes(name)"
_LOAD = """async ([module, name]) => {
    const answer = await fetch(`/api/workflow_templates/${module}/${name}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, name);
}"""
_SHOWN = """() => {
    const image = window.app.graph._nodes.find(node => node.type === 'SaveImage')?.imgs?.[0];
    return image?.complete && image.naturalWidth > 0;
}"""
_HAS_WIDTH = "([image, width]) => !image.src.includes('default-template') && image.naturalWidth === width"
_TAKES_TEXT = "() => document.activeElement?.matches('input, textarea')"
_NAMES = "items => items.map(item => item.innerText.trim().split('\\n')[0].trim())"
_SELECT = "type => window.app.canvas.selectNode(window.app.graph._nodes.find(node => node.type === type))"
_SET_WIDGET = """([type, name, value]) => {
    const node = window.app.graph._nodes.find(node => node.type === type);
    node.widgets.find(widget => widget.name === name).value = value;
}"""


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def newcomer_server(work: Path) -> Iterator[ComfyServer]:
    """A server with nothing in it but the pack and what demo/install.py puts there, as README tells a newcomer."""
    base = host.make_base(work / "base", {"gguf-kit": host.PACK}, {})
    subprocess.run([sys.executable, str(host.PACK / "demo" / "install.py"), str(base)], check=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    with ComfyServer(host.get_host(), base, work / "server.log") as server:
        yield server


@contextmanager
def comfy_page(server: ComfyServer, browser: str) -> Iterator[ComfyPage]:
    """The page of a server, loaded, in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=list(FLAGS))
        page = chromium.new_page(viewport=VIEWPORT)
        page.set_default_timeout(STEP_MS)
        page.goto(server.url, wait_until="domcontentloaded", timeout=START_MS)
        page.wait_for_function(_READY, timeout=START_MS)
        yield ComfyPage(page)
        chromium.close()


class ComfyPage:
    """What a user does in the page, for the frontends of ComfyUI 0.3.75 and of newer ones.

    Attributes:
        page: the playwright page.
    """

    def __init__(self, page: Any) -> None:
        self.page = page

    def close_dialogs(self) -> None:
        """Leave what the last action opened."""
        for _ in range(2):
            self.page.keyboard.press("Escape")

    def browse_templates(self) -> None:
        """Open the templates dialog, by the command behind its button, and wait for the pack's cards."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.card(TINY_TEMPLATE).wait_for()

    def card(self, template: str) -> Any:
        """A template's card in the dialog."""
        return self.page.get_by_test_id(f"template-workflow-{template}")

    def wait_for_card_picture(self, template: str, width: int) -> None:
        """Wait until a card shows the pack's own picture, which has a width, and not the page's stand-in."""
        picture = self.card(template).locator("img").first
        picture.scroll_into_view_if_needed()
        self.page.wait_for_function(_HAS_WIDTH, arg=[picture.element_handle(), width])

    def open_template(self, template: str) -> None:
        """Open a template by its card, in a new tab."""
        self.close_dialogs()
        self.browse_templates()
        self.card(template).click()
        self.card(template).wait_for(state="detached")
        self.page.wait_for_function(_IS_OPEN, arg=template)

    def load_template(self, template: str, module: str = "gguf-kit") -> None:
        """Load a template into a new tab as its card does, without the dialog."""
        self.close_dialogs()
        self.page.evaluate(_LOAD, [module, template])
        self.page.wait_for_function(_IS_OPEN, arg=template)

    def run(self) -> None:
        """Press the keys for Run."""
        self.page.keyboard.press("Control+Enter")

    def wait_for_picture(self) -> None:
        """Wait until Save Image shows one."""
        self.page.wait_for_function(_SHOWN)

    def search(self, text: str, wanted: str) -> list[str]:
        """Names of the nodes that the search finds, in its order, once wanted is among them or time is up."""
        from playwright.sync_api import TimeoutError as NotInTime

        self.close_dialogs()
        for closing in self.page.locator(DIALOGS).all():  # a click while one fades would go to it
            closing.wait_for(state="hidden")
        options = self.page.get_by_role("option")
        try:
            self._open_search()
            self.page.keyboard.type(text)
            options.filter(has_text=wanted).first.wait_for()
        except NotInTime:
            pass  # the caller sees by the names that it is not there
        names: list[str] = options.evaluate_all(_NAMES)
        return names

    def _open_search(self) -> None:
        """Double-click until it takes text: keys that come before go to the graph, as clicks do while one is opened."""
        from playwright.sync_api import TimeoutError as NotInTime

        for _ in range(STEP_MS // TRY_MS):
            self.page.mouse.dblclick(*EMPTY_SPOT)
            try:
                self.page.wait_for_function(_TAKES_TEXT, timeout=TRY_MS)
                return
            except NotInTime:
                continue
        raise NotInTime("the search does not open")

    def read_help(self, node_type: str) -> str:
        """Text of a node's help page, opened by the button over the selected node."""
        self.page.evaluate(_SELECT, node_type)
        self.page.get_by_test_id("info-button").click()
        shown = self.page.locator(".node-help-content .markdown-content")
        shown.wait_for()
        text: str = shown.inner_text()
        return text

    def set_widget(self, node_type: str, name: str, value: object) -> None:
        """Choose a value in a node."""
        self.page.evaluate(_SET_WIDGET, [node_type, name, value])

    def read_error(self, part: str) -> str:
        """The visible text about a failed run that holds a part of it; newer frontends show it behind a button."""
        details = self.page.get_by_test_id("error-overlay-see-errors")
        message = self.page.get_by_text(part).locator("visible=true").first
        details.or_(message).first.wait_for()
        if details.is_visible():
            details.click()
        message.wait_for()
        text: str = message.inner_text()
        return text.strip()
