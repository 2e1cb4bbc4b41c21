# SPDX-License-Identifier: Apache-2.0
"""Recipes: which qtype a tensor gets, from its role in the model and the place of its block. Nothing else decides it.

Owns RECIPES, one row per file type, and ENCODER_RECIPES, the same types as text encoders are mixed. Knows no
architecture: models/archs.py turns keys into roles, plan.py applies a recipe to them. A new recipe is a new row; its
golden files are in tests/data/recipes.

In all of them embedders and final layers keep the precision of the source. Rules are read in order: the first
that names the category and the place wins; what no rule names gets the base type.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType

from ..models.archs import Category, Role

KEPT = frozenset({Category.EMBED, Category.OUTPUT})


class Place(enum.Enum):
    """Part of a stack of blocks. An eighth is rounded down, but is one block at least."""

    ALL = "all"
    FIRST = "the first eighth"
    ENDS = "the first and the last eighth"
    MORE = "the first and the last eighth, and every third block between"

    def holds(self, block: int, n_blocks: int) -> bool:
        """Whether block number `block` (from 0) of n_blocks is in this part; only ALL holds what is in no block."""
        if self is Place.ALL:
            return True
        if block < 0:
            return False
        eighth = max(1, n_blocks // 8)
        is_end = block < eighth or block >= n_blocks - eighth
        if self is Place.FIRST:
            return block < eighth
        return is_end or (self is Place.MORE and (block - eighth) % 3 == 2)


@dataclass(frozen=True)
class Rule:
    """Tensors of these categories, in blocks of this place, get this type."""

    categories: frozenset[Category]
    qtype: QType
    place: Place = Place.ALL


@dataclass(frozen=True)
class Recipe:
    """How a file of one type is mixed.

    Attributes:
        file_type: value of general.file_type.
        base: type of every matrix that no rule names.
        rules: exceptions, the first that fits wins.
        needs_imatrix: the base type is useless without an importance matrix.
    """

    file_type: LlamaFileType
    base: QType
    rules: tuple[Rule, ...] = ()
    needs_imatrix: bool = False

    def qtype(self, role: Role) -> QType | None:
        """The type for a matrix of this role; None: it keeps the source's precision."""
        if role.category in KEPT:
            return None
        for rule in self.rules:
            if role.category in rule.categories and rule.place.holds(role.block, role.n_blocks):
                return rule.qtype
        return self.base


_VALUES = frozenset({Category.ATTN_V})
_QKV = frozenset({Category.ATTN_QKV})
_DOWN = frozenset({Category.FFN_DOWN})
_HEAVY = _QKV | _DOWN


# A table of tokens is rows that are read as they are, by every prompt: never below Q5_K.
_TOKENS = frozenset({Category.TOKEN_EMBD})
_TOKEN_TYPES = {QType.Q8_0: QType.Q8_0, QType.IQ3_XXS: QType.Q5_K, QType.IQ2_S: QType.Q5_K, QType.IQ2_XS: QType.Q5_K}


def _recipe(file_type: str, base: QType, *rules: Rule, needs_imatrix: bool = False) -> Recipe:
    tokens = Rule(_TOKENS, _TOKEN_TYPES.get(base, QType.Q6_K))
    return Recipe(LlamaFileType[file_type], base, (tokens, *rules), needs_imatrix)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "Q8_0": _recipe("MOSTLY_Q8_0", QType.Q8_0),
        "Q6_K": _recipe("MOSTLY_Q6_K", QType.Q6_K),
        "Q5_K_M": _recipe(
            "MOSTLY_Q5_K_M",
            QType.Q5_K,
            Rule(_VALUES, QType.Q6_K, Place.MORE),
            Rule(_HEAVY, QType.Q6_K, Place.ENDS),
        ),
        "Q5_K_S": _recipe("MOSTLY_Q5_K_S", QType.Q5_K),
        "Q5_1": _recipe("MOSTLY_Q5_1", QType.Q5_1),
        "Q5_0": _recipe("MOSTLY_Q5_0", QType.Q5_0),
        "Q4_K_M": _recipe(
            "MOSTLY_Q4_K_M",
            QType.Q4_K,
            Rule(_VALUES, QType.Q6_K, Place.MORE),
            Rule(_HEAVY, QType.Q5_K, Place.ENDS),
        ),
        "Q4_K_S": _recipe("MOSTLY_Q4_K_S", QType.Q4_K, Rule(_VALUES, QType.Q5_K, Place.FIRST)),
        "Q4_1": _recipe("MOSTLY_Q4_1", QType.Q4_1),
        "Q4_0": _recipe("MOSTLY_Q4_0", QType.Q4_0),
        "IQ4_NL": _recipe("MOSTLY_IQ4_NL", QType.IQ4_NL, Rule(_VALUES, QType.Q5_K, Place.FIRST)),
        "IQ4_XS": _recipe("MOSTLY_IQ4_XS", QType.IQ4_XS, Rule(_VALUES, QType.Q5_K, Place.FIRST)),
        "Q3_K_L": _recipe(
            "MOSTLY_Q3_K_L",
            QType.Q3_K,
            Rule(_VALUES, QType.Q5_K),
            Rule(_DOWN, QType.Q5_K, Place.MORE),
            Rule(_HEAVY, QType.Q4_K),
        ),
        "Q3_K_M": _recipe(
            "MOSTLY_Q3_K_M",
            QType.Q3_K,
            Rule(_VALUES, QType.Q5_K, Place.FIRST),
            Rule(_VALUES, QType.Q4_K),
            Rule(_HEAVY, QType.Q4_K, Place.MORE),
        ),
        "Q3_K_S": _recipe("MOSTLY_Q3_K_S", QType.Q3_K),
        "IQ3_S": _recipe("MOSTLY_IQ3_S", QType.IQ3_S, Rule(_VALUES, QType.Q4_K), needs_imatrix=True),
        "IQ3_XXS": _recipe("MOSTLY_IQ3_XXS", QType.IQ3_XXS, Rule(_VALUES, QType.IQ3_S), needs_imatrix=True),
        "Q2_K": _recipe("MOSTLY_Q2_K", QType.Q2_K, Rule(_VALUES, QType.Q3_K)),
        "IQ2_S": _recipe("MOSTLY_IQ2_S", QType.IQ2_S, Rule(_VALUES, QType.IQ3_S), needs_imatrix=True),
        "IQ2_XS": _recipe("MOSTLY_IQ2_XS", QType.IQ2_XS, Rule(_VALUES, QType.IQ3_S), needs_imatrix=True),
    }
)

_ENCODER_VALUES = _VALUES | _QKV
_ENCODER_HEAVY = _ENCODER_VALUES | _DOWN
_ENCODER_OUT = _ENCODER_HEAVY | {Category.ATTN_OUTPUT}
_Q5_DOWN_FIRST = Rule(_DOWN, QType.Q5_K, Place.FIRST)
# What text encoders have instead of the rules of RECIPES, base type and tokens aside: the mixtures of llama.cpp, in
# whose types people know them.
# Source: llama.cpp src/llama-quant.cpp llama_tensor_get_type, of models whose heads do not share values.
_ENCODER_RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "Q5_K_M": (Rule(_ENCODER_HEAVY, QType.Q6_K, Place.MORE),),
        "Q4_K_M": (Rule(_ENCODER_HEAVY, QType.Q6_K, Place.MORE),),
        "Q4_K_S": (Rule(_ENCODER_VALUES, QType.Q5_K, Place.FIRST), _Q5_DOWN_FIRST),
        "IQ4_NL": (_Q5_DOWN_FIRST,),
        "IQ4_XS": (_Q5_DOWN_FIRST,),
        "Q3_K_L": (Rule(_ENCODER_OUT, QType.Q5_K),),
        "Q3_K_M": (Rule(_ENCODER_VALUES, QType.Q5_K, Place.FIRST), Rule(_ENCODER_OUT, QType.Q4_K)),
        "IQ3_S": (Rule(_ENCODER_VALUES, QType.Q4_K),),
        "IQ3_XXS": (Rule(_ENCODER_VALUES, QType.IQ3_S), Rule(frozenset({Category.ATTN_OUTPUT}), QType.IQ3_S)),
        "Q2_K": (Rule(_ENCODER_OUT, QType.Q3_K),),
        "IQ2_S": (Rule(_ENCODER_VALUES, QType.IQ3_S),),
        "IQ2_XS": (Rule(_ENCODER_VALUES, QType.IQ3_S),),
    }
)


ENCODER_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {name: replace(recipe, rules=(recipe.rules[0], *_ENCODER_RULES.get(name, ()))) for name, recipe in RECIPES.items()}
)

# Types that are no mixture: every matrix gets them, embedders too.
PLAIN_TYPES: Mapping[str, tuple[LlamaFileType, QType]] = MappingProxyType(
    {
        "F32": (LlamaFileType.ALL_F32, QType.F32),
        "F16": (LlamaFileType.MOSTLY_F16, QType.F16),
        "BF16": (LlamaFileType.MOSTLY_BF16, QType.BF16),
    }
)
TYPE_NAMES = (*PLAIN_TYPES, *RECIPES)

# For rows that are no multiple of 256: the type with blocks of 32 that is not worse.
SMALL_BLOCK_TYPES: Mapping[QType, QType] = MappingProxyType(
    {
        QType.Q6_K: QType.Q8_0,
        QType.Q5_K: QType.Q5_1,
        QType.Q4_K: QType.Q5_0,
        QType.IQ4_XS: QType.IQ4_NL,
        QType.Q3_K: QType.IQ4_NL,
        QType.IQ3_S: QType.IQ4_NL,
        QType.IQ3_XXS: QType.IQ4_NL,
        QType.Q2_K: QType.IQ4_NL,
        QType.IQ2_S: QType.IQ4_NL,
        QType.IQ2_XS: QType.IQ4_NL,
    }
)
