# SPDX-License-Identifier: Apache-2.0
"""Key lists of real models, and the compact text that tests/data/models/NAME.keys keeps them in.

A line is a key and its shape in torch order, `img_in.weight 3072 64`; a scalar has no numbers. `{0..18}` in a key
stands for each number of the range. Lines in a row that are equal up to a range are repeated together, number by
number, as the blocks of a model are; so reading gives the keys in the model's own order. Lines that start with # are
comments.
tests/make_keys.py writes these files; this module only knows the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

Shape = tuple[int, ...]

FOLDER = Path(__file__).resolve().parent / "data" / "models"
ENCODER = "te-"  # names of text encoders start so
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# "block" as in blocks.block0.blocks.1, one model's way to number.
NUMBER = re.compile(r"(?:(?<=\.)|(?<=\.block))\d+(?=\.)")


def list_names() -> list[str]:
    """Names of the diffusion models that are stored."""
    return sorted(path.stem for path in FOLDER.glob("*.keys") if not path.stem.startswith(ENCODER))


def list_encoders() -> list[str]:
    """Names of the text encoders that are stored."""
    return sorted(path.stem for path in FOLDER.glob(f"{ENCODER}*.keys"))


def read_keys(name: str) -> dict[str, Shape]:
    """Key to shape of a stored model, in the model's order."""
    text = (FOLDER / f"{name}.keys").read_text(encoding="utf-8")
    return parse_keys(line for line in text.splitlines() if line and not line.startswith("#"))


def parse_keys(lines: Iterable[str]) -> dict[str, Shape]:
    """Expand lines without comments; a key that occurs twice is an error."""
    keys: dict[str, Shape] = {}
    for line in _expand(list(lines)):
        key, *dims = line.split(" ")
        if key in keys:
            raise ValueError(f"key {key} occurs twice")
        keys[key] = tuple(int(n) for n in dims)
    return keys


def format_keys(keys: Iterable[tuple[str, Shape]]) -> list[str]:
    """Lines for keys in their order; consecutive blocks with equal keys and shapes become a range."""
    return _fold("", [" ".join([key, *(str(n) for n in shape)]) for key, shape in keys])


def _expand(lines: Sequence[str]) -> list[str]:
    expanded: list[str] = []
    for head, group in groupby(lines, _first_range):
        if not head:
            expanded += group
            continue
        same = [line.removeprefix(head) for line in group]
        before, first, last = RANGE.split(head)[:3]
        for number in range(int(first), int(last) + 1):
            expanded += _expand([f"{before}{number}{rest}" for rest in same])
    return expanded


def _first_range(line: str) -> str:
    """The line up to and with its first range, "" if it has none."""
    found = RANGE.search(line)
    return line[: found.end()] if found else ""


def _fold(done: str, lines: Sequence[str]) -> list[str]:
    """Fold lines that all start with `done`, which is final; looks at the first block number behind it."""
    folded: list[str] = []
    for head, group in groupby(lines, lambda line: _first_number(line, len(done))):
        if not head:
            folded += group
            continue
        for first, last, rests in _runs(_split_blocks([line.removeprefix(head) for line in group])):
            label = f"{{{first}..{last}}}" if last > first else str(first)
            folded += _fold(head + label, [head + label + rest for rest in rests])
    return folded


def _first_number(line: str, start: int) -> str:
    """The line up to its first block number at or behind `start`, "" if there is none."""
    found = NUMBER.search(line, start)
    return line[: found.start()] if found else ""


def _split_blocks(lines: Sequence[str]) -> list[tuple[int, list[str]]]:
    """(block number, what follows it in each line) of lines that begin with a block number."""
    split = [line.partition(".") for line in lines]
    return [(int(n), [dot + rest for _, dot, rest in block]) for n, block in groupby(split, lambda part: part[0])]


def _runs(blocks: Sequence[tuple[int, list[str]]]) -> list[tuple[int, int, list[str]]]:
    """(first, last, contents) of runs of consecutive numbers with equal contents."""
    runs: list[tuple[int, int, list[str]]] = []
    for number, rests in blocks:
        if runs and runs[-1][1] == number - 1 and runs[-1][2] == rests:
            runs[-1] = (runs[-1][0], number, rests)
        else:
            runs.append((number, number, rests))
    return runs
