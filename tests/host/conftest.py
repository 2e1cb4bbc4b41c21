# SPDX-License-Identifier: Apache-2.0
"""Boots a real ComfyUI in this process, on the CPU, in float32: COMFYUI_PATH, else the one that the demo fetches.

Without a host these tests fail; they are not skipped.
"""

from __future__ import annotations

import sys

import pytest

from demo.host import get_host


def boot_host() -> None:
    """Make the host importable, keep it on the CPU, and let 0.3.75 count the heads of a small Flux."""
    sys.path.insert(0, str(get_host()))
    import utils.json_util  # noqa: F401  as early as in main.py: the host's nodes.py puts comfy/, with a utils.py, first
    from comfy.cli_args import args

    args.cpu = True
    args.fp32_unet = args.fp32_text_enc = True
    import comfy.model_detection

    detect = comfy.model_detection.detect_unet_config

    def detect_with_heads(*positional, **named):
        config = detect(*positional, **named)
        if config and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    comfy.model_detection.detect_unet_config = detect_with_heads


boot_host()


@pytest.fixture(autouse=True)
def no_remembered_folders(monkeypatch):
    """The host remembers the folders that it has listed, and those of earlier tests are gone."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


@pytest.fixture(params=[False, True], ids=["no inference mode", "inference mode"])
def inference_mode(request):
    """Runs the test outside and inside torch.inference_mode, in which ComfyUI runs its nodes."""
    import torch

    with torch.inference_mode(request.param):
        yield request.param
