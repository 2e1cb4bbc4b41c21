# SPDX-License-Identifier: Apache-2.0
"""Dequantization on a CPU with machine code made for that CPU, for everybody who has llvmlite.

Owns the compiled kernels, one per qtype and output type, and the threads that run them. llvm_ir.py writes them; what
they compute is layouts.py's formula, exactly. llvmlite is an optional extra: a compiler as a library, without a need
for any other on the machine. A kernel is compiled in some hundredths of a second when it is first used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import Layout
from .iq_grids import byte_table, device_table
from .llvm_ir import books, in_bytes, kernel_name, kernel_text
from .self_test import FAILURES
from .torch_reference import convert_floats

OUTPUTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
OLDEST_LLVMLITE = (0, 45)
NOT_INSTALLED = "llvmlite is not installed"
# Fewer weights than this are not worth a second thread: about 10 microseconds of work.
THREAD_WEIGHTS = 1 << 15
MAX_THREADS = os.cpu_count() or 1
CPU = torch.device("cpu")

_lock = threading.RLock()
_kernels: dict[tuple[str, str], _Kernel] = {}


class _Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        run: (address of the blocks, address of the result, number of blocks, addresses of the tables...).
        tables: the code books that it reads.
    """

    run: Callable[..., None]
    tables: tuple[Tensor, ...]


def unavailable(layout: Layout, device: torch.device) -> str:
    """Why this backend cannot take such a tensor, or ""."""
    if device.type != "cpu":
        return "it computes on a CPU"
    return _machine_lacks()


@functools.cache
def _machine_lacks() -> str:
    """What this machine lacks for all kernels, or ""."""
    try:
        version = importlib.metadata.version("llvmlite")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_LLVMLITE:
            return f"llvmlite is {version}, and {'.'.join(map(str, OLDEST_LLVMLITE))} is needed"
        return _target().lacks
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
    except FAILURES as error:  # broken, or the system does not let a process make machine code
        return f"llvmlite cannot be used: {error}"


class _Target(NamedTuple):
    """This CPU for LLVM.

    Attributes:
        binding: llvmlite's module.
        machine: LLVM's TargetMachine, which the engine owns.
        engine: owns all machine code, until the process ends.
        architecture: LLVM's name of it, such as x86_64.
        lacks: an instruction set that the kernels need and the CPU has not, or "".
    """

    binding: Any
    machine: Any
    engine: Any
    architecture: str
    lacks: str


def _target() -> _Target:
    with _lock:  # one engine: kernels are gone with theirs
        return _make_target()


@functools.cache
def _make_target() -> _Target:
    import llvmlite.binding as binding

    binding.check_jit_execution()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    architecture = binding.get_default_triple().split("-")[0]
    architecture = {"arm64": "aarch64", "amd64": "x86_64"}.get(architecture, architecture)
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    half = features.get("f16c", False) if architecture == "x86_64" else architecture == "aarch64"
    lacks = "" if half else f"this CPU ({architecture}) has no instructions for float16"
    return _Target(binding, machine, engine, architecture, lacks)


def dequantize_into(blocks: Tensor, layout: Layout, out: Tensor) -> None:
    """Dequantize on as many threads as torch uses.

    Args:
        blocks: uint8 (n_blocks, layout.type_size), on a CPU.
        layout: a row for which unavailable() has nothing to say.
        out: (n_blocks, layout.block_size), contiguous; each weight is rounded once to its dtype.
    """
    if layout.quants is None:
        convert_floats(blocks, layout, out)
        return
    if out.dtype not in OUTPUTS:
        exact = torch.empty(out.shape, dtype=torch.float32, device="cpu")
        dequantize_into(blocks, layout, exact)
        out.copy_(exact)
        return
    kernel = _kernel(layout, OUTPUTS[out.dtype])
    blocks = blocks.contiguous()
    n_blocks = blocks.shape[0]
    n_threads = max(1, min(torch.get_num_threads(), MAX_THREADS, n_blocks * layout.block_size // THREAD_WEIGHTS))
    per_thread = max(1, -(-n_blocks // n_threads))
    tables = [table.data_ptr() for table in kernel.tables]

    def run(start: int) -> None:
        source = blocks.data_ptr() + start * layout.type_size
        target = out.data_ptr() + start * layout.block_size * out.element_size()
        kernel.run(source, target, min(per_thread, n_blocks - start), *tables)

    others = [_start(run, start) for start in range(per_thread, n_blocks, per_thread)]
    try:
        if n_blocks:
            run(0)
    finally:
        for wait in others:
            wait()


def _start(run: Callable[[int], None], start: int) -> Callable[[], None]:
    """Run a share on another thread; what is returned waits for its end. While the process ends, it runs here."""
    try:
        return _pool(os.getpid()).submit(run, start).result
    except RuntimeError:
        return functools.partial(run, start)


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of a process; those of a forked one's parent do not run in it."""
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="gguf-kit-dequantize")


def _kernel(layout: Layout, output: str) -> _Kernel:
    kernel = _kernels.get((layout.qtype.name, output))
    if kernel is None:
        with _lock:
            kernel = _kernels.get((layout.qtype.name, output)) or _compile(layout, output)
            _kernels[layout.qtype.name, output] = kernel
    return kernel


def _compile(layout: Layout, output: str) -> _Kernel:
    target = _target()
    text = kernel_text(layout, output, target.architecture)
    module = target.binding.parse_assembly(text)
    module.triple = target.machine.triple
    module.verify()
    target.engine.add_module(module)
    target.engine.finalize_object()
    tables = tuple(byte_table(book) if in_bytes(book) else device_table(book, CPU) for book in books(layout))
    arguments = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p for _ in tables)]
    run = ctypes.CFUNCTYPE(None, *arguments)(target.engine.get_function_address(kernel_name(layout, output)))
    return _Kernel(run, tables)
