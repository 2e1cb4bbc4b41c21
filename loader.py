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

from .errors import UnsupportedArch, name_list, plain_text
from .gguf_file import GGUFFile
from .models import archs, text_encoders, vision_search
from .models import vision as vision_part
from .models.restore import add_tokenizer, restore
from .models.text_encoder_entry import TextEncoder
from .models.text_encoder_table import FULL_T5, TEXT_ENCODERS
from .models.values import StateDict, read_tensor

log = logging.getLogger("gguf_kit")

# In place of the file of a vision part.
AUTO = "auto"
NONE = "none"


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
        family: title of the text encoder's entry if it has llama.cpp's names, else "".
        vision: the file of its vision part, "" without one.
    """

    path: str
    arch: str
    title: str
    n_weights: int
    n_bytes: int
    qtypes: Mapping[str, int]
    metadata: Mapping[str, str]
    family: str = ""
    vision: str = ""

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
    file = _open(path)
    names = archs.strip_prefix(file.tensors)
    shapes = {key: file.logical_shape(name) for key, name in names.items()}
    arch = archs.detect(shapes)
    if "token_embd.weight" in file.tensors or (arch is None and text_encoders.find_native(file.tensors)):
        raise UnsupportedArch(
            f"it is a text encoder{_tagged(file)}, not a diffusion model",
            path=path,
            hint='Load it with "CLIPLoader (GGUF)".',
        )
    if file.arch == "clip" and vision_part.is_vision_part(file):
        raise _vision_alone(file)
    if arch is not None and arch.reject:
        raise UnsupportedArch(
            f"it is {arch.title}, which cannot be loaded from GGUF", path=path, hint=f"{arch.reject}."
        )
    return _values(file, names), _describe(file, names, arch.title if arch else "unrecognised model")


def load_text_encoder(
    path: str | os.PathLike[str], vision: str | os.PathLike[str] = AUTO
) -> tuple[StateDict, LoadInfo]:
    """Read a text encoder, tensors renamed to ComfyUI's keys and its weights as ComfyUI's class has them.

    Args:
        vision: file of its vision part (mmproj); AUTO: the one in its folder that fits, if any; NONE: text only.

    Returns:
        the state dict, with the tokenizer's file as uint8 (n_bytes,) where ComfyUI looks for it there, and what it is.

    Raises:
        GGUFError: the file is damaged, or holds no text encoder that is known here.
    """
    file = _open(path)
    encoder = text_encoders.detect(file.tensors, text_encoders.tags_of(file))
    if encoder is None:
        return _load_native(file)
    names = _renamed(file, encoder)
    state = _values(file, names)
    restore(file, encoder, names, state)
    add_tokenizer(file, encoder.title, encoder.tokenizer, state)
    part = _vision_file(file, encoder, vision)
    state |= vision_part.read(part, file, encoder) if part else vision_part.placeholder(file, encoder)
    info = _describe(file, names, encoder.title)
    return state, dataclasses.replace(info, family=encoder.title, vision=part.path if part else "")


def _load_native(file: GGUFFile) -> tuple[StateDict, LoadInfo]:
    """A text encoder whose tensors have their original names."""
    names = _native_names(file)
    state = _values(file, names)
    arch = archs.detect_encoder({key: file.logical_shape(name) for key, name in names.items()})
    if arch is not None:
        add_tokenizer(file, arch.title, arch.tokenizer, state)
    return state, _describe(file, names, arch.title if arch else "text encoder with native names")


def _vision_file(file: GGUFFile, encoder: TextEncoder, vision: str | os.PathLike[str]) -> GGUFFile | None:
    """The vision part to read with an encoder; a file that was named is for the encoder that takes one."""
    if vision == NONE or not encoder.vision:
        return None
    if vision != AUTO:
        return GGUFFile(vision)
    path = vision_search.find(file, encoder)
    return GGUFFile(path) if path else vision_part.inside(file)


def _renamed(file: GGUFFile, encoder: TextEncoder) -> dict[str, str]:
    """Key to tensor name of a file in llama.cpp's names, or the refusal of one that is of no use."""
    for prefix, reason in encoder.refuse.items():
        if any(name.startswith(prefix) for name in file.tensors):
            raise UnsupportedArch(f"this {encoder.title} cannot be used: {reason}", path=file.path)
    mapped, unknown = encoder.key_map(name for name in file.tensors if not _is_vision(name, encoder))
    if unknown:
        raise UnsupportedArch(
            f"{len(unknown)} tensor names match no {encoder.title} rule: {name_list(unknown)}",
            path=file.path,
            hint="Take the encoder from another source, or its safetensors file.",
        )
    return {key: name for name, key in mapped.items()}


def _is_vision(name: str, encoder: TextEncoder) -> bool:
    """Whether a tensor is of the vision part that some files hold beside the encoder."""
    return bool(encoder.vision) and name.startswith(text_encoders.MMPROJ_PREFIXES)


def _native_names(file: GGUFFile) -> dict[str, str]:
    """Key to tensor name of a file whose names are the original ones, or the refusal of what is no text encoder."""
    found = text_encoders.find_native(file.tensors)
    if len(found) > 1:
        places = name_list([match.wrapper or "no prefix" for match in found])
        raise UnsupportedArch(
            f"it holds {len(found)} text encoders (behind {places})",
            path=file.path,
            hint="Take a file with one encoder for each input of the loader.",
        )
    if not found or (not found[0].wrapper and _diffusion_arch(file) is not None):
        raise _no_text_encoder(file)
    keys = dict(found[0].keys)
    if any(key.startswith("decoder.block.") for key in keys):
        raise UnsupportedArch(f"this T5 cannot be used: {FULL_T5}", path=file.path)
    return keys


def _diffusion_arch(file: GGUFFile) -> archs.Arch | None:
    names = archs.strip_prefix(file.tensors)
    return archs.detect({key: file.logical_shape(name) for key, name in names.items()})


def _no_text_encoder(file: GGUFFile) -> UnsupportedArch:
    arch = _diffusion_arch(file)
    if arch is not None:
        return UnsupportedArch(
            f"it is a diffusion model ({arch.title}), not a text encoder",
            path=file.path,
            hint='Load it with "Unet Loader (GGUF)".',
        )
    if vision_part.is_vision_part(file):
        return _vision_alone(file)
    known = ", ".join(encoder.title for encoder in TEXT_ENCODERS)
    return UnsupportedArch(
        f"it is no text encoder that can be loaded from GGUF here{_tagged(file)}",
        path=file.path,
        hint=f"Take the safetensors file of this encoder; with llama.cpp's names this version loads: {known}.",
    )


def _values(file: GGUFFile, names: Mapping[str, str]) -> StateDict:
    return {key: read_tensor(file, key, file.tensors[name]) for key, name in names.items()}


def _tagged(file: GGUFFile) -> str:
    return f" (general.architecture '{plain_text(file.arch)}')" if file.arch else ""


def _vision_alone(file: GGUFFile) -> UnsupportedArch:
    return UnsupportedArch(
        "it is the vision part (mmproj) of a text encoder, without the encoder itself",
        path=file.path,
        hint='Choose the main file in "CLIPLoader (GGUF)", and this one as its vision part.',
    )


def _open(path: str | os.PathLike[str]) -> GGUFFile:
    file = GGUFFile(path)
    n_parts, number = (file.metadata.get(f"split.{key}") for key in ("count", "no"))
    if isinstance(n_parts, int) and n_parts > 1:
        part = f"part {number + 1} of {n_parts}" if isinstance(number, int) else f"one of {n_parts} parts"
        raise UnsupportedArch(
            f"it is {part} of a split file", path=path, hint="Join them with llama.cpp's llama-gguf-split --merge."
        )
    return file


def _describe(file: GGUFFile, names: Mapping[str, str], title: str) -> LoadInfo:
    infos = [file.tensors[name] for name in names.values()]
    info = LoadInfo(
        path=str(file.path),
        arch=plain_text(file.arch),
        title=title,
        n_weights=sum(math.prod(t.shape) for t in infos),
        n_bytes=sum(t.n_bytes for t in infos),
        qtypes=dict(Counter(t.qtype.name for t in infos).most_common()),
        metadata=file.carried_metadata(),
    )
    log.info(info.summary())
    return info
