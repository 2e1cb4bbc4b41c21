# SPDX-License-Identifier: Apache-2.0
"""What a conversion can start from, behind one lazy interface: the tensors of a model under its own names.

Owns how the diffusion model is found in a file: leftovers of training, prefixes of whole checkpoints, and the order in
which the other rooms of sources are asked: shards and containers (files), encoder_sources (text encoders), fp8
(scales), other_kinds (refusals) and diffusers_keys (native names). Opening reads headers and the few bytes that say how
layers are stored, no weights.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from gguf.constants import GGMLQuantizationType as QType

from ..errors import BadFile, UnsupportedArch, UnsupportedQtype, name_list, plain_text
from ..models import archs
from . import diffusers_keys, encoder_sources, fp8, other_kinds, shards
from .containers import StoredTensor, Tensor, Tensors

# Where checkpoints keep the diffusion model; the longest first, since each is tried on its own.
PREFIXES = tuple(sorted({*archs.KEY_PREFIXES, "model.model.", "net.", "model."}, key=len, reverse=True))
# The other parts of whole checkpoints; they do not count when the model's prefix is looked for.
OTHER_PARTS: Mapping[str, str] = MappingProxyType({
    "first_stage_model.": "VAE", "vae.": "VAE", "audio_vae.": "VAE", "pretransform.": "VAE", "vocoder.": "VAE",
    "cond_stage_model.": "text encoders", "conditioner.": "text encoders", "text_encoders.": "text encoders",
    "text_encoder.": "text encoders", "text_encoder_2.": "text encoders", "text_embedding_projection.": "text encoders",
    "clip_vision.": "text encoders",
})  # fmt: skip
EMA_COPIES = ("model_ema.", "ema_model.")
WRAPPER = "module."  # of torch's parallel training
COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")  # of torch.compile, also inside names
NOT_CARRIED = ("format", fp8.QUANT_METADATA)

# Types that are not kept as they are: the widest float of GGUF is 32 bits here, as everywhere in ComfyUI.
READ_AS: Mapping[torch.dtype, torch.dtype] = MappingProxyType({torch.float64: torch.float32})
DTYPES = frozenset({
    torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool,
})  # fmt: skip


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source.

    Attributes:
        name: the model's own key, without prefixes.
        dtype: precision that the source really has: float32, float16, bfloat16 (also for fp8), an integer type or bool.
        shape: torch order, any number of dimensions; (0,) for markers.
        qtype: type that it is quantized as already, or None.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    qtype: QType | None = None


class Source:
    """A diffusion model or text encoder in some file or folder.

    The files stay mapped while the source or any tensor that is a view of them is alive; there is nothing to close.

    Attributes:
        path: as given.
        title: what was opened, such as "safetensors in 3 files".
        tensors: name -> SourceTensor, read-only, in file order.
        metadata: texts that the file carries about the model, read-only.
        notes: sentences worth telling the user.
    """

    def __init__(
        self, path: Path, title: str, stored: Tensors, metadata: Mapping[str, str], notes: tuple[str, ...]
    ) -> None:
        self.path = path
        self.title = title
        self.notes = notes
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata))
        self.tensors: Mapping[str, SourceTensor] = MappingProxyType(
            {name: _describe(name, tensor) for name, tensor in stored.items()}
        )
        self._stored = stored

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, contiguous, of its shape; nothing of it is kept here.

        Its dtype is the one in tensors, except for weights with fp8 scales: float32. Plain tensors are views of the
        mapped file that must not be written to.
        """
        return self._stored[name].read()

    def read_blocks(self, name: str) -> Tensor:
        """The bytes of a tensor that is quantized already: uint8, on any device, not to be written to."""
        blocks = self._stored[name].blocks
        if blocks is None:
            raise ValueError(f"tensor '{name}' is not quantized")
        return blocks.read()


def _describe(name: str, tensor: StoredTensor) -> SourceTensor:
    return SourceTensor(name, tensor.dtype, tensor.shape, tensor.blocks.qtype if tensor.blocks else None)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file, an index of shards, or a folder with a diffusion model or a text encoder.

    Raises:
        BadFile: it cannot be read, is damaged or incomplete, or is no model file.
        UnsupportedArch: it is sound but holds something else than a model that ComfyUI runs.
        UnsupportedQtype: it is quantized already, in a format that would lose more by a second quantization.
    """
    path = Path(path)
    contents = shards.open_path(path)
    if not contents.tensors:
        raise BadFile("it holds no tensors", path=path, hint="Download it again.")
    tensors, notes = _clean_names(path, fp8.add_layer_markers(contents, path))
    encoder = encoder_sources.take_encoder(path, tensors)
    tensors, taken_out = encoder or _take_model(path, tensors)
    tensors, told = fp8.undo_fp8(path, tensors)
    notes += (*taken_out, *told)
    if encoder is None:
        other_kinds.refuse(path, list(tensors))
    if diffusers_keys.is_flux(tensors):
        tensors = diffusers_keys.to_native(path, tensors)
        notes += ("Flux in diffusers layout: names changed to the native ones, q, k and v joined",)
    tensors = {name: _usable(path, name, tensor) for name, tensor in tensors.items()}
    metadata = {key: text for key, text in contents.metadata.items() if key not in NOT_CARRIED}
    return Source(path, contents.kind, tensors, metadata, (*contents.notes, *notes))


def _clean_names(path: Path, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Take off what training and compiling put into names, and leave out averaged copies of the weights."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA_COPIES)}
    n_ema = len(tensors) - len(kept) if kept else 0
    names = {name: COMPILED.sub("", name) for name in (kept or tensors)}
    while sum(new.startswith(WRAPPER) for new in names.values()) * 2 > len(names):
        names = {old: new.removeprefix(WRAPPER) for old, new in names.items()}
    notes = (f"{n_ema} tensors with an average of the weights (EMA) left out",) if n_ema else ()
    return _renamed(path, tensors, names), notes


def _renamed(path: Path, tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """The tensors of names under their new names, each of which must be had once."""
    double = [new for new, n_uses in Counter(names.values()).items() if n_uses > 1]
    if double:
        problem = f"names occur twice once prefixes are taken off: {name_list(double)}"
        raise BadFile(problem, path=path, subject=double[0], hint="Export the model again without the second copy.")
    return {new: tensors[old] for old, new in names.items()}


def _take_model(path: Path, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """The diffusion model of a checkpoint without its prefix, and what was left out."""
    others = {name: part for name in tensors if (part := _other_part(name))}
    rest = [name for name in tensors if name not in others]
    if not rest:
        other_kinds.refuse(path, list(tensors))
        parts = " and ".join(sorted(set(others.values())))
        problem = f"it holds only the {parts} of a checkpoint, no diffusion model"
        raise UnsupportedArch(problem, path=path, hint=other_kinds.ONLY_MODELS)
    prefix = next((p for p in PREFIXES if sum(name.startswith(p) for name in rest) * 2 > len(rest)), "")
    if not prefix:
        return tensors, ()
    inside = {name: name.removeprefix(prefix) for name in rest if name.startswith(prefix)}
    n_left_out = sum(name not in inside and not name.endswith(fp8.LAYER_MARKER) for name in tensors)
    if not n_left_out:
        return _renamed(path, tensors, inside), ()
    note = "the diffusion model was taken out of a checkpoint; "
    note += f"{n_left_out} tensors of {_listed([*others.values(), *_strays(rest, prefix)])} left out"
    return _renamed(path, tensors, inside), (note,)


def _other_part(name: str) -> str:
    return next((part for prefix, part in OTHER_PARTS.items() if name.startswith(prefix)), "")


def _strays(names: Sequence[str], prefix: str) -> list[str]:
    return ["others" for name in names if not name.startswith(prefix)]


def _listed(parts: Sequence[str]) -> str:
    """The distinct parts in words, 'others' last."""
    words = sorted(set(parts), key=lambda part: (part == "others", part != "VAE"))
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _usable(path: Path, name: str, tensor: StoredTensor) -> StoredTensor:
    """The tensor in a type that the rest of a conversion knows."""
    if not name:
        raise BadFile("one of its tensors has no name", path=path, hint="Export the model again.")
    if tensor.dtype in READ_AS:
        return StoredTensor(READ_AS[tensor.dtype], tensor.shape, lambda: _narrowed(path, name, tensor.read()))
    if tensor.dtype not in DTYPES:
        problem = f"tensor '{plain_text(name)}' is stored as {tensor.dtype}, which GGUF has no place for"
        raise UnsupportedQtype(problem, path=path, subject=name, hint="Take the 16-bit file of this model.")
    return tensor


def _narrowed(path: Path, name: str, wide: Tensor) -> Tensor:
    """A tensor in the type of READ_AS, which must be able to hold its values."""
    narrow = wide.to(READ_AS[wide.dtype])
    if not torch.equal(torch.isfinite(narrow), torch.isfinite(wide)):
        problem = f"tensor '{plain_text(name)}' has float64 values that float32 cannot hold"
        raise BadFile(problem, path=path, subject=name, hint="Take another file of this model.")
    return narrow
