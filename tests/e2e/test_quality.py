# SPDX-License-Identifier: Apache-2.0
"""The command that judges automatic recipes, on one type: real sizes, less error, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_kit.demo import quality, tiny_flux
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_nothing_is_learned_from_what_is_judged() -> None:
    for n_runs in (1, 3, quality.CALIBRATION_RUNS):
        learned, judged = quality.calibration_jobs(n_runs), quality.test_jobs()
        assert len({*learned}) == n_runs
        assert len({*judged}) == len(tiny_flux.SEEDS) * quality.SEEDS_PER_PROMPT == 32
        assert not {prompt for prompt, _ in learned} & {prompt for prompt, _ in judged}
        assert not {seed for _, seed in learned} & {seed for _, seed in judged}


def test_automatic_recipes_have_far_less_error_at_the_same_size(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    assert quality.main(["--types", "Q2_K", "--runs", "3", "--out", str(tmp_path)]) == 0
    rows = {row["recipe"]: row for row in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]}
    fixed = rows["fixed"]
    assert list(rows) == [*quality.TITLES]
    for policy in quality.POLICIES:
        row, path = rows[policy], tmp_path / "models" / f"tiny-flux-auto-Q2_K-{policy}.gguf"
        assert 0.995 * fixed["file_bytes"] <= path.stat().st_size == row["file_bytes"] <= fixed["file_bytes"]
        assert row["latent_error"] < 0.7 * fixed["latent_error"]
        assert row["median_error"] < 0.7 * fixed["median_error"]
        assert row["psnr_db"] > fixed["psnr_db"] + 2
        assert len([*(tmp_path / "pictures" / row["type"]).glob("*.png")]) == 32
    table = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert f"{rows['kept']['latent_error']:.4f}" in table
    assert "6 other pictures" in table
    Image.open(tmp_path / "contact_sheet.png").verify()
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "auto-Q2_K-kept" in page
