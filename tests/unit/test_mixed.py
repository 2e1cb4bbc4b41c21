# SPDX-License-Identifier: Apache-2.0
"""Rows put together of the blocks of several encodings, and less error than any of them."""

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QType
from gguf_kit.dequant import dequantize
from gguf_kit.quantize.encode import TorchEngine, encode_rows
from gguf_kit.quantize.mixed import ENCODINGS, choose_blocks, encode_mixed
from gguf_kit.quantize.weight_samples import Inputs

ENGINE = TorchEngine()


def correlated_inputs(n, n_columns, seed=0):
    """Inputs (n, n_columns) whose columns move together and are of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, n_columns, generator=torch.Generator().manual_seed(99))
    size = torch.logspace(-1, 1, n_columns)[torch.randperm(n_columns, generator=torch.Generator().manual_seed(98))]
    return (torch.randn(n, 24, generator=generator) @ mixing + 0.3) * size


def knowledge(x):
    return Inputs(x.square().mean(0), x)


def weights(n_rows, n_columns):
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(5))


def encode_all(w, qtype, inputs):
    """The whole of the rows in each of the encodings."""
    return [encode_rows(ENGINE, w, qtype, one.importance(inputs.mean_squares), "w") for one in ENCODINGS]


def output_error(data, qtype, w, x):
    wrong = dequantize(data, qtype, tuple(w.shape)) - w
    return float((x.double() @ wrong.double().T).square().sum(1).mean())


@pytest.mark.parametrize(("qtype", "n_columns"), [(QType.Q2_K, 1024), (QType.Q4_K, 512), (QType.Q4_0, 96)])
def test_every_block_is_that_of_one_encoding(qtype, n_columns):
    w, x = weights(6, n_columns), correlated_inputs(32, n_columns)
    inputs = knowledge(x)
    whole = encode_all(w, qtype, inputs)
    split = torch.stack(whole).reshape(len(ENCODINGS), 6 * n_columns // GGML_QUANT_SIZES[qtype][0], -1)
    mixed = encode_mixed(ENGINE, w, qtype, inputs, "w").reshape(split.shape[1:])
    assert (mixed == split).all(-1).any(0).all()
    assert not any(torch.equal(mixed, one) for one in split)


@pytest.mark.parametrize("qtype", [QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q4_0])
def test_on_other_inputs_it_is_better_than_each_alone(qtype):
    w, others = weights(64, 1024), correlated_inputs(512, 1024, seed=1)
    inputs = knowledge(correlated_inputs(64, 1024))
    alone = [output_error(data, qtype, w, others) for data in encode_all(w, qtype, inputs)]
    assert output_error(encode_mixed(ENGINE, w, qtype, inputs, "w"), qtype, w, others) < 0.9 * min(alone)


def test_the_best_of_all_mixtures_is_found_in_a_small_case():
    generator = torch.Generator().manual_seed(3)
    errors, x = torch.randn(2, 5, 24, generator=generator), torch.randn(400, 24, generator=generator)
    picks = choose_blocks(errors, knowledge(x), 8)
    assert picks.shape == (5, 3)
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)  # (8, 3)
    split = errors.reshape(2, 5, 3, 8)

    def error(row, pick):
        wrong = torch.cat([split[pick[i], row, i] for i in range(3)])
        return float((x @ wrong).square().mean())

    for row in range(5):
        best = min(error(row, pick) for pick in every)
        assert error(row, picks[row]) <= 1.05 * best


def test_without_recorded_rows_there_is_nothing_to_choose_by():
    with pytest.raises(ValueError, match="no recorded rows"):
        choose_blocks(torch.zeros(2, 1, 256), Inputs(torch.ones(256)), 256)
