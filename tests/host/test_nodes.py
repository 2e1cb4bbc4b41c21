# SPDX-License-Identifier: Apache-2.0
"""The node classes: what they offer, what they pass on, and the sentences that reach the user."""

import os
import re

import comfy.model_management
import comfy.sd
import numpy as np
import pytest
import tiny
import torch
from gguf_kit import nodes
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import load_diffusion_model

SIX = {
    "UnetLoaderGGUF": ("Unet Loader (GGUF)", ["unet_name"]),
    "UnetLoaderGGUFAdvanced": (
        "Unet Loader (GGUF/Advanced)",
        ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
    ),
    "CLIPLoaderGGUF": ("CLIPLoader (GGUF)", ["clip_name", "type"]),
    "DualCLIPLoaderGGUF": ("DualCLIPLoader (GGUF)", ["clip_name1", "clip_name2", "type"]),
    "TripleCLIPLoaderGGUF": ("TripleCLIPLoader (GGUF)", ["clip_name1", "clip_name2", "clip_name3"]),
    "QuadrupleCLIPLoaderGGUF": ("QuadrupleCLIPLoader (GGUF)", ["clip_name1", "clip_name2", "clip_name3", "clip_name4"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the UNet loader searches."""
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    monkeypatch.setattr(nodes.folder_paths, "filename_list_cache", {})
    return tmp_path


NODES = list(nodes.NODE_CLASS_MAPPINGS)


def test_the_six_ids_with_their_names_and_inputs_in_order():
    assert NODES[: len(SIX)] == list(SIX)
    for node_id, (title, inputs) in SIX.items():
        node = nodes.NODE_CLASS_MAPPINGS[node_id]
        assert nodes.NODE_DISPLAY_NAME_MAPPINGS[node_id] == title
        assert list(node.INPUT_TYPES()["required"]) == inputs
        assert node.CATEGORY == "loaders/gguf"
        assert callable(getattr(node, node.FUNCTION))


def test_clip_types_are_those_of_the_host():
    import nodes as host_nodes

    for ours, theirs in (
        (nodes.CLIPLoaderGGUF, host_nodes.CLIPLoader),
        (nodes.DualCLIPLoaderGGUF, host_nodes.DualCLIPLoader),
    ):
        assert ours.INPUT_TYPES()["required"]["type"][0] == [*theirs.INPUT_TYPES()["required"]["type"][0], "auto"]


def test_files_in_subfolders_and_in_folders_added_later_are_listed(folder, tiny_flux, tmp_path_factory):
    (folder / "sub").mkdir()
    os.link(tiny_flux("Q2_K"), folder / "sub" / "model.GGUF")
    (folder / "notes.txt").write_text("no model")
    names = nodes.UnetLoaderGGUF.INPUT_TYPES()["required"]["unet_name"][0]
    assert names == [os.path.join("sub", "model.GGUF")]
    later = tmp_path_factory.mktemp("later")
    os.link(tiny_flux("Q2_K"), later / "other.gguf")
    nodes.folder_paths.add_model_folder_path("diffusion_models", str(later))
    try:
        assert "other.gguf" in nodes.UnetLoaderGGUF.INPUT_TYPES()["required"]["unet_name"][0]
    finally:
        nodes.folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(later))


def test_the_loader_node_gives_a_model_that_computes(folder, tiny_flux):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    (model,) = nodes.UnetLoaderGGUF().load_unet("m.gguf")
    assert torch.equal(tiny.run(model), tiny.run(tiny.float_model(tiny_flux("Q4_K_S"))))


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (("default", "default", False), (None, None, False)),
        (("target", "target", True), (None, "target", True)),
        (("float16", "bfloat16", False), (torch.float16, torch.bfloat16, False)),
        (("float32", "float32", False), (torch.float32, torch.float32, False)),
    ],
    ids=lambda v: str(v[0]),
)
def test_the_advanced_node_passes_its_options_to_its_model_alone(folder, tiny_flux, inputs, options):
    os.link(tiny_flux("Q2_K"), folder / "m.gguf")
    (model,) = nodes.UnetLoaderGGUFAdvanced().load_unet("m.gguf", *inputs)
    found = model.model.diffusion_model.double_blocks[0].img_attn.qkv.options
    assert (found.dequant_dtype, found.patch_dtype, found.patch_on_device) == options
    (plain,) = nodes.UnetLoaderGGUF().load_unet("m.gguf")
    assert plain.model.diffusion_model.double_blocks[0].img_attn.qkv.options == nodes.OpsOptions()
    assert tiny.run(model).isfinite().all()


def test_workflows_of_before_have_their_inputs_first_and_in_order():
    """The values of a saved workflow are assigned by position."""
    plain, advanced = (node.INPUT_TYPES() for node in (nodes.UnetLoaderGGUF, nodes.UnetLoaderGGUFAdvanced))
    assert list(plain["optional"]) == ["extra_name"]
    assert list(advanced["optional"]) == ["extra_name", "compute_dtype", "keep_dequantized_mb"]
    assert advanced["optional"]["compute_dtype"][1]["default"] == "default"
    assert advanced["optional"]["keep_dequantized_mb"][1]["default"] == 0


def test_the_advanced_node_passes_its_newer_inputs_on(folder, monkeypatch):
    (folder / "m.gguf").write_bytes(b"")
    calls = []
    monkeypatch.setattr(nodes, "load_model", lambda *args: calls.append(args[2:]))
    node = nodes.UnetLoaderGGUFAdvanced()
    node.load_unet("m.gguf", "default", "default", False, "none")
    node.load_unet("m.gguf", compute_dtype="bfloat16", keep_dequantized_mb=3)
    assert calls == [(None, None, 0), (None, torch.bfloat16, 3 << 20)]
    states = [node.IS_CHANGED("m.gguf", keep_dequantized_mb=mb, compute_dtype="float32") for mb in (0, 64)]
    assert states[0] == states[1] == node.IS_CHANGED("m.gguf")  # the host itself compares inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_model_computes_in_the_chosen_type_on_a_cpu(folder, tiny_flux, dtype):
    os.link(tiny_flux("Q4_K_S"), folder / "m.gguf")
    (model,) = nodes.UnetLoaderGGUFAdvanced().load_unet("m.gguf", compute_dtype=str(dtype).removeprefix("torch."))
    seen = set()
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    result = tiny.run(model)
    assert seen == {dtype}
    expected = tiny.run(tiny.float_model(tiny_flux("Q4_K_S")))
    assert tiny.relative(result, expected) <= (0 if dtype == torch.float32 else 2e-2)
    clone = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert torch.equal(tiny.run(clone), result)


def test_a_replaced_file_counts_as_changed(folder, tiny_flux):
    path = folder / "m.gguf"
    os.link(tiny_flux("Q2_K"), path)
    before = nodes.UnetLoaderGGUF.IS_CHANGED("m.gguf")
    assert before
    assert nodes.UnetLoaderGGUF.IS_CHANGED(unet_name="m.gguf") == before
    os.unlink(path)
    assert nodes.UnetLoaderGGUF.IS_CHANGED("m.gguf") == ""
    os.link(tiny_flux("Q4_K_S"), path)
    assert nodes.UnetLoaderGGUF.IS_CHANGED("m.gguf") not in ("", before)
    assert nodes.DualCLIPLoaderGGUF.IS_CHANGED(clip_name1="a.gguf", clip_name2="b.gguf", type="flux") == " "


def test_a_part_whose_first_part_is_missing_is_offered(folder, tiny_flux):
    os.link(tiny_flux("Q2_K"), folder / "m-00002-of-00002.gguf")
    names = nodes.UnetLoaderGGUF.INPUT_TYPES()["required"]["unet_name"][0]
    assert list(names) == ["m-00002-of-00002.gguf"]
    assert "m-00002-of-00002.gguf" in names


def test_a_vae_is_sent_to_its_own_node(folder, tiny_flux):
    weights = {f"{part}.conv_in.weight": np.zeros((8, 4, 3, 3), np.float32) for part in ("decoder", "encoder")}
    path = tiny.copy_file(tiny_flux("Q2_K"), folder / "vae.gguf", lambda name: False, weights)
    assert sentence(path) == 'vae.gguf: it is a VAE, not a diffusion model. Use "Load VAE (GGUF)".'


def test_another_part_of_a_split_file_is_a_change(folder):
    names = [f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in names:
        (folder / name).write_bytes(b"part")
    before = nodes.UnetLoaderGGUF.IS_CHANGED(names[0])
    (folder / names[1]).write_bytes(b"another")
    assert nodes.UnetLoaderGGUF.IS_CHANGED(names[0]) not in ("", before)
    assert nodes.UnetLoaderGGUF.IS_CHANGED(names[0]) == nodes.UnetLoaderGGUF.IS_CHANGED(names[1])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("tag", ["flux", "pig", ""])
def test_keys_decide_with_and_without_prefix_and_with_any_tag(tiny_flux, tmp_path, prefix, tag):
    source = tiny_flux("Q4_K_S")
    path = tiny.copy_file(source, tmp_path / "m.gguf", tag=tag, prefix=prefix)
    assert torch.equal(tiny.run(tiny.quantized_model(path)), tiny.run(tiny.float_model(source)))


# -- what the user reads when something is wrong --


def sentence(path):
    with pytest.raises(GGUFError) as caught:
        tiny.quantized_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert "\n" not in message
    return message


def test_a_model_that_the_host_does_not_know(tiny_flux, tmp_path):
    extra = {"novel_blocks.0.attn.weight": np.zeros((64, 64), dtype=np.float32)}
    path = tiny.copy_file(tiny_flux("Q2_K"), tmp_path / "new.gguf", keep=lambda name: False, extra=extra)
    assert re.search(r"ComfyUI [\d.]+ does not recognise this model .*too old for it", sentence(path))


def test_missing_tensors_are_named(tiny_flux, tmp_path):
    keep = lambda name: "double_blocks.1.img_mlp" not in name  # noqa: E731
    path = tiny.copy_file(tiny_flux("Q2_K"), tmp_path / "m.gguf", keep=keep)
    message = sentence(path)
    assert "4 tensors that ComfyUI needs are missing: diffusion_model.double_blocks.1.img_mlp.0.bias, " in message


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.norm.query_norm.scale", "final_layer.linear.bias"])
def test_a_missing_norm_or_bias_is_no_quiet_nan(tiny_flux, tmp_path, name):
    path = tiny.copy_file(tiny_flux("Q2_K"), tmp_path / "m.gguf", keep=lambda n: n != name)
    assert "1 tensors that ComfyUI needs are missing" in sentence(path)


@pytest.mark.parametrize("name", ["img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"])
def test_what_the_hosts_detection_trips_over_is_still_one_sentence(tiny_flux, tmp_path, name):
    path = tiny.copy_file(tiny_flux("Q2_K"), tmp_path / "m.gguf", extra={name: np.zeros(64, dtype=np.float32)})
    assert "ComfyUI" in sentence(path)


def test_out_of_memory_is_left_to_the_host(tiny_flux, monkeypatch):
    def load(*args, **kwargs):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", load)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        tiny.quantized_model(tiny_flux("Q2_K"))


def test_a_name_that_comes_over_a_link_does_not_break_is_changed():
    assert nodes.UnetLoaderGGUF.IS_CHANGED(unet_name=None) == ""
    assert nodes.CLIPLoaderGGUF.IS_CHANGED(clip_name=None, type="flux") == ""


def test_a_tensor_of_the_wrong_shape_is_named(tiny_flux, tmp_path):
    wrong = {"single_blocks.1.linear2.weight": np.zeros((256, 256), dtype=np.float32)}
    path = tiny.copy_file(tiny_flux("Q2_K"), tmp_path / "m.gguf", extra=wrong)
    assert (
        "size mismatch for single_blocks.1.linear2.weight: (256, 256) in the file, (256, 1280) in the model"
        in sentence(path)
    )


def test_a_truncated_file_says_how_much_is_missing(tiny_flux, tmp_path):
    path = tmp_path / "cut.gguf"
    data = tiny_flux("Q2_K").read_bytes()
    last = max(t.offset + t.n_bytes for t in GGUFFile(tiny_flux("Q2_K")).tensors.values())
    path.write_bytes(data[: last - 1000])
    assert "1000 bytes short" in sentence(path)


def test_a_text_encoder_that_is_not_there(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file"):
        nodes.CLIPLoaderGGUF().load_clip(clip_name="absent.gguf", type="sd3")


def test_the_loaded_tensors_are_views_of_one_mapping(tiny_flux):
    """No weight is copied: the distances of the bytes in memory are those in the file."""
    path = tiny_flux("Q4_K_S")
    file = GGUFFile(path)
    state, _ = load_diffusion_model(path)
    names = [n for n, t in file.tensors.items() if t.n_bytes]
    pointers = {n: (state[n].data if hasattr(state[n], "qtype") else state[n]).data_ptr() for n in names}
    base = pointers[names[0]] - file.tensors[names[0]].offset
    assert all(pointers[n] == base + file.tensors[n].offset for n in names)
