# SPDX-License-Identifier: Apache-2.0
"""The patched llama-quantize reads our importance matrices and makes the bytes that the converter makes with them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import make_files
import pytest
import torch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.imatrix_write import write_imatrix, write_legacy
from gguf_kit.tools import convert, imatrix
from gguf_kit.tools.llama_cpp import build, golden
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

N_ROWS = 48  # of each matrix; fewer weights take less time
WANTED = re.compile(r"(?!(double|single)_blocks\.[1-9])")
COUNT = 24.0
TYPES = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS")
PLAIN = (Weighting.NONE, Weighting.ROOT, Weighting.FULL)
WRITERS = {"gguf": write_imatrix, "legacy": write_legacy}


@pytest.fixture(scope="module")
def program() -> Path:
    """The patched llama-quantize, built once."""
    return build.build_llama_quantize(print)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Part of the tiny Flux, as safetensors and in its own precision as GGUF beside it."""
    path = tmp_path_factory.mktemp("part") / "part.safetensors"
    save_file({k: t[:N_ROWS].clone() for k, t in load_file(make_files.MODEL).items() if WANTED.match(k)}, path)
    assert convert.main(["--src", str(path), "--dst", str(path.with_suffix(".gguf"))]) == 0
    return path


@pytest.fixture(scope="module")
def recorded(part: Path) -> Imatrix:
    """What runs could have recorded of the part, with rows and gains."""
    generator = torch.Generator().manual_seed(11)
    entries = {}
    for name, weights in sorted(load_file(part).items()):
        if weights.dim() == 2:
            sums = torch.empty(1, weights.shape[1]).exponential_(generator=generator) * COUNT
            rows = torch.randn(7, weights.shape[1], generator=generator).bfloat16()
            entries[name] = Entry(sums, torch.tensor([COUNT]), rows, 0.5, 3.0)
    return Imatrix(Path("recorded"), entries, ("pictures",), 3, 1)


def quantize(program: Path, plain: Path, made: Path, recipe: Path, *options: object) -> str:
    """Run the program; what it says."""
    command = [program, "--tensor-type-file", recipe, *options, plain, made, "Q4_K_S", "1"]
    done = subprocess.run([str(arg) for arg in command], capture_output=True, text=True, env=golden.ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def assert_same_tensors(made: Path, expected: Path) -> None:
    ours, theirs = GGUFFile(expected), GGUFFile(made)
    assert list(theirs.tensors) == list(ours.tensors)
    for name, info in ours.tensors.items():
        assert (theirs.tensors[name].qtype, theirs.tensors[name].shape) == (info.qtype, info.shape)
        assert torch.equal(theirs.data(name), ours.data(name)), name


def differing(path: Path, other: Path) -> set[str]:
    """Names of the tensors whose bytes differ."""
    a, b = GGUFFile(path), GGUFFile(other)
    return {name for name in a.tensors if not torch.equal(a.data(name), b.data(name))}


def convert_part(part: Path, made: Path, *options: object) -> None:
    arguments = ["--src", part, "--dst", made, "--engine", "ggml", "--threads", 1, *options]
    assert convert.main([str(arg) for arg in arguments]) == 0


@pytest.mark.parametrize("file_format", WRITERS)
@pytest.mark.parametrize("type_name", TYPES)
def test_with_our_file_the_program_makes_the_converters_bytes(
    program, part, recorded, tmp_path, type_name, file_format
):
    path, recipe, unweighed = (tmp_path / name for name in ("i.imatrix", "recipe.txt", "unweighed.gguf"))
    WRITERS[file_format](recorded, path)
    types = "--type", "Q4_K_S", "--tensor-type", rf"_blocks\.0\..*weight$={type_name}"
    convert_part(part, tmp_path / "ours.gguf", *types, "--imatrix", path, "--export-recipe", recipe)
    said = quantize(program, part.with_suffix(".gguf"), tmp_path / "theirs.gguf", recipe, "--imatrix", path)
    assert f"loaded {len(recorded.entries)} importance matrix entries" in said
    assert "datasets=['pictures']" in said
    assert_same_tensors(tmp_path / "theirs.gguf", tmp_path / "ours.gguf")
    convert_part(part, unweighed, *types)
    made = {name for name, info in GGUFFile(unweighed).tensors.items() if info.qtype.name == type_name}
    assert differing(tmp_path / "ours.gguf", unweighed) >= made


def test_with_the_reduced_file_the_program_follows_a_recipes_weightings(program, part, recorded, tmp_path):
    full, recipe, reduced = (tmp_path / name for name in ("full.gguf", "recipe.txt", "reduced.gguf"))
    write_imatrix(recorded, full)
    names = [name for name in recorded.entries if re.search(r"_blocks\.0\.", name)]
    types = {name: TYPES[i % len(TYPES)] for i, name in enumerate(names)}
    weightings = {name: PLAIN[i % 3] for i, name in enumerate(names)}
    lines = [f"{name}={type_name}" for name, type_name in types.items()]
    lines += [f"#weighting {name}={w.value}" for name, w in weightings.items() if w is not Weighting.FULL]
    recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = tmp_path / "again.txt"
    options = "--recipe", recipe, "--imatrix", full, "--export-recipe", again
    convert_part(part, tmp_path / "ours.gguf", *options)
    assert imatrix.main(["reduce", str(full), str(reduced), "--recipe", str(again)]) == 0
    quantize(program, part.with_suffix(".gguf"), tmp_path / "theirs.gguf", again, "--imatrix", reduced)
    assert_same_tensors(tmp_path / "theirs.gguf", tmp_path / "ours.gguf")
    quantize(program, part.with_suffix(".gguf"), tmp_path / "unreduced.gguf", again, "--imatrix", full)
    weighed_otherwise = {name for name, weighting in weightings.items() if weighting is not Weighting.FULL}
    assert differing(tmp_path / "unreduced.gguf", tmp_path / "ours.gguf") == weighed_otherwise
