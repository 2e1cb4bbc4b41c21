# SPDX-License-Identifier: Apache-2.0
"""Listens to a network while it runs: for each linear layer the sums of its squared inputs, and some of its inputs.

Owns the hooks on the layers, which are torch's own and gone when the listener's with statement ends. They change
nothing that the network computes, and never wait for a GPU. Knows no files and no names but those of modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from ..errors import GGUFError, name_list
from .collect_rows import RecordedRows, first_choice

CHUNK = 1 << 18  # numbers that are squared at once on a CPU, so few that they stay in its cache
WAITING_BYTES = 32 << 20  # of rows on the device, before they are brought to the CPU


def linear_layers(network: torch.nn.Module) -> dict[str, Any]:
    """Every layer that multiplies its input by one matrix, under its name: torch's, the host's and ours."""
    return {name: module for name, module in network.named_modules() if _is_linear(module)}


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and hasattr(module, "in_features")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input (..., n_columns) of a linear layer, of the arguments it was called with."""
    x: torch.Tensor = args[0] if args else kwargs["input"]
    return x.detach()


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What was seen of a layer's inputs.

    Attributes:
        sums: float32 (n_columns,) on the CPU, sums of squares over all rows.
        n_rows: how many rows.
        rows: bfloat16 (n, n_columns), some of them; None where none were wanted.
    """

    sums: torch.Tensor
    n_rows: int
    rows: torch.Tensor | None


class _Layer:
    """What is known of one layer so far; its numbers are on the device where it computes."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.n_rows = 0
        self.rows: RecordedRows | None = None


class InputListener:
    """A context manager that listens to the layers of a network.

    Args:
        layers: name -> module, as linear_layers() gives them.
        n_kept: rows of each layer's input that are kept, 0: none.
    """

    def __init__(self, layers: dict[str, Any], n_kept: int) -> None:
        self._modules = layers
        self._choice = first_choice(n_kept) if n_kept else None
        self._layers = {name: _Layer() for name in layers}
        self._hooks: list[Any] = []
        self._waiting: list[RecordedRows] = []
        self._n_waiting = 0  # bytes

    def __enter__(self) -> InputListener:
        for name, module in self._modules.items():
            hook = functools.partial(self._listen, self._layers[name])
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _listen(self, layer: _Layer, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        x = x.reshape(-1, x.shape[-1])  # (n_rows, n_columns)
        if layer.sums is None:
            layer.sums = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
            layer.rows = RecordedRows(self._choice) if self._choice else None
        add_squares(layer.sums, x)
        layer.n_rows += x.shape[0]
        if layer.rows is not None:
            self._offer(layer.rows, x)

    def _offer(self, rows: RecordedRows, x: torch.Tensor) -> None:
        n_bytes = rows.offer(x)
        if not n_bytes or x.device.type == "cpu":
            return
        self._waiting.append(rows)
        self._n_waiting += n_bytes
        if self._n_waiting > WAITING_BYTES:
            for each in self._waiting:
                each.store()
            self._waiting.clear()
            self._n_waiting = 0

    def results(self) -> dict[str, LayerInputs]:
        """What was seen, for each layer that was called.

        Raises:
            GGUFError: an input was not finite. A sum over it would make the layer's importance useless for good.
        """
        found, broken = {}, []
        for name, layer in self._layers.items():
            if layer.sums is None or not layer.n_rows:
                continue
            sums = layer.sums.cpu()
            if not bool(torch.isfinite(sums).all()):
                broken.append(name)
            found[name] = LayerInputs(sums, layer.n_rows, layer.rows.result() if layer.rows else None)
        if broken:
            raise GGUFError(
                f"the inputs of {len(broken)} layers had infinite values or NaN in this sampling: {name_list(broken)}",
                subject=broken[0],
                hint="Nothing of it is recorded; let the model compute in bfloat16 or float32.",
            )
        return found


def add_squares(sums: torch.Tensor, x: torch.Tensor) -> None:
    """Add the squares of x (n_rows, n_columns) of any float dtype, summed over the rows, to float32 (n_columns,)."""
    if x.device.type != "cpu":
        sums += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()  # one kernel, no temporary
        return
    n_rows = max(1, CHUNK // max(1, x.shape[1]))
    for part in (x,) if x.shape[0] <= n_rows else torch.split(x, n_rows):
        wide = part.float()
        sums += (wide * wide).sum(0)
