# SPDX-License-Identifier: Apache-2.0
"""Writes what the page has in English as made files: COMFYUI_PATH=FOLDER python tests/make_locales.py

locales/en comes from the nodes themselves, and the help pages for users of all other languages from the English ones.
locales/zh and web/docs/NODE/LANGUAGE.md are written by hand. tests/host/test_node_page.py compares all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"


def node_defs(classes: dict[str, Any], titles: dict[str, str]) -> dict[str, Any]:
    """What nodeDefs.json holds of node classes. Source: ComfyUI app/custom_node_manager.py build_translations."""
    return {name: node_def(node, titles[name]) for name, node in classes.items()}


def node_def(node: Any, title: str) -> dict[str, Any]:
    """Title, description, inputs by name, outputs by number, all with their tooltips."""
    inputs = {
        name: {"name": name, "tooltip": options["tooltip"]}
        for group in node.INPUT_TYPES().values()
        for name, (_, options) in group.items()
    }
    outputs = {
        str(i): {"name": name, "tooltip": tooltip}
        for i, (name, tooltip) in enumerate(zip(node.RETURN_TYPES, getattr(node, "OUTPUT_TOOLTIPS", ()), strict=True))
    }
    found: dict[str, Any] = {"display_name": title, "description": node.DESCRIPTION, "inputs": inputs}
    return found | ({"outputs": outputs} if outputs else {})


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fallback_page(docs: Path, name: str) -> tuple[Path, bytes]:
    """Where the frontend looks for a node's help if there is none in the user's language, and the English page.

    Its links are relative to the same folder. Source: ComfyUI_frontend src/services/nodeHelpService.ts.
    """
    return docs / f"{name}.md", (docs / name / "en.md").read_bytes()


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    sys.path += [str(ROOT / "tools"), str(ROOT)]  # behind the host's folder, which has a nodes.py of its own
    import _pack  # noqa: F401
    import conftest  # noqa: F401  (boots the host)
    from gguf_kit import nodes

    write(LOCALES / "en" / "main.json", {"nodeCategories": {"gguf": "GGUF"}})
    write(LOCALES / "en" / "nodeDefs.json", node_defs(nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS))
    for name in nodes.NODE_CLASS_MAPPINGS:
        path, content = fallback_page(DOCS, name)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
