# SPDX-License-Identifier: Apache-2.0
"""Small whole checkpoints: diffusion model, text encoders and VAE of the host's own classes, in several layouts.

Names are made here anew from those of published checkpoints and of stable-diffusion.cpp; the reference is what the host
makes of the original names and the dequantized values.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import comfy.clip_model
import comfy.ldm.models.autoencoder
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.taesd.taesd
import comfy.text_encoders.t5
import encoders
import gguf
import numpy as np
import torch
from small_model_table import SMALL_MODELS
from small_models import Small, build_shapes

Q = gguf.GGMLQuantizationType
Named = dict[str, np.ndarray]
N_TOKENS = 96
KL = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def _clip_config(width: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": 3, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": 128,
        "hidden_act": "gelu", "max_position_embeddings": 77, "eos_token_id": 2,
    }  # fmt: skip


CONFIGS = {
    "clip_l": _clip_config(64),
    "clip_h": _clip_config(96),
    "clip_g": _clip_config(128),
    # SD3 puts the text of its CLIPs beside that of T5, at T5's width.
    "t5xxl": {
        "num_layers": 2, "d_model": 4096, "d_kv": 32, "num_heads": 1, "d_ff": 64, "vocab_size": N_TOKENS,
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5",
    },
}  # fmt: skip


def shrink(monkeypatch: Any) -> None:
    """Let the host build its text encoders and its VAE small from now on."""
    build, build_kl = comfy.sd1_clip.SDClipModel.__init__, comfy.sd.AutoencoderKL
    small = {f"{name}_model_config": config for name, config in CONFIGS.items()}

    def build_small(self: Any, *args: Any, model_options: Any = None, **named: Any) -> None:
        build(self, *args, model_options={**(model_options or {}), **small}, **named)

    embeddings = comfy.clip_model.CLIPEmbeddings.__init__
    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", build_small)
    monkeypatch.setattr(embeddings, "__defaults__", (N_TOKENS, *embeddings.__defaults__[1:]))
    monkeypatch.setattr(comfy.sd, "AutoencoderKL", lambda embed_dim, **_: build_kl(embed_dim=embed_dim, ddconfig=KL))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        row: of SMALL_MODELS.
        encoders: the host's name of each text encoder -> what its names begin with; open_clip's layout behind "model.".
        vae: what the names of its VAE begin with.
    """

    row: str
    encoders: dict[str, str]
    vae: str = "first_stage_model."

    @property
    def small(self) -> Small:
        return SMALL_MODELS[self.row]


KINDS = {
    "sd1": Kind("sd1", {"clip_l": "cond_stage_model.transformer."}),
    "sd2": Kind("sd2", {"clip_h": "cond_stage_model.model."}),
    "sdxl": Kind(
        "sdxl", {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."}
    ),
    "sd3": Kind("sd3", {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}),
    "flux": Kind("flux dev", {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "t5xxl")}, "vae."),
}


@functools.cache
def original(name: str) -> Named:
    """One of KINDS with random weights, under the names that the host reads."""
    kind = KINDS[name]
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in build_shapes(kind.small)[0].items()}
    for name, prefix in kind.encoders.items():
        own = _encoder_shapes(name)
        own = _open_clip(own) if prefix.endswith(".model.") else own
        shapes |= {prefix + key: shape for key, shape in own.items()}
    shapes |= {kind.vae + key: shape for key, shape in _vae_shapes(kind).items()}
    weights = {}
    for i, (key, shape) in enumerate(shapes.items()):
        values = np.random.default_rng(i).standard_normal(shape, dtype=np.float32)
        weights[key] = values / np.float32(np.sqrt(max(np.prod(shape[1:], dtype=int), 16)))
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight")) and len(shape) == 1:
            weights[key] += np.float32(1)
    return weights


def _encoder_shapes(name: str) -> dict[str, tuple[int, ...]]:
    build = comfy.text_encoders.t5.T5 if name == "t5xxl" else comfy.clip_model.CLIPTextModel
    model = build(CONFIGS[name], torch.float32, torch.device("cpu"), comfy.ops.manual_cast)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _vae_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    if kind.row.startswith(("flux", "sd3")):
        model = comfy.taesd.taesd.TAESD(latent_channels=16)
    else:
        model = comfy.ldm.models.autoencoder.AutoencoderKL(embed_dim=4, ddconfig=KL)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


_TO_OPEN_CLIP = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.", "attn."),
    ("text_projection.weight", "text_projection"),
)


def _open_clip(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP in open_clip's layout: queries, keys and values in one."""
    found: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    for key, shape in shapes.items():
        if not re.search(r"self_attn\.[kv]_proj", key):
            name = key
            for old, new in _TO_OPEN_CLIP:
                name = name.replace(old, new)
            found[name] = (3 * shape[0], *shape[1:]) if "in_proj" in name else shape
    return found


# -- layouts --

Rename = Callable[[str, np.ndarray], Iterator[tuple[str, np.ndarray]]]


def as_it_was(name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The original names, as most converters write them."""
    yield name, data


def _hf_names(name: str) -> str:
    """Names of a CLIP in open_clip's layout as stable-diffusion.cpp makes them, but for fused ones."""
    name = re.sub(r"^conditioner\.embedders\.1\.", "cond_stage_model.1.", name)
    name = re.sub(r"^conditioner\.embedders\.0\.", "cond_stage_model.", name)
    head, found, rest = name.partition(".model.")
    if not head.startswith("cond_stage_model") or not found:
        return re.sub(r"\.transformer\.text_projection\.weight$", ".transformer.text_model.text_projection", name)
    for old, new in (
        ("token_embedding.", "embeddings.token_embedding."),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("transformer.resblocks.", "encoder.layers."),
        ("ln_final.", "final_layer_norm."),
        (".ln_", ".layer_norm"),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
        (".attn.out_proj.", ".self_attn.out_proj."),
    ):
        rest = rest.replace(old, new)
    return f"{head}.transformer.text_model.{rest}"


def sdcpp_2024(name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """stable-diffusion.cpp until November 2025: attention of CLIPs parted, projections of UNets as convolutions."""
    if name.endswith("logit_scale") or name == "cond_stage_model.model.text_projection":
        return
    name = re.sub(r"^vae\.", "first_stage_model.", _hf_names(name))
    if name.startswith("model.diffusion_model.") and name.endswith(("proj_in.weight", "proj_out.weight")):
        data = data[..., None, None] if data.ndim == 2 else data
    parts = name.partition("attn.in_proj_")
    if parts[1]:
        for part, rows in zip("qkv", np.split(data, 3), strict=True):
            yield f"{parts[0]}self_attn.{part}_proj.{parts[2]}", rows
    else:
        yield name, data


def sdcpp_converted(name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """stable-diffusion.cpp at the end of 2025, and later with --convert-name: attention of CLIPs in one, renamed."""
    if not name.endswith("logit_scale"):
        yield re.sub(r"attn\.in_proj_", "self_attn.in_proj.", _hf_names(name)), data


def _qtype(name: str, values: np.ndarray, layout: Rename) -> Any:
    """The type that stable-diffusion.cpp would give a tensor."""
    is_projection = layout is sdcpp_2024 and re.search(r"^model\.diffusion_model.*proj_(in|out)\.weight", name)
    if values.ndim == 2 and values.shape[1] % 32 == 0 and "embedding" not in name and not is_projection:
        return Q.Q8_0
    return Q.F16 if values.ndim > 1 else Q.F32


def write(path: Any, weights: Named, layout: Rename = as_it_was, quantize_vae: bool = False) -> dict[str, torch.Tensor]:
    """Write a checkpoint without metadata; the values that it stands for, under the original names."""
    writer, kept = gguf.GGUFWriter(path, "none"), {}
    writer.kv_data[0].pop("general.architecture")
    for name, values in weights.items():
        qtype = _qtype(name, values, layout)
        stored = np.atleast_1d(values)
        if quantize_vae and name.startswith(("first_stage_model.", "vae.")) and np.prod(values.shape[1:]) % 32 == 0:
            stored, qtype = values.reshape(values.shape[0], -1), Q.Q8_0
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
        data = gguf.quants.quantize(stored, qtype)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(data, qtype).reshape(values.shape).copy())
        for new_name, new_data in layout(name, data):
            writer.add_tensor(new_name, np.ascontiguousarray(new_data), raw_dtype=qtype)
    encoders.close(writer)
    return kept


# -- what is compared --


def host_checkpoint(weights: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """What the host makes of float weights."""
    found = comfy.sd.load_state_dict_guess_config(dict(weights), model_options={"dtype": torch.float32})
    return found[:3]


def encode(clip: Any, kind: Kind) -> list[torch.Tensor]:
    """Hidden states, and the pooled text if the model has use for it, of tokens for each encoder."""
    ids = [[(token, 1.0) for token in range(1, 78)]]
    text, pooled = clip.encode_from_tokens({name.split("_")[-1]: ids for name in kind.encoders}, return_pooled=True)
    return [text] if kind.row in ("sd1", "sd2") else [text, pooled]


def decode(vae: Any, kind: Kind) -> torch.Tensor:
    """A picture of random latents."""
    generator = torch.Generator().manual_seed(0)
    return vae.decode(torch.randn(kind.small.latent, generator=generator))
