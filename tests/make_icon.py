# SPDX-License-Identifier: Apache-2.0
"""Draws the mark of the project: a G of blocks, coloured by a gradient that was rounded to few levels.

    python tests/make_icon.py        writes docs/icon.png (400 x 400) and docs/banner.png (1260 x 540)

The registry shows both (pyproject.toml, [tool.comfy]); its limits are in tests/unit/test_registry.py.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

DOCS = Path(__file__).resolve().parent.parent / "docs"
LETTER = (".####", "#....", "#.###", "#...#", ".####")
GROUND = (17, 24, 39)
DIM = (38, 50, 71)  # blocks beside the letter
LEVELS = ((56, 189, 248), (45, 212, 191), (163, 230, 53), (250, 204, 21))  # of the gradient, top left to bottom right
FINER = 4  # drawn this much larger and scaled down, for smooth corners
SIZE = 400
WIDTH, HEIGHT = 1260, 540
COLOURS = 48  # smooth corners need no more, and the files stay small


def level(column: int, row: int, n_columns: int, n_rows: int) -> tuple[int, int, int]:
    """Colour of a block: its place on the diagonal, rounded to one of LEVELS."""
    place = (column + row) / (n_columns + n_rows - 2)
    return LEVELS[min(int(place * len(LEVELS)), len(LEVELS) - 1)]


def draw_block(draw: ImageDraw.ImageDraw, left: float, top: float, side: float, colour: tuple[int, int, int]) -> None:
    """One block with round corners; places and lengths in pixels of the final picture."""
    box = [FINER * value for value in (left, top, left + side, top + side)]
    draw.rounded_rectangle(box, radius=FINER * side * 0.2, fill=colour)


def draw_mark(draw: ImageDraw.ImageDraw, left: float, top: float, side: float) -> None:
    """The letter in a square of side pixels."""
    gap = side * 0.035
    step = (side + gap) / len(LETTER)
    for row, line in enumerate(LETTER):
        for column, character in enumerate(line):
            colour = level(column, row, len(line), len(LETTER)) if character == "#" else DIM
            draw_block(draw, left + column * step, top + row * step, step - gap, colour)


def save(picture: Image.Image, size: tuple[int, int], name: str) -> None:
    """Scale a picture down and write it with few colours."""
    small = picture.resize(size, Image.Resampling.LANCZOS)
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)


def draw_icon() -> Image.Image:
    """The mark alone."""
    picture = Image.new("RGB", (FINER * SIZE, FINER * SIZE), GROUND)
    draw_mark(ImageDraw.Draw(picture), 50, 50, 300)
    return picture


def draw_banner() -> Image.Image:
    """The mark, and beside it fields that get coarser: 16, 8, 4 and 2 rows of blocks in the same height."""
    picture = Image.new("RGB", (FINER * WIDTH, FINER * HEIGHT), GROUND)
    draw = ImageDraw.Draw(picture)
    top, height, left = 120, 300, 530.0
    draw_mark(draw, 120, top, height)
    for n_rows, n_columns, gap in ((16, 8, 3), (8, 4, 6), (4, 2, 10), (2, 1, 10)):
        step = (height + gap) / n_rows
        for column in range(n_columns):
            for row in range(n_rows):
                colour = level(column, row, n_columns, n_rows)
                draw_block(draw, left + column * step, top + row * step, step - gap, colour)
        left += n_columns * step + 18
    return picture


if __name__ == "__main__":
    save(draw_icon(), (SIZE, SIZE), "icon.png")
    save(draw_banner(), (WIDTH, HEIGHT), "banner.png")
