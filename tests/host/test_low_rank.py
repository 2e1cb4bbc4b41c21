# SPDX-License-Identifier: Apache-2.0
"""Joined LoRAs are the sum of the LoRAs, in every type and on every part of a weight, beside a product or into it."""

import pytest
import tiny
import torch
from comfy.weight_adapter import LoRAAdapter
from gguf_kit.host.low_rank import (
    add_to_output,
    add_to_weight,
    join_pairs,
    n_bytes_joined,
    plain_pairs,
    prefers_side_path,
)

CPU = tiny.CPU
SHAPE = (96, 64)
EXACT = 1e-6


def patch(shape, seed, offset=None, rank=4, dtype=torch.float32, strength=0.5, alpha=8.0, trailing=()):
    up, down = (t.to(dtype).reshape(*t.shape, *trailing) for t in tiny.factors(shape, seed, rank, scale=0.5))
    return strength, LoRAAdapter(set(), (up, down, alpha, None, None, None)), 1.0, offset, None


# Two on the whole weight, one on each third of its rows as trainers split a fused one, two on the same columns.
PATCHES = (
    patch(SHAPE, 1),
    patch((32, 64), 2, (0, 0, 32), rank=2),
    patch((32, 64), 3, (0, 32, 32), rank=3, alpha=None),
    patch((32, 64), 4, (0, 64, 32), strength=-1.0),
    patch((96, 16), 5, (1, 8, 16)),
    patch((96, 16), 6, (1, 8, 16), rank=1),
    patch(SHAPE, 7, rank=8, trailing=(1, 1)),
)


def difference(patches, shape=SHAPE):
    """What the patches add to a weight, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for strength, adapter, _, offset, _ in patches:
        up, down, alpha, *_ = adapter.weights
        dim, start, length = offset or (0, 0, shape[0])
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        total.narrow(dim, start, length).add_(scale * up.double().flatten(1) @ down.double().flatten(1))
    return total


def joined(patches, dtype=torch.float32, shape=SHAPE):
    return join_pairs(plain_pairs(patches, shape), CPU, dtype)


def test_loras_of_one_target_become_one_pair():
    whole, columns = joined(PATCHES)
    assert [(part.rows, part.ranks) for part in whole.parts] == [
        (slice(0, 96), slice(0, 12)),
        (slice(0, 32), slice(12, 14)),
        (slice(32, 64), slice(14, 17)),
        (slice(64, 96), slice(17, 21)),
    ]
    assert whole.down.shape == (21, 64)
    assert columns.down.shape == (5, 16)
    assert columns.columns == slice(8, 24)
    assert sum(t.nbytes for f in (whole, columns) for t in (f.down, *(p.up for p in f.parts))) == n_bytes_joined(
        plain_pairs(PATCHES, SHAPE), torch.float32
    )


def test_both_ways_add_what_the_loras_are(inference_mode):
    factors, expected = joined(PATCHES), difference(PATCHES)
    assert tiny.relative(add_to_weight(torch.zeros(SHAPE), factors), expected) < EXACT
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    y = torch.ones(3, 5, 96)
    assert add_to_output(y, x, factors) is y
    assert tiny.relative(y, x.double() @ expected.T + 1) < EXACT


def test_a_weight_can_be_patched_in_slices_of_rows():
    factors, expected = joined(PATCHES), difference(PATCHES)
    for n_rows in (1, 20, 32, 95, 96):
        parts = [add_to_weight(torch.zeros(n, 64), factors, at) for at, n in _slices(n_rows)]
        assert tiny.relative(torch.cat(parts), expected) < EXACT


def _slices(n_rows):
    return [(start, min(n_rows, SHAPE[0] - start)) for start in range(0, SHAPE[0], n_rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_factors_come_in_every_type_that_loras_have(dtype):
    patches = [patch(SHAPE, 1, dtype=dtype), patch(SHAPE, 2, dtype=dtype), patch((32, 64), 3, (0, 32, 32), dtype=dtype)]
    assert tiny.relative(add_to_weight(torch.zeros(SHAPE), joined(patches)), difference(patches)) < EXACT


def test_strength_and_alpha_are_multiplied_in_before_the_rounding():
    up = torch.randn(96, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    adapter = LoRAAdapter(set(), (up, torch.ones(1, 64), 0.7, None, None, None))
    (factor,) = joined([(0.9, adapter, 1.0, None, None)], torch.bfloat16)
    assert torch.equal(factor.parts[0].up, (up.float() * (0.9 * 0.7)).bfloat16())
    assert not torch.equal(factor.parts[0].up, up * torch.tensor(0.9 * 0.7).bfloat16())


def test_a_lora_of_no_strength_costs_nothing():
    assert joined([patch(SHAPE, 1, strength=0.0)]) == ()


def test_activations_of_another_type_than_the_factors():
    """patch_dtype float32 under bfloat16: added in float32, rounded once."""
    factors, expected = joined(PATCHES), difference(PATCHES)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = add_to_output(torch.zeros(7, 96, dtype=torch.bfloat16), x, factors[:1])
    assert y.dtype == torch.bfloat16
    weight = add_to_weight(torch.zeros(SHAPE), factors[:1])
    assert torch.equal(y, (x.float() @ weight.T).bfloat16()) or tiny.relative(y, x.double() @ weight.double().T) < 3e-3
    assert add_to_weight(torch.zeros(SHAPE, dtype=torch.bfloat16), factors).dtype == torch.bfloat16
    assert tiny.relative(add_to_weight(torch.zeros(SHAPE, dtype=torch.float64), joined(PATCHES)), expected) < EXACT


@pytest.mark.parametrize(
    "changed",
    [
        lambda strength, adapter, model, offset, function: (strength, adapter, 0.5, offset, function),
        lambda strength, adapter, model, offset, function: (strength, adapter, model, offset, lambda a: a),
        lambda strength, adapter, model, offset, function: (strength, ("diff", (torch.ones(96, 64),)), 1.0, None, None),
        lambda strength, adapter, model, offset, function: (strength, adapter, model, (0, 0, 32), function),
    ],
    ids=["strength of the model", "a function", "a difference", "another shape"],
)
def test_all_else_is_left_to_the_host(changed):
    assert plain_pairs([PATCHES[0], changed(*PATCHES[0])], SHAPE) is None
    up, down, alpha, *_ = PATCHES[0][1].weights
    for weights in (
        (up, down, alpha, torch.ones(4, 4, 1, 1), None, None),
        (up, down, alpha, None, torch.ones(96), None),
        (up, down, alpha, None, None, [128, 64]),
        (up[:, :2], down, alpha, None, None, None),
    ):
        assert plain_pairs([(1.0, LoRAAdapter(set(), weights), 1.0, None, None)], SHAPE) is None
    assert plain_pairs([(1.0, PATCHES[0][1], 1.0, None, None)], (96, 64, 1)) is None


def test_the_side_path_serves_up_to_as_many_tokens_as_it_is_cheaper():
    """In and out 3,072: up to 1,536 tokens. A third of the rows of a fused weight is as a weight of its own."""
    for offset, shape in ((None, (3072, 3072)), ((0, 0, 3072), (9216, 3072))):
        factors = joined([patch((3072, 3072), 1, offset, rank=2)], shape=shape)
        assert [prefers_side_path(n, factors) for n in (1, 1536, 1537, 4096)] == [True, True, False, False]
    assert prefers_side_path(10**9, ())
