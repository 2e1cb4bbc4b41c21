# SPDX-License-Identifier: Apache-2.0
"""Files that hold tensors, opened lazily under the names they have in them: safetensors, PyTorch, GGUF.

Owns how bytes become tensors and what is wrong with a file as a file; what the tensors mean is not known here. What a
file is follows from its content, never from its suffix. To add a container, add an opener and a line to open_file().
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from gguf.constants import GGMLQuantizationType as QType
from safetensors import SafetensorError, safe_open

from ..dequant import PLAIN_DTYPES
from ..errors import BadFile, UnsupportedQtype, name_list, plain_text
from ..gguf_file import GGUFFile
from ..gguf_header import DAMAGED
from ..mapped_file import map_file
from ..models.split_files import open_gguf, paths_of

Tensor = torch.Tensor

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
})  # fmt: skip
# First bytes of files that are often met under a model's name, what they are, and what to do.
MISTAKEN_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run 'git lfs pull', or download the file itself."),
    (b"<", "a web page", "Download the file again, logged in if its page asks for that."),
    (b'{"', "a JSON text", "Pass the model file that lies beside it."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it and pass the file inside."),
    (b"7z\xbc\xaf", "a 7-Zip archive", "Unpack it and pass the file inside."),
)
# Where training programs put the weights in a PyTorch file, the one to prefer first.
STATE_KEYS = ("state_dict", "model", "module", "ema", "model_state_dict", "params")
MAX_HEADER_BYTES = 10**8  # of safetensors; the library's own limit
MAX_STATE_DEPTH = 3  # dictionaries around the weights; a file can nest one in itself
MAX_DIMS = 16  # far above any model; torch itself stops at 64
# What the restricted unpickler and the zip reader are known to raise for a bad file.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, OSError,
    struct.error, AssertionError,
)  # fmt: skip
KNOWN_FILES = "Pass a .safetensors, .ckpt, .pt, .pth, .bin or 16-bit .gguf file, or a folder with such a model."


@dataclass(frozen=True)
class Blocks:
    """The bytes of a tensor that is quantized already.

    Attributes:
        qtype: how they are encoded.
        read: returns them, uint8, all blocks in the order of the weights, on any device.
    """

    qtype: QType
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is wanted.

    Attributes:
        dtype: precision that it has; read() may give a wider one.
        shape: torch order, as read() gives it.
        read: returns it on the CPU, contiguous; where nothing is computed a view of the mapped file.
        blocks: the same as it is quantized, or None.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    blocks: Blocks | None = None


Tensors = dict[str, StoredTensor]


@dataclass(frozen=True)
class Contents:
    """What one or several files hold.

    Attributes:
        kind: container, as users call it.
        tensors: by stored name, in file order.
        metadata: texts that the file carries.
        notes: sentences worth telling the user.
    """

    kind: str
    tensors: Tensors
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_file(path: Path) -> Contents:
    """Open one file, whatever it is called.

    Raises:
        BadFile: it cannot be read, is damaged, or is no container of tensors.
        UnsupportedQtype: it is a GGUF file that is quantized already.
    """
    if path.exists() and not path.is_file():
        raise BadFile("this is a device or pipe, not a file", path=path, hint=KNOWN_FILES)
    head = bytes(map_file(str(path))[:64])
    if head.startswith(b"GGUF"):
        return _open_gguf(path)
    if head[8:9] == b"{":  # before pickles, whose first bytes can also be the length of a header
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return _open_torch(path, is_zip=head.startswith(b"PK"))
    for mark, kind, hint in MISTAKEN_FILES:
        if head.lstrip().startswith(mark):
            raise BadFile(f"the file is {kind}, not a model", path=path, hint=hint)
    raise BadFile(f"the file starts with {head[:8]!r}, as no known model file does", path=path, hint=KNOWN_FILES)


def _open_safetensors(path: Path) -> Contents:
    """Open a safetensors file: the library judges the header, the data is mapped here.

    The library's own map for torch is refused by the system for files larger than memory.
    """
    buffer = map_file(str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        _fail_header(path, buffer, error)
    n_bytes = int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8 : 8 + n_bytes])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        offset = 8 + n_bytes + entry["data_offsets"][0]
        tensors[name] = _mapped_tensor(path, buffer, name, entry["dtype"], tuple(entry["shape"]), offset)
    return Contents("safetensors", tensors, metadata)


def _fail_header(path: Path, buffer: mmap.mmap, error: Exception) -> NoReturn:
    """Say what is wrong with a header that the library refused, most often a download that stopped."""
    n_missing = _announced_bytes(buffer) - len(buffer)
    if n_missing > 0:
        problem = f"the file is at least {n_missing} bytes short"
        raise BadFile(problem, path=path, hint="Download it again.") from error
    problem = f"its safetensors header is not sound ({plain_text(str(error).removesuffix('.'))})"
    raise BadFile(problem, path=path, hint=DAMAGED) from error


def _announced_bytes(buffer: mmap.mmap) -> int:
    """Size that a safetensors file should have by its header, as far as that makes sense; 0 if it makes none."""
    end = 8 + int.from_bytes(buffer[:8], "little")
    if end > MAX_HEADER_BYTES:
        return 0
    if end > len(buffer):
        return end
    try:
        header = json.loads(buffer[8:end])
        return end + max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return 0


def _mapped_tensor(
    path: Path, buffer: mmap.mmap, name: str, type_name: str, shape: tuple[int, ...], offset: int
) -> StoredTensor:
    if type_name not in SAFETENSORS_DTYPES:
        raise UnsupportedQtype(
            f"tensor '{plain_text(name)}' is stored as {plain_text(type_name)}",
            path=path,
            subject=name,
            hint="Take the 16-bit or the fp8 file of this model.",
        )
    _check_shape(path, name, shape)
    dtype = SAFETENSORS_DTYPES[type_name]

    def read() -> Tensor:
        if not prod(shape):  # frombuffer refuses empty views
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # old files do not pad their header, and not every CPU reads across words
            data = torch.frombuffer(buffer, dtype=torch.uint8, count=prod(shape) * dtype.itemsize, offset=offset)
            return data.clone().view(dtype).reshape(shape)
        return torch.frombuffer(buffer, dtype=dtype, count=prod(shape), offset=offset).reshape(shape)

    return StoredTensor(dtype, shape, read)


def _check_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    # torch multiplies all dimensions into strides even where one is 0 and the tensor empty.
    if len(shape) > MAX_DIMS or prod(n for n in shape if n) >= 2**63:
        problem = f"tensor '{plain_text(name)}' has a shape of {len(shape)} dimensions that no tensor can have"
        raise BadFile(problem, path=path, subject=name, hint=DAMAGED)


def _open_gguf(path: Path) -> Contents:
    """Open a GGUF file whose tensors are all floats or integers."""
    file = open_gguf(path)
    quantized = [name for name, info in file.tensors.items() if info.qtype not in PLAIN_DTYPES]
    if quantized:
        qtypes = sorted({file.tensors[name].qtype.name for name in quantized})
        raise UnsupportedQtype(
            f"it is already quantized as {name_list(qtypes)}, and every further quantization adds error",
            path=path,
            subject=quantized[0],
            hint="Start from the original: a safetensors file, or a GGUF in BF16, F16 or F32.",
        )
    tensors: Tensors = {}
    for name, info in file.tensors.items():
        dtype, shape = PLAIN_DTYPES[info.qtype], file.logical_shape(name)
        _check_shape(path, name, shape)
        tensors[name] = StoredTensor(dtype, shape, _gguf_reader(file, name, dtype, shape))
    n_files = len(paths_of(file))
    title = f"GGUF in {n_files} files" if n_files > 1 else "GGUF"
    return Contents(title, tensors, file.carried_metadata())


def _gguf_reader(file: GGUFFile, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        data = file.data(name)
        return data.view(dtype).reshape(shape) if data.numel() else torch.empty(shape, dtype=dtype)

    return read


def _open_torch(path: Path, is_zip: bool) -> Contents:
    """Open a file of torch.save: mapped where it is a zip archive, read into memory where it is the older format."""
    if path.suffix == ".safetensors":  # torch.load goes by this suffix
        problem = "it is a PyTorch file under the name of a safetensors file"
        raise BadFile(problem, path=path, hint="Rename it to .ckpt, or get the real safetensors file.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNPICKLING_ERRORS as error:
        _fail_unpickling(path, error)
    state, label, n_others = _find_state(saved)
    if not state:
        if isinstance(saved, Mapping) and "param_groups" in saved:
            problem, hint = "it holds the state of an optimizer, no weights", "Pass the model that lies beside it."
        else:
            problem, hint = "it is a PyTorch file without any weights by name", KNOWN_FILES
        raise BadFile(problem, path=path, hint=hint)
    notes = []
    if n_others:
        notes.append(f"the weights under '{label}' were taken; {n_others} other sets of weights in the file left out")
    if not is_zip:
        notes.append("the file is in PyTorch's older format, which has to be read into memory as a whole")
    tensors = {name: _loaded_tensor(path, name, tensor) for name, tensor in state.items()}
    return Contents("PyTorch checkpoint", tensors, notes=tuple(notes))


def _fail_unpickling(path: Path, error: Exception) -> NoReturn:
    """Say why torch.load refused a file. It is never read in a way that could run code from it."""
    text = str(error)
    blocked = re.search(r"GLOBAL (\S+)", text)
    if blocked:
        problem = f"it holds Python objects ({plain_text(blocked[1])}) beside the weights, which could run code"
        raise BadFile(problem, path=path, hint="Take the .safetensors file of this model.") from error
    if "mmap" in text and "allocate" in text:
        problem = "a PyTorch file of this size does not fit into this computer's memory"
        raise BadFile(problem, path=path, hint="Take the .safetensors file of this model.") from error
    if "TorchScript" in text:
        problem = "it is a TorchScript program, not a file of weights"
        raise BadFile(problem, path=path, hint="Take the .safetensors file of this model.") from error
    reason = plain_text(text.split("\n")[0].split(". ")[0]) or type(error).__name__
    raise BadFile(f"it cannot be read as a PyTorch file ({reason})", path=path, hint=DAMAGED) from error


def _find_state(saved: Any, depth: int = 0) -> tuple[dict[str, Tensor], str, int]:
    """The state dict in what was saved, the key it lay under, and the number of other ones beside it."""
    if not isinstance(saved, Mapping) or depth > MAX_STATE_DEPTH:
        return {}, "", 0
    flat = {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)}
    inner = {key: value for key, value in saved.items() if isinstance(value, Mapping) and _holds_tensors(value)}
    wanted = next((key for key in STATE_KEYS if key in inner), None)
    if wanted is None and not flat and len(inner) == 1:
        wanted = next(iter(inner))
    if wanted is None:
        return flat, "", 0
    return _find_state(inner[wanted], depth + 1)[0], str(wanted), len(inner) - 1


def _holds_tensors(saved: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(key, str) and (isinstance(value, Tensor) or (key in STATE_KEYS and isinstance(value, Mapping)))
        for key, value in saved.items()
    )


def _loaded_tensor(path: Path, name: str, tensor: Tensor) -> StoredTensor:
    tensor = tensor.detach()
    n_bytes = tensor.numel() * tensor.element_size()
    # A stride of 0 lets a few bytes pose as terabytes.
    if tensor.layout is not torch.strided or tensor.is_quantized or n_bytes > tensor.untyped_storage().nbytes():
        problem = f"tensor '{plain_text(name)}' is not stored as plain numbers of its shape"
        raise BadFile(problem, path=path, subject=name, hint="Take the .safetensors file of this model.")
    return StoredTensor(tensor.dtype, tuple(tensor.shape), tensor.contiguous)
