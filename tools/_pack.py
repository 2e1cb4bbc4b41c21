# SPDX-License-Identifier: Apache-2.0
"""Makes the pack importable as `gguf_kit` for command lines and tests, whatever its folder is called.

ComfyUI loads the pack under a path as module name; a tool or a test has no such name, so an empty package with the
root as its search path stands in. Importing this module is all there is to do.
"""

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

if "gguf_kit" not in sys.modules:
    package = ModuleType("gguf_kit")
    package.__path__ = [str(ROOT)]
    sys.modules["gguf_kit"] = package
