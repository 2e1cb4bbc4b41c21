# SPDX-License-Identifier: Apache-2.0
"""The contact sheet: one row per type, one column per prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ENLARGE = 2
GAP = 6
LABEL_WIDTH = 190
TITLE_HEIGHT = 40
FONT_SIZE = 20
BACKGROUND = (60, 60, 60)
TEXT = (255, 255, 255)


def write_contact_sheet(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[bytes]]]) -> None:
    """Write PNG pictures of one size as a labelled table.

    Args:
        path: the PNG to write.
        columns: titles.
        rows: label and one PNG per column; a label's lines are drawn below each other.
    """
    size = Image.open(io.BytesIO(rows[0][1][0])).width * ENLARGE
    sheet = Image.new(
        "RGB", (LABEL_WIDTH + len(columns) * (size + GAP), TITLE_HEIGHT + len(rows) * (size + GAP)), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for x, title in enumerate(columns):
        draw.text((LABEL_WIDTH + x * (size + GAP) + size // 2, TITLE_HEIGHT // 2), title, TEXT, font, anchor="mm")
    for y, (label, pictures) in enumerate(rows):
        top = TITLE_HEIGHT + y * (size + GAP)
        draw.multiline_text((12, top + size // 2), label, TEXT, font, anchor="lm", spacing=8)
        for x, png in enumerate(pictures):
            picture = Image.open(io.BytesIO(png)).convert("RGB").resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL_WIDTH + x * (size + GAP), top))
    sheet.save(path, optimize=True)
