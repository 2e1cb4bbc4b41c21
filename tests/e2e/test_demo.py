# SPDX-License-Identifier: Apache-2.0
"""The demo and its parts: finding and laying out a ComfyUI, running it, measuring."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_kit.demo import host, metrics, tiny_flux
from gguf_kit.demo.server import ComfyServer, ServerError
from gguf_kit.tests.make_files import write_gguf
from PIL import Image

pytestmark = pytest.mark.e2e


def make_fake_host(folder: Path, main: str = "") -> Path:
    """A folder that passes for a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "cli_args.py").touch()
    (folder / "main.py").write_text(main, encoding="utf-8")
    return folder


def test_wrong_comfyui_path_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match=r"has no main\.py"):
        host.find_host()


def test_host_around_an_installed_pack_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    comfyui = make_fake_host(tmp_path / "ComfyUI")
    assert host.find_host(comfyui / "custom_nodes" / "gguf-kit") == comfyui
    assert host.find_host(tmp_path / "elsewhere" / "gguf-kit") is None


def test_fetched_host_is_reused_without_a_download(tmp_path: Path) -> None:
    fetched = make_fake_host(tmp_path / host.FETCHED_NAME)
    assert host.fetch_host(tmp_path, python="no such interpreter") == fetched


def test_failed_download_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    failing = tmp_path / "pip"
    failing.write_text("#!/bin/sh\necho no index >&2\nexit 1\n", encoding="utf-8")
    failing.chmod(0o755)
    cache = tmp_path / "cache"
    with pytest.raises(host.HostError, match="no index Set COMFYUI_PATH"):
        host.fetch_host(cache, python=failing)
    assert not list(cache.iterdir())


def test_requirements_leave_out_what_is_pinned_or_not_needed(tmp_path: Path) -> None:
    lines = (
        "torch\ntorchsde\ntorchvision\ntorchaudio\n# notes\nav>=14 # video\n\ncomfyui-embedded-docs==1\npydantic~=2.0\n"
    )
    (tmp_path / "requirements.txt").write_text(lines, encoding="utf-8")
    assert host.host_requirements(tmp_path) == ["torchsde", "av>=14", "pydantic~=2.0"]


def test_node_pack_is_copied_where_links_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    pack = tmp_path / "pack"
    (pack / ".git").mkdir(parents=True)
    (pack / "nodes.py").write_text("x = 1", encoding="utf-8")
    base = host.make_base(tmp_path / "base", {"a-pack": pack}, {"tiny_flux": tiny_flux.PROMPT_FILES})
    assert [path.name for path in (base / "custom_nodes" / "a-pack").iterdir()] == ["nodes.py"]
    assert (base / "models" / "tiny_flux" / "prompts.json").is_file()


def test_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    broken = make_fake_host(tmp_path / "host", "import sys\nsys.exit('a module is missing')")
    base = host.make_base(tmp_path / "base", {}, {})
    with (
        pytest.raises(ServerError, match=r"(?s)status 1.*a module is missing"),
        ComfyServer(broken, base, tmp_path / "server.log"),
    ):
        pass


def test_latent_error_is_relative_in_model_space() -> None:
    reference = np.full((1, 16, 2, 2), tiny_flux.LATENT_SHIFT + 2.0, dtype=np.float32)
    assert metrics.latent_error(reference + np.float32(0.5), reference) == pytest.approx(0.25)


def test_psnr_of_a_tenth_is_twenty_and_of_equal_pictures_infinite() -> None:
    black = np.zeros((2, 4, 4, 3), dtype=np.float32)
    assert metrics.psnr(black + np.float32(0.1), black) == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(black, black) == math.inf


def test_sizes_count_all_tensors(tmp_path: Path) -> None:
    assert metrics.file_size(tiny_flux.MODEL) == metrics.FileSize(18_149_504, 9_074_752)
    assert metrics.file_size(write_gguf("Q8_0", tmp_path / "q8.gguf")).bpw == pytest.approx(8.90, abs=0.005)


@pytest.mark.slow
def test_demo_writes_pictures_sheet_and_table(tmp_path: Path) -> None:
    command = [sys.executable, str(host.PACK / "demo" / "run.py"), "--types", "Q8_0", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = {row["type"]: row for row in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]}
    assert rows["safetensors"]["latent_error"] == 0
    assert rows["Q8_0"]["latent_error"] == pytest.approx(0.0014, rel=0.05)
    assert rows["Q8_0"]["seconds_per_step"] > 0
    assert re.search(
        r"\| +Q8_0 \| 10\.10 \| +8\.90 \| +0\.0014 \|", (tmp_path / "results.md").read_text(encoding="utf-8")
    )
    assert Image.open(tmp_path / "contact_sheet.png").width > 8 * tiny_flux.PICTURE_SIZE
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 2 * len(tiny_flux.SEEDS)
