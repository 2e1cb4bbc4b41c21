# SPDX-License-Identifier: Apache-2.0
"""The templates as files, and demo/install.py, which puts the tiny one's files into a ComfyUI."""

from __future__ import annotations

import json
import py_compile
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
    own_file(tmp_path).write_bytes(b"the user's own")
    return tmp_path


def own_file(comfyui: Path) -> Path:
    return comfyui / "models" / "vae" / "ae.safetensors"


def paths_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_install_makes_files_that_load_and_remove_takes_them_away(comfyui: Path) -> None:
    before = paths_in(comfyui)
    for _ in range(2):  # again over itself
        assert install.main([str(comfyui)]) == 0
    model, vae, *others = install.installed_files(comfyui)
    assert {file for file in comfyui.rglob("*") if file.is_file()} == {
        *install.installed_files(comfyui),
        own_file(comfyui),
    }
    nodes = comfyui / "custom_nodes" / install.NODES
    py_compile.compile(str(nodes / "__init__.py"))  # as ComfyUI does
    assert len(load_diffusion_model(model)[0]) == 96
    with safe_open(vae, "np") as tensors:
        assert {"taesd_decoder.1.weight", "vae_scale", "vae_shift"} <= set(tensors.keys())
    assert [file.name for file in others] == ["prompts.json", "prompts.safetensors", "__init__.py"]
    assert install.main([str(comfyui), "--remove"]) == 0
    assert paths_in(comfyui) == before | {"models/diffusion_models"}  # a folder of ComfyUI's


def test_remove_says_what_it_did_and_keeps_what_it_did_not_make(
    comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main([str(comfyui), "--remove"]) == 0
    assert capsys.readouterr().out == "nothing was installed there\n"
    prompts, nodes = install.own_folders(comfyui)
    prompts.mkdir()
    (prompts / "of the user.txt").write_text("mine", encoding="utf-8")
    nodes.mkdir()
    (nodes / "__init__.py").write_text("", encoding="utf-8")
    assert install.main([str(comfyui), "--remove"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"removed {nodes / '__init__.py'}",
        f"kept {prompts}, which holds files that this command did not make",
        f"removed {nodes}",
    ]
    assert [path.name for path in prompts.iterdir()] == ["of the user.txt"]


@pytest.mark.parametrize("option", [[], ["--remove"]], ids=["install", "remove"])
def test_a_folder_that_is_a_link_is_left_alone(
    comfyui: Path, tmp_path_factory: pytest.TempPathFactory, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "__init__.py").write_text("of someone else", encoding="utf-8")
    try:
        (comfyui / "custom_nodes" / install.NODES).symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("no right to make links here")
    assert install.main([str(comfyui), *option]) == 2
    assert "is a link" in capsys.readouterr().err
    assert (elsewhere / "__init__.py").read_text(encoding="utf-8") == "of someone else"
    assert not (comfyui / "models" / install.MODEL).exists()


@pytest.mark.parametrize("failing", ["convert", "copy"])
def test_an_install_that_fails_leaves_the_earlier_one_whole(
    comfyui: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    for folder in install.own_folders(comfyui):
        folder.mkdir()
    (comfyui / "models" / "diffusion_models").mkdir()
    for file in install.installed_files(comfyui):
        file.write_text("of an earlier call", encoding="utf-8")

    def fill_the_disk(_: object, target: Path) -> None:
        target.write_text("half", encoding="utf-8")
        raise OSError("No space left on device")

    if failing == "convert":
        monkeypatch.setattr(install.convert, "main", lambda _: 2)
    else:
        monkeypatch.setattr(install.convert, "main", lambda _: 0)
        monkeypatch.setattr(install, "save_file", fill_the_disk)
    assert install.main([str(comfyui)]) == 2
    files = {file for file in comfyui.rglob("*") if file.is_file()} - {own_file(comfyui)}
    assert files == set(install.installed_files(comfyui))
    assert {file.read_text(encoding="utf-8") for file in files} == {"of an earlier call"}


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
