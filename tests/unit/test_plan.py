# SPDX-License-Identifier: Apache-2.0
"""Plans: which type, shape and size each tensor gets, for models of every kind, without reading data."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import GGUFError
from gguf_kit.models import archs
from gguf_kit.models.archs import Category, Role
from gguf_kit.quantize import plan as planning
from gguf_kit.quantize.plan import Choices, make_plan, stored_shape
from gguf_kit.quantize.recipe_files import read_recipe_file, recipe_text
from gguf_kit.quantize.recipes import PLAIN_TYPES, RECIPES, SMALL_BLOCK_TYPES, TYPE_NAMES, Place
from gguf_kit.quantize.sources import SourceTensor
from gguf_kit.quantize.writer import file_size, make_header
from model_keys import read_keys

GB = 1e9
# City96's published Flux.1-dev files in GB, and the M files that others published.
FLUX_DEV_SIZES = {
    "F16": 23.8,
    "Q8_0": 12.7,
    "Q6_K": 9.86,
    "Q5_1": 9.01,
    "Q5_K_S": 8.29,
    "Q5_0": 8.27,
    "Q4_1": 7.53,
    "Q4_K_S": 6.81,
    "Q4_0": 6.79,
    "Q3_K_S": 5.23,
    "Q2_K": 4.03,
}
FLUX_DEV_M_SIZES = {"Q4_K_M": 6.93, "Q5_K_M": 8.42}


def make_source(shapes, dtype=torch.bfloat16, **dtypes):
    tensors = {
        name: SourceTensor(name, dtypes.get(name.replace(".", "_"), dtype), shape) for name, shape in shapes.items()
    }
    return SimpleNamespace(path=Path("model.safetensors"), tensors=tensors, metadata={}, notes=())


def plan_of(shapes, type_name="", **choices):
    return make_plan(make_source(shapes), Choices(type_name, **choices))


def types_of(plan):
    return {t.name: t.qtype for t in plan.tensors}


@pytest.fixture(scope="module")
def flux_dev():
    return read_keys("flux-dev")


def size_of(plan):
    return file_size(plan, make_header(plan, "flux1-dev", {}))


@pytest.mark.parametrize("type_name", FLUX_DEV_SIZES)
def test_flux_dev_has_the_published_size(flux_dev, type_name):
    # Published to two or three digits, hence half a unit of the last one beside half a percent.
    assert size_of(plan_of(flux_dev, type_name)) / GB == pytest.approx(FLUX_DEV_SIZES[type_name], rel=0.005)


@pytest.mark.parametrize("type_name", FLUX_DEV_M_SIZES)
def test_flux_dev_mixtures_are_about_as_large_as_published(flux_dev, type_name):
    assert size_of(plan_of(flux_dev, type_name)) / GB == pytest.approx(FLUX_DEV_M_SIZES[type_name], rel=0.02)


def test_better_types_are_larger(flux_dev):
    rising = (
        "IQ2_XS IQ2_S Q2_K IQ3_XXS Q3_K_S Q3_K_M Q3_K_L IQ4_XS Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K Q8_0 F16 F32".split()
    )
    sizes = [plan_of(flux_dev, name, has_imatrix=True).data_bytes for name in rising]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("type_name", RECIPES)
def test_embedders_and_final_layers_keep_their_precision(flux_dev, type_name):
    plan = plan_of(flux_dev, type_name, has_imatrix=True)
    kept = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
    for tensor in plan.tensors:
        is_matrix = len(tensor.shape) > 1
        if tensor.name.startswith(kept):
            assert tensor.qtype is (QType.BF16 if is_matrix else QType.F32), tensor.name
        elif is_matrix:
            assert tensor.qtype not in (QType.BF16, QType.F32), tensor.name


@pytest.mark.parametrize("type_name", [name for name in RECIPES if name.endswith(("_M", "_L"))])
def test_mixtures_give_more_bits_to_fused_attention_and_mlp_down_of_both_kinds_of_block(flux_dev, type_name):
    types, base = types_of(plan_of(flux_dev, type_name)), RECIPES[type_name].base
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1"):
        assert types[f"{name}.weight"] > base
    assert types["single_blocks.0.linear2.weight"] > base
    assert types["double_blocks.0.img_mlp.0.weight"] is base


def test_without_a_type_matrices_keep_theirs_and_vectors_become_float32():
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64), "c.weight": (2, 2), "d.bias": (64,), "e": (1, 2, 3, 4, 5)}
    source = make_source(shapes, b_weight=torch.float16, c_weight=torch.float32, d_bias=torch.float16)
    types = types_of(make_plan(source, Choices()))
    assert types == {
        "a.weight": QType.BF16,
        "b.weight": QType.F16,
        "c.weight": QType.F32,
        "d.bias": QType.F32,
        "e": QType.F32,
    }


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((), (1,)),
        ((7,), (7,)),
        ((1, 1), (1,)),
        ((1, 6, 1536), (6, 1536)),
        ((3, 1, 5), (3, 1, 5)),
        ((5120, 16, 1, 2, 2), (5120, 64)),
        ((1, 16, 1, 2, 2), (64,)),
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((0,), (1,)),
    ],
    ids=str,
)
def test_shapes_that_gguf_cannot_hold_are_stored_as_others(shape, stored):
    assert stored_shape(shape) == stored


@pytest.mark.parametrize("type_name", ["", "Q4_K_S"])
def test_convolutions_of_a_unet_are_stored_as_rows_of_256_where_they_fit(type_name):
    plan = plan_of(read_keys("sd1"), type_name)
    shapes = {t.name: t.stored_shape for t in plan.tensors}
    assert shapes["input_blocks.1.0.in_layers.2.weight"] == (320 * 320 * 9 // 256, 256)
    assert shapes["input_blocks.0.0.weight"] == (320, 4, 3, 3)  # kept as it is
    assert shapes["input_blocks.1.1.proj_in.weight"] == (320 * 320 // 256, 256)


@pytest.mark.parametrize("type_name", ["", "Q4_K_S"])
def test_rows_that_fit_no_block_are_joined_to_rows_of_256_where_they_fit(type_name):
    plan = plan_of({"blocks.0.proj.weight": (640, 100), "embed.weight": (640, 100)}, type_name)
    assert [t.stored_shape for t in plan.tensors] == [(250, 256), (640, 100)]
    assert plan.tensors[0].qtype is (QType.Q4_K if type_name else QType.BF16)


@pytest.mark.parametrize(
    ("type_name", "qtype"), [("", QType.F32), ("BF16", QType.F32), ("F16", QType.F16), ("Q4_0", QType.F16)]
)
def test_a_bare_parameter_is_never_bf16(type_name, qtype):
    plan = plan_of({"blocks.0.proj.weight": (640, 256), "blocks.0.table": (64, 256), "table": (64, 256)}, type_name)
    assert [t.qtype for t in plan.tensors[1:]] == [qtype, qtype]


@pytest.mark.parametrize("qtype", SMALL_BLOCK_TYPES, ids=lambda q: q.name)
def test_rows_of_320_get_the_stated_type_with_smaller_blocks_and_a_warning(qtype):
    plan = plan_of({"blocks.0.proj.weight": (640, 320), "blocks.1.proj.weight": (640, 512)}, has_imatrix=True,
                   type_name=next(name for name, recipe in RECIPES.items() if recipe.base is qtype))  # fmt: skip
    types = types_of(plan)
    assert types["blocks.0.proj.weight"] is SMALL_BLOCK_TYPES[qtype]
    assert any("multiple of 256, these have 320" in line and "blocks.0.proj.weight" in line for line in plan.warnings)


def test_rows_that_fit_no_block_keep_their_precision_with_a_warning():
    plan = plan_of({"blocks.0.proj.weight": (641, 100)}, "Q4_K_S")
    assert types_of(plan) == {"blocks.0.proj.weight": QType.BF16}
    assert any("become BF16" in line for line in plan.warnings)
    assert any("only 0 % of the weights are quantized" in line for line in plan.warnings)


def test_small_matrices_become_float32():
    shapes = {"blocks.0.small.weight": (4, 256), "blocks.0.large.weight": (5, 256)}
    types = types_of(plan_of(shapes, "Q4_0"))
    assert types == {"blocks.0.small.weight": QType.F32, "blocks.0.large.weight": QType.Q4_0}


def test_an_unknown_model_is_planned_with_one_warning_and_arch_overrides_it(flux_dev):
    assert sum("not recognised" in line for line in plan_of({"blocks.0.proj.weight": (640, 256)}, "Q4_0").warnings) == 1
    named = plan_of({"blocks.0.proj.weight": (640, 256)}, "Q4_0", arch="wan")
    assert named.arch.name == "wan"
    assert not named.warnings
    with pytest.raises(GGUFError, match=r"--arch flux: it has no tensor in a block of Flux"):
        plan_of({"blocks.0.proj.weight": (640, 256)}, "Q4_0", arch="flux")
    assert plan_of(flux_dev, "Q4_0").arch.name == "flux"


def test_two_architectures_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(archs, "find_all", lambda shapes: [archs.named("flux"), archs.named("wan")])
    with pytest.raises(GGUFError, match=r"fit 2 architectures: .*--arch"):
        plan_of({"a": (1,)}, "Q4_0")


def test_patterns_are_stronger_than_recipe_files_and_both_than_the_type():
    shapes = {f"blocks.{i}.proj.weight": (640, 256) for i in range(3)}
    plan = plan_of(
        shapes,
        "Q4_K_S",
        overrides=((re.compile(r"s\.0\."), QType.Q6_K), (re.compile("blocks.[09]"), QType.Q8_0)),
        exact={"blocks.0.proj.weight": QType.Q2_K, "blocks.1.proj.weight": QType.F16},
    )
    assert list(types_of(plan).values()) == [QType.Q6_K, QType.F16, QType.Q4_K]


def test_an_explicit_type_that_does_not_fit_is_refused_with_the_tensor():
    with pytest.raises(GGUFError, match=r"'blocks.0.proj.weight' has rows of 320 weights, no multiple of 256.*Q6_K"):
        plan_of({"blocks.0.proj.weight": (640, 320)}, overrides=((re.compile("proj"), QType.Q6_K),))


@pytest.mark.parametrize("name", ["I32", "Q4_0"])
def test_floats_stay_floats_and_integers_integers(name):
    shapes = {"blocks.0.proj.weight": (640, 256), "ids": (64, 64)}
    dtype, wanted = ("float32", "proj") if name == "I32" else ("int64", "ids")
    source = make_source(shapes, torch.float32, ids=torch.int64)
    with pytest.raises(GGUFError, match=rf"holds {dtype} and cannot be {name}"):
        make_plan(source, Choices(overrides=((re.compile(wanted), QType[name]),)))


def test_patterns_and_names_that_fit_nothing_are_told():
    plan = plan_of(
        {"blocks.0.proj.weight": (640, 256)},
        "Q4_0",
        overrides=((re.compile("atn"), QType.Q8_0),),
        exact={"ghost": QType.F32, "blocks.0.proj.weight": QType.Q4_1},
    )
    assert any("atn" in line for line in plan.warnings)
    assert any("ghost" in line for line in plan.warnings)
    assert [t.qtype for t in plan.tensors] == [QType.Q4_1]


def test_a_recipe_of_another_model_is_refused():
    with pytest.raises(GGUFError, match=r"the model has none of the 1 names in the recipe: ghost\. Take the recipe of"):
        plan_of({"blocks.0.proj.weight": (640, 256)}, "Q4_0", exact={"ghost": QType.F32})


@pytest.mark.parametrize("type_name", [name for name, recipe in RECIPES.items() if recipe.needs_imatrix])
def test_types_that_need_an_importance_matrix_say_so(flux_dev, type_name):
    with pytest.raises(GGUFError, match=rf"{type_name} needs an importance matrix"):
        plan_of(flux_dev, type_name)


def test_integers_and_markers_are_kept():
    shapes = {"ids": (77,), "mask": (4, 4), "__x0__": (0,), "blocks.0.proj.weight": (640, 256)}
    source = make_source(shapes, ids=torch.int64, mask=torch.bool)
    plan = make_plan(source, Choices("Q4_0"))
    assert [t.qtype for t in plan.tensors] == [QType.I64, QType.I8, QType.F32, QType.Q4_0]
    assert plan.tensors[2].is_empty
    assert plan.tensors[2].n_bytes == 4


def test_a_recipe_file_gives_the_same_plan_back(flux_dev, tmp_path):
    plan = plan_of(flux_dev, "Q4_K_M")
    path = tmp_path / "my.recipe"
    path.write_text(recipe_text(plan), encoding="utf-8")
    again = plan_of(flux_dev, exact=read_recipe_file(path).types)
    assert types_of(again) == types_of(plan)
    assert again.file_type in {RECIPES["Q4_K_M"].file_type, RECIPES["Q4_K_S"].file_type}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "line 1 is not of the form"),
        ("\n# c\na=Q4_0\r\na=Q8_0", "line 4 names a tensor twice"),
        ("a=Q9", "no type"),
        ("a=\xff", "not UTF-8"),
    ],
)
def test_a_wrong_recipe_file_is_refused_with_its_line(tmp_path, text, problem):
    path = tmp_path / "my.recipe"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(GGUFError, match=f"my.recipe: .*{problem}"):
        read_recipe_file(path)


def test_odd_names_come_back_from_a_recipe_file_and_impossible_ones_are_refused(tmp_path):
    shapes = {name: (64, 256) for name in (" sp.weight", "a=b.weight", "u\u2028v.weight", "w\x85.weight")}
    path = tmp_path / "my.recipe"
    path.write_bytes(b"\xef\xbb\xbf" + recipe_text(plan_of(shapes, "Q8_0")).encode())
    assert list(read_recipe_file(path).types) == list(shapes)
    for name in ("#a.weight", "a\nb.weight"):
        with pytest.raises(GGUFError, match="cannot stand in a recipe file"):
            recipe_text(plan_of({name: (64, 256)}, "Q8_0"))


@pytest.mark.parametrize(
    ("place", "blocks"),
    [
        (Place.ALL, set(range(16))),
        (Place.FIRST, {0, 1}),
        (Place.ENDS, {0, 1, 14, 15}),
        (Place.MORE, {0, 1, 4, 7, 10, 13, 14, 15}),
    ],
)
def test_places_of_sixteen_blocks(place, blocks):
    assert {i for i in range(16) if place.holds(i, 16)} == blocks
    assert place.holds(-1, 0) is (place is Place.ALL)
    assert place.holds(0, 1)


def test_every_type_is_known_to_gguf_and_every_recipe_has_a_way_out_for_short_rows():
    assert set(TYPE_NAMES) == {*PLAIN_TYPES, *RECIPES}
    for recipe in RECIPES.values():
        for category in Category:
            qtype = recipe.qtype(Role(category, 0, 8, False))
            assert qtype is None or qtype in SMALL_BLOCK_TYPES or planning.GGML_QUANT_SIZES[qtype][0] == 32
