# SPDX-License-Identifier: Apache-2.0
"""The torch encoder's bytes against those of ggml's C, and what its front door accepts."""

import gguf
import make_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels import torch_encoder
from gguf_kit.kernels.torch_encoder import ENCODABLE_QTYPES, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

N_ROWS, N_COLUMNS = 4, 1024
OWN_QTYPES = [QType.Q8_0, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.IQ4_NL, QType.IQ4_XS]
K_QTYPES = [QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K]


def one_per_block(rng, background, outlier, block_size=32):
    """The outlier, of random sign, at a random place in each block."""
    blocks = background.reshape(-1, block_size)
    signs = rng.choice([-1.0, 1.0], len(blocks))
    blocks[np.arange(len(blocks)), rng.integers(0, block_size, len(blocks))] = outlier * signs
    return blocks.reshape(background.shape)


def signed_zeros(rng, shape):
    """Mostly 0 and -0 in any order, in some blocks with a few numbers of one sign or both."""
    zeros = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    signs = rng.integers(-1, 2, (shape[0], shape[1] // 32)).repeat(32, axis=1)
    return np.where(rng.random(shape) < 0.1, np.abs(rng.standard_normal(shape)) * signs, zeros)


def middles_of_kvalues(rng, shape):
    """Numbers that lie, but for a rounding, in the middle between two of kvalues_iq4nl, for blocks of any scale."""
    kvalues = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    middles = rng.choice((kvalues[1:] + kvalues[:-1]) / 2, shape).astype(np.float32)
    middles[:, ::32] = kvalues[0] * rng.choice([-1, 1], (shape[0], shape[1] // 32))
    return middles * rng.uniform(1e-3, 1, (shape[0], shape[1] // 32)).astype(np.float32).repeat(32, axis=1)


DATA_SETS = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "heavy tails": lambda rng, shape: rng.standard_t(1.5, shape) * 0.02,
    "constant rows": lambda rng, shape: np.array([1, -1, 0.3, -0.7])[: shape[0], None] * np.ones(shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "signed zeros": signed_zeros,
    "1e-8": lambda rng, shape: rng.standard_normal(shape) * 1e-8,
    "1e-15": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-17, -13, (shape[0], 1)),
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-45, -36, shape),
    "up to 1e4": lambda rng, shape: rng.uniform(-1e4, 1e4, shape),
    "one outlier": lambda rng, shape: one_per_block(rng, rng.standard_normal(shape) * 1e-3, 5.0),
    "one number": lambda rng, shape: one_per_block(rng, np.zeros(shape), 5.0),
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)) - 0.01,
    "positive": lambda rng, shape: np.abs(rng.standard_normal(shape)) + 0.5,
    "integers": lambda rng, shape: rng.integers(-4, 5, shape),
    "halves of 127": lambda rng, shape: one_per_block(rng, rng.integers(-253, 254, shape) / 2, 127.0),
    "middles of kvalues": middles_of_kvalues,
    "many scales": lambda rng, shape: rng.standard_normal(shape) * np.exp(rng.normal(0, 6, (1, shape[1]))),
}
IMPORTANCES = {
    "no importance": lambda rng, n: None,
    "random": lambda rng, n: rng.random(n) ** 4 * 10,
    "half zeros": lambda rng, n: rng.random(n) * (rng.random(n) < 0.5),
    "mostly zeros": lambda rng, n: rng.random(n) * (rng.random(n) < 0.03),
}


def make_weights(name, shape=(N_ROWS, N_COLUMNS), seed=0):
    return DATA_SETS[name](np.random.default_rng([seed, 1]), shape).astype(np.float32)


def make_importance(name, n_columns=N_COLUMNS, seed=0):
    importance = IMPORTANCES[name](np.random.default_rng([seed, 2]), n_columns)
    return None if importance is None else importance.astype(np.float32)


def encode_arrays(weights, qtype, importance=None):
    """encode() from numpy to numpy."""
    importance = None if importance is None else torch.from_numpy(importance)
    return encode(torch.from_numpy(np.ascontiguousarray(weights)), qtype, importance).numpy()


def assert_same_blocks(weights, qtype, importance=None):
    """Fail, with a description of the first block that differs, unless encode() writes ggml's bytes."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    got = encode_arrays(weights, qtype, importance)
    expected = make_files.quantize_with_ggml(weights, qtype, importance)
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    wrong = (got != expected).reshape(-1, type_size).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        raise AssertionError(
            f"{qtype.name}: {wrong.sum()} of {len(wrong)} blocks differ, the first is block {first}\n"
            f"  weights  {weights.reshape(-1, block_size)[first].tolist()}\n"
            f"  got      {got.reshape(-1, type_size)[first].tobytes().hex()}\n"
            f"  expected {expected.reshape(-1, type_size)[first].tobytes().hex()}"
        )


def by_name(qtype):
    return qtype.name


# Bytes


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
def test_bytes_are_ggmls(qtype, data_set, importance):
    assert_same_blocks(make_weights(data_set), qtype, make_importance(importance))


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", K_QTYPES, ids=by_name)
def test_the_k_types_are_reached_through_the_same_door(qtype, importance):
    assert_same_blocks(make_weights("normal"), qtype, make_importance(importance))


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
def test_bytes_of_a_trained_model_are_ggmls(qtype, importance):
    with safe_open(make_files.MODEL, "pt") as model:
        names = [name for name in model.keys() if name.startswith("double_blocks.0.") and name.endswith(".weight")]
        tensors = [model.get_tensor(name) for name in sorted(names)]
    matrices = [tensor.float().numpy()[:48] for tensor in tensors if tensor.ndim == 2 and tensor.shape[1] % 256 == 0]
    assert len(matrices) > 5
    for weights in matrices:
        assert_same_blocks(weights, qtype, make_importance(importance, weights.shape[1]))


@settings(max_examples=60, deadline=None)
@given(
    qtype=st.sampled_from(OWN_QTYPES),
    data_set=st.sampled_from(sorted(DATA_SETS)),
    importance=st.sampled_from(sorted(IMPORTANCES)),
    exponent=st.integers(-30, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_are_ggmls_for_any_seed_and_scale(qtype, data_set, importance, exponent, seed):
    weights = make_weights(data_set, (2, 512), seed)
    weights = np.clip(weights * np.float32(10.0**exponent), -1e7, 1e7).astype(np.float32)
    assert_same_blocks(weights, qtype, make_importance(importance, 512, seed))


@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
def test_the_first_of_two_opposite_maxima_decides_the_sign_of_d(qtype):
    weights = np.full((2, 256), 0.25, np.float32)
    weights[0, 5::32], weights[0, 9::32] = 1, -1
    weights[1, 5::32], weights[1, 9::32] = -1, 1
    assert_same_blocks(weights, qtype)


@pytest.mark.parametrize("qtype", [QType.Q4_1, QType.Q5_1], ids=by_name)
def test_the_first_of_two_zeros_gives_m_its_sign(qtype):
    weights = np.ones((2, 256), np.float32)
    weights[0, 3::32], weights[0, 7::32] = 0.0, -0.0
    weights[1, 3::32], weights[1, 7::32] = -0.0, 0.0
    assert_same_blocks(weights, qtype)
    layout = torch_encoder.LAYOUTS[qtype]
    m = encode_arrays(weights, qtype).reshape(2, 8, -1)[:, :, layout.offsets["m"] :][:, :, :2]
    assert (m[0] == (0x00, 0x00)).all()
    assert (m[1] == (0x00, 0x80)).all()


def test_q8_0_rounds_halves_away_from_zero_and_nothing_below_them():
    below = np.float32(0.49999997)
    row = np.zeros((1, 32), np.float32)
    row[0, :7] = 127, 0.5, -0.5, 1.5, -2.5, below, -below  # the scale is 1
    codes = encode_arrays(row, QType.Q8_0)[0, 2:].view(np.int8)
    assert codes[:7].tolist() == [127, 1, -1, 2, -3, 0, 0]
    assert_same_blocks(row, QType.Q8_0)


@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
@pytest.mark.parametrize("importance", ["no importance", "random"])
def test_a_scale_beyond_f16_becomes_infinity_as_in_ggml(qtype, importance):
    weights = make_weights("normal") * np.float32(1e10)
    assert_same_blocks(weights, qtype, make_importance(importance))
    layout = torch_encoder.LAYOUTS[qtype]
    blocks = encode_arrays(weights, qtype).reshape(-1, layout.type_size)
    d = np.ascontiguousarray(blocks[:, layout.offsets["d"] :][:, :2]).view(np.float16)
    assert np.isinf(d).any()


@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
@pytest.mark.parametrize("importance", ["no importance", "random"])
def test_the_largest_float32_numbers_are_encoded_without_an_error(qtype, importance):
    weights = torch.tensor([3.4e38, -3.4e38, 1e30, 0.0]).repeat(2, 64)
    importance = make_importance(importance, 256)
    assert len(encode(weights, qtype, None if importance is None else torch.from_numpy(importance))) == 2


# Batches


@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", OWN_QTYPES, ids=by_name)
def test_batches_that_end_within_a_row_change_nothing(qtype, importance, monkeypatch):
    weights, importance = make_weights("normal", (2, 512)), make_importance(importance, 512)
    for n_weights in (1, 32 * 7, 256 * 3):
        monkeypatch.setattr(torch_encoder, "BATCH_WEIGHTS_CPU", n_weights)
        assert_same_blocks(weights, qtype, importance)


def test_row_mean_squares_are_summed_from_left_to_right_in_any_tiles(monkeypatch):
    weights = make_weights("heavy tails", (7, 96))
    expected = np.add.accumulate(weights * weights, axis=1, dtype=np.float32)[:, -1] / np.float32(96)
    for tile in ((2, 5), (7, 96), (100, 1000)):
        monkeypatch.setattr(torch_encoder, "TILE_ROWS", tile[0])
        monkeypatch.setattr(torch_encoder, "TILE_COLUMNS", tile[1])
        means = torch_encoder._row_mean_squares(torch.from_numpy(weights)).numpy()
        assert (means == expected).all()


@pytest.mark.parametrize("shape", [(1, 256), (3, 512)], ids=str)
@pytest.mark.parametrize("importance", ["no importance", "random"])
@pytest.mark.parametrize("qtype", OWN_QTYPES + K_QTYPES, ids=by_name)
def test_the_arguments_are_left_as_they_were(qtype, importance, shape):
    weights, importance = make_weights("normal", shape), make_importance(importance, shape[1])
    before = weights.copy(), None if importance is None else importance.copy()
    assert_same_blocks(weights, qtype, importance)
    assert (weights == before[0]).all()
    assert importance is None or (importance == before[1]).all()


# The front door


def test_encodable_qtypes_are_the_simple_ones_the_k_types_and_iq4():
    assert set(OWN_QTYPES + K_QTYPES) == ENCODABLE_QTYPES


@pytest.mark.parametrize("qtype", OWN_QTYPES + K_QTYPES, ids=by_name)
@pytest.mark.parametrize("shape", [(0, 512), (3, 0)], ids=str)
def test_an_empty_matrix_gives_no_blocks(qtype, shape):
    for importance in (None, torch.ones(shape[1])):
        encoded = encode(torch.empty(shape), qtype, importance)
        assert encoded.dtype == torch.uint8
        assert encoded.shape == (shape[0], shape[1] // 256 * gguf.quant_shape_to_byte_shape((256,), qtype)[0])


@pytest.mark.parametrize("qtype", [QType.Q8_0, QType.IQ4_XS, QType.Q4_K], ids=by_name)
def test_a_matrix_need_not_be_contiguous_nor_free_of_gradients(qtype):
    weights = torch.from_numpy(make_weights("normal", (256, 8))).t()
    encoded = encode(weights.requires_grad_(), qtype)
    assert (encoded.numpy() == make_files.quantize_with_ggml(weights.detach().numpy(), qtype)).all()


@pytest.mark.parametrize(
    ("weights", "qtype", "importance", "words"),
    [
        (torch.zeros(2, 32), QType.IQ2_S, None, "IQ2_S has no torch encoder.*Q8_0"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), QType.Q8_0, None, "bfloat16.*float32"),
        (torch.zeros(32), QType.Q8_0, None, r"\(32,\).*matrix"),
        (torch.zeros(2, 48), QType.Q8_0, None, "48.*multiple of 32"),
        (torch.zeros(2, 128), QType.IQ4_XS, None, "128.*multiple of 256"),
        (torch.full((2, 32), torch.inf), QType.Q8_0, None, "weights hold infinity or NaN"),
        (torch.full((2, 32), torch.nan), QType.Q8_0, None, "weights hold infinity or NaN"),
        (torch.zeros(2, 32), QType.Q4_0, torch.ones(31), r"importance.*\(31,\).*32 columns"),
        (torch.zeros(2, 32), QType.Q4_0, torch.ones(2, 32), r"importance.*\(2, 32\).*32 columns"),
        (torch.zeros(2, 32), QType.Q4_0, torch.ones(32).double(), "importance.*float64.*float32"),
        (torch.zeros(2, 32), QType.Q4_0, torch.ones(32, device="meta"), "importance is on meta, expected cpu"),
        (torch.zeros(2, 32), QType.Q4_0, -torch.ones(32), "importance holds negative"),
        (torch.zeros(2, 32), QType.Q4_0, torch.full((32,), torch.nan), "importance holds negative numbers.*NaN"),
        (torch.zeros(2, 32), QType.Q4_0, torch.full((32,), torch.inf), "importance holds negative numbers.*infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(weights, qtype, importance, words):
    with pytest.raises(ValueError, match=words):
        encode(weights, qtype, importance)
