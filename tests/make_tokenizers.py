# SPDX-License-Identifier: Apache-2.0
"""Trains small tokenizers and writes them into GGUF files as llama.cpp's converters do.

The rules of those converters stand here a second time, in their own words: a test must not take them from the code that
it judges. Sources: llama.cpp conversion/base.py _create_vocab_sentencepiece and get_vocab_base, conversion/t5.py
set_vocab, conversion/gemma.py set_vocab, gguf-py/gguf/vocab.py MistralVocab.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf_builder as builder
import numpy as np
import sentencepiece
import tokenizers
from gguf import TokenType

CORPUS = (Path(__file__).resolve().parent / "data" / "tokenizers" / "multilingual.txt").read_text("utf-8").splitlines()

# How GPT-4o's and Mistral's tokenizers cut words, as their tokenizer files have it.
GPT_4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the tokenizers never saw, and what their rules treat specially.
TEXTS = (
    *CORPUS,
    "",
    " ",
    "  two  spaces   and a tail  ",
    "tabs\tand\n\nlines\r\nof text",
    "Ünïcödé ﬁne ① \uff46\uff55\uff4c\uff4c\u3000\uff57\uff49\uff44\uff45 e\u0301 \u200b zero",
    "emoji 😀 👩‍👩‍👧 🫠 and ∑∫√ \U0001f9ff",
    "a <turn>b<a b>c<ctl>d</s> <s> <bos> <pad>",
    "▁raw▁marks▁▁",
    "(masterpiece:1.2), [detail], 8k, 3.14159, it's I'LL",
    "x" * 300,
)


@dataclass
class Arrays:
    """What goes under tokenizer.ggml."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def add(self, token: str, score: float, kind: TokenType) -> None:
        self.tokens.append(token)
        self.scores.append(float(score))
        self.types.append(int(kind))

    def set(self, i: int, token: str, score: float, kind: TokenType) -> None:
        self.tokens[i], self.scores[i], self.types[i] = token, float(score), int(kind)


def train_spiece(**options: Any) -> bytes:
    """A sentencepiece ModelProto trained on CORPUS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 900, "character_coverage": 1.0, **options},
    )
    return model.getvalue()


def spiece_arrays(model: bytes, n_rows: int | None = None) -> Arrays:
    """Pieces as the converter writes them, filled up with unused ones to the rows of the embedding."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    arrays = Arrays()
    for i in range(processor.get_piece_size()):
        kind = TokenType.NORMAL
        if processor.is_unknown(i):
            kind = TokenType.UNKNOWN
        elif processor.is_control(i):
            kind = TokenType.CONTROL
        elif processor.is_unused(i):
            kind = TokenType.UNUSED
        elif processor.is_byte(i):
            kind = TokenType.BYTE
        arrays.add(processor.id_to_piece(i), processor.get_score(i), kind)
    for i in range(len(arrays.tokens), n_rows or 0):
        arrays.add(f"[PAD{i}]", -10000.0, TokenType.UNUSED)
    return arrays


def apply_added_tokens(arrays: Arrays, added: Mapping[str, bool]) -> None:
    """What the converter does for added_tokens_decoder: {content: whether it is special}."""
    for content, special in added.items():
        i = arrays.tokens.index(content)
        if special:
            arrays.set(i, content, -1000.0, TokenType.CONTROL)
        else:
            arrays.set(i, content.replace("\u2581", " "), -1000.0, TokenType.USER_DEFINED)


def normalizer_of(model: bytes) -> dict[int, Any]:
    """NormalizerSpec of a ModelProto: {field number: value}."""
    return dict(read_message(dict(read_message(model))[3]))


def read_message(raw: bytes) -> list[tuple[int, Any]]:
    """The fields of a protobuf message: (number, value), in order."""
    fields, pos = [], 0

    def varint() -> int:
        nonlocal pos
        value = shift = 0
        while True:
            byte = raw[pos]
            pos += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while pos < len(raw):
        tag = varint()
        value: Any
        if tag & 7 == 0:
            value = varint()
        elif tag & 7 == 5:
            (value,) = struct.unpack_from("<f", raw, pos)
            pos += 4
        elif tag & 7 == 2:
            end = varint() + pos
            value, pos = raw[pos:end], end
        else:
            raise ValueError(f"wire type {tag & 7}")
        fields.append((tag >> 3, value))
    return fields


def write_gguf(
    path: Path,
    arch: str,
    model: str,
    arrays: Arrays,
    *,
    roles: Mapping[str, int] | None = None,
    merges: Sequence[str] = (),
    pre: str = "",
    spaces: Mapping[str, bool] | None = None,
    charsmap: bytes = b"",
) -> Path:
    """Write a GGUF that holds a tokenizer and nothing else.

    Args:
        roles: bos, eos, unk, pad -> id.
        spaces: add_space_prefix, remove_extra_whitespaces.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(arrays.tokens)
    if arrays.scores:
        writer.add_token_scores(arrays.scores)
    writer.add_token_types(arrays.types)
    if merges:
        writer.add_token_merges(list(merges))
    for name, value in (spaces or {}).items():
        getattr(writer, f"add_{name}")(value)
    if charsmap:
        writer.add_precompiled_charsmap(charsmap)
    for role, i in (roles or {}).items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_t5(path: Path, model: bytes, **changes: Any) -> Path:
    """A unigram model as the converter of T5 writes it, its embedding padded."""
    normalizer = normalizer_of(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    options = {
        "roles": {"eos": processor.eos_id(), "unk": processor.unk_id()},
        "spaces": {
            "add_space_prefix": bool(normalizer.get(3, 1)),
            "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        },
        "charsmap": normalizer.get(2, b""),
    }
    arrays = spiece_arrays(model, processor.get_piece_size() + 7)
    return write_gguf(path, "t5encoder", "t5", arrays, **options | changes)


GEMMA_SYMBOLS = ("<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "\t", "<table>")
GEMMA_ROLES = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}


def train_gemma(**options: Any) -> bytes:
    """A model of Gemma's kind: BPE over bytes, nothing normalized, symbols to be found in the text."""
    return train_spiece(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(GEMMA_SYMBOLS),
        **{f"{role}_id": i for role, i in GEMMA_ROLES.items()},
        **{f"{role}_piece": f"<{role}>" for role in GEMMA_ROLES},
        **options,
    )


def write_gemma(path: Path, model: bytes, arch: str = "gemma3", **changes: Any) -> Path:
    """As the converter writes Gemma 2 and 3: special tokens become control, even the unknown one."""
    arrays = spiece_arrays(model)
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"}
    added = {token: token in special for token in (*special, *GEMMA_SYMBOLS)}
    apply_added_tokens(arrays, dict(sorted(added.items())))
    options = {"roles": GEMMA_ROLES, "spaces": {"add_space_prefix": False}}
    return write_gguf(path, arch, "llama", arrays, **options | changes)


def train_bytes(pattern: str, vocab_size: int = 700, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without special tokens, trained on CORPUS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def hf_arrays(tokenizer: tokenizers.Tokenizer, n_rows: int) -> tuple[Arrays, list[str]]:
    """Tokens, types and merges of a tokenizer.json, without scores."""
    content = json.loads(tokenizer.to_str())
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    arrays = Arrays()
    for i in range(n_rows):
        if i not in by_id:
            arrays.add(f"[PAD{i}]", 0.0, TokenType.UNUSED)
        elif i not in added:
            arrays.add(by_id[i], 0.0, TokenType.NORMAL)
        elif added[i]["special"]:
            arrays.add(by_id[i], 0.0, TokenType.CONTROL)
        else:
            arrays.add(by_id[i].replace("\u2581", " "), 0.0, TokenType.USER_DEFINED)
    arrays.scores = []
    return arrays, [" ".join(pair) for pair in content["model"]["merges"]]


TEKKEN_SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<ctl>",
                   "<SPECIAL_9>", "<SPECIAL_10>", "<pad>")  # fmt: skip


def train_tekken(pattern: str = TEKKEN_PATTERN) -> dict[str, Any]:
    """A tekken.json: bytes first in their own order, then merges in the order of their ranks."""
    vocab = train_bytes(pattern).get_vocab()
    alphabet = gguf.vocab.bytes_to_unicode()
    to_byte = {char: byte for byte, char in alphabet.items()}
    longer = sorted((token for token in vocab if len(token) > 1), key=vocab.__getitem__)
    words = [bytes([i]) for i in range(256)] + [bytes(to_byte[char] for char in token) for token in longer]
    return {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + len(TEKKEN_SPECIALS),
            "default_num_special_tokens": len(TEKKEN_SPECIALS),
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(word).decode()} for i, word in enumerate(words)],
        "special_tokens": [{"rank": i, "token_str": token} for i, token in enumerate(TEKKEN_SPECIALS)],
    }


def write_tekken(path: Path, tekken: Mapping[str, Any], **changes: Any) -> Path:
    """As the converter writes Mistral's tekken: control tokens, then words in GPT-2's spelling of bytes."""
    alphabet = gguf.vocab.bytes_to_unicode()
    arrays = Arrays()
    for token in tekken["special_tokens"]:
        arrays.add(token["token_str"], 0.0, TokenType.CONTROL)
    for word in tekken["vocab"]:
        raw = base64.b64decode(word["token_bytes"])
        arrays.add("".join(alphabet[byte] for byte in raw), 0.0, TokenType.NORMAL)
    return write_gguf(path, "llama", "gpt2", arrays, **{"pre": "tekken", "roles": {"bos": 1, "eos": 2}} | changes)


def train_gemma4() -> tokenizers.Tokenizer:
    """A tokenizer.json of Gemma 4's kind: characters and byte pieces, spaces escaped, merges over the whole text."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False)
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Split("\u2581", "merged_with_next")
    learner.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(learner.to_str())["model"]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<|turn>", "<turn|>", "\n", "\n\n", "▁▁"]
    tokens = first + [f"<0x{i:02X}>" for i in range(256)] + [t for t in learnt["vocab"] if t not in first]
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("\n", "\n"), ("▁", "▁"), *map(tuple, learnt["merges"])],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<unused0>", normalized=False)])
    return tokenizer


def write_gemma4(path: Path, tokenizer: tokenizers.Tokenizer, **changes: Any) -> Path:
    """As the converter writes Gemma 4: bytes are typed, added tokens that are not special are not."""
    arrays, merges = hf_arrays(tokenizer, tokenizer.get_vocab_size())
    arrays.scores = [-1000.0] * len(arrays.tokens)
    for i, token in enumerate(arrays.tokens):
        if token.startswith("<0x"):
            arrays.types[i] = int(TokenType.BYTE)
        elif arrays.types[i] == TokenType.USER_DEFINED:
            arrays.types[i] = int(TokenType.NORMAL)
    options = {"merges": merges, "roles": {"bos": 2, "eos": 1, "pad": 0, "unk": 3}}
    return write_gguf(path, "gemma4", "gemma4", arrays, **options | changes)


def train_gpt_oss() -> tokenizers.Tokenizer:
    """A tokenizer.json of GPT-OSS's kind, where some words are tokens that no merge makes."""
    content = json.loads(train_bytes(GPT_4O_PATTERN, ignore_merges=True).to_str())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|message|>", "<|endoftext|>"])
    return tokenizer


def write_gpt_oss(path: Path, tokenizer: tokenizers.Tokenizer, **changes: Any) -> Path:
    """As the converter writes byte-level BPE, its embedding padded."""
    arrays, merges = hf_arrays(tokenizer, tokenizer.get_vocab_size() + 9)
    return write_gguf(path, "gpt-oss", "gpt2", arrays, **{"merges": merges, "pre": "gpt-4o"} | changes)


# Gemma's tokens, and about as many merges as it has.
LARGE_VOCABULARY, LARGE_MERGES = 262_144, 500_000


def write_large(path: Path, model: str) -> Path:
    """A vocabulary of Gemma's size under a tokenizer.ggml.model; every word of two can be merged in two ways."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(8192))]
    pairs = [(tokens[3 + i % 512], tokens[3 + i // 512]) for i in range(LARGE_VOCABULARY - len(tokens))]
    tokens += [left + right for left, right in pairs]
    merges = [f"{left} {right}" for left, right in pairs]
    merges = (merges + merges)[:LARGE_MERGES]
    types = np.asarray([2, 3, 3] + [1] * (LARGE_VOCABULARY - 3), "<i4")
    b = builder
    metadata = {
        "model": (b.STRING, model),
        "scores": (b.ARRAY, b.u32(b.F32) + b.u64(len(types)) + (-np.arange(len(types), dtype="<f4")).tobytes()),
        "token_type": (b.ARRAY, b.u32(b.I32) + b.u64(len(types)) + types.tobytes()),
        "tokens": (b.ARRAY, (b.STRING, tokens)),
        "merges": (b.ARRAY, (b.STRING, merges)),
    }
    path.write_bytes(b.build_gguf({f"tokenizer.ggml.{key}": typed for key, typed in metadata.items()}, []))
    return path
