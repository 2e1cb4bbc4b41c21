# SPDX-License-Identifier: Apache-2.0
"""Modules in a file of their own, as Wan's VACE comes, laid over the model that they belong to."""

import logging
import re

import gguf
import numpy as np
import pytest
import tiny
import torch
from comfy.weight_adapter import LoRAAdapter
from encoders import close
from gguf_kit import nodes
from gguf_kit.errors import GGUFError
from gguf_kit.loader import load_diffusion_model
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from small_model_table import SMALL_MODELS
from small_models import forward, host_model, make_file, narrow_detection

VACE = SMALL_MODELS["wan vace"]


def is_module(name):
    return name.startswith("vace_")


def rewrite(source, path, change, tag="wan", split_max_tensors=0):
    """A copy in which `change` gives each tensor (name, data) another name and data, or None to leave it out."""
    writer = gguf.GGUFWriter(path, tag, split_max_tensors=split_max_tensors)
    for tensor in gguf.GGUFReader(source).tensors:
        changed = change(tensor.name, np.array(tensor.data))
        if changed is not None:
            writer.add_tensor(changed[0], np.ascontiguousarray(changed[1]), raw_dtype=tensor.tensor_type)
    close(writer)
    return path


def only(keep, prefix=""):
    return lambda name, data: (prefix + name, data) if keep(name) else None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the loader searches."""
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def files(folder, monkeypatch):
    """(the model with its modules in one file, the model alone, the modules alone, weights)."""
    narrow_detection(monkeypatch, VACE)
    single = folder / "single.gguf"
    weights = make_file(VACE, single, tag="wan")
    base = rewrite(single, folder / "base.gguf", only(lambda name: not is_module(name)))
    return single, base, rewrite(single, folder / "modules.gguf", only(is_module)), weights


def load(base, extra=None):
    return load_model(str(base), OpsOptions(), str(extra) if extra else None)


@pytest.mark.parametrize("node", [nodes.UnetLoaderGGUF, nodes.UnetLoaderGGUFAdvanced])
def test_a_model_and_its_modules_are_the_file_that_holds_both(files, node):
    single, _, _, weights = files
    (model,) = node().load_unet("base.gguf", extra_name="modules.gguf")
    assert type(model.model.model_config).__name__ == "WAN21_Vace"
    result = forward(model, VACE)
    assert result.isfinite().all()
    assert torch.equal(result, forward(load(single), VACE))
    assert torch.equal(result, forward(host_model(weights), VACE))
    assert not torch.equal(result, forward(node().load_unet("base.gguf")[0], VACE))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_of_either_file_are_taken_off(files, folder, prefix):
    single, base, modules, _ = files
    prefixed = [rewrite(path, folder / f"{path.stem}-p.gguf", only(str, prefix)) for path in (base, modules)]
    expected = forward(load(single), VACE)
    for pair in ((prefixed[0], modules), (base, prefixed[1])):
        assert torch.equal(forward(load(*pair), VACE), expected)


def test_modules_in_parts(files, folder):
    single, base, modules, _ = files
    rewrite(modules, folder / "parts.gguf", only(str), split_max_tensors=10)
    parts = sorted(folder.glob("parts-*.gguf"))
    assert len(parts) > 1
    assert torch.equal(forward(load(base, parts[0]), VACE), forward(load(single), VACE))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_lora_reaches_the_modules(files, strength):
    single, base, modules, weights = files
    key = "diffusion_model.vace_blocks.0.self_attn.q.weight"
    patch = {key: LoRAAdapter(set(), (*tiny.factors((128, 128), 1, scale=0.5), 4.0, None, None, None))}
    found, whole, dense = (
        forward(tiny.with_patches(patcher, patch, strength=strength), VACE)
        for patcher in (load(base, modules), load(single), host_model(weights))
    )
    assert torch.equal(found, whole)
    assert tiny.relative(found, dense) < 1e-6
    assert torch.equal(found, forward(load(single), VACE)) is (strength == 0)


def test_tensors_of_the_same_name_come_from_the_extra_file(files, folder):
    single, _, modules, _ = files
    key = "vace_blocks.0.modulation"

    def negate(name, data):
        return (name, -data if name == key else data) if is_module(name) else None

    other = rewrite(modules, folder / "other.gguf", negate)
    found = load(single, other)
    assert torch.equal(
        found.model.diffusion_model.vace_blocks[0].modulation,
        -load(single).model.diffusion_model.vace_blocks[0].modulation,
    )
    assert torch.equal(forward(load(single, modules), VACE), forward(load(single), VACE))


def test_the_summary_names_both_files_and_counts_what_is_used_of_them(files, caplog):
    single, base, modules, _ = files
    with caplog.at_level(logging.INFO, "gguf_kit"):
        infos = [load_diffusion_model(*paths)[1] for paths in ((single,), (base, modules), (single, modules))]
    assert infos[1].summary().startswith("base.gguf with modules.gguf: Wan VACE (tagged wan), ")
    assert infos[1].summary() in caplog.messages
    for info in infos[1:]:
        assert (info.n_weights, info.n_bytes, info.qtypes) == (infos[0].n_weights, infos[0].n_bytes, infos[0].qtypes)


def test_the_model_can_be_loaded_again_with_its_modules(files):
    single, base, modules, _ = files
    function, arguments = load(base, modules).cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert torch.equal(forward(again, VACE), forward(load(single), VACE))


# -- the node --


def test_the_input_comes_last_and_may_be_left_out(files):
    for node, n_required in ((nodes.UnetLoaderGGUF, 1), (nodes.UnetLoaderGGUFAdvanced, 4)):
        inputs = node.INPUT_TYPES()
        assert list(inputs) == ["required", "optional"]
        assert len(inputs["required"]) == n_required
        assert next(iter(inputs["optional"])) == "extra_name"
        choices, options = inputs["optional"]["extra_name"]
        assert choices == ["none", "base.gguf", "modules.gguf", "single.gguf"]
        assert options["default"] == "none"
    plain = forward(nodes.UnetLoaderGGUFAdvanced().load_unet("single.gguf", "default", "default", False)[0], VACE)
    for extra in ("none", None):
        assert torch.equal(forward(nodes.UnetLoaderGGUF().load_unet("single.gguf", extra_name=extra)[0], VACE), plain)


def test_either_file_counts_when_it_changes(files):
    state = nodes.UnetLoaderGGUF.IS_CHANGED
    alone = state(unet_name="base.gguf")
    assert alone == state(unet_name="base.gguf", extra_name="none") == state(unet_name="base.gguf", extra_name=None)
    before = state(unet_name="base.gguf", extra_name="modules.gguf")
    assert before != alone
    files[2].write_bytes(files[2].read_bytes() + bytes(32))
    after = state(unet_name="base.gguf", extra_name="modules.gguf")
    assert after not in (before, alone)
    files[1].write_bytes(files[1].read_bytes() + bytes(32))
    assert state(unet_name="base.gguf", extra_name="modules.gguf") not in (before, after)


# -- what the user reads when two files do not fit --


def sentence(base, extra=None):
    with pytest.raises(GGUFError) as caught:
        load(base, extra)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_modules_alone_say_what_they_are_for(files):
    assert sentence(files[2]) == (
        "modules.gguf: it holds modules that need a model (VACE), and no model. "
        "Choose the model as unet_name, and this file as extra_name."
    )


def test_the_two_files_the_wrong_way_round(files):
    message = sentence(files[2], files[1])
    assert message.startswith(
        "base.gguf: it is a whole model (Wan), no modules to be laid over modules.gguf. Choose it"
    )


def test_a_whole_model_of_another_kind(files, tiny_flux):
    other = tiny_flux("Q8_0")
    assert f"{other.name}: it is a whole model (Flux.1" in sentence(files[1], other)
    assert "no modules to be laid over base.gguf" in sentence(files[1], other)


def test_modules_for_a_model_of_another_size(files, folder):
    large = rewrite(
        files[2],
        folder / "large.gguf",
        lambda name, data: (name, np.repeat(data, 2, axis=0) if ".ffn." in name else data),
    )
    message = sentence(files[1], large)
    assert re.match(r"large\.gguf: its tensor 'vace_blocks\.0\.ffn\.\d\.\w+' has the shape \(", message)
    assert "and 'blocks.0.ffn." in message
    assert "in base.gguf. The two are of different models or sizes" in message


def test_a_tensor_of_the_same_name_in_another_shape(files, folder):
    other = rewrite(
        files[2], folder / "other.gguf", lambda name, data: (name, data[:1] if "before_proj" in name else data)
    )
    message = sentence(files[0], other)
    assert message.startswith("other.gguf: its tensor 'vace_blocks.0.before_proj.")
    assert "and it has (128, 128) in single.gguf" in message or "and it has (128,) in single.gguf" in message


def test_a_shape_that_only_the_host_knows(files, folder):
    other = rewrite(
        files[2], folder / "other.gguf", lambda name, data: (name, data[:1] if "before_proj" in name else data)
    )
    message = sentence(files[1], other)
    assert message.startswith("base.gguf: ComfyUI ")
    assert "cannot build a model from these tensors and those of other.gguf: size mismatch for vace_blocks.0" in message


def test_modules_that_are_not_complete(files, folder):
    part = rewrite(files[2], folder / "part.gguf", lambda name, data: None if "after_proj" in name else (name, data))
    message = sentence(files[1], part)
    assert message.startswith("base.gguf: 2 tensors that ComfyUI needs are missing here and in part.gguf: ")
    assert "diffusion_model.vace_blocks.0.after_proj.bias" in message


def test_a_file_with_nothing_for_the_model(files, folder):
    other = tiny.copy_file(
        files[2], folder / "other.gguf", lambda name: False, {"lora_A": np.zeros((4, 32), np.float32)}
    )
    assert sentence(files[1], other).startswith(
        "other.gguf: none of its 1 tensors has a place in the model of base.gguf"
    )


def test_the_same_model_whole_is_no_module(files):
    said = f"is a whole model \\(.*\\), no modules to be laid over {files[1].name}"
    with pytest.raises(GGUFError, match=said):
        load(files[1], files[1])


def test_a_text_encoder_is_no_module(files, folder):
    extra = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    other = tiny.copy_file(files[2], folder / "encoder.gguf", lambda name: False, extra, tag="t5encoder")
    assert sentence(files[1], other).startswith("encoder.gguf: it is a text encoder (general.architecture 't5encoder')")
