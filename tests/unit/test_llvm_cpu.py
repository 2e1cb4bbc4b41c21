# SPDX-License-Identifier: Apache-2.0
"""The machine code that llvm_cpu makes gives gguf-py's float32 to the bit, and its cast for other dtypes."""

import importlib.metadata
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels import llvm_cpu, llvm_ir, torch_reference
from gguf_kit.layouts import LAYOUTS
from quant_data import BLOCK_QTYPES, adversarial_blocks, assert_same_weights, dequantize_with, random_blocks

by_qtype = pytest.mark.parametrize("qtype", BLOCK_QTYPES, ids=lambda qtype: qtype.name)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CPU = torch.device("cpu")


def dequantize_blocks(blocks, qtype, dtype=torch.float32):
    return dequantize_with(llvm_cpu, torch.as_tensor(blocks), LAYOUTS[qtype], dtype)


@by_qtype
def test_every_block_type_can_be_taken_here(qtype):
    assert llvm_cpu.unavailable(LAYOUTS[qtype], CPU) == ""


@by_qtype
@by_dtype
def test_random_and_adversarial_blocks_equal_gguf_py(qtype, dtype):
    sets = {"random": random_blocks(LAYOUTS[qtype], 1001), **adversarial_blocks(LAYOUTS[qtype])}
    for name, blocks in sets.items():
        try:
            assert_same_weights(dequantize_blocks(blocks, qtype, dtype), blocks, qtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@by_dtype
def test_overflow_and_nan_are_rounded_as_torch_rounds_them(dtype):
    """Scales beyond what a finite file has: infinities and NaNs, whose sum and product are NaN too."""
    layout = LAYOUTS[QType.Q4_1]
    blocks = random_blocks(layout, 1 << 16)
    blocks[:, :2] = np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8)
    expected = torch_reference.dequantize(torch.from_numpy(blocks), layout, dtype)
    found = dequantize_blocks(blocks, QType.Q4_1, dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(3), expected.nan_to_num(3))


@by_qtype
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [1, 3, 2051])
def test_any_number_of_blocks_on_any_number_of_threads(qtype, n_threads, n_blocks, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(llvm_cpu, "THREAD_WEIGHTS", 64)
    blocks = random_blocks(LAYOUTS[qtype], n_blocks, seed=3)
    assert_same_weights(dequantize_blocks(blocks, qtype), blocks, qtype)


def test_no_blocks_are_no_weights():
    assert dequantize_blocks(torch.empty(0, 144, dtype=torch.uint8), QType.Q4_K).shape == (0, 256)


@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_data_and_result_may_lie_at_any_address(shift):
    layout = LAYOUTS[QType.Q6_K]
    blocks = torch.from_numpy(random_blocks(layout, 21))
    shifted = torch.zeros(blocks.numel() + shift, dtype=torch.uint8)[shift:].view_as(blocks).copy_(blocks)
    out = torch.full((21 * 256 + shift,), 7.0)
    llvm_cpu.dequantize_into(shifted, layout, out[shift:].view(21, 256))
    assert_same_weights(out[shift:].view(21, 256), blocks.numpy(), QType.Q6_K)
    assert out[:shift].eq(7).all()


def test_nothing_is_written_beyond_the_result():
    layout = LAYOUTS[QType.Q8_0]
    out = torch.full((5, 32), 7.0)
    llvm_cpu.dequantize_into(torch.from_numpy(random_blocks(layout, 3)), layout, out[1:4])
    assert out[0].eq(7).all()
    assert out[4].eq(7).all()
    assert not out[1:4].eq(7).all()


def test_blocks_with_gaps_between_them_are_read_right():
    layout = LAYOUTS[QType.Q5_0]
    blocks = random_blocks(layout, 9)
    wide = torch.zeros(9, layout.type_size + 5, dtype=torch.uint8)
    wide[:, : layout.type_size] = torch.from_numpy(blocks)
    assert_same_weights(dequantize_blocks(wide[:, : layout.type_size], QType.Q5_0), blocks, QType.Q5_0)


def test_a_large_result_has_its_own_memory_and_every_weight():
    layout = LAYOUTS[QType.Q4_K]
    blocks = random_blocks(layout, 1 << 13, seed=5)
    first, second = dequantize_blocks(blocks, QType.Q4_K), dequantize_blocks(blocks, QType.Q4_K)
    assert_same_weights(first, blocks, QType.Q4_K)
    first.zero_()
    assert_same_weights(second, blocks, QType.Q4_K)


def test_other_dtypes_are_rounded_from_float32():
    blocks = random_blocks(LAYOUTS[QType.Q4_0], 7)
    assert torch.equal(
        dequantize_blocks(blocks, QType.Q4_0, torch.float64), dequantize_blocks(blocks, QType.Q4_0).double()
    )


def test_several_callers_at_once_get_their_own_results(monkeypatch):
    monkeypatch.setattr(llvm_cpu, "THREAD_WEIGHTS", 64)
    monkeypatch.setattr(llvm_cpu, "_kernels", {})  # compiled by whoever comes first
    sets = [random_blocks(LAYOUTS[qtype], 999, seed) for seed, qtype in enumerate(BLOCK_QTYPES * 2)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(dequantize_blocks, sets, BLOCK_QTYPES * 2))
    for blocks, qtype, weights in zip(sets, BLOCK_QTYPES * 2, results, strict=True):
        assert_same_weights(weights, blocks, qtype)


@by_qtype
@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_kernels_for_other_processors_are_valid(qtype, machine):
    """They cannot run here: LLVM accepts them, and one without a table look-up in a register computes the same."""
    binding = llvm_cpu._target().binding
    for output in llvm_ir.OUTPUT_SIZES:
        text = llvm_ir.kernel_text(LAYOUTS[qtype], output, machine)
        binding.parse_assembly(text).verify()
        assert "x86" not in text


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "NVFP4"])
def test_without_a_table_look_up_in_a_register_the_result_is_the_same(name, monkeypatch):
    monkeypatch.setattr(llvm_cpu, "_kernels", {})
    monkeypatch.setattr(llvm_ir, "_BYTE_SHUFFLES", {})
    blocks = random_blocks(LAYOUTS[QType[name]], 100)
    assert_same_weights(dequantize_blocks(blocks, QType[name]), blocks, QType[name])


def test_the_text_has_no_offset_beyond_the_block():
    for layout in (LAYOUTS[qtype] for qtype in BLOCK_QTYPES):
        text = llvm_ir.kernel_text(layout, "f32", "x86_64")
        names = dict(re.findall(r"(%v\d+) = getelementptr i8, ptr %block, i64 (\d+)", text))
        sizes = {"i8": 1, "i16": 2, "i32": 4, "half": 2}
        for n, element, address in re.findall(r"load <(\d+) x (\w+)>, ptr (%v\d+)", text):
            if address in names:
                assert int(names[address]) + int(n) * sizes[element] <= layout.type_size


def test_what_cannot_be_taken_says_why():
    assert llvm_cpu.unavailable(LAYOUTS[QType.Q4_0], torch.device("meta")) == "it computes on a CPU"


def test_without_llvmlite_the_reason_is_that(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(llvm_cpu.importlib.metadata, "version", not_found)
    assert llvm_cpu._machine_lacks.__wrapped__() == "llvmlite is not installed"


def test_an_old_llvmlite_is_not_tried(monkeypatch):
    monkeypatch.setattr(llvm_cpu.importlib.metadata, "version", lambda name: "0.43.0")
    assert llvm_cpu._machine_lacks.__wrapped__() == "llvmlite is 0.43.0, and 0.45 is needed"


def test_a_broken_llvmlite_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    monkeypatch.setattr(llvm_cpu, "_target", llvm_cpu._make_target.__wrapped__)
    assert llvm_cpu._machine_lacks.__wrapped__().startswith("llvmlite cannot be used: ")


@pytest.mark.parametrize("triple", ["x86_64-unknown-linux-gnu", "riscv64-unknown-linux-gnu"])
def test_a_processor_without_float16_instructions_is_not_taken(triple, monkeypatch):
    class FewFeatures(dict):
        def flatten(self):
            return ""

    binding = llvm_cpu._target().binding
    monkeypatch.setattr(binding, "get_host_cpu_features", FewFeatures)
    monkeypatch.setattr(binding, "get_default_triple", lambda: triple)
    monkeypatch.setattr(llvm_cpu, "_target", llvm_cpu._make_target.__wrapped__)
    assert (
        llvm_cpu._machine_lacks.__wrapped__() == f"this CPU ({triple[:7].rstrip('-')}) has no instructions for float16"
    )


def test_a_system_that_forbids_machine_code_is_a_reason(monkeypatch):
    def forbid():
        raise OSError("cannot allocate executable memory")

    monkeypatch.setattr(llvm_cpu._target().binding, "check_jit_execution", forbid)
    monkeypatch.setattr(llvm_cpu, "_target", llvm_cpu._make_target.__wrapped__)
    assert llvm_cpu._machine_lacks.__wrapped__() == "llvmlite cannot be used: cannot allocate executable memory"


@pytest.mark.parametrize("version", ["0+unknown", "0.46rc1", None])
def test_a_version_that_cannot_be_read_is_a_reason(version, monkeypatch):
    monkeypatch.setattr(llvm_cpu.importlib.metadata, "version", lambda name: version)
    assert llvm_cpu._machine_lacks.__wrapped__().startswith("llvmlite cannot be used: ")


FIRST_USE = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import _pack, torch
from gguf_kit.kernels import llvm_cpu
from gguf_kit.layouts import LAYOUTS
from gguf import GGMLQuantizationType as Q
made = []
make = llvm_cpu._make_target
llvm_cpu._make_target = lambda: made.append(make()) or made[-1]
start = threading.Barrier(6)
def run():
    start.wait()
    for qtype in (Q.Q4_K, Q.Q8_0, Q.IQ2_S):
        layout = LAYOUTS[qtype]
        assert not llvm_cpu.unavailable(layout, torch.device("cpu"))
        out = torch.empty(64, layout.block_size)
        llvm_cpu.dequantize_into(torch.zeros(64, layout.type_size, dtype=torch.uint8), layout, out)
threads = [threading.Thread(target=run) for _ in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len({id(target.engine) for target in made}) == 1
"""


def test_threads_that_come_first_share_one_engine():
    tools = Path(llvm_cpu.__file__).parent.parent / "tools"
    subprocess.run([sys.executable, "-c", FIRST_USE, str(tools)], check=True, timeout=120)


def test_what_threads_cannot_take_is_done_here(monkeypatch):
    """As while the process ends, when no thread can be started."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(llvm_cpu, "MAX_THREADS", 3)
    monkeypatch.setattr(llvm_cpu, "THREAD_WEIGHTS", 64)
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(llvm_cpu, "_pool", lambda process: pool)
    blocks = random_blocks(LAYOUTS[QType.Q4_K], 50)
    assert_same_weights(dequantize_blocks(blocks, QType.Q4_K), blocks, QType.Q4_K)
