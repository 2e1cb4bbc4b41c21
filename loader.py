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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from gguf.constants import LlamaFileType

from .errors import UnsupportedArch, name_list, plain_text
from .gguf_file import GGUFFile
from .models import adapters, archs, checkpoints, kinds, overlay, repairs, text_encoders, vision_search
from .models import vision as vision_part
from .models.restore import add_tokenizer, restore
from .models.split_files import open_gguf
from .models.text_encoder_entry import TextEncoder
from .models.text_encoder_table import FULL_T5, TEXT_ENCODERS
from .models.values import StateDict, read_tensor

log = logging.getLogger("gguf_kit")

# In place of the file of a vision part.
AUTO = "auto"
NONE = "none"

UNRECOGNISED = "unrecognised model"


@dataclasses.dataclass(frozen=True)
class LoadInfo:
    """What a loaded file is.

    Attributes:
        path: the file.
        arch: its `general.architecture`, "" if it has none.
        title: what its tensors say it is, "unrecognised model" if nothing known.
        n_weights: number of weights, n_bytes: their bytes in the file.
        qtypes: number of tensors of each qtype, type_bytes: their bytes in the file.
        metadata: what was carried along from the model's safetensors file.
        file_type: name of its `general.file_type`, such as Q4_K_S, "" if it has none that is known.
        family: title of the text encoder's entry if it has llama.cpp's names, else "".
        vision: the file of its vision part, "" without one.
        cut: keys that may be only the beginning of the model's own; see repairs.complete_keys().
        extra: the file that was laid over it, "" without one; extra_keys: the keys that came from there.
    """

    path: str
    arch: str
    title: str
    n_weights: int
    n_bytes: int
    qtypes: Mapping[str, int]
    type_bytes: Mapping[str, int]
    metadata: Mapping[str, str]
    file_type: str = ""
    family: str = ""
    vision: str = ""
    cut: frozenset[str] = frozenset()
    extra: str = ""
    extra_keys: frozenset[str] = frozenset()

    def summary(self) -> str:
        """One line for the log: file, model, tensors, types, bits per weight."""
        types = ", ".join(f"{name} {n}" for name, n in self.qtypes.items())
        names = " with ".join(os.path.basename(path) for path in (self.path, self.extra) if path)
        return (
            f"{names}: {self.title} (tagged {self.arch or 'nothing'}), "
            f"{sum(self.qtypes.values())} tensors ({types}), {self.n_weights / 1e9:.3g} G weights, "
            f"{8 * self.n_bytes / max(self.n_weights, 1):.2f} bits per weight"
        )


# LoadInfos of what is loaded inside loaded_files(), in this thread.
_loaded: ContextVar[list[LoadInfo] | None] = ContextVar("loaded", default=None)


@contextmanager
def loaded_files() -> Iterator[list[LoadInfo]]:
    """A list that the functions below add to, inside the block, what they have loaded."""
    infos: list[LoadInfo] = []
    token = _loaded.set(infos)
    try:
        yield infos
    finally:
        _loaded.reset(token)


def load_diffusion_model(
    path: str | os.PathLike[str], extra: str | os.PathLike[str] | None = None
) -> tuple[StateDict, LoadInfo]:
    """Read a diffusion model.

    Args:
        extra: file with modules for it, such as Wan's VACE, which are added to it or take the place of its own.

    Returns:
        the state dict, key prefixes of whole checkpoints stripped, and what the file is.

    Raises:
        GGUFError: a file is damaged, holds something else, has a layout that cannot be loaded, or the two do not fit.
    """
    file = open_gguf(path)
    keys = _diffusion_keys(file)
    if extra is None:
        if overlay.is_module(keys):
            raise UnsupportedArch(
                "it holds modules that need a model (VACE), and no model",
                path=path,
                hint="Choose the model as unet_name, and this file as extra_name.",
            )
        info = _describe(file, keys.names, _title(keys.shapes))
        return repairs.read_values(file, keys), dataclasses.replace(info, cut=keys.cut)
    extra_file = open_gguf(extra)
    extra_keys = _diffusion_keys(extra_file)
    overlay.check_fit(file, keys, extra_file, extra_keys)
    values = {**repairs.read_values(file, keys), **repairs.read_values(extra_file, extra_keys)}
    kept = {key: name for key, name in keys.names.items() if key not in extra_keys.names}
    title = _title({**keys.shapes, **extra_keys.shapes})
    info = _describe(file, kept, title, (extra_file, extra_keys.names))
    return values, dataclasses.replace(info, cut=keys.cut | extra_keys.cut)


def _diffusion_keys(file: GGUFFile) -> repairs.Keys:
    """Keys and shapes of a diffusion model, or the refusal of what is none."""
    found = repairs.find_keys(file)
    keys = dataclasses.replace(found, shapes=checkpoints.flatten_projections(found.shapes))
    arch = archs.detect(keys.shapes)
    if "token_embd.weight" in file.tensors or (arch is None and text_encoders.find_native(file.tensors)):
        raise UnsupportedArch(
            f"it is a text encoder{_tagged(file)}, not a diffusion model",
            path=file.path,
            hint='Load it with "CLIPLoader (GGUF)".',
        )
    if file.arch == "clip" and vision_part.is_vision_part(file):
        raise _vision_alone(file)
    _refuse_layout(file, arch)
    return keys


def _refuse_layout(file: GGUFFile, arch: archs.Arch | None) -> None:
    if arch is not None and arch.reject:
        raise UnsupportedArch(
            f"it is {arch.title}, which cannot be loaded from GGUF", path=file.path, hint=f"{arch.reject}."
        )


def _title(shapes: archs.Shapes) -> str:
    arch = archs.detect(shapes)
    return arch.title if arch else UNRECOGNISED


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a whole checkpoint: diffusion model, text encoders and VAE, or those of them that the file has.

    Returns:
        the state dict, keys with the prefixes that ComfyUI expects (the VAE: any of checkpoints.VAE_PREFIXES), and what
        the file is.

    Raises:
        GGUFError: the file is damaged, holds something else, or has a layout that cannot be loaded.
    """
    file = open_gguf(path)
    parts = checkpoints.find_parts(file)
    arch = archs.detect(parts.diffusion.shapes)
    if arch is None and not parts.is_whole:
        raise _no_checkpoint(file)
    _refuse_layout(file, arch)
    values = repairs.read_values(file, parts.diffusion)
    state = {checkpoints.DIFFUSION_PREFIX + key: value for key, value in values.items()}
    names = {name: name for name in (*parts.diffusion.names.values(), *(p.name for p in parts.others.values()))}
    kind = "checkpoint of " if parts.is_whole else ""
    info = _describe(file, names, f"{kind}{arch.title if arch else UNRECOGNISED}")
    info = dataclasses.replace(info, cut=frozenset(checkpoints.DIFFUSION_PREFIX + key for key in parts.diffusion.cut))
    return state | checkpoints.read_others(file, parts), info


def _no_checkpoint(file: GGUFFile) -> UnsupportedArch:
    """The refusal of a file that is not made up of a diffusion model and other parts."""
    kind = kinds.what_is(
        {name.removeprefix(checkpoints.VAE_PREFIXES[0]): file.logical_shape(name) for name in file.tensors}
    )
    if kind is not None:
        return UnsupportedArch(
            f"it is {kind.title}{_tagged(file)}, no whole checkpoint", path=file.path, hint=f'Use "{kind.node}".'
        )
    return UnsupportedArch(
        f"it is no whole checkpoint of a diffusion model with its text encoders or VAE{_tagged(file)}",
        path=file.path,
        hint="Load it with the node for what it holds.",
    )


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
    file = open_gguf(path)
    encoder = text_encoders.detect(file.tensors, text_encoders.tags_of(file))
    if encoder is None:
        return _load_native(file)
    names = _renamed(file, encoder)
    state = _values(file, names)
    restore(file, encoder, names, state)
    add_tokenizer(file, encoder.title, encoder.tokenizer, state)
    part = _vision_file(file, encoder, vision)
    state |= vision_part.read(part, file, encoder) if part else vision_part.placeholder(file, encoder)
    return state, _describe(file, names, encoder.title, family=encoder.title, vision=str(part.path) if part else "")


def load_component(path: str | os.PathLike[str]) -> tuple[StateDict, LoadInfo]:
    """Read a file of any kind: all of its tensors under their own names, in the shapes that their model has.

    Returns:
        the state dict, pairs of LoRA factors under the names that ComfyUI reads, and what the file is.

    Raises:
        GGUFError: the file is damaged, or its names cannot be told.
    """
    file = open_gguf(path)
    names = repairs.whole_names(file)
    shapes = repairs.restore_shapes({key: file.logical_shape(name) for key, name in names.items()})
    kind = kinds.what_is(shapes)
    state = repairs.read_values(file, repairs.Keys(names, shapes))
    return adapters.with_host_names(file, state), _describe(file, names, kind.title if kind else UNRECOGNISED)


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
        return open_gguf(vision)
    return vision_search.find(file, encoder) or vision_part.inside(file)


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
    whole = repairs.whole_names(file)
    found = text_encoders.find_native(whole)
    if len(found) > 1:
        places = name_list([match.wrapper or "no prefix" for match in found])
        raise UnsupportedArch(
            f"it holds {len(found)} text encoders (behind {places})",
            path=file.path,
            hint="Take a file with one encoder for each input of the loader.",
        )
    if not found or (not found[0].wrapper and _diffusion_arch(file) is not None):
        raise _no_text_encoder(file)
    keys = {key: whole[name] for key, name in found[0].keys.items()}
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


def _describe(
    file: GGUFFile,
    names: Mapping[str, str],
    title: str,
    extra: tuple[GGUFFile, Mapping[str, str]] | None = None,
    *,
    family: str = "",
    vision: str = "",
) -> LoadInfo:
    """What has been loaded, said in the log and to loaded_files()."""
    infos = [file.tensors[name] for name in names.values()]
    if extra is not None:
        infos += [extra[0].tensors[name] for name in extra[1].values()]
    type_bytes: Counter[str] = Counter()
    for tensor in infos:
        type_bytes[tensor.qtype.name] += tensor.n_bytes
    info = LoadInfo(
        path=str(file.path),
        arch=plain_text(file.arch),
        title=title,
        n_weights=sum(math.prod(t.shape) for t in infos),
        n_bytes=sum(t.n_bytes for t in infos),
        qtypes=dict(Counter(t.qtype.name for t in infos).most_common()),
        type_bytes=type_bytes,
        metadata=file.carried_metadata(),
        file_type=_file_type(file),
        family=family,
        vision=vision,
        extra=str(extra[0].path) if extra else "",
        extra_keys=frozenset(extra[1]) if extra else frozenset(),
    )
    log.info(info.summary())
    heard = _loaded.get()
    if heard is not None:
        heard.append(info)
    return info


def _file_type(file: GGUFFile) -> str:
    """What the file says of its types, such as Q4_K_S."""
    value = file.metadata.get("general.file_type")
    if not isinstance(value, int) or value not in LlamaFileType._value2member_map_:  # or one of another program
        return ""
    name = LlamaFileType(value).name
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
