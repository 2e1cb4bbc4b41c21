# SPDX-License-Identifier: Apache-2.0
"""Remembers measured errors in a file, so that a measurement goes on after a kill and serves later runs.

One JSON object per line, appended when a tensor is done. Each is looked up by a digest of everything that decides the
numbers; so runs on other models, with other budgets or other types share a file, and several may write to it at once.
A line that was cut off or damaged is passed over: what it said is measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError
from .imatrix import Weighting
from .weight_samples import Estimate

# How every line begins, so that no other file is taken for a cache and appended to.
BEGINNING = b'{"gguf_kit": "tensor costs"'
MAX_LINE_BYTES = 2**16


class Encoding(NamedTuple):
    """A way to store a tensor."""

    qtype: QType
    weighting: Weighting


@dataclass(frozen=True)
class Measured:
    """What is known of one tensor.

    Attributes:
        energy: mean over the inputs x of |W x|^2.
        errors: the same of W - Wq for each encoding; None for one that cannot hold the tensor.
    """

    energy: float
    errors: Mapping[Encoding, Estimate | None] = field(default_factory=dict)


class CostsCache:
    """The records of one file. Without a path it remembers nothing.

    Raises:
        GGUFError: the file is something else, or cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: dict[str, Measured] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:  # refused now rather than after the first tensor
                file.seek(0)
                for key, measured in _read(file, path):
                    self._merge(key, measured)
        except OSError as error:
            raise _unusable(path, error) from error

    def get(self, key: str) -> Measured | None:
        """What the file says under this digest."""
        return self._records.get(key)

    def add(self, key: str, name: str, measured: Measured) -> None:
        """Append what was measured now; `name` is for people who read the file."""
        if self._path is None:
            return
        # The newline in front ends a line that a killed run has left unfinished.
        line = b"\n" + _line(key, name, measured) + b"\n"
        try:
            with open(self._path, "ab", buffering=0) as file:  # one write: lines of several runs do not mix
                n_written = file.write(line)
        except OSError as error:
            raise _unusable(self._path, error) from error
        if n_written != len(line):
            raise GGUFError("the disk is full", path=self._path, hint="Free some space and run it again.")
        self._merge(key, measured)

    def _merge(self, key: str, measured: Measured) -> None:
        known = self._records.get(key)
        self._records[key] = Measured(measured.energy, {**(known.errors if known else {}), **measured.errors})


def _unusable(path: Path, error: OSError) -> GGUFError:
    problem = f"the cache of measured costs cannot be used: {error.strerror}"
    return GGUFError(problem, path=path, hint="Name another file.")


def _line(key: str, name: str, measured: Measured) -> bytes:
    errors = {
        f"{encoding.qtype.name} {encoding.weighting.value}": estimate for encoding, estimate in measured.errors.items()
    }
    record = {"key": key, "name": name, "energy": measured.energy, "errors": errors}
    return BEGINNING + b", " + json.dumps(record)[1:].encode()


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[str, Measured]]:
    """The sound records of a file."""
    is_first = True
    while line := file.readline(MAX_LINE_BYTES):
        text = line.strip()
        if not text:
            continue
        if is_first and not text.startswith(BEGINNING[: len(text)]):  # the first line may have been cut off too
            raise GGUFError("this is no cache of measured costs", path=path, hint="Name another file.")
        is_first = False
        if text.startswith(BEGINNING) and (record := _parse(text)):
            yield record


def _parse(text: bytes) -> tuple[str, Measured] | None:
    """A record, or None for a line that is damaged or from another version."""
    try:
        record = json.loads(text, parse_int=float)
        errors = {_encoding(name): _estimate(numbers) for name, numbers in record["errors"].items()}
        return str(record["key"]), Measured(_number(record["energy"]), errors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _encoding(name: str) -> Encoding:
    qtype_name, weighting = name.split(" ")
    return Encoding(QType[qtype_name], Weighting(weighting))


def _estimate(numbers: list[float] | None) -> Estimate | None:
    if numbers is None:
        return None
    error, std_error = numbers
    return Estimate(_number(error), _number(std_error))


def _number(value: float) -> float:
    """A number as only a measurement gives it: finite and not negative."""
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise ValueError(value)
    return value
