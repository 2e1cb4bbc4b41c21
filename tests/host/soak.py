# SPDX-License-Identifier: Apache-2.0
"""Loads, samples with one LoRA and another, and unloads, over and over in a real ComfyUI; tells what is left each time.

    python tests/host/soak.py FILE.gguf ... --rounds 50

Prints one JSON object for each round in which it looks: the first, every fifth and the last. To be run in a process of
its own, for what other tests have left behind would blur the figures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "tools")]

import _pack  # noqa: E402, F401
import conftest  # noqa: E402, F401 (boots the host)

import comfy.model_management  # noqa: E402 isort: skip
import comfy.sample  # noqa: E402 isort: skip
import tiny  # noqa: E402
import torch  # noqa: E402
from gguf_kit.mapped_file import MappedFile  # noqa: E402

LOOK_EVERY = 5
N_STEPS = 2


def sample(patcher: Any) -> torch.Tensor:
    """A short run of the host's sampler."""
    _, _, context, y = tiny.inputs(batch=1)
    condition = [[context, {"pooled_output": y}]]
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    run = patcher, noise, N_STEPS, 1.0, "euler", "simple", condition, condition, torch.zeros_like(noise)
    return comfy.sample.sample(*run, disable_pbar=True, seed=1)


def one_round(path: str, number: int) -> list[float]:
    """Load, sample without and with two LoRAs in turns, unload; sums of the latents."""
    patcher = tiny.quantized_model(path)
    plain = sample(patcher)
    results = [plain]
    for seed in (1, 2):
        results.append(sample(tiny.with_patches(patcher, tiny.lora(seed + 2 * (number % 3)))))
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return [float(result.double().sum()) for result in results]


def look() -> dict[str, int]:
    """What is there after everything that can be freed was freed; bytes and counts."""
    comfy.model_management.cleanup_models()
    for _ in range(2):
        gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    objects = gc.get_objects()
    with warnings.catch_warnings():  # isinstance() asks old aliases of torch for their class
        warnings.simplefilter("ignore")
        tensors = [thing for thing in objects if issubclass(type(thing), torch.Tensor)]
        modules = sum(issubclass(type(thing), torch.nn.Module) for thing in objects)
    maps = Path("/proc/self/maps").read_text()
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
        "tensors": len(tensors),
        "modules": modules,
        "maps": sum(line.endswith(".gguf") for line in maps.splitlines()),
        "mapped files": sum(issubclass(type(thing), MappedFile) for thing in objects),
        "open files": len(os.listdir("/proc/self/fd")),
        "loaded models": len(comfy.model_management.current_loaded_models),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():  # as the host runs its nodes
        for number in range(1, arguments.rounds + 1):
            sums = one_round(arguments.files[number % len(arguments.files)], number)
            if number == 1 or number == arguments.rounds or not number % LOOK_EVERY:
                sys.stdout.write(json.dumps({"round": number, "sums": sums, **look()}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
