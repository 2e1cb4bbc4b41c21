# SPDX-License-Identifier: Apache-2.0
"""One command each for demo, tests, linters and benchmarks, on a machine with nothing but Python and nox.

    pip install nox uv
    nox -s demo            pictures and a table in demo-output/
    nox -s quality         what automatic recipes gain on a tiny Flux; tables and pictures in quality-output/
    nox -s tests           all tests; arguments after -- go to pytest (nox -s tests -- tests/e2e -k picture)
    nox -s coverage        unit and host tests, and which lines of the pack and its tools none of them ran
    nox -s lint
    nox -s bench           tests/bench/bench_*.py, into tests/bench/results; names after -- (bench_load, prototype_int8)
                           choose some, other arguments go to those; tests/make_bench_table.py puts results into the
                           READMEs

torch and its libraries are large, so all sessions share one environment, .nox/host-env, which fits the ComfyUI in use.
It is made once and changed when a requirement changes. The ComfyUI is the one of COMFYUI_PATH, else the one this folder
is installed in, else it is downloaded.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import _pack  # noqa: E402, F401
from gguf_kit.demo import host  # noqa: E402

nox.options.sessions = ["tests"]
nox.options.error_on_external_run = False

ENVIRONMENT = ROOT / ".nox" / "host-env"
INSTALLED = ENVIRONMENT / "installed-requirements.txt"
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
TOOLS = [
    "pytest>=8",
    "pytest-xdist==3.8.0",
    "coverage==7.17.3",
    "hypothesis>=6",
    "llvmlite==0.50.0",
    "tqdm",
    "Pillow",
    "playwright==1.65.2",
    "matplotlib",
    "scikit-image",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "codespell==2.4.3",
]
# Installed alone: torchaudio asks for another torch but imports beside this one; ggml judges the pack's encoders, and
# zig is one of the compilers that builds are tested with.
WITHOUT_DEPENDENCIES = ["torchaudio==2.11.0", "libggml-python==0.20.2.post1", "ziglang==0.17.1"]
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")}
MOST_WORKERS, WORKER_GB = 4, 6  # a process of tests takes up to 5 GB
LEAST_COVERED = 90  # percent of lines
NOT_RUNTIME = ("tests", "demo", "noxfile.py", ".nox", ".cache", ".ci")
TYPED = [
    "errors",
    "layouts",
    "mapped_file",
    "gguf_header",
    "gguf_file",
    "dequant",
    "kernels",
    "models",
    "loader",
    "quantize",
    "tools",
    "demo",
]


def count_workers() -> int:
    """Processes that tests run in: one per core as far as memory (where the system tells it) allows."""
    memory = MOST_WORKERS * WORKER_GB
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**9
    return max(1, min(os.cpu_count() or 1, MOST_WORKERS, memory // WORKER_GB))


def find_uv() -> str | None:
    """uv as installed beside nox, else on the PATH, else None."""
    try:
        from uv import find_uv_bin
    except ImportError:
        return shutil.which("uv")
    return str(find_uv_bin())


def environment_python() -> Path:
    """The interpreter of the shared environment."""
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(session: nox.Session) -> None:
    """Make the empty environment, with pip in it, unless a working one is there."""
    if (ENVIRONMENT / "pyvenv.cfg").is_file() and environment_python().exists():
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    uv = find_uv()
    command = [uv, "venv", "--seed", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    session.run(*command, str(ENVIRONMENT), external=True)


def wanted_requirements(comfyui: Path) -> list[str]:
    """What the pack, the host and the sessions need, torch pinned to what was tested."""
    pack = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [*TORCH, *pack, *TOOLS, *host.host_requirements(comfyui)]


def install(session: nox.Session, arguments: list[str]) -> None:
    """Install into the shared environment, by uv where there is one: it is several times faster."""
    uv, python = find_uv(), str(environment_python())
    command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    session.run(*command, *arguments, external=True)


def prepare(session: nox.Session) -> tuple[str, dict[str, str]]:
    """Python of an environment that has everything, ggml built, and variables for what runs in it."""
    make_environment(session)
    try:
        comfyui = host.get_host(environment_python())
    except host.HostError as error:
        session.error(str(error))
    wanted = wanted_requirements(comfyui)
    stamp = "\n".join([f"# Python {platform.python_version()}", *wanted, *WITHOUT_DEPENDENCIES, ""])
    if not INSTALLED.is_file() or INSTALLED.read_text(encoding="utf-8") != stamp:
        INSTALLED.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "requirements.txt"
            file.write_text("\n".join(wanted) + "\n", encoding="utf-8")
            install(session, ["-r", str(file)])
        install(session, ["--no-deps", *WITHOUT_DEPENDENCIES])
        INSTALLED.write_text(stamp, encoding="utf-8")
    session.log(f"ComfyUI {host.host_version(comfyui)} in {comfyui}")
    variables = {"COMFYUI_PATH": str(comfyui), "GGUF_KIT_CACHE": str(ROOT / ".cache" / "gguf-kit")}
    session.run(str(environment_python()), "tools/llama_cpp/build.py", env=variables, silent=True, external=True)
    return str(environment_python()), variables


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Make, load and sample a tiny Flux in each type through a real ComfyUI server; results in demo-output/."""
    python, variables = prepare(session)
    session.run(python, "demo/run.py", *session.posargs, env={**variables, **ONE_THREAD}, external=True)


@nox.session(python=False)
def quality(session: nox.Session) -> None:
    """Calibrate, tune, convert and judge automatic recipes on a tiny Flux; results in quality-output/."""
    python, variables = prepare(session)
    session.run(python, "demo/quality.py", *session.posargs, env={**variables, **ONE_THREAD}, external=True)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run the whole test suite."""
    python, variables = prepare(session)
    # The longest first, so that no process is left alone with it at the end.
    command = pytest_command(session.posargs, ["tests/e2e", "tests/host", "tests/unit"])
    session.run(python, *command, env={**variables, **ONE_THREAD}, external=True)


def pytest_command(arguments: list[str], folders: list[str]) -> list[str]:
    """pytest with arguments, on all of folders unless the arguments name files; -n 0 among them: in one process."""
    named = any(argument.startswith("tests") for argument in arguments)
    # A file's tests stay in one process (tests/conftest.py).
    parallel = ["-n", str(count_workers()), "--dist", "loadfile", "--no-loadscope-reorder"]
    # Without --confcutdir pytest imports the root's __init__.py, which wants a host.
    return ["-m", "pytest", "--confcutdir=tests", *parallel, *([] if named else folders), *arguments]


@nox.session(python=False)
def coverage(session: nox.Session) -> None:
    """Run unit and host tests, print the lines that none of them ran, and fail under LEAST_COVERED percent."""
    python, variables = prepare(session)
    folder = ROOT / ".cache" / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Whole paths: what the tests start runs in other folders.
    omitted = ",".join(f"{ROOT / name}{'' if name.endswith('.py') else '/*'}" for name in NOT_RUNTIME)
    tool = [python, "-m", "coverage"]
    data = ["--rcfile=tests/coverage.ini", f"--data-file={folder / 'lines'}"]
    command = pytest_command(session.posargs, ["tests/host", "tests/unit"])
    measured = [f"--source={ROOT}", f"--omit={omitted}"]
    session.run(*tool, "run", *data, *measured, *command, env={**variables, **ONE_THREAD}, external=True)
    session.run(*tool, "combine", "--quiet", *data, external=True)
    session.run(*tool, "report", *data, f"--omit={omitted}", f"--fail-under={LEAST_COVERED}", external=True)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Check style, types and spelling."""
    python, _ = prepare(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    listed = session.run("git", "ls-files", "--cached", "--others", "--exclude-standard", external=True, silent=True)
    session.run(python, "-m", "codespell_lib", *str(listed).split(), external=True)
    check_types(session, python)


def check_types(session: nox.Session, python: str) -> None:
    """Run mypy on the pack under the name gguf_kit: its relative imports need a parent package, the root has none."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gguf_kit").symlink_to(ROOT, target_is_directory=True)
        modules = [argument for name in TYPED for argument in ("-p", f"gguf_kit.{name}")]
        options = ["--strict", "--follow-imports=silent", "--config-file", str(ROOT / "pyproject.toml")]
        with session.chdir(folder):
            cache = str(ROOT / ".mypy_cache")
            session.run(python, "-m", "mypy", *options, "--cache-dir", cache, *modules, external=True)


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Run the benchmarks one after another; each replaces its older records of this kind of machine."""
    python, variables = prepare(session)
    folder = ROOT / "tests" / "bench"
    scripts = {script.stem: script for pattern in ("bench_*.py", "prototype_*.py") for script in folder.glob(pattern)}
    named = [argument for argument in session.posargs if argument in scripts]
    options = [argument for argument in session.posargs if argument not in scripts]
    if "--save" not in options:
        options.append("--save")
    for name in named or sorted(name for name in scripts if name.startswith("bench_")):
        session.run(python, str(scripts[name]), *options, env=variables, external=True)
