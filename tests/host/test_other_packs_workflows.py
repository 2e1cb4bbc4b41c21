# SPDX-License-Identifier: Apache-2.0
"""Workflows as ComfyUI-GGUF has saved them since 2024 (tests/data/workflows) open and run with our nodes, unchanged.

Files in the page's form are turned into prompts as the page does it: by position in widgets_values. Validation and
execution are the host's. Every diffusion model is the tiny Flux and only its own text encoder is loaded for real; what
others would be asked for is compared.
"""

import asyncio
import json
import os
import types
from pathlib import Path

import comfy.sd
import execution
import folder_paths
import make_files
import pytest
import torch
from gguf_kit import nodes
from gguf_kit.demo import tiny_flux
from gguf_kit.models.clip_types import resolve
from PIL import Image
from test_text_encoders import t5_base  # noqa: F401 (a fixture)

import nodes as host_nodes

WORKFLOWS = Path(__file__).parents[1] / "data" / "workflows"
T5, CLIP_L, CLIP_G = "t5-v1_1-xxl-encoder-Q8_0.gguf", "clip_l.safetensors", "clip_g.safetensors"
LLAVA, LLAMA = "llava-llama-3-8B-v1_1-Q4_K_M.gguf", "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"
UMT5, T5_BASE = "umt5-xxl-encoder-Q8_0.gguf", "t5-base-Q8_0.gguf"
# File of a text encoder -> what it is, as a key of models.clip_types.ENCODERS.
ENCODERS = {T5: "T5_XXL", CLIP_L: "CLIP_L", CLIP_G: "CLIP_G", LLAVA: "LLAMA3_8", LLAMA: "LLAMA3_8", UMT5: "UMT5_XXL"}
PLAIN = (None, None, False)
# Workflow -> files and options (dequant_dtype, patch_dtype, patch_on_device; "target" of the first is the default) of
# its models, files and type of its CLIP.
WANTED = {
    "2024-08-flux": ([("flux1-schnell-Q4_0.gguf", PLAIN)], ([T5, CLIP_L], "flux")),
    "2024-08-advanced": (
        [("flux1-dev-Q8_0.gguf", (None, torch.float16, True))],
        ([T5_BASE], "stable_audio"),
    ),
    "2024-11-sd35": ([("sd3.5_large-Q4_0.gguf", PLAIN)], ([CLIP_G, CLIP_L, T5], "sd3")),
    "2024-12-ltxv-api": ([("ltx-video-2b-v0.9-Q8_0.gguf", PLAIN)], ([T5], "ltxv")),
    "2025-01-hunyuan-video-api": (
        [("hunyuan-video-t2v-720p-Q4_K_M.gguf", (torch.bfloat16, None, False))],
        ([CLIP_L, LLAVA], "hunyuan_video"),
    ),
    "2025-04-hidream": ([("hidream-i1-full-Q4_K_M.gguf", PLAIN)], ([CLIP_L, CLIP_G, T5, LLAMA], "hidream")),
    "2025-11-chroma-api": ([(os.path.join("chroma", "chroma1-hd-Q8_0.gguf"), PLAIN)], ([T5], "chroma")),
    "2025-11-wan-two-models": (
        [
            ("wan2.2_t2v_high_noise_14B_Q4_K_M.gguf", PLAIN),
            ("wan2.2_t2v_low_noise_14B_Q4_K_M.gguf", (torch.float32, "target", False)),
        ],
        ([UMT5], "wan"),
    ),
}
OURS = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Unet") or name.endswith("CLIPLoaderGGUF")]
SMALL_KINDS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def widgets(class_type):
    """Names and defaults of a node's widgets in the page's order; the page puts one of its own behind a seed."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in host_nodes.NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES().get(group, {}).items():
            if isinstance(kind, list) or kind in SMALL_KINDS:
                default = kind[0] if isinstance(kind, list) and kind else None
                found[name] = options[0].get("default", default) if options else default
                if options and options[0].get("control_after_generate"):
                    found["control_after_generate"] = "fixed"
    return found


def to_prompt(workflow):
    """A workflow in the page's form as the page sends it to the server, one in API form as it is."""
    if "nodes" not in workflow:
        return workflow
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values = widgets(node["type"])
        assert len(node["widgets_values"]) <= len(values)
        values |= dict(zip(values, node["widgets_values"], strict=False))
        values.pop("control_after_generate", None)
        linked = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", ()) if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return prompt


@pytest.fixture
def host(monkeypatch, tmp_path, tiny_flux_file, t5_base):  # noqa: F811
    """The host with our nodes, folders with the files that the workflows name, and notes of what was asked for."""
    for key, names in (
        ("diffusion_models", [name for models, _ in WANTED.values() for name, _ in models]),
        ("text_encoders", list(ENCODERS)),
        ("vae_approx", []),
    ):
        folder = tmp_path / key
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(tiny_flux_file, folder / name)
        _, endings = folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(folder)], endings))
    (tmp_path / "text_encoders" / T5_BASE).symlink_to(t5_base)
    (tmp_path / "vae_approx").mkdir()
    for file in tiny_flux.VAE_FILES:
        (tmp_path / "vae_approx" / file.name).symlink_to(file)
    for key in ("unet_gguf", "clip_gguf"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([], {".gguf"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for name in OURS:
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, nodes.NODE_CLASS_MAPPINGS[name])
    return types.SimpleNamespace(folder=tmp_path, **noted(monkeypatch))


@pytest.fixture(scope="module")
def tiny_flux_file(tmp_path_factory):
    return make_files.write_gguf("Q4_K_S", tmp_path_factory.mktemp("flux") / "tiny.gguf")


def noted(monkeypatch):
    """Lists that get what the nodes ask the service for."""
    models, clips = [], []
    load_model, load_clip = nodes.load_model, nodes.load_clip

    def note_model(path, options, *more):
        folder = folder_paths.get_folder_paths("diffusion_models")[0]
        models.append(
            (os.path.relpath(path, folder), (options.dequant_dtype, options.patch_dtype, options.patch_on_device))
        )
        assert more == (None, None, 0)
        return load_model(path, options, *more)

    def note_clip(paths, type_name, device, vision):
        names = [os.path.basename(path) for path in paths]
        type_name = type_name or nodes.clip_types(len(names))[0]  # as load_clip() does
        clips.append((names, type_name))
        assert (device, vision) == ("default", "auto")
        if names == [T5_BASE]:
            return Checked(load_clip(paths, type_name, device, vision))
        chosen, problem = resolve(type_name, [ENCODERS[name] for name in names], nodes.clip_types(len(names)))
        assert chosen == type_name, problem
        assert hasattr(comfy.sd.CLIPType, type_name.upper())
        return Checked(None)

    monkeypatch.setattr(nodes, "load_model", note_model)
    monkeypatch.setattr(nodes, "load_clip", note_clip)
    return {"models": models, "clips": clips}


class Checked:
    """What text encoders give the tiny Flux: zeros in its size, after the encoder, if there is one, has encoded."""

    def __init__(self, clip):
        self.clip = clip

    def tokenize(self, text, **options):
        return self.clip.tokenize(text, **options) if self.clip else text

    def encode_from_tokens_scheduled(self, tokens, **options):
        if self.clip:
            hidden = self.clip.encode_from_tokens_scheduled(tokens, **options)[0][0]
            assert hidden.isfinite().all()
            assert hidden.std() > 0
        return [[torch.zeros(1, 2, 64), {"pooled_output": torch.zeros(1, 64)}]]


def run(prompt):
    """Execute a prompt as the host's worker does: whether it succeeded, and what it reported."""
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    assert (valid, error, node_errors) == (True, None, {})
    silent = types.SimpleNamespace(client_id=None, last_node_id=None, sockets_metadata={}, send_sync=lambda *args: None)
    executor = execution.PromptExecutor(
        silent, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0}
    )
    executor.execute(prompt, "test", {}, outputs)
    return executor.success, executor.status_messages


@pytest.mark.parametrize("name", WANTED)
def test_a_saved_workflow_runs_unchanged(host, name):
    prompt = to_prompt(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    success, messages = run(prompt)
    assert success, messages
    models, clip = WANTED[name]
    assert sorted(host.models, key=str) == sorted(models, key=str)
    assert host.clips == [clip]
    (picture,) = (host.folder / "output").glob("*.png")
    assert len(set(Image.open(picture).convert("L").getdata())) > 10


def test_every_workflow_there_is_tested():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(WANTED)


def test_widgets_that_came_later_are_behind_those_of_saved_workflows():
    """The old pack's widgets, in its order; what follows has a default that changes nothing."""
    clip_types = list(host_nodes.CLIPLoader.INPUT_TYPES()["required"]["type"][0])
    old = {
        "UnetLoaderGGUF": ["unet_name"],
        "UnetLoaderGGUFAdvanced": ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
        "CLIPLoaderGGUF": ["clip_name", "type"],
        "DualCLIPLoaderGGUF": ["clip_name1", "clip_name2", "type"],
        "TripleCLIPLoaderGGUF": [f"clip_name{i}" for i in (1, 2, 3)],
        "QuadrupleCLIPLoaderGGUF": [f"clip_name{i}" for i in (1, 2, 3, 4)],
    }
    for class_type, names in old.items():
        node = nodes.NODE_CLASS_MAPPINGS[class_type]
        inputs = node.INPUT_TYPES()
        assert list(inputs["required"]) == names
        assert node.RETURN_TYPES[0] == ("MODEL" if class_type.startswith("Unet") else "CLIP")
    assert nodes.CLIPLoaderGGUF.INPUT_TYPES()["required"]["type"][0][: len(clip_types)] == clip_types
    early = {"stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "wan"}
    assert early <= set(clip_types)
    assert {"sdxl", "sd3", "flux", "hunyuan_video"} <= set(nodes.clip_types(2))
