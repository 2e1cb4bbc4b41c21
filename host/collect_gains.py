# SPDX-License-Identifier: Apache-2.0
"""Measures how much an error of each layer's output matters for the final latent: the layer's gain.

A layer's weight is rounded coarsely, to 2 and to 3 bits, and recorded calls of the network are made again with it.
gain = (relative squared error of the final latent) / (mean squared error of the layer's output), where the first adds
up the errors of all steps with their signs: rounding is the same in each step, so its errors do not average out. The
gain of a layer is the geometric mean of both roundings'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collect_calls import Key, RecordedCall
from .collector import input_of
from .compat import dequantize_weight, is_quantized

BITS = (2, 3)
BLOCK = 32
SAME = 1e-6  # relative squared difference of two equal calls, above which a network does not repeat itself

Modules = dict[str, Any]


def dense_weight(module: Any, device: torch.device) -> torch.Tensor:
    """The weight that a layer holds now, as a private float32 (n_rows, n_columns) on a device.

    With the patches that the host has written into it, without those that are added in the forward.
    Source: the host's ModelPatcher.patch_weight_to_device.
    """
    weight = module.weight.detach() if module.weight.requires_grad else module.weight
    weight = weight.to(device)
    if is_quantized(weight):
        return dequantize_weight(weight, torch.float32)
    to_float = getattr(module, "convert_weight", None)  # of what the host quantized
    wide: torch.Tensor = weight.to(torch.float32, copy=True)
    return to_float(wide).to(torch.float32) if to_float else wide


def rounding_error(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What a float32 (n_rows, n_columns) weight changes by when rounded to a grid between each block's ends."""
    n_columns = weight.shape[1]
    blocks = weight.reshape(-1, BLOCK if n_columns % BLOCK == 0 else n_columns)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)
    return (((blocks - low) / step).round() * step + low - blocks).reshape(weight.shape)


class _Disturbance:
    """A forward hook that makes a layer compute with another weight, and adds up how far its outputs move."""

    def __init__(self, change: torch.Tensor) -> None:
        self._change = change  # float32 (n_rows, n_columns), added to the weight
        self._n_rows = 0
        self._squares: torch.Tensor | None = None

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = input_of(args, kwargs)
        self._change = self._change.to(x.device)
        delta = torch.nn.functional.linear(x.float(), self._change)
        squares = torch.linalg.vector_norm(delta).square()
        self._squares = squares if self._squares is None else self._squares + squares
        self._n_rows += x.numel() // x.shape[-1]
        return (output.float() + delta).to(output.dtype)

    def mean_square(self) -> float:
        """Mean over rows of the squared length of what was added; 0 if the layer was not called."""
        return 0.0 if self._squares is None else float(self._squares) / self._n_rows


@dataclass(frozen=True, eq=False)
class GainMeter:
    """Recorded calls of a network with what they gave.

    Attributes:
        network: the host's diffusion_model.
        calls, weights: of a recorder.
        references: float32 (n_samples, n_values), output of each call.
        latent: mean over samples of the squared length of the final latent.
    """

    network: torch.nn.Module
    calls: Sequence[RecordedCall]
    weights: Sequence[float]
    references: Sequence[torch.Tensor]
    latent: float

    def repeats(self) -> bool:
        """Whether equal calls give equal results, but for a rounding."""
        return self.latent_error() <= SAME

    def latent_error(self) -> float:
        """Relative squared error of the final latent, if the network now computes otherwise than in the references."""
        totals: dict[Key, torch.Tensor] = {}
        for call, weight, reference in zip(self.calls, self.weights, self.references, strict=True):
            moved = (call.repeat(self.network) - reference) * weight
            totals[call.group] = totals[call.group] + moved if call.group in totals else moved
        n_samples = sum(len(total) for total in totals.values())
        squares = sum(float(total.square().sum()) for total in totals.values())
        return squares / n_samples / self.latent

    def gain(self, module: torch.nn.Module, device: torch.device) -> float | None:
        """The gain of a layer; None where no rounding of it moves the latent."""
        weight = dense_weight(module, device)
        logarithms = []
        for bits in BITS:
            disturbance = _Disturbance(rounding_error(weight, bits))
            hook = module.register_forward_hook(disturbance, with_kwargs=True)
            try:
                error = self.latent_error()
            finally:
                hook.remove()
            moved = disturbance.mean_square()
            if not (0 < error < math.inf and 0 < moved < math.inf):
                return None
            logarithms.append(math.log(error / moved))
        return math.exp(sum(logarithms) / len(logarithms))


def make_meter(
    network: torch.nn.Module, calls: Sequence[RecordedCall], weights: Sequence[float], latent: torch.Tensor
) -> GainMeter:
    """A meter over recorded calls.

    Args:
        latent: (n_samples, ...) result of the sampling, as the model has it. It only sets the scale, for all layers.
    """
    references = [call.repeat(network) for call in calls]
    square = float(latent.detach().float().square().sum()) / max(1, latent.shape[0])
    return GainMeter(network, calls, weights, references, square if 0 < square < math.inf else 1.0)


def measure_gains(
    meter: GainMeter, layers: Modules, device: torch.device, before: Callable[[], None]
) -> dict[str, float]:
    """Gains of layers.

    Args:
        device: where weights are rounded.
        before: called before each layer; may raise to end it.
    """
    found = {}
    for name, module in layers.items():
        before()
        gain = meter.gain(module, device)
        if gain is not None:
            found[name] = gain
    return found
