# SPDX-License-Identifier: Apache-2.0
"""Puts what `nox -s quality` has measured into docs/quality.md and the READMEs: tables, and a contact
sheet of some of its pictures.

python tests/make_quality_table.py [FOLDER]     FOLDER: quality-output
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import _pack  # noqa: E402, F401
from gguf_kit.demo import quality, sheet, tiny_flux  # noqa: E402
from gguf_kit.tests.readme_blocks import DOCS, READMES, rewrite  # noqa: E402

PAGE = DOCS / "quality.md"
PICTURE = DOCS / "quality.jpg"
BEGIN, END = (f"<!-- {word} of the table of automatic recipes -->" for word in ("begin", "end"))
BEGIN_SHORT, END_SHORT = (f"<!-- {word} of the table of quality -->" for word in ("begin", "end"))
SHOWN = ("fixed", "kept")  # recipes, of the two smallest types
JPEG_WIDTH = 1143


def read_rows(folder: Path) -> list[quality.Row]:
    """The rows of a folder that nox -s quality has filled."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [quality.Row(**row) for row in found["rows"]]


def short_table(rows: list[quality.Row]) -> str:
    """A line for each size: latent error and PSNR of the fixed recipe and of the automatic ones."""
    titles = ("file size of", "bits/weight", "fixed recipe", "automatic", "automatic, all layers")
    lines = [f"| {' | '.join(titles)} |", "|---|--:|--:|--:|--:|"]
    for size_of in dict.fromkeys(row.size_of for row in rows):
        found = {row.recipe: row for row in rows if row.size_of == size_of}
        cells = [f"{found['fixed'].latent_error:.4f}, {found['fixed'].psnr_db:.1f} dB"]
        for row in (found[name] for name in quality.POLICIES):
            cells.append(f"{row.latent_error:.4f} ({100 * row.against_fixed:+.0f} %), {row.psnr_db:.1f} dB")
        lines.append(f"| {size_of} | {found['fixed'].bpw:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_picture(folder: Path, rows: list[quality.Row]) -> None:
    """The first picture of each prompt: the reference, and fixed and automatic recipes of the smallest types."""
    shown = [row for row in rows if row.recipe in SHOWN and row.size_of in quality.TYPES[:2]]
    names = [f"{prompt.replace(' ', '-')}-{seed}.png" for prompt, seed in tiny_flux.SEEDS.items()]
    labels = {quality.REFERENCE: "BF16"} | {row.type: quality.label(row) for row in shown}
    lines = [
        (label, [(folder / "pictures" / name / picture).read_bytes() for picture in names])
        for name, label in labels.items()
    ]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "sheet.png"
        sheet.write_contact_sheet(path, list(tiny_flux.SEEDS), lines)
        picture = Image.open(path).convert("RGB")
        picture.resize((JPEG_WIDTH, picture.height * JPEG_WIDTH // picture.width), Image.Resampling.LANCZOS).save(
            PICTURE, quality=85, optimize=True
        )


def main(folder: Path) -> None:
    """Rewrite the tables and the picture beside the large one."""
    rows = read_rows(folder)
    rewrite(PAGE, BEGIN, END, quality.markdown_table(rows))
    for readme in READMES:
        rewrite(readme, BEGIN_SHORT, END_SHORT, short_table(rows))
    write_picture(folder, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else quality.OUTPUT)
