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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
NODE_FILES = tuple(sorted(host.TEST_NODES.glob("*.py")))


def installed_files(comfyui: Path) -> list[Path]:
    """Every file that is made in a ComfyUI."""
    models, nodes = comfyui / "models", comfyui / "custom_nodes" / NODES
    prompts = [models / PROMPTS / file.name for file in tiny_flux.PROMPT_FILES]
    return [models / MODEL, models / VAE, *prompts, *(nodes / file.name for file in NODE_FILES)]


def own_folders(comfyui: Path) -> list[Path]:
    """Folders that are made for these files alone.

    Raises:
        HostError: the folder has no models and custom_nodes, or one of these is a link, maybe to files of someone else.
    """
    if not all((comfyui / name).is_dir() for name in ("models", "custom_nodes")):
        raise host.HostError(f"{comfyui} has no folders models and custom_nodes. Name the folder of a ComfyUI.")
    folders = [comfyui / "models" / PROMPTS, comfyui / "custom_nodes" / NODES]
    for folder in folders:
        if folder.is_symlink():
            raise host.HostError(f"{folder} is a link, which this command never makes. Remove or rename the link.")
    return folders


def install(comfyui: Path) -> Iterator[str]:
    """Make the files, each in place of one of an earlier call only when it is whole.

    Yields:
        A line for each file that was made.
    Raises:
        HostError: as own_folders; or the converter fails, and an earlier install is as it was.
    """
    folders = own_folders(comfyui)
    model, vae, *copies = installed_files(comfyui)
    for folder in (model.parent, vae.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if convert.main(["--src", str(tiny_flux.MODEL), "--dst", str(model), "--type", TYPE, "--overwrite"]):
        raise host.HostError(f"tools/convert.py could not make {model}.")
    yield f"made {model}"
    for folder in folders:
        folder.mkdir(exist_ok=True)
    place(vae, partial(save_file, vae_tensors()))
    yield f"made {vae}"
    for source, target in zip((*tiny_flux.PROMPT_FILES, *NODE_FILES), copies, strict=True):
        place(target, partial(shutil.copyfile, source))
        yield f"made {target}"


def place(target: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and put there when it is whole."""
    unfinished = target.with_name(target.name + ".part")
    try:
        write(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def remove(comfyui: Path) -> Iterator[str]:
    """Take away the files that install makes, what Python compiled of them, and their folders if nothing else is there.

    Yields:
        A line for each file and folder that was there, and one if none was.
    Raises:
        HostError: as own_folders.
    """
    folders, nothing = own_folders(comfyui), True
    compiled = folders[-1] / "__pycache__"
    for file in installed_files(comfyui):
        if file.is_file() or file.is_symlink():
            file.unlink()
            nothing = False
            yield f"removed {file}"
    for file in NODE_FILES:
        for bytecode in compiled.glob(f"{file.stem}.*.pyc"):
            bytecode.unlink()
    for folder in (compiled, *folders):
        if not folder.is_dir():
            continue
        nothing = False
        if any(folder.iterdir()):
            yield f"kept {folder}, which holds files that this command did not make"
        else:
            folder.rmdir()
            yield f"removed {folder}"
    if nothing:
        yield "nothing was installed there"


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
        for line in (remove if args.remove else install)(folder):
            print(line)
    except (host.HostError, OSError) as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
