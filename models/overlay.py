# SPDX-License-Identifier: Apache-2.0
"""Modules that come in a file of their own, such as Wan's VACE, laid over the diffusion model that they belong to.

Owns which of two files' tensors fit together; shapes are those of repairs.Keys.
"""

from __future__ import annotations

import os

from ..errors import UnsupportedArch, plain_text
from ..gguf_file import GGUFFile
from . import archs
from .repairs import Keys

# Modules whose layers have the shapes of the model's own of the same name without this beginning.
_TWIN_PREFIX = "vace_"
_TWINS = "vace_blocks."


def is_module(keys: Keys) -> bool:
    """Whether a file holds nothing but modules for another model."""
    return bool(keys.shapes) and all(key.startswith(_TWIN_PREFIX) for key in keys.shapes)


def check_fit(file: GGUFFile, keys: Keys, extra: GGUFFile, extra_keys: Keys) -> None:
    """Refuse a file whose tensors cannot be laid over those of another.

    Raises:
        UnsupportedArch: it is a whole model, or for a model of another size; the sentence names both.
    """
    base_name = plain_text(os.path.basename(file.path))
    whole = archs.detect(extra_keys.shapes)
    if whole is not None and (whole is not archs.detect(keys.shapes) or keys.shapes.keys() <= extra_keys.shapes.keys()):
        raise UnsupportedArch(
            f"it is a whole model ({whole.title}), no modules to be laid over {base_name}",
            path=extra.path,
            hint="Choose it as unet_name, and as extra_name the file with the modules, or none.",
        )
    for key, shape in extra_keys.shapes.items():
        twin = key.removeprefix(_TWIN_PREFIX) if key.startswith(_TWINS) else key
        expected = keys.shapes.get(key, keys.shapes.get(twin, shape))
        if shape != expected:
            other = f"'{plain_text(twin)}'" if twin != key and key not in keys.shapes else "it"
            raise UnsupportedArch(
                f"its tensor '{plain_text(key)}' has the shape {shape}, and {other} has {expected} in {base_name}",
                path=extra.path,
                subject=key,
                hint="The two are of different models or sizes; take modules that were made for this one.",
            )
