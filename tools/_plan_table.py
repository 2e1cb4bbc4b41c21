# SPDX-License-Identifier: Apache-2.0
"""A plan in words: one line about its size, and a table of roles and types."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from gguf_kit.quantize.plan import Plan


def size_line(plan: Plan, n_bytes: int) -> str:
    """Architecture, size and precision in a few words."""
    size = f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"
    return f"{plan.arch.title}, {len(plan.tensors)} tensors, {size}, {plan.bpw:.2f} bits per weight"


def describe(plan: Plan, path: Path, n_bytes: int) -> str:
    """The plan as a table: for each role and type the tensors, weights and bytes."""
    tensors: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for t in plan.tensors:
        key = t.category.value, t.qtype.name
        tensors[key] += 1
        weights[key] += prod(t.shape)
        sizes[key] += t.n_bytes
    lines = [f"{path.name}: {size_line(plan, n_bytes)}", f"{'role':<12} {'type':<8} tensors   M weights         MB"]
    for key, size in sizes.most_common():
        lines.append(f"{key[0]:<12} {key[1]:<8} {tensors[key]:>7} {weights[key] / 1e6:>11.2f} {size / 1e6:>10.2f}")
    return "\n".join(lines)
