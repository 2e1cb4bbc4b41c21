# SPDX-License-Identifier: Apache-2.0
"""Recipe files with weightings: what is written, what comes back, what is refused, and what it does to the bytes."""

import re
from pathlib import Path
from types import SimpleNamespace

import gguf
import make_files
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.imatrix_write import write_imatrix
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.recipe_files import RecipeFile, parse_recipe, read_recipe_file, recipe_text
from gguf_kit.quantize.sources import SourceTensor
from gguf_kit.tools import convert
from safetensors.torch import save_file

NAMES = ("blocks.0.a.weight", "blocks.0.b.weight", "blocks.0.c=d.weight", "blocks.0. sp.weight")
WEIGHTINGS = dict(zip(NAMES, (Weighting.NONE, Weighting.ROOT, Weighting.NONE, Weighting.ROOT), strict=True))


def plan_of(names=NAMES, **choices):
    tensors = {name: SourceTensor(name, torch.bfloat16, (64, 256)) for name in names}
    source = SimpleNamespace(path=Path("model.safetensors"), tensors=tensors, metadata={}, notes=())
    return make_plan(source, Choices(**choices))


def test_weightings_come_back_from_the_text():
    plan = plan_of(type_name="Q4_0", weightings=WEIGHTINGS, has_imatrix=True)
    found = parse_recipe(recipe_text(plan))
    assert dict(found.types) == dict.fromkeys(NAMES, QType.Q4_0)
    assert dict(found.weightings) == WEIGHTINGS
    again = plan_of(exact=found.types, weightings=found.weightings, has_imatrix=True)
    assert [(t.qtype, t.weighting) for t in again.tensors] == [(t.qtype, t.weighting) for t in plan.tensors]


def test_full_is_not_written_and_every_directive_is_a_comment_to_others():
    text = recipe_text(plan_of(type_name="Q4_0", weightings={NAMES[0]: Weighting.NONE, NAMES[1]: Weighting.FULL}))
    assert [line for line in text.splitlines() if "weighting" in line] == [f"#weighting {NAMES[0]}=none"]
    assert {line.split("=")[-1] for line in text.splitlines() if not line.startswith("#")} == {"Q4_0"}


def test_the_head_of_a_recipe_can_say_something_else():
    assert recipe_text(plan_of(), ["one", "two"]).splitlines()[:3] == ["# one", "# two", f"{NAMES[0]}=BF16"]


@pytest.mark.parametrize(
    "line", ["# weighting a=none", "#weightings a=none", "# anything = else", "#", "#weighted a=none"]
)
def test_other_comments_stay_comments(line):
    assert parse_recipe(f"{line}\na=Q8_0") == RecipeFile({"a": QType.Q8_0}, {})


def test_words_may_be_in_upper_case_and_full_may_be_said():
    assert parse_recipe("#weighting a=ROOT\r\n#weighting b= full").weightings == {
        "a": Weighting.ROOT,
        "b": Weighting.FULL,
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a=Q8_0\n#weighting", "line 2 is not of the form #weighting name=none|root|full|mixed: '#weighting'"),
        ("#weighting a", "line 1 is not of the form"),
        ("#weighting =root", "line 1 is not of the form"),
        ("#weighting\ta=root", "line 1 is not of the form"),
        ("#weighting a=half", "line 1: 'half' is no weighting. Weightings: none, root, full, mixed."),
        ("#weighting a=none\n#weighting a=root", "line 2 names a tensor twice: '#weighting a=root'"),
    ],
)
def test_a_malformed_directive_is_refused_with_its_line(tmp_path, text, problem):
    path = tmp_path / "my.recipe"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GGUFError, match=re.escape(f"my.recipe: {problem}")):
        read_recipe_file(path)
    with pytest.raises(GGUFError, match=r"^line [12] of the recipe"):
        parse_recipe(text)


def test_names_that_the_model_lacks_and_a_missing_matrix_are_said():
    plan = plan_of(type_name="Q4_0", weightings={"stranger": Weighting.NONE})
    assert any("the model does not have: stranger" in warning for warning in plan.warnings)
    assert any("without --imatrix nothing is weighed" in warning for warning in plan.warnings)
    plan = plan_of(type_name="Q4_0", weightings={NAMES[0]: Weighting.NONE}, has_imatrix=True)
    assert not plan.warnings or "weighed" not in " ".join(plan.warnings)


@pytest.fixture
def weighted(tmp_path):
    """A model of four matrices and an importance matrix for all of them."""
    generator = torch.Generator().manual_seed(3)
    state = {f"blocks.{i}.attn.to_q.weight": torch.randn(64, 256, generator=generator).bfloat16() for i in range(4)}
    save_file(state, tmp_path / "model.safetensors")
    sums = {name: torch.rand(1, 256, generator=generator) ** 3 * 8 for name in state}
    entries = {name: Entry(sums[name], torch.tensor([4.0])) for name in state}
    write_imatrix(Imatrix(tmp_path / "im.gguf", entries), tmp_path / "im.gguf")
    return state, {name: sums[name][0].numpy() / 4 for name in state}


def test_convert_weighs_every_tensor_as_its_recipe_says(tmp_path, weighted):
    state, means = weighted
    none, root, full, silent = state
    recipe = tmp_path / "mine.recipe"
    lines = [f"{name}=Q4_K" for name in state]
    lines += [f"#weighting {none}=none", f"#weighting {root}=root", f"#weighting {full}=full"]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    options = "--recipe", recipe, "--imatrix", tmp_path / "im.gguf", "--threads", "1"
    assert convert.main([*map(str, ("--src", tmp_path / "model.safetensors", *options))]) == 0
    stored = {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / "model-mine.gguf").tensors}
    importance = {none: None, root: means[root] ** 0.5, full: means[full], silent: means[silent]}
    for name, weights in state.items():
        expected = make_files.quantize_with_ggml(weights.float().numpy(), QType.Q4_K, importance[name])
        assert stored[name] == expected.tobytes(), name


def test_a_type_that_needs_importance_may_not_go_without(tmp_path, weighted, capsys):
    name = next(iter(weighted[0]))
    recipe = tmp_path / "mine.recipe"
    recipe.write_text(f"{name}=IQ2_XS\n#weighting {name}=none", encoding="utf-8")
    options = "--recipe", recipe, "--imatrix", tmp_path / "im.gguf", "--dry-run"
    assert convert.main([*map(str, ("--src", tmp_path / "model.safetensors", *options))]) == 2
    assert "1 tensors are to have a type that needs importance, and have none" in capsys.readouterr().err


def test_a_file_in_which_nothing_is_weighed_names_no_matrix_and_misses_none(tmp_path, weighted, capsys):
    recipe = tmp_path / "mine.recipe"
    recipe.write_text("".join(f"{n}=Q4_0\n#weighting {n}=none\n" for n in weighted[0]), encoding="utf-8")
    options = "--recipe", recipe, "--imatrix", tmp_path / "im.gguf"
    assert convert.main([*map(str, ("--src", tmp_path / "model.safetensors", *options))]) == 0
    assert "quantize.imatrix.file" not in gguf.GGUFReader(tmp_path / "model-mine.gguf").fields
    assert "not in the importance matrix" not in capsys.readouterr().err
