# SPDX-License-Identifier: Apache-2.0
"""Finds a C and C++ compiler that works, or gets one: the ziglang wheel, which needs nothing else on any system.

The wheel is installed into the cache folder, never into the user's environment.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _pack  # noqa: F401
from gguf_kit.quantize.ggml import BuildError, cache_folder
from gguf_kit.tools.llama_cpp.source import PINNED, Log

KINDS = ("auto", "cc", "gcc", "clang", "zig")
COMMANDS = {"cc": ("cc", "c++"), "gcc": ("gcc", "g++"), "clang": ("clang", "clang++")}
COMPANIONS = dict(COMMANDS.values())
# Tried in this order; auto is all of them.
SYSTEM_KINDS = tuple(COMMANDS)
PROBE = '#include <vector>\nextern "C" int probe(int n) { return (int) std::vector<int>(n).size(); }\n'
N_LINES_SHOWN = 12
TORCH_HINT = "Install gcc or clang, or convert with --engine torch."


@dataclass(frozen=True)
class Compiler:
    """Commands that compile C and C++.

    Attributes:
        kind: cc, gcc, clang or zig.
        c, cxx: the commands, target included.
        target: what it compiles for, as zig spells it; "" for this machine.
        environment: variables that the commands need.
    """

    kind: str
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    target: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """linux, win32 or darwin: the system of what is compiled."""
        for word, system in (("windows", "win32"), ("macos", "darwin"), ("linux", "linux")):
            if word in self.target:
                return system
        return sys.platform


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> None:
    """Run a compiler or a check.

    Raises:
        BuildError: it cannot be started or fails; the message has the command and the last lines of its output.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}", hint=TORCH_HINT) from error
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip()).splitlines()[-N_LINES_SHOWN:]
        shown = "\n  ".join(output)
        raise BuildError(
            f"`{shlex.join(command)}` failed with exit code {done.returncode}:\n  {shown}\n", hint=TORCH_HINT
        )


def find_compiler(kind: str, log: Log, target: str = "") -> Compiler:
    """A compiler that has compiled and linked a small C++ library.

    Args:
        kind: one of KINDS; auto takes $CC, then cc, gcc, clang, then zig.
        target: for a cross build, as x86_64-windows-gnu; only zig can.
    Raises:
        BuildError: the named one does not work, or none does and zig cannot be had.
    """
    if target or kind == "zig":
        return get_zig(log, target)
    for candidate in _candidates(kind):
        if works(candidate):
            return candidate
    if kind != "auto":
        raise BuildError(f"{kind} compiles no C++ here", hint="Install it, or use --compiler zig.")
    return get_zig(log)


def _candidates(kind: str) -> list[Compiler]:
    """System compilers to try."""
    found = []
    named = os.environ.get("CC")
    if kind == "auto" and named:
        cxx = os.environ.get("CXX") or COMPANIONS.get(Path(named).name, named)
        found.append(Compiler("$CC", tuple(shlex.split(named)), tuple(shlex.split(cxx))))
    for name in SYSTEM_KINDS if kind == "auto" else (kind,):
        c, cxx_path = (shutil.which(command) for command in COMMANDS[name])
        if c and cxx_path:
            found.append(Compiler(name, (c,), (cxx_path,)))
    return found


def works(compiler: Compiler) -> bool:
    """Whether it makes a shared library from C++."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "probe.cpp").write_text(PROBE, encoding="ascii")
        command = [*compiler.cxx, "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "probe.cpp", "-o", "probe.so"]
        try:
            run(command, compiler.environment, folder)
        except BuildError:
            return False
        return (folder / "probe.so").is_file()


def zig_home() -> Path:
    """Where the cache keeps the ziglang wheel's content."""
    return cache_folder() / f"ziglang-{PINNED.ziglang}"


def get_zig(log: Log, target: str = "") -> Compiler:
    """The compiler of the ziglang wheel: of this environment, else of the cache, installed there if need be.

    Raises:
        BuildError: pip cannot install it.
    """
    home = zig_home()
    environment = {
        "ZIG_GLOBAL_CACHE_DIR": str(cache_folder() / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(cache_folder() / "zig"),
    }
    if not (home / "ziglang").is_dir() and importlib.util.find_spec("ziglang") is None:
        _install_zig(home, log)
    if (home / "ziglang").is_dir():
        environment["PYTHONPATH"] = str(home)
    # Without a target zig compiles for this very processor; a cache folder may serve several.
    options = ("-target", target) if target else ("-mcpu=baseline",)
    zig = (sys.executable, "-m", "ziglang")
    return Compiler("zig", (*zig, "cc", *options), (*zig, "c++", *options), target, environment)


def _install_zig(home: Path, log: Log) -> None:
    """Install the wheel into a folder, which appears under its name only when complete."""
    log(f"Getting a compiler (ziglang {PINNED.ziglang}, about 100 MB) into {home}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="installing-") as name:
        unfinished = Path(name) / "zig"
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(unfinished)]
        run([*pip, f"ziglang=={PINNED.ziglang}"], {})
        try:
            unfinished.rename(home)
        except OSError:
            if not (home / "ziglang").is_dir():  # otherwise another process was faster
                raise
