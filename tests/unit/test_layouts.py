# SPDX-License-Identifier: Apache-2.0
"""The rows of layouts.LAYOUTS are complete, consistent and immutable; shapes turn into bytes by gguf's arithmetic."""

import dataclasses

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QType
from gguf_kit import layouts
from gguf_kit.kernels.torch_reference import unpack_codes
from gguf_kit.layouts import LAYOUTS, NOT_SUPPORTED, Code, Field, Layout, Plane
from quant_data import QTYPES, f16_sources, write_codes, write_f16

by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)


def test_every_qtype_of_gguf_has_a_layout_or_a_reason_why_not():
    assert set(QType) == set(LAYOUTS) | set(NOT_SUPPORTED)
    assert not set(LAYOUTS) & set(NOT_SUPPORTED)
    assert all(NOT_SUPPORTED.values())


def test_the_layouts_are_those_that_gguf_py_can_dequantize():
    assert set(LAYOUTS) == {QType.F32, QType.F16, *gguf.quants._type_traits}


@by_qtype
def test_fields_follow_each_other_and_fill_the_block(qtype):
    layout = LAYOUTS[qtype]
    ends = np.cumsum([member.n_bytes for member in layout.fields]).tolist()
    assert list(layout.offsets.values()) == [0, *ends[:-1]]
    assert (layout.block_size, layout.type_size) == GGML_QUANT_SIZES[qtype]
    assert ends[-1] == layout.type_size


@by_qtype
def test_every_bit_of_a_block_means_one_thing(qtype):
    layout = LAYOUTS[qtype]
    claims = []
    for source in f16_sources(layout):
        claims.append(np.zeros((1, layout.type_size), np.uint8))
        write_f16(claims[-1], layout, source, np.array([0xFFFF], np.uint16))
    for code in layout.codes().values():
        claims.append(np.zeros((1, layout.type_size), np.uint8))
        if any(plane.base == 3 for plane in code.planes()):  # ternary digits own their bytes
            for plane in code.planes():
                words = np.arange(layout.field_named(plane.field).n_bytes)[layout.word_slice(plane)]
                assert not claims[-1][:, layout.offsets[plane.field] + words].any()
                claims[-1][:, layout.offsets[plane.field] + words] = 0xFF
        elif not code.as_f16:
            write_codes(claims[-1], layout, code, np.full((1, layout.n_codes(code)), (1 << code.bits) - 1))
    if layout.quants is None and not f16_sources(layout):
        claims.append(np.full((1, layout.type_size), 0xFF, np.uint8))
    n_claims = sum(np.unpackbits(claim, axis=1).astype(int) for claim in claims)
    assert (n_claims == 1).all(), [member.name for member in layout.fields]


@by_qtype
def test_codes_are_read_where_they_were_written(qtype):
    layout = LAYOUTS[qtype]
    rng = np.random.default_rng(1)
    for code in layout.codes().values():
        if any(plane.base == 3 for plane in code.planes()):
            continue
        values = rng.integers(0, 1 << code.bits, (7, layout.n_codes(code)))
        blocks = rng.integers(0, 256, (7, layout.type_size), dtype=np.uint8)
        codes = unpack_codes(torch.from_numpy(write_codes(blocks, layout, code, values)), layout, code)
        np.testing.assert_array_equal(codes.numpy().astype(np.int64) & ((1 << code.bits) - 1), values)


@by_qtype
def test_every_row_has_a_formula(qtype):
    assert LAYOUTS[qtype].formula.startswith("w = ")


def test_nothing_in_the_table_can_be_changed():
    with pytest.raises(TypeError):
        LAYOUTS[QType.Q4_0] = LAYOUTS[QType.Q8_0]
    with pytest.raises(TypeError):
        NOT_SUPPORTED[QType.Q4_0] = "no"
    with pytest.raises(TypeError):
        LAYOUTS[QType.Q4_0].offsets["d"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYOUTS[QType.Q4_0].d = "m"
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYOUTS[QType.Q4_0].fields[0].count = 2


@pytest.mark.parametrize(
    ("fields", "quants", "message"),
    [
        ([Field("d", "f16"), Field("qs", "u8", 15)], None, r"Q4_0: fields \['d', 'qs'\] have 17 bytes, expected 18"),
        ([Field("d", "f16"), Field("d", "u8", 16)], None, "expected 18"),
        ([Field("d", "f16"), Field("qs", "u8", 16)], Plane("qs", 4, (0, 5)), "quants takes bits of qs beyond 8"),
        ([Field("d", "f16"), Field("qs", "u8", 16)], Plane("qs", 4), "16 quants for a block of 32 weights"),
        ([Field("d", "f16"), Field("qs", "u8", 16)], Plane("qs", 4, (0, 4), run=3), "planes of"),
    ],
    ids=["too few bytes", "a name twice", "bits beyond the word", "too few quants", "runs that do not fit"],
)
def test_a_row_that_contradicts_itself_is_refused(fields, quants, message):
    with pytest.raises(ValueError, match=message):
        Layout(QType.Q4_0, "w = d", tuple(fields), quants=quants and Code(((quants,),)))


def test_planes_of_one_code_must_agree_on_their_number():
    planes = (Plane("qs", 4, (0, 4), run=16), Plane("d", 1))
    with pytest.raises(ValueError, match="planes of"):
        Layout(QType.Q4_0, "w = d", (Field("d", "f16"), Field("qs", "u8", 16)), quants=Code((planes,)))


@pytest.mark.parametrize(
    ("qtype", "shape", "byte_shape"),
    [
        (QType.Q4_0, (5, 64), (5, 36)),
        (QType.Q4_K, (3, 2, 512), (3, 2, 288)),
        (QType.F16, (4, 3, 2, 2), (4, 3, 2, 4)),
        (QType.F32, (), (4,)),
        (QType.Q6_K, (0, 256), (0, 210)),
        (QType.Q8_0, (3, 0), (3, 0)),
        (QType.I32, (7,), (28,)),
    ],
    ids=lambda value: value.name if isinstance(value, QType) else str(value),
)
def test_shapes_turn_into_bytes_and_back(qtype, shape, byte_shape):
    assert layouts.byte_shape(qtype, shape) == byte_shape
    assert layouts.n_bytes(qtype, shape) == np.prod(byte_shape)
    assert layouts.weight_shape(qtype, byte_shape) == (shape or (1,))


def test_rows_that_are_not_whole_blocks_are_reported_with_both_numbers():
    with pytest.raises(ValueError, match=r"Q4_K of shape \(2, 300\): rows of 300 weights, expected a multiple of 256"):
        layouts.byte_shape(QType.Q4_K, (2, 300))
    with pytest.raises(ValueError, match=r"Q4_K bytes of shape \(2, 145\): rows of 145 bytes, .* multiple of 144"):
        layouts.weight_shape(QType.Q4_K, (2, 145))
    with pytest.raises(ValueError, match=r"Q4_0 of shape \(\): rows of 1 weights"):
        layouts.n_bytes(QType.Q4_0, ())


def test_bits_per_weight():
    assert layouts.bpw(QType.Q4_K) == 4.5
    assert layouts.bpw(QType.BF16) == 16
