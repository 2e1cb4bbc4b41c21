# SPDX-License-Identifier: Apache-2.0
"""Models that are folders or several files: shards with an index, diffusers folders, a folder around one file.

Owns which files belong together; what is in a file is read by containers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import BadFile, name_list, plain_text
from ..models.split_files import PART_NAME
from .containers import KNOWN_FILES, Contents, Tensors, open_file

INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
MODEL_FOLDERS = ("transformer", "unet")  # of a diffusers model
MAX_JSON_BYTES = 2**26
MAX_SHARDS = 1000


def open_path(path: Path) -> Contents:
    """Open a file, an index of shards, or a folder.

    Raises:
        GGUFError: what it stands for cannot be found, or is damaged.
    """
    try:
        return _open_any(path)
    except OSError as error:
        problem = f"it cannot be opened: {error.strerror or error}"
        raise BadFile(problem, path=path, hint="Check its permissions and its disk.") from error


def _open_any(path: Path) -> Contents:
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    shard = PART_NAME.fullmatch(path.name)
    # Of GGUF parts any one stands for all: they say themselves what they are parts of.
    if shard and int(shard["n_parts"]) > 1 and shard["suffix"].lower() != ".gguf" and path.is_file():
        problem = f"this is one of {int(shard['n_parts'])} parts of a model"
        raise BadFile(problem, path=path, hint=f"Pass the folder or its *{INDEX_SUFFIX} instead.")
    return open_file(path)


def _open_folder(folder: Path) -> Contents:
    if (folder / "model_index.json").is_file():
        inner = next((folder / name for name in MODEL_FOLDERS if (folder / name).is_dir()), None)
        if inner is None:
            problem = "this diffusers folder has no transformer or unet folder"
            raise BadFile(problem, path=folder, hint="Download the diffusion model too.")
        contents = _open_folder(inner)
        note = f"the diffusion model was taken from the folder {inner.name}"
        second = inner.with_name(f"{inner.name}_2")
        if second.is_dir():
            note += f"; {second.name} holds a second one, which is converted by passing that folder"
        return Contents(contents.kind, contents.tensors, contents.metadata, (note, *contents.notes))
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    singles = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not indexes and not singles:
        indexes = sorted(folder.glob("*.index.json"))  # shards of PyTorch files
        singles = sorted(file for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES and file.is_file())
    found = indexes or singles
    if not found:
        raise BadFile("there is no model in this folder", path=folder, hint=KNOWN_FILES)
    if len(found) > 1:
        problem = f"there is more than one model in this folder: {name_list([file.name for file in found])}"
        hint = f"Pass the file that you mean, or download the *{INDEX_SUFFIX} if they are parts of one model."
        raise BadFile(problem, path=folder, hint=hint)
    return _open_index(found[0]) if indexes else open_file(found[0])


def _open_index(index: Path) -> Contents:
    """Open all shards of an index and check that they are what it lists."""
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        problem = f"{len(missing)} of the {len(files)} files that it lists are missing: {name_list(missing)}"
        raise BadFile(problem, path=index, hint="Download them into the same folder.")
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    owner: dict[str, str] = {}
    kind = ""
    for name in files:
        contents = open_file(index.parent / name)
        double = [key for key in contents.tensors if key in tensors]
        if double:
            problem = f"tensors are both in {plain_text(owner[double[0]])} and in {plain_text(name)}"
            hint = "The files are not of one model; download them again."
            raise BadFile(f"{problem}: {name_list(double)}", path=index, subject=double[0], hint=hint)
        owner |= dict.fromkeys(contents.tensors, name)
        tensors |= contents.tensors
        metadata = contents.metadata | metadata
        kind = contents.kind
    lost = [key for key, name in weight_map.items() if owner.get(key) != name]
    if lost:
        problem = f"{len(lost)} tensors are not in the file that it names for them: {name_list(lost)}"
        raise BadFile(problem, path=index, subject=lost[0], hint="The files are not of one model; download them again.")
    title = f"{kind} in {len(files)} files" if len(files) > 1 else kind
    return Contents(title, tensors, metadata)


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, as the index states it; names that leave the folder are refused."""
    weight_map: Any = None
    try:
        if index.stat().st_size <= MAX_JSON_BYTES:
            weight_map = json.loads(index.read_bytes())["weight_map"]
    except FileNotFoundError:
        raise BadFile("there is no such file", path=index, hint=f"Check the path {index}.") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        weight_map = None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        hint = "Download it again."
        raise BadFile("it is no index of shards: a JSON object with a weight_map is expected", path=index, hint=hint)
    files = sorted(set(weight_map.values()))
    odd = [name for name in files if not re.fullmatch(r"[^/\\:\x00]+\.\w+", name)]
    if odd or len(files) > MAX_SHARDS:
        problem = f"it names files outside its folder: {name_list(odd)}" if odd else f"it names {len(files)} files"
        raise BadFile(problem, path=index, hint="Do not use it; get the model from its original place.")
    return weight_map
