# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of diffusion models' tensors that other programs changed, as the model's own keys and shapes again.

Owns what is done to them: names cut to ggml's length, norms under their other name, dimensions that ggml leaves out or
that were merged, marks that are only there to be found. Only names, shapes and what a model lacks are asked, never the
tag of a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TypeVar

from ..gguf_file import GGUFFile
from .arch_entry import Shapes
from .archs import strip_prefix
from .values import QuantizedBytes, StateDict, Value, read_tensor

# Names of so many bytes may be the beginning of longer ones: ggml's GGML_MAX_NAME, and the one that image models are
# often quantized with, less the final zero.
CUT_BYTES = (63, 127)
ENDS = (".weight", ".bias", ".scale")

# Norms of Flux and what came from it: `.scale` in some files and hosts, `.weight` in others.
_FLUX_NORM = re.compile(
    r"((?:double|single)_blocks\.\d+\.(?:(?:img|txt)_attn\.)?norm\.(?:query|key)_norm"
    r"|distilled_guidance_layer\.norms\.\d+|nerf_blocks\.\d+\.norm|nerf_final_layer\w*\.norm)\.(?:weight|scale)"
)

# Pattern of a whole key -> its number of dimensions, of which ggml leaves out leading ones; and the host's class.
N_DIMS = tuple(
    (re.compile(pattern), n_dims)
    for pattern, n_dims in (
        (r".*\.log_alpha", 0),  # pixeldit/pid.py SigmaAwareGate
        (r"\w+_pad_token", 2),  # lumina/model.py NextDiT
        (r"keyframes_abs_pos_embedding", 2),  # lightricks/model.py LTXBaseModel
        (r"txtfusion\.projector\.weight", 2),  # krea2/model.py TextFusionTransformer
        (r"style_embedder\.weight", 2),  # hydit/models.py HunYuanDiT
        (r"(blocks|noise_refiner)\.\d+\.shift_table", 2),  # triposplat/model.py UnifiedTransformerBlock
        (r"shift_table", 3),  # triposplat/model.py LatentSeqMMFlowModel
        (r"((vace_)?blocks\.\d+|head(_global)?)\.modulation", 3),  # wan/model.py WanAttentionBlock, Head
        (r"img_emb\.emb_pos", 3),  # wan/model.py MLPProj
        (r"double_blocks\.\d+\.(img|txt)_mod\.modulate_table", 3),  # joyimage/model.py JoyImageModulate
        (r"pos_embed", 3),  # modules/diffusionmodules/mmdit.py MMDiT
        (r"positional_encoding|register_tokens", 3),  # aura/mmdit.py MMDiT
        (r"(core\.)?y_pos_embedding", 3),  # pixeldit/model.py PixDiT_T2I
        (r"decoder\.(layers\.\d+\.)?scale_shift_table", 3),  # ace/ace_step15.py AceStepDiTLayer, AceStepDiTModel
        (r"(.*\.)?special_tokens?|null_condition_emb", 3),  # ace/ace_step15.py AceStepConditionGenerationModel
        (r".*\.padding_tokens|casual_audio_encoder\.weights", 4),  # wan/model.py MotionEncoder_tc, CausalAudioEncoder
        (r"motion_encoder\..*\.convs\..*\.bias", 4),  # wan/model_animate.py FusedLeakyReLU
        (r"embeddings\.(position_embeddings|cls_token|register_tokens)", 3),  # image_encoders/dino2.py, dino3.py
        (r".*\.channelwise\.2\.(gamma|beta)", 4),  # cascade/common.py GlobalResponseNorm
    )
)
# Empty tensors whose being there says what a model predicts or how it counts time, such as __x0__.
_MARK = re.compile(r"__\w+__")


V = TypeVar("V")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The tensors of a diffusion model.

    Attributes:
        names: key -> name of the tensor in the file.
        shapes: key -> shape in torch order, as the model has it.
        cut: keys that may be only the beginning of the model's own.
    """

    names: Mapping[str, str]
    shapes: Shapes
    cut: frozenset[str] = frozenset()


def find_keys(file: GGUFFile) -> Keys:
    """Keys and shapes of the diffusion model in a file, without the prefix of a whole checkpoint."""
    whole = whole_names(file)
    names = {key: whole[name] for key, name in strip_prefix(whole).items()}
    shapes = restore_shapes({key: file.logical_shape(name) for key, name in names.items()})
    return Keys(names, shapes, cut_keys(names))


def cut_keys(names: Mapping[str, str]) -> frozenset[str]:
    """Of the keys of some tensors those that may be only the beginning of the model's own."""
    return frozenset(key for key, name in names.items() if _may_be_cut(name) and name.endswith(key))


def read_values(file: GGUFFile, keys: Keys) -> StateDict:
    """The values of find_keys(), in the shapes that it gives them."""
    return {
        key: _in_shape(read_tensor(file, key, file.tensors[name]), keys.shapes[key]) for key, name in keys.names.items()
    }


def _in_shape(value: Value, shape: tuple[int, ...]) -> Value:
    if tuple(value.shape) == shape:
        return value
    if isinstance(value, QuantizedBytes):
        return dataclasses.replace(value, shape=shape)
    return value.reshape(shape) if prod(shape) else value.new_empty(shape)


def whole_names(file: GGUFFile) -> dict[str, str]:
    """Name as it once was -> name in the file; one that was cut within the end of a layer's parameter is completed.

    Where that can be done in several ways or in none the name stays, and complete_keys() asks the model.
    """
    found: dict[str, str] = {}
    for name in file.tensors:
        whole = _completions(name, len(file.logical_shape(name))) if _may_be_cut(name) else []
        found[whole[0] if len(whole) == 1 and whole[0] not in file.tensors else name] = name
    return found


def _may_be_cut(name: str) -> bool:
    return len(name.encode()) in CUT_BYTES and not name.endswith(ENDS)


def _completions(name: str, n_dims: int) -> list[str]:
    """Names with one of ENDS of which this is the beginning; only a layer's weight can have several dimensions."""
    ends = ENDS if n_dims < 2 else ENDS[:1]
    return [name + end[n:] for end in ends for n in range(1, len(end)) if name.endswith(end[:n])]


def complete_keys(state: Mapping[str, V], cut: Collection[str], missing: Sequence[str]) -> dict[str, V]:
    """The same with cut keys completed by what the model lacks: each becomes the only such key that begins with it."""
    found = {key: [whole for whole in missing if whole.startswith(key)] for key in cut}
    whole = {key: options[0] for key, options in found.items() if len(options) == 1}
    return {whole.get(key, key): value for key, value in state.items()}


def rename_norms(state: Mapping[str, V], last: str) -> dict[str, V]:
    """The same with the norms of Flux and what came from it ending in `last`, "weight" or "scale"; none is lost."""
    renamed = {}
    for key, value in state.items():
        norm = _FLUX_NORM.fullmatch(key)
        wanted = f"{norm[1]}.{last}" if norm else key
        renamed[key if wanted in state else wanted] = value
    return renamed


def restore_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes with the dimensions that the model has: leading ones there or not, merged ones apart, marks empty."""
    return {key: _model_shape(key, shape, shapes) for key, shape in shapes.items()}


def _model_shape(key: str, shape: tuple[int, ...], shapes: Shapes) -> tuple[int, ...]:
    if _MARK.fullmatch(key) and prod(shape) <= 1:
        return (0,)
    bias = shapes.get(f"{key.removesuffix('.weight')}.bias")
    if bias is not None and key.endswith(".weight") and len(shape) == 4:
        # A kernel of video (out, in, t, h, w) with its first two merged. (in, out, h, w) is a transposed one.
        n_out = prod(bias)
        is_merged = 0 < n_out < shape[0] and shape[0] % n_out == 0 and shape[1] != n_out
        return (n_out, shape[0] // n_out, *shape[1:]) if is_merged else shape
    n_dims = next((n for pattern, n in N_DIMS if pattern.fullmatch(key)), len(shape))
    while len(shape) > n_dims and shape[0] == 1:  # a scalar is one number, and some programs add a dimension
        shape = shape[1:]
    return (1,) * (n_dims - len(shape)) + shape
