# SPDX-License-Identifier: Apache-2.0
"""Puts the tiny Flux of the template "GGUF-tiny-Flux-runs-as-it-is" into a ComfyUI: 11 MB, nothing is downloaded.

    python demo/install.py               into the ComfyUI that this pack is installed in
    python demo/install.py FOLDER        into another one, or into a base directory of one
    python demo/install.py --remove      takes all of it away again

Restart ComfyUI afterwards and open the template. Makes models/diffusion_models/tiny-flux-Q4_K_S.gguf with
tools/convert.py, models/vae/tiny-flux-vae.safetensors, models/tiny_flux/ (the conditioning of 70 prompts, in place of a
text encoder) and custom_nodes/gguf-kit-tiny-flux/ (the node that reads it). No other file is touched.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import _pack  # noqa: F401
from gguf_kit.demo import host, tiny_flux
from gguf_kit.tools import convert

TYPE = "Q4_K_S"
MODEL = f"diffusion_models/tiny-flux-{TYPE}.gguf"
VAE = "vae/tiny-flux-vae.safetensors"
PROMPTS = "tiny_flux"
NODES = "gguf-kit-tiny-flux"


def installed_paths(comfyui: Path) -> list[Path]:
    """Every file and folder that is made in a ComfyUI."""
    models = comfyui / "models"
    return [models / MODEL, models / VAE, models / PROMPTS, comfyui / "custom_nodes" / NODES]


def install(comfyui: Path) -> None:
    """Make the files, in place of those of an earlier call.

    Raises:
        HostError: the folder has no models and custom_nodes, or the converter fails.
    """
    remove(comfyui)
    model, vae, prompts, nodes = installed_paths(comfyui)
    for folder in (model.parent, vae.parent, prompts):
        folder.mkdir(parents=True, exist_ok=True)
    if convert.main(["--src", str(tiny_flux.MODEL), "--dst", str(model), "--type", TYPE]):
        raise host.HostError(f"tools/convert.py could not make {model}.")
    save_file(vae_tensors(), vae)
    for file in tiny_flux.PROMPT_FILES:
        shutil.copyfile(file, prompts / file.name)
    shutil.copytree(host.TEST_NODES, nodes, ignore=host.NOT_PART_OF_A_COPY)


def remove(comfyui: Path) -> None:
    """Take away what install made, if it is there.

    Raises:
        HostError: the folder has no models and custom_nodes.
    """
    if not all((comfyui / name).is_dir() for name in ("models", "custom_nodes")):
        raise host.HostError(f"{comfyui} has no folders models and custom_nodes. Name the folder of a ComfyUI.")
    for path in installed_paths(comfyui):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def vae_tensors() -> dict[str, torch.Tensor]:
    """The tiny autoencoder as one file of ComfyUI's VAE Loader: models/vae_approx may hold the real taef1 files.

    Source: ComfyUI nodes.py VAELoader.load_taesd, which names the halves in this way.
    """
    halves = {name: load_file(file) for name, file in zip(("encoder", "decoder"), tiny_flux.VAE_FILES, strict=True)}
    tensors = {f"taesd_{name}.{key}": value for name, half in halves.items() for key, value in half.items()}
    latent_scale, latent_shift = torch.tensor(tiny_flux.LATENT_SCALE), torch.tensor(tiny_flux.LATENT_SHIFT)
    return tensors | {"vae_scale": latent_scale, "vae_shift": latent_shift}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when done, 2 when something stopped it, which is said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, nargs="?", metavar="FOLDER", help="the one this pack is installed in")
    parser.add_argument("--remove", action="store_true", help="take the files away again")
    args = parser.parse_args(argv)
    try:
        folder = args.comfyui or host.find_host()
        if folder is None:
            raise host.HostError("this pack is not in the custom_nodes of a ComfyUI. Name the folder of one.")
        (remove if args.remove else install)(folder)
    except (host.HostError, OSError) as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    for path in installed_paths(folder):
        print(f"{'removed' if args.remove else 'made'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
