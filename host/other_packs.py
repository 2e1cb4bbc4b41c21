# SPDX-License-Identifier: Apache-2.0
"""Other packs that have nodes with our ids: the one that the host loads last serves them, and the log says which it is.

No other pack is imported or changed; all that is looked at is the host's table of nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import nodes as host_nodes

from .prompt_server import call_when_started

log = logging.getLogger("gguf_kit")

PACK = "GGUF Kit"
HINT = (
    "Workflows open with either, but ComfyUI takes the pack that it happens to load last; to choose, disable the other "
    "one in ComfyUI-Manager, or put .disabled behind the name of its folder in custom_nodes."
)


def watch(classes: Mapping[str, type]) -> None:
    """Log one warning if another pack has nodes with our ids, when it is settled which pack serves them.

    To be called while the host imports our pack: what it has under our ids then is another's, and it puts ours in
    its place when the import is done.

    Args:
        classes: our node classes by id.
    """
    table = host_nodes.NODE_CLASS_MAPPINGS
    earlier = {name: pack_of(table[name]) for name in classes if name in table}
    if not call_when_started(partial(report, classes, earlier, table)):
        report(classes, earlier, classes)


def report(classes: Mapping[str, type], earlier: Mapping[str, str], served: Mapping[str, Any]) -> None:
    """The warning, if there is something to say.

    Args:
        classes: our node classes by id.
        earlier: id -> pack that had it before us.
        served: id -> node class that the host uses.
    """
    shared: dict[tuple[str, str], list[str]] = {}
    for name, ours in classes.items():
        node = served.get(name)
        if node is not None and not _is_ours(node, ours):
            shared.setdefault((pack_of(node), PACK), []).append(name)
        elif name in earlier:
            shared.setdefault((PACK, earlier[name]), []).append(name)
    if shared:
        said = [f"{winner} serves {', '.join(names)}, {loser} does not" for (winner, loser), names in shared.items()]
        log.warning("Two packs have the same nodes: %s. %s", "; ".join(said), HINT)


def _is_ours(node: Any, ours: type) -> bool:
    """Whether a class is ours, or was made of ours by a pack that wraps nodes."""
    return isinstance(node, type) and issubclass(node, ours)


def pack_of(node: Any) -> str:
    """The pack that a node class is from, by its folder's name, which the host writes into the classes of packs."""
    return str(getattr(node, "RELATIVE_PYTHON_MODULE", "ComfyUI")).removeprefix("custom_nodes.")
