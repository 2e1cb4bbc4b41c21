# SPDX-License-Identifier: Apache-2.0
"""Our node classes wrapped as ComfyUI-MultiGPU wraps loaders: a device more, its own way of loading, same results.

What it does is written anew here from its source (pollockjj/ComfyUI-MultiGPU a38cbda: wrappers.py override_class,
override_class_clip, _create_distorch_safetensor_v2_override; nodes.py; distorch_2.py new_partially_load).
"""

import copy
import os
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import tiny
import torch
from gguf_kit import nodes, service
from test_text_encoders import encode, float_state, t5_base  # noqa: F401 (a fixture)

import nodes as host_nodes

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda:0"]
LOADERS = [nodes.UnetLoaderGGUF, nodes.UnetLoaderGGUFAdvanced]
CLIP_LOADERS = [
    nodes.CLIPLoaderGGUF,
    nodes.DualCLIPLoaderGGUF,
    nodes.TripleCLIPLoaderGGUF,
    nodes.QuadrupleCLIPLoaderGGUF,
]


@pytest.fixture
def current(monkeypatch):
    """The device that the wrapped node has chosen, which the host's functions then give."""
    chosen = SimpleNamespace(device="cpu", seen=[])

    def get_device(*args):
        chosen.seen.append(chosen.device)
        return CPU  # all there is

    for name in ("get_torch_device", "text_encoder_device", "unet_offload_device"):
        monkeypatch.setattr(comfy.model_management, name, get_device)
    return chosen


def wrap(cls, current, name="device", *, inner_device=False, allocation=False):
    """A class made of a loader's: one device input more, under which the loader runs.

    Args:
        name: of that input.
        inner_device: hand device="default" on, as is done for loaders of one and two text encoders.
        allocation: note on the model how it is to be distributed.
    """

    class NodeOverride(cls):
        @classmethod
        def INPUT_TYPES(s):  # noqa: N802, N804 (both are the wrapper's)
            inputs = copy.deepcopy(cls.INPUT_TYPES())
            inputs["optional"] = inputs.get("optional", {})
            inputs["optional"][name] = (DEVICES, {"default": DEVICES[1]})
            return inputs

        CATEGORY = "multigpu"
        FUNCTION = "override"

        def override(self, *args, **kwargs):
            before, current.device = current.device, kwargs.pop(name, None) or current.device
            if inner_device:
                kwargs["device"] = "default"
            try:
                out = getattr(super(), cls.FUNCTION)(*args, **kwargs)
            finally:
                current.device = before
            if allocation:
                patcher = out[0] if hasattr(out[0], "model") else out[0].patcher
                patcher.model.distribution = "cpu"
            return out

    return NodeOverride


def wrap_indirectly(cls, current):
    """The same of a class that has the old pack's inputs and calls what the host has under its id, by position."""

    class Loader:
        RETURN_TYPES, FUNCTION = cls.RETURN_TYPES, cls.FUNCTION

        @classmethod
        def INPUT_TYPES(s):  # noqa: N802, N804
            return {"required": cls.INPUT_TYPES()["required"]}

        def load_unet(self, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None):
            node = host_nodes.NODE_CLASS_MAPPINGS[cls.__name__]()
            return node.load_unet(unet_name, dequant_dtype, patch_dtype, patch_on_device)

        def load_clip(self, device=None, type="stable_diffusion", **names):
            return host_nodes.NODE_CLASS_MAPPINGS[cls.__name__]().load_clip(*names.values(), type)

    return wrap(Loader, current)


@pytest.fixture
def model_file(monkeypatch, tmp_path, tiny_flux):
    """Name of the tiny Flux in the loader's folder; the host has our nodes under their ids."""
    os.link(tiny_flux("Q4_K_S"), tmp_path / "m.gguf")
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    for cls in (*LOADERS, *CLIP_LOADERS):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)
    return "m.gguf"


def call(node_class, **values):
    """What the host does with a node: its function by name, with its inputs by name."""
    inputs = node_class.INPUT_TYPES()
    names = {name for group in inputs.values() for name in group}
    assert set(values) <= names
    assert isinstance(getattr(node_class, "IS_CHANGED", lambda **_: "")(**values), str)
    with torch.inference_mode():
        return getattr(node_class(), node_class.FUNCTION)(**values)


def expected(path, *patches):
    model = tiny.float_model(path)
    return tiny.run(tiny.with_patches(model, *patches) if patches else model)


@pytest.mark.parametrize("cls", LOADERS)
@pytest.mark.parametrize("how", [wrap, wrap_indirectly])
def test_a_wrapped_loader_gives_a_model_that_samples(current, model_file, tiny_flux, cls, how):
    node = how(cls, current)
    given = {"dequant_dtype": "default", "patch_dtype": "default", "patch_on_device": False}
    (model,) = call(node, unet_name=model_file, device="cuda:0", **(given if cls is LOADERS[1] else {}))
    assert "cuda:0" in current.seen  # the host asked while the wrapper's choice was in force
    assert current.device == "cpu"
    assert list(node.INPUT_TYPES()["required"]) == list(cls.INPUT_TYPES()["required"])
    with torch.inference_mode():
        assert torch.equal(tiny.run(model), expected(tiny_flux("Q4_K_S")))
        result = tiny.run(tiny.with_patches(model, tiny.lora()))
        assert tiny.relative(result, expected(tiny_flux("Q4_K_S"), tiny.lora())) < 1e-5


def load_distributed(self, device_to, *args, **kwargs):
    """Load module by module in place of the host's partially_load, patches and all."""
    if self.model.current_weight_patches_uuid not in (None, self.patches_uuid):
        self.unpatch_model(self.offload_device, unpatch_weights=True)
    self.patch_model(load_weights=False)
    loading = sorted(self._load_list(), reverse=True, key=lambda item: item[-4:-2])
    for *_, name, module, _ in loading:
        module.to(device_to)
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in self.patches:
                self.patch_weight_to_device(f"{name}.{kind}", device_to=device_to)
        module.to(torch.device(self.model.distribution))
        module.comfy_cast_weights = module.comfy_patched_weights = True
    self.model.current_weight_patches_uuid = self.patches_uuid
    self.model.device = device_to
    return 0


@pytest.mark.parametrize("cls", LOADERS)
def test_a_model_distributed_by_another_packs_loading_samples(current, model_file, tiny_flux, monkeypatch, cls):
    (model,) = call(wrap(cls, current, "compute_device", allocation=True), unet_name=model_file, compute_device="cpu")
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", load_distributed)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda *args, **kwargs: pytest.fail("was called"))
    reference = tiny_flux("Q4_K_S")
    with torch.inference_mode():
        patched = tiny.with_patches(model, tiny.lora())
        patched.partially_load(CPU)
        with_lora = tiny.run(patched, load=False)
        model.partially_load(CPU)
        without = tiny.run(model, load=False)
    monkeypatch.undo()
    with torch.inference_mode():
        assert torch.equal(without, expected(reference))
        assert tiny.relative(with_lora, expected(reference, tiny.lora())) < 1e-5


def test_a_wrapped_clip_loader_encodes(current, model_file, t5_base, monkeypatch):  # noqa: F811
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "clip_gguf", ([str(t5_base.parent)], {".gguf"}))
    dense = comfy.sd.load_text_encoder_state_dicts(
        [float_state(t5_base)], clip_type=comfy.sd.CLIPType.STABLE_AUDIO, model_options={"dtype": torch.float32}
    )
    wanted = encode(dense)
    for node in (
        wrap(nodes.CLIPLoaderGGUF, current, inner_device=True, allocation=True),
        wrap_indirectly(nodes.CLIPLoaderGGUF, current),
    ):
        (clip,) = call(node, clip_name=t5_base.name, type="stable_audio", device="cuda:0")
        assert "cuda:0" in current.seen
        clip.patcher.load(force_patch_weights=True)  # as is done behind the loader of two
        with torch.inference_mode():
            assert torch.equal(encode(clip), wanted)


@pytest.mark.parametrize("cls", CLIP_LOADERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("how", ["direct", "with a device", "indirect"])
def test_every_clip_loader_gets_files_and_type_from_a_wrapper(current, model_file, monkeypatch, cls, how):
    """Loaders of three and four files have no type; they hand on what the wrapper has as its default, if anything."""
    calls = []
    monkeypatch.setattr(nodes, "_existing_path", lambda name: name)
    monkeypatch.setattr(nodes, "load_clip", lambda *args: calls.append(args))
    names = ["clip_name"] if cls.N_FILES == 1 else [f"clip_name{i + 1}" for i in range(cls.N_FILES)]
    values = {name: f"{name}.gguf" for name in names}
    handed_on = {3: "sd3", 4: "stable_diffusion"} if how == "indirect" else {}
    kind = {1: "wan", 2: "flux", **handed_on}.get(cls.N_FILES, "")
    if cls.N_FILES < 3:
        values["type"] = kind
    if how == "indirect":
        node, outer = wrap_indirectly(cls, current), {3: {"type": "sd3"}}.get(cls.N_FILES, {})
        with torch.inference_mode():
            node().override(**values, **outer, device="cuda:0")
    else:
        node = wrap(cls, current, inner_device=how == "with a device")
        call(node, **values, device="cuda:0")
    ((paths, type_name, device, vision),) = calls
    assert (paths, device, vision) == (tuple(f"{name}.gguf" for name in names), "default", "auto")
    assert type_name == kind


@pytest.mark.parametrize(
    ("encoders", "clip_type"),
    [(["CLIP_L", "CLIP_G", "T5_XXL"], "SD3"), (["CLIP_L", "CLIP_G", "T5_XXL", "LLAMA3_8"], "HIDREAM")],
)
def test_loaders_without_a_type_take_any(monkeypatch, encoders, clip_type):
    """The host takes none for three and four files, and a wrapper's default is no choice of the user's."""
    monkeypatch.setattr(service.text_encoders, "detect", lambda state: state)
    paths = [f"{name}.safetensors" for name in encoders]
    found = service._clip_type(paths, "stable_diffusion", encoders, [None] * len(encoders))
    assert found == comfy.sd.CLIPType[clip_type]
