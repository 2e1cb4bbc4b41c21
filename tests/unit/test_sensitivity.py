# SPDX-License-Identifier: Apache-2.0
"""Measured costs against the definition in float64: both forms of the error, sampling, candidates, gains, refusals."""

import weakref
from pathlib import Path

import gguf
import make_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.errors import BadFile, GGUFError
from gguf_kit.layouts import LAYOUTS
from gguf_kit.models.archs import Category
from gguf_kit.quantize import sensitivity
from gguf_kit.quantize.containers import Blocks, StoredTensor
from gguf_kit.quantize.encode import GgmlEngine, TorchEngine
from gguf_kit.quantize.ggml import BuildError, requires_imatrix
from gguf_kit.quantize.imatrix import Entry, Imatrix, Weighting
from gguf_kit.quantize.mixed import encode_mixed
from gguf_kit.quantize.plan import Choices, PlannedTensor, make_plan
from gguf_kit.quantize.sensitivity import DEFAULT_QTYPES, candidate_types, choose_gains, is_quantizable, measure
from gguf_kit.quantize.sources import Source, open_source
from gguf_kit.quantize.weight_samples import Inputs, Sample, spread_rows
from safetensors.torch import save_file

COLUMNS = 256
FULL, ROOT, NONE, MIXED = Weighting.FULL, Weighting.ROOT, Weighting.NONE, Weighting.MIXED
TO_Q = "blocks.0.attn.to_q.weight"
DOWN = "blocks.1.ffn.net.2.weight"


@pytest.fixture(scope="module")
def engine():
    return GgmlEngine(Path(make_files.load_ggml()._name))


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small_model(rows=24, dtype=torch.bfloat16):
    """Weights of an unrecognised transformer of two blocks."""
    state = {"patch_embed.proj.weight": random(COLUMNS, 16, 1, 2, 2), "patch_embed.proj.bias": random(COLUMNS)}
    for i in range(2):
        state |= {
            f"blocks.{i}.attn.to_q.weight": random(rows, COLUMNS, seed=i, dtype=dtype),
            f"blocks.{i}.ffn.net.2.weight": random(rows, 2 * COLUMNS, seed=9 + i, dtype=dtype),
            f"blocks.{i}.ffn.net.2.bias": random(rows),
        }
    return state


def open_model(folder, state):
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    source = open_source(path)
    return source, make_plan(source, Choices("BF16")).tensors


def recorded(inputs, with_rows=True, **more):
    """The entry of a layer that has seen these inputs: (n, n_columns)."""
    sums = inputs.double().square().sum(0, keepdim=True).float()
    rows = inputs.to(torch.bfloat16) if with_rows else None
    return Entry(sums, torch.tensor([float(len(inputs))]), rows, **more)


def imatrix_for(entries):
    return Imatrix(Path("calibration.gguf"), entries)


def costs_of(folder, state, engine, imatrix=None, **options):
    source, tensors = open_model(folder, state)
    return {costs.name: costs for costs in measure(source, tensors, imatrix, engine, **options)}


def errors_of(costs):
    return {(c.qtype, c.weighting): c.error for c in costs.candidates}


def by_definition(weights, qtype, importance, inputs):
    """Mean over the inputs of |(W - Wq) x|^2, by ggml, gguf-py and numpy in float64."""
    rows = weights.float().numpy()
    decoded = gguf.quants.dequantize(make_files.quantize_with_ggml(rows, qtype, importance), qtype)
    outputs = inputs.double().numpy() @ (rows.astype(np.float64) - decoded).T
    return float(np.square(outputs).sum(1).mean())


def uncorrelated_inputs(n=512):
    """Real vectors whose columns are orthogonal, of very different size: the closed form is exact for them."""
    columns, _ = torch.linalg.qr(random(n, COLUMNS, dtype=torch.float64))
    return columns * n**0.5 * torch.logspace(-2, 1, COLUMNS, dtype=torch.float64)


def correlated_inputs(n=40):
    return random(n, 3, dtype=torch.float32) @ random(3, COLUMNS, seed=1, dtype=torch.float32) + 0.1


@pytest.mark.parametrize(
    "qtype", [QType.Q2_K, QType.Q4_K, QType.IQ2_XXS, QType.IQ3_S, QType.IQ4_XS], ids=lambda q: q.name
)
def test_without_recorded_rows_the_error_is_that_of_uncorrelated_inputs(tmp_path, engine, qtype):
    state, inputs = small_model(), uncorrelated_inputs()
    imatrix = imatrix_for({TO_Q: recorded(inputs, with_rows=False)})
    costs = costs_of(tmp_path, state, engine, imatrix, qtypes=[qtype])[TO_Q]
    full = imatrix.columns[TO_Q].numpy()
    importances = {FULL: full, ROOT: np.sqrt(full)} | ({} if requires_imatrix(qtype) else {NONE: None})
    expected = {(qtype, w): by_definition(state[TO_Q], qtype, i, inputs) for w, i in importances.items()}
    assert errors_of(costs) == pytest.approx(expected | {(QType.BF16, FULL): 0}, rel=1e-5)
    energy = (inputs @ state[TO_Q].double().T).square().sum(1).mean()
    assert costs.energy == pytest.approx(float(energy), rel=1e-5)


def test_recorded_rows_count_instead_of_their_mean_squares(tmp_path, engine):
    state, inputs = small_model(), correlated_inputs().bfloat16().float()
    qtypes = (QType.Q3_K, QType.IQ4_NL, QType.Q8_0)
    options = {"engine": engine, "qtypes": qtypes}
    with_rows = costs_of(tmp_path, state, imatrix=imatrix_for({TO_Q: recorded(inputs)}), **options)[TO_Q]
    without = costs_of(tmp_path, state, imatrix=imatrix_for({TO_Q: recorded(inputs, with_rows=False)}), **options)[TO_Q]
    for qtype, weighting in zip(qtypes, (NONE, NONE, FULL), strict=True):
        error = errors_of(with_rows)[qtype, weighting]
        assert error == pytest.approx(by_definition(state[TO_Q], qtype, None, inputs), rel=1e-5)
        assert error != pytest.approx(errors_of(without)[qtype, weighting], rel=0.01)
    energy = (inputs.double() @ state[TO_Q].double().T).square().sum(1).mean()
    assert with_rows.energy == pytest.approx(float(energy), rel=1e-5)


def test_a_mixture_is_judged_by_inputs_that_did_not_choose_it(tmp_path, engine):
    weights, inputs = small_model()[TO_Q], correlated_inputs().bfloat16().float()
    imatrix = imatrix_for({TO_Q: recorded(inputs)})
    costs = costs_of(tmp_path, small_model(), engine, imatrix, qtypes=[QType.Q3_K])[TO_Q]
    choosing = Inputs(imatrix.columns[TO_Q], inputs[::2])
    data = encode_mixed(engine, weights, QType.Q3_K, choosing, TO_Q).reshape(len(weights), -1)
    decoded = gguf.quants.dequantize(data.numpy(), QType.Q3_K)
    outputs = inputs[1::2].double().numpy() @ (weights.double().numpy() - decoded).T
    assert errors_of(costs)[QType.Q3_K, MIXED] == pytest.approx(np.square(outputs).sum(1).mean(), rel=1e-5)


def test_without_an_importance_matrix_all_columns_count_the_same(tmp_path, engine):
    state = small_model()
    costs = costs_of(tmp_path, state, engine, qtypes=[QType.IQ2_XXS, QType.Q4_K])[DOWN]
    inputs = torch.eye(2 * COLUMNS) * (2 * COLUMNS) ** 0.5
    expected = by_definition(state[DOWN], QType.Q4_K, None, inputs)
    assert errors_of(costs)[QType.Q4_K, NONE] == pytest.approx(expected, rel=1e-5)
    assert {c.weighting for c in costs.candidates} == {NONE}
    assert costs.energy == pytest.approx(float(state[DOWN].double().square().sum()), rel=1e-9)


def test_the_standard_error_is_that_of_the_rows_left_out(tmp_path):
    state = small_model(rows=1200)
    scattered = state[TO_Q].float() * torch.exp(0.4 * random(1200, 1, seed=5, dtype=torch.float32))
    z = []
    for seed in range(40):
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))
        model = {TO_Q: scattered[order].bfloat16(), **{k: v[:32] for k, v in state.items() if k != TO_Q}}
        options = {"engine": TorchEngine(), "qtypes": [QType.Q8_0]}
        full = costs_of(tmp_path, model, sample_rows=0, **options)[TO_Q].candidates[1]
        part = costs_of(tmp_path, model, sample_rows=200, **options)[TO_Q].candidates[1]
        assert full.std_error == 0
        z.append((part.error - full.error) / part.std_error)
    assert 0.75 < np.sqrt(np.mean(np.square(z))) < 1.35
    assert np.max(np.abs(z)) < 4


def test_rows_are_spread_over_the_whole_tensor_without_a_period():
    assert spread_rows(7, 7).tolist() == [*range(7)]
    for n_rows, n in ((3072, 512), (21504, 512), (1000, 999), (12288, 512)):
        rows = spread_rows(n_rows, n)
        assert len(set(rows.tolist())) == n
        parts = rows * n // n_rows
        assert (parts - torch.arange(n)).abs().max() <= 1
        for head in (64, 128):
            if n_rows % head == 0:
                assert len(set((rows % head).tolist())) > 3 / 4 * head


def test_as_many_sample_rows_as_there_are_leave_no_doubt(tmp_path, engine):
    all_rows = costs_of(tmp_path, small_model(), engine, sample_rows=0, qtypes=[QType.Q3_K])[TO_Q]
    for sample_rows in 24, 25:
        costs = costs_of(tmp_path, small_model(), engine, sample_rows=sample_rows, qtypes=[QType.Q3_K])[TO_Q]
        assert costs.candidates == all_rows.candidates
    fewer = costs_of(tmp_path, small_model(), engine, sample_rows=23, qtypes=[QType.Q3_K])[TO_Q].candidates
    assert [c.std_error > 0 for c in all_rows.candidates] == [False, False]
    assert [c.std_error > 0 for c in fewer] == [False, True]


def test_candidates_are_all_types_and_weightings_worth_a_try(tmp_path, engine):
    state, inputs = small_model(), correlated_inputs()
    state |= {f"blocks.{i}.attn.to_k.weight": random(24, COLUMNS) for i in range(2)}
    recorded_name, summed_name = TO_Q, "blocks.1.attn.to_k.weight"
    imatrix = imatrix_for({recorded_name: recorded(inputs), summed_name: recorded(inputs, with_rows=False)})
    costs = costs_of(tmp_path, state, engine, imatrix)
    alone = {(QType.BF16, FULL), (QType.Q8_0, FULL)}
    picky = {q for q in DEFAULT_QTYPES if requires_imatrix(q)}
    others = {*DEFAULT_QTYPES} - picky - {QType.Q8_0}
    assert picky == {QType.IQ2_XXS, QType.IQ2_XS}
    expected = {
        recorded_name: alone | {(q, MIXED) for q in picky | others} | {(q, NONE) for q in others},
        summed_name: alone | {(q, w) for q in picky | others for w in (FULL, ROOT)} | {(q, NONE) for q in others},
        DOWN: {(q, NONE) for q in (QType.BF16, *DEFAULT_QTYPES) if q not in picky},
    }
    for name, encodings in expected.items():
        found = [(c.qtype, c.weighting) for c in costs[name].candidates]
        assert {*found} == encodings
        assert len(found) == len(encodings)
        assert found[0][0] is QType.BF16


def test_sizes_are_padded_as_in_a_file(tmp_path, engine):
    costs = costs_of(tmp_path, small_model(rows=23), engine, qtypes=[QType.Q2_K, QType.Q8_0])[TO_Q]
    assert [c.n_bytes for c in costs.candidates] == [23 * 512, 23 * 84 + 20, 23 * 272 + 16]


def test_the_list_of_types_that_ignore_importance_is_ggmls(engine):
    weights, importance = random(4, COLUMNS, dtype=torch.float32), torch.logspace(-3, 3, COLUMNS)
    slow_to_start = {QType.IQ1_M}
    for qtype in sorted((engine.qtypes & {*LAYOUTS}) - slow_to_start, key=lambda q: q.name):
        if requires_imatrix(qtype):
            continue
        same = torch.equal(engine.encode(weights, qtype, None), engine.encode(weights, qtype, importance))
        assert same == (qtype in sensitivity.IGNORE_IMPORTANCE), qtype.name


def planned(shape, stored_shape=None, name="a.weight", qtype=QType.BF16):
    return PlannedTensor(name, shape, stored_shape or shape, Category.OTHER, qtype)


def test_rows_that_are_no_multiple_of_256_have_types_of_small_blocks():
    types = candidate_types(planned((64, 96)))
    assert {*types} == {QType.IQ4_NL, QType.Q8_0, QType.Q5_0, QType.Q5_1, QType.Q4_0, QType.Q4_1}
    assert candidate_types(planned((64, 96)), [QType.Q6_K]) == (QType.Q8_0,)
    assert candidate_types(planned((64, 96)), [QType.IQ2_XXS]) == ()
    assert candidate_types(planned((64, COLUMNS))) == DEFAULT_QTYPES


def test_vectors_small_tensors_and_what_stays_float32_have_no_candidates(tmp_path, engine):
    assert is_quantizable(planned((64, 96)))
    assert is_quantizable(planned((64, 96), qtype=QType.Q4_0))
    assert not is_quantizable(planned((64 * 96,)))
    assert not is_quantizable(planned((32, 32)))
    assert not is_quantizable(planned((64, 96), qtype=QType.F32))
    assert not is_quantizable(planned((64, 96), qtype=QType.I32))
    assert not is_quantizable(planned((64, 100)))
    assert not is_quantizable(planned((64, 96), name="table"))
    names = {
        "patch_embed.proj.weight",
        *(f"blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.to_q", "ffn.net.2")),
    }
    costs = costs_of(tmp_path, small_model(), engine, qtypes=[QType.Q8_0])
    assert {*costs} == names
    assert [costs[name].block for name in sorted(names)] == [0, 0, 1, 1, -1]
    assert costs["patch_embed.proj.weight"].category is Category.EMBED


def test_a_tensor_stored_as_other_rows_has_unit_inputs_and_a_relative_gain(tmp_path, engine):
    state = small_model() | {"blocks.0.attn.to_v.weight": random(64, 100)}
    inputs = 3 * random(8, 100, dtype=torch.float32)
    imatrix = imatrix_for({
        "blocks.0.attn.to_v.weight": recorded(inputs, gain=7.0, gain_calls=1),
        TO_Q: recorded(correlated_inputs(), gain=2.0, gain_calls=1),
    })  # fmt: skip
    costs = costs_of(tmp_path, state, engine, imatrix, qtypes=[QType.Q4_K])
    odd = costs["blocks.0.attn.to_v.weight"]
    assert odd.shape == (64, 100)
    weights = state[odd.name].reshape(-1, COLUMNS)
    expected = by_definition(weights, QType.Q4_K, None, torch.eye(COLUMNS) * COLUMNS**0.5)
    assert errors_of(odd)[QType.Q4_K, NONE] == pytest.approx(expected, rel=1e-5)
    assert odd.gain * odd.energy == pytest.approx(2.0 * costs[TO_Q].energy)


def test_a_kernel_in_rows_is_measured_in_those(tmp_path, engine):
    state = small_model()
    name = "patch_embed.proj.weight"
    costs = costs_of(tmp_path, state, engine, qtypes=[QType.Q8_0])[name]
    _, tensors = open_model(tmp_path, state)
    stored = next(t.stored_shape for t in tensors if t.name == name)
    rows = state[name].reshape(-1, stored[-1])
    expected = by_definition(rows, QType.Q8_0, None, torch.eye(stored[-1]) * stored[-1] ** 0.5)
    assert errors_of(costs)[QType.Q8_0, NONE] == pytest.approx(expected, rel=1e-5)


def test_own_precision_costs_what_rounding_to_it_costs(tmp_path, engine):
    state = small_model(dtype=torch.float32)
    own = costs_of(tmp_path, state, engine, qtypes=[])[TO_Q].candidates
    lost = (state[TO_Q] - state[TO_Q].bfloat16().float()).double().square().sum()
    assert [c.qtype for c in own] == [QType.BF16]
    assert own[0].error == pytest.approx(float(lost), rel=1e-5)
    assert costs_of(tmp_path, small_model(), engine, qtypes=[])[TO_Q].candidates[0].error == 0


def test_blocks_that_are_kept_cost_nothing(tmp_path, engine):
    weights = random(24, COLUMNS)
    blocks = Blocks(QType.Q8_0, lambda: engine.encode(weights.float(), QType.Q8_0, None))
    stored = StoredTensor(torch.bfloat16, (24, COLUMNS), lambda: weights, blocks)
    source = Source(tmp_path / "model", "a model in memory", {TO_Q: stored}, {}, ())
    (costs,) = measure(
        source, [planned((24, COLUMNS), name=TO_Q, qtype=QType.Q8_0)], None, engine, qtypes=(QType.Q8_0, QType.Q4_K)
    )
    assert [(c.qtype, c.error > 0) for c in costs.candidates] == [(QType.Q8_0, False), (QType.Q4_K, True)]


def test_types_that_cannot_hold_the_weights_are_no_candidates(tmp_path, engine):
    state = small_model()
    state[TO_Q][0, 0] = 1e9
    found = {c.qtype for c in costs_of(tmp_path, state, engine)[TO_Q].candidates}
    assert QType.BF16 in found
    assert not found & {QType.Q4_K, QType.IQ4_XS, QType.Q8_0}


def test_weights_that_are_not_finite_are_one_error(tmp_path, engine):
    state = small_model()
    state[TO_Q][0, 0] = float("nan")
    with pytest.raises(
        GGUFError, match=rf"^model.safetensors: tensor '{TO_Q}' has weights that are NaN or infinite\. The"
    ):
        costs_of(tmp_path, state, engine)


def test_an_engine_that_does_not_work_is_no_lack_of_candidates(tmp_path):
    class Broken(TorchEngine):
        def encode(self, weights, qtype, importance):
            raise BuildError("the library wrote nothing")

    with pytest.raises(GGUFError, match="the library wrote nothing"):
        costs_of(tmp_path, small_model(), Broken())


def test_an_importance_matrix_of_another_model_is_refused_before_any_work(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(sensitivity.Measurement, "read", None)
    with pytest.raises(
        BadFile, match=r"calibration.gguf: the entry of .* has 128 columns, expected 256 columns\. The imp"
    ):
        costs_of(tmp_path, small_model(), engine, imatrix_for({TO_Q: recorded(random(4, 128))}))
    with pytest.raises(BadFile, match=r"none of its entries is a matrix of the model\. The importance matrix was made"):
        costs_of(tmp_path, small_model(), engine, imatrix_for({"other.weight": recorded(random(4, 128))}))


@pytest.mark.parametrize("sample_rows", [-1, 1])
def test_too_few_sample_rows_are_refused(tmp_path, engine, sample_rows):
    with pytest.raises(GGUFError, match=r"too few\. Take 2 or more, or 0 for all rows"):
        costs_of(tmp_path, small_model(), engine, sample_rows=sample_rows)


def test_gains_are_the_measured_ones_or_such_that_relative_errors_count_as_elsewhere():
    energies = {"a": 2.0, "b": 5.0, "c": 10.0, "zero": 0.0}
    assert choose_gains(energies, {}) == {"a": 0.5, "b": 0.2, "c": 0.1, "zero": 0.0}
    assert choose_gains(energies, {"a": 3.0}) == {"a": 3.0, "b": 6 / 5, "c": 6 / 10, "zero": 0.0}
    assert choose_gains(energies, {"a": 3.0, "b": 0.0}) == {"a": 3.0, "b": 0.0, "c": 6 / 10, "zero": 0.0}


def test_threads_change_nothing_and_progress_reaches_the_end(tmp_path, engine):
    seen = []
    alone = costs_of(tmp_path, small_model(), engine, progress=lambda name, part: seen.append((name, part)))
    assert costs_of(tmp_path, small_model(), engine, n_threads=4) == alone
    parts = [part for _, part in seen]
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert {name for name, _ in seen} == {*alone}


def test_two_tensors_rows_are_in_memory_at_most(tmp_path, engine, monkeypatch):
    state = small_model() | {f"blocks.{i}.attn.to_k.weight": random(40, COLUMNS, seed=i) for i in range(8)}
    alive, most, read = [], [], sensitivity.Measurement.read

    def spy(measurement, tensor):
        most.append(sum(rows() is not None for rows in alive))
        sample = read(measurement, tensor)
        alive.append(weakref.ref(sample.rows))
        assert sample.rows.shape[0] <= 20
        return sample

    monkeypatch.setattr(sensitivity.Measurement, "read", spy)
    costs = costs_of(tmp_path, state, engine, qtypes=[QType.Q8_0], sample_rows=20, n_threads=3)
    assert len(costs) == len(most) == 13
    assert max(most) < 2


def test_float32_products_of_long_rows_are_exact_enough():
    weights, rows = 1e-3 * random(64, 16384, dtype=torch.float32), 30 * random(64, 16384, seed=1, dtype=torch.float32)
    for inputs in Inputs(rows.square().mean(0), rows), Inputs(rows.square().mean(0)):
        exact = inputs.mean_square_outputs(weights.double())
        assert torch.allclose(inputs.mean_square_outputs(weights).double(), exact, rtol=1e-5)


def test_a_sum_over_some_rows_is_scaled_to_all():
    sample = Sample("a", torch.zeros(4, 32), 12, None, {}, Inputs(torch.ones(32)))
    estimate = sample.estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert estimate.error == pytest.approx(36)
    assert estimate.std_error == pytest.approx(12 * (2 / 3 * (14 / 3) / 4) ** 0.5)
