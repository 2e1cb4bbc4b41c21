# SPDX-License-Identifier: Apache-2.0
"""What the pack knows of an architecture, as one immutable record, and the roles that its tensors can have.

arch_table.py fills in the records, archs.py answers questions with them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType

Shapes = Mapping[str, tuple[int, ...]]


class Category(enum.Enum):
    """What a tensor does in its model. The value is the name that files and reports use."""

    ATTN_QKV = "attn_qkv"  # fused, also where the same matrix has more rows
    ATTN_V = "attn_v"
    ATTN = "attn"  # queries and keys; in diffusion models the output projection too
    ATTN_OUTPUT = "attn_output"  # the output projection, where recipes tell it from queries and keys
    FFN_DOWN = "ffn_down"
    FFN = "ffn"
    MODULATION = "modulation"
    CONV = "conv"
    EMBED = "embed"  # of time, guidance, text, image and patches; tables of positions; all that feeds the blocks
    OUTPUT = "output"
    TOKEN_EMBD = "token_embd"  # a row for each token of a vocabulary: looked up, or multiplied with to get words
    OTHER = "other"


Rules = tuple[tuple[str, Category], ...]


@dataclasses.dataclass(frozen=True)
class Role:
    """Place of one tensor in its model.

    Attributes:
        category: what it does.
        block: rank of its block in the stack, from 0; -1 outside blocks.
        n_blocks: blocks in that stack, 0 outside.
        f32: it stays float32 whatever the recipe says.
    """

    category: Category
    block: int = -1
    n_blocks: int = 0
    f32: bool = False


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture, or one variant of it. Patterns are regular expressions.

    Attributes:
        name: what command lines and reports call it.
        title: what users call it.
        detect: keys that must all be there, each with the dimensions that must match (None: any).
        absent: keys that must not be there.
        reject: why files of this kind cannot be loaded, and what to do; "" for those that can.
        shared_tag: value of `general.architecture` in files where it is not the name: other loaders know only some.
        blocks: one pattern for each stack of blocks, of how keys in it begin, up to the dot behind the block's number.
        rules: (pattern, category) of what follows in a block's keys, whole; the first that fits, before BLOCK_RULES.
        outer: (pattern, category) of whole keys outside the blocks; the first that fits. The rest feeds them: EMBED.
        keep_f32: patterns of whole keys that stay float32: parameters that the host adds or compares as they are, and
            gates that are small but decide much.
        drop: patterns of whole keys that no model needs.
        reshape_conv: kernels of convolutions are stored as rows of 256 weights where their number allows it.
        is_encoder: it is a text encoder; these have recipes of their own.
        tokenizer: kind (a key of tokenizers.KINDS) of the tokenizer that ComfyUI looks for among its tensors, or "".
    """

    name: str
    title: str
    detect: Mapping[str, tuple[int | None, ...] | None]
    absent: tuple[str, ...] = ()
    reject: str = ""
    shared_tag: str = ""
    blocks: tuple[str, ...] = ()
    rules: Rules = ()
    outer: Rules = ()
    keep_f32: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    reshape_conv: bool = False
    is_encoder: bool = False
    tokenizer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detect", MappingProxyType(dict(self.detect)))

    @property
    def tag(self) -> str:
        """Value of `general.architecture` in files."""
        return self.shared_tag or self.name

    def matches(self, shapes: Shapes) -> bool:
        """Whether a model with these keys and shapes (torch order) is of this kind."""
        return not any(key in shapes for key in self.absent) and all(
            key in shapes and _fits(shapes[key], wanted) for key, wanted in self.detect.items()
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
