# SPDX-License-Identifier: Apache-2.0
"""GGUF Kit for ComfyUI: the host imports this file and reads its three names.

Outside a host (tests, tools) this file is not imported as a package, and nothing happens.
"""

if __package__:
    from .host.other_packs import watch
    from .host.replacements import offer_replacements
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    watch(NODE_CLASS_MAPPINGS)
    offer_replacements()

    WEB_DIRECTORY = "web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
