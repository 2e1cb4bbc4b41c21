# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored in fewer than 16 bits: fp8 becomes what it stands for, every other format is refused.

Owns the names by which quantized safetensors files are known. An fp8 weight alone is widened to bfloat16, which holds
every fp8 value; one with a scale is weight * scale in float32.
Source: ComfyUI comfy/utils.py convert_old_quants, comfy/ops.py _load_quantized_module, comfy/quant_ops.py (0.33).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from ..errors import BadFile, UnsupportedQtype, plain_text
from .containers import Contents, StoredTensor, Tensor, Tensors

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
FP8_FORMATS = frozenset({"float8_e4m3fn", "float8_e5m2"})  # of comfy_quant
SCALE_SUFFIXES = (".weight_scale", ".scale_weight", ".weight_scale_inv")
INPUT_SUFFIXES = (".input_scale", ".scale_input")  # for activations; of no use without fp8 arithmetic
FILE_MARKER = "scaled_fp8"
LAYER_MARKER = ".comfy_quant"  # a JSON text as uint8
QUANT_METADATA = "_quantization_metadata"
MAX_MARKER_BYTES = 4096

# Names that only one format has, in the order in which they are looked for.
FOREIGN_FORMATS = (
    ("bitsandbytes", re.compile(r".*\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB)")),
    ("SVDQuant (nunchaku)", re.compile(r".*\.(wscales|wtscale|wcscales|smooth_factor|proj_down)")),
    ("GPTQ or AWQ", re.compile(r".*\.(qweight|qzeros|g_idx)")),
    ("quanto", re.compile(r".*\.weight\._(data|scale|shift)")),
    ("nvfp4", re.compile(r".*\.weight_scale_2")),
    ("int4 with group scales", re.compile(r".*\.weight_(s_rel|s_channel|codebook)")),
)


def add_layer_markers(contents: Contents, path: Path) -> Tensors:
    """The tensors, with a marker for each layer that the metadata instead of a marker says is quantized."""
    text = contents.metadata.get(QUANT_METADATA)
    if text is None:
        return contents.tensors
    try:
        layers = json.loads(text)["layers"]
        markers = {f"{layer}{LAYER_MARKER}": json.dumps(config).encode() for layer, config in layers.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"metadata key '{QUANT_METADATA}' is not a JSON object with layers"
        raise BadFile(problem, path=path, subject=QUANT_METADATA, hint="Take the 16-bit file of this model.") from error
    return contents.tensors | {name: _marker(raw) for name, raw in markers.items()}


def _marker(raw: bytes) -> StoredTensor:
    return StoredTensor(torch.uint8, (len(raw),), lambda: torch.tensor(list(raw), dtype=torch.uint8))


def undo_fp8(path: Path, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Replace fp8 weights and their scales by float weights; what is to be told about it.

    Raises:
        UnsupportedQtype: the file is quantized in another format.
        BadFile: a scale does not fit its weight.
    """
    _refuse_formats(path, tensors)
    is_fp8 = FILE_MARKER in tensors or any(t.dtype in FP8_DTYPES for t in tensors.values())
    scales = _find_scales(path, tensors, is_fp8)
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name in scales:
            out[name] = _scaled(path, name, tensor, scales[name])
        elif not _is_auxiliary(name, tensors, is_fp8):
            out[name] = _widened(tensor) if tensor.dtype in FP8_DTYPES else tensor
    n_fp8 = sum(tensors[name].dtype in FP8_DTYPES for name in out)
    notes = []
    if scales:
        notes.append(f"fp8 scales applied to {len(scales)} weights")
    if n_fp8:
        notes.append(f"{n_fp8} weights are fp8 in the source; its 16-bit file would give a better model")
    return out, tuple(notes)


def _refuse_formats(path: Path, tensors: Tensors) -> None:
    for title, pattern in FOREIGN_FORMATS:
        found = [name for name in tensors if pattern.fullmatch(name)]
        if found:
            _refuse(path, title, found)
    by_format: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if name.endswith(LAYER_MARKER):
            by_format.setdefault(_read_format(path, name, tensor), []).append(name.removesuffix(LAYER_MARKER))
    for title in sorted(by_format.keys() - FP8_FORMATS):
        _refuse(path, title, by_format[title])
    for name, tensor in tensors.items():
        is_matrix = name.endswith(".weight") and len(tensor.shape) > 1
        if is_matrix and tensor.dtype in (torch.int8, torch.uint8):
            _refuse(path, "int8" if tensor.dtype is torch.int8 else "packed 4-bit", [name])
        scale = next((tensors[n] for n in _scale_names(name) if n in tensors), None)
        if tensor.dtype is torch.float8_e8m0fnu or (scale is not None and not scale.dtype.is_floating_point):
            _refuse(path, "mxfp8", [name])


def _refuse(path: Path, title: str, layers: list[str]) -> NoReturn:
    problem = f"it is already quantized as {plain_text(title)} (for example {plain_text(layers[0])})"
    hint = "Take the 16-bit or the fp8 file of this model."
    raise UnsupportedQtype(problem, path=path, subject=layers[0], hint=hint)


def _read_format(path: Path, name: str, marker: StoredTensor) -> str:
    """The format that a layer's marker names."""
    config: Any = None
    if marker.dtype is torch.uint8 and prod(marker.shape) <= MAX_MARKER_BYTES:
        try:
            config = json.loads(bytes(marker.read().tolist()))
        except (ValueError, TypeError, RecursionError):
            config = None
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        problem = f"tensor '{plain_text(name)}' is not the JSON text that names a format"
        raise BadFile(problem, path=path, subject=name, hint="Take the 16-bit file of this model.")
    return str(config["format"])


def _scale_names(name: str) -> list[str]:
    layer = name.removesuffix(".weight")
    return [f"{layer}{suffix}" for suffix in SCALE_SUFFIXES] if layer != name else []


def _find_scales(path: Path, tensors: Tensors, is_fp8: bool) -> dict[str, StoredTensor]:
    """Name of a weight to its scale."""
    scales: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in SCALE_SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            continue
        weight = f"{name.removesuffix(suffix)}.weight"
        if weight in tensors and weight not in scales:
            scales[weight] = tensor
        elif weight in scales or is_fp8:
            problem = f"scale '{plain_text(name)}' " + ("has no weight" if weight not in tensors else "is a second one")
            raise BadFile(problem, path=path, subject=name, hint="Take the 16-bit file of this model.")
    return scales


def _is_auxiliary(name: str, tensors: Tensors, is_fp8: bool) -> bool:
    """Whether a tensor only says how another one is stored."""
    if name == FILE_MARKER or name.endswith(LAYER_MARKER):
        return True
    for suffix in (*SCALE_SUFFIXES, *INPUT_SUFFIXES):
        if name.endswith(suffix):
            weight = f"{name.removesuffix(suffix)}.weight"
            return weight in tensors and (suffix in SCALE_SUFFIXES or is_fp8)
    return False


def _widened(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(torch.bfloat16, tensor.shape, lambda: _decode(tensor.read(), torch.bfloat16))


def _decode(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of fp8 values as bfloat16 or float32, looked up: torch's own conversion takes twice as long on a CPU."""
    table = _value_table(values.dtype, dtype)
    decoded = torch.from_numpy(np.take(table, values.reshape(-1).view(torch.uint8).numpy(), mode="clip"))
    return decoded.view(dtype).reshape(values.shape)


@functools.cache
def _value_table(fp8: torch.dtype, dtype: torch.dtype) -> npt.NDArray[Any]:
    """All 256 values of an fp8 type as the bits of another, int16 or int32 (256,)."""
    values = torch.arange(256, dtype=torch.uint8).view(fp8).to(dtype)
    bits: npt.NDArray[Any] = values.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    return bits


def _scaled(path: Path, name: str, weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    """The weight in float32: weight * scale, rounded once."""
    split = _split_blocks(weight.shape, scale.shape)
    if split is None:
        problem = f"the scale of '{plain_text(name)}' has shape {scale.shape}, which does not fit {weight.shape}"
        raise BadFile(problem, path=path, subject=name, hint="Take the 16-bit file of this model.")
    dtype = torch.bfloat16 if weight.dtype in FP8_DTYPES else weight.dtype
    return StoredTensor(dtype, weight.shape, _product(weight, scale, *split))


def _product(
    weight: StoredTensor, scale: StoredTensor, blocks: tuple[int, ...], factors: tuple[int, ...]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        stored = weight.read()
        is_fp8 = stored.dtype in FP8_DTYPES
        values = _decode(stored, torch.float32) if is_fp8 else stored.to(torch.float32, copy=True)
        values.view(blocks).mul_(scale.read().to(torch.float32).reshape(factors))
        return values

    return read


def _split_blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes of a weight and its scale in which they multiply, or None.

    A scale is one number, one for each row or block (as many dimensions as the weight, each a divisor), or one for each
    matrix of a stack. As many numbers as rows in one dimension are refused: rows and columns cannot be told apart.
    """
    if prod(scale) == 1:
        return shape, ()
    if len(shape) == 3 and scale == shape[:1]:
        return shape, (scale[0], 1, 1)
    if len(scale) != len(shape) or any(s == 0 or n % s for n, s in zip(shape, scale, strict=True)):
        return None
    blocks = tuple(part for n, s in zip(shape, scale, strict=True) for part in (s, n // s))
    return blocks, tuple(part for s in scale for part in (s, 1))
