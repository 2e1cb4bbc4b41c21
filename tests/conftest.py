# SPDX-License-Identifier: Apache-2.0
"""Registers the pack as `gguf_kit` and keeps torch on one intra-op thread (two on a busy machine can be 30 times slower)."""

import _pack  # noqa: F401
import torch

torch.set_num_threads(1)
