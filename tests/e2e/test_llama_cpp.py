# SPDX-License-Identifier: Apache-2.0
"""ggml and the patched llama-quantize, built from the pinned source with real compilers; judged by others' ggml.

The source and the builds are kept in the cache folder, so only the first run builds.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import make_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.quantize import ggml
from gguf_kit.tools import convert
from gguf_kit.tools.llama_cpp import build, compilers, golden, source

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FAST = [QType[name] for name in golden.PROGRAM_TYPES]
FLOATS = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}
LONG, LONGER = "Model.Block_" + "x" * 115, "y" * 247
MISSING = {kind: not all(map(shutil.which, pair)) for kind, pair in compilers.COMMANDS.items()}
MISSING["zig"] = importlib.util.find_spec("ziglang") is None and not compilers.zig_home().is_dir()

# Name, torch shape, type in the recipe.
TENSORS: tuple[tuple[str, tuple[int, ...], QType], ...] = (
    (LONG, (8, 256), QType.Q4_K),
    (LONGER, (3, 512), QType.Q6_K),
    ("many.rows", (70, 1024), QType.Q5_K),
    ("A.weight", (4, 256), QType.Q3_K),
    ("a.weight", (4, 256), QType.Q2_K),
    ("x = y.z[0]+(w)$", (2, 256), QType.IQ4_XS),
    ("blk.0.attn_norm.weight", (256,), QType.Q8_0),
    ("blk.0.attn_v.weight", (4, 256), QType.Q2_K),
    ("token_embd.weight", (4, 256), QType.IQ3_XXS),
    ("output.weight", (4, 256), QType.IQ4_NL),
    ("conv.4d", (3, 2, 5, 256), QType.Q4_K),
    ("stack.3d", (3, 7, 64), QType.Q5_1),
    ("narrow.weight", (6, 96), QType.Q4_0),
    ("to_f32", (5, 33), QType.F32),
    ("to_f16", (5, 33), QType.F16),
    ("stays.bf16.weight", (4, 256), QType.BF16),
    ("one.element", (1,), QType.F32),
    ("one.element.kept", (1,), QType.BF16),
    ("empty", (0,), QType.F32),
)
WITH_IMPORTANCE = (LONG, LONGER, "many.rows", "A.weight", "token_embd.weight", "output.weight", "conv.4d")


@pytest.fixture(scope="session")
def archive() -> Path:
    """The pinned source, downloaded once."""
    return source.fetch_archive(print)


@pytest.fixture(scope="session")
def program() -> Path:
    """The patched llama-quantize, built once."""
    return build.build_llama_quantize(print)


@pytest.fixture(scope="session")
def sources(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched sources, with what the build generates."""
    return build._prepare(archive, tmp_path_factory.mktemp("sources"), print)


def write_gguf(path: Path, arch: str, values: Mapping[str, torch.Tensor]) -> None:
    """A BF16 GGUF of any architecture, from bfloat16 tensors."""
    writer = gguf.GGUFWriter(path, arch)
    for name, tensor in values.items():
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=QType.BF16)
    golden._write_file(writer)


def write_imatrix(path: Path, importance: Mapping[str, torch.Tensor]) -> None:
    """An importance matrix as llama.cpp writes it, each from 4 tokens."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["pictures"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 4)
    for name, values in importance.items():
        writer.add_tensor(f"{name}.in_sum2", (values * 4).numpy())
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 4, np.float32))
    golden._write_file(writer)


def make_values() -> dict[str, torch.Tensor]:
    """bfloat16 values for TENSORS."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape, _ in TENSORS}


def make_importance() -> dict[str, torch.Tensor]:
    """float32 importances for WITH_IMPORTANCE."""
    generator = torch.Generator().manual_seed(4)
    columns = {name: shape[-1] for name, shape, _ in TENSORS}
    return {name: torch.rand(columns[name], generator=generator) + 0.01 for name in WITH_IMPORTANCE}


def expected_bytes(values: torch.Tensor, qtype: QType, importance: torch.Tensor | None) -> bytes:
    """What ggml_quantize_chunk of the ggml built by others gives for float32 rows."""
    if qtype in FLOATS:
        return values.to(FLOATS[qtype]).view(torch.uint8).numpy().tobytes()
    rows = values.float().reshape(-1, values.shape[-1]).contiguous()
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    out = torch.zeros(len(rows), rows.shape[1] // block_size * type_size, dtype=torch.uint8)
    if out.numel():
        ggml.Ggml(Path(make_files.load_ggml()._name)).quantize(rows, qtype, importance, out)
    return out.numpy().tobytes()


def quantize(
    program: Path, folder: Path, recipe: str, *options: str, ftype: str = "Q4_K_S"
) -> subprocess.CompletedProcess[str]:
    """Run the program on folder/in.gguf."""
    (folder / "recipe.txt").write_text(recipe, encoding="utf-8")
    command = [str(program), "--tensor-type-file", "recipe.txt", *options, "in.gguf", "out.gguf", ftype, "3"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=golden.ENVIRONMENT)


def whole_recipe() -> str:
    return "# made by hand\n" + "".join(f"{name}={qtype.name}\n" for name, _, qtype in TENSORS)


@pytest.mark.parametrize("arch", ["my own/Model v2", "flux", "llama"], ids=["odd", "flux", "llama"])
@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
def test_the_program_gives_the_recipes_types_and_ggmls_bytes(program, tmp_path, arch, with_imatrix):
    values, importance = make_values(), make_importance()
    write_gguf(tmp_path / "in.gguf", arch, values)
    write_imatrix(tmp_path / "imatrix.gguf", importance)
    done = quantize(program, tmp_path, whole_recipe(), *(["--imatrix", "imatrix.gguf"] if with_imatrix else []))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = GGUFFile(tmp_path / "out.gguf")
    assert made.metadata["general.architecture"] == arch
    assert {name: info.qtype for name, info in made.tensors.items()} == {name: qtype for name, _, qtype in TENSORS}
    for name, shape, qtype in TENSORS:
        assert tuple(made.tensors[name].shape) == shape
        row = importance.get(name) if with_imatrix else None
        assert made.data(name).numpy().tobytes() == expected_bytes(values[name], qtype, row), name


@pytest.mark.parametrize("ftype", ["F16", "Q2_K_S", "Q8_0"])
def test_the_recipe_is_final_whatever_the_file_type(program, tmp_path, ftype):
    values = make_values()
    write_gguf(tmp_path / "in.gguf", "llama", values)
    done = quantize(program, tmp_path, whole_recipe().replace("\n", "\r\n"), ftype=ftype)
    assert done.returncode == 0, done.stderr[-2000:]
    made = GGUFFile(tmp_path / "out.gguf")
    assert {name: info.qtype for name, info in made.tensors.items()} == {name: qtype for name, _, qtype in TENSORS}


def test_tensors_that_no_line_names_follow_the_file_type(program, tmp_path):
    generator = torch.Generator().manual_seed(5)
    shapes = {"other.weight": (4, 256), "other.bias": (256,), "blk.0.attn_v.weight": (4, 256), "A.weight": (4, 256)}
    values = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    write_gguf(tmp_path / "in.gguf", "flux", values)
    done = quantize(program, tmp_path, "a.weight=Q8_0\nA.weight.more=Q8_0\nA.w.ight=Q8_0\n", ftype="Q2_K")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: info.qtype.name for name, info in GGUFFile(tmp_path / "out.gguf").tensors.items()}
    assert found == {"other.weight": "Q2_K", "other.bias": "BF16", "blk.0.attn_v.weight": "Q2_K", "A.weight": "Q2_K"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("x.weight=Q4_K\n", "tensor 'x.weight': rows do not fill blocks of q4_K"),
        ("x.weight=IQ2_XS\n", "rows do not fill blocks"),
        ("x.weight=Q9_9\n", "invalid ggml_type 'Q9_9'"),
        ("x.weight\n", "malformed tensor type 'x.weight'"),
    ],
    ids=["columns", "columns-iq", "type", "line"],
)
def test_a_recipe_that_cannot_be_followed_is_refused(program, tmp_path, recipe, message):
    write_gguf(tmp_path / "in.gguf", "flux", {"x.weight": torch.ones(2, 96, dtype=torch.bfloat16)})
    done = quantize(program, tmp_path, recipe)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr


def test_a_type_that_needs_an_imatrix_is_refused_without_one(program, tmp_path):
    write_gguf(tmp_path / "in.gguf", "flux", {"x.weight": torch.ones(2, 256, dtype=torch.bfloat16)})
    done = quantize(program, tmp_path, "x.weight=IQ2_XS\n")
    assert done.returncode == 1
    assert "requires an imatrix" in done.stdout + done.stderr


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q3_K_S"])
def test_the_classical_chain_writes_what_the_converter_writes(program, tmp_path, type_name):
    """Exactly the commands of README.md, with the tiny Flux."""
    plain, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "theirs"))
    recipe = tmp_path / "recipe.txt"
    assert convert.main(["--src", str(make_files.MODEL), "--dst", str(plain)]) == 0
    options = ["--src", str(make_files.MODEL), "--dst", str(ours), "--type", type_name]
    assert convert.main([*options, "--export-recipe", str(recipe)]) == 0
    command = [program, "--tensor-type-file", recipe, plain, theirs, type_name]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    made, expected = GGUFFile(theirs), GGUFFile(ours)
    assert list(made.tensors) == list(expected.tensors)
    for name, info in expected.tensors.items():
        assert (made.tensors[name].qtype, made.tensors[name].shape) == (info.qtype, info.shape)
        assert torch.equal(made.data(name), expected.data(name)), name


def test_our_applier_and_git_apply_agree_on_the_patch(archive, sources, tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(source, "apply_patch", lambda *_: None)
    plain = source.prepare_source(archive, tmp_path / "plain", print)
    command = ["git", "apply", "--whitespace=nowarn", str(source.PATCH)]
    subprocess.run(command, cwd=plain, check=True, capture_output=True)
    for path in plain.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (sources / path.relative_to(plain)).read_bytes(), path


@pytest.mark.parametrize("kind", [kind for kind in compilers.KINDS if kind not in ("auto", "cc")])
def test_every_compiler_gives_the_stored_bytes(sources, tmp_path, kind):
    if MISSING[kind]:
        pytest.skip(f"{kind} is not installed")
    compiler = compilers.find_compiler(kind, print)
    root = shutil.copytree(sources, tmp_path / "source")
    library = build._link_library(compiler, root, tmp_path / "out" / "ggml.so", None)
    assert golden.wrong_types(ggml.Ggml(library), FAST) == []


def test_a_library_built_for_speed_instead_of_exactness_is_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PINNED", source.Pinned(**{**vars(source.PINNED), "flags": ("-O2", "-ffast-math")}))
    compiler = compilers.find_compiler("auto", print)
    root = shutil.copytree(sources, tmp_path / "source")
    library = build._link_library(compiler, root, tmp_path / "out" / "ggml.so", None)
    monkeypatch.setattr(ggml, "ENCODABLE", frozenset(FAST))
    monkeypatch.setattr(build, "SLOW_TYPES", ("Q8_0",))
    with pytest.raises(ggml.BuildError, match="other bytes than stored"):
        build._check_library(library)


def test_the_library_that_convert_builds_is_found_again(archive):
    library = build.build_ggml(print)
    assert ggml.find_library() == library
    assert build.build_ggml(lambda line: pytest.fail(line)) == library
    assert golden.wrong_types(ggml.Ggml(library), FAST) == []
