# SPDX-License-Identifier: Apache-2.0
"""Weights for benchmarks: random blocks whose weights are of a size as models have them."""

from __future__ import annotations

import _paths  # noqa: F401
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.layouts import LAYOUTS, Layout
from quant_data import f16_sources, write_f16

N_RANDOM = 1 << 16  # different blocks; more of them are these again
# Exponent bytes of the types whose scales are no f16: those of weights between about 1e-3 and 1.
EXPONENTS = {"MXFP4": ("e", 117, 122), "NVFP4": ("d", 8, 24)}


def make_blocks(qtype: QType, n_blocks: int, seed: int = 0) -> torch.Tensor:
    """uint8 (n_blocks, type_size): random bytes under scales between 1/1024 and 1/512, minima too."""
    layout = LAYOUTS[qtype]
    n_random = min(n_blocks, N_RANDOM)
    if layout.quants is None:
        blocks = plain_blocks(layout, n_random, seed)
    else:
        blocks = coded_blocks(layout, n_random, seed)
    return torch.from_numpy(np.resize(blocks, (n_blocks, layout.type_size)))


def plain_blocks(layout: Layout, n_blocks: int, seed: int) -> np.ndarray:
    """Blocks of the types that are floats themselves."""
    generator = torch.Generator().manual_seed(seed)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[layout.qtype.name]
    values = torch.randn(n_blocks, layout.block_size, generator=generator).mul(0.02).to(dtype)
    return values.view(torch.uint8).numpy()


def coded_blocks(layout: Layout, n_blocks: int, seed: int) -> np.ndarray:
    """Blocks of the types that have scales and codes."""
    rng = np.random.default_rng([seed, int(layout.qtype)])
    blocks = rng.integers(0, 256, (n_blocks, layout.type_size), dtype=np.uint8)
    for source in f16_sources(layout):
        write_f16(blocks, layout, source, rng.integers(0x1400, 0x1800, n_blocks, dtype=np.uint16))
    if layout.qtype.name in EXPONENTS:
        field, low, high = EXPONENTS[layout.qtype.name]
        start = layout.offsets[field]
        scales = blocks[:, start : start + layout.field_named(field).n_bytes]
        scales[...] = rng.integers(low, high, scales.shape, dtype=np.uint8)
    return blocks


def make_bytes(qtype: QType, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A matrix of such blocks: uint8 (rows, bytes per row)."""
    n_blocks = shape[0] * shape[1] // LAYOUTS[qtype].block_size
    return make_blocks(qtype, n_blocks, seed).view(shape[0], -1)
