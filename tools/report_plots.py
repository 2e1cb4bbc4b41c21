# SPDX-License-Identifier: Apache-2.0
"""Diagrams of a report: error against size, measured against predicted errors, and which types each category has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGMLQuantizationType as QType
from gguf_kit.layouts import bpw
from gguf_kit.tools.report_data import Measured, Selection, count_types
from gguf_kit.tools.report_style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    SERIES,
    SKY,
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
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

WIDTH, PLOT_HEIGHT = 9.6, 4.9  # inches, as all lengths here
LEFT, TOP, RIGHT, BOTTOM = 0.85, 1.05, 0.25, 1.05
NICE = (1, 1.5, 2, 3, 4, 5, 6, 8)  # times powers of ten: ticks of the logarithmic axes
MAX_TICKS = 12
# Where a label may stand beside its point, in points; the first that is free.
PLACES = tuple((x, y) for distance in (1, 2, 3.2) for x, y in [
    (6 * distance, 4 * distance), (-6 * distance, -4 * distance), (6 * distance, -5 * distance), (0, 9 * distance),
    (-6 * distance, 5 * distance), (0, -9 * distance),
])  # fmt: skip
ROW_HEIGHT = 0.34

Color = tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """Points of one kind in a diagram.

    Attributes:
        label: in the legend.
        points: (megabytes, error, name) of each; errors are above 0.
        color, marker: how they look; "" for a line without points.
        filled: points are full, not hollow.
        named: points have their names beside them.
    """

    label: str
    points: tuple[tuple[float, float, str], ...]
    color: str
    marker: str = ""
    filled: bool = True
    named: bool = False


def predicted_series(
    frontiers: Mapping[str, Sequence[tuple[int, float]]],
    fixed: Sequence[Selection],
    fixed_with_imatrix: Sequence[Selection],
    chosen: Sequence[Selection],
) -> list[Series]:
    """What the costs say: the best of every size, the fixed types, the chosen recipes.

    Args:
        frontiers: label -> (bytes of all tensors of the file, squared error) of the best choices.
    """
    found = []
    for (label, frontier), color in zip(frontiers.items(), (BLUE, SKY, GREEN), strict=False):
        if best := tuple((n_bytes / 1e6, math.sqrt(error), "") for n_bytes, error in frontier if error > 0):
            found.append(Series(label, best, color))
    for label, group, marker, filled in (
        ("fixed types", fixed, "o", False),
        ("fixed types, as the importance matrix serves them best", fixed_with_imatrix, "^", False),
    ):
        if points := _points(group):
            found.append(Series(f"predicted: {label}", points, MUTED, marker, filled, named=group is fixed))
    if points := _points(chosen):
        found.append(Series("predicted: chosen recipes", points, SERIES[0], "D", True, named=True))
    return found


def _points(selections: Iterable[Selection]) -> tuple[tuple[float, float, str], ...]:
    return tuple((each.megabytes, each.rms, each.name) for each in selections if each.error > 0)


def measured_series(rows: Iterable[Measured], chosen: Iterable[str], named: bool) -> list[Series]:
    """What sampling gave: of the chosen recipes and of the others."""
    usable = [row for row in rows if row.mb and row.latent_error]
    names = set(chosen)
    found = []
    for label, color, group in (
        ("measured: chosen recipes", SERIES[0], [row for row in usable if row.type in names]),
        ("measured: other files", INK, [row for row in usable if row.type not in names]),
    ):
        points = tuple((row.mb or 0.0, row.latent_error or 0.0, row.type) for row in group)
        if points:
            found.append(Series(label, points, color, "x", True, named))
    return found


def draw_sizes(panels: Sequence[tuple[str, Sequence[Series]]], n_weights: int, title: str, subtitle: str) -> Figure:
    """Error against size, one panel below the other.

    Args:
        panels: label of the error axis, and what the panel shows.
        n_weights: of the file, for the axis of bits per weight.
    """
    step = PLOT_HEIGHT + BOTTOM + 0.45
    figure = new_figure(WIDTH, TOP + step * len(panels), title, subtitle)
    for i, (label, series) in enumerate(panels):
        axes = add_axes(figure, LEFT, TOP + i * step, WIDTH - LEFT - RIGHT, PLOT_HEIGHT)
        _draw_series(axes, series)
        axes.set_ylabel(label, size=TEXT, **text_style())
        _logarithmic(axes, "size of all tensors (MB)")
        _add_bpw_axis(axes, n_weights)
        _name_points(figure, axes, series)
        _legend(axes, (-LEFT + 0.15) / (WIDTH - LEFT - RIGHT))
    return figure


def _draw_series(axes: Axes, series: Sequence[Series]) -> None:
    """Lines and points; the view is that of the points, as lines go on to files without any error."""
    for each in series:
        x, y = [point[0] for point in each.points], [point[1] for point in each.points]
        if not each.marker:
            axes.plot(x, y, color=each.color, linewidth=1.6, label=each.label, drawstyle="steps-post")
            continue
        face = each.color if each.filled else "white"
        style: dict[str, Any] = {"s": 34, "linewidth": 1.3, "zorder": 3}
        if each.marker == "x":
            axes.scatter(x, y, marker="x", color=each.color, label=each.label, **style)
        else:
            axes.scatter(x, y, marker=each.marker, facecolor=face, edgecolor=each.color, label=each.label, **style)
    shown = [point for each in series if each.marker for point in each.points]
    shown = shown or [point for each in series for point in each.points]
    if shown:
        sizes, errors = [point[0] for point in shown], [point[1] for point in shown]
        axes.set_xlim(min(sizes) / 1.12, max(sizes) * 1.18)
        axes.set_ylim(min(errors) / 1.6, max(errors) * 1.6)


def _logarithmic(axes: Axes, size_label: str) -> None:
    """Both axes logarithmic, with ticks at round numbers."""
    for axis, limits, scale in (
        (axes.xaxis, axes.get_xlim(), axes.set_xscale),
        (axes.yaxis, axes.get_ylim(), axes.set_yscale),
    ):
        scale("log")
        axis.set_major_locator(FixedLocator(round_numbers(*limits)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(size_label, size=TEXT, **text_style())


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks between two positive numbers: all of NICE where these are few enough, else only 1, 2 and 5, or 1."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    found: list[float] = []
    for digits in (NICE, (1, 2, 5), (1,)):
        found = [digit * 10.0**power for power in decades for digit in digits]
        found = [float(f"{value:.3g}") for value in found if low <= value <= high]
        if len(found) <= MAX_TICKS:
            break
    return found


def _add_bpw_axis(axes: Axes, n_weights: int) -> None:
    """The same sizes in bits per weight, above."""
    bits = 8e6 / n_weights  # per weight, of one megabyte

    def to_bits(megabytes: Any) -> Any:
        return megabytes * bits

    def to_megabytes(per_weight: Any) -> Any:
        return per_weight / bits

    above = axes.secondary_xaxis("top", functions=(to_bits, to_megabytes))
    low, high = (limit * bits for limit in axes.get_xlim())
    above.xaxis.set_major_locator(FixedLocator(round_numbers(low, high)))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    above.tick_params(labelsize=SMALL, colors=MUTED, length=3)
    above.spines["top"].set_visible(False)
    above.set_xlabel("bits per weight", size=SMALL, **text_style(color=MUTED))


def _legend(axes: Axes, left: float) -> None:
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (left, -0.1), "ncols": 3}
    axes.legend(**place, frameon=False, prop={"family": "DejaVu Sans", "size": SMALL}, labelcolor=INK)


def _name_points(figure: Figure, axes: Axes, series: Sequence[Series]) -> None:
    """Names beside points where they cover neither points nor other names."""
    taken = [
        Bbox.from_bounds(x - 5, y - 5, 10, 10)
        for each in series
        if each.marker
        for x, y in axes.transData.transform([point[:2] for point in each.points])
    ]
    edge = axes.get_window_extent()
    for each in sorted((each for each in series if each.named), key=lambda each: each.color == MUTED):
        for x, y, name in each.points:
            text = letters(name, 26)
            for place in PLACES:
                label = _annotate(axes, text, (x, y), place, each.color)
                box = label.get_window_extent()
                inside = edge.x0 <= box.x0 and box.x1 <= edge.x1 + 12 and edge.y0 <= box.y0 and box.y1 <= edge.y1
                if inside and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                label.remove()


def _annotate(axes: Axes, text: str, at: tuple[float, float], place: tuple[float, float], color: str) -> Annotation:
    """A name at a distance of its point, with a thin line where that is far."""
    side = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
    far = abs(place[0]) + abs(place[1]) > 18
    line: dict[str, Any] | None = {"arrowstyle": "-", "color": GRID, "linewidth": 0.8, "shrinkB": 3} if far else None
    style = text_style(color=color, ha=side, va="center")
    return axes.annotate(
        text, at, xytext=place, textcoords="offset points", size=SMALL, arrowprops=line, annotation_clip=False, **style
    )


def draw_agreement(
    pairs: Sequence[tuple[str, float, float]], chosen: Iterable[str], title: str, subtitle: str
) -> Figure:
    """Measured against predicted errors, on equal logarithmic axes.

    Args:
        pairs: (name, predicted, measured) relative errors of the latents, all above 0.
        chosen: names of the recipes that are set apart by colour.
    """
    size = 5.6
    figure = new_figure(LEFT + size + 1.6, TOP + size + 0.75, title, subtitle)
    axes = add_axes(figure, LEFT, TOP - 0.2, size, size)
    names = set(chosen)
    groups = (
        ("chosen recipes", SERIES[0], "D", [p for p in pairs if p[0] in names]),
        ("fixed types", MUTED, "o", [p for p in pairs if p[0] not in names]),
    )
    series = [
        Series(label, tuple((p, m, name) for name, p, m in group), color, marker, marker == "D", named=True)
        for label, color, marker, group in groups
        if group
    ]
    _draw_series(axes, series)
    values = [value for _, predicted, measured in pairs for value in (predicted, measured)]
    limits = min(values) / 1.4, max(values) * 1.4
    axes.plot(limits, limits, color=BLUE, linewidth=1, label="equal", zorder=1)
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    _logarithmic(axes, "predicted relative error of the latents")
    axes.set_ylabel("measured relative error of the latents", size=TEXT, **text_style())
    _name_points(figure, axes, series)
    _legend(axes, 0.0)
    return figure


def draw_types(selection: Selection, title: str, subtitle: str) -> Figure:
    """For each category the part of its weights that each type has."""
    counts = count_types(selection)
    qtypes = sorted({qtype for row in counts.values() for qtype in row}, key=lambda q: (bpw(q), q.name))
    left = max((text_width(category) for category in counts), default=1) + 0.4
    height = len(counts) * ROW_HEIGHT
    figure = new_figure(WIDTH, TOP - 0.3 + height + 1.25, title, subtitle)
    axes = add_axes(figure, left, TOP - 0.3, WIDTH - left - 1.6, height)
    colors = type_colors(qtypes)
    for y, (category, row) in enumerate(counts.items()):
        total = sum(n_weights for _, n_weights in row.values())
        _draw_bar(axes, y, [(qtype, n_tensors, n / total) for qtype, (n_tensors, n) in row.items()], colors)
        axes.text(-0.01, y, category, size=TEXT, **text_style(ha="right", va="center"))
        axes.text(1.01, y, f"{total / 1e6:,.2f} M weights", size=SMALL, **text_style(color=MUTED, va="center"))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_xlabel("part of the category's weights", size=TEXT, **text_style())
    handles = [Patch(color=colors[qtype], label=f"{qtype.name} ({bpw(qtype):.4g} bpw)") for qtype in qtypes]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.5 / height), "ncols": 5}
    axes.legend(handles=handles, **place, frameon=False, prop={"family": "DejaVu Sans", "size": SMALL}, labelcolor=INK)
    return figure


def type_colors(qtypes: Sequence[QType]) -> dict[QType, Color]:
    """A colour for each type: the more bits, the darker; what is no quantization is grey."""
    scale, quantized = amounts("viridis_r", 0.02, 0.98), [qtype for qtype in qtypes if bpw(qtype) < 16]
    step = max(len(quantized) - 1, 1)
    colors: dict[QType, Color] = dict.fromkeys(qtypes, (0.72, 0.72, 0.72, 1.0))
    return colors | {qtype: scale(i / step) for i, qtype in enumerate(quantized)}


def _draw_bar(axes: Axes, y: int, parts: Sequence[tuple[QType, int, float]], colors: dict[QType, Color]) -> None:
    """One row of (type, tensors, part of the weights); a part that is wide enough says its type and tensors."""
    start = 0.0
    for qtype, n_tensors, part in parts:
        red, green, blue, _ = colors[qtype]
        axes.barh(y, part, left=start, height=0.74, color=colors[qtype], edgecolor="white", linewidth=0.8)
        text = f"{qtype.name}: {n_tensors}"
        text = text if text_width(text, SMALL) < 6.5 * part else str(n_tensors)
        if text_width(text, SMALL) < 6.5 * part:
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK
            axes.text(start + part / 2, y, text, size=SMALL, **text_style(color=color, ha="center", va="center"))
        start += part
