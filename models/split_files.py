# SPDX-License-Identifier: Apache-2.0
"""Models split over several GGUF files, as if they were one; any of the parts may be the one that is opened.

Owns how the parts are named and what makes them parts of one model. The first part has the metadata, every part has
tensors. Source: llama.cpp tools/gguf-split/gguf-split.cpp, src/llama.cpp llama_split_path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from types import MappingProxyType

import torch

from ..errors import BadFile, name_list, plain_text
from ..gguf_file import GGUFFile

# Of llama.cpp's parts and of the shards of other programs.
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<n_parts>\d{5})(?P<suffix>\.\w+)", re.DOTALL)
_MIXED = "The parts are not of one model; download them again."


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, together with the other parts if it is one of several.

    Raises:
        GGUFError: it is damaged, a part is missing, or the parts are not of one model.
    """
    file = GGUFFile(path)
    n_parts = _number(file, "split.count")
    return SplitFile(file, _open_parts(file, n_parts)) if n_parts > 1 else file


def first_part(name: str) -> str:
    """Name or path of the part that comes first where `name` is that of a later part of a split file, else `name`."""
    part = PART_NAME.fullmatch(name)
    return name if part is None else _part_name(part, 1)


def without_later_parts(names: Iterable[str]) -> list[str]:
    """The names without those of later parts of split files; a part whose first part is not among them stays."""
    present = dict.fromkeys(names)
    return [name for name in present if first_part(name) == name or first_part(name) not in present]


def present_parts(path: str) -> list[str]:
    """Paths of all parts that are there of the split file that a path is a part of by its name; else the path alone."""
    folder, name = os.path.split(path)
    part = PART_NAME.fullmatch(name)
    if part is None:
        return [path]
    present = {*os.listdir(folder or os.curdir)}
    names = (_part_name(part, number) for number in range(1, int(part["n_parts"]) + 1))
    return [os.path.join(folder, name) for name in names if name in present] or [path]


def _part_name(part: re.Match[str], number: int) -> str:
    """Name of another part, given that of one; numbers count from 1."""
    return f"{part['stem']}-{number:05d}-of-{part['n_parts']}{part['suffix']}"


def paths_of(file: GGUFFile) -> list[str]:
    """Paths of all parts of an open file, the first part first; of a file that is not split its own."""
    return [part.path for part in file.parts] if isinstance(file, SplitFile) else [file.path]


class SplitFile(GGUFFile):
    """The parts of one model with the surface of one file.

    Attributes:
        path: of the part that was chosen.
        version, metadata: those of the first part.
        tensors: name -> TensorInfo of all parts, in their order; an offset counts within the tensor's own part.
        parts: the open files, the first part first.
    Raises:
        BadFile: a tensor is in two parts, or there are not as many as the parts announce.
    """

    def __init__(self, chosen: GGUFFile, parts: Sequence[GGUFFile]) -> None:
        first = parts[0]
        self.path, self.version, self.metadata, self._buffer = chosen.path, first.version, first.metadata, first._buffer
        self.parts = tuple(parts)
        self._owners: dict[str, GGUFFile] = {}
        for part in parts:
            double = [name for name in part.tensors if name in self._owners]
            if double:
                other = os.path.basename(self._owners[double[0]].path)
                problem = f"{len(double)} of its tensors are in {plain_text(other)} too: {name_list(double)}"
                raise BadFile(problem, path=part.path, subject=double[0], hint=_MIXED)
            self._owners |= dict.fromkeys(part.tensors, part)
        self.tensors = MappingProxyType({name: part.tensors[name] for name, part in self._owners.items()})
        announced = _number(chosen, "split.tensors.count", len(self.tensors))
        if announced != len(self.tensors):
            problem = f"its {len(parts)} parts hold {len(self.tensors)} tensors, expected {announced}"
            raise BadFile(problem, path=self.path, subject="split.tensors.count", hint=_MIXED)

    def data(self, name: str) -> torch.Tensor:
        """Return the tensor's bytes, 1-D uint8 (n_bytes,), from the part that has it; see GGUFFile.data."""
        return self._owners[name].data(name)


def _open_parts(chosen: GGUFFile, n_parts: int) -> list[GGUFFile]:
    """All parts in order; names and what the parts say of themselves must agree."""
    number = _number(chosen, "split.no", -1)
    folder, name = os.path.split(chosen.path)
    named = PART_NAME.fullmatch(name)
    about = f"it is part {number + 1} of {n_parts} of a split file"
    if named is None or (int(named["number"]) - 1, int(named["n_parts"])) != (number, n_parts):
        problem = f"{about}, and its name does not say so"
        expected = f"-{number + 1:05d}-of-{n_parts:05d}.gguf"
        hint = f"Give it back a name that ends in {expected}, and the other parts theirs."
        raise BadFile(problem, path=chosen.path, subject="split.no", hint=hint)
    parts = []
    for i in range(n_parts):
        part_name = _part_name(named, i + 1)
        path = os.path.join(folder, part_name)
        if i != number and not os.path.isfile(path):
            problem = f"{about}, and {plain_text(part_name)} is missing"
            raise BadFile(problem, path=chosen.path, subject=part_name, hint="Put all parts into one folder.")
        parts.append(chosen if i == number else _open_part(path, i, n_parts))
    return parts


def _open_part(path: str, number: int, n_parts: int) -> GGUFFile:
    part = GGUFFile(path)
    found = _number(part, "split.no", -1), _number(part, "split.count")
    if found != (number, n_parts):
        is_part = f"part {found[0] + 1} of {found[1]}" if found[1] else "no part of a split file"
        problem = f"it is {is_part}, expected part {number + 1} of {n_parts}"
        raise BadFile(problem, path=path, subject="split.no", hint=_MIXED)
    return part


def _number(file: GGUFFile, key: str, default: int = 0) -> int:
    """A whole number of the metadata; `default` where there is none or it is something else."""
    value = file.metadata[key] if key in file.metadata and file.metadata.n_items(key) == 1 else default
    return value if type(value) is int else default
