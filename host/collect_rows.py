# SPDX-License-Identifier: Apache-2.0
"""Which rows of a layer's inputs are kept while a model runs: evenly spread over all calls and over all of a call.

Each call offers rows at even distances. Every row offered has a rank, the same in every run: its number times the
golden ratio, modulo 1. Those with the lowest ranks are kept. The ranks of any regular part of the numbers are spread
evenly as well, so that early and late steps, and prompts that take turns, all have their share. Calls that are still
expected have their room kept free, so that few rows are taken in vain.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = (5**0.5 - 1) / 2
MOST_AHEAD = 64  # calls for which room is kept free


class Choice:
    """Which rows are kept after some calls. Layers whose inputs have had as many rows share it, and what comes next.

    Attributes:
        most: how many rows are kept.
        numbers: int64 (n,) numbers of the rows that are kept, among all that were offered, ascending.
    """

    def __init__(self, most: int, numbers: np.ndarray, n_calls: int, n_expected: int) -> None:
        self.most = most
        self.numbers = numbers
        self._n_calls = n_calls
        self._n_expected = n_expected
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
        ahead = np.arange(self._n_calls + 1, self._n_expected, dtype=np.int64) * self.most
        numbers = np.concatenate([self.numbers, at + first, np.add.outer(ahead, at).ravel()])
        if len(numbers) > self.most:
            ranks = numbers * GOLDEN % 1
            numbers = np.sort(numbers[np.argpartition(ranks, self.most - 1)[: self.most]])
        numbers = numbers[numbers < first + self.most]
        taken = numbers[numbers >= first]
        after = Choice(self.most, numbers, self._n_calls + 1, self._n_expected)
        return after, torch.from_numpy(rows[taken - first]), taken


def first_choice(most: int, n_expected: int = 0) -> Choice:
    """Nothing yet, and room for so many rows.

    Args:
        n_expected: calls that every layer will have, about. If they are more the rows are as evenly spread; if they are
            fewer, rows are missing.
    """
    return Choice(most, np.empty(0, dtype=np.int64), 0, min(n_expected, MOST_AHEAD))


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
        if x.device.type == "cpu":
            found = x.index_select(0, indices)
        else:  # one by one: an index tensor would be copied to the device, which waits for all that it has to do
            found = torch.stack([x[i] for i in indices.tolist()]).to(torch.bfloat16)
        self._parts.append(found)
        self._numbers.append(numbers)
        self._n_rows += len(numbers)
        if self._n_rows > 2 * self._choice.most:
            self._drop_others()
        return found.nbytes

    def store(self) -> None:
        """Bring what is on a device to the CPU."""
        self._parts = [part.cpu() for part in self._parts]

    def _drop_others(self) -> None:
        self.store()
        rows, numbers = torch.cat(self._parts).to(torch.bfloat16), np.concatenate(self._numbers)
        if len(numbers) > len(self._choice.numbers):
            chosen = np.isin(numbers, self._choice.numbers)
            rows, numbers = rows[torch.from_numpy(chosen)], numbers[chosen]
        self._parts, self._numbers, self._n_rows = [rows], [numbers], len(numbers)

    def result(self) -> torch.Tensor | None:
        """bfloat16 (n_rows, n_columns) on the CPU, in the order in which the model saw them; None if there are none."""
        if self._parts:
            self._drop_others()
        return self._parts[0] if self._parts else None
