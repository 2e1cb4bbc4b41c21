# SPDX-License-Identifier: Apache-2.0
"""Which text encoders belong to which `type` of ComfyUI's CLIP loaders, as immutable data, and what is asked of it.

Encoders have the names of ComfyUI's own detection (comfy.sd.TEModel), which decides what a file is; USES says what
comfy.sd.load_text_encoder_state_dicts does with them. To add a type or an encoder, add a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

AUTO = "auto"


@dataclass(frozen=True)
class Encoder:
    """What ComfyUI detects.

    Attributes:
        title: what users call it.
        families: titles of text_encoder_table.py whose tensors it can have; () for names that table does not have.
    """

    title: str
    families: tuple[str, ...] = ()


_T5 = ("T5 v1.1", "T5 v1.0")
ENCODERS: Mapping[str, Encoder] = MappingProxyType(
    {
        "CLIP_L": Encoder("CLIP-L"),
        "CLIP_H": Encoder("CLIP-H"),
        "CLIP_G": Encoder("CLIP-G"),
        "JINA_CLIP_2": Encoder("Jina CLIP v2"),
        "T5_XXL": Encoder("T5-XXL", _T5),
        "T5_XXL_OLD": Encoder("T5-XXL v1.0", _T5),
        "T5_XL": Encoder("T5-XL", (*_T5, "UMT5")),
        "T5_BASE": Encoder("T5-base", _T5),
        "UMT5_XXL": Encoder("UMT5-XXL", ("UMT5",)),
        "UMT5_BASE": Encoder("UMT5-base", ("UMT5",)),
        "BYT5_SMALL_GLYPH": Encoder("ByT5 small (glyphs)", _T5),
        "T5_GEMMA": Encoder("T5Gemma"),
        "LLAMA3_8": Encoder("Llama 3 8B", ("Llama",)),
        "MISTRAL3_24B": Encoder("Mistral Small 24B", ("Mistral",)),
        "MISTRAL3_24B_PRUNED_FLUX2": Encoder("Mistral Small 24B (pruned)", ("Mistral",)),
        "MINISTRAL_3_3B": Encoder("Ministral 3B", ("Mistral",)),
        "GEMMA_2_2B": Encoder("Gemma 2 2B", ("Gemma 2",)),
        "GEMMA_3_4B": Encoder("Gemma 3 4B", ("Gemma 3",)),
        "GEMMA_3_4B_VISION": Encoder("Gemma 3 4B with vision", ("Gemma 3",)),
        "GEMMA_3_12B": Encoder("Gemma 3 12B", ("Gemma 3",)),
        "GEMMA_4_E2B": Encoder("Gemma 4 E2B", ("Gemma 4",)),
        "GEMMA_4_E4B": Encoder("Gemma 4 E4B", ("Gemma 4",)),
        "GEMMA_4_12B": Encoder("Gemma 4 12B", ("Gemma 4",)),
        "GEMMA_4_31B": Encoder("Gemma 4 31B", ("Gemma 4",)),
        "QWEN25_3B": Encoder("Qwen2.5-VL 3B", ("Qwen2",)),
        "QWEN25_7B": Encoder("Qwen2.5-VL 7B", ("Qwen2",)),
        "QWEN3_06B": Encoder("Qwen3 0.6B", ("Qwen3",)),
        "QWEN3_2B": Encoder("Qwen3 1.7B", ("Qwen3", "Qwen3-VL")),
        "QWEN3_4B": Encoder("Qwen3 4B", ("Qwen3", "Qwen3-VL")),
        "QWEN3_8B": Encoder("Qwen3 8B", ("Qwen3", "Qwen3-VL")),
        "QWEN3VL_4B": Encoder("Qwen3-VL 4B", ("Qwen3-VL",)),
        "QWEN3VL_8B": Encoder("Qwen3-VL 8B", ("Qwen3-VL",)),
        "QWEN3VL_32B": Encoder("Qwen3-VL 32B", ("Qwen3-VL",)),
        "QWEN35_08B": Encoder("Qwen3.5 0.8B", ("Qwen3.5",)),
        "QWEN35_2B": Encoder("Qwen3.5 2B", ("Qwen3.5",)),
        "QWEN35_4B": Encoder("Qwen3.5 4B", ("Qwen3.5",)),
        "QWEN35_9B": Encoder("Qwen3.5 9B", ("Qwen3.5",)),
        "QWEN35_27B": Encoder("Qwen3.5 27B", ("Qwen3.5",)),
        "GPT_OSS_20B": Encoder("GPT-OSS 20B", ("GPT-OSS",)),
        "LTX_PROJECTION": Encoder("text projection of LTX"),
    }
)

Slot = frozenset[str]


@dataclass(frozen=True)
class Use:
    """One thing that ComfyUI makes of some encoders.

    Attributes:
        slots: for each file the encoders that can stand there, in any order.
        types: the types that give it, the usual one first; () if every type does.
    """

    slots: tuple[Slot, ...]
    types: tuple[str, ...]

    def takes(self, encoders: Sequence[str]) -> bool:
        """Whether these encoders, all different, fill the slots."""
        return len(set(encoders)) == len(encoders) == len(self.slots) and any(
            all(name in slot for name, slot in zip(order, self.slots, strict=True))
            for order in itertools.permutations(encoders)
        )


def _use(slots: str, *types: str) -> Use:
    """Slots separated by +, the encoders of a slot by |."""
    return Use(tuple(frozenset(slot.split("|")) for slot in slots.split(" + ")), types)


# What of a loader's types has no meaning for an encoder goes by its default, stable_diffusion. Published workflows have
# encoders with other types too where ComfyUI makes the same of them: for Anima, Z-Image, and to generate text.
_ANY = "stable_diffusion"
_GEMMA_3_4B = "GEMMA_3_4B|GEMMA_3_4B_VISION"
_GEMMA_4 = "GEMMA_4_E2B|GEMMA_4_E4B|GEMMA_4_12B|GEMMA_4_31B"
_MISTRAL = "MISTRAL3_24B|MISTRAL3_24B_PRUNED_FLUX2"
_SD3 = "CLIP_L|CLIP_G|T5_XXL"
_HIDREAM = "CLIP_L|CLIP_G|T5_XXL|LLAMA3_8"

USES: tuple[Use, ...] = (
    _use("CLIP_L", "stable_diffusion"),
    _use("CLIP_L", "sd3"),
    _use("CLIP_L", "hidream"),
    _use("CLIP_H", "stable_diffusion"),
    _use("CLIP_G", "stable_cascade"),
    _use("CLIP_G", "stable_diffusion"),
    _use("CLIP_G", "sd3"),
    _use("CLIP_G", "hidream"),
    _use("JINA_CLIP_2", _ANY),
    _use("T5_XXL", "sd3"),
    _use("T5_XXL", "ltxv"),
    _use("T5_XXL", "pixart", "chroma"),
    _use("T5_XXL", "hidream"),
    _use("T5_XXL", "cogvideox"),
    _use("T5_XXL", "mochi"),
    _use("UMT5_XXL", "wan"),
    _use("UMT5_BASE", "ace"),
    _use("T5_BASE", "stable_audio", _ANY),
    _use("T5_GEMMA", "stable_audio", _ANY),
    _use("T5_XXL_OLD", "cosmos", _ANY),
    _use("T5_XL", _ANY),
    _use("LLAMA3_8", "hidream", _ANY),
    _use(_MISTRAL, "flux2", _ANY),
    _use("MINISTRAL_3_3B", "flux2", _ANY),
    _use("GEMMA_2_2B", "lumina2", _ANY),
    _use("GEMMA_2_2B", "pixeldit"),
    _use(_GEMMA_3_4B, "lumina2", _ANY),
    _use("GEMMA_3_12B", "ltxv", _ANY),
    _use(_GEMMA_4),
    _use("QWEN25_3B", "omnigen2", _ANY),
    _use("QWEN25_7B", "qwen_image", _ANY),
    _use("QWEN25_7B", "hunyuan_image"),
    _use("QWEN25_7B", "longcat_image"),
    _use("QWEN3_06B", _ANY, "qwen_image", "lumina2", "cosmos"),
    _use("QWEN3_2B", "ovis", _ANY),
    _use("QWEN3_4B", "lumina2", "qwen_image", "ltxv", _ANY),
    _use("QWEN3_4B", "flux2", "flux"),
    _use("QWEN3_8B", "flux2", "flux"),
    _use("QWEN3_8B", "ideogram4"),
    _use("QWEN3VL_4B", "krea2"),
    _use("QWEN3VL_4B", "mage"),
    _use("QWEN3VL_8B", "ideogram4"),
    _use("QWEN3VL_8B", "boogu"),
    _use("QWEN3VL_8B", "joyimage"),
    _use("QWEN3VL_4B|QWEN3VL_8B", "flux2", "flux"),
    _use("QWEN3VL_4B", _ANY, "ideogram4", "qwen_image"),
    _use("QWEN3VL_8B", _ANY, "qwen_image"),
    _use("QWEN3VL_32B", "minimax", _ANY),
    _use("QWEN35_08B|QWEN35_2B|QWEN35_4B|QWEN35_9B|QWEN35_27B"),
    _use("GPT_OSS_20B", "lens", _ANY),
    _use("CLIP_L + CLIP_G", "sdxl"),
    _use(f"{_SD3} + {_SD3}", "sd3"),
    _use("CLIP_L + T5_XXL", "flux"),
    _use("CLIP_L + LLAMA3_8", "hunyuan_video"),
    _use(f"{_HIDREAM} + {_HIDREAM}", "hidream"),
    _use("QWEN25_7B + BYT5_SMALL_GLYPH", "hunyuan_image"),
    _use("QWEN25_7B + BYT5_SMALL_GLYPH", "hunyuan_video_15"),
    _use("QWEN25_7B + CLIP_L", "kandinsky5"),
    _use("QWEN25_7B + CLIP_L", "kandinsky5_image"),
    _use(f"GEMMA_3_12B|{_GEMMA_4} + LTX_PROJECTION", "ltxv"),
    _use(f"{_GEMMA_3_4B} + JINA_CLIP_2", "newbie"),
    _use("QWEN3_06B + QWEN3_2B|QWEN3_4B", "ace"),
    _use("CLIP_L + CLIP_G + T5_XXL", "sd3"),
    _use("CLIP_L + CLIP_G + T5_XXL + LLAMA3_8", "hidream"),
)


# Types that there are. hunyuan_dit is in no loader.
KNOWN_TYPES = frozenset(name for use in USES for name in use.types) | {"hunyuan_dit"}


def resolve(type_name: str, encoders: Sequence[str], offered: Collection[str]) -> tuple[str, str]:
    """The type to load encoders with, or why it cannot be known.

    Args:
        type_name: what the user chose, "auto" included. A type that is not in the table is left to ComfyUI.
        encoders: keys of ENCODERS, one for each file.
        offered: types that this ComfyUI knows.
    Returns:
        type: "" if there is none; and the words for the user then, without a full stop, else "".
    """
    uses = [use for use in USES if use.takes(encoders)]
    fitting = [[name for name in use.types if name in offered] for use in uses]
    if any(not use.types for use in uses):
        return (type_name if type_name != AUTO else _ANY), ""
    if type_name != AUTO and (type_name not in KNOWN_TYPES or any(type_name in names for names in fitting)):
        return type_name, ""
    usual = list(dict.fromkeys(names[0] for names in fitting if names))
    title = " + ".join(ENCODERS[name].title for name in encoders)
    if type_name != AUTO:
        use = f"which is for {_or(usual)}" if usual else "for which there is no type here"
        return "", f"type '{type_name}' {needed(type_name, len(encoders))}, and this is {title}, {use}"
    if not usual:
        return "", f"there is no type here for {title}"
    if len(usual) == 1:
        return usual[0], ""
    return "", f"type 'auto' cannot tell what {title} is wanted for: {_or(usual)}"


def needed(type_name: str, n_files: int) -> str:
    """What a type takes in so many files, in words."""
    if type_name == _ANY:
        return "takes CLIP-L"  # and what has no better one
    slots = [use.slots for use in USES if type_name in use.types and len(use.slots) == n_files]
    if not slots:
        return f"is not for {n_files} file{'s' * (n_files > 1)}"
    if n_files == 1:
        slots = [(frozenset().union(*(slot for (slot,) in slots)),)]
    texts = [" + ".join(_or([ENCODERS[name].title for name in ENCODERS if name in slot]) for slot in s) for s in slots]
    return f"takes {_or(list(dict.fromkeys(texts)))}"


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
