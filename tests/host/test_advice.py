# SPDX-License-Identifier: Apache-2.0
"""What the log says once per process of what would make models faster on this CPU."""

import comfy.model_management
import pytest
import tiny
import torch
from gguf_kit.dequant import Backend
from gguf_kit.host import advice

GPU = torch.device("cuda", 0)
OFFER = (
    "This CPU multiplies bfloat16 natively, 3.1 times as fast as float32 here: "
    "choose compute_dtype bfloat16 in Unet Loader (GGUF/Advanced)."
)


def set_llvm(monkeypatch, reason):
    """The backend of the extra cannot take anything for this reason; the list grows with each question."""
    asked = []
    backend = Backend(None, lambda layout, device: asked.append(device) or reason)
    monkeypatch.setattr(advice, "BACKENDS", {"llvm": backend})
    return asked


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch, caplog):
    """A process that has said nothing, with the extra's backend, the extra, and no native bfloat16."""
    caplog.set_level("INFO", logger="gguf_kit")
    advice._advise_extra.cache_clear()
    advice._advise_bfloat16.cache_clear()
    set_llvm(monkeypatch, "")
    monkeypatch.setattr(advice, "has_native_bfloat16", lambda: False)
    yield
    advice._advise_extra.cache_clear()
    advice._advise_bfloat16.cache_clear()


@pytest.fixture
def native(monkeypatch):
    """A CPU with native bfloat16, 3.1 times as fast; the list grows with each measurement."""
    measured = []
    monkeypatch.setattr(advice, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(advice, "bfloat16_gain", lambda: measured.append(1) or 3.14)
    return measured


def test_a_cpu_with_native_bfloat16_is_told_once_what_it_gains(native, caplog):
    for _ in range(3):
        advice.log_advice(tiny.CPU, torch.float32)
    assert caplog.messages == [OFFER]
    assert len(native) == 1


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(GPU, torch.float32), (tiny.CPU, torch.bfloat16), (tiny.CPU, None)],
    ids=["on a GPU", "already chosen", "no such choice"],
)
def test_nothing_is_measured_where_it_is_of_no_use(native, caplog, device, dtype):
    advice.log_advice(device, dtype)
    assert not caplog.messages
    assert not native


def test_a_cpu_that_gains_nothing_is_told_nothing(native, monkeypatch, caplog):
    monkeypatch.setattr(advice, "bfloat16_gain", lambda: 1.1)
    advice.log_advice(tiny.CPU, torch.float32)
    assert not caplog.messages


def test_a_cpu_without_the_instructions_is_not_measured(monkeypatch, caplog):
    monkeypatch.setattr(advice, "bfloat16_gain", lambda: pytest.fail("measured"))
    advice.log_advice(tiny.CPU, torch.float32)
    assert not caplog.messages


def test_a_missing_extra_is_named_once_with_what_it_brings(monkeypatch, caplog):
    asked = set_llvm(monkeypatch, "llvmlite is not installed")
    monkeypatch.setattr(advice, "LLVM_SPEEDUP", 6)
    advice.log_advice(GPU)
    assert not asked
    for dtype in (None, torch.float32):
        advice.log_advice(tiny.CPU, dtype)
    assert caplog.messages == [
        "Weights would be dequantized about 6 times as fast on this CPU with llvmlite: pip install llvmlite."
    ]
    assert len(asked) == 1


@pytest.mark.parametrize("reason", ["", "llvmlite is 0.43.0, and 0.45 is needed"])
def test_the_extra_is_not_named_where_it_is_there_or_would_not_help(monkeypatch, caplog, reason):
    set_llvm(monkeypatch, reason)
    advice.log_advice(tiny.CPU)
    assert not caplog.messages


def test_the_advice_follows_the_line_of_a_load(tiny_flux, native, caplog):
    tiny.quantized_model(tiny_flux("Q2_K"))
    lines = [message for message in caplog.messages if "tiny-flux" in message or "bfloat16" in message]
    assert len(lines) == 2
    assert lines[0].startswith("tiny-flux-Q2_K.gguf: ")
    assert lines[1] == OFFER


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
    ids=["AVX512-BF16", "AMX", "ARM", "AVX-512 alone", "nothing known"],
)
def test_the_instructions_are_those_that_torch_finds(monkeypatch, found, expected):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert advice.has_native_bfloat16() is expected


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_older_torch_is_asked_by_its_own_functions(monkeypatch, name, machine):
    monkeypatch.undo()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for function in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, function, lambda function=function: function == name, raising=False)
    monkeypatch.setattr(advice.platform, "machine", lambda: machine)
    assert advice.has_native_bfloat16() is (name is not None and machine == "x86_64")


def test_the_gain_is_measured_in_both_types():
    assert 0 < advice.bfloat16_gain() < 1000


def test_the_host_tells_what_a_cpu_is():
    assert comfy.model_management.is_device_cpu(tiny.CPU)
    assert not comfy.model_management.is_device_cpu(GPU)
