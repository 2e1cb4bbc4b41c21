# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a state dict: keys as ComfyUI expects them, quantized weights as bytes, everything else as tensors.

Knows files and names, no host. Opening touches only the header: the values are views of the mapped file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping

import torch
from gguf.constants import GGMLQuantizationType

from .dequant import PLAIN_DTYPES, SUPPORTED_QTYPES, dequantize_rows
from .errors import UnsupportedArch, UnsupportedQtype, name_list, plain_text
from .gguf_file import GGUFFile, TensorInfo
from .models import archs, text_encoders

log = logging.getLogger("gguf_kit")


@dataclasses.dataclass(frozen=True)
class QuantizedBytes:
    """A weight as it lies in the file.

    Attributes:
        data: uint8 (n_rows, row_bytes), a view of the mapped file.
        qtype: encoding of the bytes.
        shape: logical shape in torch order; its size is that of the rows, its last dim may differ from a row.
    """

    data: torch.Tensor
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a float tensor of its logical shape."""
        return dequantize_rows(self.data, self.qtype, dtype).reshape(self.shape)


StateDict = dict[str, QuantizedBytes | torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LoadInfo:
    """What a loaded file is.

    Attributes:
        path: the file.
        arch: its `general.architecture`, "" if it has none.
        title: what its tensors say it is, "unrecognised model" if nothing known.
        n_weights: number of weights, n_bytes: their bytes in the file.
        qtypes: number of tensors of each qtype.
        metadata: what was carried along from the model's safetensors file.
    """

    path: str
    arch: str
    title: str
    n_weights: int
    n_bytes: int
    qtypes: Mapping[str, int]
    metadata: Mapping[str, str]

    def summary(self) -> str:
        """One line for the log: file, model, tensors, types, bits per weight."""
        types = ", ".join(f"{name} {n}" for name, n in self.qtypes.items())
        return (
            f"{os.path.basename(self.path)}: {self.title} (tagged {self.arch or 'nothing'}), "
            f"{sum(self.qtypes.values())} tensors ({types}), {self.n_weights / 1e9:.3g} G weights, "
            f"{8 * self.n_bytes / max(self.n_weights, 1):.2f} bits per weight"
        )


def load_diffusion_model(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a diffusion model.

    Returns:
        the state dict, key prefixes of whole checkpoints stripped, and what the file is.

    Raises:
        GGUFError: the file is damaged, holds something else, or has a layout that cannot be loaded.
    """
    file = GGUFFile(path)
    if text_encoders.detect(file.tensors) or "token_embd.weight" in file.tensors:
        raise UnsupportedArch(
            f"it holds a text encoder or language model (general.architecture '{_arch_tag(file)}'), no diffusion model",
            path=path,
            hint='Load it with "CLIPLoader (GGUF)".',
        )
    names = archs.strip_prefix(file.tensors)
    shapes = {key: file.logical_shape(name) for key, name in names.items()}
    arch = archs.detect(shapes)
    if arch is not None and arch.reject:
        raise UnsupportedArch(
            f"it is {arch.title}, which cannot be loaded from GGUF", path=path, hint=f"{arch.reject}."
        )
    return _read(file, names, arch.title if arch else "unrecognised model")


def load_text_encoder(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a text encoder, tensors renamed to ComfyUI's keys.

    Raises:
        GGUFError: the file is damaged, or holds no text encoder that is known here.
    """
    file = GGUFFile(path)
    if any(marker in file.tensors for marker in text_encoders.NATIVE_MARKERS):
        return _read(file, {name: name for name in file.tensors}, "text encoder with native names")
    encoder = text_encoders.detect(file.tensors)
    if encoder is None:
        raise _no_text_encoder(file)
    for prefix, reason in encoder.refuse.items():
        if any(name.startswith(prefix) for name in file.tensors):
            raise UnsupportedArch(f"this {encoder.title} cannot be used: {reason}", path=path)
    mapped, unknown = encoder.key_map(file.tensors)
    if unknown:
        raise UnsupportedArch(
            f"{len(unknown)} tensor names match no {encoder.title} rule: {name_list(unknown)}",
            path=path,
            hint="Take the encoder from another source, or its safetensors file.",
        )
    return _read(file, {key: name for name, key in mapped.items()}, encoder.title)


def _arch_tag(file: GGUFFile) -> str:
    tag = file.metadata.get("general.architecture", "")
    return plain_text(tag) if isinstance(tag, str) else ""


def _no_text_encoder(file: GGUFFile) -> UnsupportedArch:
    names = archs.strip_prefix(file.tensors)
    arch = archs.detect({key: file.logical_shape(name) for key, name in names.items()})
    if arch is not None:
        return UnsupportedArch(
            f"it is a diffusion model ({arch.title}), not a text encoder",
            path=file.path,
            hint='Load it with "Unet Loader (GGUF)".',
        )
    known = ", ".join(encoder.title for encoder in text_encoders.TEXT_ENCODERS)
    return UnsupportedArch(
        f"it is no text encoder that can be loaded from GGUF here (general.architecture '{_arch_tag(file)}')",
        path=file.path,
        hint=f"Take the safetensors file of this encoder; from GGUF this version loads: {known}.",
    )


def _read(file: GGUFFile, names: Mapping[str, str], title: str) -> tuple[StateDict, LoadInfo]:
    """Values for a map of key to tensor name, and the record and log line of this load."""
    state = {key: _read_tensor(file, key, file.tensors[name]) for key, name in names.items()}
    infos = [file.tensors[name] for name in names.values()]
    info = LoadInfo(
        path=str(file.path),
        arch=_arch_tag(file),
        title=title,
        n_weights=sum(math.prod(t.shape) for t in infos),
        n_bytes=sum(t.n_bytes for t in infos),
        qtypes=dict(Counter(t.qtype.name for t in infos).most_common()),
        metadata=file.carried_metadata(),
    )
    log.info(info.summary())
    return state, info


def _read_tensor(file: GGUFFile, key: str, tensor: TensorInfo) -> QuantizedBytes | torch.Tensor:
    """One value: layer weights keep their bytes; vectors and bare parameters, which models use as floats, do not."""
    shape, data = file.logical_shape(tensor.name), file.data(tensor.name)
    if tensor.qtype in PLAIN_DTYPES:
        return _plain_tensor(data, PLAIN_DTYPES[tensor.qtype]).reshape(shape)
    if tensor.qtype not in SUPPORTED_QTYPES:
        raise UnsupportedQtype(
            f"tensor '{plain_text(tensor.name)}' has qtype {tensor.qtype.name}, which has no dequantizer here",
            path=file.path,
            subject=tensor.name,
            hint=f"Use a file with one of: {', '.join(sorted(q.name for q in SUPPORTED_QTYPES))}.",
        )
    n_rows = math.prod(tensor.shape[:-1])
    weight = QuantizedBytes(data.reshape(n_rows, -1) if data.numel() else data.reshape(n_rows, 0), tensor.qtype, shape)
    return weight if len(shape) > 1 and key.endswith(".weight") else weight.dequantize()


def _plain_tensor(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as 1-D `dtype`, without a copy when they are aligned for it."""
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)
