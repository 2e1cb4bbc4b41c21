# SPDX-License-Identifier: Apache-2.0
"""Registers the pack as `gguf_kit`, makes the tiny Flux's files, and keeps torch on one intra-op thread.

Two threads on a busy two-core machine can be thirty times slower than one.
"""

import ctypes
import functools
import sys

import _pack  # noqa: F401
import make_files
import pytest
import torch

torch.set_num_threads(1)

# Files that share a costly fixture of tests/e2e: the one server with all files, or a program that is built.
TOGETHER = dict.fromkeys(("test_more_nodes.py", "test_server.py", "test_soak_queue.py"), "server")
TOGETHER |= dict.fromkeys(("test_imatrix_e2e.py", "test_llama_cpp.py"), "program")
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For pytest-xdist's --dist loadfile: files in one process that share what is costly."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file.rsplit("/", 1)[-1], file)

    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back():
    """glibc keeps freed memory for later, gigabytes after some files; of two workers each would have its own."""
    yield
    if TRIM is not None:
        TRIM(0)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Path of the tiny Flux as GGUF of a type (a key of make_files.TYPES), quantized by ggml once per session."""
    folder = tmp_path_factory.mktemp("tiny-flux")

    @functools.cache
    def make(type_name):
        return make_files.write_gguf(type_name, folder / f"tiny-flux-{type_name}.gguf")

    return make
