# SPDX-License-Identifier: Apache-2.0
"""The parts of the READMEs and of docs/ that scripts write: what stands between a pair of markers."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCS = ROOT / "docs"


def replace_between(text: str, begin: str, end: str, written: str) -> str:
    """A text with what a script wrote between two markers.

    Raises:
        SystemExit: there are no markers.
    """
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"the text has no {begin} and {end}")
    return f"{head}{begin}\n{written}\n{end}{tail}"


def rewrite(path: Path, begin: str, end: str, written: str) -> None:
    """The same in a file."""
    path.write_text(replace_between(path.read_text(encoding="utf-8"), begin, end, written), encoding="utf-8")
