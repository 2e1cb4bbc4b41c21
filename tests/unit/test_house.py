# SPDX-License-Identifier: Apache-2.0
"""The house as the README draws it: who imports whom, and who knows ComfyUI."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room may import from those to its left in one of these lines, directly or further left.
LINES = (
    (("errors",), ("mapped_file", "gguf_header"), ("gguf_file",)),
    (("errors", "layouts"), ("gguf_file", "kernels"), ("dequant",), ("models",), ("loader",)),
    (("dequant",), ("host.compat",), ("host.lora",), ("host.layer",), ("ops",)),
    (("host.low_rank",), ("host.kept_factors",), ("host.lora",), ("host.patcher",)),
    (("host.weight_params",), ("host.compat",)),
    (("dequant",), ("host.product",), ("host.compat",)),
    (("mapped_file", "host.compat"), ("host.file_bytes",), ("host.layer",)),
    (("host.lazy_weight", "host.native"), ("host.layer",)),
    (("errors", "host.layer"), ("host.plain",)),
    (("host.lora", "host.native", "host.plain"), ("host.patcher",)),
    (("layouts", "host.compat"), ("host.kept_weights",), ("host.patcher",)),
    (("layouts", "dequant"), ("host.advice",), ("service",)),
    (("models",), ("host.text_encoders",)),
    (("gguf_file", "kernels", "dequant", "models"), ("quantize",)),
    (("quantize", "host.compat", "host.lora"), ("saver",), ("nodes_save",), ("nodes",)),
    (("errors", "host.collect_rows", "host.collect_calls"), ("host.collector",), ("collector",)),
    (("host.compat", "host.collect_calls", "host.collector"), ("host.collect_gains",), ("collector",)),
    (("saver",), ("collector", "nodes_save"), ("nodes_imatrix",), ("nodes",)),
    (("loader", "ops", "host.native", "host.patcher", "host.text_encoders"), ("service",), ("nodes",), ("__init__",)),
    (("host.node_functions", "service"), ("components",), ("nodes_components",), ("nodes",)),
    (("models",), ("folders",), ("nodes_components", "nodes_checkpoint"), ("nodes",)),
    (("host.prompt_server",), ("host.page",), ("service", "saver"), ("components",)),
    (("host.prompt_server",), ("host.other_packs", "host.replacements"), ("__init__",)),
    (("loader", "host.page"), ("node_text",), ("nodes_components", "nodes_checkpoint"), ("nodes",)),
    (("components",), ("checkpoint",), ("nodes_checkpoint",), ("nodes",)),
)
KNOW_COMFY = ("nodes", "nodes_save", "nodes_components", "components", "folders", "service", "saver", "ops")
KNOW_COMFY += ("checkpoint", "nodes_checkpoint", "collector", "nodes_imatrix")
KNOW_COMFY += tuple(f"host.{path.stem}" for path in ROOT.glob("host/*.py"))
HOST_MODULES = {"comfy", "nodes", "folder_paths", "comfyui_version", "comfy_kitchen"}
ROOMS_OF_MANY = ("kernels", "models", "quantize")  # one room each; host's modules are rooms of their own
MODULES = sorted(
    path
    for path in [*ROOT.glob("*.py"), *(path for name in (*ROOMS_OF_MANY, "host") for path in ROOT.glob(f"{name}/*.py"))]
    if path.name != "noxfile.py"
)


def room(module):
    """A module's name in LINES."""
    return module.split(".")[0] if module.split(".")[0] in ROOMS_OF_MANY else module


def left_of(name):
    """Rooms that a room may import from."""
    allowed = {name}
    grew = True
    while grew:
        size = len(allowed)
        for line in LINES:
            for i, names in enumerate(line):
                if allowed & set(names):
                    allowed |= {left for group in line[:i] for left in group}
        grew = len(allowed) > size
    return allowed


def imports(path):
    """(pack modules, top-level packages) that a file imports anywhere in it."""
    package = list(path.relative_to(ROOT).parts[:-1])
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*target, alias.name] for alias in node.names]
            ours |= {".".join(n if (ROOT.joinpath(*n)).with_suffix(".py").exists() else n[:-1]) for n in names}
    return ours, others


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_rooms_to_its_left(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    ours, others = imports(path)
    allowed = left_of(room(module.removesuffix(".__init__") if "." in module else module))
    assert {room(name) for name in ours} <= allowed
    assert "tools" not in {name.split(".")[0] for name in ours}
    if room(module) not in KNOW_COMFY:
        assert not others & HOST_MODULES


def test_the_check_sees_what_it_should():
    assert left_of("loader") == {
        *"loader models dequant gguf_file gguf_header mapped_file kernels errors layouts".split()
    }
    assert "loader" not in left_of("ops")
    assert imports(ROOT / "loader.py")[0] >= {"errors", "gguf_file", "models.archs", "models.text_encoders"}
    assert "comfy" in imports(ROOT / "host" / "lora.py")[1]
