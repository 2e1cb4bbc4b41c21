# SPDX-License-Identifier: Apache-2.0
"""The vocabulary that a GGUF file carries: the tokenizer.ggml arrays, decoded on demand and checked against each other.

Knows the metadata keys and what may stand under them, nothing of the tokenizers that are made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys, TokenType

from ..errors import BadFile, UnsupportedArch, plain_text
from ..gguf_file import GGUFFile

# In characters. Real vocabularies stay under 200; native trie builders recurse once for each byte.
MAX_TOKEN_LENGTH = 1024

Key = Keys.Tokenizer
ROLE_KEYS: Mapping[str, str] = MappingProxyType(
    {"bos": Key.BOS_ID, "eos": Key.EOS_ID, "pad": Key.PAD_ID, "unk": Key.UNK_ID}
)
NO_TOKENIZER = "Take a file made by llama.cpp's converter, or the safetensors file of this encoder."
DAMAGED = "Download the file again, or take it from another source."


@dataclass(frozen=True)
class Vocabulary:
    """Checked access to the tokenizer metadata of one file; nothing is read before it is asked for.

    Every property and method raises UnsupportedArch where the file lacks what is asked for, and BadFile where what it
    has contradicts itself or is not text.
    """

    file: GGUFFile

    def lack(self, problem: str) -> NoReturn:
        """Refuse the file because its tokenizer is absent or of a kind that is not rebuilt."""
        raise UnsupportedArch(problem, path=self.file.path, hint=NO_TOKENIZER)

    def fail(self, key: str, problem: str) -> NoReturn:
        """Refuse the file because the value of a metadata key is wrong."""
        raise BadFile(f"metadata key '{key}' {problem}", path=self.file.path, subject=key, hint=DAMAGED)

    def value(self, key: str) -> Any:
        """The value of a key that has to be there."""
        if key not in self.file.metadata:
            self.lack(f"it has no metadata key '{key}', which the tokenizer of this encoder is rebuilt from")
        return self.file.metadata[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default it has to be there."""
        value = default if default is not None and key not in self.file.metadata else self.value(key)
        if not isinstance(value, str):
            self.fail(key, f"is {_describe(value)}, expected a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool, or the default."""
        value = self.value(key) if key in self.file.metadata else default
        if not isinstance(value, bool):
            self.fail(key, f"is {_describe(value)}, expected a bool")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        value = self.value(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            self.fail(key, f"is {_describe(value)}, expected an array of strings")
        return value

    def numbers(self, key: str, kinds: str) -> npt.NDArray[Any]:
        """A one-dimensional array of numbers; kinds: numpy's letters for the kinds that are allowed."""
        value = self.value(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            wanted = "numbers" if "f" in kinds else "integers"
            self.fail(key, f"is {_describe(value)}, expected an array of {wanted}")
        return value

    def per_token(self, key: str, kinds: str) -> npt.NDArray[Any]:
        """An array with one number for each token."""
        value = self.numbers(key, kinds)
        if len(value) != len(self.tokens):
            self.fail(key, f"has {len(value)} items for {len(self.tokens)} tokens")
        return value

    @property
    def arch(self) -> str:
        """The file's general.architecture, "" if it has none."""
        return self.text(Keys.General.ARCHITECTURE, "")

    @property
    def model(self) -> str:
        """llama.cpp's name for the kind of tokenizer: llama, t5, gpt2, gemma4 ..."""
        return self.text(Key.MODEL)

    @cached_property
    def tokens(self) -> list[str]:
        """The texts of all tokens, in the order of their ids."""
        tokens = self.strings(Key.LIST)
        if not tokens:
            self.fail(Key.LIST, "is empty")
        lengths = list(map(len, tokens))
        for length in (min(lengths), max(lengths)):
            if not 0 < length <= MAX_TOKEN_LENGTH:
                i = lengths.index(length)
                self.fail(Key.LIST, f"has token {i} with {length} characters, expected 1 to {MAX_TOKEN_LENGTH}")
        return tokens

    @cached_property
    def types(self) -> npt.NDArray[np.int64]:
        """The gguf.TokenType of each token."""
        types = self.per_token(Key.TOKEN_TYPE, "iu").astype(np.int64)
        wrong = np.flatnonzero((types < min(TokenType)) | (types > max(TokenType)))
        if wrong.size:
            self.fail(Key.TOKEN_TYPE, f"gives token {wrong[0]} the type {types[wrong[0]]}, which GGUF does not define")
        return types

    def is_type(self, *kinds: TokenType) -> npt.NDArray[np.bool_]:
        """Which tokens have one of some types."""
        return np.isin(self.types, kinds)

    def ids(self) -> dict[str, int]:
        """The id of each token text; no text may occur twice."""
        return self.ids_of(self.tokens)

    def ids_of(self, texts: list[str]) -> dict[str, int]:
        """The id of each text, given in the order of the tokens; they must differ."""
        ids = {text: i for i, text in enumerate(texts)}
        if len(ids) != len(texts):
            i = next(i for i, text in enumerate(texts) if ids[text] != i)
            self.fail(Key.LIST, f"has '{plain_text(texts[i])}' twice, as token {i} and {ids[texts[i]]}")
        return ids

    def role_id(self, role: str) -> int | None:
        """The id that the file gives to a role of ROLE_KEYS, None if it names none."""
        key = ROLE_KEYS[role]
        value = self.file.metadata.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < len(self.tokens)):
            self.fail(key, f"is {_describe(value)}, expected the id of one of {len(self.tokens)} tokens")
        return value


def _describe(value: object) -> str:
    """A metadata value for a message."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list):
        return f"an array of {len(value)} items"
    return plain_text(repr(value))
