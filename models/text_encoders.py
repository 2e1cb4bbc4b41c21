# SPDX-License-Identifier: Apache-2.0
"""Text encoders: which family a file's tensors are, by llama.cpp's names or by the original ones.

Content decides, tags help where content is ambiguous. text_encoder_table.py has the families in llama.cpp's names;
files with the original names need no table, only the prefix that ComfyUI looks for in place of the one they have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from ..gguf_file import GGUFFile
from .text_encoder_entry import TextEncoder
from .text_encoder_table import TEXT_ENCODERS

# Names of vision and audio parts in llama.cpp's files ("mmproj").
MMPROJ_PREFIXES = ("v.", "a.", "mm.")


@dataclasses.dataclass(frozen=True)
class NativeNames:
    """A family of encoders in its original names.

    Attributes:
        marker: a tensor name that it has, without prefix.
        prefix: what ComfyUI's keys have in front of it, prefixes: what files have there.
        roots: beginnings of the names that the prefix belongs to.
    """

    marker: str
    prefix: str = ""
    prefixes: tuple[str, ...] = ("",)
    roots: tuple[str, ...] = ("",)


@dataclasses.dataclass(frozen=True)
class NativeMatch:
    """Where a file has an encoder in its original names.

    Attributes:
        wrapper: what stands in front of all its names, such as "text_encoders.llm.".
        keys: state-dict key to tensor name.
    """

    wrapper: str
    keys: Mapping[str, str]


_DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "text_model.", "model.", "")
_DECODER_ROOTS = ("layers.", "embed_tokens.", "norm.", "embed_tokens_per_layer.", "per_layer_")

# More special families first: they have the names of the general ones too.
NATIVE: tuple[NativeNames, ...] = (
    NativeNames("transformer.resblocks.0.ln_1.weight"),
    NativeNames("encoder.block.0.layer.0.SelfAttention.q.weight"),
    NativeNames(
        "embeddings.token_embedding.weight",
        prefix="text_model.",
        prefixes=("text_model.", ""),
        roots=("embeddings.", "encoder.", "final_layer_norm."),
    ),
    NativeNames("model.encoder.layers.0.mixer.Wqkv.weight"),
    NativeNames("model.encoder.layers.0.pre_self_attn_layernorm.weight"),
    NativeNames("layers.0.self_attn.sinks", "", _DECODER_PREFIXES, _DECODER_ROOTS),
    NativeNames("layers.0.linear_attn.A_log", "model.language_model.", _DECODER_PREFIXES, _DECODER_ROOTS),
    NativeNames("layers.0.input_layernorm.weight", "model.", _DECODER_PREFIXES, _DECODER_ROOTS),
)

# What published models have in front of their vision parts, and ComfyUI's files do not.
_VISION_PREFIX = re.compile(r"^(model\.)?(vision_tower\.)?(?=(vision_model|multi_modal_projector)\.)")

# What checkpoints and stable-diffusion.cpp put in front of an encoder's own names.
_WRAPPER = re.compile(
    r"(?:(?:text_encoders?\.(?:\w+\.)?|cond_stage_model\.(?:\w+\.)?|conditioner\.embedders\.\d+\.)"
    r"(?:transformer\.|model\.)?)?"
)


def detect(names: Iterable[str], tags: Collection[str] = ()) -> TextEncoder | None:
    """The entry that tensors with llama.cpp's names belong to, or None.

    Args:
        tags: what the file says of itself (tags_of); decides between entries that the names all fit.
    """
    present = set(names)
    found = [entry for entry in TEXT_ENCODERS if entry.matches(present)]
    tagged = [entry for entry in found if any(tag in tags for tag in entry.tags)]
    # A tokenizer is more telling than the architecture, which Mistral's files share with Llama's.
    return next(iter([entry for entry in tagged if entry.tokenizer] or tagged or found), None)


def tags_of(file: GGUFFile) -> tuple[str, ...]:
    """What a file says of itself, as far as it decides between encoders that look alike."""
    values = (file.metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
    return tuple(value for value in values if isinstance(value, str))


def find_native(names: Collection[str]) -> list[NativeMatch]:
    """The encoders in a file with original names; more than one in a whole checkpoint."""
    found: dict[str, NativeMatch] = {}
    for native in NATIVE:
        for name in names:
            place = _place(native, name)
            if place is not None and place[0] not in found:
                found[place[0]] = NativeMatch(place[0], _native_keys(native, *place, names))
    return list(found.values())


def is_mmproj(names: Collection[str]) -> bool:
    """Whether all tensors are of a vision or audio part."""
    return bool(names) and all(name.startswith(MMPROJ_PREFIXES) for name in names)


def _place(native: NativeNames, name: str) -> tuple[str, str] | None:
    """(wrapper, prefix) in front of the marker, or None if `name` is not it."""
    if not name.endswith(native.marker):
        return None
    head = name[: -len(native.marker)]
    for prefix in native.prefixes:
        if head.endswith(prefix) and _WRAPPER.fullmatch(head[: len(head) - len(prefix)]):
            return head[: len(head) - len(prefix)], prefix
    return None


def _native_keys(native: NativeNames, wrapper: str, prefix: str, names: Iterable[str]) -> dict[str, str]:
    """State-dict key to name of all tensors behind the wrapper."""
    keys: dict[str, str] = {}
    for name in names:
        if name.startswith(wrapper):
            key = name[len(wrapper) :]
            if key.startswith(prefix) and key[len(prefix) :].startswith(native.roots):
                key = native.prefix + key[len(prefix) :]
            key = _VISION_PREFIX.sub("", key, count=1)
            keys[key if key not in keys else name] = name
    return keys
