# SPDX-License-Identifier: Apache-2.0
"""Writes the table of architectures in docs/models.md, from their entries and from what was tested with which ComfyUI.

    python tests/make_arch_table.py                         # the table, from tests/data/tested_hosts.txt
    COMFYUI_PATH=... python tests/make_arch_table.py --host  # first what this ComfyUI has, into tested_hosts.txt

tested_hosts.txt has a line for each ComfyUI, `VERSION: title, title`: the models of the pack's entries that the host
tests load and convert there (tests/host/test_architectures.py). A host test compares it with the running ComfyUI.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from readme_blocks import DOCS, replace_between, rewrite

ROOT = Path(__file__).resolve().parent.parent
PAGE = DOCS / "models.md"
TESTED = ROOT / "tests" / "data" / "tested_hosts.txt"
BEGIN, END = "<!-- begin of the table of architectures -->", "<!-- end of the table of architectures -->"
UNKNOWN = "unrecognised model"


def read_tested() -> dict[str, list[str]]:
    """ComfyUI's version -> titles of the models that were tested with it, oldest version first."""
    lines = TESTED.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    return {version: titles.split(", ") for version, titles in pairs}


def write_tested(tested: Mapping[str, Sequence[str]]) -> None:
    """The reverse of read_tested()."""
    versions = sorted(tested, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])
    lines = [f"{version}: {', '.join(tested[version])}" for version in versions]
    TESTED.write_text("\n".join(["# SPDX-License-Identifier: Apache-2.0", *lines]) + "\n", encoding="utf-8")


def running_host() -> tuple[str, list[str]]:
    """Version of the ComfyUI of COMFYUI_PATH, and the titles of the models that the host tests have for it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "host")]
    import conftest  # noqa: F401
    from comfyui_version import __version__
    from small_model_table import SMALL_MODELS
    from small_video_table import SMALL_VIDEO_MODELS

    rows = [*SMALL_MODELS.values(), *SMALL_VIDEO_MODELS.values()]
    return __version__, sorted({row.title for row in rows if row.known} - {UNKNOWN})


def make_table() -> str:
    """The table in Markdown: a line for each architecture and each set of versions that it was tested with."""
    from gguf_kit.models import archs

    tested = read_tested()
    rows: dict[tuple[str, tuple[str, ...], bool], list[str]] = {}
    for arch in archs.ARCHS:
        versions = tuple(version for version, titles in tested.items() if arch.title in titles)
        titles = rows.setdefault((arch.name, versions, bool(arch.reject)), [])
        if arch.title not in titles:
            titles.append(arch.title)
    lines = ["| models | load | convert, as `--arch` | tested with ComfyUI |", "|---|---|---|---|"]
    for (name, versions, is_refused), titles in sorted(rows.items(), key=lambda row: row[1][0].lower()):
        load = "refused with a reason" if is_refused else "yes" if versions else "as ComfyUI has it"
        convert = "from diffusers layout to the original" if is_refused else f"own policy, `{name}`"
        lines.append(f"| {', '.join(titles)} | {load} | {convert} | {', '.join(versions) or '-'} |")
    return "\n".join([*lines, f"| any other that ComfyUI recognises | yes | {general_policy()} | |"])


def general_policy() -> str:
    """What the last line says of models without an entry."""
    from gguf_kit.models import archs

    return f"general policy, `{archs.GENERIC.name}`"


def replace_block(text: str, table: str) -> str:
    """The page with the table between its markers."""
    return replace_between(text, BEGIN, END, table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: record the running ComfyUI if asked to, then write the table."""
    sys.path.insert(0, str(ROOT / "tools"))
    import _pack  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="record the models that the ComfyUI of COMFYUI_PATH has")
    if parser.parse_args(argv).host:
        version, titles = running_host()
        write_tested({**(read_tested() if TESTED.exists() else {}), version: titles})
    rewrite(PAGE, BEGIN, END, make_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
