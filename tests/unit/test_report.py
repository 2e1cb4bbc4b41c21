# SPDX-License-Identifier: Apache-2.0
"""The report: its page is whole and harmless, its numbers are right, its drawings hold small and large models."""

import dataclasses
import html.parser
import importlib
import io
import json
import math
import re
import shutil
import sys

import model_keys
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf_kit.demo.tiny_flux import MODEL
from gguf_kit.errors import GGUFError
from gguf_kit.layouts import bpw, n_bytes
from gguf_kit.models import archs
from gguf_kit.quantize.imatrix import Weighting
from gguf_kit.quantize.sensitivity import Candidate, TensorCosts
from gguf_kit.tools import report, report_data, report_html
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
from gguf_kit.tools import report_maps, report_page, report_plots, report_style

TYPES = (QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q6_K, QType.Q8_0)
CHEAP = ("--types", "Q3_K,Q8_0", "--sample-rows", "4", "--threads", "1")
HOSTILE = "double_blocks.0.<script>alert('x')</script>&\"$\\frac{$_{\u202e\u4e2d|.weight"


class Page(html.parser.HTMLParser):
    """Tags, attributes, cells and text of a page; a tag that is not closed in order fails."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def make_costs(shapes, gains=True, types=TYPES, seed=0):
    """Costs such as a measurement might give, of every matrix of a model."""
    rng = np.random.default_rng(seed)
    arch = archs.detect(shapes) or archs.GENERIC
    found = []
    for name, role in archs.roles(arch, shapes).items():
        shape = shapes[name]
        if len(shape) != 2 or shape[-1] % 32:
            continue
        energy, sensitivity = float(np.exp(rng.normal(2))), float(np.exp(rng.normal(-6)))
        candidates = [Candidate(QType.BF16, Weighting.NONE, n_bytes(QType.BF16, shape), 0.0, 0.0)]
        for qtype in types:
            for weighting in Weighting:
                if shape[-1] % 256 == 0 or qtype is QType.Q8_0:
                    error = energy * 4.0 ** -bpw(qtype) * float(np.exp(rng.normal(0, 0.2)))
                    candidates.append(Candidate(qtype, weighting, n_bytes(qtype, shape), error, error / 50))
        gain = sensitivity / energy if gains else 1 / energy
        found.append(TensorCosts(name, role.category, role.block, shape, gain, energy, tuple(candidates)))
    return tuple(found)


def selection(costs, qtype, name, **options):
    types = {t.name: qtype if any(c.qtype is qtype for c in t.candidates) else QType.BF16 for t in costs}
    return report_data.Selection(name, report_data.pick_recipe(costs, types, {})[0], **options)


def make_facts(costs, **changes):
    fixed = tuple(selection(costs, qtype, qtype.name) for qtype in TYPES)
    chosen = (selection(costs, QType.Q3_K, "mine", is_chosen=True),)
    return report_page.Facts(
        "Model", ("line",), costs, **({"fixed": fixed, "chosen": chosen, "map_types": TYPES[:1]} | changes)
    )


@pytest.fixture(scope="module")
def small():
    return make_costs(
        {
            "double_blocks.0.img_mlp.0.weight": (512, 256),
            "double_blocks.1.img_mlp.0.weight": (512, 256),
            "double_blocks.0.img_mlp.2.weight": (256, 512),
            "single_blocks.0.linear1.weight": (768, 256),
            "final_layer.linear.weight": (64, 256),
            HOSTILE: (256, 256),
        }
    )


def check_picture(png):
    """A PNG that opens and shows something; nothing is drawn on its outermost pixels."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert image.std() > 5
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert edge.min() == 255, "something is cut off at the edge"
    return image


def test_the_page_parses_and_needs_nothing_else(small):
    made = report_page.build_report(make_facts(small))
    page = Page(made.page)
    loaded = [value for _, key, value in page.attributes if key in ("src", "href", "srcset", "action", "data")]
    assert len(loaded) == len(made.pictures)
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    outside = re.sub(r"base64,[A-Za-z0-9+/=]*", "", made.page)
    assert not re.search(r"https?:|url\(|@import|<script|<link", outside, re.IGNORECASE)
    for png in made.pictures.values():
        check_picture(png)


def test_hostile_names_are_text(small):
    facts = make_facts(small, chosen=(selection(small, QType.Q2_K, '"><img src=x onerror=y>|', is_chosen=True),))
    made = report_page.build_report(facts)
    page = Page(made.page)
    assert "script" not in page.tags
    assert not [pair for pair in page.attributes if pair[1].startswith("on")]
    assert HOSTILE.replace("\u202e", "?") in page.cells
    assert '"><img src=x onerror=y>|' in page.cells
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+\.png", name) for name in made.pictures)
    lines = report_html.markdown_table(made.summary).splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_numbers_are_those_of_an_independent_computation(small):
    types = dict(zip([t.name for t in small], [*TYPES[:4], QType.Q4_K, QType.Q3_K], strict=True))
    weightings = {small[0].name: Weighting.NONE, small[1].name: Weighting.ROOT}
    picks, missing = report_data.pick_recipe(small, types, weightings)
    assert not missing
    mine = report_data.Selection("mine", picks, rest_bytes=1000, rest_weights=500, is_chosen=True)
    errors, sampling, size, weights = {}, 0.0, 1000, 500
    for t in small:
        for c in t.candidates:
            if (c.qtype, c.weighting) == (types[t.name], weightings.get(t.name, Weighting.FULL)):
                errors[t.name] = t.gain * c.error
                sampling += (t.gain * c.std_error) ** 2
                size += c.n_bytes
                weights += t.shape[0] * t.shape[1]
    total = sum(errors.values())
    assert (mine.n_bytes, mine.n_weights) == (size, weights)
    assert mine.rms == pytest.approx(math.sqrt(total), rel=1e-12)
    assert mine.std_error == pytest.approx(math.sqrt(sampling), rel=1e-12)
    assert mine.bpw == 8 * size / weights
    table = report_page.tensor_table(mine, mine.worst(3))
    worst = sorted(errors, key=errors.get, reverse=True)[:3]
    assert [row[0] for row in table.rows] == worst
    assert [row[6] for row in table.rows] == [f"{100 * errors[name] / total:.2f} %" for name in worst]
    assert {row[7] for row in table.rows} == {"2.0 %"}
    assert [row[4] for row in table.rows] == [weightings.get(name, Weighting.FULL).value for name in worst]


def test_a_recipe_with_unmeasured_types_is_refused(small):
    _, missing = report_data.pick_recipe(small, {t.name: QType.IQ1_M for t in small}, {})
    with pytest.raises(GGUFError, match=r"recipe 'mine' are not known for 6 tensors: .*\(\+1 more\)\. Measure"):
        report_data.require_all(missing, "mine")


def test_a_fixed_type_takes_no_weighting_and_a_uniform_one_the_best(small):
    fixed, _ = report_data.pick_recipe(small, {t.name: QType.Q3_K for t in small})
    assert {pick.candidate.weighting for pick in fixed} == {Weighting.NONE}
    for pick in report_data.pick_uniform(small, QType.Q3_K):
        assert pick.candidate.error == min(c.error for c in pick.costs.candidates if c.qtype is QType.Q3_K)


def test_the_gain_over_the_fixed_type_of_the_size_is_told(small):
    """Measured where both were, else predicted; only against a type that is hardly larger."""
    chosen = dataclasses.replace(selection(small, QType.Q4_K, "mine", is_chosen=True), name="mine")
    fixed = selection(
        small, QType.Q3_K, "Q3_K_S", rest_bytes=chosen.n_bytes - selection(small, QType.Q3_K, "x").n_bytes
    )
    facts = make_facts(small, fixed=(fixed,), chosen=(chosen,), map_types=())
    cell = {row[0]: row[-1] for row in report_page.summary_table(facts).rows}["mine"]
    assert cell == f"{100 * (chosen.rms / fixed.rms - 1):+.0f} % of Q3_K_S, predicted"
    measured = (report_data.Measured("mine", latent_error=0.1), report_data.Measured("Q3_K_S", latent_error=0.4))
    facts = dataclasses.replace(facts, measured=measured)
    assert {row[0]: row[-1] for row in report_page.summary_table(facts).rows}["mine"] == "-75 % of Q3_K_S, measured"
    larger = dataclasses.replace(fixed, rest_bytes=fixed.rest_bytes * 2)
    assert report_data.compared_with(chosen, [larger]) is None


def test_the_summary_has_measured_rows_smallest_first(small):
    measured = (report_data.Measured("reference", 99.0, 16.0, 0.0, math.inf, 1.0), report_data.Measured("odd", None))
    table = report_page.summary_table(make_facts(small, measured=measured))
    assert [row[0] for row in table.rows][-2:] == ["reference", "odd"]
    sizes = [float(row[1]) for row in table.rows[:-1]]
    assert sizes == sorted(sizes)
    assert "inf" in table.rows[-2]
    assert {table.rows[i][0] for i in table.chosen} == {"mine"}
    lines = report_html.markdown_table(table).splitlines()
    assert len(lines) == len(table.rows) + 2
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize("name", ["flux-dev", "sdxl", "sd3-medium", "sd35-large", "cosmos-predict2-2b"])
def test_every_tensor_has_one_cell_of_the_maps(name):
    costs = make_costs(model_keys.read_keys(name), types=(QType.Q3_K,))
    stacks = report_data.find_stacks(costs, max_rows=10**6, max_stacks=10**6)
    cells = [cell for stack in stacks for row in stack.names for cell in row if cell is not None]
    assert sorted(cells) == sorted(t.name for t in costs)
    blocks = {t.name: t.block for t in costs}
    for stack in stacks:
        for row in stack.names:
            assert all(cell is None or blocks[cell] == block for cell, block in zip(row, stack.blocks, strict=True))


def test_flux_has_a_panel_for_each_stack():
    stacks = report_data.find_stacks(make_costs(model_keys.read_keys("flux-dev"), types=()))
    found = [(stack.title, len(stack.rows), len(stack.blocks)) for stack in stacks]
    assert found[:2] == [("double_blocks", 10, 19), ("single_blocks", 3, 38)]
    assert stacks[-1].title == report_data.OUTSIDE
    assert ("attn_qkv", "img_attn.qkv") in stacks[0].rows


def test_blocks_within_blocks_share_their_rows():
    stacks = report_data.find_stacks(make_costs(model_keys.read_keys("sdxl"), types=()))
    inside = [stack for stack in stacks if stack.title.endswith(".transformer_blocks")]
    assert [(len(stack.rows), len(stack.blocks)) for stack in inside] == [(10, 24), (10, 10), (10, 36)]


def test_a_darker_cell_is_a_larger_error_and_grey_is_none(small):
    stacks = report_data.find_stacks(small)
    values = {"double_blocks.0.img_mlp.0.weight": 1.0, "double_blocks.1.img_mlp.0.weight": 0.05}
    values["double_blocks.0.img_mlp.2.weight"] = 0.0
    heat_map = report_maps.HeatMap("t", "s", "u", values, lambda value: "")
    image = check_picture(report_style.to_png(report_maps.draw_heat_map(heat_map, stacks)))
    light, dark = (report_style.amounts("magma_r")(x) for x in (0.3, 1.0))
    assert sum(light[:3]) > sum(dark[:3])
    figure = report_maps.draw_heat_map(heat_map, stacks)
    zeros, errors = figure.axes[0].images
    assert zeros.get_array().count() == 1
    assert sorted(errors.get_array().compressed()) == [0.05, 1.0]
    assert image.shape[1] >= report_maps.LEAST_WIDTH * report_style.DPI - 1


@pytest.mark.parametrize("gains", [True, False], ids=["with gains", "without gains"])
def test_a_model_of_600_tensors_fits(gains):
    shapes = model_keys.read_keys("flux-dev")
    shapes |= {f"extra_{i}_{'long' * 20}.weight": (256, 256) for i in range(300)}
    costs = make_costs(shapes, gains)
    assert len(costs) > 600
    made = report_page.build_report(make_facts(costs))
    Page(made.page)
    for png in made.pictures.values():
        assert max(check_picture(png).shape) < 6000
    assert (
        "more rows are not shown"
        in {s.title: f"{s.n_left_out} more rows are not shown" for s in report_data.find_stacks(costs)}[
            report_data.OUTSIDE
        ]
    )


def test_one_type_and_one_tensor_are_enough():
    costs = make_costs({"blocks.0.x.weight": (256, 256)}, types=(QType.Q8_0,))
    facts = report_page.Facts(
        "M", (), costs, (selection(costs, QType.Q8_0, "Q8_0"),), map_types=(QType.Q8_0, QType.Q2_K)
    )
    made = report_page.build_report(facts)
    assert "map-type-Q8_0.png" in made.pictures
    assert "map-type-Q2_K.png" not in made.pictures
    for png in made.pictures.values():
        check_picture(png)


def test_a_lossless_recipe_divides_by_nothing(small):
    made = report_page.build_report(make_facts(small, chosen=(selection(small, QType.BF16, "mine", is_chosen=True),)))
    Page(made.page)
    assert "nan" not in made.page.split("base64")[0]


def test_predicted_and_measured_points_have_their_values(small):
    facts = make_facts(small)
    series = report_plots.predicted_series(
        {"best": [(2_000_000, 0.04), (3_000_000, 0.0)]}, facts.fixed, (), facts.chosen
    )
    assert series[0].points == ((2.0, 0.2, ""),)
    assert series[1].points[0] == (facts.fixed[0].n_bytes / 1e6, math.sqrt(facts.fixed[0].error), "Q2_K")
    rows = [report_data.Measured("mine", 1.5, 3.0, 0.3), report_data.Measured("Q2_K", 1.0, 3.0, 0.5)]
    measured = report_plots.measured_series([*rows, report_data.Measured("x", 2.0)], ["mine"], named=True)
    assert [each.points for each in measured] == [((1.5, 0.3, "mine"),), ((1.0, 0.5, "Q2_K"),)]


def test_without_gains_measured_and_predicted_errors_do_not_share_an_axis():
    costs = make_costs({f"blocks.{i}.x.weight": (256, 256) for i in range(3)}, gains=False)
    assert not report_data.has_gains(costs)
    measured = tuple(report_data.Measured(qtype.name, 0.1 + i, 3.0, 0.3) for i, qtype in enumerate(TYPES))
    with_rows = report_page.build_report(make_facts(costs, measured=measured)).pictures
    without = report_page.build_report(make_facts(costs)).pictures
    assert "agreement.png" not in with_rows
    assert check_picture(with_rows["sizes.png"]).shape[0] > 1.5 * check_picture(without["sizes.png"]).shape[0]
    gained = make_costs({f"blocks.{i}.x.weight": (256, 256) for i in range(3)})
    assert "agreement.png" in report_page.build_report(make_facts(gained, measured=measured)).pictures


def test_the_same_facts_give_the_same_bytes(small):
    one, other = (report_page.build_report(make_facts(small)) for _ in range(2))
    assert one.page == other.page


# -- the command --


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the tiny Flux, a recipe, and the report of both."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(MODEL, folder / "tiny.safetensors")
    (folder / "half.txt").write_text("single_blocks.0.linear1.weight=Q3_K\nsingle_blocks.1.linear1.weight=Q8_0\n")
    return folder


def run(folder, *arguments):
    paths = ("--src", folder / "tiny.safetensors", "--cache", folder / "c.jsonl", "--out", folder / "out")
    return report.main([*map(str, (*paths, *CHEAP, *arguments))])


def test_the_command_writes_page_and_pictures(made, capsys):
    assert run(made, "--recipe", made / "half.txt", "--maps", "Q3_K", "--markdown", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^\| half +\|", printed, re.MULTILINE)
    assert re.search(r"^\| Q8_0 +\|", printed, re.MULTILINE)
    names = {path.name for path in (made / "out").iterdir()}
    assert names == {"report.html", "sizes.png", "map-half.png", "types-half.png", "map-type-Q3_K.png"}
    Page((made / "out" / "report.html").read_text(encoding="utf-8"))
    assert run(made) == 2
    assert "report.html: the file exists. Give --overwrite" in capsys.readouterr().err


def test_a_report_that_cannot_be_finished_leaves_the_old_one(made, capsys, monkeypatch):
    (made / "out").mkdir(exist_ok=True)
    (made / "out" / "report.html").write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(report_page, "make_page", fail)
    assert run(made, "--overwrite") == 2
    assert (made / "out" / "report.html").read_text() == "old"
    assert not list((made / "out").glob("*.part"))


@pytest.mark.parametrize("name", report.LIBRARIES)
def test_a_missing_library_is_said_in_one_line(made, capsys, monkeypatch, name):
    imported = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda wanted: imported("no_such_module" if wanted == name else wanted)
    )
    assert run(made, "--overwrite") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is not installed. Run: pip install matplotlib scikit-image" in lines[0]


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"rows": 3}', '[{"mb": 1}]', '[{"type": "a", "mb": "x"}]', '[{"type": "a", "mb": -1}]',
     '[{"type": "a", "mb": 1e999}]', "[" * 100000],
)  # fmt: skip
def test_bad_results_are_refused(made, capsys, text):
    (made / "results.json").write_text(text)
    assert run(made, "--results", made / "results.json", "--overwrite") == 2
    assert capsys.readouterr().err.startswith("report: results.json: these are no results")


def test_results_of_the_demo_are_read(tmp_path):
    rows = [{"type": "BF16", "mb": 18.1, "bpw": 16.0, "latent_error": 0.0, "psnr_db": None, "seconds_per_step": 1}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    args = report.make_parser().parse_args(["--src", "x", "--pictures", str(tmp_path / "pictures")])
    assert report.read_results(args) == (report_data.Measured("BF16", 18.1, 16.0, 0.0, math.inf),)


def test_recipes_of_one_name_are_refused(made, capsys):
    assert run(made, "--recipe", made / "half.txt", "--recipe", made / "half.txt", "--overwrite") == 2
    assert "two recipes are called 'half'. Rename" in capsys.readouterr().err


def test_drawing_touches_no_global_state():
    assert "matplotlib.pyplot" not in sys.modules
