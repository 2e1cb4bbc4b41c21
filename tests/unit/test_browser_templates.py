# SPDX-License-Identifier: Apache-2.0
"""The templates as files, and demo/install.py, which puts the tiny one's files into a ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path

import make_workflows
import pytest
from gguf_kit.demo import host, install
from gguf_kit.loader import load_diffusion_model
from PIL import Image
from safetensors import safe_open

NAMES = list(make_workflows.TEMPLATES)
PICTURE_LIMIT = 60_000


def test_folder_holds_the_described_templates_only() -> None:
    assert sorted(path.stem for path in make_workflows.FOLDER.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_is_what_the_description_says(name: str) -> None:
    content = (make_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert content == make_workflows.to_text(make_workflows.TEMPLATES[name]), "run tests/make_workflows.py"


@pytest.mark.parametrize("name", NAMES)
def test_name_can_be_linked_to(name: str) -> None:
    assert re.fullmatch(r"GGUF-[A-Za-z0-9_-]+", name)


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_small_and_square(name: str) -> None:
    file = make_workflows.FOLDER / f"{name}.jpg"
    assert file.stat().st_size <= PICTURE_LIMIT
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height


@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_apart_and_inside_their_groups(name: str) -> None:
    template = make_workflows.TEMPLATES[name]
    boxes = [(node.at[0], node.at[1] - 30, *node.size) for node in template.nodes.values()]  # 30: the title above
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, w, h in boxes[i + 1 :]:
            apart = x + width <= left or left + w <= x or y + height + 30 <= top or top + h + 30 <= y
            assert apart, f"{name}: {(x, y)} and {(left, top)}"
    grouped = [member for members in template.groups.values() for member in members]
    assert sorted(grouped) == sorted(set(template.nodes) - {"note"})


@pytest.mark.parametrize("name", NAMES)
def test_note_names_every_file_that_is_chosen(name: str) -> None:
    workflow = json.loads((make_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
    values = [value for node in workflow["nodes"] for value in node["widgets_values"] if isinstance(value, str)]
    files = {value for value in values if value.endswith((".gguf", ".safetensors"))}
    if name == "GGUF-tiny-Flux-runs-as-it-is":
        assert files == {Path(install.MODEL).name, Path(install.VAE).name}
        assert "python demo/install.py" in note
    else:
        assert files
        assert all(file in note for file in files)


# -- demo/install.py --


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    for name in ("models/vae", "custom_nodes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "vae" / "ae.safetensors").write_bytes(b"the user's own")
    return tmp_path


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_install_makes_files_that_load_and_remove_takes_them_away(comfyui: Path) -> None:
    before = files_in(comfyui)
    for _ in range(2):  # again over itself
        assert install.main([str(comfyui)]) == 0
    model, vae, prompts, nodes = install.installed_paths(comfyui)
    assert len(load_diffusion_model(model)[0]) == 96
    with safe_open(vae, "np") as tensors:
        assert {"taesd_decoder.1.weight", "vae_scale", "vae_shift"} <= set(tensors.keys())
    assert (prompts / "prompts.json").is_file()
    assert (nodes / "__init__.py").is_file()
    assert install.main([str(comfyui), "--remove"]) == 0
    assert files_in(comfyui) == before


def test_install_refuses_what_is_no_comfyui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([str(tmp_path / "nowhere")]) == 2
    assert "Name the folder of a ComfyUI." in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_install_without_a_comfyui_around_it_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "find_host", lambda: None)
    assert install.main([]) == 2
    assert "Name the folder of one." in capsys.readouterr().err
