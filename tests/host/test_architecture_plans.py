# SPDX-License-Identifier: Apache-2.0
"""What the converter would quantize of each architecture is what the pack keeps quantized when it loads it."""

from __future__ import annotations

from pathlib import Path

import make_arch_table
import pytest
import torch
from gguf_kit.host.layer import QuantizedLayer
from gguf_kit.models import archs
from gguf_kit.ops import make_ops
from gguf_kit.quantize import plan
from gguf_kit.quantize.containers import StoredTensor
from gguf_kit.quantize.sources import Source
from small_model_table import SMALL_MODELS
from small_models import build_network, build_shapes, narrow_detection
from small_video_table import SMALL_VIDEO_MODELS

ROWS = SMALL_MODELS | SMALL_VIDEO_MODELS


def plan_of(shapes, type_name):
    """What the converter would do with a BF16 model of these keys and shapes."""
    stored = {key: StoredTensor(torch.bfloat16, shape, torch.Tensor) for key, shape in shapes.items()}
    return plan.make_plan(Source(Path("small"), "test", stored, {}, ()), plan.Choices(type_name))


@pytest.mark.parametrize("name", ROWS)
def test_only_weights_of_our_layers_are_quantized(name, monkeypatch):
    """Never a bare parameter, nor a module that the host makes without the given operations."""
    small = ROWS[name]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    # A small model's matrices count like the large ones that they stand for.
    monkeypatch.setattr(plan, "SMALL", 0)
    monkeypatch.setattr(plan, "_fitting", lambda wanted, row, own: (wanted, ""))
    narrow_detection(monkeypatch, small)
    ours = build_network(small, make_ops())
    layers = {f"{small.prefix}{path}.weight" for path, m in ours.named_modules() if isinstance(m, QuantizedLayer)}
    shapes, _ = build_shapes(small)
    made = plan_of(shapes, "Q4_K_S")
    assert made.arch.title == small.title
    quantized = {t.name for t in made.tensors if t.qtype not in plan.STORED_TYPES.values()}
    assert quantized
    assert sorted(quantized - layers) == []
    assert (archs.detect(shapes) or archs.GENERIC).title == small.title


def test_the_readme_says_what_is_tested_with_this_version():
    version, titles = make_arch_table.running_host()
    assert make_arch_table.read_tested().get(version, titles) == titles, "python tests/make_arch_table.py --host"
