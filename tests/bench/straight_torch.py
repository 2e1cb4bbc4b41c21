# SPDX-License-Identifier: Apache-2.0
"""Straight torch dequantization: the fixed baseline of the benchmarks.

    python tests/bench/straight_torch.py --check

What a competent author writes first: one function per qtype, the whole tensor at once, a chain of torch operations
with a temporary each, float32 arithmetic, constants made once. Nothing is cut into pieces, written in place or shared
with the pack: the numbers that the pack is compared with must not move when the pack does. For the same reason the byte
offsets stand here by hand. No test depends on this file; --check compares every qtype with gguf-py.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import gguf.quants as gguf_quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

DELTA = 0.125  # IQ1_S, IQ1_M


def dequantize(blocks: Tensor, qtype: GGMLQuantizationType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize all blocks at once.

    Args:
        blocks: uint8 (n_blocks, type_size), contiguous.
        qtype: a key of FUNCTIONS or PLAIN.
        dtype: of the result; rounded once, from float32.
    Returns:
        dtype (n_blocks, block_size), its own memory.
    """
    if qtype.name in PLAIN:
        return blocks.view(PLAIN[qtype.name]).to(dtype, copy=True)
    return FUNCTIONS[qtype.name](blocks).view(blocks.shape[0], -1).to(dtype)


@functools.cache
def shifts_of(step: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The n shifts 0, step, 2*step ..., with a dim of 1 on both sides: (n, 1)."""
    return torch.arange(0, step * n, step, dtype=dtype).view(n, 1)


@functools.cache
def grid_of(name: str) -> Tensor:
    """A code book of gguf-py: float32 (n_entries, weights per entry)."""
    quant_class = getattr(gguf_quants, name)
    quant_class.init_grid()
    return torch.from_numpy(quant_class.grid.reshape(quant_class.grid_shape).astype(np.float32))


@functools.cache
def signs_of_bytes() -> Tensor:
    """Eight factors of 1 or -1 for every byte, lowest bit first: float32 (256, 8)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


@functools.cache
def ksigns() -> Tensor:
    """Eight factors of 1 or -1 for every 7-bit sign index: float32 (128, 8)."""
    return look_up(signs_of_bytes(), torch.frombuffer(bytearray(gguf_quants.IQ2_XXS.ksigns), dtype=torch.uint8)).view(
        -1, 8
    )


@functools.cache
def kvalues_of(name: str) -> Tensor:
    """The 16 values of a 4-bit type: float32 (16,)."""
    return torch.tensor(getattr(gguf_quants, name).kvalues, dtype=torch.float32)


def split(blocks: Tensor, *n_bytes: int) -> tuple[Tensor, ...]:
    """Cut the blocks into fields of so many bytes; the last field is what is left."""
    return torch.split(blocks, [*n_bytes, blocks.shape[1] - sum(n_bytes)], dim=1)


def f16(field: Tensor) -> Tensor:
    """Two bytes per number: float32 (n_blocks, n)."""
    return field.contiguous().view(torch.float16).float()


def u16(field: Tensor) -> Tensor:
    """Two bytes per number, as int32, which has every operation: (n_blocks, n)."""
    return field.contiguous().view(torch.int16).int() & 0xFFFF


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """What the table has for each index, one after another: float32 (n_blocks, n)."""
    return table.index_select(0, indices.int().flatten()).view(indices.shape[0], -1)


def nibbles(qs: Tensor, run: int) -> Tensor:
    """4-bit codes, the low nibbles of `run` bytes before their high ones: uint8 (n_blocks, 2 * n_bytes)."""
    qs = qs.reshape(qs.shape[0], -1, run)
    return torch.stack([qs & 15, qs >> 4], dim=2).view(qs.shape[0], -1)


def crumbs(qs: Tensor, run: int) -> Tensor:
    """2-bit codes, `run` bytes at a time: uint8 (n_blocks, 4 * n_bytes)."""
    qs = qs.reshape(qs.shape[0], -1, 1, run) >> shifts_of(2, 4)
    return (qs & 3).view(qs.shape[0], -1)


def bits(qh: Tensor, run: int) -> Tensor:
    """Single bits, `run` bytes at a time: uint8 (n_blocks, 8 * n_bytes)."""
    qh = qh.reshape(qh.shape[0], -1, 1, run) >> shifts_of(1, 8)
    return (qh & 1).view(qh.shape[0], -1)


def sub_blocks(codes: Tensor, n: int) -> Tensor:
    """(n_blocks, n, codes per sub-block)."""
    return codes.view(codes.shape[0], n, -1)


def q4_0(blocks: Tensor) -> Tensor:
    d, qs = split(blocks, 2)
    return f16(d) * (nibbles(qs, 16).to(torch.int8) - 8).float()


def q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = split(blocks, 2, 2)
    return f16(d) * nibbles(qs, 16).float() + f16(m)


def q5_0(blocks: Tensor) -> Tensor:
    d, qh, qs = split(blocks, 2, 4)
    codes = nibbles(qs, 16) | bits(qh, 1) << 4
    return f16(d) * (codes.to(torch.int8) - 16).float()


def q5_1(blocks: Tensor) -> Tensor:
    d, m, qh, qs = split(blocks, 2, 2, 4)
    codes = nibbles(qs, 16) | bits(qh, 1) << 4
    return f16(d) * codes.float() + f16(m)


def q8_0(blocks: Tensor) -> Tensor:
    d, qs = split(blocks, 2)
    return f16(d) * qs.view(torch.int8).float()


def q2_k(blocks: Tensor) -> Tensor:
    scales, qs, d, dmin = split(blocks, 16, 64, 2)
    dl = f16(d) * (scales & 15).float()
    ml = f16(dmin) * (scales >> 4).float()
    return dl.unsqueeze(2) * sub_blocks(crumbs(qs, 32), 16).float() - ml.unsqueeze(2)


def q3_k(blocks: Tensor) -> Tensor:
    hmask, qs, scales, d = split(blocks, 32, 64, 12)
    low, high = split(scales, 8)
    scales = nibbles(low, 8) | crumbs(high, 4) << 4
    dl = f16(d) * (scales.to(torch.int8) - 32).float()
    codes = crumbs(qs, 32) | bits(hmask, 32) << 2
    return dl.unsqueeze(2) * sub_blocks(codes.to(torch.int8) - 4, 16).float()


def k_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and mins of Q4_K and Q5_K: uint8 (n_blocks, 8) each."""
    low, middle, high = split(scales, 4, 4)
    return (
        torch.cat([low & 63, high & 15 | (low >> 2) & 48], dim=1),
        torch.cat([middle & 63, high >> 4 | (middle >> 2) & 48], dim=1),
    )


def q4_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qs = split(blocks, 2, 2, 12)
    sub_scales, sub_mins = k_scales(scales)
    dl = f16(d) * sub_scales.float()
    ml = f16(dmin) * sub_mins.float()
    return dl.unsqueeze(2) * sub_blocks(nibbles(qs, 32), 8).float() - ml.unsqueeze(2)


def q5_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, qh, qs = split(blocks, 2, 2, 12, 32)
    sub_scales, sub_mins = k_scales(scales)
    dl = f16(d) * sub_scales.float()
    ml = f16(dmin) * sub_mins.float()
    codes = nibbles(qs, 32) | bits(qh, 32) << 4
    return dl.unsqueeze(2) * sub_blocks(codes, 8).float() - ml.unsqueeze(2)


def q6_k(blocks: Tensor) -> Tensor:
    ql, qh, scales, d = split(blocks, 128, 64, 16)
    dl = f16(d) * scales.view(torch.int8).float()
    codes = nibbles(ql, 64) | crumbs(qh, 32) << 4
    return dl.unsqueeze(2) * sub_blocks(codes.to(torch.int8) - 32, 16).float()


@functools.cache
def powers_of_three(n: int) -> Tensor:
    """1, 3, 9 ...: uint8 (n, 1)."""
    return torch.tensor([3**i for i in range(n)], dtype=torch.uint8).view(n, 1)


def trits(qs: Tensor, run: int, n: int) -> Tensor:
    """Ternary digits, n per byte, `run` bytes at a time: uint8 (n_blocks, n * n_bytes)."""
    qs = qs.reshape(qs.shape[0], -1, 1, run) * powers_of_three(n)  # keeps the low 8 bits
    return qs.view(qs.shape[0], -1)


def tq1_0(blocks: Tensor) -> Tensor:
    qs0, qs1, qh, d = split(blocks, 32, 16, 4)
    digits = torch.cat([trits(qs0, 32, 5), trits(qs1, 16, 5), trits(qh, 4, 4)], dim=1)
    codes = (digits.to(torch.int16) * 3) >> 8
    return f16(d) * (codes - 1).float()


def tq2_0(blocks: Tensor) -> Tensor:
    qs, d = split(blocks, 64)
    return f16(d) * (crumbs(qs, 32).to(torch.int8) - 1).float()


def iq4_nl(blocks: Tensor) -> Tensor:
    d, qs = split(blocks, 2)
    return f16(d) * look_up(kvalues_of("IQ4_NL"), nibbles(qs, 16))


def iq4_xs(blocks: Tensor) -> Tensor:
    d, scales_h, scales_l, qs = split(blocks, 2, 2, 4)
    high = (u16(scales_h) >> shifts_of(2, 8, torch.int32).view(8)) & 3
    dl = f16(d) * ((nibbles(scales_l, 1).int() | high << 4) - 32).float()
    return dl.unsqueeze(2) * sub_blocks(look_up(kvalues_of("IQ4_NL"), nibbles(qs, 16)), 8)


def mxfp4(blocks: Tensor) -> Tensor:
    e, qs = split(blocks, 1)
    e = e.int()
    d = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)
    return d * look_up(kvalues_of("MXFP4"), nibbles(qs, 16))


@functools.cache
def ue4m3_halves() -> Tensor:
    """Half the number that each unsigned e4m3 byte stands for: float32 (256,)."""
    every_byte = np.arange(256, dtype=np.uint8)
    return torch.from_numpy(gguf_quants.NVFP4.ue4m3_to_fp32(every_byte).astype(np.float32))


def nvfp4(blocks: Tensor) -> Tensor:
    d, qs = split(blocks, 4)
    dl = look_up(ue4m3_halves(), d)
    return dl.unsqueeze(2) * sub_blocks(look_up(kvalues_of("NVFP4"), nibbles(qs, 8)), 4)


def by_scale(dl: Tensor, weights: Tensor) -> Tensor:
    """Scale the weights, one number for each sub-block: float32 (n_blocks, 256)."""
    return (dl.unsqueeze(2) * weights.reshape(*dl.shape, -1)).view(dl.shape[0], -1)


def iq2_xxs(blocks: Tensor) -> Tensor:
    d, qs = split(blocks, 2)
    words = qs.contiguous().view(torch.int32).view(qs.shape[0], -1, 2)
    indices = words[:, :, 0].contiguous().view(torch.uint8)
    dl = f16(d) * (0.5 + (words[:, :, 1] >> 28 & 15).float()) * 0.25
    signs = look_up(ksigns(), words[:, :, 1:] >> shifts_of(7, 4, torch.int32).view(4) & 127)
    return by_scale(dl, look_up(grid_of("IQ2_XXS"), indices)) * signs


def iq2_xs(blocks: Tensor) -> Tensor:
    d, qs, scales = split(blocks, 2, 64)
    words = u16(qs)
    dl = f16(d) * (0.5 + nibbles(scales, 1).float()) * 0.25
    return by_scale(dl, look_up(grid_of("IQ2_XS"), words & 511)) * look_up(ksigns(), words >> 9)


def iq2_s(blocks: Tensor) -> Tensor:
    d, qs, signs, qh, scales = split(blocks, 2, 32, 32, 8)
    indices = qs.int() | crumbs(qh, 1).int() << 8
    dl = f16(d) * (0.5 + nibbles(scales, 1).float()) * 0.25
    return by_scale(dl, look_up(grid_of("IQ2_S"), indices)) * look_up(signs_of_bytes(), signs)


def iq3_xxs(blocks: Tensor) -> Tensor:
    d, qs, scales = split(blocks, 2, 64)
    words = scales.contiguous().view(torch.int32)
    dl = f16(d) * (0.5 + (words >> 28 & 15).float()) * 0.5
    signs = look_up(ksigns(), words.unsqueeze(2) >> shifts_of(7, 4, torch.int32).view(4) & 127)
    return by_scale(dl, look_up(grid_of("IQ3_XXS"), qs)) * signs


def iq3_s(blocks: Tensor) -> Tensor:
    d, qs, qh, signs, scales = split(blocks, 2, 64, 8, 32)
    indices = qs.int() | bits(qh, 1).int() << 8
    dl = f16(d) * (1 + 2 * nibbles(scales, 1)).float()
    return by_scale(dl, look_up(grid_of("IQ3_S"), indices)) * look_up(signs_of_bytes(), signs)


def iq1_s(blocks: Tensor) -> Tensor:
    d, qs, qh = split(blocks, 2, 32)
    words = u16(qh)
    high = words.unsqueeze(2) >> shifts_of(3, 4, torch.int32).view(4) & 7
    dl = f16(d) * (2 * (words >> 12 & 7) + 1).float()
    delta = DELTA - 2 * DELTA * (words >> 15).float()
    grid = look_up(grid_of("IQ1_S"), qs.int() | high.view(qs.shape) << 8)
    return by_scale(dl, sub_blocks(grid, 8) + delta.unsqueeze(2))


def iq1_m(blocks: Tensor) -> Tensor:
    qs, qh, scales = split(blocks, 32, 16)
    words = u16(scales)
    tops = words >> 12
    d = tops[:, :1] | tops[:, 1:2] << 4 | tops[:, 2:3] << 8 | tops[:, 3:] << 12
    sub_scales = words.unsqueeze(2) >> shifts_of(3, 4, torch.int32).view(4) & 7
    dl = d.to(torch.int16).view(torch.float16).float() * (2 * sub_scales.view(-1, 16) + 1).float()
    high = nibbles(qh, 1)
    delta = DELTA - 2 * DELTA * (high >> 3).float()
    grid = look_up(grid_of("IQ1_S"), qs.int() | (high & 7).int() << 8)
    return by_scale(dl, sub_blocks(grid, 32) + delta.unsqueeze(2))


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.upper(): function
    for function in (
        *(q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, tq1_0, tq2_0),
        *(iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq4_nl, iq4_xs, mxfp4, nvfp4),
    )
}


def check() -> int:
    """Compare every qtype with gguf-py on random bytes, bit for bit; the number of qtypes that differ."""
    n_wrong = 0
    for name in (*PLAIN, *FUNCTIONS):
        qtype = GGMLQuantizationType[name]
        data = np.random.default_rng(int(qtype)).integers(0, 256, (999, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8)
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(gguf_quants.dequantize(data, qtype).astype(np.float32))
        weights = dequantize(torch.from_numpy(data), qtype)
        same = (weights.view(torch.int32) == expected.view(torch.int32)) | (weights.isnan() & expected.isnan())
        n_wrong += not bool(same.all())
        print(f"{name:8} {'equal' if bool(same.all()) else f'{100 * float((~same).float().mean()):.3f} % differ'}")
    return n_wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", required=True, help="compare with gguf-py")
    parser.parse_args()
    return int(check() > 0)


if __name__ == "__main__":
    sys.exit(main())
