# SPDX-License-Identifier: Apache-2.0
"""The node that records an importance matrix: a MODEL in, and the same out with an ear on its layers.

Node ids and input names are public, as those of the loaders (nodes.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .collector import ImatrixFile, collect
from .nodes_save import save_place

ADD, NEW = "add to the file", "new file"
SUFFIX = ".imatrix.gguf"
MAX_ROWS, MAX_CALLS = 4096, 1000

PREFIX_TOOLTIP = "Name of the file below ComfyUI's output folder; .imatrix.gguf is put behind it."
MODE_TOOLTIP = (
    "add to the file: every sampling adds to what the file holds. new file: the first sampling makes a new file with a "
    "number in its name, and later ones add to that, until this node or what is before it changes."
)
ROWS_TOOLTIP = (
    "How many rows of each layer's input are kept as they are, spread evenly over all samplings, for tools/tune.py. "
    "0: only the sums that llama.cpp knows."
)
SENSITIVITY_TOOLTIP = (
    "On the model calls of how many sampling steps to measure how much an error of each layer matters. It takes two "
    "calls of the model for each layer and each of these, after the sampling. 0: not measured. 4 to 8 are enough, once."
)


class ImatrixCollectorGGUF:
    """Records an importance matrix of a diffusion model whenever it samples."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        rows = {"default": 64, "min": 0, "max": MAX_ROWS, "tooltip": ROWS_TOOLTIP}
        calls = {"default": 0, "min": 0, "max": MAX_CALLS, "tooltip": SENSITIVITY_TOOLTIP}
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model to listen to, best in 16 bit. What it computes stays equal."},
                ),
                "filename_prefix": ("STRING", {"default": "imatrix/ComfyUI", "tooltip": PREFIX_TOOLTIP}),
                "mode": ([ADD, NEW], {"default": ADD, "tooltip": MODE_TOOLTIP}),
                "record_rows": ("INT", rows),
                "sensitivity_calls": ("INT", calls),
            }
        }

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model; it records whenever it samples.",)
    FUNCTION = "collect"
    CATEGORY = "advanced/gguf"
    DESCRIPTION = (
        "Record which inputs matter to each layer of a diffusion model while it makes pictures: an importance matrix, "
        "with which tools/convert.py and tools/tune.py make better GGUF files."
    )
    SEARCH_ALIASES = ("imatrix", "importance matrix", "calibration", "quantize", "gguf")

    def collect(
        self, model: Any, filename_prefix: str, mode: str, record_rows: int, sensitivity_calls: int
    ) -> tuple[Any]:
        numbered = mode == NEW
        imatrix_path(filename_prefix, numbered)  # a prefix that cannot be used is refused before anything is sampled
        file = ImatrixFile(lambda: imatrix_path(filename_prefix, numbered), fresh=numbered)
        return (collect(model, file, record_rows, sensitivity_calls),)


def imatrix_path(filename_prefix: str, numbered: bool) -> Path:
    """PREFIX.imatrix.gguf in the output folder, or a name with a number that no file has; its folder is made.

    Raises:
        GGUFError: the prefix leads out of the output folder, or names none.
    """
    folder, name, counter = save_place(filename_prefix, "", "imatrix/NAME")
    return folder / (f"{name}_{counter:05}_{SUFFIX}" if numbered else f"{name}{SUFFIX}")


NODES = ((ImatrixCollectorGGUF, "GGUF Imatrix Collector"),)
