# SPDX-License-Identifier: Apache-2.0
"""GGUF Kit for ComfyUI: the host imports this file and reads its three names.

Outside a host (tests, tools) this file is not imported as a package, and nothing happens.
"""

if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
