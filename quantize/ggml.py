# SPDX-License-Identifier: Apache-2.0
"""ggml's own quantizer, called in process: where its library lies, and what it can encode.

Owns the ctypes binding and the names of builds in the cache. It never compiles: tools/llama_cpp/build.py makes what
find_library() finds.
Source: llama.cpp b11434, ggml/include/ggml.h (ggml_quantize_chunk, ggml_quantize_init, ggml_quantize_requires_imatrix).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import sys
import threading
from pathlib import Path
from typing import ClassVar

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from ..errors import GGUFError, UnsupportedQtype

BUILD_FOLDER = Path(__file__).resolve().parents[1] / "tools" / "llama_cpp"
# Every file that decides what a build computes, so that a build of other ones is never taken for this one.
DECIDING_FILES = ("pinned.json", "llama_cpp.patch", "golden.json")
LIBRARY_NAMES = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}

_NAMES = (
    "Q1_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4 "
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
).split()
# An older gguf-py does not know the newest types.
ENCODABLE: frozenset[QType] = frozenset(QType[name] for name in _NAMES if name in QType.__members__)
_NEED_IMATRIX = frozenset({QType.IQ1_S, QType.IQ2_XXS, QType.IQ2_XS})
# ggml ends the process when the search of an IQ code book meets an overflow, so larger inputs are refused here.
MAX_IQ_WEIGHT = 2.0**20
MAX_IQ_IMPORTANCE = 2.0**40


class BuildError(GGUFError):
    """ggml or llama-quantize cannot be built, or a build does not compute what it must."""


def cache_folder() -> Path:
    """Folder for builds and downloads, not made here: $GGUF_KIT_CACHE, else gguf-kit in the system's cache folder."""
    named = os.environ.get("GGUF_KIT_CACHE")
    if named:
        return Path(named).expanduser().resolve()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gguf-kit"


def build_key(folder: Path = BUILD_FOLDER) -> str:
    """Name part of a build: system, machine and a hash of everything that decides what it computes.

    Raises:
        BuildError: the files of tools/llama_cpp are not there.
    """
    digest = hashlib.sha256()
    try:
        for name in DECIDING_FILES:
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes().replace(b"\r\n", b"\n"))
    except OSError as error:
        raise BuildError(
            f"cannot read {name}: {error.strerror}", path=folder, hint="Install the pack again, with its tools folder."
        ) from error
    return f"{sys.platform}-{platform.machine().lower()}-{digest.hexdigest()[:16]}"


def library_path() -> Path:
    """Where an accepted build of this version lies, or would lie."""
    return cache_folder() / f"ggml-{build_key()}" / LIBRARY_NAMES.get(sys.platform, "libggml-base.so")


def find_library() -> Path | None:
    """An accepted build of exactly this version, or None. Builds nothing."""
    if not BUILD_FOLDER.is_dir():
        return None
    path = library_path()
    return path if path.is_file() else None


def requires_imatrix(qtype: QType) -> bool:
    """Whether ggml refuses to encode a type without importance. Source: ggml.c ggml_quantize_requires_imatrix."""
    return qtype in _NEED_IMATRIX


@functools.cache
def _load(path: str) -> ctypes.CDLL:
    """The library with the signatures of the functions used here; ctypes releases the GIL during a call."""
    try:
        library = ctypes.CDLL(path)
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,  # type
            ctypes.c_void_p,  # weights
            ctypes.c_void_p,  # out
            ctypes.c_int64,  # first weight
            ctypes.c_int64,  # rows
            ctypes.c_int64,  # columns
            ctypes.c_void_p,  # importance
        ]
    except (OSError, AttributeError) as error:
        raise BuildError(
            f"the library cannot be used: {error}",
            path=path,
            hint="Delete its folder and convert again, or use --engine torch.",
        ) from error
    return library


class Ggml:
    """Encodes rows of weights with one ggml library; may be called from many threads at once.

    Attributes:
        path: the shared library.
        ENCODABLE: every type that quantize() takes.
    """

    ENCODABLE: ClassVar[frozenset[QType]] = ENCODABLE

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            BuildError: it cannot be loaded, or is no ggml.
        """
        self.path = path
        self._library = _load(str(path))
        self._lock = threading.Lock()
        self._ready: set[QType] = set()

    def quantize(self, weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None, out: torch.Tensor) -> None:
        """Encode whole rows; the bytes are those of ggml_quantize_chunk, whatever the number of rows in a call.

        Args:
            weights: float32 (n_rows, n_columns) on the CPU, contiguous; n_columns a multiple of the block size.
            qtype: one of ENCODABLE.
            importance: float32 (n_columns,) on the CPU, contiguous, not negative; None for none.
            out: uint8 (n_rows, n_columns / block_size * type_size) on the CPU, contiguous; is written.
        Raises:
            UnsupportedQtype: ggml cannot encode the type, or not without importance.
            GGUFError: an IQ type and values that its code-book search cannot take.
            ValueError: a tensor of another shape, dtype or device.
            BuildError: the library wrote another number of bytes than it should.
        """
        _check_tensors(weights, qtype, importance, out)
        if not out.numel():
            return
        self._prepare(qtype)
        written = self._library.ggml_quantize_chunk(
            qtype.value,
            weights.data_ptr(),
            out.data_ptr(),
            0,
            *weights.shape,
            None if importance is None else importance.data_ptr(),
        )
        if written != out.numel():
            raise BuildError(f"ggml wrote {written} bytes of {qtype.name}, expected {out.numel()}", path=self.path)

    def _prepare(self, qtype: QType) -> None:
        """Let ggml make a type's search tables once, which takes seconds for IQ1 and IQ2, not in each thread."""
        if qtype not in self._ready:
            with self._lock:
                self._library.ggml_quantize_init(qtype.value)
                self._ready.add(qtype)


def _check_tensors(weights: torch.Tensor, qtype: QType, importance: torch.Tensor | None, out: torch.Tensor) -> None:
    """Refuse what would make ggml read or write elsewhere, or end the process."""
    if qtype not in ENCODABLE:
        raise UnsupportedQtype(f"ggml cannot encode {qtype.name}", hint="Choose another type.")
    if importance is None and requires_imatrix(qtype):
        raise UnsupportedQtype(f"{qtype.name} needs an importance matrix", hint="Give one with --imatrix.")
    if weights.ndim != 2:
        raise ValueError(f"weights have {weights.ndim} dimensions, expected 2")
    n_rows, n_columns = weights.shape
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    if n_columns % block_size:
        raise ValueError(f"{n_columns} columns are no multiple of the block size {block_size} of {qtype.name}")
    _check_tensor("weights", weights, torch.float32, (n_rows, n_columns))
    _check_tensor("out", out, torch.uint8, (n_rows, n_columns // block_size * type_size))
    if importance is not None:
        _check_tensor("importance", importance, torch.float32, (n_columns,))
    if qtype.name.startswith("IQ") and weights.numel():
        _check_range("weights", weights, -MAX_IQ_WEIGHT, MAX_IQ_WEIGHT, qtype)
        if importance is not None:
            _check_range("importances", importance, 0.0, MAX_IQ_IMPORTANCE, qtype)


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose memory is not what ggml is told it is."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU")


def _check_range(name: str, tensor: torch.Tensor, low: float, high: float, qtype: QType) -> None:
    """Refuse values outside a range, NaN too."""
    smallest, largest = (float(value) for value in torch.aminmax(tensor))
    if not (low <= smallest and largest <= high):
        raise GGUFError(
            f"{name} from {smallest:g} to {largest:g} cannot be encoded as {qtype.name}, expected {low:g} to {high:g}",
            hint="Keep this tensor in 16 bit.",
        )
