# SPDX-License-Identifier: Apache-2.0
"""Tokenizers rebuilt from a GGUF's metadata, in the forms that ComfyUI looks for in a text encoder's state dict.

ComfyUI brings the tokenizers of CLIP, T5, Llama and Qwen itself; the others it reads from a uint8 tensor that stands
beside the weights. To add a kind, add a row to KINDS.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf.constants import TokenType

from ..errors import plain_text
from ..gguf_file import GGUFFile
from .spiece import SPACE, model_proto
from .vocabulary import Key, Vocabulary

# More pieces than this that no merge makes, and merges are missing; Gemma has 6,414 such pieces.
MAX_UNMERGED = 16384

_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}|"
    r"\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the expression that cuts text into words before merging. Facts from the models' tokenizer files.
PRE_PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "gpt-4o": _WORDS.replace("{suffix}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("{digits}", "{1,3}"),
        "tekken": _WORDS.replace("{suffix}", "").replace("{digits}", ""),
    }
)


def _byte_alphabet() -> dict[str, int]:
    """The characters in which GPT-2's vocabulary spells bytes: printable Latin-1 as itself, the rest from U+0100 on.

    Source: openai/gpt-2 src/encoder.py bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_ALPHABET: Mapping[str, int] = MappingProxyType(_byte_alphabet())


def build(file: GGUFFile, kind: str) -> torch.Tensor:
    """Rebuild the tokenizer of a file.

    Args:
        kind: a key of KINDS.
    Returns:
        uint8 (n_bytes,), for the state dict under KINDS[kind].key.
    Raises:
        UnsupportedArch: the file has no tokenizer, or one that cannot become this kind.
        BadFile: its metadata contradicts itself.
    """
    return torch.frombuffer(bytearray(KINDS[kind].make(Vocabulary(file))), dtype=torch.uint8)


def _make_tekken(vocabulary: Vocabulary) -> bytes:
    """Mistral's tekken.json: special tokens, then byte strings; an id is also the rank in which merging makes it."""
    _require_model(vocabulary, "gpt2")
    tokens = vocabulary.tokens
    ordinary = np.flatnonzero(vocabulary.is_type(TokenType.NORMAL))
    n_special, end = (int(ordinary[0]), int(ordinary[-1]) + 1) if ordinary.size else (0, 0)
    if not n_special or len(ordinary) != end - n_special:
        vocabulary.fail(Key.TOKEN_TYPE, "does not list special tokens first and ordinary ones behind, as tekken does")
    if not vocabulary.is_type(TokenType.UNUSED)[end:].all():
        vocabulary.fail(Key.TOKEN_TYPE, f"has special tokens after the ordinary ones, from {end} on")
    vocabulary.ids()
    words = tokens[n_special:end]
    _check_alphabet(vocabulary, words)
    to_latin1 = {ord(char): byte for char, byte in BYTE_ALPHABET.items()}
    raw = [word.translate(to_latin1).encode("latin-1") for word in words]
    config = {
        "pattern": PRE_PATTERNS["tekken"],
        "num_vocab_tokens": len(raw),
        "default_vocab_size": end,
        "default_num_special_tokens": n_special,
    }
    return _to_json(
        {
            "config": config,
            "vocab": [{"rank": i, "token_bytes": base64.b64encode(b).decode()} for i, b in enumerate(raw)],
            "special_tokens": [{"rank": i, "token_str": text} for i, text in enumerate(tokens[:n_special])],
        }
    )


def _make_json(vocabulary: Vocabulary) -> bytes:
    """Hugging Face's tokenizer.json of a BPE model, in the part that encodes and decodes text."""
    if Key.HF_JSON in vocabulary.file.metadata:
        return _carried_json(vocabulary)
    makers = {"gemma4": _json_of_gemma, "gpt2": _json_of_gpt2}
    _require_model(vocabulary, *makers)
    return _to_json({"version": "1.0", "truncation": None, "padding": None, **makers[vocabulary.model](vocabulary)})


def _carried_json(vocabulary: Vocabulary) -> bytes:
    """The tokenizer.json that some converters put into the file whole."""
    text = vocabulary.text(Key.HF_JSON)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        vocabulary.fail(Key.HF_JSON, f"is not JSON: {plain_text(str(error))}")
    return text.encode()


def _json_of_gemma(vocabulary: Vocabulary) -> dict[str, Any]:
    """Gemma 4: characters and byte pieces, spaces escaped, merges over the whole text."""
    texts, ids = vocabulary.tokens, vocabulary.ids()
    merges, merged = _read_merges(vocabulary, ids)
    # llama.cpp's converter keeps the type of some added tokens only; no merge makes the others.
    normal = np.flatnonzero(vocabulary.is_type(TokenType.NORMAL)).tolist()
    lost = [i for i in normal if len(texts[i]) > 1 and texts[i] not in merged]
    if len(lost) > MAX_UNMERGED:
        vocabulary.fail(Key.MERGES, f"makes all but {len(lost)} of {len(normal)} tokens, so merges are missing")
    typed = np.flatnonzero(vocabulary.is_type(TokenType.CONTROL, TokenType.USER_DEFINED)).tolist()
    unknown = vocabulary.role_id("unk")
    return {
        "added_tokens": _added_tokens(vocabulary, sorted([*typed, *lost])),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe_model(ids, merges, None if unknown is None else texts[unknown], byte_fallback=True),
    }


def _json_of_gpt2(vocabulary: Vocabulary) -> dict[str, Any]:
    """Byte-level BPE, as GPT-OSS has it; a word that is a token is taken whole, as tiktoken does."""
    pre = vocabulary.text(Key.PRE)
    if pre not in PRE_PATTERNS:
        vocabulary.lack(f"its tokenizer cuts words by the rule '{plain_text(pre)}', which is not known here")
    _check_alphabet(vocabulary, [vocabulary.tokens[i] for i in np.flatnonzero(vocabulary.is_type(TokenType.NORMAL))])
    unused = set(np.flatnonzero(vocabulary.is_type(TokenType.UNUSED)).tolist())
    ids = {text: i for text, i in vocabulary.ids().items() if i not in unused}
    added = np.flatnonzero(vocabulary.is_type(TokenType.CONTROL, TokenType.USER_DEFINED)).tolist()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRE_PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    return {
        "added_tokens": _added_tokens(vocabulary, added),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": _bpe_model(ids, _read_merges(vocabulary, ids)[0], None, byte_fallback=False) | {"ignore_merges": True},
    }


def _require_model(vocabulary: Vocabulary, *names: str) -> None:
    if vocabulary.model not in names:
        known = " or ".join(f"'{name}'" for name in names)
        vocabulary.lack(f"its tokenizer is of the kind '{plain_text(vocabulary.model)}', expected {known}")


def _check_alphabet(vocabulary: Vocabulary, words: list[str]) -> None:
    """Ordinary tokens must be spelled in the byte alphabet, and every byte must have one."""
    foreign = set().union(*words) - BYTE_ALPHABET.keys()
    if foreign:
        vocabulary.fail(Key.LIST, f"has an ordinary token with the character {min(foreign)!a}, which spells no byte")
    missing = len(BYTE_ALPHABET.keys() - set(words))
    if missing:
        vocabulary.fail(Key.LIST, f"has no token for {missing} of 256 bytes")


def _read_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> tuple[list[str], set[str]]:
    """The merges, first to last, and what they make; both parts and the whole must be tokens."""
    merges = vocabulary.strings(Key.MERGES)
    parts = set(" ".join(merges).split(" "))
    made = {text.replace(" ", "") for text in merges}
    # Half a million of them: all are tried at once, and one by one only to name the one that is wrong.
    if not set(map(str.count, merges, repeat(" "))) <= {1} or not ids.keys() >= parts | made:
        for i, text in enumerate(merges):
            left, space, right = text.partition(" ")
            if not space or not ids.keys() >= {left, right, left + right}:
                problem = f"has '{plain_text(text)}' as merge {i}, which does not join two tokens to one"
                vocabulary.fail(Key.MERGES, problem)
        vocabulary.fail(Key.MERGES, "has a merge of more than two parts, or none at all")
    return merges, made


def _added_tokens(vocabulary: Vocabulary, ids: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything else is done to it."""
    special = set(np.flatnonzero(vocabulary.is_type(TokenType.CONTROL)).tolist())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": vocabulary.tokens[i], **flags, "special": i in special} for i in ids]


def _bpe_model(
    ids: Mapping[str, int], merges: list[str], unknown: str | None, *, byte_fallback: bool
) -> dict[str, Any]:
    """The model section; merges are "left right", a third of the time and memory that pairs take."""
    misread = "#version" in "".join(merges)  # dropped by the tokenizers package as the first line of a merges.txt
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [text.split(" ") for text in merges] if misread else merges,
    }


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Kind:
    """A form in which ComfyUI takes a tokenizer.

    Attributes:
        key: where ComfyUI looks for it in the state dict.
        make: vocabulary to the bytes.
    """

    key: str
    make: Callable[[Vocabulary], bytes]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "spiece": Kind("spiece_model", model_proto),
        "tekken": Kind("tekken_model", _make_tekken),
        "json": Kind("tokenizer_json", _make_json),
    }
)
# State-dict keys that hold a tokenizer's bytes.
BYTE_KEYS = frozenset(kind.key for kind in KINDS.values())
