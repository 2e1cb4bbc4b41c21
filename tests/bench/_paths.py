# SPDX-License-Identifier: Apache-2.0
"""Makes the pack importable as `gguf_kit`, and what the tests share. The first import of every benchmark."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
sys.path.append(str(ROOT))  # last: a host has a module `nodes` too

import _pack  # noqa: E402, F401
