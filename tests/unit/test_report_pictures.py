# SPDX-License-Identifier: Apache-2.0
"""Pictures of the report: PSNR and SSIM against their formulae, the contact sheet, what is refused."""

import io
import math

import numpy as np
import pytest
from gguf_kit.errors import GGUFError
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
from gguf_kit.tools import report_pictures as pictures


def save(folder, type_name, name, pixels):
    path = folder / type_name / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def random_picture(seed, size=(32, 48)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def near(pixels, seed, spread=20):
    noise = np.random.default_rng(seed).integers(-spread, spread + 1, pixels.shape)
    return np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        original = random_picture(i)
        save(tmp_path, "safetensors", f"p{i}", original)
        save(tmp_path, "Q2_K", f"p{i}", near(original, 10 + i, 20 + 20 * i))
        save(tmp_path, "BF16", f"p{i}", original)
    return tmp_path


def direct_ssim(a, b):
    """SSIM as its paper writes it, of one channel, without the border that the window does not fill."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    views = [np.lib.stride_tricks.sliding_window_view(x, (11, 11)) for x in (a, b)]
    means = [(view * window).sum((-2, -1)) for view in views]
    variances = [(view**2 * window).sum((-2, -1)) - mean**2 for view, mean in zip(views, means, strict=True)]
    covariance = (views[0] * views[1] * window).sum((-2, -1)) - means[0] * means[1]
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    return float((top / ((means[0] ** 2 + means[1] ** 2 + c1) * (variances[0] + variances[1] + c2))).mean())


def test_psnr_and_ssim_are_their_formulae():
    a, b = (x / 255 for x in (random_picture(1), near(random_picture(1), 2)))
    assert pictures.mean_square_error(b, a) == pytest.approx(((a - b) ** 2).sum() / a.size, rel=1e-12)
    assert pictures.decibels(0.01) == pytest.approx(20)
    expected = np.mean([direct_ssim(a[..., c], b[..., c]) for c in range(3)])
    assert pictures.ssim(b, a) == pytest.approx(expected, abs=1e-9)


def test_equal_pictures_are_infinitely_good(folder):
    found = pictures.compare_pictures(pictures.find_pictures(folder))
    assert found["BF16"][0] == pictures.Quality(math.inf, 1.0)
    assert pictures.caption_of(found["BF16"][0]) == "equal  SSIM 1.000"


def test_psnr_of_a_type_is_over_all_its_pixels_and_ssim_a_mean(folder):
    whole, each = pictures.compare_pictures(pictures.find_pictures(folder))["Q2_K"]
    stacks = [
        np.stack([np.asarray(Image.open(folder / name / f"p{i}.png"), float) / 255 for i in range(3)])
        for name in ("Q2_K", "safetensors")
    ]
    assert whole.psnr_db == pytest.approx(-10 * math.log10(((stacks[0] - stacks[1]) ** 2).mean()))
    assert whole.ssim == pytest.approx(np.mean([quality.ssim for quality in each.values()]))
    assert each["p0"].psnr_db > each["p1"].psnr_db > each["p2"].psnr_db


def test_the_sheet_shows_every_picture_in_its_place(folder):
    gallery = pictures.find_pictures(folder)
    png, n_shown = pictures.draw_contact_sheet(
        gallery, pictures.compare_pictures(gallery), ["Q2_K"], {"Q2_K": "two\nlines"}
    )
    assert n_shown == 3
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    assert sheet.shape[0] == pictures.TITLE_HEIGHT + 3 * pictures.ROW_HEIGHT
    for row, type_name in enumerate(("safetensors", "Q2_K", "BF16")):
        for column in range(3):
            top = pictures.TITLE_HEIGHT + row * pictures.ROW_HEIGHT
            left = pictures.LABEL_WIDTH + column * (pictures.SIDE + pictures.GAP)
            cell = sheet[top : top + pictures.SIDE, left : left + pictures.SIDE]
            expected = np.asarray(Image.open(folder / type_name / f"p{column}.png"))
            height = round(32 * pictures.SIDE / 48)
            offset = (pictures.SIDE - height) // 2
            shown = Image.fromarray(expected).resize((pictures.SIDE, height), Image.Resampling.NEAREST)
            assert np.array_equal(cell[offset : offset + height], np.asarray(shown))
            caption = sheet[top + pictures.SIDE + 2 : top + pictures.SIDE + 20, left : left + pictures.SIDE]
            assert caption.min() < 200, "no caption"


def test_many_pictures_and_long_names_stay_within_the_sheet(tmp_path):
    for i in range(40):
        save(tmp_path, "reference", f"{'long ' * 20}{i:02d}", random_picture(i, (16, 16)))
    gallery = pictures.find_pictures(tmp_path)
    png, n_shown = pictures.draw_contact_sheet(gallery, {}, [], {})
    assert n_shown == pictures.MOST_COLUMNS
    expected = pictures.LABEL_WIDTH + n_shown * (pictures.SIDE + pictures.GAP)
    assert Image.open(io.BytesIO(png)).width == expected


def test_a_type_without_some_pictures_is_told_and_drawn(folder):
    (folder / "Q2_K" / "p1.png").unlink()
    gallery = pictures.find_pictures(folder)
    assert pictures.check_names(gallery) == ["'Q2_K' lacks 1 pictures: p1"]
    pictures.draw_contact_sheet(gallery, pictures.compare_pictures(gallery), [], {})


def test_a_folder_without_reference_is_refused(folder):
    with pytest.raises(GGUFError, match=r"no sub-folder 'F16' .*--reference"):
        pictures.find_pictures(folder, "F16")
    assert pictures.find_pictures(folder, "Q2_K").reference == "Q2_K"


@pytest.mark.parametrize(
    ("size", "message"),
    [((16, 16), "has 16 x 16 pixels, the reference 48 x 32"), ((8, 8), "expected 11 or more")],
    ids=["other", "tiny"],
)
def test_pictures_of_a_wrong_size_are_refused(folder, size, message):
    save(folder, "Q3_K", "p0", random_picture(0, size))
    if message.startswith("expected"):
        for name in ("safetensors", "Q2_K", "BF16"):
            save(folder, name, "p0", random_picture(0, size))
    with pytest.raises(GGUFError, match=message):
        pictures.compare_pictures(pictures.find_pictures(folder))


def test_a_file_that_is_no_picture_is_refused(folder):
    (folder / "Q2_K" / "p0.png").write_bytes(b"no picture")
    with pytest.raises(GGUFError, match=r"p0\.png: the picture cannot be read"):
        pictures.compare_pictures(pictures.find_pictures(folder))
