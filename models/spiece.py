# SPDX-License-Identifier: Apache-2.0
"""A sentencepiece model from a vocabulary in llama.cpp's form: the ModelProto message, written without protobuf.

llama.cpp keeps of a sentencepiece model the pieces, their scores and types, and, of unigram models, the normalizer. It
also changes some types and spaces, which is undone here so that the ids are those of the original. Field numbers:
sentencepiece/src/sentencepiece_model.proto. What is changed on the way to GGUF: llama.cpp conversion/base.py
_create_vocab_sentencepiece and conversion/t5.py set_vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from gguf.constants import TokenType

from ..errors import plain_text
from .vocabulary import MAX_TOKEN_LENGTH, ROLE_KEYS, Key, Vocabulary

SPACE = "\u2581"  # what sentencepiece writes for a space
N_BYTES = 256

# tokenizer.ggml.model -> TrainerSpec.ModelType.
UNIGRAM, BPE = 1, 2
MODEL_TYPES: Mapping[str, int] = MappingProxyType({"t5": UNIGRAM, "llama": BPE})
# Role -> the piece that usually has it. A Gemma tuned for chat may name its end of turn as the end of text instead.
USUAL_PIECES: Mapping[str, str] = MappingProxyType({"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"})
GEMMA_PIECES: Mapping[str, str] = MappingProxyType({"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"})
# Role -> field numbers of its id and of its piece in TrainerSpec.
ROLE_FIELDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}
)
# The role without which ComfyUI's tokenizer would put -1 around the text: the end for T5, the beginning for Gemma.
NEEDED_ROLES: Mapping[int, str] = MappingProxyType({UNIGRAM: "eos", BPE: "bos"})
NOT_IN_VOCABULARY = -1


@dataclass(frozen=True)
class _Pieces:
    """What becomes of the tokens, in the order of their ids.

    Attributes:
        texts: (n,) as sentencepiece spells them.
        types: int64 (n,), SentencePiece.Type, whose numbers are those of gguf.TokenType.
        scores: float32 (n,).
        roles: id of each of ROLE_FIELDS, NOT_IN_VOCABULARY where there is none.
    """

    texts: list[str]
    types: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    roles: Mapping[str, int]


def model_proto(vocabulary: Vocabulary) -> bytes:
    """Write the ModelProto of a file whose tokenizer.ggml.model is llama or t5.

    Raises:
        UnsupportedArch: the file has no such tokenizer.
        BadFile: its metadata contradicts itself, or sentencepiece would not take it.
    """
    kind = MODEL_TYPES.get(vocabulary.model)
    if kind is None:
        known = " or ".join(f"'{name}'" for name in MODEL_TYPES)
        vocabulary.lack(f"its tokenizer is of the kind '{plain_text(vocabulary.model)}', expected {known}")
    pieces = _read_pieces(vocabulary, kind)
    _check_pieces(vocabulary, pieces)
    return b"".join(
        (
            _encode_pieces(pieces),
            _field(2, _trainer_spec(pieces, kind)),
            _field(3, _normalizer_spec(vocabulary, kind)),
        )
    )


def _is_gemma(vocabulary: Vocabulary) -> bool:
    return "gemma" in vocabulary.arch


def _read_pieces(vocabulary: Vocabulary, kind: int) -> _Pieces:
    """Texts, types and scores as they were before llama.cpp's converter changed them."""
    scores = vocabulary.per_token(Key.SCORES, "f").astype(np.float32)
    if not np.isfinite(scores).all():
        vocabulary.fail(Key.SCORES, f"has {scores[~np.isfinite(scores)][0]} for a score")
    types = vocabulary.types.copy()
    if _is_gemma(vocabulary):
        # Its control tokens are pieces to be found in the text; Hugging Face's flag "special" made them control.
        types[types == TokenType.CONTROL] = TokenType.USER_DEFINED
    types[_lost_user_defined(types, scores, kind)] = TokenType.USER_DEFINED
    roles = _read_roles(vocabulary, kind)
    types[types == TokenType.UNKNOWN] = TokenType.CONTROL
    for role in ("bos", "eos", "pad", "unk"):  # unk last: a file may give its id to pad as well
        if roles[role] != NOT_IN_VOCABULARY:
            types[roles[role]] = TokenType.UNKNOWN if role == "unk" else TokenType.CONTROL
    texts = _escape_spaces(vocabulary)
    _restore_bytes(texts, types)
    return _Pieces(texts, types, scores, roles)


def _lost_user_defined(
    types: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], kind: int
) -> npt.NDArray[np.bool_]:
    """Which tokens were user-defined pieces, a type that llama.cpp's converter writes as normal.

    sentencepiece scores those 0 and normal pieces below: by a log probability, or by their rank from -0.0 downwards. A
    BPE vocabulary without any -0.0 lost its signs, and then 0 says nothing.
    """
    normal = types == TokenType.NORMAL
    zero = normal & (scores == 0) & ~np.signbit(scores)
    trusted = (normal & (scores < 0)).any() if kind == UNIGRAM else (normal & (scores == 0) & np.signbit(scores)).any()
    return zero if trusted else np.zeros_like(zero)


def _read_roles(vocabulary: Vocabulary, kind: int) -> dict[str, int]:
    """The ids of unknown, begin, end and padding, NOT_IN_VOCABULARY where there is none."""
    gemma = _is_gemma(vocabulary)
    reserved = np.flatnonzero(vocabulary.is_type(TokenType.CONTROL, TokenType.UNKNOWN)).tolist()
    usual = {vocabulary.tokens[i]: i for i in reserved}  # not any token: Gemma has "<s>" as an HTML tag
    roles = {}
    for role, piece in (GEMMA_PIECES if gemma else USUAL_PIECES).items():
        stated = vocabulary.role_id(role)
        found = usual.get(piece, stated) if gemma or stated is None else stated
        roles[role] = NOT_IN_VOCABULARY if found is None else found
    unknown = np.flatnonzero(vocabulary.is_type(TokenType.UNKNOWN))
    if len(unknown) == 1:
        roles["unk"] = int(unknown[0])
    for role in ("unk", NEEDED_ROLES[kind]):
        if roles[role] == NOT_IN_VOCABULARY:
            vocabulary.fail(ROLE_KEYS[role], "is missing, and no token shows by its text or type that it is meant")
    return roles


def _escape_spaces(vocabulary: Vocabulary) -> list[str]:
    """Texts with the spaces of user-defined tokens as sentencepiece has them; llama.cpp keeps plain ones."""
    texts = list(vocabulary.tokens)
    present = set(texts)
    for i in np.flatnonzero(vocabulary.is_type(TokenType.USER_DEFINED)).tolist():
        escaped = texts[i].replace(" ", SPACE)
        if escaped not in present:
            texts[i] = escaped
    return texts


def _restore_bytes(texts: list[str], types: npt.NDArray[np.int64]) -> None:
    """Give byte pieces back that were replaced by the character itself, as Gemma's tab; they stand in a row."""
    if not (types == TokenType.BYTE).any() or "<0x00>" not in texts:
        return
    start = texts.index("<0x00>")
    for i in range(start, min(start + N_BYTES, len(texts))):
        if texts[i] == chr(i - start) and i - start < 0x80:
            texts[i] = f"<0x{i - start:02X}>"
            types[i] = TokenType.BYTE


def _check_pieces(vocabulary: Vocabulary, pieces: _Pieces) -> None:
    """Refuse what sentencepiece refuses, or takes without its lengths being checked."""
    vocabulary.ids_of(pieces.texts)
    byte_pieces = {pieces.texts[i] for i in np.flatnonzero(pieces.types == TokenType.BYTE).tolist()}
    if byte_pieces and byte_pieces != {f"<0x{i:02X}>" for i in range(N_BYTES)}:
        vocabulary.fail(Key.TOKEN_TYPE, f"marks {len(byte_pieces)} tokens as bytes, expected <0x00> to <0xFF> or none")
    if any("\0" in text for text in pieces.texts):
        vocabulary.fail(Key.LIST, "has a token with a zero byte")


def _encode_pieces(pieces: _Pieces) -> bytes:
    """ModelProto.pieces (1), repeated: piece (1), score (2), type (3)."""
    tails = np.empty((len(pieces.texts), 7), np.uint8)  # the fields of fixed size: score and type with their tags
    tails[:, 0] = 2 << 3 | 5
    tails[:, 1:5] = pieces.scores.astype("<f4").view(np.uint8).reshape(-1, 4)
    tails[:, 5] = 3 << 3
    tails[:, 6] = pieces.types
    tail_bytes = tails.tobytes()
    lengths = [_varint(i) for i in range(4 * MAX_TOKEN_LENGTH + 16)]  # of up to four bytes a character, and tags
    tag = b"\x0a"  # of the message and of its text: field 1, length-delimited
    out = bytearray()
    for i, text in enumerate(pieces.texts):
        raw = text.encode()
        body = tag + lengths[len(raw)] + raw + tail_bytes[7 * i : 7 * i + 7]
        out += tag + lengths[len(body)] + body
    return bytes(out)


def _trainer_spec(pieces: _Pieces, kind: int) -> bytes:
    """TrainerSpec: model_type (3), vocab_size (4), byte_fallback (35) and the roles; the rest is for training."""
    parts = [
        _number(3, kind),
        _number(4, len(pieces.texts)),
        _number(35, bool((pieces.types == TokenType.BYTE).any())),
    ]
    for role, (id_field, piece_field) in ROLE_FIELDS.items():
        parts.append(_number(id_field, pieces.roles[role]))
        if pieces.roles[role] != NOT_IN_VOCABULARY:
            parts.append(_field(piece_field, pieces.texts[pieces.roles[role]].encode()))
    return b"".join(parts)


def _normalizer_spec(vocabulary: Vocabulary, kind: int) -> bytes:
    """NormalizerSpec: name (1), precompiled_charsmap (2) and the treatment of spaces (3, 4, 5).

    Defaults are llama.cpp's, except that files of Gemma from before the key was written mean False too.
    """
    charsmap = b""
    if Key.PRECOMPILED_CHARSMAP in vocabulary.file.metadata:
        charsmap = vocabulary.numbers(Key.PRECOMPILED_CHARSMAP, "iu").astype(np.uint8).tobytes()
        _check_charsmap(vocabulary, charsmap)
    return b"".join(
        (
            _field(1, b"gguf" if charsmap else b"identity"),
            _field(2, charsmap),
            _number(3, vocabulary.flag(Key.ADD_PREFIX, kind == BPE and not _is_gemma(vocabulary))),
            _number(4, vocabulary.flag(Key.REMOVE_EXTRA_WS, False)),
            _number(5, True),
        )
    )


def _check_charsmap(vocabulary: Vocabulary, charsmap: bytes) -> None:
    """Refuse a character map that would lead sentencepiece, which follows it unchecked, out of its memory.

    It holds the byte size of a double array, the array (little-endian uint32) and zero-terminated texts. A unit without
    bit 31 leads to the 256 units around its own position xor its offset; bit 8 says that a text's position is there.
    Source: sentencepiece third_party/darts_clone/darts.h DoubleArrayUnit, src/normalizer.cc DecodePrecompiledCharsMap.
    """
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if size % 1024 or not size or not texts.endswith(b"\0"):
        vocabulary.fail(Key.PRECOMPILED_CHARSMAP, f"has {len(charsmap)} bytes that are no character map")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    follow = np.flatnonzero(units < 1 << 31)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    targets = follow ^ offsets[follow]
    inside = targets < len(units)  # and so the 256 units around it, as there are whole groups of 256
    texts_at = units[targets[inside & (units[follow] & 0x100 != 0)]] & 0x7FFFFFFF
    if not inside.all() or (texts_at >= len(texts)).any():
        vocabulary.fail(Key.PRECOMPILED_CHARSMAP, "points outside of itself")


def _varint(value: int) -> bytes:
    """A protobuf varint; negative numbers as 64-bit two's complement."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    """A varint field: an int, enum or bool."""
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, content: bytes) -> bytes:
    """A length-delimited field: a message, string or bytes."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content
