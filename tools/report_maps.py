# SPDX-License-Identifier: Apache-2.0
"""Heat maps of a report: what each tensor adds to the error, blocks from left to right, kinds of tensors from the top.

Every stack of blocks has a panel of its own, tensors outside the blocks another. One scale of colours for all panels,
logarithmic; grey is no error, a blank place no such tensor. Where cells are wide enough they show their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from gguf_kit.tools.report_data import OUTSIDE, Stack
from gguf_kit.tools.report_style import (
    EMPTY,
    GRID,
    INK,
    MUTED,
    SMALL,
    TEXT,
    add_axes,
    amounts,
    letters,
    new_figure,
    text_style,
    text_width,
)
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

CELL_HEIGHT = 0.21  # inches, as all lengths here
CELL_WIDTHS = (0.11, 0.56)  # least and most
CELLS_WIDTH = 9.5  # of a row of cells, where that fits these
NUMBERS_FROM = 0.45  # width of a cell that shows its number
TOP, BOTTOM, GAP, PANEL_TITLE, TICKS = 0.72, 0.3, 0.12, 0.26, 0.22
BAR_WIDTH, BAR_MARGIN, BAR_HEIGHT, BAR_LABELS = 0.14, 0.3, 3.0, 0.95
LEAST_BAR = 2.6  # so that its label fits
LEAST_WIDTH = 7.2
DECADES = 2  # of a map's own scale; less is drawn like the least
SHARED_DECADES = 3  # of a scale for several maps
LABEL = 44  # letters of a row's label


@dataclass(frozen=True)
class HeatMap:
    """What one heat map shows.

    Attributes:
        title, subtitle: what is shown, and how to read it.
        unit: label of the scale.
        values: tensor's name -> value; 0 is no error, a tensor without a value is left blank.
        show: a value as it is written into a cell, on five letters at most.
    """

    title: str
    subtitle: str
    unit: str
    values: Mapping[str, float]
    show: Callable[[float], str]


@dataclass(frozen=True)
class _Layout:
    """Lengths in inches: of the columns of labels, of a cell, of the whole."""

    categories: float
    labels: float
    cell: float
    width: float
    height: float


def make_norm(values: Sequence[float], decades: float = DECADES) -> LogNorm:
    """The scale for maps of these values: up to the largest, over so many powers of ten at most."""
    positive = [value for value in values if value > 0]
    largest = max(positive, default=1.0)
    smallest = max(min(positive, default=largest), largest / 10**decades)
    return LogNorm(smallest if smallest < largest else largest / 10, largest)


def draw_heat_map(heat_map: HeatMap, stacks: Sequence[Stack], norm: LogNorm | None = None) -> Figure:
    """One heat map with a panel for each stack."""
    norm = norm or make_norm([*heat_map.values.values()])
    layout = _layout(stacks)
    figure = new_figure(layout.width, layout.height, heat_map.title, heat_map.subtitle)
    left, top = layout.categories + layout.labels + GAP, TOP
    for stack in stacks:
        size = len(stack.blocks) * layout.cell, len(stack.rows) * CELL_HEIGHT
        axes = add_axes(figure, left, top + PANEL_TITLE, *size)
        _draw_cells(axes, stack, heat_map, norm, layout)
        _draw_labels(axes, stack, layout)
        top += _panel_height(stack)
    _draw_bar(figure, norm, heat_map.unit, layout)
    return figure


def _layout(stacks: Sequence[Stack]) -> _Layout:
    categories = max(text_width(category, SMALL) for stack in stacks for category, _ in stack.rows) + GAP
    labels = max(text_width(letters(name, LABEL), SMALL) for stack in stacks for _, name in stack.rows) + 2 * GAP
    n_columns = max(len(stack.blocks) for stack in stacks)
    cell = min(max(CELLS_WIDTH / n_columns, CELL_WIDTHS[0]), CELL_WIDTHS[1])
    width = categories + labels + GAP + n_columns * cell + BAR_MARGIN + BAR_WIDTH + BAR_LABELS
    height = TOP + sum(map(_panel_height, stacks)) + BOTTOM
    return _Layout(
        categories, labels, cell, max(width, LEAST_WIDTH), max(height, TOP + PANEL_TITLE + LEAST_BAR + BOTTOM)
    )


def _panel_height(stack: Stack) -> float:
    return PANEL_TITLE + len(stack.rows) * CELL_HEIGHT + TICKS + GAP


def _draw_cells(axes: Axes, stack: Stack, heat_map: HeatMap, norm: LogNorm, layout: _Layout) -> None:
    """Colours of the cells, white lines between them, and numbers where they fit."""
    values = np.array([[_value(heat_map, name) for name in row] for row in stack.names])  # (n_rows, n_blocks)
    extent = (0, len(stack.blocks), len(stack.rows), 0)
    zeros = np.ma.masked_where(~(values <= 0), np.zeros_like(values))
    errors = np.ma.masked_where(~(values > 0), values)
    axes.imshow(zeros, ListedColormap([EMPTY]), aspect="auto", interpolation="nearest", extent=extent)
    image = axes.imshow(errors, amounts("magma_r"), norm, aspect="auto", interpolation="nearest", extent=extent)
    lines: dict[str, Any] = {"color": "white", "linewidth": 0.8 if layout.cell > 0.15 else 0.4}
    axes.vlines(range(1, len(stack.blocks)), 0, len(stack.rows), **lines)
    axes.hlines(range(1, len(stack.rows)), 0, len(stack.blocks), **lines)
    if layout.cell < NUMBERS_FROM:
        return
    for y, x in zip(*np.nonzero(values >= 0), strict=True):
        value = float(values[y, x])
        red, green, blue, _ = image.cmap(norm(value)) if value > 0 else (1, 1, 1, 1)
        color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
        place: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
        axes.text(x + 0.5, y + 0.52, heat_map.show(value), size=SMALL - 0.5, **text_style(**place))


def _value(heat_map: HeatMap, name: str | None) -> float:
    """A cell's value, nan where there is nothing to show."""
    return heat_map.values.get(name, math.nan) if name is not None else math.nan


def _draw_labels(axes: Axes, stack: Stack, layout: _Layout) -> None:
    """The panel's title, names of rows under their categories, and numbers of blocks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks([])
    per_inch = 1 / layout.cell  # in units of the axes
    title = letters(stack.title, 60)
    if stack.title != OUTSIDE:
        title += f", {len(stack.blocks)} block{'s' if len(stack.blocks) > 1 else ''}"
    if stack.n_left_out:
        title += f"; {stack.n_left_out} more rows are not shown"
    start = -(layout.labels + layout.categories) * per_inch
    axes.text(start, -0.35, title, size=TEXT, weight="bold", **text_style(va="bottom"))
    for y, (_, name) in enumerate(stack.rows):
        axes.text(-GAP * per_inch, y + 0.52, letters(name, LABEL), size=SMALL, **text_style(ha="right", va="center"))
    y = 0
    for category, rows in groupby(category for category, _ in stack.rows):
        axes.text(start, y + 0.52, category, size=SMALL, **text_style(color=MUTED, va="center"))
        axes.plot([start, -GAP * per_inch / 2], [y, y], color=GRID, linewidth=0.7, clip_on=False)
        y += len(list(rows))
    axes.set_xlim(0, len(stack.blocks))
    axes.set_ylim(len(stack.rows), 0)
    step = max(1, math.ceil(0.22 / layout.cell))
    places = range(0, len(stack.blocks), step) if stack.title != OUTSIDE else range(0)
    axes.set_xticks([x + 0.5 for x in places], [str(stack.blocks[x]) for x in places])
    axes.tick_params(axis="x", length=0, pad=2, labelsize=SMALL - 0.5)
    if stack.title != OUTSIDE:
        place: dict[str, Any] = {"ha": "right", "va": "top", "color": MUTED}
        axes.text(-GAP * per_inch, len(stack.rows) + 0.2, "block", size=SMALL - 0.5, **text_style(**place))


def _draw_bar(figure: Figure, norm: LogNorm, unit: str, layout: _Layout) -> None:
    """The scale of colours, at the right."""
    height = min(BAR_HEIGHT, layout.height - TOP - PANEL_TITLE - BOTTOM)
    left = layout.width - BAR_LABELS - BAR_WIDTH
    axes = add_axes(figure, left, TOP + PANEL_TITLE, BAR_WIDTH, height)
    bar = figure.colorbar(ScalarMappable(norm, amounts("magma_r")), axes, format=FuncFormatter(lambda v, _: f"{v:g}"))
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=SMALL, colors=INK, length=2)
    axes.tick_params(which="minor", length=0)
    axes.set_ylabel(unit, size=SMALL, **text_style(color=MUTED))
