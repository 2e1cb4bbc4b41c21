# SPDX-License-Identifier: Apache-2.0
"""Architectures of models, recognised by keys and shapes; the tag in a file is never asked.

Whether a model can be loaded is the host's decision. The entries of arch_table.py name what a file holds, for the user,
catch layouts that a host would load wrongly, and tell the quantizer what each tensor does; those of encoder_archs.py do
so for text encoders, which only the quantizer and the inspector tell apart by them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from math import prod

from ..errors import UnsupportedArch, plain_text
from .arch_entry import Arch, Category, Role, Rules, Shapes
from .arch_table import ARCHS, BLOCK_RULES, GENERIC, LEFTOVERS
from .encoder_archs import ENCODERS, detect_encoder

__all__ = [
    "ARCHS",
    "ENCODERS",
    "GENERIC",
    "KEY_PREFIXES",
    "Arch",
    "Category",
    "Role",
    "Shapes",
    "detect",
    "detect_encoder",
    "find_all",
    "named",
    "roles",
    "strip_prefix",
]

# What ComfyUI and others put before the keys of a diffusion model, in a whole checkpoint or alone; one can be within
# another, as stable-diffusion.cpp writes Anima.
KEY_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")
MIN_PREFIXED = 6  # comfy/model_detection.py, unet_prefix_from_state_dict

# Numbered blocks of an unrecognised model that hold less of its weights than this part feed others; they are kept.
MIN_STACK_SHARE = 1 / 20
NUMBERED = re.compile(r"(.+?\D)\d+\.(?=.*\.)")
FEEDS_BLOCKS = re.compile(r"embed|refiner|adapter|connector")


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """Key to name: without the prefix that a whole checkpoint gives its diffusion model, whose tensors alone are kept.

    As in ComfyUI, a prefix counts when more than a handful of names have it.
    """
    found = {name: name for name in names}
    for prefix in KEY_PREFIXES:
        inside = {key.removeprefix(prefix): name for key, name in found.items() if key.startswith(prefix)}
        if len(inside) >= MIN_PREFIXED:
            found = inside
    return found


def find_all(shapes: Shapes) -> list[Arch]:
    """Every entry that a diffusion model with these keys and shapes (torch order) matches."""
    return [arch for arch in ARCHS if arch.matches(shapes)]


def detect(shapes: Shapes) -> Arch | None:
    """The entry that a diffusion model with these keys and shapes (torch order) matches, or None."""
    return next((arch for arch in ARCHS if arch.matches(shapes)), None)


def named(name: str) -> Arch:
    """The entry of that name, of several variants the first; `z-image` and `zimage` are as good as `z_image`.

    Raises:
        UnsupportedArch: there is none; the message, a ValueError's, lists the names.
    """
    wanted = _plain_name(name)
    usable = [arch for arch in (*ARCHS, *ENCODERS, GENERIC) if not arch.reject]
    for arch in usable:
        if _plain_name(arch.name) == wanted:
            return arch
    names = ", ".join(dict.fromkeys(arch.name for arch in usable))
    raise UnsupportedArch(f"'{plain_text(name)}' is no architecture that is known here", hint=f"Take one of: {names}.")


def roles(arch: Arch, shapes: Shapes) -> dict[str, Role]:
    """Key to role for every tensor that is to be kept, in the model's order; shapes are in torch order."""
    drop, keep_f32 = _any_of((*LEFTOVERS, *arch.drop)), _any_of(arch.keep_f32)
    kept = [key for key in shapes if not drop(key)]
    places = _find_places(kept, arch.blocks or _find_stacks(shapes))
    found = {}
    for key in kept:
        label, block, n_blocks = places.get(key, ("", -1, 0))
        if label:
            category = _category(key[len(label) :], arch.rules + BLOCK_RULES, Category.OTHER)
        else:
            category = _category(key, arch.outer, Category.EMBED)
        found[key] = Role(category, block, n_blocks, keep_f32(key))
    return found


def _plain_name(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is, as a whole, what one of the patterns describes."""
    compiled = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")
    return lambda text: compiled.fullmatch(text) is not None


def _find_places(keys: Iterable[str], stacks: Sequence[str]) -> dict[str, tuple[str, int, int]]:
    """For keys in a block: (the text up to and with the block's number, rank of the block, blocks in the stack)."""
    compiled = [re.compile(pattern) for pattern in stacks]
    labels: dict[str, tuple[int, str]] = {}
    for key in keys:
        for i, pattern in enumerate(compiled):
            if match := pattern.match(key):
                labels[key] = i, match.group()
                break
    ranks: dict[tuple[int, str], int] = {}
    sizes: Counter[int] = Counter()
    for i, label in sorted(set(labels.values()), key=lambda place: (place[0], _natural(place[1]))):
        ranks[i, label] = sizes[i]
        sizes[i] += 1
    return {key: (label, ranks[i, label], sizes[i]) for key, (i, label) in labels.items()}


def _natural(text: str) -> list[tuple[str, int]]:
    """Sort key by which block 2 comes before block 10."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", text)]


def _find_stacks(shapes: Shapes) -> list[str]:
    """Patterns of the stacks that make up an unrecognised model: numbered blocks with enough of its weights."""
    n_weights: Counter[str] = Counter()
    for key, shape in shapes.items():
        match = NUMBERED.match(key)
        n_weights[match[1] if match else ""] += prod(shape)
    least = MIN_STACK_SHARE * n_weights.total()
    heads = [head for head, n in n_weights.items() if head and n >= least and not FEEDS_BLOCKS.search(head)]
    return [rf"{re.escape(head)}\d+\." for head in heads]


@lru_cache(maxsize=4096)
def _category(name: str, rules: Rules, default: Category) -> Category:
    """What a tensor does, by the first rule that fits its name; blocks repeat their names."""
    return next((category for matches, category in _compiled(rules) if matches(name)), default)


@cache
def _compiled(rules: Rules) -> tuple[tuple[Callable[[str], bool], Category], ...]:
    return tuple((_any_of((pattern,)), category) for pattern, category in rules)
