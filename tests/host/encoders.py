# SPDX-License-Identifier: Apache-2.0
"""Reduced-size text encoders of the host's own classes, written as llama.cpp's converter writes them.

The names come from gguf-py's tables, which the pack does not read; permutation and norm offsets are made here anew.
Widths and layer counts are the smallest that the host's detection still takes for the encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import comfy.ops
import comfy.sd
import gguf
import numpy as np
import torch
from make_files import quantize_with_ggml

Q = gguf.GGMLQuantizationType
ARCH = gguf.MODEL_ARCH
CPU = torch.device("cpu")
# Vision and audio parts that a class brings along: not under test here, and large.
OTHER_PARTS = (
    "comfy.clip_model.CLIPVision",
    "comfy.text_encoders.llama.Gemma3MultiModalProjector",
    "comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer",
    "comfy.text_encoders.qwen3vl.Qwen3VLVisionModel",
    "comfy.text_encoders.qwen35.Qwen35VisionModel",
    *(
        f"comfy.text_encoders.gemma4.Gemma4{part}"
        for part in ("VisionEncoder", "MultiModalProjector", "AudioEncoder", "AudioProjector")
    ),
    *(f"comfy.text_encoders.gemma4.Gemma4{part}" for part in ("UnifiedVisionEmbedder", "RMSNormProjector")),
)
TINY = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ONE_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1}


@dataclasses.dataclass(frozen=True)
class Family:
    """One encoder.

    Attributes:
        model: module below comfy.text_encoders and class.
        arch: gguf-py's architecture, whose names the file gets.
        detected: name of the host's TEModel.
        config: the class's configuration, reduced.
        clip_type: a type of the CLIP loader that takes it.
        tag: general.architecture, if not the arch's.
        permuted, norm_offset, tokenizer: what llama.cpp does to it and writes for it.
        left_out: state-dict keys that the file has no tensor for.
    """

    model: str
    arch: gguf.MODEL_ARCH
    detected: str
    config: Mapping[str, Any]
    clip_type: str
    tag: str = ""
    permuted: bool = False
    norm_offset: float = 0.0
    tokenizer: str = ""
    extra: tuple[str, ...] = ()

    def host_class(self) -> Any:
        """The class, or None in a host that does not know the encoder."""
        module, name = self.model.split(".")
        try:
            return getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name, None)
        except ImportError:
            return None

    def known(self) -> bool:
        """Whether the running host has the class and detects it."""
        return self.host_class() is not None and hasattr(comfy.sd.TEModel, self.detected)

    def build(self, operations: Any = comfy.ops.manual_cast) -> torch.nn.Module:
        """The host's model, without its other parts (see without_other_parts)."""
        return self.host_class()(dict(self.config), torch.float32, CPU, operations)


def _qwen3(detected: str, model: str, width: int, clip_type: str) -> Family:
    return Family(f"llama.{model}", ARCH.QWEN3, detected, TINY | HEADS | {"hidden_size": width}, clip_type)


def _gemma4(detected: str, model: str, n_layers: int) -> Family:
    return Family(
        f"gemma4.{model}",
        ARCH.GEMMA4,
        detected,
        TINY | ONE_HEAD | {"num_hidden_layers": n_layers},
        "ltxv",
        tokenizer="gemma4",
        extra=("rope_freqs.weight",),
    )


FAMILIES = {
    "llama 3": Family(
        "llama.Llama2",
        ARCH.LLAMA,
        "LLAMA3_8",
        TINY | HEADS,
        "hidream",
        permuted=True,
        extra=("rope_freqs.weight", "output.weight"),
    ),
    "mistral small": Family(
        "llama.Mistral3Small24B",
        ARCH.LLAMA,
        "MISTRAL3_24B_PRUNED_FLUX2",
        TINY | HEADS | {"hidden_size": 5120},
        "flux2",
        permuted=True,
        tokenizer="tekken",
        extra=("output.weight",),
    ),
    "ministral": Family(
        "llama.Ministral3_3B",
        ARCH.MISTRAL3,
        "MINISTRAL_3_3B",
        TINY | HEADS | {"hidden_size": 3072},
        "flux2",
        permuted=True,
        tokenizer="tekken",
    ),
    "qwen2.5 3b": Family("llama.Qwen25_3B", ARCH.QWEN2VL, "QWEN25_3B", TINY | HEADS, "omnigen2"),
    "qwen2.5-vl 7b": Family(
        "llama.Qwen25_7BVLI",
        ARCH.QWEN2VL,
        "QWEN25_7B",
        TINY | {"num_attention_heads": 4, "num_key_value_heads": 4},
        "qwen_image",
        extra=("output.weight",),
    ),
    "qwen2.5 without vision": Family("llama.Qwen25_3B", ARCH.QWEN2, "QWEN25_3B", TINY | HEADS, "omnigen2"),
    "qwen3 0.6b": _qwen3("QWEN3_06B", "Qwen3_06B", 1024, "stable_diffusion"),
    "qwen3 1.7b": _qwen3("QWEN3_2B", "Ovis25_2B", 2048, "ovis"),
    "qwen3 4b": _qwen3("QWEN3_4B", "Qwen3_4B", 2560, "lumina2"),
    "qwen3 8b": _qwen3("QWEN3_8B", "Qwen3_8B", 4096, "flux2"),
    "qwen3-vl 8b, text only": Family(
        "qwen3vl.Qwen3VL", ARCH.QWEN3VL, "QWEN3VL_8B", TINY | HEADS | {"hidden_size": 4096}, "flux2"
    ),
    "gemma 2": Family(
        "llama.Gemma2_2B", ARCH.GEMMA2, "GEMMA_2_2B", TINY | ONE_HEAD, "lumina2", norm_offset=1.0, tokenizer="llama"
    ),
    "gemma 3 4b": Family(
        "llama.Gemma3_4B",
        ARCH.GEMMA3,
        "GEMMA_3_4B",
        TINY | ONE_HEAD | {"num_hidden_layers": 6},
        "lumina2",
        norm_offset=1.0,
        tokenizer="llama",
    ),
    "gemma 3 12b": Family(
        "llama.Gemma3_12B",
        ARCH.GEMMA3,
        "GEMMA_3_12B",
        TINY | ONE_HEAD | {"num_hidden_layers": 48},
        "ltxv",
        norm_offset=1.0,
        tokenizer="llama",
    ),
    "gemma 4 e2b": _gemma4("GEMMA_4_E2B", "Gemma4_E2B", 35),
    "gemma 4 e4b": _gemma4("GEMMA_4_E4B", "Gemma4_E4B", 42),
    "gemma 4 12b": _gemma4("GEMMA_4_12B", "Gemma4_12B", 48),
}


# Linear attention with more heads of values than of keys; the fourth block is an ordinary one.
FAMILIES["qwen3.5"] = Family(
    "qwen35.Qwen35",
    ARCH.QWEN35,
    "QWEN35_2B",
    TINY
    | ONE_HEAD
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 64},
    "lumina2",
    norm_offset=1.0,
)


def without_other_parts(monkeypatch: Any) -> None:
    """Let the host's classes be built without their vision and audio parts."""
    for path in OTHER_PARTS:
        module, name = path.rsplit(".", 1)
        try:
            owner = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(owner, name):
            monkeypatch.setattr(owner, name, lambda *args, **kwargs: torch.nn.Module())


def permute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows (n_heads, 2, n) of a projection as (n_heads, n, 2), as llama.cpp stores them for its rope."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def value_order(key: str, config: Mapping[str, Any]) -> tuple[int, np.ndarray] | None:
    """(axis, where each row or column comes from) of a weight of linear attention, as llama.cpp stores it.

    In the host the heads of values of one head of keys follow one another; in the file the first of each do.
    """
    n_keys, n_values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    part = next((p for p in key.split(".") if p.startswith(("in_proj", "out_proj", "conv1d", "dt_b", "A_log"))), "")
    if not part or "linear_attn" not in key:
        return None
    head = 1 if part in ("in_proj_a", "in_proj_b", "dt_bias", "A_log") else config["linear_value_head_dim"]
    order = np.arange(n_values * head).reshape(n_keys, n_values // n_keys, head).swapaxes(0, 1).reshape(-1)
    n_before = 2 * n_keys * config["linear_key_head_dim"] if part in ("in_proj_qkv", "conv1d") else 0
    return int(part == "out_proj"), np.concatenate([np.arange(n_before), n_before + order])


def write_qwen35(family: Family, path: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """As write_encoder, for a model with linear attention."""
    config, names = family.config, {"dt_bias": "dt_proj.bias", "conv1d.weight": "conv1d.weight", "A_log": "A_log"}
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    generator, weights = np.random.default_rng(seed), {}
    for i, (key, shape) in enumerate((k, tuple(v.shape)) for k, v in family.build().state_dict().items()):
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        values = values.reshape(-1, shape[-1]) if "conv1d" in key else values
        axis, order = value_order(key, config) or (0, np.arange(values.shape[0]))
        stored = -np.exp(values) if key.endswith("A_log") else values
        qtype = Q.Q8_0 if "out_proj" in key else (Q.Q4_K, Q.Q8_0, Q.Q6_K)[i % 3]
        plain = "conv1d" in key or values.ndim == 1
        data, used, decoded = (
            (a := stored.take(order, axis), Q.F32, a) if plain else encode(stored.take(order, axis), qtype)
        )
        decoded = decoded.take(np.argsort(order), axis)
        if key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
            data = decoded + np.float32(1)
        head, _, last = key.rpartition("linear_attn.")
        writer.add_tensor(
            gguf_name(family, head + "linear_attn." * bool(head) + names.get(last, last)), data, raw_dtype=used
        )
        weights[key] = torch.from_numpy(decoded.reshape(shape).copy())
        if key.endswith("A_log"):
            weights[key] = torch.log(-weights[key])
    close(writer)
    return weights


def encode(values: np.ndarray, qtype: gguf.GGMLQuantizationType) -> tuple[np.ndarray, Any, np.ndarray]:
    """(data for the writer, its type, the values that it stands for); falls back to a type that the row fits."""
    if values.ndim == 1:
        return values, Q.F32, values
    for fallback in (qtype, Q.Q8_0, Q.F16):
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[fallback][0] == 0:
            break
    flat = values.reshape(-1, values.shape[-1])
    data = gguf.quants.quantize(flat, Q.F16) if fallback == Q.F16 else quantize_with_ggml(flat, fallback)
    decoded = np.asarray(gguf.quants.dequantize(data, fallback), np.float32)
    return data.reshape(*values.shape[:-1], -1), fallback, decoded.reshape(values.shape)


name_table = functools.cache(gguf.get_tensor_name_map)


def gguf_name(family: Family, key: str) -> str:
    """llama.cpp's name of a key of the host."""
    table = name_table(family.arch, family.config["num_hidden_layers"])
    original = f"{key}.weight" if key.endswith("layer_scalar") else key.replace("model.lm_head", "lm_head")
    name = table.get_name(original, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise KeyError(f"gguf-py has no name for {original}")
    return name


def write_encoder(family: Family, path: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a file as llama.cpp's converter would, and return the weights it stands for, under the host's keys."""
    if family.arch == ARCH.QWEN35:
        return write_qwen35(family, path, seed)
    tag = family.tag or gguf.MODEL_ARCH_NAMES[family.arch]
    writer = gguf.GGUFWriter(path, tag)
    heads = {"q": family.config["num_attention_heads"], "k": family.config["num_key_value_heads"]}
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    add_tokenizer(writer, family.tokenizer)
    generator, weights = np.random.default_rng(seed), {}
    for i, (key, shape) in enumerate((k, tuple(v.shape)) for k, v in family.build().state_dict().items()):
        is_norm = key.endswith("norm.weight")
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        if len(shape) == 1:
            values = values + np.float32(0.0 if family.norm_offset or not is_norm else 1.0)
        qtypes = (Q.Q4_0, Q.Q8_0) if ".layers." in key and ".layers.0." not in key else (Q.Q4_K, Q.Q8_0, Q.Q6_K)
        data, used, decoded = encode(values, qtypes[i % len(qtypes)])
        projection = key.split(".")[-2][0]
        if family.permuted and ".self_attn." in key and projection in heads:
            data = permute(data, heads[projection])
        elif is_norm and family.norm_offset:
            data = decoded + np.float32(family.norm_offset)
        writer.add_tensor(gguf_name(family, key), data, raw_dtype=used)
        weights[key] = torch.from_numpy(decoded.copy())
    for name in family.extra:
        writer.add_tensor(name, np.ones((8, 64), np.float32))
    close(writer)
    return weights


def write_gpt_oss(path: Any, model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same for GPT-OSS: experts in MXFP4; gate and up, whose rows alternate in the host, are two tensors."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    add_tokenizer(writer, "gpt-oss")
    generator, weights = np.random.default_rng(seed), {}
    # The host's expert layers have no weight before one is loaded.
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, module in model.named_modules():
        if hasattr(module, "num_experts") and hasattr(module, "in_features"):
            shapes[f"{key}.weight"] = (module.num_experts, module.out_features, module.in_features)
    table = name_table(ARCH.GPT_OSS, model.config.num_hidden_layers)
    for key, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        plain = len(shape) == 1 or ".router." in key or key.endswith(".bias")
        parts = {key: values}
        if ".gate_up_proj." in key:
            parts = {key.replace("gate_up", part): values[:, start::2] for start, part in enumerate(("gate", "up"))}
        decoded = {}
        for part, array in parts.items():
            qtype = Q.F32 if plain else Q.MXFP4 if ".experts." in key else Q.Q8_0
            data = gguf.quants.quantize(array, qtype)
            original = f"model.{part}.weight" if part.endswith("sinks") else f"model.{part}"
            writer.add_tensor(table.get_name(original, try_suffixes=(".weight", ".bias")), data, raw_dtype=qtype)
            decoded[part] = gguf.quants.dequantize(data, qtype)
        joined = np.stack(list(decoded.values()), axis=2).reshape(shape) if len(decoded) > 1 else decoded[key]
        weights[key] = torch.from_numpy(np.array(joined, np.float32))
    writer.add_tensor("output.weight", np.ones((8, 64), np.float32))
    close(writer)
    return weights


def write_native(
    path: Any, weights: Mapping[str, torch.Tensor], rename: Any = lambda key: key, tag: str = "", tokenizer: str = ""
) -> Any:
    """Weights under their own names, as stable-diffusion.cpp (without metadata) and others write them, in Q8_0."""
    writer = gguf.GGUFWriter(path, tag or "none")
    if not tag:
        writer.kv_data[0].pop("general.architecture")
    add_tokenizer(writer, tokenizer)
    for key, value in weights.items():
        array = value.float().numpy()
        qtype = Q.Q8_0 if array.ndim == 2 and array.shape[1] % 32 == 0 else Q.F32
        writer.add_tensor(rename(key), gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    close(writer)
    return path


def copy_with_metadata(source: Any, path: Any, keep: Any) -> Any:
    """A copy of a file with its metadata, without the tensors that `keep` says no to."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    """Write everything and close."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    """A small tokenizer of a kind in llama.cpp's arrays: bytes, and little else."""
    if not kind:
        return
    t = gguf.TokenType
    if kind in ("tekken", "gpt-oss"):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
        control += [f"<SPECIAL_{i}>" for i in range(len(control), 12)]
        tokens, types = [*control, *alphabet, "ab"], [t.CONTROL] * len(control) + [t.NORMAL] * 257
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tekken" if kind == "tekken" else "gpt-4o")
        writer.add_token_merges(["a b"])
    else:
        control = ["<pad>", "<eos>", "<bos>"]
        tokens = [*control, "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "ab"]
        types = [t.CONTROL] * 3 + [t.UNKNOWN] + [t.BYTE] * 256 + [t.NORMAL] * 4
        writer.add_tokenizer_model(kind)
        writer.add_token_scores([0.0] * 260 + [-1.0, -2.0, -3.0, -4.0])
        for add, value in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2)):
            add(value)
        writer.add_unk_token_id(3)
        if kind == "gemma4":
            writer.add_token_merges(["a b"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
