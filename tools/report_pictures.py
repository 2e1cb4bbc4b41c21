# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report: how far those of each type are from the reference's, and the contact sheet of all.

They lie in FOLDER/TYPE/NAME.png; equal names were made from the same prompt and seed. One TYPE is the reference.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf_kit.errors import GGUFError, name_list, plain_text
from gguf_kit.tools.report_style import letters
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import structural_similarity

REFERENCES = ("safetensors", "reference", "BF16")  # folders of the reference, the first that is there
MIN_SIDE = 11  # pixels of the window of SSIM
MOST_COLUMNS = 8  # of the contact sheet
SIDE = 208  # of a picture in it, pixels
GAP, LABEL_WIDTH, TITLE_HEIGHT, CAPTION_HEIGHT = 8, 170, 34, 22
ROW_HEIGHT = SIDE + CAPTION_HEIGHT + GAP
LABEL_SIZE, CAPTION_SIZE = 15, 13
WHITE, DARK, GREY = (255, 255, 255), (34, 34, 34), (107, 107, 107)

Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """How near pictures are to the reference's.

    Attributes:
        psnr_db: peak signal-to-noise ratio in dB, infinite for equal ones; of several over all their pixels.
        ssim: structural similarity, 1 for equal ones; of several the mean.
    """

    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Gallery:
    """Pictures by type and name.

    Attributes:
        reference: type that the others are compared with.
        names: of the reference's pictures, in order.
        files: type -> name -> file; the reference first.
    """

    reference: str
    names: tuple[str, ...]
    files: Mapping[str, Mapping[str, Path]]


def find_pictures(folder: Path, reference: str = "") -> Gallery:
    """The pictures in a folder.

    Raises:
        GGUFError: it has none, or no reference.
    """
    found = {
        each.name: {path.stem: path for path in sorted(each.glob("*.png"))}
        for each in sorted(folder.iterdir())
        if each.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    chosen = next((name for name in ([reference] if reference else REFERENCES) if name in found), None)
    if chosen is None:
        wanted = reference or " or ".join(REFERENCES)
        problem = f"it has no sub-folder '{plain_text(wanted)}' with PNG files of the reference"
        raise GGUFError(problem, path=folder, hint="Name the reference's with --reference.")
    others = {
        name: {stem: path for stem, path in files.items() if stem in found[chosen]}
        for name, files in found.items()
        if name != chosen
    }
    files = {chosen: found[chosen]} | {name: kept for name, kept in others.items() if kept}
    return Gallery(chosen, tuple(found[chosen]), files)


def read_picture(path: Path) -> Pixels:
    """A picture as float64 (height, width, 3) in [0, 1].

    Raises:
        GGUFError: the file is no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float64) / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GGUFError(f"the picture cannot be read: {plain_text(str(error))}", path=path) from error


def mean_square_error(picture: Pixels, reference: Pixels) -> float:
    """Over all pixels and colours, of values in [0, 1]."""
    return float(np.mean((picture - reference) ** 2))


def decibels(mean_square: float) -> float:
    """The peak signal-to-noise ratio of a mean squared error, for values in [0, 1]."""
    return -10 * math.log10(mean_square) if mean_square > 0 else math.inf


def ssim(picture: Pixels, reference: Pixels) -> float:
    """Structural similarity, mean over pixels and colours, with the Gaussian window of 11 pixels of its authors.

    Source: Wang, Bovik, Sheikh, Simoncelli, Image quality assessment (2004), section III.
    """
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity: Callable[..., Any] = structural_similarity  # it is not annotated
    return float(similarity(reference, picture, channel_axis=2, data_range=1.0, **options))


def compare_pictures(gallery: Gallery) -> dict[str, tuple[Quality, dict[str, Quality]]]:
    """Type -> (over all its pictures, name -> of each) against the reference, which is not among them.

    Raises:
        GGUFError: a picture cannot be read, is too small, or has another size than the reference's.
    """
    found = {}
    references = {name: read_picture(path) for name, path in gallery.files[gallery.reference].items()}
    for type_name, files in gallery.files.items():
        if type_name == gallery.reference:
            continue
        squares, each = [], {}
        for name, path in files.items():
            picture, reference = read_picture(path), references[name]
            _check_sizes(path, picture, reference)
            squares.append((mean_square_error(picture, reference), picture.size))
            each[name] = Quality(decibels(squares[-1][0]), ssim(picture, reference))
        total = sum(square * n for square, n in squares) / sum(n for _, n in squares)
        mean = math.fsum(quality.ssim for quality in each.values()) / len(each)
        found[type_name] = Quality(decibels(total), mean), each
    return found


def _check_sizes(path: Path, picture: Pixels, reference: Pixels) -> None:
    (height, width), (wanted_height, wanted_width) = picture.shape[:2], reference.shape[:2]
    if picture.shape != reference.shape:
        problem = f"the picture has {width} x {height} pixels, the reference {wanted_width} x {wanted_height}"
        raise GGUFError(problem, path=path, hint="Make it with the reference's settings.")
    if min(height, width) < MIN_SIDE:
        problem = f"the picture has {width} x {height} pixels, expected {MIN_SIDE} or more at each side"
        raise GGUFError(problem, path=path, hint="Take larger pictures.")


def draw_contact_sheet(
    gallery: Gallery,
    qualities: Mapping[str, tuple[Quality, Mapping[str, Quality]]],
    order: Sequence[str],
    labels: Mapping[str, str],
) -> tuple[bytes, int]:
    """All types below each other, some pictures of each side by side with PSNR and SSIM.

    Args:
        qualities: from compare_pictures.
        order: types in the order of rows, after the reference; those that are not named come last.
        labels: type -> lines at its left; its name without.
    Returns:
        PNG, and how many pictures of each type it shows.
    """
    names = evenly(gallery.names, MOST_COLUMNS)
    rows = [*dict.fromkeys([gallery.reference, *(name for name in order if name in gallery.files), *gallery.files])]
    size = LABEL_WIDTH + len(names) * (SIDE + GAP), TITLE_HEIGHT + len(rows) * ROW_HEIGHT
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_SIZE)
    for x, name in enumerate(names):
        middle = LABEL_WIDTH + x * (SIDE + GAP) + SIDE // 2
        draw.text((middle, TITLE_HEIGHT // 2), letters(name, 24), DARK, font, anchor="mm")
    for y, type_name in enumerate(rows):
        top = TITLE_HEIGHT + y * ROW_HEIGHT
        label = "\n".join(letters(line, 19) for line in labels.get(type_name, type_name).split("\n"))
        draw.multiline_text((10, top + SIDE // 2), label, DARK, font, anchor="lm", spacing=7)
        for x, name in enumerate(names):
            quality = qualities[type_name][1].get(name) if type_name in qualities else None
            _draw_picture(sheet, gallery.files[type_name].get(name), quality, (LABEL_WIDTH + x * (SIDE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), len(names)


def _draw_picture(sheet: Image.Image, path: Path | None, quality: Quality | None, at: tuple[int, int]) -> None:
    """A picture with its caption; without a quality it is the reference."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION_SIZE)
    middle = at[0] + SIDE // 2
    if path is None:
        draw.text((middle, at[1] + SIDE // 2), "no picture", GREY, font, anchor="mm")
        return
    _paste(sheet, path, at)
    caption = caption_of(quality) if quality else "reference"
    draw.text((middle, at[1] + SIDE + CAPTION_HEIGHT // 2), caption, GREY, font, anchor="mm")


def caption_of(quality: Quality) -> str:
    """PSNR and SSIM of one picture."""
    psnr = "equal" if math.isinf(quality.psnr_db) else f"{quality.psnr_db:.1f} dB"
    return f"{psnr}  SSIM {quality.ssim:.3f}"


def evenly(names: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of the names, evenly spread."""
    if len(names) <= most:
        return tuple(names)
    return tuple(names[i * len(names) // most] for i in range(most))


def _paste(sheet: Image.Image, path: Path, at: tuple[int, int]) -> None:
    """Draw a picture into its square, whole and sharp."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    offset = at[0] + (SIDE - size[0]) // 2, at[1] + (SIDE - size[1]) // 2
    sheet.paste(picture.resize(size, method), offset)


def check_names(gallery: Gallery) -> list[str]:
    """What the user should know about pictures that are missing."""
    notes = []
    for type_name, files in gallery.files.items():
        missing = [name for name in gallery.names if name not in files]
        if missing:
            notes.append(f"'{plain_text(type_name)}' lacks {len(missing)} pictures: {name_list(missing)}")
    return notes
