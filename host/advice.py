# SPDX-License-Identifier: Apache-2.0
"""What would make models faster on this machine's CPU, said once per process in the log, after the line of a load.

Owns the conditions and the sentences. Nothing is installed, and nothing is measured where it cannot be of use.
"""

from __future__ import annotations

import functools
import logging
import platform
import time

import comfy.model_management
import torch
from gguf.constants import GGMLQuantizationType

from ..dequant import BACKENDS
from ..kernels.llvm_cpu import NOT_INSTALLED
from ..layouts import LAYOUTS

log = logging.getLogger("gguf_kit")

# How many times as fast the "llvm" backend dequantizes as the one without it: Q4_K to float32, 2 threads with AVX-512.
LLVM_SPEEDUP = 5
# Below this nothing is said: what is not multiplied costs the same in both types.
MIN_GAIN = 1.2
# (tokens, in, out) of the product that is timed: milliseconds on any CPU that has the instructions.
_TIMED_SHAPE = (128, 1024, 1024)
_N_RUNS = 3


def log_advice(device: torch.device, compute_dtype: torch.dtype | None = None) -> None:
    """Say what would make a model faster that runs on this device; what has been said is not said again.

    Args:
        compute_dtype: of a diffusion model, whose loader lets users choose it; None: of a model without the choice.
    """
    if not comfy.model_management.is_device_cpu(device):
        return
    _advise_extra()
    if compute_dtype is torch.float32:
        _advise_bfloat16()


@functools.cache
def _advise_extra() -> None:
    lacks = BACKENDS["llvm"].unavailable(LAYOUTS[GGMLQuantizationType.Q4_K], torch.device("cpu"))
    if lacks == NOT_INSTALLED:  # an older one may be what another package needs
        log.info(
            "Weights would be dequantized about %d times as fast on this CPU with llvmlite: pip install llvmlite.",
            LLVM_SPEEDUP,
        )


@functools.cache
def _advise_bfloat16() -> None:
    if not has_native_bfloat16():
        return
    gain = bfloat16_gain()
    if gain >= MIN_GAIN:
        log.info(
            "This CPU multiplies bfloat16 natively, %.1f times as fast as float32 here: "
            "choose compute_dtype bfloat16 in Unet Loader (GGUF/Advanced).",
            gain,
        )


def has_native_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, as far as this torch can tell."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        found = get_capabilities()
        return any(bool(found.get(name, False)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def bfloat16_gain() -> float:
    """How many times as fast as in float32 a product in bfloat16 is here, measured in milliseconds."""
    n_tokens, n_in, n_out = _TIMED_SHAPE
    times = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    shapes = (n_tokens, n_in), (n_out, n_in)
    operands = {dtype: [torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes] for dtype in times}
    for run in range(_N_RUNS + 1):
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if run:  # the first sets up
                times[dtype] = min(times[dtype], time.perf_counter() - start)
    return times[torch.float32] / times[torch.bfloat16]
