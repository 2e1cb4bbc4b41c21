# SPDX-License-Identifier: Apache-2.0
"""What registry.comfy.org asks of a pack: pyproject.toml, pictures, what the archive holds, and the workflow files.

Source: docs.comfy.org/registry/specifications and /standards; comfy-cli 1.23 config_parser.py and file_utils.py.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
NAMED = {"REPLACE-WITH-OWNER": "some-owner", "REPLACE-WITH-PUBLISHER-ID": "some-publisher"}

VERSION = r"\d+\.\d+\.\d+(-[A-Za-z0-9]+)?"
VERSION_RANGE = rf"(==|>=|<=|!=|~=|>|<|<>) ?{VERSION}(, ?(==|>=|<=|!=|~=|>|<|<>) ?{VERSION})*"
URL = r"https://[\w./#-]+"
PICTURE = r"https://[\w./-]+\.(svg|png|jpg|gif)"
# Letters, digits and single separators between them; no digit first.
NAME = r"(?=.{1,99}$)(?!.*comfyui)[a-z](?:[-_.]?[a-z0-9])*"
ANYTHING = r"(?s).*\S.*"
SYSTEMS = r"(OS Independent|Microsoft|POSIX|MacOS)( ::.*)?"
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}


@dataclass(frozen=True)
class Rule:
    """A text of pyproject.toml: where it stands, what it has to match (case is ignored), whether it must be there."""

    place: str
    pattern: str
    required: bool = True


RULES = (
    Rule("project.name", NAME),
    Rule("project.version", VERSION),
    Rule("project.description", ANYTHING),
    Rule("project.requires-python", r">=3\.\d+"),
    Rule("project.urls.Repository", r"https://github\.com/[\w.-]+/[\w.-]+"),
    Rule("project.urls.Documentation", URL),
    Rule("project.urls.Issues", URL),
    Rule("tool.comfy.PublisherId", r"[\w-]+"),
    Rule("tool.comfy.DisplayName", ANYTHING),
    Rule("tool.comfy.Icon", PICTURE),
    Rule("tool.comfy.Banner", PICTURE),
    Rule("tool.comfy.requires-comfyui", VERSION_RANGE),
    Rule("tool.comfy.web", ANYTHING, required=False),
)
COMFY_KEYS = {
    "PublisherId",
    "DisplayName",
    "Icon",
    "Banner",
    "requires-comfyui",
    "Models",
    "includes",
    "web",
    "version",
}
MODEL_KEYS = {"location", "model_url"}  # of each entry of Models; comfy-cli fails on one that lacks any

# Registry's standards: no exec and eval, no pip from a running node. And what does the same by another name.
TEXT_RUNNERS = {"exec", "eval", "compile", "__import__"}
# FunctionType is none: it takes code that is there already.
CODE_RUNNERS = {
    "exec_module",
    "load_module",
    "source_to_code",
    "spec_from_file_location",
    "spec_from_loader",
    "module_from_spec",
    "CodeType",
    "run_path",
    "run_module",
    "runcode",
    "runsource",
}
# Kernels for Triton, made of the pack's own table of formats. CodeType is an annotation there.
KNOWN_CODE = {"kernels/triton_gpu.py": {"CodeType", "exec_module", "source_to_code"}}
KNOWN_PIP = {"tools/llama_cpp/compilers.py": "a command line tool's own folder, never the environment; no node runs it"}


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def find(data: Any, place: str) -> Any:
    """What stands at a dotted place, or None."""
    for key in place.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def broken_rules(data: dict[str, Any]) -> list[str]:
    """Places whose text breaks its rule, and what else is wrong."""
    wrong = []
    for rule in RULES:
        text = find(data, rule.place)
        if text is None and not rule.required:
            continue
        if not isinstance(text, str) or not re.fullmatch(rule.pattern, text, re.IGNORECASE):
            wrong.append(f"{rule.place} = {text!r}")
    license_of = find(data, "project.license")
    if not isinstance(license_of, dict) or len(license_of) != 1 or not license_of.keys() <= {"file", "text"}:
        wrong.append(f"project.license = {license_of!r}")
    if find(data, "project.dynamic"):  # the registry would show no dependencies
        wrong.append("project.dynamic")
    wrong += [f"classifier {name!r}" for name in find(data, "project.classifiers") or [] if not is_classifier(name)]
    comfy = find(data, "tool.comfy") or {}
    wrong += sorted(f"tool.comfy.{key}" for key in comfy.keys() - COMFY_KEYS)
    wrong += [f"Models entry {entry!r}" for entry in comfy.get("Models", []) if entry.keys() != MODEL_KEYS]
    return wrong


def is_classifier(name: str) -> bool:
    """Whether the registry takes a classifier: one that it reads and does not know voids all of its kind."""
    kind, _, value = name.partition(" :: ")
    if kind == "Operating System":
        return re.fullmatch(SYSTEMS, value) is not None
    return value in ACCELERATORS if kind == "Environment" else True


def test_pyproject_keeps_every_rule() -> None:
    assert broken_rules(read_pyproject()) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("project.name", "ComfyUI-GGUF-Kit"),
        ("project.name", "4bit-kit"),
        ("project.name", "gguf--kit"),
        ("project.name", "gguf-kit-"),
        ("project.name", "g" * 100),
        ("project.version", "1.0"),
        ("project.license", "Apache-2.0"),
        ("project.dynamic", ["dependencies"]),
        ("project.classifiers", ["Environment :: GPU"]),
        ("project.classifiers", ["Operating System :: Linux"]),
        ("project.urls.Repository", None),
        ("tool.comfy.PublisherId", ""),
        ("tool.comfy.Icon", "docs/icon.png"),
        ("tool.comfy.requires-comfyui", ">=0.3"),
        ("tool.comfy.Models", [{"location": "checkpoints"}]),
        ("tool.comfy.publisher", "me"),
    ],
    ids=str,
)
def test_a_broken_rule_is_found(place: str, value: Any) -> None:
    data = read_pyproject()
    *folders, key = place.split(".")
    find(data, ".".join(folders))[key] = value
    assert len(broken_rules(data)) == 1


def test_requirements_and_dependencies_agree() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip()] == find(read_pyproject(), "project.dependencies")


def test_license_and_latest_change_are_of_this_version() -> None:
    data = read_pyproject()
    assert (ROOT / find(data, "project.license.file")).is_file()
    assert (ROOT / find(data, "project.readme")).is_file()
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == find(data, "project.version")


def test_all_urls_are_of_the_repository() -> None:
    data = read_pyproject()
    repository = find(data, "project.urls.Repository")
    assert repository.endswith("/" + find(data, "project.name"))
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert all(url.startswith(repository) for url in find(data, "project.urls").values())
    for key in ("Icon", "Banner"):
        url = find(data, f"tool.comfy.{key}")
        assert url.startswith(raw)
        assert (ROOT / url.removeprefix(raw)).is_file()
    clones = [line for path in ROOT.glob("README*.md") for line in path.read_text(encoding="utf-8").splitlines()]
    assert {line.split()[-1].removesuffix(".git") for line in clones if "git clone" in line} == {repository}


def picture_size(key: str) -> tuple[int, int]:
    """Width and height in pixels of the PNG that tool.comfy names."""
    name = find(read_pyproject(), f"tool.comfy.{key}").rpartition("/")[2]
    content = (ROOT / "docs" / name).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) <= 20 * 1024
    return struct.unpack(">II", content[16:24])


def test_icon_is_square_and_small() -> None:
    width, height = picture_size("Icon")
    assert width == height <= 400


def test_banner_is_wide() -> None:
    width, height = picture_size("Banner")
    assert width * 9 == height * 21


def ignored_names() -> set[str]:
    """What .comfyignore keeps out of the archive: top-level names, and paths of single files."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"/[\w.-]+/?|/[\w./-]+\.(json|jpg)", name) for name in names)
    return {name.strip("/") for name in names}


@functools.cache
def archived_modules() -> dict[str, ast.Module]:
    """Python files of the archive by their path: everything that is neither ignored nor hidden."""
    left_out = ignored_names()
    tops = [path for path in ROOT.iterdir() if path.name not in left_out and not path.name.startswith(".")]
    files = [file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top]) if file.suffix == ".py"]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def test_archive_has_the_pack_and_not_its_tests() -> None:
    left_out = ignored_names()
    assert {"tests", "demo", "docs", ".ci", ".github", "noxfile.py"} <= left_out
    assert left_out.isdisjoint({"web", "locales", "example_workflows", "LICENSE", "README.md", "requirements.txt"})
    modules = archived_modules()
    assert {
        "__init__.py",
        "nodes.py",
        "host/compat.py",
        "kernels/torch_reference.py",
        "tools/convert.py",
    } <= modules.keys()
    assert not any(path.startswith(("tests/", "demo/")) for path in modules)


def test_archive_has_no_template_that_needs_the_demo() -> None:
    """And each one that is left out is left out with its picture."""
    templates = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "example_workflows").glob("*.json")}
    needing = {name for name, path in templates.items() if "demo/install.py" in path.read_text(encoding="utf-8")}
    pictures = {name.replace(".json", ".jpg") for name in needing}
    assert {name for name in ignored_names() if "/" in name} == needing | pictures
    assert needing
    assert len(templates) > len(needing)


def ways_to_run_text(tree: ast.AST) -> set[str]:
    """Ways to run Python text or code objects that a file has, called or passed on."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & TEXT_RUNNERS
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_builtins = {node.attr for node in attributes if ast.unparse(node.value) in ("builtins", "__builtins__")}
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    named = {node.attr for node in attributes} | imported
    return names | (of_builtins & TEXT_RUNNERS) | (named & CODE_RUNNERS)


def installs_packages(tree: ast.Module) -> bool:
    """Whether a list of a command line has pip and install."""
    lists = (node.elts for node in ast.walk(tree) if isinstance(node, ast.List))
    texts = ({item.value for item in items if isinstance(item, ast.Constant)} for items in lists)
    return any({"pip", "install"} <= text for text in texts)


def test_nothing_of_the_archive_executes_text_or_installs_packages_but_what_is_known() -> None:
    modules = archived_modules()
    assert {path: found for path, tree in modules.items() if (found := ways_to_run_text(tree))} == KNOWN_CODE
    assert {path for path, tree in modules.items() if installs_packages(tree)} == KNOWN_PIP.keys()
    assert installs_packages(ast.parse("run([python, '-m', 'pip', 'install', 'x'])"))


@pytest.mark.parametrize(
    "text",
    [
        "x = [eval('1')]",
        "run = exec",
        "builtins.exec(text)",
        "module.__builtins__; __builtins__.eval(text)",
        "code = compile(text, '', 'exec')",
        "spec.loader.exec_module(module)",
        "loader.source_to_code(text, '')",
        "from importlib.util import spec_from_loader",
        "types.CodeType(*parts)",
        "runpy.run_path(path)",
        "from runpy import run_path",
        "code.InteractiveInterpreter().runsource(text)",
    ],
)
def test_the_check_sees_code_that_is_run(text: str) -> None:
    assert ways_to_run_text(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "re.compile(text)",
        "torch.compile(model)",
        "model.eval()",
        "FunctionType(f.__code__, {})",
        "def exec_module(): pass",
    ],
)
def test_the_check_takes_other_things_of_such_names(text: str) -> None:
    assert not ways_to_run_text(ast.parse(text))


def read_workflow(name: str) -> dict[str, Any]:
    """A workflow file. YAML reads its key `on` as True."""
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(path.name for path in WORKFLOWS.iterdir()))
def test_workflow_is_complete_and_pinned(name: str) -> None:
    workflow = read_workflow(name)
    assert workflow[True]
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["runs-on"] and job["timeout-minutes"] for job in workflow["jobs"].values())
    for step in steps_of(workflow):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))


def test_tests_run_as_the_readme_says() -> None:
    workflow = read_workflow("tests.yml")
    commands = [step["run"] for step in steps_of(workflow) if "run" in step]
    sessions = workflow["jobs"]["nox"]["strategy"]["matrix"]["session"]
    run = [command.replace("${{ matrix.session }}", name) for command in commands for name in sessions]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"pip install nox uv", "nox -s tests", "nox -s lint"} == set(run)
    assert all(command in readme for command in run)


def check_before_publishing(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """Run the workflow's own check in a folder with a pyproject.toml and a README.md."""
    script = next(step["run"] for step in steps_of(read_workflow("publish.yml")) if "run" in step)
    environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("bash", path="/usr/bin:/bin") is None, reason="the workflow's check is for bash")
@pytest.mark.parametrize("left", [None, *NAMED, "a readme", "a tag"], ids=str)
def test_publishing_is_refused_while_a_placeholder_is_left(tmp_path: Path, left: str | None) -> None:
    version = find(read_pyproject(), "project.version")
    for name in ("pyproject.toml", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for placeholder, value in NAMED.items():
            if placeholder != left and not (left == "a readme" and name == "README.md"):
                text = text.replace(placeholder, value)
        (tmp_path / name).write_text(text, encoding="utf-8")
    if left == "a readme":
        (tmp_path / "README.md").write_text("git clone https://github.com/REPLACE-WITH-OWNER/x", encoding="utf-8")
    done = check_before_publishing(tmp_path, "v9.9.9" if left == "a tag" else f"v{version}")
    assert done.returncode == (0 if left is None else 1)
    assert ("::error::" in done.stdout) == (left is not None)


def test_publishing_comes_after_the_check_and_of_what_was_checked() -> None:
    steps = steps_of(read_workflow("publish.yml"))
    checks = [index for index, step in enumerate(steps) if "run" in step]
    publishes = [index for index, step in enumerate(steps) if "publish-node-action" in step.get("uses", "")]
    assert len(publishes) == 1
    assert checks[0] < publishes[0]
    assert steps[publishes[0]]["with"]["skip_checkout"] == "true"
    assert not any(step.get("if") or step.get("continue-on-error") for step in steps)
