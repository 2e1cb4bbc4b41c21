# SPDX-License-Identifier: Apache-2.0
"""Nodes of other GGUF packs that ours can stand for: where such a pack is absent, the host offers ours in its place.

Hosts that have node replacement show the offer in the page and replace missing nodes of prompts by themselves; nodes
that another pack serves are left alone. A new one is a row of REPLACEMENTS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .prompt_server import running_server

_ADVANCED = ("dequant_dtype", "patch_dtype", "patch_on_device")
_CLIP = (("clip_name", "clip_name"), ("type", "type"))
_CLIP_2 = (("clip_name1", "clip_name1"), ("clip_name2", "clip_name2"), ("type", "type"))
_CLIP_3 = tuple((f"clip_name{i}", f"clip_name{i}") for i in (1, 2, 3))
_CLIP_4 = (*_CLIP_3, ("clip_name4", "clip_name4"))

# Id of another pack's node -> id of ours and pairs of inputs (theirs, ours), in the order of their widgets. Optional
# inputs that came later are not in it: the host fails on prompts that lack an input which a pair names. It fails on
# nodes without "_meta" as well, which scripts leave out: see _with_meta().
REPLACEMENTS: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = MappingProxyType(
    {
        # calcuis/gguf
        "LoaderGGUF": ("UnetLoaderGGUF", (("gguf_name", "unet_name"),)),
        "LoaderGGUFAdvanced": (
            "UnetLoaderGGUFAdvanced",
            (("gguf_name", "unet_name"), *((name, name) for name in _ADVANCED)),
        ),
        "ClipLoaderGGUF": ("CLIPLoaderGGUF", _CLIP),
        "DualClipLoaderGGUF": ("DualCLIPLoaderGGUF", _CLIP_2),
        "TripleClipLoaderGGUF": ("TripleCLIPLoaderGGUF", _CLIP_3),
        "QuadrupleClipLoaderGGUF": ("QuadrupleCLIPLoaderGGUF", _CLIP_4),
        "VaeGGUF": ("VAELoaderGGUF", (("vae_name", "vae_name"),)),
        # molbal/ComfyUI-GGUF; here every loader works with dynamic VRAM
        "UnetLoaderGGUFDynamicVRAM": ("UnetLoaderGGUF", (("unet_name", "unet_name"),)),
        "CLIPLoaderGGUFDynamicVRAM": ("CLIPLoaderGGUF", _CLIP),
        "DualCLIPLoaderGGUFDynamicVRAM": ("DualCLIPLoaderGGUF", _CLIP_2),
        "TripleCLIPLoaderGGUFDynamicVRAM": ("TripleCLIPLoaderGGUF", _CLIP_3),
        "QuadrupleCLIPLoaderGGUFDynamicVRAM": ("QuadrupleCLIPLoaderGGUF", _CLIP_4),
    }
)


def offer_replacements() -> None:
    """Register them with the host, if it has node replacement."""
    server = running_server()
    manager = getattr(server, "node_replace_manager", None)
    if server is None or manager is None:
        return
    from comfy_api.latest import io  # only in hosts that have it

    server.add_on_prompt_handler(_with_meta)
    for old_id, (new_id, pairs) in REPLACEMENTS.items():
        manager.register(
            io.NodeReplace(
                new_node_id=new_id,
                old_node_id=old_id,
                old_widget_ids=[theirs for theirs, _ in pairs],
                input_mapping=[{"new_id": ours, "old_id": theirs} for theirs, ours in pairs],
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )


def _with_meta(request: dict[str, Any]) -> dict[str, Any]:
    """A request to run a prompt in which every node that may be replaced has the "_meta" that the host copies."""
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and node.get("class_type") in REPLACEMENTS:
            node.setdefault("_meta", {})
    return request
