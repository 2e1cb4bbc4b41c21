# SPDX-License-Identifier: Apache-2.0
"""Which backend dequantizes: the named one, else the fastest that is there and passes its self-test."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import dequant
from gguf_kit.dequant import BACKENDS, Backend, choose_backend, dequantize, dequantize_into
from gguf_kit.errors import GGUFError
from gguf_kit.kernels import self_test, torch_reference
from gguf_kit.layouts import LAYOUTS
from quant_data import QTYPES, assert_same_weights, random_blocks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

by_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
CPU = torch.device("cpu")


class Recorder:
    """A backend that works as `function` does and remembers what it was called with."""

    def __init__(self, function=torch_reference.dequantize):
        self.function = function
        self.calls = []

    def __call__(self, blocks, layout, out):
        self.calls.append((len(blocks), layout.qtype, out.dtype))
        out.copy_(self.function(blocks, layout, out.dtype))

    def backend(self, reason=""):
        return Backend(self, lambda layout, device: reason)


def dequantize_blocks(blocks, qtype, dtype=torch.float32):
    return dequantize(torch.from_numpy(blocks), qtype, (len(blocks), LAYOUTS[qtype].block_size), dtype)


@pytest.fixture
def use_backends(monkeypatch):
    """Puts backends before the reference, none of them tested yet."""

    def use(**backends):
        monkeypatch.setattr(dequant, "BACKENDS", {**backends, "torch": BACKENDS["torch"]})

    monkeypatch.setattr(dequant, "_faults", {})
    monkeypatch.setattr(dequant, "_warned", set())
    monkeypatch.delenv("GGUF_KIT_BACKEND", raising=False)
    return use


@pytest.fixture
def three_backends(use_backends):
    other = Recorder()
    use_backends(absent=Recorder().backend("no compiler found"), other=other.backend())
    return other


def test_backend_choice_is_argument_then_environment_then_the_fastest_that_is_there(three_backends, monkeypatch):
    layout = LAYOUTS[QType.Q8_0]
    assert choose_backend(layout, CPU) == "other"
    monkeypatch.setenv("GGUF_KIT_BACKEND", "torch")
    assert choose_backend(layout, CPU) == "torch"
    assert choose_backend(layout, CPU, "other") == "other"
    data = torch.zeros(34, dtype=torch.uint8)
    dequantize(data, QType.Q8_0, (32,))
    assert not three_backends.calls
    dequantize(data, QType.Q8_0, (32,), backend="other")
    assert three_backends.calls[-1] == (1, QType.Q8_0, torch.float32)


@pytest.mark.usefixtures("three_backends")
def test_a_backend_that_is_named_but_unknown_or_absent_is_an_error(monkeypatch):
    data = torch.zeros(34, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"backend is 'cuda', which is no backend. Use one of: absent, other, torch"):
        dequantize(data, QType.Q8_0, (32,), backend="cuda")
    with pytest.raises(ValueError, match="backend is 'absent', which cannot take Q8_0 on cpu: no compiler found"):
        dequantize(data, QType.Q8_0, (32,), backend="absent")
    monkeypatch.setenv("GGUF_KIT_BACKEND", "tritn")
    with pytest.raises(ValueError, match="GGUF_KIT_BACKEND is 'tritn'"):
        dequantize(data, QType.Q8_0, (32,))


def off_by_one_ulp(blocks, layout, dtype):
    weights = torch_reference.dequantize(blocks, layout, dtype)
    weights.view(torch.int16)[0, 0] ^= 1
    return weights


def raise_an_error(blocks, layout, dtype):
    raise RuntimeError("ptxas died\nand said much more")


class CompilerError(Exception):
    pass


def raise_a_compiler_error(blocks, layout, dtype):
    raise CompilerError("no such instruction")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (off_by_one_ulp, "1 of 33536 weights differ from the reference's"),
        (raise_an_error, "RuntimeError: ptxas died."),
        (raise_a_compiler_error, "CompilerError: no such instruction"),
    ],
    ids=["wrong numbers", "an error", "an error of its own kind"],
)
def test_a_backend_that_is_wrong_is_off_with_one_warning(function, reason, use_backends, caplog):
    wrong = Recorder(function)
    use_backends(fast=Backend(wrong, lambda layout, device: "", lambda: (CompilerError,)))
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 2)
    for _ in range(3):
        assert_same_weights(dequantize_blocks(blocks, QType.Q4_K, torch.float16), blocks, QType.Q4_K)
    assert len(wrong.calls) == 1
    [record] = caplog.records
    assert (record.name, record.levelname) == ("gguf_kit", "WARNING")
    assert f"Backend 'fast' is not used for Q4_K to torch.float16 on cpu: {reason}" in record.message
    assert "GGUF_KIT_BACKEND=torch" in record.message


def test_a_backend_that_writes_nothing_is_wrong(use_backends, caplog):
    use_backends(idle=Backend(lambda blocks, layout, out: None, lambda layout, device: ""))
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 2)
    assert_same_weights(dequantize_blocks(blocks, QType.Q4_K), blocks, QType.Q4_K)
    assert "33536 of 33536 weights differ" in caplog.text


def test_a_wrong_backend_is_off_for_nothing_but_what_it_is_wrong_for(use_backends):
    def wrong_for_q4_k(blocks, layout, dtype):
        return (off_by_one_ulp if layout.qtype == QType.Q4_K else torch_reference.dequantize)(blocks, layout, dtype)

    recorder = Recorder(wrong_for_q4_k)
    use_backends(fast=recorder.backend())
    for qtype in (QType.Q4_K, QType.Q6_K, QType.Q6_K):
        dequantize_blocks(random_blocks(LAYOUTS[qtype], 2), qtype)
    assert [(n, qtype) for n, qtype, _ in recorder.calls] == [
        (131, QType.Q4_K),
        (131, QType.Q6_K),
        (2, QType.Q6_K),
        (2, QType.Q6_K),
    ]


def test_the_next_backend_is_tested_in_turn(use_backends):
    good = Recorder()
    use_backends(fast=Recorder(raise_an_error).backend(), slower=good.backend())
    dequantize_blocks(random_blocks(LAYOUTS[QType.Q4_K], 2), QType.Q4_K)
    assert [n for n, _, _ in good.calls] == [131, 2]


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_a_named_backend_that_is_wrong_is_an_error(named_by, use_backends, monkeypatch, caplog):
    use_backends(fast=Recorder(off_by_one_ulp).backend())
    data = torch.zeros(144, dtype=torch.uint8)
    if named_by == "environment":
        monkeypatch.setenv("GGUF_KIT_BACKEND", "fast")
    name = "fast" if named_by == "argument" else None
    with pytest.raises(
        GGUFError, match=r"'fast' is wrong for Q4_K to torch.float32 on cpu: 1 of .*another of: fast, to"
    ):
        dequantize(data, QType.Q4_K, (256,), backend=name)
    assert not caplog.records


def test_a_lack_of_memory_says_nothing_of_the_backend(use_backends):
    def lack_memory(blocks, layout, dtype):
        raise torch.cuda.OutOfMemoryError("no room")

    use_backends(fast=Recorder(lack_memory).backend())
    with pytest.raises(torch.cuda.OutOfMemoryError):
        dequantize(torch.zeros(144, dtype=torch.uint8), QType.Q4_K, (256,))
    assert not dequant._faults


def test_the_self_test_is_free_of_the_callers_modes(use_backends):
    seen = []

    def look_around(blocks, layout, dtype):
        seen.append(torch.is_inference_mode_enabled() or type(blocks) is not torch.Tensor)
        return torch_reference.dequantize(blocks, layout, dtype)

    use_backends(fast=Recorder(look_around).backend())
    with torch.inference_mode():
        dequantize(torch.zeros(144, dtype=torch.uint8), QType.Q4_K, (256,))
    assert seen == [False, True]  # the test, then the call


def test_fake_tensors_test_no_backend(use_backends):
    recorder = Recorder()
    use_backends(fast=recorder.backend())
    with FakeTensorMode() as mode:
        data = mode.from_tensor(torch.zeros(144, dtype=torch.uint8))
        assert isinstance(dequantize(data, QType.Q4_K, (256,)), FakeTensor)
    dequantize(torch.zeros(144, dtype=torch.uint8, device="meta"), QType.Q4_K, (256,))
    assert not recorder.calls


def test_an_untested_backend_waits_for_the_end_of_a_capture(use_backends, monkeypatch, caplog):
    recorder = Recorder()
    use_backends(fast=recorder.backend())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    blocks = FakeCudaBlocks(torch.zeros(1, 144, dtype=torch.uint8))
    layout = LAYOUTS[QType.Q4_K]
    assert dequant._choose_tested(blocks, layout, torch.float16, None) == "torch"
    with pytest.raises(GGUFError, match=r"cannot be tested .* while a CUDA graph is captured"):
        dequant._choose_tested(blocks, layout, torch.float16, "fast")
    assert not recorder.calls
    assert not dequant._faults
    assert not caplog.records


class FakeCudaBlocks:
    """Blocks that say they are on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, blocks):
        self.data_ptr = blocks.data_ptr


def test_threads_that_come_at_once_test_a_backend_once(use_backends):
    recorder = Recorder()
    use_backends(fast=recorder.backend())
    data = torch.zeros(144, dtype=torch.uint8)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: dequantize(data, QType.Q4_K, (256,)), range(16)))
    assert sorted(n for n, _, _ in recorder.calls) == [1] * 16 + [131]


@by_qtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_that_is_there_is_filled_as_new_memory_is(qtype, dtype):
    blocks = torch.from_numpy(random_blocks(LAYOUTS[qtype], 6))
    shape = (2, 3 * LAYOUTS[qtype].block_size)
    out = torch.full((4, shape[1]), 7.0, dtype=dtype)
    dequantize_into(blocks, qtype, out[1:3])
    assert torch.equal(out[1:3], dequantize(blocks, qtype, shape, dtype))
    assert out[0].eq(7).all()
    assert out[3].eq(7).all()


@pytest.mark.parametrize(
    "out",
    [torch.zeros(2, 64)[:, :32], torch.zeros(2, 32, device="meta"), torch.zeros(2, 32, requires_grad=True)],
    ids=["gaps", "another device", "gradients"],
)
def test_memory_that_cannot_be_written_is_refused(out):
    with pytest.raises(GGUFError, match=r"out is on .* expected contiguous memory on cpu without gradients"):
        dequantize_into(torch.zeros(68, dtype=torch.uint8), QType.Q8_0, out)


@pytest.mark.parametrize("name", ["llvm", "torch-cpu", "torch"])
def test_autograd_sees_that_memory_was_overwritten(name):
    out, factor = torch.ones(2, 32), torch.ones(1, requires_grad=True)
    product = (out * factor).sum()
    dequantize_into(torch.zeros(68, dtype=torch.uint8), QType.Q8_0, out, backend=name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


BLOCKS = torch.from_numpy(random_blocks(LAYOUTS[QType.Q4_K], 600))  # more than the reference takes from torch-cpu
RIGHT = torch_reference.dequantize(BLOCKS, LAYOUTS[QType.Q4_K], torch.float32)


def weights_of(data, name):
    return dequantize(data, QType.Q4_K, (600, 256), backend=name)


@pytest.mark.parametrize("name", ["llvm", "torch-cpu", "torch"])
def test_whoever_follows_the_call_gets_an_operator_that_it_knows(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(weights_of(BLOCKS, name), FakeTensor)
    graph = make_fx(lambda data: weights_of(data, name) * 2)(BLOCKS)
    assert torch.equal(graph(BLOCKS), RIGHT * 2)
    gradient = torch.func.grad(lambda x: (weights_of(BLOCKS, name).nan_to_num(0) * x).sum())(torch.ones(1))
    torch.testing.assert_close(gradient, RIGHT.nan_to_num(0).sum().view(1), rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("name", ["llvm", "torch-cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_defaults_of_the_process_change_nothing(name, dtype):
    blocks = BLOCKS.repeat(8, 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            weights = dequantize(blocks, QType.Q4_K, (4800, 256), dtype, backend=name)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(weights, RIGHT.repeat(8, 1).to(dtype))


def test_a_lack_of_memory_on_a_cpu_turns_nothing_off(use_backends):
    def lack_memory(blocks, layout, dtype):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")

    use_backends(fast=Recorder(lack_memory).backend())
    with pytest.raises(RuntimeError, match="can't allocate"):
        dequantize(torch.zeros(144, dtype=torch.uint8), QType.Q4_K, (256,))
    assert not dequant._faults


@by_qtype
def test_the_sample_has_finite_scales_and_most_codes(qtype):
    layout = LAYOUTS[qtype]
    blocks = self_test.sample_blocks(layout)
    assert blocks.shape == (131, layout.type_size)
    weights = torch_reference.dequantize_blocks(blocks, layout)
    assert float(weights.isfinite().float().mean()) > 0.8
    for code in layout.codes().values():
        if code.bits <= 8 and layout.n_codes(code) > 4:
            codes = torch_reference.unpack_codes(blocks, layout, code)
            assert len(codes.unique()) >= min(1 << code.bits, 3 if code.parts[0][0].base == 3 else 256) * 0.9
