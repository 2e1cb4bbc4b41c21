# SPDX-License-Identifier: Apache-2.0
"""Registers the pack as `gguf_kit`, makes the tiny Flux's files, and keeps torch on one intra-op thread.

Two threads on a busy two-core machine can be thirty times slower than one.
"""

import functools

import _pack  # noqa: F401
import make_files
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Path of the tiny Flux as GGUF of a type (a key of make_files.TYPES), quantized by ggml once per session."""
    folder = tmp_path_factory.mktemp("tiny-flux")

    @functools.cache
    def make(type_name):
        return make_files.write_gguf(type_name, folder / f"tiny-flux-{type_name}.gguf")

    return make
