# SPDX-License-Identifier: Apache-2.0
"""A program for tests: ComfyUI's own start, with node packs from folders in a given order, and what came of it as JSON.

    python load_packs.py COMFYUI '{"scenario": ["folder of packs", ...], ...}'

A process of its own, because packs loaded by a host stay in it: their modules, layouts and entries in its tables.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import sys


def start(folders: list[str]) -> dict[str, object]:
    """Load what lies in folders as the host does and start a server: who serves which node, and what was logged."""
    import folder_paths
    import server
    from aiohttp import web

    import nodes

    before = dict(nodes.NODE_CLASS_MAPPINGS)
    paths = copy.deepcopy(folder_paths.folder_names_and_paths)
    folder_paths.folder_names_and_paths["custom_nodes"] = (folders, set())
    records = Records()
    logging.getLogger().addHandler(records)
    loop = asyncio.new_event_loop()
    running = server.PromptServer(loop)

    async def answer() -> None:
        await nodes.init_external_custom_nodes()
        runner = web.AppRunner(running.app)
        await runner.setup()
        await runner.cleanup()

    loop.run_until_complete(answer())
    logging.getLogger().removeHandler(records)
    added = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if before.get(name) is not node}
    manager = getattr(running, "node_replace_manager", None)
    result = {
        "served": {name: node.RELATIVE_PYTHON_MODULE for name, node in added.items()},
        "said": records.messages,
        "replacements": None if manager is None else sorted(manager.as_dict()),
        "folders": plain(folder_paths.folder_names_and_paths),
        "folders_before": plain(paths),
    }
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(before)
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(paths)
    return result


def plain(paths: dict[str, tuple[list[str], set[str]]]) -> dict[str, tuple[list[str], list[str]]]:
    """Folders and endings as JSON has them."""
    return {name: (list(folders), sorted(endings)) for name, (folders, endings) in paths.items()}


class Records(logging.Handler):
    """Keeps warnings and worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append([record.name, record.getMessage()])


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    scenarios = json.loads(sys.argv[2])
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.install_util  # noqa: F401 (before the host's nodes put comfy/ in front of it)

    json.dump({name: start(folders) for name, folders in scenarios.items()}, sys.stdout)


if __name__ == "__main__":
    main()
