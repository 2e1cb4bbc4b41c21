# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page that needs nothing but itself, and tables in Markdown.

Pictures are embedded; there is no script, and a policy in the page forbids to load anything. Every text is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_CELL = 160  # letters of a cell; longer ones are cut
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1250px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { font-size: 1.7em; margin-bottom: .1em; } h2 { font-size: 1.25em; margin: 2em 0 .3em; }
p { max-width: 62em; margin: .4em 0; } figure { margin: 1em 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { color: #666; font-weight: 600; } th.left, td.left { text-align: left; } tr.chosen td { font-weight: 600; }
td.left { overflow-wrap: anywhere; white-space: normal; min-width: 5em; } summary { cursor: pointer; color: #0072B2; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        header: titles of the columns.
        rows: cells as text.
        left: titles of the columns with words, which are aligned at the left.
        chosen: numbers of the rows that are set apart.
        summary: if given, the table is folded away under it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()
    chosen: frozenset[int] = frozenset()
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        paragraphs: texts below it.
        pictures: (PNG, what it shows) of each.
        tables: below the pictures.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    pictures: tuple[tuple[bytes, str], ...] = ()
    tables: tuple[Table, ...] = field(default=())


def make_page(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page; `lines` stand below its title."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in lines),
        *(part for section in sections for part in _section(section)),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text as it may stand in the page, in an attribute too; what cannot be printed is a question mark."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return html.escape(printable.encode("utf-8", "replace").decode("utf-8"))


def _section(section: Section) -> list[str]:
    parts = ["<section>", f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    for png, alt in section.pictures:
        data = base64.b64encode(png).decode("ascii")
        parts.append(f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>')
    for table in section.tables:
        parts += _table(table)
    return [*parts, "</section>"]


def _table(table: Table) -> list[str]:
    classes = [' class="left"' if title in table.left else "" for title in table.header]
    head = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(classes, table.header, strict=True))
    lines = ['<div class="table"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td{kind}>{escape(_cut(cell))}</td>" for kind, cell in zip(classes, row, strict=True))
        lines.append(f'<tr class="chosen">{cells}</tr>' if number in table.chosen else f"<tr>{cells}</tr>")
    lines += ["</tbody>", "</table></div>"]
    if table.summary:
        return ["<details>", f"<summary>{escape(table.summary)}</summary>", *lines, "</details>"]
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def markdown_table(table: Table) -> str:
    """The table in Markdown, aligned so that it reads in a terminal too."""
    rows = [tuple(_markdown_cell(cell) for cell in row) for row in (table.header, *table.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.header))]
    words = [title in table.left for title in table.header]
    lines = [
        [cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(row, widths, words, strict=True)]
        for row in rows
    ]
    lines.insert(
        1, ["-" * width if word else "-" * (width - 1) + ":" for width, word in zip(widths, words, strict=True)]
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _markdown_cell(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in _cut(text))
    for mark in ("\\", "|", "<", "`", "*", "["):
        printable = printable.replace(mark, f"\\{mark}")
    return printable
