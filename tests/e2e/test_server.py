# SPDX-License-Identifier: Apache-2.0
"""The pack in a real ComfyUI server, as a browser sees it: nodes, file lists, pictures, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf_kit.demo import metrics
from gguf_kit.demo.server import ComfyServer, WorkflowError
from gguf_kit.demo.workflow import build_workflow, gguf_loader, run_workflow

pytestmark = pytest.mark.e2e

# Public ids: saved workflows hold them. Class id -> display name, inputs in order.
NODES = {
    "UnetLoaderGGUF": ("Unet Loader (GGUF)", ["unet_name"]),
    "UnetLoaderGGUFAdvanced": (
        "Unet Loader (GGUF/Advanced)",
        ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
    ),
    "CLIPLoaderGGUF": ("CLIPLoader (GGUF)", ["clip_name", "type"]),
    "DualCLIPLoaderGGUF": ("DualCLIPLoader (GGUF)", ["clip_name1", "clip_name2", "type"]),
    "TripleCLIPLoaderGGUF": ("TripleCLIPLoader (GGUF)", ["clip_name1", "clip_name2", "clip_name3"]),
    "QuadrupleCLIPLoaderGGUF": (
        "QuadrupleCLIPLoader (GGUF)",
        ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
    ),
}

# Type -> relative latent error, PSNR in dB, over eight prompts in float32 (tests/data/tiny-flux/README.md).
EXPECTED = {
    "Q8_0": (0.0014, 65.5),
    "Q6_K": (0.0043, 56.1),
    "Q5_K_S": (0.0086, 49.9),
    "Q4_K_S": (0.0153, 44.8),
    "Q3_K_S": (0.0337, 37.9),
    "Q2_K": (0.0750, 31.0),
}


@pytest.mark.parametrize("node", NODES)
def test_node_has_its_public_name_and_inputs(server: ComfyServer, node: str) -> None:
    info = server.object_info()[node]
    name, inputs = NODES[node]
    assert info["display_name"] == name
    assert info["category"] == "loaders/gguf"
    assert info["input_order"]["required"][: len(inputs)] == inputs
    assert info["output"] == (["MODEL"] if node.startswith("Unet") else ["CLIP"])


def test_diffusion_models_in_subfolders_and_extra_folders_are_listed(server: ComfyServer) -> None:
    listed = server.object_info()["UnetLoaderGGUF"]["input"]["required"]["unet_name"][0]
    assert {"tiny-flux-Q8_0.gguf", os.path.join("flux", "small", "tiny-flux-Q8_0.gguf"), "far-away.gguf"} <= set(listed)
    assert all(name.endswith(".gguf") for name in listed)


def test_text_encoders_in_subfolders_and_extra_folders_are_listed(server: ComfyServer) -> None:
    listed = server.object_info()["CLIPLoaderGGUF"]["input"]["required"]["clip_name"][0]
    assert {os.path.join("t5", "tiny-flux-Q2_K.gguf"), os.path.join("deep", "far-encoder.gguf")} <= set(listed)


def test_file_in_a_subfolder_gives_the_same_picture(server: ComfyServer) -> None:
    name = "tiny-flux-Q8_0.gguf"
    here, below = (
        run_workflow(server, build_workflow(gguf_loader(file), "red 0", 17))
        for file in (name, os.path.join("flux", "small", name))
    )
    assert np.array_equal(here.picture, below.picture)


def test_file_in_an_extra_folder_loads(server: ComfyServer) -> None:
    result = run_workflow(server, build_workflow(gguf_loader("far-away.gguf"), "red 0", 17))
    assert result.picture.std() > 0.1


def test_bf16_file_samples_as_the_safetensors(sample) -> None:
    found, wanted = sample("BF16"), sample("safetensors")
    assert metrics.latent_error(found.latents, wanted.latents) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("type_name", EXPECTED)
def test_quantized_file_is_as_close_to_the_reference_as_its_type_allows(sample, type_name: str) -> None:
    found, wanted = sample(type_name), sample("safetensors")
    expected_error, expected_psnr = EXPECTED[type_name]
    assert metrics.latent_error(found.latents, wanted.latents) == pytest.approx(expected_error, rel=0.05)
    assert metrics.psnr(found.pictures, wanted.pictures) == pytest.approx(expected_psnr, abs=0.5)


@pytest.mark.slow
def test_more_bits_give_less_error(sample) -> None:
    reference = sample("safetensors")
    errors = [metrics.latent_error(sample(name).latents, reference.latents) for name in EXPECTED]
    assert errors == sorted(errors)


@pytest.mark.slow
def test_mixtures_are_better_than_the_plain_type_below_them(sample) -> None:
    reference = sample("safetensors")
    mixed = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S")
    errors = [metrics.latent_error(sample(name).latents, reference.latents) for name in mixed]
    assert errors == sorted(errors)


def test_truncated_file_is_reported_in_one_sentence(server: ComfyServer, base: Path, gguf_files) -> None:
    name = "cut-off.gguf"
    content = gguf_files["Q2_K"].read_bytes()
    (base / "models" / "diffusion_models" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WorkflowError) as error:
        server.submit(build_workflow(gguf_loader(name), "red 0", 17))
    message = error.value.exception_message
    assert error.value.node_type == "UnetLoaderGGUF"
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert len(message) < 400


def test_replaced_file_is_loaded_anew(server: ComfyServer, base: Path, gguf_files) -> None:
    path = base / "models" / "diffusion_models" / "replaced.gguf"
    workflow = build_workflow(gguf_loader(path.name), "red 0", 17)
    results = {}
    for type_name in ("Q2_K", "Q8_0"):
        incoming = path.with_suffix(".part")
        incoming.write_bytes(gguf_files[type_name].read_bytes())
        os.replace(incoming, path)
        results[type_name] = run_workflow(server, workflow)
    direct = run_workflow(server, build_workflow(gguf_loader("tiny-flux-Q8_0.gguf"), "red 0", 17))
    assert not np.array_equal(results["Q8_0"].latent, results["Q2_K"].latent)
    assert np.array_equal(results["Q8_0"].latent, direct.latent)
