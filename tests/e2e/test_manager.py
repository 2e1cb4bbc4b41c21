# SPDX-License-Identifier: Apache-2.0
"""ComfyUI-Manager installs the pack into a fresh ComfyUI, the nodes are served, the Manager uninstalls it.

Everything happens in temporary folders: a copy of the host, and an environment that sees the packages of this one, but
not gguf. The address is the public one; git is told to find a repository made of the working tree there. pip asks the
package index for comfyui-manager and gguf; where it reaches none, those tests are skipped. Nothing else asks a network.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gguf_kit.demo import host
from gguf_kit.demo.server import ComfyServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NAME = "gguf-kit"
MANAGER = "comfyui-manager==4.2.2"  # for hosts that do not say which they want
# Offline: nothing but the lists that come with the Manager. uv would not see the packages of this environment.
MANAGER_CONFIG = "[default]\nnetwork_mode = offline\nuse_uv = false\n"
HOST_LEFT_OUT = {"models", "custom_nodes", "user", "output", "temp", "tests", "tests-unit", ".git"}
# What ComfyUI and its Manager write for themselves.
OF_THE_HOST = re.compile(r"user/(__manager|default|comfyui[\w.]*\.(log|db|lock))(/.*)?|temp|output|input(/3d)?")
UNREACHABLE = re.compile(r"No matching distribution found|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError")


@dataclass
class Life:
    """What was there before, between and after: path or package -> its state; nodes by id; the Manager's output."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    listed: dict[str, Any] | None = None
    output: str = ""


def run(command: list[str], **named: Any) -> str:
    """Output of a command that has to succeed; skips the test if it is pip without an index."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **named)
    if done.returncode and "pip" in command and UNREACHABLE.search(done.stdout):
        pytest.skip(f"pip reaches no package index: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}"
    return done.stdout


def dry_run(python: str, *arguments: str) -> set[str]:
    """Names of the packages that pip would install or replace."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check"]
    report = json.loads(run([*command, "--report", "-", *arguments]).partition("{")[2].join(["{", ""]))
    return {item["metadata"]["name"] for item in report["install"]}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """Python of an environment with the packages of this one except gguf, and the folders it takes packages from.

    pip installs beside them and never touches them: they lie outside of its environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    seen, made = folder / "seen", folder / "made"
    seen.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if entry.name.split("-")[0] != "gguf":
            (seen / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    run([sys.executable, "-m", "venv", "--without-pip", str(made)])
    python = str(made / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (own / "seen.pth").write_text(f"{seen}\n", encoding="utf-8")
    return python, [own, seen]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh ComfyUI: a copy of the host's program, without models, settings and node packs."""
    copy, original = tmp_path_factory.mktemp("fresh") / "ComfyUI", host.get_host()

    def left_out(folder: str, _: list[str]) -> set[str]:
        return HOST_LEFT_OUT if Path(folder) == original else set()

    shutil.copytree(original, copy, ignore=left_out, symlinks=True)
    host.make_base(copy, {}, {})
    (copy / "user" / "__manager").mkdir()
    (copy / "user" / "__manager" / "config.ini").write_text(MANAGER_CONFIG, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository whose one commit is the working tree."""
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    bare = tmp_path_factory.mktemp("repository") / f"{NAME}.git"
    run(["git", "init", "--quiet", "--bare", str(bare)])
    git = ["git", "-c", "core.bare=false", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    git += ["--git-dir", str(bare), "--work-tree", str(host.PACK)]
    run([*git, "add", "--all", "."], cwd=host.PACK)
    run([*git, "commit", "--quiet", "--message", "The working tree"], cwd=host.PACK)
    return bare


def public_address() -> str:
    """The repository's address as pyproject.toml has it."""
    found = re.search(
        r'^Repository = "(.+)"$', (host.PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found
    return found[1]


def variables(repository: Path, comfyui: Path, home: Path) -> dict[str, str]:
    """Environment variables of all that runs here: git finds the repository, all else an empty home."""
    settings = [
        path for path in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf") if path.is_file()
    ]
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": public_address(),
        "COMFYUI_PATH": str(comfyui),
        "HOME": str(home),
        "USERPROFILE": str(home),
        "PIP_CONFIG_FILE": os.environ.get("PIP_CONFIG_FILE", str(settings[0]) if settings else ""),
        "PIP_NO_CACHE_DIR": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def files_of(*folders: Path) -> dict[str, tuple[int, int]]:
    """All files and folders, by path: size in bytes and time of change in ns; neither for folders."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            state = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
            found[path.relative_to(folder).as_posix()] = state
    return found


def packages_of(paths: list[Path]) -> dict[str, str]:
    """Installed packages: name -> version."""
    found = importlib.metadata.distributions(path=[str(path) for path in paths])
    return {distribution.metadata["Name"]: distribution.version for distribution in found}


def wanted_manager(comfyui: Path) -> str:
    """The Manager that a host asks for, else MANAGER."""
    wanted = comfyui / "manager_requirements.txt"
    return wanted.read_text(encoding="utf-8").strip() if wanted.is_file() else MANAGER


def serve(comfyui: Path, python: str, log: Path, life: Life) -> None:
    """Start the server once, with the Manager where the host has a switch for it, and note what it serves."""
    has_switch = "--enable-manager" in (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    with ComfyServer(comfyui, comfyui, log, python, ["--enable-manager"] if has_switch else []) as server:
        life.nodes = set(server.object_info())
        if has_switch:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{server.url}/v2/customnode/installed", timeout=60) as answer:
                life.listed = json.loads(answer.read())


@pytest.fixture(scope="module")
def life(
    environment: tuple[str, list[Path]], comfyui: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Life:
    """The pack's whole life in one fresh ComfyUI."""
    python, sites = environment
    home, log = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("log") / "server.log"
    command = [python, "-m", "cm_cli"]
    life = Life()

    def note(moment: str) -> None:
        life.files[moment], life.packages[moment] = files_of(comfyui, home), packages_of(sites)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GGUF_KIT_CACHE", raising=False)
        for name, value in variables(repository, comfyui, home).items():
            patch.setenv(name, value)
        run([python, "-m", "pip", "install", "--quiet", "--no-compile", wanted_manager(comfyui)])
        note("before")
        life.output = run([*command, "install", public_address()], cwd=comfyui)
        note("installed")
        serve(comfyui, python, log, life)
        life.output += run([*command, "uninstall", NAME], cwd=comfyui)
        note("after")
    return life


def test_requirements_change_nothing_where_they_are_installed() -> None:
    assert dry_run(sys.executable, "-r", str(host.PACK / "requirements.txt")) == set()


def test_requirements_add_gguf_and_nothing_else_to_a_comfyui(
    environment: tuple[str, list[Path]], tmp_path: Path
) -> None:
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("\n".join(host.host_requirements(host.get_host())), encoding="utf-8")
    arguments = ["-r", str(host.PACK / "requirements.txt"), "-c", str(pinned)]
    assert dry_run(environment[0], *arguments) == {"gguf"}


def test_manager_installs_the_pack_and_one_package(life: Life) -> None:
    assert f"custom_nodes/{NAME}/__init__.py" in life.files["installed"]
    assert life.packages["installed"].keys() - life.packages["before"].keys() == {"gguf"}
    assert life.packages["before"].items() <= life.packages["installed"].items()


def test_nodes_of_an_installed_pack_are_served(life: Life) -> None:
    assert {"UnetLoaderGGUF", "CLIPLoaderGGUF", "SaveGGUF", "ImatrixCollectorGGUF"} <= life.nodes


def test_manager_lists_the_installed_pack(life: Life) -> None:
    if life.listed is None:
        pytest.skip("this ComfyUI has no --enable-manager")
    assert life.listed[NAME]["enabled"] is True


def test_nothing_is_left_after_uninstalling(life: Life) -> None:
    before, after = life.files["before"], life.files["after"]
    new = {path for path in after.keys() - before.keys() if not OF_THE_HOST.fullmatch(path)}
    assert new == set()
    assert not any("gguf" in path.lower() for path in after.keys() - before.keys())
    assert before.keys() - after.keys() == set()
    assert {path for path in before if before[path] != after[path]} <= {"user/__manager/config.ini"}


def test_uninstalling_keeps_the_packages(life: Life) -> None:
    assert life.packages["after"] == life.packages["installed"]
