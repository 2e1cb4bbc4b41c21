# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/models/NAME.keys: keys and shapes of real models, from ComfyUI's own classes.

    COMFYUI_PATH=... python tests/make_keys.py [NAME ...]

Each model is built without memory (device meta) from its published configuration, and ComfyUI's detection has to
recognise the keys as the model that was meant. Needs the newest ComfyUI that the pack is tested with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import model_keys
import torch
from model_configs import ENCODERS, MODELS, Model, Rename


def boot_host() -> None:
    """Make ComfyUI importable and keep it on the CPU."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True


def build_keys(model: Model) -> dict[str, model_keys.Shape]:
    """ComfyUI's own keys and the shapes of a model; nothing is allocated."""
    module, _, name = model.built_by.partition(":")
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    operations = importlib.import_module("comfy.ops").disable_weight_init
    device = torch.device("cpu" if model.computes else "meta")
    with device:
        network = made(**model.config, dtype=torch.bfloat16, device=device, operations=operations)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _published(key: str, renames: Sequence[Rename]) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def check_keys(name: str, keys: Mapping[str, model_keys.Shape]) -> None:
    """Ask ComfyUI what it takes a model with the published keys for, and whether it finds all of its own.

    Raises:
        SystemExit: it is not the model that was meant.
    """
    detection = importlib.import_module("comfy.model_detection")
    renames = MODELS[name].renames
    state = {_published(key, renames): torch.empty(shape, device="meta") for key, shape in keys.items()}
    config = detection.model_config_from_unet(state, "")
    found = type(config).__name__
    if found != MODELS[name].host_class:
        raise SystemExit(f"{name}: ComfyUI takes it for {found}, meant is {MODELS[name].host_class}")
    strangers = set(keys) ^ set(config.process_unet_state_dict(state))
    if strangers:
        raise SystemExit(f"{name}: ComfyUI does not get its own keys from the published ones: {sorted(strangers)[:5]}")


def published_keys(name: str) -> dict[str, model_keys.Shape]:
    """Keys and shapes of a diffusion model, as it is published."""
    model = MODELS[name]
    keys = build_keys(model)
    check_keys(name, keys)
    return {_published(key, model.renames): shape for key, shape in keys.items()}


def encoder_keys(name: str) -> dict[str, model_keys.Shape]:
    """Keys and shapes of a text encoder.

    Raises:
        SystemExit: ComfyUI takes them for another one than was meant.
    """
    encoder = ENCODERS[name]
    module, _, made = encoder.built_by.partition(":")
    config = encoder.config
    if isinstance(config, str):
        config = json.loads((Path(os.environ["COMFYUI_PATH"]) / "comfy" / config).read_text(encoding="utf-8"))
    host_class = getattr(importlib.import_module(f"comfy.{module}"), made)
    operations = importlib.import_module("comfy.ops").manual_cast
    with torch.device("meta"):
        model = host_class(dict(config), torch.bfloat16, torch.device("meta"), operations)
    keys = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    sd = importlib.import_module("comfy.sd")
    found = sd.detect_te_model({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
    if found is not sd.TEModel[encoder.detected]:
        raise SystemExit(f"{name}: ComfyUI takes it for {found}, meant is {encoder.detected}")
    return keys | dict(encoder.extra)


def write_keys(name: str) -> str:
    """Write one file; returns a line about it."""
    keys = encoder_keys(name) if name in ENCODERS else published_keys(name)
    title = ENCODERS[name].title if name in ENCODERS else MODELS[name].title
    about = f"{title}: {len(keys)} tensors, {sum(map(math.prod, keys.values()))} weights"
    lines = ["# SPDX-License-Identifier: Apache-2.0", f"# {about}", *model_keys.format_keys(keys.items())]
    model_keys.FOLDER.mkdir(parents=True, exist_ok=True)
    (model_keys.FOLDER / f"{name}.keys").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if list(model_keys.read_keys(name).items()) != list(keys.items()):
        raise SystemExit(f"{name}: reading the file does not give back the keys")
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write some lists, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join((*MODELS, *ENCODERS))}")
    names = parser.parse_args(argv).names
    boot_host()
    for name in names or (*MODELS, *ENCODERS):
        print(f"{name}: {write_keys(name)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
