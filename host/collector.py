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
from .collect_calls import REPEATING
from .collect_rows import RecordedRows, first_choice

PLACES = 1 << 17  # sums of a layer on a CPU, so few that they stay in its cache
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

    def __init__(self, rows: RecordedRows | None) -> None:
        self.squares = SquareSums()
        self.n_rows = 0
        self.rows = rows


class InputListener:
    """A context manager that listens to the layers of a network.

    Args:
        layers: name -> module, as linear_layers() gives them.
        n_kept: rows of each layer's input that are kept, 0: none.
        n_calls: as first_choice() expects them.
    """

    def __init__(self, layers: dict[str, Any], n_kept: int, n_calls: int = 0) -> None:
        self._modules = layers
        choice = first_choice(n_kept, n_calls)
        self._layers = {name: _Layer(RecordedRows(choice) if n_kept else None) for name in layers}
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
        if REPEATING.get():
            return
        x = input_of(args, kwargs)
        x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (n_rows, n_columns)
        if not x.numel():
            return
        layer.squares.add(x)
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
            if not layer.n_rows:
                continue
            sums = layer.squares.total()
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


class SquareSums:
    """Sums of the squares of a layer's inputs, column by column.

    On a CPU each of some rows has sums of its own, to which a call adds its squares in one operation.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # float32 (n, n_columns), the sums of which are wanted

    def add(self, x: torch.Tensor) -> None:
        """Add the squares of x (n_rows, n_columns) of any float dtype."""
        if x.device.type != "cpu":
            squares = torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=torch.float32).square_()  # no temporary
            self._sums = squares if self._sums is None else self._sums.add_(squares)
            return
        n_rows = min(x.shape[0], max(1, PLACES // x.shape[1]))
        if self._sums is None or len(self._sums) < n_rows:
            before, self._sums = self._sums, torch.zeros(n_rows, x.shape[1], dtype=torch.float32)
            if before is not None:
                self._sums[: len(before)] = before
        sums = self._sums
        for part in (x,) if len(x) <= len(sums) else torch.split(x, len(sums)):
            wide = part.float()
            (sums if len(part) == len(sums) else sums[: len(part)]).addcmul_(wide, wide)

    def total(self) -> torch.Tensor:
        """float32 (n_columns,) on the CPU, of what was added."""
        if self._sums is None:
            raise ValueError("nothing was added")
        return self._sums.cpu().double().sum(0).float()
