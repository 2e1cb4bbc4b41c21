# SPDX-License-Identifier: Apache-2.0
"""Golden files of the recipes: which type every tensor of a model of each architecture gets in each of them."""

import difflib
import itertools
import re

import make_schemas
import pytest
from gguf_kit.models import archs
from gguf_kit.quantize.recipes import RECIPES

MAX_LINES_SHOWN = 40


def read_schema(name):
    return (make_schemas.FOLDER / f"{name}.schema").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", make_schemas.MODELS)
def test_types_are_those_of_the_golden_file(name):
    expected, got = read_schema(name).splitlines(), make_schemas.make_schema(name).splitlines()
    changes = list(difflib.unified_diff(expected, got, f"{name}.schema", "the recipes now", lineterm="", n=0))
    shown = "\n".join(changes[:MAX_LINES_SHOWN])
    assert not changes, f"{shown}\nIf this is meant: python tests/make_schemas.py {name}"


@pytest.mark.parametrize("name", make_schemas.MODELS)
def test_a_golden_file_has_all_recipes_in_their_order(name):
    assert re.findall(r"^\[(.+)\]", read_schema(name), re.MULTILINE) == ["kept", *RECIPES]


# Text encoders whose tensors do the same as those of one that has a golden file.
ALIKE = {"qwen3vl", "qwen35", "gemma4", "gpt-oss", "jina_clip", "t5gemma"}


def test_every_architecture_has_a_golden_file():
    names = {arch.name for arch in (*archs.ARCHS, *archs.ENCODERS, archs.GENERIC) if not arch.reject} - ALIKE
    assert set(make_schemas.MODELS) == names
    assert {path.stem for path in make_schemas.FOLDER.glob("*.schema")} == names


def unfold(name):
    """The names that a name with sets of numbers stands for."""
    parts = re.split(r"\{(.+?)\}", name)
    sets = [[part] for part in parts]
    for i in range(1, len(parts), 2):
        runs = [list(map(int, run.split(".."))) for run in parts[i].split(",")]
        sets[i] = [str(n) for run in runs for n in range(run[0], run[-1] + 1)]
    return ["".join(chosen) for chosen in itertools.product(*sets)]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.weight"], ["a.weight"]),
        (["b.0.w", "b.1.w", "b.4.w"], ["b.{0..1,4}.w"]),
        (["b.0.x2.w", "b.0.x3.w", "b.7.x2.w", "b.7.x3.w"], ["b.{0,7}.x{2..3}.w"]),
        (["b.0.x2.w", "b.7.x3.w", "b.7.x2.w"], ["b.0.x2.w", "b.7.x{2..3}.w"]),
        (["b.1.w", "a.1.w", "b.2.w"], ["b.{1..2}.w", "a.1.w"]),
    ],
    ids=["no number", "a set", "a product", "no product", "two patterns"],
)
def test_names_are_folded_into_exactly_themselves(names, folded):
    assert make_schemas.fold_names(names) == folded
    assert sorted(itertools.chain.from_iterable(map(unfold, folded))) == sorted(names)


@pytest.mark.parametrize("name", make_schemas.MODELS)
def test_no_tensor_is_listed_twice_in_a_section(name):
    for section in read_schema(name).split("\n[")[1:]:
        listed = [tensor for line in section.splitlines()[1:] for tensor in unfold(line.split(": ")[1])]
        assert len(listed) == len(set(listed))
