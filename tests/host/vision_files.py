# SPDX-License-Identifier: Apache-2.0
"""Reduced-size vision parts of the host's own classes, written as llama.cpp's converter writes them ("mmproj").

The names come from gguf-py's tables; splits, frames and shifts are made here anew, not taken from the pack.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.sd
import encoders
import gguf
import numpy as np
import torch

Q, T = gguf.GGMLQuantizationType, gguf.MODEL_TENSOR
ARCH = gguf.MODEL_ARCH
N_BLOCKS = 4
QWEN_TOWER = {"hidden_size": 64, "intermediate_size": 96, "depth": N_BLOCKS}
DEEPSTACK_BLOCKS = [0, 2, 3]
Parts = list[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Tower:
    """One vision part.

    Attributes:
        family: the text encoder beside it; its model brings the vision part along.
        clip_name: what the host calls it in model options.
        roots: beginnings of the state-dict keys that are the vision part's.
        projector: clip.projector_type.
        shrink: makes the host build the tower in a reduced size.
        parts: (key, values) -> what llama.cpp stores for it, under llama.cpp's names.
    """

    family: encoders.Family
    clip_name: str
    roots: tuple[str, ...]
    projector: str
    shrink: Callable[[Any], None]
    parts: Callable[[str, np.ndarray], Parts]

    def known(self) -> bool:
        """Whether the running host has the class and detects it."""
        return self.family.known()

    def is_vision(self, key: str) -> bool:
        return key.startswith(self.roots)


@functools.cache
def name_table() -> Any:
    return gguf.get_tensor_name_map(ARCH.MMPROJ, 32)


def table_name(original: str) -> str:
    """llama.cpp's name of a tensor of the original model."""
    name = name_table().get_name(original, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise KeyError(f"gguf-py has no name for {original}")
    return str(name)


def fixed_name(tensor: Any, suffix: str, bid: int = 0) -> str:
    return f"{gguf.TENSOR_NAMES[tensor].format(bid=bid)}.{suffix}"


# -- What the converter does to each tensor. --


def patch_parts(values: np.ndarray) -> Parts:
    name = fixed_name(T.V_ENC_EMBD_PATCH, "weight")
    return [(name, values[:, :, 0]), (f"{name}.1", values[:, :, 1])]


def qwen2vl_parts(key: str, values: np.ndarray) -> Parts:
    if key == "visual.patch_embed.proj.weight":
        return patch_parts(values)
    if ".qkv." in key:
        return [
            (table_name(key.replace("qkv", letter)), part)
            for letter, part in zip("qkv", np.split(values, 3), strict=True)
        ]
    return [(table_name(key), values)]


def qwen3vl_parts(key: str, values: np.ndarray) -> Parts:
    path, suffix = key.rsplit(".", 1)
    tail = path.split(".")
    if "deepstack_merger_list" in path:
        tensor = {"norm": T.V_DS_NORM, "linear_fc1": T.V_DS_FC1, "linear_fc2": T.V_DS_FC2}[tail[-1]]
        return [(fixed_name(tensor, suffix, DEEPSTACK_BLOCKS[int(tail[-2])]), values)]
    if ".merger." in path:
        name = {
            "norm": fixed_name(T.V_POST_NORM, suffix),
            "linear_fc1": fixed_name(T.V_MMPROJ, suffix, 0),
            "linear_fc2": fixed_name(T.V_MMPROJ, suffix, 2),
        }[tail[-1]]
        return [(name, values)]
    if path.endswith("patch_embed.proj"):
        return patch_parts(values) if suffix == "weight" else [(fixed_name(T.V_ENC_EMBD_PATCH, "bias"), values)]
    return [(table_name(key), values)]


def gemma3_parts(key: str, values: np.ndarray) -> Parts:
    original = key.replace("_weight", ".weight") if key.startswith("multi_modal") else f"vision_tower.{key}"
    return [(table_name(original), values)]


def gemma4_parts(key: str, values: np.ndarray) -> Parts:
    if key.startswith("multi_modal_projector."):
        return [(table_name(key.replace("multi_modal_projector", "model.embed_vision")), values)]
    if key.endswith("patch_embedder.input_proj.weight"):
        kernels = values.reshape(values.shape[0], 16, 16, 3).transpose(0, 3, 1, 2)
        return [(fixed_name(T.V_ENC_EMBD_PATCH, "weight"), kernels)]
    if key.endswith("position_embedding_table"):
        return [(fixed_name(T.V_ENC_EMBD_POS, "weight"), values)]
    original = key.replace("vision_model.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    if values.ndim:
        return [(table_name(original), values)]
    path, _, limit = original.rpartition(".")
    return [(table_name(f"{path}.weight").replace(".weight", f".{limit}"), values[None])]


def colour_order(size: int = 48) -> np.ndarray:
    """Where each value of a patch, colour by colour, is in a patch that is pixel by pixel."""
    colour, row, column = np.meshgrid(np.arange(3), np.arange(size), np.arange(size), indexing="ij")
    return np.asarray(((row * size + column) * 3 + colour).reshape(-1))


def gemma4_unified_parts(key: str, values: np.ndarray) -> Parts:
    if key == "audio_projector.embedding_projection.weight":
        return [(table_name("model.embed_audio.embedding_projection.weight"), values)]
    if key.startswith("multi_modal_projector."):
        return gemma4_parts(key, values)
    if key.endswith("pos_embedding"):
        return [(fixed_name(T.V_ENC_EMBD_POS, "weight"), values.transpose(1, 0, 2))]
    layer, _, suffix = key.removeprefix("vision_model.").rpartition(".")
    # gguf-py has no table for these in the tested version.
    names = {"patch_ln1": "v.patch_norm.1", "patch_ln2": "v.patch_norm.2", "pos_norm": "v.patch_norm.3"}
    name = names.get(layer, gguf.TENSOR_NAMES[T.V_ENC_EMBD_PATCH])
    by_colour = layer == "patch_ln1" or key.endswith("patch_dense.weight")
    return [(f"{name}.{suffix}", values[..., colour_order()] if by_colour else values)]


def whole(key: str, parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Stored values put together again."""
    if key.endswith("patch_embed.proj.weight"):
        return np.stack(parts, axis=2)
    values = np.concatenate(parts)
    if key.endswith("patch_embedder.input_proj.weight"):
        values = values.transpose(0, 2, 3, 1)
    if key.endswith("pos_embedding"):
        values = values.transpose(1, 0, 2)
    if "patch_ln1" in key or key.endswith("patch_dense.weight"):
        values = values[..., np.argsort(colour_order())]
    return values.reshape(shape)


# -- How the host is made to build it small. --


def shrink_qwen2vl(monkeypatch: Any) -> None:
    import comfy.text_encoders.qwen_vl as module

    tower = module.Qwen2VLVisionTransformer

    def small(**kwargs: Any) -> torch.nn.Module:
        # A width of the MLP that no block of 32 fits, as in the original.
        sizes = {"hidden_size": 64, "intermediate_size": 100, "num_heads": 2, "num_layers": N_BLOCKS}
        return tower(**kwargs | sizes)

    monkeypatch.setattr(module, "Qwen2VLVisionTransformer", small)


def shrink_qwen3vl(monkeypatch: Any) -> None:
    module = importlib.import_module("comfy.text_encoders.qwen3vl")
    for name in module.QWEN3VL_VISION:
        monkeypatch.setitem(
            module.QWEN3VL_VISION, name, QWEN_TOWER | {"deepstack_visual_indexes": list(DEEPSTACK_BLOCKS)}
        )


def shrink_qwen35(monkeypatch: Any) -> None:
    module = importlib.import_module("comfy.text_encoders.qwen35")
    for key, value in QWEN_TOWER.items():
        monkeypatch.setitem(module.QWEN35_VISION_DEFAULTS, key, value)
    for config in module.QWEN35_MODELS.values():
        if "vision" in config:
            monkeypatch.setitem(config, "vision", {})


def shrink_gemma3(monkeypatch: Any) -> None:
    module = importlib.import_module("comfy.text_encoders.llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": N_BLOCKS}
    for key, value in (sizes | {"image_size": 224}).items():
        monkeypatch.setitem(module.GEMMA3_VISION_CONFIG, key, value)


def shrink_gemma4(monkeypatch: Any) -> None:
    module = importlib.import_module("comfy.text_encoders.gemma4")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    for key, value in (sizes | {"num_hidden_layers": N_BLOCKS, "position_embedding_size": 64}).items():
        monkeypatch.setitem(module.GEMMA4_VISION_CONFIG, key, value)
    for key, value in {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}.items():
        monkeypatch.setitem(module.GEMMA4_AUDIO_CONFIG, key, value)
    for key, value in {"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64}.items():
        monkeypatch.setitem(module.GEMMA4_UNIFIED_VISION_CONFIG, key, value)


def _qwen3vl(detected: str, width: int, n_layers: int = 4) -> Tower:
    size = {"QWEN3VL_4B": "4b", "QWEN3VL_8B": "8b", "QWEN3VL_32B": "32b"}[detected]
    sizes = encoders.TINY | encoders.HEADS | {"hidden_size": width, "num_hidden_layers": n_layers}
    if size == "32b":  # many layers of the full width
        sizes |= {"intermediate_size": 32, "vocab_size": 32}
    family = encoders.Family("qwen3vl.Qwen3VL", ARCH.QWEN3VL, detected, sizes, "krea2")
    return Tower(family, f"qwen3vl_{size}", ("visual.",), "qwen3vl_merger", shrink_qwen3vl, qwen3vl_parts)


def _gemma3(detected: str, model: str, clip_name: str, n_layers: int) -> Tower:
    config = encoders.TINY | encoders.ONE_HEAD | {"num_hidden_layers": n_layers}
    family = encoders.Family(
        f"llama.{model}", ARCH.GEMMA3, detected, config, "lumina2", norm_offset=1.0, tokenizer="llama"
    )
    roots = ("vision_model.", "multi_modal_projector.")
    return Tower(family, clip_name, roots, "gemma3", shrink_gemma3, gemma3_parts)


TOWERS = {
    "qwen2.5-vl 7b": Tower(
        encoders.FAMILIES["qwen2.5-vl 7b"],
        "qwen25_7b",
        ("visual.",),
        "qwen2.5vl_merger",
        shrink_qwen2vl,
        qwen2vl_parts,
    ),
    "qwen3-vl 4b": _qwen3vl("QWEN3VL_4B", 2560),
    "qwen3-vl 8b": _qwen3vl("QWEN3VL_8B", 4096),
    "qwen3-vl 32b": _qwen3vl("QWEN3VL_32B", 5120, 50),
    "gemma 3 4b": _gemma3("GEMMA_3_4B_VISION", "Gemma3_4B_Vision", "gemma3_4b_vision", 6),
    "gemma 3 12b": _gemma3("GEMMA_3_12B", "Gemma3_12B", "gemma3_12b", 48),
    "qwen3.5": Tower(
        encoders.FAMILIES["qwen3.5"], "qwen35_2b", ("visual.",), "qwen3vl_merger", shrink_qwen35, qwen3vl_parts
    ),
}


for _name, _parts in (("e2b", gemma4_parts), ("e4b", gemma4_parts), ("12b", gemma4_unified_parts)):
    _roots = ("vision_model.", "multi_modal_projector.") + ("audio_projector.",) * (_name == "12b")
    _family = encoders.FAMILIES[f"gemma 4 {_name}"]
    TOWERS[f"gemma 4 {_name}"] = Tower(_family, "gemma4", _roots, "gemma4v", shrink_gemma4, _parts)


def random_values(key: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if key.endswith(("_min", "_max")):  # of activations
        return np.float32(generator.uniform(1, 2)) * np.ones(shape, np.float32) * (-1 if key.endswith("_min") else 1)
    values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) or 1))
    is_norm = "norm" in key or "ln_q" in key
    return values + np.float32(1.0 if is_norm and key.endswith("weight") else 0.0)


def stored(name: str, values: np.ndarray, i: int) -> tuple[np.ndarray, Any, np.ndarray]:
    """(data for the writer, its type, the values that it stands for), matrices in a mix of types."""
    if values.ndim == 1:
        return values, Q.F32, values
    if values.ndim > 2 or "input_projection" in name or "position_embd" in name:
        data = values.astype(np.float16)
        return data, Q.F16, data.astype(np.float32)
    # All of a block alike, but for one block, where q, k and v differ.
    block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    types = (Q.Q8_0, Q.F16, Q.BF16, Q.Q8_0)
    qtype = types[(block + (i if block == 3 else 0)) % len(types)]
    if qtype == Q.BF16:
        data = np.asarray(gguf.quants.quantize(values, Q.BF16))
        return data, qtype, np.asarray(gguf.quants.dequantize(data, Q.BF16))
    return encoders.encode(values, qtype)


def write_mmproj(
    tower: Tower, model: torch.nn.Module, path: Any, rename: Callable[[str], str] = str, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Write the vision part of `model` with random weights, and return these under the host's keys."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(tower.projector)
    generator, weights = np.random.default_rng(seed), {}
    for key, shape in vision_shapes(tower, model):
        values = random_values(key, shape, generator)
        decoded = []
        for i, (name, part) in enumerate(tower.parts(key, values)):
            data, qtype, floats = stored(name, part, i)
            if "soft_emb_norm" in name:  # the original counts from 0, llama.cpp from 1
                data, floats = floats, floats - np.float32(1)
            writer.add_tensor(rename(name), np.ascontiguousarray(data), raw_dtype=qtype)
            decoded.append(floats)
        weights[key] = torch.from_numpy(whole(key, decoded, shape).copy())
    encoders.close(writer)
    return weights


def vision_shapes(tower: Tower, model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, value in model.state_dict().items():
        if tower.is_vision(key):
            yield key, tuple(value.shape)


def load_with_host(state: Mapping[str, torch.Tensor], tower: Tower, clip_type: str = "", **options: Any) -> Any:
    """A state dict as the host's CLIP, built with the tower's configuration."""
    config = dict(tower.family.config)
    # Gemma 3 12B has no name; the others are those of FLUX.2 and Ideogram for Qwen3-VL.
    names = (tower.clip_name, tower.clip_name.removesuffix("_vision"), "llama", "qwen3_4b", "qwen3_8b", "")
    options |= {f"{name}_model_config": config for name in names}
    kind = getattr(comfy.sd.CLIPType, (clip_type or "stable_diffusion").upper())
    return comfy.sd.load_text_encoder_state_dicts([dict(state)], clip_type=kind, model_options=options)
