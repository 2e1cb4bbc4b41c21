# SPDX-License-Identifier: Apache-2.0
"""What the collector records is what the layers are given; latents stay as they are without it, and files add up."""

import logging
from types import SimpleNamespace

import collecting
import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import tiny
import torch
from gguf_kit import collector, nodes_imatrix
from gguf_kit.errors import BadFile, GGUFError
from gguf_kit.host.collect_rows import RecordedRows, first_choice
from gguf_kit.host.collector import SquareSums, linear_layers
from gguf_kit.quantize.imatrix import read_imatrix

FILE = "imatrix/test.imatrix.gguf"
EXACT = 2e-6  # of sums in float32


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def collect(patcher, prefix="imatrix/test", mode=nodes_imatrix.ADD, rows=8, calls=0):
    """The model that the node gives."""
    return nodes_imatrix.ImatrixCollectorGGUF().collect(patcher, prefix, mode, rows, calls)[0]


def network_of(patcher):
    return patcher.model.diffusion_model


def n_hooks(network):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())


class Seen:
    """Inputs of every layer, recorded by hooks of the test's own, float64."""

    def __init__(self, patcher):
        self.inputs, self.steps = {}, {}
        modules = network_of(patcher).named_modules()
        layers = {n: m for n, m in modules if "Linear" in type(m).__name__}
        self.hooks = [m.register_forward_pre_hook(self.hook(n)) for n, m in layers.items()]

    def hook(self, name):
        def record(module, args):
            x = args[0].double()
            self.inputs.setdefault(f"{name}.weight", []).append(x.reshape(-1, x.shape[-1]).clone())

        return record

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def check(self, imatrix):
        """The file has an entry for each layer, with the sums of what was seen."""
        assert imatrix.entries.keys() == self.inputs.keys()
        for name, inputs in self.inputs.items():
            rows = torch.cat(inputs)
            entry = imatrix.entries[name]
            assert entry.counts.tolist() == [len(rows)], name
            assert tiny.relative(entry.sums[0].double(), rows.square().sum(0)) < EXACT, name


MODELS = {"float": lambda tiny_flux: collecting.dense_model(), "Q4_K": lambda f: tiny.quantized_model(f("Q4_K_S"))}
RUNS = {
    "one prompt": {},
    "prompt and negative in one batch": {"cfg": 3.0},
    "two prompts and negatives": {"cfg": 3.0, "rows": (3, 20), "seeds": (1, 2), "negative": (0, 1)},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("run", RUNS)
def test_sums_are_those_of_all_inputs_and_latents_stay_equal(tiny_flux, output, kind, run, inference_mode):
    patcher = MODELS[kind](tiny_flux)
    expected = collecting.sample(patcher, steps=3, **RUNS[run])
    collecting_model = collect(patcher)
    with Seen(patcher) as seen:
        found = collecting.sample(collecting_model, steps=3, **RUNS[run])
    assert torch.equal(found, expected)
    imatrix = read_imatrix(output / FILE)
    seen.check(imatrix)
    state = {name for name in patcher.model.diffusion_model.state_dict() if name.endswith(".weight")}
    assert imatrix.entries.keys() <= state
    assert len(imatrix.entries) == 40
    assert (imatrix.datasets, imatrix.chunk_count) == (("ComfyUI",), 1)
    assert imatrix.chunk_size == max(int(entry.counts.max()) for entry in imatrix.entries.values())
    assert n_hooks(network_of(patcher)) == 0


def test_samplings_add_up(output, caplog):
    patcher = collect(collecting.dense_model())
    with Seen(patcher) as seen, caplog.at_level(logging.INFO, "gguf_kit"):
        collecting.sample(patcher, steps=2, rows=(3,))
        first = read_imatrix(output / FILE)
        collecting.sample(patcher, steps=2, rows=(9,), seeds=(8,))
        collecting.sample(collect(patcher), steps=1, rows=(7,))  # two nodes in a row: both record
    both = {name: [*inputs, *inputs[-1:]] for name, inputs in seen.inputs.items()}
    seen.inputs = both
    imatrix = read_imatrix(output / FILE)
    seen.check(imatrix)
    assert imatrix.chunk_count == 4
    assert first.chunk_count == 1
    assert all(entry.rows.shape[0] <= 8 for entry in imatrix.entries.values())
    lines = [record.message for record in caplog.records if "importance of" in record.message]
    assert len(lines) == 4
    assert "test.imatrix.gguf" in lines[0]


def test_a_clone_with_loras_records_what_its_layers_get(tiny_flux, output):
    plain = tiny.quantized_model(tiny_flux("Q4_K_S"))
    patcher = tiny.with_patches(collect(plain), tiny.lora())
    expected = collecting.sample(tiny.with_patches(plain, tiny.lora()), steps=2)
    with Seen(patcher) as seen:
        assert torch.equal(collecting.sample(patcher, steps=2), expected)
    seen.check(read_imatrix(output / FILE))
    (output / FILE).unlink()
    collecting.sample(plain, steps=1)  # the model that went in does not record
    assert not (output / FILE).exists()


def test_layers_that_the_host_quantized_are_layers_too(output):
    def scaled_fp8(state):
        for name in [name for name in state if "_blocks." in name and name.endswith("mlp.0.weight")]:
            scale = state[name].abs().max() / 448
            state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
        return state | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}

    patcher = collect(collecting.dense_model(scaled_fp8))
    with Seen(patcher) as seen:
        collecting.sample(patcher, steps=1)
    seen.check(read_imatrix(output / FILE))
    assert len(linear_layers(network_of(patcher))) == 40


def test_sums_are_exact_whatever_number_of_rows_each_call_has():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        squares, calls = SquareSums(), []
        for n_rows in (1, 3, 700, 2, 701):
            calls.append((torch.randn(n_rows, 512, generator=generator) * 3).to(dtype))
            squares.add(calls[-1])
        expected = torch.cat(calls).double().square().sum(0)
        assert tiny.relative(squares.total().double(), expected) < EXACT
    squares = SquareSums()
    squares.add(torch.full((2, 4), 65504.0, dtype=torch.float16))  # the squares are no float16
    assert squares.total().tolist() == [2 * 65504.0**2] * 4


def test_a_schedule_without_a_step_is_no_sampling(output):
    file = collector.ImatrixFile(lambda: output / "x.imatrix.gguf", fresh=False)
    latent = torch.zeros(1)
    assert collector.Collector(file, 8, 1)(lambda *args: latent, SimpleNamespace(), torch.tensor([0.5])) is latent
    assert list(output.iterdir()) == []


# -- rows --


def test_rows_are_spread_over_calls_whether_as_many_as_expected_or_more():
    for n_expected, n_calls in ((0, 10), (10, 10), (10, 19), (10, 40)):
        rows = RecordedRows(first_choice(16, n_expected))
        for call in range(n_calls):
            rows.offer(torch.full((100, 1), float(call)))
        calls = rows.result().flatten().int().tolist()
        assert len(calls) == 16
        assert calls == sorted(calls)
        halves = sum(call < n_calls / 2 for call in calls)
        assert 6 <= halves <= 10, (n_expected, n_calls)


def test_rows_of_fewer_calls_than_expected_are_kept():
    rows = RecordedRows(first_choice(16, 8))
    taken = [rows.offer(torch.zeros(100, 1)) // 4 for _ in range(4)]
    assert all(1 <= n <= 3 for n in taken)  # not 16 at once, of which most would go again
    assert len(rows.result()) == sum(taken)
    assert RecordedRows(first_choice(16, 8)).result() is None


def test_rows_are_inputs_of_all_steps_and_of_prompt_and_negative(output):
    patcher = collect(collecting.dense_model(), rows=32)
    with Seen(patcher) as seen:
        collecting.sample(patcher, steps=8, cfg=2.0)
    for name, entry in read_imatrix(output / FILE).entries.items():
        calls = seen.inputs[name]
        n_rows = len(calls[0])
        places = torch.cat(calls).to(torch.bfloat16)
        assert len(entry.rows) == min(32, len(places)), name
        found = [int((places == row).all(1).nonzero()[0]) for row in entry.rows]
        if len(places) < 128 or "img_mlp" not in name:  # others have equal rows in several places
            continue
        assert found == sorted(found)
        steps = [at // n_rows for at in found]
        assert min(steps.count(step) for step in range(8)) >= 2, name
        halves = sum(at % n_rows < n_rows // 2 for at in found)
        assert 12 <= halves <= 20, name


def test_rows_are_the_same_in_every_run(output):
    for prefix in ("a", "b"):
        patcher = collect(collecting.dense_model(), prefix, rows=5)
        collecting.sample(patcher, steps=3)
    a, b = (read_imatrix(output / f"{prefix}.imatrix.gguf").entries for prefix in "ab")
    assert all(torch.equal(a[name].rows, b[name].rows) for name in a)


def test_no_rows_are_kept_where_none_are_wanted(output):
    collecting.sample(collect(collecting.dense_model(), rows=0), steps=1)
    assert all(entry.rows is None for entry in read_imatrix(output / FILE).entries.values())


# -- files --


def test_a_new_file_is_made_by_the_first_sampling_and_added_to_by_the_next(output):
    patcher = collecting.dense_model()
    for _ in range(2):
        model = collect(patcher, mode=nodes_imatrix.NEW)
        for _ in range(2):
            collecting.sample(model, steps=1)
    names = sorted(path.name for path in (output / "imatrix").iterdir())
    assert names == ["test_00001_.imatrix.gguf", "test_00002_.imatrix.gguf"]
    assert [read_imatrix(output / "imatrix" / name).chunk_count for name in names] == [2, 2]


def test_two_new_files_in_one_prompt_do_not_mix(output):
    patcher = collecting.dense_model()
    first, second = (collect(patcher, mode=nodes_imatrix.NEW) for _ in range(2))
    collecting.sample(first, steps=1)
    collecting.sample(second, steps=1)
    assert len(list((output / "imatrix").iterdir())) == 2


@pytest.mark.parametrize("prefix", ["../out", "a/../../out", "", ".", "/etc/out"])
def test_a_prefix_that_leads_out_is_refused(output, prefix):
    with pytest.raises(GGUFError, match=r"filename_prefix .*imatrix/NAME"):
        collect(collecting.dense_model(), prefix)


def narrow(network, name="img_in"):
    """Give a layer another width, for the check alone."""
    module = network.get_submodule(name)
    module.weight = torch.nn.Parameter(torch.zeros(256, 63), requires_grad=False)


def test_a_file_of_another_model_is_refused_before_anything_is_sampled(output):
    collecting.sample(collect(collecting.dense_model()), steps=1)
    before = (output / FILE).read_bytes()
    other = collecting.dense_model()
    late = collect(other)  # the file is found to be of another model when it samples
    narrow(network_of(other))
    with Seen(other) as seen:
        for attempt in (lambda: collect(other), lambda: collecting.sample(late, steps=1)):
            with pytest.raises(GGUFError, match=r"test.imatrix.gguf: the entry of 'img_in.weight' has 1 x 64 columns"):
                attempt()
    assert seen.inputs == {}
    assert (output / FILE).read_bytes() == before


def test_a_file_without_a_layer_of_the_model_is_refused(output):
    file = collector.ImatrixFile(lambda: output / "x.imatrix.gguf", fresh=False)
    one = collector.Entry(torch.ones(1, 4), torch.ones(1))
    file.add({"blk.0.weight": one}, 0)
    file.check({"blk.0.weight": 4, "blk.1.weight": 8})
    with pytest.raises(GGUFError, match=r"none of its 1 entries is of a layer of this model: blk.0.weight"):
        file.check({"img_in.weight": 4})


def test_what_another_node_has_written_meanwhile_is_added_to(output):
    one, other = (collector.ImatrixFile(lambda: output / "x.imatrix.gguf", fresh=False) for _ in range(2))
    entry = collector.Entry(torch.ones(1, 4), torch.ones(1))
    for file in (one, one, other, one, other):
        file.add({"a.weight": entry}, 0)
    found = read_imatrix(output / "x.imatrix.gguf").entries["a.weight"]
    assert (found.counts.tolist(), found.sums.tolist()) == ([5], [[5] * 4])
    (output / "x.imatrix.gguf").unlink()
    one.add({"a.weight": entry}, 0)
    assert read_imatrix(output / "x.imatrix.gguf").entries["a.weight"].counts.tolist() == [1]


def test_what_is_no_importance_matrix_is_refused_and_kept(output):
    path = output / FILE
    path.parent.mkdir()
    path.write_bytes(b"GGUF, or so it says")
    with pytest.raises(BadFile, match=r"test.imatrix.gguf"):
        collect(collecting.dense_model())
    assert path.read_bytes() == b"GGUF, or so it says"


def test_a_file_that_cannot_be_written_says_what_to_do_in_a_node(output):
    patcher = collect(collecting.dense_model())
    (output / "imatrix").rmdir()
    with pytest.raises(GGUFError, match=r"test.imatrix.gguf: .*Choose another filename_prefix, or free") as caught:
        collecting.sample(patcher, steps=1)
    assert "--" not in str(caught.value)


# -- what goes wrong --


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_a_cancelled_sampling_records_nothing_and_leaves_no_hooks(output, error):
    patcher = collecting.dense_model()
    model = collect(patcher, calls=2)

    def stop(step, *rest):
        if step == 1:
            raise error

    with pytest.raises(error):
        collecting.sample(model, steps=3, callback=stop)
    assert list((output / "imatrix").iterdir()) == []
    assert n_hooks(network_of(patcher)) == 0


def test_values_that_are_not_finite_are_named_and_not_recorded(output):
    def broken(state):
        state["double_blocks.1.img_mlp.0.bias"][3] = torch.inf
        return state

    patcher = collecting.dense_model(broken)
    with pytest.raises(
        GGUFError, match=r"the inputs of \d+ layers had infinite values or NaN.*double_blocks.1.img_mlp.2"
    ):
        collecting.sample(collect(patcher), steps=1)
    assert list((output / "imatrix").iterdir()) == []
    assert n_hooks(network_of(patcher)) == 0


def test_a_model_whose_layers_are_never_called_is_refused(output):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    guider = SimpleNamespace(inner_model=SimpleNamespace(diffusion_model=network))
    file = collector.ImatrixFile(lambda: output / "x.imatrix.gguf", fresh=False)
    with pytest.raises(GGUFError, match=r"none of the model's 1 linear layers was called.*Bypass"):
        collector.Collector(file, 0, 0)(lambda *args: torch.zeros(1), guider, torch.tensor([1.0, 0.0]))


def test_a_compiled_model_is_listened_to(output):
    patcher = collecting.dense_model()
    expected = collecting.sample(patcher, steps=1)
    block = network_of(patcher).double_blocks[0]
    patcher.add_object_patch("diffusion_model.double_blocks.0", torch.compile(block, backend="eager"))
    collecting.sample(patcher, steps=1)  # compiled without hooks
    assert torch.equal(collecting.sample(collect(patcher), steps=1), expected)
    entries = read_imatrix(output / FILE).entries
    assert len(entries) == 40
    assert "double_blocks.0.img_mlp.0.weight" in entries


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM")
@pytest.mark.parametrize("resident", [True, False], ids=["fits in VRAM", "does not fit"])
def test_under_dynamic_vram_the_same_is_recorded(tiny_flux, output, monkeypatch, resident):
    import fake_vram

    every_layer, path = collector.linear_layers, tiny_flux("Q4_K_S")
    some = ("img_in", "double_blocks.1.img_mlp.0", "single_blocks.2.linear2", "final_layer.linear")
    monkeypatch.setattr(collector, "linear_layers", lambda n: {k: m for k, m in every_layer(n).items() if k in some})
    collecting.sample(collect(tiny.quantized_model(path), "classic", calls=1), steps=1)
    fake_vram.install(monkeypatch).resident = resident
    patcher = tiny.quantized_model(path)
    assert patcher.is_dynamic()
    collecting.sample(collect(patcher, "dynamic", calls=1), steps=1)
    classic, dynamic = (read_imatrix(output / f"{name}.imatrix.gguf").entries for name in ("classic", "dynamic"))
    assert classic.keys() == dynamic.keys() == {f"{name}.weight" for name in some}
    for name, entry in dynamic.items():
        assert tiny.relative(entry.sums, classic[name].sums) < EXACT, name
        assert entry.gain == pytest.approx(classic[name].gain, rel=1e-3), name
