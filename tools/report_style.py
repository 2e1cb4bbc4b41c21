# SPDX-License-Identifier: Apache-2.0
"""How the drawings of a report look: colours, sizes of letters, empty figures, figures as PNG.

Colours can be told apart by colour-blind readers: for series those of Okabe and Ito, for amounts one of matplotlib's
even scales. Letters in a figure are printable ASCII, which every font has, and never read as formulas.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from gguf_kit.errors import plain_text
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

DPI = 130
INK, MUTED, GRID, EMPTY = "#222222", "#6b6b6b", "#dddddd", "#e9e9e9"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
SERIES = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)
TITLE, TEXT, SMALL = 11.0, 8.5, 7.5  # points
LETTER = 0.0092  # width of a letter in inches per point, on average
FONT = "DejaVu Sans"  # matplotlib brings it along


def amounts(name: str, first: float = 0.03, last: float = 0.9) -> Colormap:
    """A part of one of matplotlib's scales, without the ends that are hard to see on white."""
    return ListedColormap(colormaps[name](np.linspace(first, last, 256)))


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """An empty figure of a size in inches, with its title at the top left."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.12 / height, letters(title, 110), size=TITLE, weight="bold", **text_style(va="top"))
    figure.text(0.12 / width, 1 - 0.36 / height, subtitle, size=TEXT, **text_style(color=MUTED, va="top"))
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, counted from the figure's left and top."""
    whole_width, whole_height = figure.get_size_inches()
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(box)
    axes.set_facecolor("white")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(labelsize=SMALL, colors=INK, labelfontfamily=FONT, color=MUTED, length=3)
    return axes


def text_style(**changes: Any) -> dict[str, Any]:
    """Options of every text in a figure."""
    return {"family": FONT, "color": INK, "parse_math": False, **changes}


def letters(text: str, most: int = 48) -> str:
    """Text from a file as a figure can hold it: printable ASCII, cut in the middle where it is long."""
    shown = plain_text(text).encode("ascii", "backslashreplace").decode("ascii")
    half = (most - 3) // 2
    return shown if len(shown) <= most else f"{shown[:half]}...{shown[len(shown) - half :]}"


def text_width(text: str, points: float = TEXT) -> float:
    """About how wide a line of text is, in inches."""
    return len(text) * points * LETTER


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
