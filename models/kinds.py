# SPDX-License-Identifier: Apache-2.0
"""What kind of model a file holds, by its tensor names: for the sentence that a user reads who chose the wrong loader.

Whether a file can be loaded is the host's decision. Before the host is asked, only what is told by its architecture is
refused where it would have to be dequantized first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from . import archs, text_encoders
from .arch_entry import Shapes


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        title: what it is, with its article.
        node: title of the node that loads it.
        mark: pattern of whole names; one such name tells the kind.
    """

    title: str
    node: str
    mark: str = ""

    def matches(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of this kind."""
        is_mark = re.compile(self.mark).fullmatch
        return any(map(is_mark, names))


VAE = Kind(
    "a VAE",
    "Load VAE (GGUF)",
    r"(encoder|decoder)\.(conv_in|conv_out|conv1|mid|mid_block|middle|up_blocks|down_blocks|head)\..*|taesd_\w+\..*",
)
CLIP_VISION = Kind(
    "a CLIP vision model",
    "Load CLIP Vision (GGUF)",
    r"vision_model\.(embeddings|encoder)\..*|visual\.(conv1|transformer\.resblocks\.0)\..*|"
    r"encoder\.layer\.\d+\.layer_scale2\.lambda1|layer\.0\.mlp\.gate_proj\.weight",
)
CONTROLNET = Kind(
    "a ControlNet",
    "Load ControlNet Model (GGUF)",
    r"lora_controlnet|(control_model\.)?(zero_convs|input_hint_block)\.0\.(0\.)?weight|after_proj_list\.\d+\..*|"
    r"controlnet_(blocks|down_blocks|cond_embedding|x_embedder)\..*|control_blocks\.0\.after_proj\.weight|"
    r"(adapter\.)?body\.0\.(in_conv|block1|resnets\.0\.block1)\.weight|backbone\.(0\.0|10\.blocks\.0)\.weight",
)
LORA = Kind(
    "a LoRA",
    "Load LoRA (GGUF)",
    r".*\.(lora_(up|down|mid|A|B|a|b|linear_layer)|lora\.(up|down)|lokr_w\d|hada_w\d_\w|oft_\w+|dora_scale|diff_b|diff)"
    r"(\..*)?",
)
MODEL_PATCH = Kind(
    "a model patch",
    "Load Model Patch (GGUF)",
    r"controlnet_blocks\.0\.y_rms\.weight|feature_embedder\..*|control_all_x_embedder\..*|controlnet_patch_embedding\..*|"
    r"lllite_conditioning1\..*|audio_proj\.proj1\.weight|(.*\.)?attention_pooler\.query_tokens|(.*\.)?project_modules\..*",
)
LATENT_UPSCALER = Kind(
    "a latent upscale model",
    "Load Latent Upscale Model (GGUF)",
    r"blocks\.0\.block\.0\.conv\.weight|up\.0\.block\.0\.conv1\.conv\.weight|post_upsample_res_blocks\..*",
)
VISION_PART = Kind("the vision part (mmproj) of a text encoder", "CLIPLoader (GGUF)", r"v\.blk\.0\..*")
CHECKPOINT = Kind("a whole checkpoint", "Load Checkpoint (GGUF)")
DIFFUSION_NODE = "Unet Loader (GGUF)"
TEXT_ENCODER = Kind("a text encoder", "CLIPLoader (GGUF)")
# Nodes of the kinds that are told by their whole architecture, not by one name.
WHOLE_MODELS = frozenset({CHECKPOINT.node, DIFFUSION_NODE, TEXT_ENCODER.node})

# A kind whose names are among those of a later one comes before it.
KINDS = (MODEL_PATCH, LATENT_UPSCALER, CONTROLNET, LORA, CLIP_VISION, VISION_PART, VAE)


def what_is(shapes: Shapes) -> Kind | None:
    """The kind of model that has tensors with these names and shapes (torch order), or None if it is none known."""
    found = next((kind for kind in KINDS if kind.matches(shapes)), None)
    if found in (None, VAE):
        names = archs.strip_prefix(shapes)
        arch = archs.detect({key: shapes[name] for key, name in names.items()})
        if arch is not None and len(names) < len(shapes):  # of one prefix, and beside it there is more
            return CHECKPOINT
        if arch is not None:
            return Kind(f"a diffusion model ({arch.title})", DIFFUSION_NODE)
    if found in (None, CLIP_VISION):
        others = [name for name in shapes if not CLIP_VISION.matches([name])]
        if text_encoders.detect(others) or text_encoders.find_native(others):
            return TEXT_ENCODER
    return found
