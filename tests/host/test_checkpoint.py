# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints: MODEL, CLIP and VAE of one file compute what the host computes from the dequantized weights."""

import logging
import os
import re

import checkpoint_files
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import encoders
import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import KINDS, as_it_was, decode, encode, host_checkpoint, sdcpp_2024, sdcpp_converted, write
from gguf_kit import nodes_checkpoint
from gguf_kit.errors import GGUFError
from gguf_kit.host.compat import is_quantized, quantized_modules
from gguf_kit.host.patcher import GGUFPatcher
from gguf_kit.host.text_encoders import AbsentPart
from gguf_kit.nodes_checkpoint import CheckpointLoaderGGUF
from small_model_table import SMALL_MODELS
from small_models import build_shapes, forward, make_file, narrow_detection


@pytest.fixture(autouse=True)
def small(monkeypatch):
    checkpoint_files.shrink(monkeypatch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the loader searches."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, nodes_checkpoint.FOLDER, ([str(tmp_path)], {".gguf"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load(path):
    return CheckpointLoaderGGUF().load_checkpoint(path.name)


def assert_same(found, expected, kind):
    model, clip, vae = found
    pictures = [forward(patcher, kind.small) for patcher in (model, expected[0])]
    texts = [encode(c, kind) for c in (clip, expected[1])]
    decoded = [decode(v, kind) for v in (vae, expected[2])]
    assert torch.equal(*pictures)
    assert len(texts[0]) == len(texts[1])
    assert all(torch.equal(*pair) for pair in zip(*texts, strict=True))
    assert torch.equal(*decoded)
    assert all(value.isfinite().all() for value in (pictures[0], *texts[0], decoded[0]))
    assert all(value.abs().max() > 0 for value in (pictures[0], *texts[0], decoded[0]))


CASES = [(name, as_it_was) for name in KINDS]
CASES += [(name, layout) for name in ("sd2", "sdxl") for layout in (sdcpp_2024, sdcpp_converted)]
CASES += [(name, sdcpp_2024) for name in ("sd1", "sd3", "flux")]


def rewrite(path, change, extra=()):
    """A copy with more tensors; `change` gives each (name, data) another name and data, or None to leave it out."""
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "none")
    stored = [(tensor.name, np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors]
    for name, data, qtype in [*stored, *((name, data, None) for name, data in extra)]:
        changed = change(name, data)
        if changed is not None:
            writer.add_tensor(changed[0], np.ascontiguousarray(changed[1]), raw_dtype=qtype)
    encoders.close(writer)
    return path.with_name("changed.gguf")


@pytest.fixture(scope="module")
def cache():
    """(kind, layout, whether the VAE is quantized) -> (path, weights): the largest have 30 million weights."""
    yield {}
    checkpoint_files.original.cache_clear()


@pytest.fixture
def made(folder, monkeypatch, cache, tmp_path_factory):
    """Writes a checkpoint of a kind: (path, kind, weights)."""

    def make(name, layout=as_it_was, without=(), rename=None, quantize_vae=False):
        kind, key = KINDS[name], (name, layout, quantize_vae)
        narrow_detection(monkeypatch, kind.small)
        if key not in cache:
            path = tmp_path_factory.mktemp("made") / "all.gguf"
            cache[key] = path, write(path, checkpoint_files.original(name), layout, quantize_vae)
        path, weights = folder / "all.gguf", cache[key][1]
        os.link(cache[key][0], path)
        lacks = tuple(without)
        if lacks or rename:
            change = rename or (lambda key: key)
            path = rewrite(path, lambda key, data: None if key.startswith(lacks) else (change(key), data))
        return path, kind, {key: value for key, value in weights.items() if not key.startswith(lacks)}

    return make


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_checkpoint_equals_its_dequantized_weights(name, layout, made):
    path, kind, weights = made(name, layout)
    found = load(path)
    assert type(found[0].model.model_config).__name__ == kind.small.host_class
    assert_same(found, host_checkpoint(weights), kind)
    for name in kind.encoders:
        n_layers = sum(1 for _ in quantized_modules(getattr(found[1].cond_stage_model, name)))
        assert n_layers > 10
    assert any(True for _ in quantized_modules(found[0].model))


def test_names_of_the_diffusion_model_that_were_cut(made):
    path, kind, weights = made("flux", rename=lambda name: name[:63] if name.startswith("model.diff") else name)
    assert_same(load(path), host_checkpoint(weights), kind)


def test_the_vae_is_dequantized_and_the_log_says_so(made, caplog):
    path, kind, weights = made("sd1", quantize_vae=True)
    with caplog.at_level(logging.INFO, "gguf_kit"):
        found = load(path)
    said = [record.message for record in caplog.records if "VAE" in record.message]
    assert len(said) == 1
    assert re.fullmatch(
        r"all\.gguf: ComfyUI takes no quantized VAE, so its \d+ weights were dequantized as read", said[0]
    )
    assert not any(is_quantized(value) for value in found[2].first_stage_model.parameters())
    assert_same(found, host_checkpoint(weights), kind)


def test_a_vae_that_needs_no_dequantizing_is_not_mentioned(made, caplog):
    path, _, _ = made("flux")
    with caplog.at_level(logging.INFO, "gguf_kit"):
        load(path)
    assert not [record for record in caplog.records if "VAE" in record.message]


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_a_vae_that_was_put_beside_a_checkpoint_replaces_its_own(made, name):
    path, kind, weights = made(name, rename=lambda key: re.sub(r"^vae\.", "first_stage_model.", key))
    beside = {key: np.float16(-value) for key, value in weights.items() if key.startswith(kind.vae)}
    extra = [(key.replace(kind.vae, "vae."), np.atleast_1d(value)) for key, value in beside.items()]
    path = rewrite(path, lambda *tensor: tensor, extra)
    replaced = weights | {key: torch.from_numpy(np.asarray(value)).float() for key, value in beside.items()}
    assert_same(load(path), host_checkpoint(replaced), kind)


def test_a_diffusion_model_without_prefix_beside_other_parts(made):
    path, kind, weights = made("flux", rename=lambda name: name.removeprefix("model.diffusion_model."))
    assert_same(load(path), host_checkpoint(weights), kind)


@pytest.mark.parametrize("last", ["weight", "scale"])
def test_norms_of_flux_by_either_name(made, last):
    path, kind, weights = made("flux", rename=lambda name: re.sub(r"(query|key)_norm\.\w+$", rf"\1_norm.{last}", name))
    assert_same(load(path), host_checkpoint(weights), kind)


def test_a_t5_in_the_names_of_llama_cpp(made):
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    head = "text_encoders.t5xxl.transformer."

    def rename(name):
        rest = name.removeprefix(head)
        return head + table.get_name(rest, try_suffixes=(".weight",)) if name.startswith(head) else name

    path, kind, weights = made("flux", rename=rename)
    assert any(".enc.blk." in tensor.name for tensor in gguf.GGUFReader(path).tensors)
    assert_same(load(path), host_checkpoint(weights), kind)


def test_what_published_checkpoints_hold_beside_the_weights(made):
    path, kind, weights = made("sd1")
    averages = [key.replace("model.", "model_ema.", 1) for key in weights if key.startswith("model.diffusion_model.")]
    extra = {name: np.zeros(1, np.float32) for name in (*averages, "alphas_cumprod")}
    extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int32)
    extra["cond_stage_model.logit_scale"] = np.array([4.6], np.float32)
    extra["model_ema.num_updates"] = np.array([1], np.int64)
    path = rewrite(path, lambda *tensor: tensor, extra.items())
    assert_same(load(path), host_checkpoint(weights), kind)


def test_marks_of_how_a_model_predicts_reach_the_host(made):
    path, _, _ = made("sdxl")
    marked = rewrite(path, lambda *tensor: tensor, [("v_pred", np.zeros(1, np.float32))])
    v_prediction = comfy.model_base.ModelType.V_PREDICTION
    assert load(marked)[0].model.model_type is v_prediction
    assert load(path)[0].model.model_type is not v_prediction


def test_a_model_that_needs_nothing_else_has_clip_and_vae_of_the_host(folder, monkeypatch):
    small = SMALL_MODELS["hidream o1"]
    if not small.known:
        pytest.skip(f"this ComfyUI has no {small.host_class}")
    narrow_detection(monkeypatch, small)
    make_file(small, folder / "all.gguf")
    model, clip, vae = load(folder / "all.gguf")
    assert type(model.model).__name__ == "HiDreamO1"
    assert clip.tokenize("a cat")
    assert torch.equal(vae.decode(torch.zeros(1, 3, 8, 8)), torch.full((1, 8, 8, 3), 0.5))


# -- parts that are not there --


def test_without_text_encoders_the_model_loads_and_clip_is_empty(made):
    path, kind, weights = made("sd1", without=["cond_stage_model."])
    model, clip, vae = load(path)
    assert clip is None
    expected = host_checkpoint(weights)
    assert torch.equal(forward(model, kind.small), forward(expected[0], kind.small))
    assert torch.equal(decode(vae, kind), decode(expected[2], kind))


def test_without_vae_the_host_says_so_where_it_is_used(made):
    path, kind, weights = made("sdxl", without=["first_stage_model."])
    model, clip, vae = load(path)
    expected = host_checkpoint(weights)
    assert torch.equal(forward(model, kind.small), forward(expected[0], kind.small))
    assert torch.equal(encode(clip, kind)[0], encode(expected[1], kind)[0])
    with pytest.raises(RuntimeError, match="your checkpoint does not contain a valid VAE"):
        vae.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("name", "prefix", "absent"),
    [("flux", "text_encoders.t5xxl.", "t5xxl"), ("sdxl", "conditioner.embedders.1.", "clip_g")],
    ids=["flux without t5", "sdxl without clip g"],
)
def test_one_encoder_of_two_leaves_clip_empty_with_a_warning(made, caplog, name, prefix, absent):
    path, kind, _ = made(name, without=[prefix])
    model, clip, vae = load(path)
    assert clip is None
    warnings = [
        record.message for record in caplog.records if record.name == "gguf_kit" and record.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"changed.gguf: this checkpoint lacks text encoders that its model needs ({absent})")
    assert forward(model, kind.small).isfinite().all()
    assert decode(vae, kind).isfinite().all()


@pytest.fixture
def text_only(folder, monkeypatch):
    """A checkpoint of Qwen-Image whose text encoder has no part for pictures."""
    small, family = SMALL_MODELS["qwen image"], encoders.FAMILIES["qwen2.5-vl 7b"]
    narrow_detection(monkeypatch, small)
    monkeypatch.setitem(checkpoint_files.CONFIGS, "qwen25_7b", dict(family.config))
    checkpoint_files.shrink(monkeypatch)
    with monkeypatch.context() as patched:
        encoders.without_other_parts(patched)
        text = {key: tuple(value.shape) for key, value in family.build().state_dict().items()}
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in build_shapes(small)[0].items()}
    shapes |= {f"text_encoders.qwen25_7b.transformer.{key}": shape for key, shape in text.items()}
    write(folder / "all.gguf", {key: np.ones(shape, np.float32) for key, shape in shapes.items()})
    return folder / "all.gguf"


def test_a_text_encoder_without_its_part_for_pictures_reads_text(text_only, caplog):
    _, clip, _ = load(text_only)
    assert isinstance(clip.cond_stage_model.qwen25_7b.transformer.visual, AbsentPart)
    warnings = [message for name, _, message in caplog.record_tuples if name == "gguf_kit" and "pictures" in message]
    assert len(warnings) == 1
    assert warnings[0].startswith("all.gguf: the text encoder qwen25_7b of this checkpoint lacks its part for pictures")


def test_float32_norms_do_not_decide_the_type_of_a_text_encoder(text_only, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.bfloat16)
    assert load(text_only)[1].cond_stage_model.dtypes == {torch.bfloat16}


MISSING = [
    ("sd1", "model.diffusion_model.input_blocks.0.0.bias", r"diffusion_model\.input_blocks"),
    ("sd1", "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.weight", r"diffusion_model\.middle_block"),
    ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", r"text_model\.encoder"),
    ("sd1", "cond_stage_model.transformer.text_model.final_layer_norm.weight", r"text_model\.final_layer_norm"),
    ("sdxl", "conditioner.embedders.1.model.text_projection", r"clip_g\.transformer\.text_projection\.weight"),
    ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_bias", r"text_model\.encoder"),
    ("flux", "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight", r"encoder\.final_layer_norm"),
    ("sd1", "first_stage_model.decoder.conv_out.bias", r"decoder\.conv_out\.bias"),
]


@pytest.mark.parametrize(("name", "key", "said"), MISSING)
def test_a_missing_tensor_of_any_part_is_an_error(made, name, key, said):
    path, _, _ = made(name, without=[key])
    with pytest.raises(GGUFError, match=rf"^changed\.gguf: \d tensors that ComfyUI needs are missing: .*{said}"):
        load(path)


def test_a_fused_attention_of_odd_rows_is_named(made):
    path, _, _ = made("sdxl")
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    path = rewrite(path, lambda name, data: (name, data[:-1] if name == fused else data))
    with pytest.raises(GGUFError, match=rf"^changed\.gguf: tensor '{re.escape(fused)}' has 383 rows, expected as many"):
        load(path)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (
            ["first_stage_model.", "cond_stage_model."],
            'diffusion model .* alone, no whole checkpoint. Load it with "Unet',
        ),
        (["model.", "first_stage_model."], r'is a text encoder.*, no whole checkpoint\. Use "CLIPLoader \(GGUF\)"'),
        (["model.", "cond_stage_model."], r'is a VAE.*, no whole checkpoint\. Use "Load VAE \(GGUF\)"'),
    ],
    ids=["model", "encoder", "vae"],
)
def test_a_part_alone_is_for_another_node(made, without, said):
    path, _, _ = made("sd1", without=without)
    with pytest.raises(GGUFError, match=rf"^changed\.gguf: it .*{said}"):
        load(path)


def test_a_model_that_the_host_does_not_know(made):
    path, _, _ = made("sd1", rename=lambda name: name.replace("model.diffusion_model.", "model.diffusion_model.new."))
    with pytest.raises(GGUFError, match=r"^changed\.gguf: ComfyUI [\d.]+ does not recognise this model"):
        load(path)


def test_out_of_memory_is_left_to_the_host(made, monkeypatch):
    def refuse(*args, **kwargs):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    path, _, _ = made("sd1")
    monkeypatch.setattr(comfy.sd, "load_state_dict_guess_config", refuse)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        load(path)


# -- in the host --


def test_model_and_clip_are_adopted_and_each_part_can_be_loaded_again(made):
    path, kind, _ = made("sdxl")
    model, clip, vae = load(path)
    assert type(model) is type(clip.patcher) is GGUFPatcher
    again = []
    for patcher in (model, clip.patcher, vae.patcher):
        function, arguments = patcher.cached_patcher_init
        again.append(function(*arguments, disable_dynamic=True))
    assert torch.equal(forward(again[0], kind.small), forward(model, kind.small))
    copies = [dict(patcher.model.named_parameters()) for patcher in (again[1], clip.patcher)]
    assert copies[0].keys() == copies[1].keys()
    vaes = [patcher.model.state_dict() for patcher in (again[2], vae.patcher)]
    assert vaes[0].keys() == vaes[1].keys()
    assert all(torch.equal(vaes[0][key], vaes[1][key]) for key in vaes[0])


def test_text_encoders_keep_the_floats_of_the_file_in_a_narrower_model(made, monkeypatch):
    """As with encoders in files of their own: the host's type, but for vectors in the precision that the file has."""
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda device=None: torch.bfloat16)
    path, _, weights = made("flux")
    clip = load(path)[1]
    assert clip.cond_stage_model.dtypes == {torch.bfloat16}
    for name, key in (("clip_l", "text_model.final_layer_norm.weight"), ("t5xxl", "encoder.final_layer_norm.weight")):
        param = dict(getattr(clip.cond_stage_model, name).transformer.named_parameters())[key]
        assert torch.equal(param, weights[f"text_encoders.{name}.transformer.{key}"])


def test_the_node_loads_in_inference_mode(made, inference_mode):
    path, kind, weights = made("sd1")
    assert_same(load(path), host_checkpoint(weights), kind)


def test_a_replaced_file_counts_as_changed(made):
    path, _, _ = made("flux")
    before = CheckpointLoaderGGUF.IS_CHANGED(ckpt_name="all.gguf")
    assert before
    assert CheckpointLoaderGGUF.IS_CHANGED(ckpt_name=None) == ""
    content = path.read_bytes() + bytes(32)
    path.unlink()
    path.write_bytes(content)
    assert CheckpointLoaderGGUF.IS_CHANGED(ckpt_name="all.gguf") not in ("", before)
    path.unlink()
    assert CheckpointLoaderGGUF.IS_CHANGED(ckpt_name="all.gguf") == ""


def test_the_file_is_listed(made):
    made("sd1")
    assert CheckpointLoaderGGUF.INPUT_TYPES()["required"]["ckpt_name"][0] == ["all.gguf"]


# -- dynamic VRAM --

DYNAMIC = pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM"
)


@DYNAMIC
def test_all_parts_compute_the_same_under_dynamic_vram(made, monkeypatch):
    path, kind, weights = made("sd1", quantize_vae=True)
    expected = host_checkpoint(weights)
    picture, text, decoded = forward(expected[0], kind.small), encode(expected[1], kind)[0], decode(expected[2], kind)
    import fake_vram

    fake_vram.install(monkeypatch)
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: fake_vram.GPU)
    monkeypatch.setattr(comfy.model_management, "text_encoder_offload_device", lambda: torch.device("cpu"))
    model, clip, vae = load(path)
    for patcher in (model, clip.patcher, vae.patcher):
        assert type(patcher).__name__ == "ModelPatcherDynamic"
        patcher.partially_load(patcher.load_device)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **options: None)
    assert torch.equal(forward(model, kind.small), picture)
    assert torch.equal(encode(clip, kind)[0], text)
    assert torch.equal(decode(vae, kind), decoded)
    assert not any(is_quantized(value) for value in vae.first_stage_model.parameters())
    assert all(patcher.cached_patcher_init[1] == (str(path),) for patcher in (model, clip.patcher, vae.patcher))
