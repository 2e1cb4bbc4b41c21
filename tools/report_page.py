# SPDX-License-Identifier: Apache-2.0
"""What stands in a report: its sections, tables and pictures, put together from what is known about a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gguf.constants import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.sensitivity import TensorCosts
from gguf_kit.tools import report_maps, report_plots
from gguf_kit.tools.report_data import (
    WORST,
    Measured,
    Pick,
    Selection,
    compared_with,
    find_stacks,
    has_gains,
    pick_uniform,
)
from gguf_kit.tools.report_html import Section, Table, make_page
from gguf_kit.tools.report_style import letters, to_png

SUBJECT = "Q4_K_S"  # the fixed type that a report without recipes looks at closely
FILE = "file"
HEADER = (FILE, "MB", "bits/weight", "predicted error", "measured error", "PSNR dB", "SSIM", "against the fixed type")
TENSOR_HEADER = ("tensor", "category", "block", "type", "weighting", "bytes", "share of the error", "sampling error")
TENSOR_WORDS = frozenset({"tensor", "category", "type", "weighting"})


@dataclass(frozen=True)
class Facts:
    """Everything that a report is made from.

    Attributes:
        title: of the page.
        lines: what it was made from, for the reader.
        costs: of all tensors that can be quantized.
        fixed, weighted: the fixed types without and with the importance matrix.
        chosen: recipes that the report is about.
        frontiers: label -> (bytes of all tensors, least squared error) of every size.
        map_types: types of the heat maps of one type for all.
        measured: what sampling with files gave.
        sheet: PNG of the contact sheet, and a sentence about it; None without pictures.
    """

    title: str
    lines: tuple[str, ...]
    costs: tuple[TensorCosts, ...]
    fixed: tuple[Selection, ...] = ()
    weighted: tuple[Selection, ...] = ()
    chosen: tuple[Selection, ...] = ()
    frontiers: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    map_types: tuple[QType, ...] = ()
    measured: tuple[Measured, ...] = ()
    sheet: tuple[bytes, str] | None = None

    @property
    def subjects(self) -> tuple[Selection, ...]:
        """What the report looks at tensor by tensor."""
        return self.chosen or tuple(each for each in self.fixed if each.name == SUBJECT) or self.fixed[:1]


@dataclass(frozen=True)
class Report:
    """What is written.

    Attributes:
        page: the HTML page.
        pictures: file name -> PNG.
        summary: the table of files.
    """

    page: str
    pictures: Mapping[str, bytes]
    summary: Table


def build_report(facts: Facts) -> Report:
    """Draw and write everything."""
    pictures: dict[str, bytes] = {}
    summary = summary_table(facts)
    sections = [Section("Files", (_summary_text(facts),), (), (summary,))]
    sections += _size_sections(facts, pictures)
    for subject in facts.subjects:
        sections.append(_subject_section(facts, subject, pictures))
    sections += _map_sections(facts, pictures)
    if facts.sheet:
        pictures["sheet.png"] = facts.sheet[0]
        sections.append(Section("Pictures", (facts.sheet[1],), ((facts.sheet[0], "contact sheet of the pictures"),)))
    return Report(make_page(facts.title, facts.lines, sections), pictures, summary)


def summary_table(facts: Facts) -> Table:
    """One row per file, smallest first: predicted and measured errors; columns without any value are left out."""
    measured = {row.type: row for row in facts.measured}
    predicted = {each.name: each for each in (*facts.fixed, *facts.chosen)}
    names = [*dict.fromkeys([*predicted, *measured])]
    sizes = {name: predicted[name].megabytes if name in predicted else measured[name].mb for name in names}
    names.sort(key=lambda name: (sizes[name] or math.inf, name))
    chosen = {each.name: each for each in facts.chosen}
    rows = []
    for name in names:
        selection, row = predicted.get(name), measured.get(name, Measured(name))
        bits = selection.bpw if selection else row.bpw
        against = _against(chosen[name], facts.fixed, measured) if name in chosen else ""
        rows.append(
            (
                name,
                number(sizes[name], ".2f"),
                number(bits, ".2f"),
                number(selection.rms if selection else None, ".4f"),
                number(row.latent_error, ".4f"),
                number(row.psnr_db, ".1f"),
                number(row.ssim, ".3f"),
                against,
            )
        )
    kept = [i for i in range(len(HEADER)) if i == 0 or any(row[i] not in ("", "-") for row in rows)]
    cells = tuple(tuple(row[i] for i in kept) for row in rows)
    marked = frozenset(i for i, name in enumerate(names) if name in chosen)
    return Table(tuple(HEADER[i] for i in kept), cells, frozenset({FILE, HEADER[-1]}), marked)


def number(value: float | None, form: str) -> str:
    """A number as tables show it, a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return format(value, form) if math.isfinite(value) else "inf"


def _against(chosen: Selection, fixed: Sequence[Selection], measured: Mapping[str, Measured]) -> str:
    """What a recipe gains over the fixed type of its size: measured if both were, else predicted."""
    other = compared_with(chosen, fixed)
    if other is None:
        return ""
    mine, theirs = measured.get(chosen.name), measured.get(other.name)
    if mine and theirs and mine.latent_error is not None and theirs.latent_error:
        return f"{100 * (mine.latent_error / theirs.latent_error - 1):+.0f} % of {other.name}, measured"
    return f"{100 * (chosen.rms / other.rms - 1):+.0f} % of {other.name}, predicted" if other.rms else ""


def _summary_text(facts: Facts) -> str:
    meaning = "of the final latents, relative (L2) to those of the unquantized model"
    if not has_gains(facts.costs):
        meaning = "the root of the sum of all layers' relative squared output errors: no gains were measured"
    return f"MB and bits per weight count all tensors of a file. The predicted error is {meaning}."


def _size_sections(facts: Facts, pictures: dict[str, bytes]) -> list[Section]:
    """Error against size, and measured against predicted errors."""
    names = [each.name for each in facts.chosen]
    gains = has_gains(facts.costs)
    predicted = report_plots.predicted_series(facts.frontiers, facts.fixed, facts.weighted, facts.chosen)
    measured = report_plots.measured_series(facts.measured, names, named=not (gains and predicted))
    label = "relative error of the latents" if gains else "root of the layers' summed relative squared errors"
    panels = [(label, [*predicted, *(measured if gains else [])])] if predicted else []
    if measured and not (gains and predicted):
        panels.append(("measured relative error of the latents", measured))
    found = []
    if panels:
        n_weights = (facts.fixed or facts.chosen)[0].n_weights if facts.fixed or facts.chosen else 1
        title, text = "Error against size", "Nearer to the lower left corner is better. Both axes are logarithmic."
        pictures["sizes.png"] = to_png(report_plots.draw_sizes(panels, n_weights, title, text))
        found.append(Section(title, (_size_text(facts),), ((pictures["sizes.png"], title),)))
    known = {row.type: row.latent_error for row in facts.measured if row.latent_error}
    pairs = [(s.name, s.rms, known[s.name]) for s in (*facts.fixed, *facts.chosen) if s.name in known and s.error > 0]
    if gains and len(pairs) > 1:
        title, text = "Measured against predicted errors", "One point per file; on the line both are equal."
        pictures["agreement.png"] = to_png(report_plots.draw_agreement(pairs, names, title, text))
        found.append(Section(title, (text,), ((pictures["agreement.png"], title),)))
    return found


def _size_text(facts: Facts) -> str:
    missing = "" if facts.frontiers else " No choices were computed beside those shown."
    return f"The lines are the least errors that any choice of types is predicted to have at a size.{missing}"


def _subject_section(facts: Facts, subject: Selection, pictures: dict[str, bytes]) -> Section:
    """One recipe: where its error comes from, the worst tensors, types by category."""
    kind = "Recipe" if subject.is_chosen else "Fixed type"
    shares = {pick.costs.name: 100 * subject.share(pick) for pick in subject.picks}
    heat_map = report_maps.HeatMap(
        f"{kind} {letters(subject.name)}: what each tensor adds to the predicted error",
        "Gain times error, as part of the whole. Logarithmic; grey: no error.",
        "% of the predicted squared error",
        shares,
        lambda value: "0" if value == 0 else f"{value:.2g}" if 0.01 <= value < 10 else f"{value:.0f}" if value else "",
    )
    slug = file_slug(subject.name)
    found = [(f"map-{slug}.png", to_png(report_maps.draw_heat_map(heat_map, find_stacks(facts.costs))))]
    title = f"{kind} {letters(subject.name)}: types by category"
    drawing = report_plots.draw_types(subject, title, "Numbers in the bars count tensors.")
    found.append((f"types-{slug}.png", to_png(drawing)))
    pictures |= dict(found)
    tolerance = subject.std_error / (2 * subject.rms) if subject.rms else 0.0
    text = (
        f"{subject.megabytes:.2f} MB, {subject.bpw:.2f} bits per weight, predicted error {subject.rms:.4f}, "
        f"with a sampling error of {tolerance:.2g}. The table has the tensors that add most to it."
    )
    worst = tensor_table(subject, subject.worst())
    everything = tensor_table(subject, subject.worst(len(subject.picks)))
    folded = replace(everything, summary=f"all {len(everything.rows)} tensors with an error")
    drawn = tuple((png, name.removesuffix(".png")) for name, png in found)
    return Section(
        f"{kind} {subject.name}", (text,), drawn, (worst, folded) if len(everything.rows) > WORST else (worst,)
    )


def tensor_table(selection: Selection, picks: Sequence[Pick]) -> Table:
    """A row per tensor: what it is stored as and what that does to the error."""
    rows = []
    for pick in picks:
        costs, candidate = pick.costs, pick.candidate
        relative = pick.std_error / pick.error if pick.error else 0.0
        rows.append(
            (
                costs.name,
                costs.category.value,
                str(costs.block) if costs.block >= 0 else "-",
                candidate.qtype.name,
                candidate.weighting.value,
                f"{candidate.n_bytes:,}",
                f"{100 * selection.share(pick):.2f} %",
                f"{100 * relative:.1f} %" if relative else "none",
            )
        )
    return Table(TENSOR_HEADER, tuple(rows), TENSOR_WORDS)


def _map_sections(facts: Facts, pictures: dict[str, bytes]) -> list[Section]:
    """Heat maps of one type for all tensors, with one scale for all of them."""
    values = {
        qtype: {pick.costs.name: pick.error for pick in pick_uniform(facts.costs, qtype)} for qtype in facts.map_types
    }
    values = {qtype: errors for qtype, errors in values.items() if errors}
    if not values:
        return []
    everything = [error for errors in values.values() for error in errors.values()]
    norm = report_maps.make_norm(everything, report_maps.SHARED_DECADES)
    unit = "added squared error of the latents" if has_gains(facts.costs) else "relative squared error of the layer"
    show: Callable[[float], str] = lambda value: f"{value:.0e}".replace("e-0", "e-") if value else "0"  # noqa: E731
    drawn = []
    stacks = find_stacks(facts.costs)
    for qtype, errors in values.items():
        title = f"Every tensor in {qtype.name}: what each adds to the predicted error"
        text = "One scale for all types, logarithmic. Grey: no error; blank: cannot have it."
        heat_map = report_maps.HeatMap(title, text, unit, errors, show)
        pictures[f"map-type-{qtype.name}.png"] = to_png(report_maps.draw_heat_map(heat_map, stacks, norm))
        drawn.append((pictures[f"map-type-{qtype.name}.png"], title))
    text = "Each tensor with the weighting that serves it best. The darker a tensor, the more it needs a better type."
    return [Section("One type for all", (text,), tuple(drawn))]


def file_slug(name: str) -> str:
    """A recipe's name as a part of file names."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")[:80] or "recipe"


def check_names(names: Sequence[str]) -> None:
    """Refuse recipes whose files would have one name.

    Raises:
        GGUFError: two are called alike.
    """
    slugs = [file_slug(name) for name in names]
    for name, slug in zip(names, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise GGUFError(f"two recipes are called '{letters(name)}'", hint="Rename one of the files.")
