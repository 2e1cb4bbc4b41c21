# SPDX-License-Identifier: Apache-2.0
"""dequantize() gives gguf-py's float32 to the bit for every qtype, its cast for other dtypes, in every torch mode."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import layouts
from gguf_kit.dequant import BACKENDS, SUPPORTED_QTYPES, dequantize, dequantize_rows
from gguf_kit.errors import GGUFError, UnsupportedQtype
from gguf_kit.kernels import iq_grids, torch_reference
from gguf_kit.layouts import LAYOUTS
from quant_data import BLOCK_QTYPES, QTYPES, adversarial_blocks, assert_same_weights, random_blocks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
FLOAT_QTYPES = (QType.F32, QType.F16, QType.BF16)
COMPILED_QTYPES = [qtype for qtype in QTYPES if qtype.name in {"Q4_K", "IQ2_XS", "MXFP4", "F16"}]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_blocks(blocks, qtype, dtype=torch.float32, backend=None):
    shape = (len(blocks), LAYOUTS[qtype].block_size)
    return dequantize(torch.from_numpy(blocks), qtype, shape, dtype, backend=backend)


@by_qtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_blocks_equal_gguf_py(qtype, dtype):
    blocks = random_blocks(LAYOUTS[qtype], 777)
    assert_same_weights(dequantize_blocks(blocks, qtype, dtype), blocks, qtype)


@by_qtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_blocks_equal_gguf_py(qtype, dtype):
    for name, blocks in adversarial_blocks(LAYOUTS[qtype]).items():
        try:
            assert_same_weights(dequantize_blocks(blocks, qtype, dtype), blocks, qtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("qtype", [QType.F16, QType.BF16], ids=lambda qtype: qtype.name)
def test_every_16_bit_float_equals_gguf_py(qtype):
    blocks = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    assert_same_weights(dequantize_blocks(blocks, qtype), blocks, qtype)


def test_float32_keeps_every_bit_even_of_nan():
    bits = np.array([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x3F800000], "<u4")
    weights = dequantize(torch.from_numpy(bits.view(np.uint8)), QType.F32, bits.shape)
    np.testing.assert_array_equal(weights.numpy().view("<u4"), bits)


@by_qtype
@pytest.mark.parametrize("outer", [(1,), (5,), (3, 2), (2, 3, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("n_blocks", [1, 3, 0])
def test_all_shapes(qtype, outer, n_blocks):
    layout = LAYOUTS[qtype]
    shape = (*outer, n_blocks * layout.block_size)
    blocks = random_blocks(layout, int(np.prod(outer)) * n_blocks)
    data = torch.from_numpy(blocks)
    weights = dequantize(data, qtype, shape)
    assert weights.shape == shape
    if len(blocks):
        assert_same_weights(weights, blocks, qtype)
    rows = dequantize_rows(data.reshape(layouts.byte_shape(qtype, shape)), qtype)
    assert rows.shape == shape
    assert torch.equal(rows, weights) or rows.isnan().any()


@pytest.mark.parametrize("qtype", FLOAT_QTYPES, ids=lambda qtype: qtype.name)
def test_a_scalar_has_the_empty_shape(qtype):
    one = {QType.F32: [0, 0, 128, 63], QType.F16: [0, 60], QType.BF16: [128, 63]}[qtype]
    assert dequantize(torch.tensor(one, dtype=torch.uint8), qtype, ()).equal(torch.tensor(1.0))


@by_qtype
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_data_may_lie_at_any_address(qtype, shift):
    blocks = random_blocks(LAYOUTS[qtype], 3)
    buffer = np.zeros(blocks.size + shift + 64, np.uint8)
    start = -buffer.ctypes.data % 64 + shift
    buffer[start : start + blocks.size] = blocks.ravel()
    whole = torch.from_numpy(buffer)
    mapped = torch.from_numpy(buffer[start : start + blocks.size])
    for data in (whole[start : start + blocks.size], mapped):
        assert data.data_ptr() % 64 == shift
        assert_same_weights(dequantize(data, qtype, (3, LAYOUTS[qtype].block_size)), blocks, qtype)


@by_qtype
def test_data_with_gaps_between_rows_is_read_right(qtype):
    blocks = random_blocks(LAYOUTS[qtype], 4)
    wide = torch.from_numpy(np.concatenate([blocks, blocks], axis=1))
    data = wide[:, : blocks.shape[1]]
    assert_same_weights(dequantize(data, qtype, (4, LAYOUTS[qtype].block_size)), blocks, qtype)


@by_qtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_has_its_own_memory(qtype, dtype):
    blocks = random_blocks(LAYOUTS[qtype], 2)
    before = blocks.copy()
    dequantize_blocks(blocks, qtype, dtype).zero_()
    np.testing.assert_array_equal(blocks, before)
    assert_same_weights(dequantize_blocks(blocks, qtype), blocks, qtype)  # and no table was written to


@by_qtype
def test_a_tensor_of_several_chunks_equals_gguf_py(qtype, monkeypatch):
    monkeypatch.setattr(torch_reference, "CHUNK_WEIGHTS_CPU", 3 * LAYOUTS[qtype].block_size)
    blocks = random_blocks(LAYOUTS[qtype], 10)
    assert_same_weights(dequantize_blocks(blocks, qtype, torch.float16, "torch"), blocks, qtype)


class NoConstants(TorchDispatchMode):
    """Fails on any float64, on constants made in the forward, and on tensors from another device."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert inputs or func is torch.ops.aten.empty.memory_format, f"{func} makes a constant"
        assert func not in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default), f"{func}"
        for tensor in inputs + [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
            assert tensor.dtype != torch.float64, f"{func} in float64"
            assert tensor.device == self.device, f"{func} on {tensor.device}"
        return result


@by_qtype
@pytest.mark.parametrize(  # meta stands for a device that is not the CPU
    ("device", "backend"), [("cpu", "torch-cpu"), ("cpu", "torch"), ("meta", "torch")]
)
def test_no_float64_and_no_constants_are_made_once_the_tables_are_there(qtype, device, backend, monkeypatch):
    monkeypatch.setattr(torch_reference, "CHUNK_WEIGHTS_CPU", LAYOUTS[qtype].block_size)
    data = torch.from_numpy(random_blocks(LAYOUTS[qtype], 2)).to(device)
    shape = (2, LAYOUTS[qtype].block_size)
    dequantize(data, qtype, shape, torch.float16, backend=backend)
    with NoConstants(device):
        dequantize(data, qtype, shape, torch.float16, backend=backend)


def test_a_constant_made_in_the_forward_would_be_noticed():
    ones = torch.ones(2)
    with pytest.raises(AssertionError, match="lift_fresh"), NoConstants("cpu"):
        ones * torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError, match="makes a constant"), NoConstants("cpu"):
        ones * torch.arange(2)
    with pytest.raises(AssertionError, match="float64"), NoConstants("cpu"):
        ones.double()


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(iq_grids, "_tables", {})


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("qtype", [QType.IQ2_XS, QType.IQ4_NL], ids=lambda qtype: qtype.name)
def test_tables_made_in_inference_mode_serve_outside_of_it(qtype):
    blocks = random_blocks(LAYOUTS[qtype], 2)
    with torch.inference_mode():
        assert_same_weights(dequantize_blocks(blocks, qtype), blocks, qtype)
    assert not any(table.is_inference() for table in iq_grids._tables.values())
    weights = dequantize_blocks(blocks, qtype)
    assert_same_weights(weights, blocks, qtype)
    factor = torch.ones(weights.shape[1], requires_grad=True)
    (weights * factor).sum().backward()
    assert factor.grad is not None


@pytest.mark.usefixtures("no_tables")
def test_tables_are_shared_between_calls_and_qtypes():
    for qtype in (QType.IQ2_XS, QType.IQ2_XXS, QType.IQ2_XS):
        dequantize_blocks(random_blocks(LAYOUTS[qtype], 1), qtype, backend="torch")
    assert len(iq_grids._tables) == 3  # two grids and one table of signs


@pytest.mark.usefixtures("no_tables")
def test_fake_tensors_give_fake_weights_and_leave_no_fake_tables():
    with FakeTensorMode() as mode:
        data = mode.from_tensor(torch.zeros(2, LAYOUTS[QType.IQ2_XS].type_size, dtype=torch.uint8))
        weights = dequantize(data, QType.IQ2_XS, (2, 256), torch.bfloat16)
        table = iq_grids.device_table(layouts.IQ2XS_GRID, torch.device("cpu"))
    assert isinstance(weights, FakeTensor)
    assert (weights.shape, weights.dtype) == ((2, 256), torch.bfloat16)
    assert type(table) is torch.Tensor


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("qtype", COMPILED_QTYPES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("inference", [False, True], ids=["grad mode", "inference mode"])
def test_compiled_code_equals_gguf_py(qtype, inference):
    torch.compiler.reset()
    blocks = random_blocks(LAYOUTS[qtype], 3)
    shape = (3, LAYOUTS[qtype].block_size)

    def weights_twice(data):
        return dequantize(data, qtype, shape, torch.float16) * 2

    with torch.inference_mode(inference):
        compiled = torch.compile(weights_twice, fullgraph=True, backend="aot_eager")
        weights = compiled(torch.from_numpy(blocks))
    assert_same_weights(dequantize_blocks(blocks, qtype), blocks, qtype)
    torch.testing.assert_close(weights, dequantize_blocks(blocks, qtype, torch.float16) * 2, rtol=0, atol=0)


def test_compiled_code_takes_any_number_of_rows():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda rows: dequantize_rows(rows, QType.Q8_0), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (2, 3, 7):
        blocks = random_blocks(LAYOUTS[QType.Q8_0], n)
        assert_same_weights(compiled(torch.from_numpy(blocks)), blocks, QType.Q8_0)


def test_the_operator_keeps_its_promises_to_compilers():
    data = torch.from_numpy(random_blocks(LAYOUTS[QType.Q4_K], 2))
    torch.library.opcheck(torch.ops.gguf_kit.dequantize.default, (data, QType.Q4_K, (2, 256), torch.float16, ""))


def test_a_parameter_is_as_good_as_a_tensor():
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 2)
    data = torch.nn.Parameter(torch.from_numpy(blocks), requires_grad=False)
    weights = dequantize(data, QType.Q4_K, (2, 256))
    assert type(weights) is torch.Tensor
    assert_same_weights(weights, blocks, QType.Q4_K)


def test_an_unsupported_qtype_is_named_with_reason_and_choice():
    with pytest.raises(UnsupportedQtype, match=r"Q8_K has no dequantizer here \(holds activations.*Use one of: .*Q4_K"):
        dequantize(torch.zeros(292, dtype=torch.uint8), QType.Q8_K, (1, 256))


def test_a_wrong_number_of_bytes_is_reported_with_both_numbers():
    with pytest.raises(GGUFError, match=r"Q4_K data for shape \(2, 256\) has 287 bytes, expected 288"):
        dequantize(torch.zeros(287, dtype=torch.uint8), QType.Q4_K, (2, 256))


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="rows of 48 weights, expected a multiple of 32"):
        dequantize(torch.zeros(54, dtype=torch.uint8), QType.Q4_0, (2, 48))
    with pytest.raises(ValueError, match="rows of 17 bytes, expected a multiple of 18"):
        dequantize_rows(torch.zeros(2, 17, dtype=torch.uint8), QType.Q4_0)


def test_data_that_is_not_bytes_is_refused():
    with pytest.raises(GGUFError, match=r"F16 data has dtype torch\.float16, expected torch\.uint8"):
        dequantize(torch.zeros(4, dtype=torch.float16), QType.F16, (4,))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_that_is_there_equals_gguf_py(name):
    for qtype in QTYPES:
        layout = LAYOUTS[qtype]
        if not BACKENDS[name].unavailable(layout, torch.device("cpu")):
            blocks = random_blocks(layout, 33, seed=2)
            weights = dequantize(torch.from_numpy(blocks), qtype, (33, layout.block_size), backend=name)
            assert_same_weights(weights, blocks, qtype)


def test_a_mismatch_is_explained():
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 4)
    weights = dequantize_blocks(blocks, QType.Q4_K)
    weights[2, 7] += 1e6
    with pytest.raises(AssertionError, match=r"Q4_K: 25.00 % of 4 blocks differ\nworst is block 2, 1 of 256") as caught:
        assert_same_weights(weights, blocks, QType.Q4_K)
    assert all(
        word in str(caught.value) for word in ("dmin = [", "scales = [", "got ", "expected ", blocks[2].tobytes().hex())
    )


def test_supported_qtypes_are_the_layouts():
    assert SUPPORTED_QTYPES == set(LAYOUTS)
    assert len(BLOCK_QTYPES) == len(QTYPES) - len(FLOAT_QTYPES)
    assert QType.Q4_K in SUPPORTED_QTYPES
