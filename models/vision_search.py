# SPDX-License-Identifier: Apache-2.0
"""Finds the vision part (mmproj) that lies beside a text encoder: what fits by its tensors, best name first."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import GGUFError
from ..gguf_file import GGUFFile
from ..layouts import LAYOUTS
from . import vision
from .split_files import first_part, open_gguf, without_later_parts
from .text_encoder_entry import TextEncoder
from .vision_table import VISION_PARTS

log = logging.getLogger("gguf_kit")

MAX_OPENED = 32  # files whose header is read in one search
MAX_GLANCES = 256  # files without "mmproj" in their name of which the first bytes are read
GLANCE_BYTES = 4096
MAX_PART_BYTES = 8 << 30
# "clip" as a value of type string, as llama.cpp writes it for general.architecture at the beginning of the file.
_CLIP = (8).to_bytes(4, "little") + (4).to_bytes(8, "little") + b"clip"

_QTYPE = r"(?:ud[-_. ])?(?:i?q\d(?:[-_](?:k|0|1|nl|xxs|xs|s|m|l|xl))*|bf16|fp?16|fp?32|tq\d_0|mxfp4|nvfp4)"
_NOT_THE_NAME = re.compile(
    rf"(?<![a-z0-9])(?:{_QTYPE}|ud|i1|imatrix|imat|mmproj|vision|visual|model|gguf|\d{{5}}[-_. ]of[-_. ]\d{{5}})"
    r"(?![a-z0-9])"
)
# Types that files are shared in, the one that models are trained in first; then by bits.
_PREFERRED = ("BF16", "F16", "F32")


def find(encoder_file: GGUFFile, encoder: TextEncoder) -> GGUFFile | None:
    """The vision part that belongs to a text encoder and lies in its folder, open; or None.

    Never raises for a neighbour that is damaged or of another model. Among several that fit, the one that shares most
    of the encoder's name is taken, then the one of the best type.
    """
    if encoder.vision not in VISION_PARTS:
        return None
    own = Path(encoder_file.path)
    named, others = _neighbours(own)
    fitting = _fitting(named, encoder_file, encoder) or _fitting(_said_clip(others), encoder_file, encoder)
    if not fitting:
        return None
    ranked = sorted(fitting, key=lambda file: _rank(own, file))
    if len(ranked) > 1:
        log.info("%s: %s chosen of %d vision parts that fit", own.name, Path(ranked[0].path).name, len(ranked))
    return ranked[0]


def model_name(path: Path) -> str:
    """What a file's name says of the model: letters and digits without type, part number and the word mmproj."""
    return re.sub(r"[^a-z0-9]", "", _NOT_THE_NAME.sub("", path.stem.lower()))


def likeness(one: Path, other: Path) -> float:
    """How much of their models' names two files share, 0 to 1."""
    return difflib.SequenceMatcher(None, model_name(one), model_name(other), autojunk=False).ratio()


def _neighbours(own: Path) -> tuple[list[Path], list[Path]]:
    """Other .gguf files of the folder that may be vision parts: those named so, and the rest, most alike first.

    Of a split file the first part stands for all.
    """
    try:
        with os.scandir(own.parent) as entries:
            found = {
                entry.name: Path(entry.path)
                for entry in entries
                if entry.name.lower().endswith(".gguf") and entry.is_file()
            }
    except OSError as error:
        log.info("%s: no look for a vision part beside it: %s", own.name, error.strerror)
        return [], []
    others = [found[name] for name in without_later_parts(found) if first_part(name) != first_part(own.name)]
    others.sort(key=lambda path: (-likeness(own, path), path.name))
    named = [path for path in others if "mmproj" in path.name.lower()]
    return named, [path for path in others if "mmproj" not in path.name.lower()]


def _said_clip(paths: Iterable[Path]) -> Iterator[Path]:
    """Files that say at their beginning that they are a vision part; text encoders are large and slow to open."""
    for path in list(paths)[:MAX_GLANCES]:
        try:
            with path.open("rb") as file:
                head = file.read(GLANCE_BYTES)
            if head.startswith(b"GGUF") and _CLIP in head and path.stat().st_size <= MAX_PART_BYTES:
                yield path
        except OSError:
            continue


def _fitting(paths: Iterable[Path], encoder_file: GGUFFile, encoder: TextEncoder) -> list[GGUFFile]:
    """The files among `paths` that are a vision part for the encoder."""
    fitting = []
    for path, _ in zip(paths, range(MAX_OPENED), strict=False):
        try:
            file = open_gguf(path)
            vision.check(file, encoder_file, encoder)
            fitting.append(file)
        except GGUFError as error:
            log.info("not taken for a vision part: %s", error)
    return fitting


def _rank(own: Path, file: GGUFFile) -> tuple[float, int, float, str]:
    path, qtype = Path(file.path), vision.main_qtype(file)
    bits = next((8 * row.type_size / row.block_size for kind, row in LAYOUTS.items() if kind.name == qtype), 0.0)
    place = _PREFERRED.index(qtype) if qtype in _PREFERRED else len(_PREFERRED)
    return -likeness(own, path), place, -bits, path.name
