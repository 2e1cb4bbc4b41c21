# SPDX-License-Identifier: Apache-2.0
"""Architectures of diffusion models, recognised by keys and shapes; the tag in a file is never asked.

Whether a model can be loaded is the host's decision. The entries here name what a file holds, for the user, and catch
layouts that a host would load wrongly. To add an architecture, add an entry; order does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# What ComfyUI and others put before the keys of a diffusion model in a whole checkpoint.
KEY_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture, or one variant of it.

    Attributes:
        name: value of `general.architecture` in files of this kind.
        title: what users call it.
        detect: keys that must all be there, each with the dimensions that must match (None: any).
        absent: keys that must not be there.
        reject: why files of this kind cannot be loaded, and what to do; "" for those that can.
    """

    name: str
    title: str
    detect: Mapping[str, tuple[int | None, ...] | None]
    absent: tuple[str, ...] = ()
    reject: str = ""

    def matches(self, shapes: Shapes) -> bool:
        """Whether a model with these keys and shapes (torch order) is of this kind."""
        return not any(key in shapes for key in self.absent) and all(
            key in shapes and _fits(shapes[key], wanted) for key, wanted in self.detect.items()
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))


_FLUX_BLOCK = "double_blocks.0.img_attn.proj.weight"
_FLUX_VECTOR = "vector_in.in_layer.weight"  # Chroma and Flux.2 have no such key
_FLUX_GUIDANCE = "guidance_in.in_layer.weight"
_PACKED_LATENT = (None, 64)  # 16 channels in 2x2 patches

ARCHS: tuple[Arch, ...] = (
    Arch(
        "flux",
        "Flux.1 dev",
        {_FLUX_BLOCK: None, _FLUX_VECTOR: None, _FLUX_GUIDANCE: None, "img_in.weight": _PACKED_LATENT},
    ),
    Arch(
        "flux",
        "Flux.1 schnell",
        {_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": _PACKED_LATENT},
        (_FLUX_GUIDANCE,),
    ),
    Arch("flux", "Flux.1 Fill", {_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": (None, 384)}),
    Arch("flux", "Flux.1 Canny or Depth", {_FLUX_BLOCK: None, _FLUX_VECTOR: None, "img_in.weight": (None, 128)}),
    Arch(
        "flux",
        "Flux.1 in diffusers layout",
        {"single_transformer_blocks.0.attn.to_q.weight": None, "transformer_blocks.0.attn.add_q_proj.weight": None},
        reject="Take a file in the original layout (double_blocks, single_blocks), or make one from it",
    ),
)


def detect(shapes: Shapes) -> Arch | None:
    """The entry that a diffusion model with these keys and shapes matches, or None."""
    return next((arch for arch in ARCHS if arch.matches(shapes)), None)
