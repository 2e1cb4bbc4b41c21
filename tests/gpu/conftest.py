# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: kernels on it, and a real ComfyUI with dynamic VRAM. Without a GPU they are skipped.

Run them in a process of their own, since the host is booted on the GPU here and on the CPU in tests/host:

    python -m pytest --confcutdir=tests tests/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and say why they do not run."""
    missing = "" if torch.cuda.is_available() else "torch sees no GPU"
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def device():
    """The GPU; its matrix products are float32's, so that differences are the pack's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.zeros(1, device="cuda")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def host(device):
    """A ComfyUI on the GPU, in float32, with dynamic VRAM as its main.py turns it on."""
    if "comfy.cli_args" in sys.modules:
        pytest.fail("a ComfyUI runs on the CPU in this process: run tests/gpu alone")
    from demo.host import get_host

    sys.path.insert(0, str(get_host()))
    from comfy.cli_args import args

    args.fp32_unet = args.fp32_text_enc = True
    control = start_aimdo()
    import comfy.model_management
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    import comfy.memory_management

    devices = comfy.model_management.get_all_torch_devices()
    if control is None or not init_devices(control, devices):
        pytest.skip("comfy_aimdo does not work with this GPU and driver")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return SimpleNamespace(args=args, device=comfy.model_management.get_torch_device())


def start_aimdo():
    """comfy_aimdo's control module, started before torch is used by the host; None where it is not installed."""
    try:
        import comfy_aimdo.control
    except ImportError:
        return None
    comfy_aimdo.control.init()
    return comfy_aimdo.control


def init_devices(control, devices):
    """Whether dynamic VRAM works; newer versions take the bytes to be left free on each device too."""
    try:
        return control.init_devices((device.index, 0) for device in devices)
    except TypeError:
        return control.init_devices(device.index for device in devices)
