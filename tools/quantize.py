# SPDX-License-Identifier: Apache-2.0
"""Quantize a GGUF file in BF16, F16 or F32: the second step of the classical two, after convert.py without --type.

    python tools/convert.py  --src flux1-dev.safetensors            writes flux1-dev-BF16.gguf
    python tools/quantize.py --src flux1-dev-BF16.gguf --type Q4_K_S

Takes the options of convert.py, and gives the same bytes as convert.py does in one step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.tools import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Command line, as convert.main."""
    return convert.main(argv, prog="quantize", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
