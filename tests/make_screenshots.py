# SPDX-License-Identifier: Apache-2.0
"""Takes the pictures of the templates and of the documentation from the real page, in headless Chromium.

    python tests/make_screenshots.py      with the ComfyUI of COMFYUI_PATH, else the one that is fetched

Writes example_workflows/*.jpg, the cards of the template browser, and the pictures of the page in PICTURES.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import _pack  # noqa: F401
import browser
import make_workflows
from gguf_kit.demo import host
from gguf_kit.demo.server import ComfyServer

TEMPLATES = host.PACK / "example_workflows"
# What help pages show has to lie in web/docs.
PICTURES = {"template": "web/docs/page_template.jpg", "search": "docs/page_search.jpg"}
CARD_SIZE = 480
CARD_LIMIT, PICTURE_LIMIT = 60_000, 80_000  # bytes
BACKGROUND = "#16181d"
# Title and second line of each card.
CARDS = {
    "GGUF-tiny-Flux-runs-as-it-is": ("Tiny Flux", "6 MB, runs on any machine"),
    "GGUF-Flux-dev": ("Flux.1 dev", "text to picture, 20 steps"),
    "GGUF-Flux-schnell": ("Flux.1 schnell", "text to picture, 4 steps"),
    "GGUF-Wan-text-to-video": ("Wan 2.1", "text to video"),
    "GGUF-Qwen-Image": ("Qwen-Image", "text to picture"),
}
SAVED_NODE_AREA = """() => {
    const boxes = window.app.graph._groups.map(group => [...group.boundingRect ?? group._bounding]);
    const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
    const right = Math.max(...boxes.map(box => box[0] + box[2]));
    const bottom = Math.max(...boxes.map(box => box[1] + box[3]));
    const { scale, offset } = window.app.canvas.ds, area = window.app.canvas.canvas.getBoundingClientRect();
    const x = (left + offset[0]) * scale + area.left, y = (top + offset[1]) * scale + area.top;
    return { x, y, width: (right - left) * scale, height: (bottom - top) * scale };
}"""


def save_jpeg(picture: Image.Image, file: Path, limit: int) -> None:
    """Write with the best quality that stays within limit bytes."""
    for quality in range(90, 20, -5):
        content = io.BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=quality, optimize=True)
        if content.tell() <= limit:
            break
    file.write_bytes(content.getvalue())


def take(page: browser.ComfyPage, clip: dict[str, float] | None = None) -> Image.Image:
    """A screenshot of the page or a part of it, once the canvas has drawn."""
    page.page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")


def make_card(graph: Image.Image, title: str, line: str, result: Image.Image | None) -> Image.Image:
    """A square card: title, what it is, the graph, and the picture that it made, where there is one."""
    card = Image.new("RGB", (CARD_SIZE, CARD_SIZE), BACKGROUND)
    draw = ImageDraw.Draw(card)
    draw.text((24, 64), title, "white", ImageFont.load_default(44))
    draw.text((24, 122), f"GGUF: {line}", "#9db4d0", ImageFont.load_default(22))
    width = CARD_SIZE - 32
    small = graph.resize((width, round(graph.height * width / graph.width)), Image.Resampling.LANCZOS)
    top = 172 if result else 172 + max(0, (CARD_SIZE - 188 - small.height) // 2)
    card.paste(small, (16, top))
    if result:
        side = CARD_SIZE - top - small.height - 32
        card.paste(
            result.resize((side, side), Image.Resampling.LANCZOS), ((CARD_SIZE - side) // 2, CARD_SIZE - side - 16)
        )
    return card


def make_cards(page: browser.ComfyPage, result: Image.Image) -> None:
    """The card of each template."""
    for name, (title, line) in CARDS.items():
        page.load_template(name)
        clip = page.page.evaluate(SAVED_NODE_AREA)
        made = result if name == browser.TINY_TEMPLATE else None
        save_jpeg(make_card(take(page, clip), title, line, made), TEMPLATES / f"{name}.jpg", CARD_LIMIT)


def save_picture(page: browser.ComfyPage, name: str) -> None:
    """One of PICTURES, of what the page shows now."""
    save_jpeg(take(page), host.PACK / PICTURES[name], PICTURE_LIMIT)


def main() -> None:
    """Take all pictures."""
    chromium = browser.find_browser()
    if chromium is None:
        raise SystemExit("No Chromium on the PATH. Install it or set CHROMIUM to one.")
    with tempfile.TemporaryDirectory(prefix="gguf-kit-page-") as work:
        with browser.newcomer_server(Path(work)) as server:
            make_stand_ins(server.base / "models")
            with browser.comfy_page(server, chromium) as page:
                take_all(page, server)


def make_stand_ins(models: Path) -> None:
    """Empty files for all that the templates choose: the page puts red frames around what is missing."""
    for template in make_workflows.TEMPLATES.values():
        for name in (value for node in template.nodes.values() for value in node.widgets):
            if isinstance(name, str) and name.endswith((".gguf", ".safetensors")):
                for folder in ("diffusion_models", "text_encoders", "vae"):
                    (models / folder).mkdir(exist_ok=True)
                    (models / folder / name).touch()


def take_all(page: browser.ComfyPage, server: ComfyServer) -> None:
    """The result, the cards, and the search."""
    page.load_template(browser.TINY_TEMPLATE)
    page.run()
    page.wait_for_picture()
    save_picture(page, "template")
    saved = next(iter(page.page.evaluate("() => window.app.nodeOutputs").values()))["images"][0]
    make_cards(page, Image.open(io.BytesIO(server.download(saved))))
    page.search("gguf", "Unet Loader (GGUF)")
    save_picture(page, "search")


if __name__ == "__main__":
    main()
