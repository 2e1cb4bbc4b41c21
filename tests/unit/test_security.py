# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises of the code as a whole, and that the tests which it names exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (".", "host", "kernels", "models", "quantize", "tools", "tools/llama_cpp")
PRODUCT = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py") if path.name != "noxfile.py")
BUILD_TOOL = ROOT / "tools" / "llama_cpp"
NETWORK = {"socket", "ssl", "urllib", "http", "requests", "aiohttp", "httpx", "urllib3", "ftplib", "smtplib",
           "socketserver", "xmlrpc", "websocket", "websockets", "asyncio", "huggingface_hub", "webbrowser"}  # fmt: skip
UNPICKLERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "yaml", "jinja2"}
# Where generated code is run: from the pack's own table of formats. And pickle for the names of what it raises.
EXECUTES = {("kernels/triton_gpu.py", "loader.exec_module"), ("kernels/triton_gpu.py", "self.source_to_code")}
NAMES_ERRORS_ONLY = {"quantize/containers.py": {"pickle.UnpicklingError"}}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """What is called, as it is written, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_product_is_what_is_looked_at() -> None:
    assert {"loader.py", "host/patcher.py", "quantize/containers.py", "tools/convert.py"} <= {*map(name_of, PRODUCT)}


@pytest.mark.parametrize("path", [p for p in PRODUCT if not p.is_relative_to(BUILD_TOOL)], ids=name_of)
def test_nothing_but_the_build_tool_speaks_to_a_network(path: Path) -> None:
    assert not imported(parse(path)) & NETWORK
    assert not re.search(r"\b(?:routes|app)\.(?:get|post|put|delete|ws|add_\w+)\b\(", path.read_text(encoding="utf-8"))


def test_the_check_would_see_a_connection() -> None:
    assert imported(parse(BUILD_TOOL / "source.py")) & NETWORK == {"http", "ssl", "urllib"}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree, name = parse(path), name_of(path)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    pickles = {text for text in used if text.split(".")[0] in UNPICKLERS}
    assert pickles <= NAMES_ERRORS_ONLY.get(name, set())
    assert imported(tree) & UNPICKLERS <= {text.split(".")[0] for text in NAMES_ERRORS_ONLY.get(name, ())}
    for called, call in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called == "torch.load":
            assert options.get("weights_only") == "True"
        if called.endswith("load_torch_file"):
            assert options.get("safe_load") == "True"
        assert called not in ("eval", "exec", "compile", "__import__")
        assert not called.endswith((".exec_module", ".source_to_code")) or (name, called) in EXECUTES


def named_tests() -> list[tuple[str, str]]:
    """(file, function) of the tests that SECURITY.md names."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


@pytest.mark.parametrize(("file", "function"), named_tests(), ids=lambda part: part)
def test_a_test_that_is_named_exists(file: str, function: str) -> None:
    tree = parse(ROOT / file)
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test() -> None:
    promises = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## ")[1]
    parts = re.split(r"\n\n(?=\*\*)", promises)[1:]
    assert len(parts) >= 10
    assert all(re.search(r"^Tests?: `tests/", part, re.MULTILINE) for part in parts)
