# SPDX-License-Identifier: Apache-2.0
"""What is known of one family of text encoders in llama.cpp's files, and the rule by which its names are read.

Owns the shape of an entry; text_encoder_table.py has the entries. Knows names and numbers, no files and no host.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from .tokenizers import BYTE_KEYS

_BLOCK_NUMBER = re.compile(r"(?<=\bblk\.)\d+(?=\.)")


def nothing() -> Any:
    """The default of a mapping that an entry need not have."""
    return dataclasses.field(default_factory=lambda: MappingProxyType({}))


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One family of text encoders. Names have a {bid} slot for the block number.

    Attributes:
        title: what users call it.
        has: tensor names that the family has, absent: names of which it has none.
        keys: llama.cpp's name to state-dict key.
        tags: values of `general.architecture` or `tokenizer.ggml.pre` that choose it among families whose tensors look
            alike; they decide nothing else.
        leave_out: names that ComfyUI's class has no use for.
        refuse: name prefix to the reason why a file that has such tensors is of no use.
        head_counts: name of a weight or bias whose rows llama.cpp interleaves for its rope, to the metadata key
            (without `<arch>.attention.`) of its number of heads.
        norm_offset: what llama.cpp adds to the norm weights and ComfyUI's class adds again, but for those `unshifted`.
        value_heads: name of a tensor of linear attention, whose heads of values llama.cpp stores in another order, to
            where they are in it: "rows", "last rows" (after those of q and k) or "columns".
        decay: name of the decay factors, of which ComfyUI's class has the logarithms.
        conv: name of the weight of a convolution, without the dim of one channel per group.
        alternate: key of a weight to the keys of the two whose rows make it up in turn.
        tokenizer: a key of tokenizers.KINDS, or "" where ComfyUI brings the tokenizer along.
        vision: name of the rule for its vision part (mmproj), or "" where it has none.
    """

    title: str
    has: tuple[str, ...]
    keys: Mapping[str, str]
    absent: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    refuse: Mapping[str, str] = nothing()
    head_counts: Mapping[str, str] = nothing()
    norm_offset: float = 0.0
    unshifted: tuple[str, ...] = ()
    value_heads: Mapping[str, str] = nothing()
    decay: str = ""
    conv: str = ""
    alternate: Mapping[str, tuple[str, str]] = nothing()
    tokenizer: str = ""
    vision: str = ""

    def matches(self, names: Collection[str]) -> bool:
        """Whether tensors of these names can be of this family."""
        return all(name in names for name in self.has) and not any(name in names for name in self.absent)

    def key_map(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """State-dict key of each name that is used, and the names that match no rule."""
        mapped: dict[str, str] = {}
        unknown: list[str] = []
        for name in names:
            rule, bid = split_name(name)
            key = name if name in BYTE_KEYS else self.keys.get(rule)
            if key is not None:
                mapped[name] = key.replace("{bid}", bid)
            elif rule not in self.leave_out:
                unknown.append(name)
        return mapped, unknown


def split_name(name: str, number: re.Pattern[str] = _BLOCK_NUMBER) -> tuple[str, str]:
    """A tensor name with {bid} in place of its block number, and that number's digits ("" if it has none)."""
    match = number.search(name)
    return (f"{name[: match.start()]}{{bid}}{name[match.end() :]}", match.group()) if match else (name, "")
