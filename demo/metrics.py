# SPDX-License-Identifier: Apache-2.0
"""How far the pictures of a quantized model are from the reference's, and how large its file is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from . import tiny_flux


@dataclass(frozen=True)
class FileSize:
    """Size of a model file.

    Attributes:
        n_bytes: bytes of all its tensors.
        n_weights: weights in all its tensors.
    """

    n_bytes: int
    n_weights: int

    @property
    def bpw(self) -> float:
        """Bits per weight, on average over all tensors."""
        return 8 * self.n_bytes / self.n_weights


def file_size(path: Path) -> FileSize:
    """Size of a GGUF file by gguf-py's reader, or of a safetensors file by its header."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        n_bytes = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors)
        return FileSize(n_bytes, sum(math.prod(entry["shape"]) for entry in tensors))
    stored = gguf.GGUFReader(path).tensors
    return FileSize(sum(int(t.n_bytes) for t in stored), sum(int(t.n_elements) for t in stored))


def latent_error(latents: np.ndarray, reference: np.ndarray) -> float:
    """Relative error in model space, over all latents together: |a - b| / |b| with b = (reference - shift) * scale.

    Args:
        latents, reference: float (n, 16, height, width) as VAE Decode takes them.
    """
    difference = np.linalg.norm(latents.astype(np.float64) - reference)
    return float(difference / np.linalg.norm(reference.astype(np.float64) - tiny_flux.LATENT_SHIFT))


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pictures together, infinite for equal ones.

    Args:
        pictures, reference: float (n, height, width, 3) in [0, 1].
    """
    error = float(np.mean((pictures.astype(np.float64) - reference) ** 2))
    return -10 * math.log10(error) if error > 0 else math.inf
