# SPDX-License-Identifier: Apache-2.0
"""One real ComfyUI server for all tests here, with the pack and many files of the tiny Flux in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from gguf_kit.demo import host, tiny_flux
from gguf_kit.demo.server import ComfyServer
from gguf_kit.demo.workflow import Loader, build_workflow, gguf_loader, run_workflow, safetensors_loader
from gguf_kit.tools import convert

TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
REFERENCE = "safetensors"
EXTRA_PATHS = """
tests:
    base_path: {folder}
    diffusion_models: unets
    text_encoders: encoders
"""


@dataclass(frozen=True)
class Samples:
    """All prompts of tiny_flux.SEEDS with one model: float32 latents (8, 16, 16, 16), pictures (8, 128, 128, 3)."""

    latents: np.ndarray
    pictures: np.ndarray


@dataclass
class Sampler:
    """Samples a model by the name of its type, each only once."""

    server: ComfyServer
    known: dict[str, Samples] = field(default_factory=dict)

    def __call__(self, type_name: str) -> Samples:
        if type_name not in self.known:
            results = [
                run_workflow(self.server, build_workflow(loader_of(type_name), prompt, seed))
                for prompt, seed in tiny_flux.SEEDS.items()
            ]
            latents = np.concatenate([result.latent for result in results])
            self.known[type_name] = Samples(latents, np.stack([result.picture for result in results]))
        return self.known[type_name]


def loader_of(type_name: str) -> Loader:
    """The loader node for one of TYPES or REFERENCE."""
    if type_name == REFERENCE:
        return safetensors_loader(tiny_flux.MODEL.name)
    return gguf_loader(f"tiny-flux-{type_name}.gguf")


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Flux as GGUF, made by tools/convert.py: type name -> file."""
    folder = tmp_path_factory.mktemp("gguf")
    paths = {name: folder / f"tiny-flux-{name}.gguf" for name in TYPES}
    for name, path in paths.items():
        assert convert.main(["--src", str(tiny_flux.MODEL), "--dst", str(path), "--type", name]) == 0
    return paths


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, gguf_files: dict[str, Path]) -> Path:
    """The server's base directory: models in the folder itself and in subfolders, text encoders, the two node packs."""
    files = list(gguf_files.values())
    models = {
        "diffusion_models": [tiny_flux.MODEL, *files],
        "diffusion_models/flux/small": [gguf_files["Q8_0"]],
        "text_encoders/t5": [gguf_files["Q2_K"]],
        "vae_approx": tiny_flux.VAE_FILES,
        "tiny_flux": tiny_flux.PROMPT_FILES,
    }
    node_packs = {"gguf-kit": host.PACK, "tiny-flux-nodes": host.TEST_NODES}
    return host.make_base(tmp_path_factory.mktemp("base"), node_packs, models)


@pytest.fixture(scope="session")
def extra_folder(tmp_path_factory: pytest.TempPathFactory, gguf_files: dict[str, Path]) -> Path:
    """A folder beside the base directory that extra_model_paths.yaml in it names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for target in ("unets/far-away.gguf", "encoders/deep/far-encoder.gguf"):
        (folder / target).parent.mkdir(parents=True)
        (folder / target).write_bytes(gguf_files["Q2_K"].read_bytes())
    (folder / "extra_model_paths.yaml").write_text(EXTRA_PATHS.format(folder=folder.as_posix()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def server(base: Path, extra_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The running server."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ("--extra-model-paths-config", str(extra_folder / "extra_model_paths.yaml"))
    with ComfyServer(host.get_host(), base, log, arguments=arguments) as running:
        yield running


@pytest.fixture(scope="session")
def sample(server: ComfyServer) -> Callable[[str], Samples]:
    """Samples one of TYPES or REFERENCE through the server."""
    return Sampler(server)
