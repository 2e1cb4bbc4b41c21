# SPDX-License-Identifier: Apache-2.0
"""The K types' torch encoders against ggml's own bytes, the searches' corners, and the packer against the reader."""

import numpy as np
import pytest
import quant_data
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels import encoder_search, torch_encoder_k
from gguf_kit.kernels.encoder_search import (
    divide,
    largest_by_magnitude,
    make_q3_quants,
    make_qkx2_quants,
    make_qkx3_quants,
    make_qp_quants,
    make_qx_quants,
    nearest_codes_,
    nearest_int,
    round_codes_,
    square_root,
    sum_rows,
)
from gguf_kit.kernels.packing import pack_blocks
from gguf_kit.kernels.torch_encoder_k import ENCODERS
from gguf_kit.kernels.torch_reference import read_numbers, unpack_codes
from gguf_kit.layouts import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from make_files import MODEL, quantize_with_ggml
from safetensors.torch import load_file

QTYPES = list(ENCODERS)
LINE_QTYPES = [QType.Q2_K, QType.Q4_K, QType.Q5_K]
N_ROWS, N_COLUMNS = 12, 768
SHAPE = (N_ROWS, N_COLUMNS)


def one_per_block(rng, background, outlier):
    """The background with one large number somewhere in each block of 256."""
    blocks = background.reshape(-1, 256).copy()
    blocks[np.arange(len(blocks)), rng.integers(0, 256, len(blocks))] = outlier * rng.choice([-1, 1], len(blocks))
    return blocks.reshape(background.shape)


def per_sub_block(rng, numbers):
    """The numbers times a factor for each sub-block of 16, over many powers of ten; some are zeros."""
    factors = np.exp(rng.normal(0, 6, (N_ROWS, N_COLUMNS // 16))) * (rng.random((N_ROWS, N_COLUMNS // 16)) < 0.8)
    return numbers * factors.repeat(16, axis=1)


DATA_SETS = {
    "normal": lambda rng: rng.standard_normal(SHAPE) * 0.02,
    "student t": lambda rng: rng.standard_t(2, SHAPE) * 0.02,
    "laplace with outliers": lambda rng: rng.laplace(size=SHAPE) * np.where(rng.random(SHAPE) < 0.01, 50, 1),
    "constant rows": lambda rng: np.repeat(rng.choice([-1.0, -0.3, 0.0, 0.5, 7.0], (N_ROWS, 1)), N_COLUMNS, axis=1),
    "zeros": lambda rng: np.zeros(SHAPE),
    "zeros of both signs": lambda rng: np.where(
        rng.random(SHAPE) < 0.9, rng.choice([0.0, -0.0], SHAPE), rng.random(SHAPE)
    ),
    "1e-8": lambda rng: rng.standard_normal(SHAPE) * 1e-8,
    "1e-15": lambda rng: rng.standard_normal(SHAPE) * 1e-15,
    "1e-20": lambda rng: rng.standard_normal(SHAPE) * 1e-20,
    "subnormal": lambda rng: rng.standard_normal(SHAPE) * 1e-40,
    "up to 1e4": lambda rng: rng.uniform(-1e4, 1e4, SHAPE),
    "one number": lambda rng: one_per_block(rng, np.zeros(SHAPE), 3.0),
    "one outlier": lambda rng: one_per_block(rng, rng.standard_normal(SHAPE) * 1e-3, 10.0),
    "negative": lambda rng: -np.abs(rng.standard_normal(SHAPE)) - 0.1 * rng.integers(0, 3, SHAPE),
    "positive": lambda rng: np.abs(rng.standard_normal(SHAPE)) + 1,
    "integers with ties": lambda rng: rng.integers(-4, 5, SHAPE),
    "scales of many sizes": lambda rng: per_sub_block(rng, rng.standard_normal(SHAPE)),
    "ramp": lambda rng: np.tile(np.arange(N_COLUMNS) / 256, (N_ROWS, 1)) + rng.integers(-1, 3, (N_ROWS, 1)),
}
IMPORTANCES = {
    "no importance": lambda rng: None,
    "random": lambda rng: rng.random(N_COLUMNS) ** 2 * 10,
    "half zeros": lambda rng: rng.random(N_COLUMNS) * (rng.random(N_COLUMNS) < 0.5),
    "mostly zeros": lambda rng: rng.random(N_COLUMNS) * (rng.random(N_COLUMNS) < 0.05),
    "zeros": lambda rng: np.zeros(N_COLUMNS),
}


def make(kinds, name, seed=0):
    """A data set or an importance as float32, or None."""
    made = kinds[name](np.random.default_rng([seed, len(name)]))
    return None if made is None else np.ascontiguousarray(made, dtype=np.float32)


def by_name(qtype):
    return qtype.name


def assert_ggmls_bytes(weights, qtype, importance=None, names=()):
    """Fail, with the first block that differs, unless the encoder's bytes are ggml's. names: of each N_ROWS rows."""
    expected = quantize_with_ggml(weights, qtype, importance)
    got = ENCODERS[qtype](torch.from_numpy(weights), None if importance is None else torch.from_numpy(importance))
    assert got.dtype == torch.uint8
    assert got.shape == expected.shape
    type_size = GGML_QUANT_SIZES[qtype][1]
    got, expected = got.numpy().reshape(-1, type_size), expected.reshape(-1, type_size)
    wrong = (got != expected).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        blocks_per_set = N_ROWS * weights.shape[1] // 256
        lines = [
            f"{names[first // blocks_per_set] if names else 'weights'}: "
            f"{qtype.name}: {wrong.sum()} of {len(wrong)} blocks differ, the first is block {first}",
            f"  got      {got[first].tobytes().hex()}",
            f"  expected {expected[first].tobytes().hex()}",
            f"  weights  {weights.reshape(-1, 256)[first].tolist()}",
        ]
        raise AssertionError("\n".join(lines))


# Bytes


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_bytes_are_ggmls(qtype, importance):
    importance = make(IMPORTANCES, importance)
    names = [name for name in DATA_SETS if name != "subnormal"]  # they would make the others' batch careful, too
    weights = np.concatenate([make(DATA_SETS, name) for name in names])
    assert_ggmls_bytes(weights, qtype, importance, names)
    assert_ggmls_bytes(make(DATA_SETS, "subnormal"), qtype, importance, ["subnormal"])


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_bytes_of_trained_weights_are_ggmls(qtype, importance):
    tensors = {name: tensor for name, tensor in load_file(MODEL).items() if tensor.ndim == 2}
    matrices = [tensor.float().numpy() for tensor in tensors.values() if tensor.shape[1] == N_COLUMNS]
    matrices += [tensor.float().numpy() for tensor in tensors.values() if tensor.shape[1] == 256]
    assert len(matrices) > 10
    importance = make(IMPORTANCES, importance)
    for weights in matrices[::4]:
        part = None if importance is None else importance[: weights.shape[1]]
        assert_ggmls_bytes(np.ascontiguousarray(weights[:32]), qtype, part)


@settings(max_examples=25, deadline=None)
@given(
    qtype=st.sampled_from(QTYPES),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-12, 4),
    spread=st.floats(0, 4),
    degrees=st.sampled_from([0.7, 2, 30]),
    shift=st.sampled_from([-1.0, 0.0, 0.1]),
)
def test_bytes_are_ggmls_whatever_the_scale_and_the_importance(qtype, seed, exponent, spread, degrees, shift):
    # No zeros in the importance: with them libggml-python's ggml differs from b11434 now and then, see the searches.
    rng = np.random.default_rng(seed)
    numbers = np.clip(rng.standard_t(degrees, SHAPE) + shift, -1e3, 1e3) * 10.0**exponent
    importance = np.exp(rng.normal(0, spread, N_COLUMNS)).astype(np.float32)
    assert_ggmls_bytes(numbers.astype(np.float32), qtype)
    assert_ggmls_bytes(numbers.astype(np.float32), qtype, importance)


@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_scales_beyond_float16_become_infinite_as_in_ggml(qtype):
    weights = make(DATA_SETS, "normal") * np.float32(1e11)
    assert_ggmls_bytes(weights, qtype)
    blocks = ENCODERS[qtype](torch.from_numpy(weights), None).view(-1, GGML_QUANT_SIZES[qtype][1])
    assert read_numbers(blocks, LAYOUTS[qtype], "d").isinf().all()


# Batches


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_batches_that_cut_rows_give_the_same_bytes(qtype, importance, monkeypatch):
    monkeypatch.setattr(torch_encoder_k, "BATCH_WEIGHTS_CPU", 7 * 256)
    assert_ggmls_bytes(make(DATA_SETS, "normal"), qtype, make(IMPORTANCES, importance))


@pytest.mark.parametrize("part_size", [1, 300, 1 << 10])
@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_searching_in_parts_of_any_size_gives_the_same_bytes(qtype, importance, part_size, monkeypatch):
    monkeypatch.setattr(encoder_search, "PART_SIZE_CPU", part_size)
    assert_ggmls_bytes(make(DATA_SETS, "normal"), qtype, make(IMPORTANCES, importance))


@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_arguments_are_left_as_they_are_and_may_be_views(qtype):
    weights = torch.from_numpy(make(DATA_SETS, "normal"))
    importance = torch.from_numpy(make(IMPORTANCES, "random"))
    before = weights.clone(), importance.clone()
    plain = ENCODERS[qtype](weights, importance)
    assert torch.equal(weights, before[0])
    assert torch.equal(importance, before[1])
    assert torch.equal(ENCODERS[qtype](weights.t().contiguous().t(), importance), plain)


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", QTYPES, ids=by_name)
def test_a_matrix_without_rows_has_no_bytes(qtype, importance):
    importance = make(IMPORTANCES, importance)
    got = ENCODERS[qtype](torch.empty(0, N_COLUMNS), None if importance is None else torch.from_numpy(importance))
    assert got.shape == (0, N_COLUMNS // 256 * GGML_QUANT_SIZES[qtype][1])


# The corners that only degenerate importances and tiny numbers reach: the data sets above do reach them


@pytest.mark.parametrize("qtype", LINE_QTYPES, ids=by_name)
def test_the_data_sets_bring_about_codes_with_too_many_bits(qtype, monkeypatch):
    seen = []

    def spy(x, weights, nmax):
        scale, codes = make_qp_quants(x, weights, nmax)
        seen.append(bool((codes > nmax).any()))
        return scale, codes

    monkeypatch.setattr(torch_encoder_k, "make_qp_quants", spy)
    weights = np.concatenate([make(DATA_SETS, name) for name in DATA_SETS])
    assert_ggmls_bytes(weights, qtype, make(IMPORTANCES, "mostly zeros"), list(DATA_SETS))
    assert any(seen)


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", LINE_QTYPES, ids=by_name)
def test_subnormal_numbers_need_the_careful_rounding_and_normal_ones_do_not(qtype, importance, monkeypatch):
    used = []
    run = encoder_search._LineSearch.run
    monkeypatch.setattr(
        encoder_search._LineSearch,
        "run",
        lambda self, factors, rounding: used.append(rounding) or run(self, factors, rounding),
    )
    assert_ggmls_bytes(make(DATA_SETS, "normal"), qtype, make(IMPORTANCES, importance))
    assert used == [round_codes_]
    assert_ggmls_bytes(make(DATA_SETS, "subnormal"), qtype, make(IMPORTANCES, importance))
    careful = nearest_codes_ if importance == "no importance" else encoder_search.bounded_codes_
    assert used == [round_codes_, round_codes_, careful]


# Searches

X = torch.tensor([[3.0, 0.0, -1.0], [-4.0, -0.0, -1.0], [4.0, 0.0, -1.0], [1.0, 0.0, -1.0]])  # three sub-blocks


def test_nearest_int_rounds_halves_to_even_and_wraps_around():
    numbers = [0.5, 1.5, -0.5, -2.5, 2.4999998, 4194303.0, 4194304.0, 1e30, torch.inf, -torch.inf, torch.nan]
    expected = [0, 2, 0, -2, 2, 4194303, -4194304, None, -4194304, -4194304, 0]
    bits = (np.array(numbers, np.float32) + np.float32(12582912)).view(np.int32)
    expected = [int(b & 0x7FFFFF) - 0x400000 if e is None else e for e, b in zip(expected, bits, strict=True)]
    x = torch.tensor(numbers)
    assert nearest_int(x).tolist() == expected
    assert nearest_codes_(x.clone(), -32, 31).tolist() == [float(np.clip(e, -32, 31)) for e in expected]
    assert x[0] == 0.5


def test_sums_add_in_order_from_zero():
    rows = torch.tensor([[1e8, -0.0], [1.0, -0.0], [-1e8, -0.0], [1.0, -0.0]])
    total = sum_rows(rows.unbind(0))
    assert total.tolist() == [1.0, 0.0]
    assert not torch.signbit(total).any()


def test_division_and_square_root_round_once():
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 0.1
    assert np.array_equal(divide(31.0, x).numpy(), np.float32(31.0) / x.numpy())
    assert np.array_equal(square_root(x).numpy(), np.sqrt(x.numpy()))


def test_the_first_of_equal_magnitudes_keeps_its_sign():
    assert largest_by_magnitude(X).tolist() == [-4.0, 0.0, -1.0]
    assert largest_by_magnitude(-X).tolist() == [4.0, 0.0, 1.0]


def test_sub_blocks_of_zeros_have_scale_and_codes_zero():
    weights = torch.ones_like(X)
    for scale, codes in (make_qx_quants(X, weights, 8), make_q3_quants(X, 4), make_qp_quants(X, weights, 15)):
        assert scale[1] == 0
        assert codes[:, 1].tolist() == [0, 0, 0, 0]
        assert scale[0] != 0
    for search in make_qkx2_quants, make_qkx3_quants:
        scale, low, codes = search(X, weights, 15, -0.9, 0.05, 36)
        assert scale.tolist()[1:] == [0, 0]
        assert low.tolist()[1:] == [0, 1]
        assert codes[:, 1:].eq(0).all()


def test_searches_fit_what_can_be_fitted_exactly():
    steps = torch.arange(16.0).reshape(16, 1).repeat(1, 3) * torch.tensor([0.5, 1.0, 2.0])
    scale, low, codes = make_qkx2_quants(steps - 3, torch.ones_like(steps), 15, -1, 0.1, 20)
    assert torch.allclose(scale, torch.tensor([0.5, 1.0, 2.0]))
    assert torch.allclose(low, torch.full((3,), 3.0))
    assert codes.T.tolist() == [list(range(16))] * 3
    scale, codes = make_qx_quants(-steps, torch.ones_like(steps), 16)
    assert torch.allclose(scale * (codes.float() - 16), -steps)


@pytest.mark.parametrize(
    ("first_zero", "expected_scale", "expected_codes"),
    [
        (-0.0, -0.005661327391862869, [0] * 13 + [3, 3, 0]),
        (0.0, -0.000329823000356555, [3] * 13 + [0, 3, 3]),
    ],
)
def test_codes_beyond_the_range_with_an_importance(first_zero, expected_scale, expected_codes):
    # The smallest number counts nothing, so a line is found whose min is the maximum, 0, and the first zero's sign
    # decides. From ggml b11434; older ones, such as libggml-python 0.20.2, let the codes wrap around.
    x = torch.tensor([[-0.0, 0.0]] * 13 + [[-1.0076911449432373] * 2, [-0.016983982175588608] * 2, [-0.0, 0.0]])
    x = x.repeat(1, 32)  # a sign for the other zeros in each column
    x[0] = first_zero
    weights = [0, 0, 0.5405794978141785, 0.29021841287612915, 0.5847291946411133, 0.22749729454517365]
    weights += [0.5078117847442627, 0, 0.5815524458885193, 0, 0, 0.40332385897636414, 0, 0, 0.22180801630020142]
    weights = torch.tensor([*weights, 0.4497573673725128])
    scale, _, codes = make_qkx3_quants(x, weights[:, None].repeat(1, 64), 3, -0.9, 0.05, 36)
    assert scale.tolist() == [expected_scale] * 64
    assert codes.T.tolist() == [expected_codes] * 64


def test_a_negative_number_among_scales_gets_the_low_bits_of_its_code():
    x = torch.tensor([[10.0], [-2.0], [5.0], [0.0], [1.0], [2.0], [3.0], [4.0]])
    _, codes = make_qp_quants(x, torch.ones_like(x), 63)
    assert codes[0, 0] == 63
    assert 200 < int(codes[1, 0]) < 256


# Packing


@pytest.mark.parametrize("qtype", [qtype for qtype in quant_data.BLOCK_QTYPES if qtype != QType.TQ1_0], ids=by_name)
def test_packing_is_the_inverse_of_reading(qtype):
    layout = LAYOUTS[qtype]
    blocks = torch.from_numpy(quant_data.random_blocks(layout, 40))
    values = {name: unpack_codes(blocks, layout, code) for name, code in layout.codes().items()}
    floats = [field.name for field in layout.fields if field.element in ("f32", "f16", "bf16")]
    values |= {name: read_numbers(blocks, layout, name) for name in floats}
    assert torch.equal(pack_blocks(layout, values), blocks)
    wide = {name: value if name in floats else value.to(torch.int64) for name, value in values.items()}
    assert torch.equal(pack_blocks(layout, wide), blocks)


def test_packing_refuses_what_the_row_does_not_have():
    layout = LAYOUTS[QType.Q4_K]
    with pytest.raises(ValueError, match="Q4_K: no float field and no code is named 'qs'"):
        pack_blocks(layout, {"d": torch.zeros(2), "qs": torch.zeros(2, 128)})
    with pytest.raises(ValueError, match=r"Q4_K: codes have shape \(2, 255\), expected \(2, 256\)"):
        pack_blocks(layout, {"quants": torch.zeros(2, 255, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="TQ1_0: digits of base 3 cannot be packed"):
        pack_blocks(LAYOUTS[QType.TQ1_0], {"quants": torch.zeros(2, 256, dtype=torch.uint8)})
