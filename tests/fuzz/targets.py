# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: for each reader of files the sound files that damage starts from, and how one is read completely.

A reader may refuse a file with a GGUFError that names it and with nothing else. To add a reader, add a row to TARGETS.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf_builder as build
import imatrix_files
import numpy as np
import sentencepiece
import tokenizers as hf
import torch
import vision_parts
from fuzz.mutate import Content, Fields, Json
from gguf import GGMLQuantizationType as QType
from gguf import TokenType
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_checkpoint, load_diffusion_model, load_text_encoder
from gguf_kit.models import tokenizers
from gguf_kit.quantize import containers, costs_cache, imatrix, recipe_files, shards
from safetensors.torch import save_file

BYTE_ALPHABET = tuple(tokenizers.BYTE_ALPHABET)
DECODER = ("token_embd.weight", *(f"blk.0.{name}.weight" for name in ("attn_norm", "attn_q", "ffn_gate", "ffn_norm")))
GEMMA = (*DECODER, "blk.0.attn_q_norm.weight", "blk.0.post_ffw_norm.weight")
ENCODER_TENSORS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "t5encoder": ("token_embd.weight", "enc.blk.0.ffn_gate.weight", "enc.blk.1.attn_rel_b.weight"),
    "gemma3": GEMMA, "gemma4": (*GEMMA, "blk.0.layer_output_scale.weight"),
    "mistral3": DECODER, "gpt-oss": DECODER, "qwen3": DECODER,
})  # fmt: skip
FLUX_TENSORS: Mapping[str, tuple[int, ...]] = MappingProxyType({
    "img_in.weight": (256, 64), "txt_in.weight": (256, 256), "time_in.in_layer.weight": (256, 256),
    "vector_in.in_layer.weight": (256, 256), "guidance_in.in_layer.weight": (256, 256),
    "double_blocks.0.img_attn.norm.key_norm.scale": (32,), "double_blocks.0.img_attn.qkv.weight": (768, 256),
    "double_blocks.0.img_mod.lin.weight": (1536, 256), "single_blocks.0.linear1.weight": (1792, 256),
    "final_layer.linear.weight": (64, 256),
})  # fmt: skip
SCALAR_TYPES: Mapping[type, int] = MappingProxyType({str: build.STRING, bool: build.BOOL, int: build.U32})
PARTS = ("qwen2vl", "qwen3vl")


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        suffix: of the files' names.
        make: the sound files.
        read: reads one file completely.
    """

    suffix: str
    make: Callable[[], Sequence[Content]]
    read: Callable[[Path], None]

    @staticmethod
    def names_file(error: GGUFError, path: Path) -> bool:
        """Whether a refusal says which file it is about."""
        return path.name in str(error)


# -- the container --


def _containers() -> list[Content]:
    metadata = {
        "general.architecture": (build.STRING, "flux"),
        "general.alignment": (build.U32, 32),
        "u8": (build.U8, 1),
        "f64": (build.F64, 0.5),
        "flag": (build.BOOL, True),
        "tokens": (build.ARRAY, (build.STRING, ["", "ä", "token"])),
        "nested": (build.ARRAY, (build.ARRAY, [(build.STRING, ["a"]), (build.I16, [1, 2])])),
        "comfy.gguf.orig_shape.conv": (build.ARRAY, (build.I32, [1, 2, 1, 1, 2, 2])),
        "split.count": (build.U16, 0),
    }
    tensors = [
        ("q", int(QType.Q8_0), (2, 32), bytes(68)),
        ("k", int(QType.Q4_K), (1, 256), bytes(144)),
        ("conv", int(QType.F16), (2, 2, 2), bytes(16)),
        ("marker", int(QType.F32), (0,), b""),
    ]
    return [Fields(metadata, tensors), Fields({}, tensors[:1])]


def read_container(path: Path) -> None:
    """Every metadata value, every byte and shape of every tensor."""
    file = GGUFFile(path)
    refusal: GGUFError | None = None
    for read, name in itertools.chain(
        zip(itertools.repeat(file.metadata.__getitem__), file.metadata, strict=False),
        zip(itertools.repeat(file.logical_shape), file.tensors, strict=False),
    ):
        try:
            read(name)
        except GGUFError as error:
            refusal = error
    for name, info in file.tensors.items():
        if file.data(name).numel() != info.n_bytes:
            raise RuntimeError(f"{name} has {file.data(name).numel()} bytes, announced {info.n_bytes}")
        int(file.data(name).sum(dtype=torch.int64))
        torch.empty(info.shape, device="meta")
    _ = file.arch, file.carried_metadata()
    if refusal is not None:
        raise refusal


# -- models --


def _models() -> list[Content]:
    flux = [(name, int(QType.F16), shape, bytes(2 * int(np.prod(shape)))) for name, shape in FLUX_TENSORS.items()]
    prefixed = [(f"model.diffusion_model.{name}", *rest) for name, *rest in flux]
    vae = [("first_stage_model.decoder.conv_in.weight", int(QType.F16), (4, 4, 3, 3), bytes(288))]
    tag = {"general.architecture": (build.STRING, "flux"), "config": (build.STRING, "{}")}
    return [Fields(tag, flux), Fields({}, prefixed + vae), *(_encoder(*kind) for kind in ENCODERS)]


def read_model(path: Path) -> None:
    """What the loader nodes do with a file up to the host, as each kind of model."""
    refusals = []
    for load in (load_diffusion_model, load_checkpoint, lambda name: load_text_encoder(name, "none")):
        try:
            load(path)
        except GGUFError as error:
            refusals.append(error)
    _check_names(refusals, path)
    if len(refusals) == 3:
        raise refusals[0]


def _check_names(refusals: Sequence[GGUFError], path: Path) -> None:
    unnamed = [str(error) for error in refusals if path.name not in str(error)]
    if unnamed:
        raise RuntimeError(f"a refusal does not name the file: {unnamed[0]}")


def _vision_parts() -> list[Content]:
    with tempfile.TemporaryDirectory() as folder:
        for kind in PARTS:
            vision_parts.write_part(Path(folder) / kind, kind)
        return [(Path(folder) / kind).read_bytes() for kind in PARTS]


def read_vision_part(path: Path) -> None:
    """A vision part together with each encoder that may take one."""
    refusals = []
    for kind in PARTS:
        encoder = path.with_name(f"encoder-{kind}.gguf")
        if not encoder.exists():
            vision_parts.write_text_encoder(encoder, kind)
        try:
            load_text_encoder(encoder, path)
        except GGUFError as error:
            refusals.append(error)
    if len(refusals) == len(PARTS):
        _check_names(refusals, path)
        raise refusals[0]


# -- tokenizers --


def _vocabulary(arch: str, model: str, **arrays: Any) -> dict[str, tuple[int, Any]]:
    kinds = {"tokens": build.STRING, "scores": build.F32, "token_type": build.I32, "merges": build.STRING,
             "precompiled_charsmap": build.U8}  # fmt: skip
    metadata: dict[str, tuple[int, Any]] = {
        "general.architecture": (build.STRING, arch),
        "tokenizer.ggml.model": (build.STRING, model),
    }
    for name, content in arrays.items():
        key = f"tokenizer.ggml.{name}"
        if name in kinds:
            metadata[key] = build.ARRAY, (kinds[name], content)
        else:
            scalar = (
                build.STRING if isinstance(content, str) else build.BOOL if isinstance(content, bool) else build.U32
            )
            metadata[key] = scalar, content
    return metadata


def _pieces(arch: str, model: str) -> dict[str, tuple[int, Any]]:
    """A sentencepiece vocabulary: roles, bytes, letters, words."""
    roles = ["<unk>", "<s>", "</s>", "<pad>"]
    words = ["\u2581", "a", "b", "c", "\u2581a", "ab", "\u2581ab", "\u2581the", "x\ty"]
    byte_pieces = [f"<0x{i:02X}>" for i in range(256)]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 3, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(words)]
    types[-1] = TokenType.USER_DEFINED
    scores = [0.0] * (len(roles) + 256) + [-float(i) for i in range(len(words))]
    charsmap = (1024).to_bytes(4, "little") + b"\0\0\0\x80" * 256 + b"a\0"
    return _vocabulary(
        arch, model, tokens=[*roles, *byte_pieces, *words], scores=scores, token_type=[int(kind) for kind in types],
        bos_token_id=1, eos_token_id=2, unknown_token_id=0, padding_token_id=3,
        add_space_prefix=True, remove_extra_whitespaces=False, precompiled_charsmap=list(charsmap),
    )  # fmt: skip


def _byte_words(arch: str, pre: str) -> dict[str, tuple[int, Any]]:
    """A byte-level vocabulary with special tokens before the words."""
    special, merges = ["<unk>", "<s>", "</s>", "[INST]"], ["a b", "ab c", "t h", "th e"]
    tokens = [*special, *BYTE_ALPHABET, *(text.replace(" ", "") for text in merges)]
    types = [int(TokenType.CONTROL if i < len(special) else TokenType.NORMAL) for i in range(len(tokens))]
    return _vocabulary(arch, "gpt2", pre=pre, tokens=tokens, token_type=types, merges=merges, bos_token_id=2)


def _gemma4() -> dict[str, tuple[int, Any]]:
    first, merges = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\u2581"], ["a b", "\u2581 ab", "\n \n"]
    words = [*"abcdef", *(text.replace(" ", "") for text in merges)]
    tokens = [*first, *(f"<0x{i:02X}>" for i in range(256)), *words]
    types = [*[int(TokenType.CONTROL)] * 4, *[1] * 2, *[int(TokenType.BYTE)] * 256, *[1] * len(words)]
    return _vocabulary("gemma4", "gemma4", tokens=tokens, token_type=types, merges=merges, unknown_token_id=3)


def _carried() -> dict[str, tuple[int, Any]]:
    text = json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    )
    return {**_gemma4(), "tokenizer.huggingface.json": (build.STRING, text)}


# Each a kind of text encoder: architecture, tokenizer.
ENCODERS: Sequence[tuple[str, dict[str, tuple[int, Any]]]] = (
    ("t5encoder", _pieces("t5encoder", "t5")),
    ("gemma3", _pieces("gemma3", "llama")),
    ("mistral3", _byte_words("mistral3", "tekken")),
    ("gpt-oss", _byte_words("gpt-oss", "gpt-4o")),
    ("gemma4", _gemma4()),
    ("gemma4", _carried()),
)


def _encoder(arch: str, metadata: dict[str, tuple[int, Any]]) -> Fields:
    tensors = [(name, int(QType.F16), (4, 32), bytes(256)) for name in ENCODER_TENSORS[arch]]
    heads = {f"{arch}.attention.head_count{end}": (build.U32, 2) for end in ("", "_kv")}
    return Fields({"general.architecture": (build.STRING, arch), **heads, **metadata}, tensors)


def read_tokenizers(path: Path) -> None:
    """Every kind of tokenizer that can be rebuilt from the file, and what the libraries make of it."""
    file, refusals = GGUFFile(path), []
    for kind in tokenizers.KINDS:
        try:
            raw = tokenizers.build(file, kind).numpy().tobytes()
        except GGUFError as error:
            refusals.append(error)
        else:
            _use_tokenizer(kind, raw)
    _check_names(refusals, path)
    if len(refusals) == len(tokenizers.KINDS):
        raise refusals[0]


def _use_tokenizer(kind: str, raw: bytes) -> None:
    """As ComfyUI hands it to the library; what the library refuses in an exception the host reports."""
    text = "a the ab\tx \u2581 <s> \U0001f600 \u0130"
    try:
        if kind == "spiece":
            sentencepiece.SentencePieceProcessor(model_proto=raw).encode(text)
        elif kind == "json":
            hf.Tokenizer.from_str(raw.decode()).encode(text)
        else:
            json.loads(raw)
    except Exception as error:  # the tokenizers package has no class of its own
        if type(error) not in (Exception, RuntimeError, ValueError, OSError):
            raise


# -- importance matrices, recipes, sources --


def _gguf_imatrices() -> list[Content]:
    tensors = []
    for name, n_matrices in (("blk.0.attn_q.weight", 1), ("experts.weight", 3)):
        parts = {"in_sum2": (n_matrices, 8), "counts": (n_matrices, 1), "in_sum": (n_matrices, 8), "gain": (2,)}
        for part, shape in parts.items():
            data = np.ones(shape, "<f4").tobytes()
            tensors.append((f"{name}.{part}", int(QType.F32), shape, data))
    tensors.append(("blk.0.attn_q.weight.rows", int(QType.BF16), (4, 8), bytes(64)))
    metadata = {
        "general.architecture": (build.STRING, "imatrix"),
        "imatrix.datasets": (build.ARRAY, (build.STRING, ["a", "b"])),
        "imatrix.chunk_count": (build.U32, 2),
        "imatrix.chunk_size": (build.U32, 512),
    }
    return [Fields(metadata, tensors)]


def _legacy_imatrices() -> list[Content]:
    values = np.linspace(0, 1, 16, dtype=np.float32)
    return [imatrix_files.legacy_bytes({"blk.0.attn_q.weight": (values, 4), "blk.1.ffn.weight": (values[:3], 0)})]


def read_imatrix(path: Path) -> None:
    """All entries and what quantizing takes of them."""
    read = imatrix.read_imatrix(path)
    for name, entry in read.entries.items():
        if entry.n_matrices == 1:
            read.importance(name, entry.n_columns)
        if not torch.isfinite(entry.means).all():
            raise RuntimeError(f"the means of {name} are not finite")


def _recipes() -> list[Content]:
    text = "# Flux, Q4_K_S: 4.6 bits per weight\nimg_in.weight=BF16\nblk=0.weight = q4_k \n#weighting a=root\r\n\n"
    return [text.encode(), b"\xef\xbb\xbfname=F32\n#weighting name=mixed\n"]


def read_recipe(path: Path) -> None:
    recipe_files.read_recipe_file(path)


def _sources() -> list[Content]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [12, 16]},
    }
    safetensors = Json(header, lambda raw: len(raw).to_bytes(8, "little") + raw + bytes(16))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        torch.save({"state_dict": {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}}, path)
        archive = path.read_bytes()
        torch.save({"a": torch.zeros(2, 3)}, path, _use_new_zipfile_serialization=False)
        return [safetensors, safetensors.write(), archive, path.read_bytes()]


def read_source(path: Path) -> None:
    """All tensors of a file that is to be converted."""
    for tensor in containers.open_file(path).tensors.values():
        if tuple(tensor.read().shape) != tensor.shape:
            raise RuntimeError("a tensor is read in another shape than announced")


def _indexes() -> list[Content]:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return [Json({"metadata": {"total_size": 28}, "weight_map": weight_map})]


def read_index(path: Path) -> None:
    """The index and the files that it names."""
    for i, name in enumerate("ab", 1):
        shard = path.with_name(f"model-{i:05d}-of-00002.safetensors")
        if not shard.exists():
            save_file({name: torch.zeros(2)}, shard)
    shards.open_path(path)


def _caches() -> list[Content]:
    errors = {"Q8_0 none": [0.1, 0.01], "Q4_K root": None}
    record = {"key": "aa", "name": "img_in.weight", "energy": 1.5, "errors": errors}
    return [Json(record, lambda raw: (costs_cache.BEGINNING + b", " + raw[1:] + b"\n") * 2)]


def read_cache(path: Path) -> None:
    costs_cache.CostsCache(path)


TARGETS: Mapping[str, Target] = MappingProxyType({
    "container": Target(".gguf", _containers, read_container),
    "model": Target(".gguf", _models, read_model),
    "vision": Target(".gguf", _vision_parts, read_vision_part),
    "tokenizer": Target(".gguf", lambda: [Fields(metadata) for _, metadata in ENCODERS], read_tokenizers),
    "imatrix": Target(".gguf", _gguf_imatrices, read_imatrix),
    "legacy-imatrix": Target(".dat", _legacy_imatrices, read_imatrix),
    "recipe": Target(".txt", _recipes, read_recipe),
    "source": Target(".bin", _sources, read_source),
    "index": Target(".safetensors.index.json", _indexes, read_index),
    "cache": Target(".jsonl", _caches, read_cache),
})  # fmt: skip
