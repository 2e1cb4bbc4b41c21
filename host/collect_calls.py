# SPDX-License-Identifier: Apache-2.0
"""Records some calls of a network while it samples, so that they can be made again: arguments, and what they weigh.

A call weighs what its step moves the latent by for each unit of the network's output, so that the weighted sum of
differences of outputs is the difference of the final latent, if the steps after do not react to it.
"""

from __future__ import annotations

import collections
import contextvars
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch

LARGE = 256 << 20  # bytes of one call's arguments, above which they wait on the CPU
# While a recorded call is made again; whoever listens to the network then hears nothing that belongs to a sampling.
REPEATING: contextvars.ContextVar[bool] = contextvars.ContextVar("REPEATING", default=False)

Key = tuple[Hashable, ...]


class _Parked(NamedTuple):
    """A tensor, wherever it is kept, and the device it belongs on."""

    tensor: torch.Tensor
    device: torch.device


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a network.

    Attributes:
        step: of the sampling.
        group: calls of one group, one for each of the steps, belong to the same latents and prompts.
        weight: difference of the final latent for each unit of the output.
    """

    step: int
    group: Key
    weight: float
    _args: Any
    _kwargs: Any

    def repeat(self, network: torch.nn.Module) -> torch.Tensor:
        """Make the call again; float32 (n_samples, n_values) of its output, all parts of it in a row.

        Networks take lists apart and write into tensors, so each call gets its own.
        """
        token = REPEATING.set(True)
        try:
            with torch.no_grad():
                output = network(*_taken(self._args), **_taken(self._kwargs))
        finally:
            REPEATING.reset(token)
        parts = [output] if isinstance(output, torch.Tensor) else [p for p in output if isinstance(p, torch.Tensor)]
        return torch.cat([part.detach().float().flatten(1) for part in parts], dim=1)


class CallRecorder:
    """A context manager that records the calls of some steps of a sampling.

    Args:
        network: the host's diffusion_model.
        sigmas: of the sampling: where each step begins, and the end of the last.
        n_steps: on how many steps, spread evenly.
        scale: sigma -> what a step moves the latent by for each unit of output and of sigma, 1 for a flow.
    """

    def __init__(
        self, network: torch.nn.Module, sigmas: Sequence[float], n_steps: int, scale: Callable[[float], float]
    ) -> None:
        self.calls: list[RecordedCall] = []
        self._network = network
        self._sigmas = sigmas
        self._scale = scale
        total = max(1, len(sigmas) - 1)
        n = min(n_steps, total)
        self._steps = frozenset((2 * i + 1) * total // (2 * n) for i in range(n))
        self._seen: set[tuple[int, Key]] = set()
        self._n_unknown: collections.Counter[Key] = collections.Counter()

    def __enter__(self) -> CallRecorder:
        self._hook = self._network.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def _record(self, network: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if REPEATING.get():
            return
        options = kwargs.get("transformer_options") or {}
        group = (tuple(options.get("cond_or_uncond", ())), tuple(options.get("uuids", ())))
        step, move = self._place(options.get("sigmas"), group)
        # A sampler may come by one sigma twice; the first time is enough.
        if step not in self._steps or (step, group) in self._seen:
            return
        self._seen.add((step, group))
        on_cpu = _n_bytes((args, kwargs)) > LARGE
        self.calls.append(RecordedCall(step, group, move, _kept(args, on_cpu), _kept(kwargs, on_cpu)))

    def _place(self, sigma: Any, group: Key) -> tuple[int, float]:
        """(step, how far a unit of output moves the latent in it); without sigmas steps are counted, and all equal."""
        if sigma is None:
            step = self._n_unknown[group]
            self._n_unknown[group] += 1
            return step, 1.0
        value = float(torch.as_tensor(sigma).max())
        starts = self._sigmas[:-1]
        step = min(range(len(starts)), key=lambda i: abs(starts[i] - value))
        return step, (self._sigmas[step + 1] - self._sigmas[step]) * self._scale(starts[step])

    def weights(self) -> list[float]:
        """For each call its weight, such that the calls of a group stand for all steps."""
        total = sum(abs(b - a) * abs(self._scale(a)) for a, b in zip(self._sigmas, self._sigmas[1:], strict=False))
        sums: dict[Key, float] = {}
        for call in self.calls:
            sums[call.group] = sums.get(call.group, 0.0) + abs(call.weight)
        return [call.weight * total / sums[call.group] if sums[call.group] else 0.0 for call in self.calls]


def _n_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_n_bytes, items))


def _kept(value: Any, on_cpu: bool) -> Any:
    """A copy of arguments in which nobody writes."""
    if isinstance(value, torch.Tensor):
        copy = value.detach().to("cpu", copy=True) if on_cpu else value.detach().clone()
        return _Parked(copy, value.device)
    return _rebuilt(value, lambda each: _kept(each, on_cpu))


def _taken(value: Any) -> Any:
    """Arguments for one call, of what _kept() made."""
    if isinstance(value, _Parked):
        return value.tensor.to(value.device, copy=True)
    return _rebuilt(value, _taken)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: change(each) for key, each in value.items()}
    return type(value)(map(change, value)) if type(value) in (list, tuple) else value
