# SPDX-License-Identifier: Apache-2.0
"""Which rows of a layer's inputs are kept while a model runs: evenly spread over all calls and over all of a call.

Each call offers rows at even distances. Every row offered has a rank, the same in every run: its number times the
golden ratio, modulo 1. Those with the lowest ranks are kept. The ranks of any regular part of the numbers are spread
evenly as well, so that early and late steps, and prompts that take turns, all have their share.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = (5**0.5 - 1) / 2


class Choice:
    """Which rows are kept after some calls. Layers whose inputs have had as many rows share it, and what comes next.

    Attributes:
        most: how many rows are kept.
        numbers: int64 (n,) numbers of the rows that are kept, among all that were offered, ascending.
    """

    def __init__(self, most: int, numbers: np.ndarray, n_calls: int = 0) -> None:
        self.most = most
        self.numbers = numbers
        self._n_calls = n_calls
        self._next: dict[int, tuple[Choice, torch.Tensor, np.ndarray]] = {}

    def after(self, n_rows: int) -> tuple[Choice, torch.Tensor, np.ndarray]:
        """What a call with so many rows changes.

        Returns:
            the choice after it, int64 (n,) rows of the call that are kept, ascending, and int64 (n,) their numbers.
        """
        if n_rows not in self._next:
            self._next[n_rows] = self._after(n_rows)
        return self._next[n_rows]

    def _after(self, n_rows: int) -> tuple[Choice, torch.Tensor, np.ndarray]:
        n = min(self.most, n_rows)
        at = np.arange(n, dtype=np.int64)
        start = self._n_calls * GOLDEN % 1  # other places in every call
        rows = ((at + start) * (n_rows / max(n, 1))).astype(np.int64)
        first = self._n_calls * self.most
        numbers = np.concatenate([self.numbers, at + first])
        if len(numbers) > self.most:
            ranks = numbers * GOLDEN % 1
            numbers = np.sort(numbers[np.argpartition(ranks, self.most - 1)[: self.most]])
        taken = numbers[numbers >= first]
        return Choice(self.most, numbers, self._n_calls + 1), torch.from_numpy(rows[taken - first]), taken


def first_choice(most: int) -> Choice:
    """Nothing yet, and room for so many rows."""
    return Choice(most, np.empty(0, dtype=np.int64))


class RecordedRows:
    """Rows of one layer's inputs, bfloat16.

    Args:
        choice: before the first call, the same for all layers of a model.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._parts: list[torch.Tensor] = []  # (n, n_columns) each, in the order of calls; some rows no longer chosen
        self._numbers: list[np.ndarray] = []
        self._n_rows = 0

    def offer(self, x: torch.Tensor) -> int:
        """Take what is to be kept of x (n_rows, n_columns); returns its bytes, on x's device until store()."""
        self._choice, indices, numbers = self._choice.after(x.shape[0])
        if not len(numbers):
            return 0
        # One by one on a GPU: an index tensor would be copied there, which waits for all that it has to do.
        on_cpu = x.device.type == "cpu"
        found = x.index_select(0, indices) if on_cpu else torch.stack([x[i] for i in indices.tolist()])
        self._parts.append(found.to(torch.bfloat16))
        self._numbers.append(numbers)
        self._n_rows += len(numbers)
        if self._n_rows > 2 * self._choice.most:
            self._drop_others()
        return self._parts[-1].nbytes

    def store(self) -> None:
        """Bring what is on a device to the CPU."""
        self._parts = [part.cpu() for part in self._parts]

    def _drop_others(self) -> None:
        self.store()
        numbers = np.concatenate(self._numbers)
        chosen = np.isin(numbers, self._choice.numbers)
        self._parts, self._numbers = [torch.cat(self._parts)[torch.from_numpy(chosen)]], [numbers[chosen]]
        self._n_rows = len(self._numbers[0])

    def result(self) -> torch.Tensor:
        """bfloat16 (n_rows, n_columns) on the CPU, in the order in which the model saw them."""
        self._drop_others()
        return self._parts[0]
