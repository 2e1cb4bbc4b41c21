# SPDX-License-Identifier: Apache-2.0
"""Text encoders that the host quantized (scaled fp8 and its successors) beside GGUF: each computes with its own ops."""

import dataclasses
import functools
import json

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from gguf_kit import nodes
from gguf_kit.host.compat import is_quantized, quantized_modules
from gguf_kit.host.native import prepare_state
from gguf_kit.host.patcher import adopt
from gguf_kit.loader import load_text_encoder
from gguf_kit.ops import make_ops
from test_text_encoders import SMALL, Q, float_state, host_model, random_clip_l, to_host, write_t5

NEW_HOST = hasattr(comfy.utils, "convert_old_quants")  # knows `comfy_quant` keys, and turns the older ones into them
FP8 = torch.float8_e4m3fn
# The layers and the width by which the host knows T5-XXL, and nothing else of its size.
T5 = SMALL | {"num_layers": 24, "d_model": 4096, "num_heads": 2, "d_ff": 256, "vocab_size": 4096}
SMALL_T5 = {"t5xxl_model_config": T5}
CLIP_L = comfy.sd.CLIPType.STABLE_DIFFUSION
STYLES = ("old", "new", "described")


@dataclasses.dataclass(frozen=True)
class File:
    """A safetensors file as its state dict and metadata."""

    state: dict
    metadata: dict

    def read(self):
        """Fresh copies, as from the disk."""
        return dict(self.state), dict(self.metadata)

    def save(self, path):
        safetensors.torch.save_file({k: v.contiguous() for k, v in self.state.items()}, path, self.metadata or None)
        return path


def scaled(weights, style, form="float8_e4m3fn"):
    """The file of an encoder whose Linears are fp8 with a scale, in one of the ways such files are written."""
    state, layers = {}, {}
    for key, value in weights.items():
        layer, _, last = key.rpartition(".")
        if value.dim() != 2 or last != "weight" or "embed" in key or "shared" in key or "relative" in key:
            state[key] = value
            continue
        scale = value.abs().max() / 448
        state[key] = (value / scale).to(FP8)
        state[f"{layer}.{'scale_weight' if style == 'old' else 'weight_scale'}"] = scale.float()
        layers[layer] = {"format": form}
    if style == "old":
        return File(state | {"scaled_fp8": torch.zeros(0, dtype=FP8)}, {})
    if style == "described":
        return File(state, {"_quantization_metadata": json.dumps({"layers": layers})})
    quant = {
        f"{k}.comfy_quant": torch.tensor(list(json.dumps(v).encode()), dtype=torch.uint8) for k, v in layers.items()
    }
    return File(state | quant, {})


def as_the_host(file, clip_type, prefix="", others=()):
    """The file loaded by the host alone, with the options that it would derive from a file of full size."""
    state, metadata = file.read()
    options = {"dtype": torch.float32, **SMALL_T5}
    if NEW_HOST:
        state, _ = comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)
        options[f"{prefix}quantization_metadata"] = {"mixed_ops": True}
    elif "scaled_fp8" in state:
        options[f"{prefix}scaled_fp8"] = FP8
    else:
        keys = [key for key in state if key.endswith(".comfy_quant")]
        layers = {key.removesuffix(".comfy_quant"): json.loads(state.pop(key).numpy().tobytes()) for key in keys}
        options["quantization_metadata"] = metadata.get("_quantization_metadata") or json.dumps({"layers": layers})
    load = comfy.sd.load_text_encoder_state_dicts
    return load([*others, state], clip_type=clip_type, model_options=options)


def mixed(*states, clip_type=comfy.sd.CLIPType.FLUX):
    """What the nodes do with state dicts of all kinds."""

    def load(disable_dynamic=False):
        return comfy.sd.load_text_encoder_state_dicts(
            [dict(state) for state in states],
            clip_type=clip_type,
            model_options={"custom_operations": make_ops(), **SMALL_T5},
        )

    clip = load()
    adopt(clip.patcher, (lambda disable_dynamic=False: mixed(*states, clip_type=clip_type).patcher, ()))
    return clip


@pytest.fixture(scope="module")
def gguf_t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5") / "t5-Q4_0.gguf", T5, Q.Q4_0)


@pytest.fixture(scope="module")
def t5_weights():
    generator = torch.Generator().manual_seed(3)
    shapes = {key: value.shape for key, value in host_model(T5).state_dict().items()}
    return {key: torch.randn(shape, generator=generator) * 0.03 for key, shape in shapes.items()}


@functools.cache
def clip_l_weights():
    return random_clip_l()


def run(encoder):
    """Hidden states of an encoder of a CLIP for fixed tokens."""
    with torch.inference_mode():
        return encoder([[5, 70, 3000, 9, *[1] * 73]])[0]


@pytest.fixture(scope="module", params=STYLES)
def beside_t5(request, gguf_t5):
    """(style, the file of a scaled CLIP-L, the CLIP of both, the host's CLIP of the file alone)."""
    file = scaled(clip_l_weights(), request.param)
    clip = mixed(prepare_state(*file.read()), to_host(load_text_encoder(gguf_t5)[0]))
    return request.param, file, clip, as_the_host(file, CLIP_L)


def test_a_scaled_clip_l_beside_a_gguf_t5(beside_t5, gguf_t5):
    _, _, clip, host = beside_t5
    hidden = run(clip.cond_stage_model.clip_l)
    assert torch.equal(hidden, run(host.cond_stage_model.clip_l))
    plain = run(as_the_host(File(clip_l_weights(), {}), CLIP_L).cond_stage_model.clip_l)
    assert torch.nn.functional.cosine_similarity(hidden, plain, dim=-1).min() > 0.9  # the scales are really used
    dense = host_model(T5)
    dense.load_state_dict(float_state(gguf_t5))
    tokens = torch.tensor([[5, 70, 3000, 9]])
    with torch.inference_mode():
        assert torch.equal(clip.cond_stage_model.t5xxl.transformer(tokens, None)[0], dense(tokens, None)[0])
    assert len(list(quantized_modules(clip.cond_stage_model))) == 1 + 24 * 6


@pytest.mark.parametrize("style", STYLES)
def test_a_scaled_t5_beside_a_gguf_clip_l(style, t5_weights, tmp_path):
    import encoders

    path = encoders.write_native(tmp_path / "clip_l.gguf", clip_l_weights())
    file = scaled(t5_weights, style)
    clip = mixed(to_host(load_text_encoder(path)[0]), prepare_state(*file.read()))
    clip_l = float_state(path)
    host = as_the_host(file, comfy.sd.CLIPType.FLUX, "t5xxl_", [clip_l])
    assert torch.equal(run(clip.cond_stage_model.t5xxl), run(host.cond_stage_model.t5xxl))
    if style == "old" or NEW_HOST:
        assert torch.equal(run(clip.cond_stage_model.clip_l), run(host.cond_stage_model.clip_l))
    assert is_quantized(clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight)


def test_a_scaled_layer_weighs_what_it_weighs_in_the_host(beside_t5):
    _, _, clip, host = beside_t5
    weigh = comfy.model_management.module_size
    assert weigh(clip.cond_stage_model.clip_l) == weigh(host.cond_stage_model.clip_l)
    assert weigh(clip.cond_stage_model.clip_l.transformer.text_model.encoder) < 90e6  # 85 million weights


def test_a_lora_on_scaled_layers_and_on_gguf_layers(beside_t5):
    _, _, clip, host = beside_t5
    key = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    t5_key = "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight"
    generator = torch.Generator().manual_seed(0)
    patches = {key: ("diff", (torch.randn(3072, 768, generator=generator) * 0.01,))}
    outputs = []
    for loaded, more in ((clip, {t5_key: ("diff", (torch.ones(4096, 256),))}), (host, {})):
        patched = loaded.clone()
        assert set(patched.add_patches(patches | more, 0.5)) == {*patches, *more}
        before = run(loaded.cond_stage_model.clip_l)
        patched.load_model()
        outputs.append(run(patched.cond_stage_model.clip_l))
        assert not torch.equal(outputs[-1], before)
        loaded.load_model()
        assert torch.equal(run(loaded.cond_stage_model.clip_l), before)
    assert torch.equal(*outputs)


def test_saving_and_loading_again(beside_t5, tmp_path):
    """As the node CLIPSave does: each encoder under its own names."""
    style, _, clip, _ = beside_t5
    clip.load_model()
    state = getattr(clip, "state_dict_for_saving", clip.get_sd)()
    prefix = "clip_l.transformer."
    saved = {k.removeprefix(prefix): v.to("cpu") for k, v in state.items() if k.startswith(prefix)}
    assert saved["text_model.encoder.layers.3.mlp.fc1.weight"].dtype == FP8
    if style == "old" or NEW_HOST:
        safetensors.torch.save_file(saved, tmp_path / "saved.safetensors")
        again = as_the_host(File(comfy.utils.load_torch_file(str(tmp_path / "saved.safetensors")), {}), CLIP_L)
        assert torch.equal(run(again.cond_stage_model.clip_l), run(clip.cond_stage_model.clip_l))


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this host has no dynamic VRAM")
def test_under_dynamic_vram_with_a_lora(beside_t5, gguf_t5, monkeypatch):
    """The host streams its own quantized layers and ours alike."""
    import fake_vram

    _, file, _, host = beside_t5
    key = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    patch = {key: ("diff", (torch.full((3072, 768), 0.01),))}
    before = run(host.cond_stage_model.clip_l)
    fc1 = host.cond_stage_model.clip_l.transformer.text_model.encoder.layers[3].mlp.fc1
    with pytest.MonkeyPatch.context() as changed:
        merged = torch.nn.Parameter(fc1.weight.dequantize() + 0.005, requires_grad=False)
        changed.setitem(fc1._parameters, "weight", merged)
        expected = run(host.cond_stage_model.clip_l)
    fake_vram.install(monkeypatch).resident = False
    devices = {"load_device": fake_vram.GPU, "offload_device": torch.device("cpu")}
    clip = comfy.sd.load_text_encoder_state_dicts(
        [prepare_state(*file.read()), to_host(load_text_encoder(gguf_t5)[0])],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options={"custom_operations": make_ops(), **SMALL_T5, **devices},
    )
    adopt(clip.patcher, (None, ()))
    assert clip.patcher.is_dynamic()
    clip.patcher.partially_load(clip.patcher.load_device)
    assert torch.equal(run(clip.cond_stage_model.clip_l), before)
    patched = clip.clone()
    patched.add_patches(patch, 0.5)
    patched.patcher.partially_load(clip.patcher.load_device)
    after = run(patched.cond_stage_model.clip_l)
    assert torch.dist(after, expected) < 1e-3 * torch.dist(before, expected)


def test_clones_and_second_copies(beside_t5):
    _, _, clip, _ = beside_t5
    expected = run(clip.cond_stage_model.clip_l)
    assert torch.equal(run(clip.clone().cond_stage_model.clip_l), expected)
    factory, arguments = clip.patcher.cached_patcher_init
    copy = factory(*arguments, disable_dynamic=True)
    assert copy.model is not clip.patcher.model
    assert torch.equal(run(copy.model.clip_l), expected)


def test_a_format_that_this_host_does_not_know_is_an_error(gguf_t5):
    file = scaled(clip_l_weights(), "new", form="int3_of_tomorrow")
    with pytest.raises(RuntimeError, match=r"the int3_of_tomorrow weight of text_model\.encoder\.layers\.0.*no kind"):
        mixed(prepare_state(*file.read()), to_host(load_text_encoder(gguf_t5)[0]))


def test_a_scale_without_a_format_is_an_error(gguf_t5):
    file = scaled(clip_l_weights(), "described")
    with pytest.raises(RuntimeError, match=r"the weight of text_model.*\(weight_scale\) is of no kind"):
        mixed(file.read()[0], to_host(load_text_encoder(gguf_t5)[0]))


@pytest.mark.skipif(not NEW_HOST, reason="this ComfyUI has no quantized embeddings")
def test_a_quantized_embedding_keeps_what_the_host_derived_from_it():
    """Gemma's table is a class of the host's over our Embedding, which scales what it looks up."""
    from comfy.text_encoders.llama import _make_scaled_embedding

    values = torch.randn(96, 64)
    scale = values.abs().max() / 448
    quant = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state = {"weight": (values / scale).to(FP8), "weight_scale": scale, "comfy_quant": quant}
    native = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    ours, theirs, plain = (
        _make_scaled_embedding(ops, 96, 64, 8.0, torch.device("cpu"), torch.float32)
        for ops in (make_ops(), native, make_ops())
    )
    for table in (ours, theirs):
        table.load_state_dict(dict(state))
    plain.load_state_dict({"weight": values})
    index = torch.arange(96)
    assert torch.equal(ours(index, out_dtype=torch.float32), theirs(index, out_dtype=torch.float32))
    assert torch.equal(plain(index, out_dtype=torch.float32), values * 8.0)
    assert ours.weight._qdata.dtype == FP8
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_the_node_takes_the_mix(beside_t5, gguf_t5, tmp_path, monkeypatch):
    _, file, _, host = beside_t5
    load = comfy.sd.load_text_encoder_state_dicts

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | SMALL_T5, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)
    folders = nodes.folder_paths.folder_names_and_paths
    for key, folder in (("clip_gguf", gguf_t5.parent), ("text_encoders", tmp_path)):
        monkeypatch.setitem(folders, key, ([*folders[key][0], str(folder)], folders[key][1]))
    path = file.save(tmp_path / "clip_l_scaled.safetensors")
    (clip,) = nodes.DualCLIPLoaderGGUF().load_clip(clip_name1=path.name, clip_name2=gguf_t5.name, type="flux")
    assert torch.equal(run(clip.cond_stage_model.clip_l), run(host.cond_stage_model.clip_l))
