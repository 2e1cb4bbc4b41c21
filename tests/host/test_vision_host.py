# SPDX-License-Identifier: Apache-2.0
"""Vision parts of llama.cpp's files in the host: picture tokens as from the dequantized weights; text without them."""

import comfy.ops
import comfy.sd
import comfy.utils
import encoders
import gguf
import numpy as np
import pytest
import torch
import vision_files
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.host.compat import is_quantized, quantized_modules, wrap
from gguf_kit.models import text_encoders, tokenizers, vision, vision_search
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.models.vision_table import MODULES
from gguf_kit.ops import make_ops

TOWERS = vision_files.TOWERS
KNOWN = [name for name, tower in TOWERS.items() if tower.known()]
QWEN3VL = [name for name in KNOWN if name.startswith("qwen3-vl")]
PICTURE = torch.linspace(0, 100, 96 * 144 * 3).reshape(1, 96, 144, 3).sin().abs()


def to_host(state):
    """A state dict of ours in the host's representation."""
    return {k: wrap(v.data, v.qtype, v.shape) if isinstance(v, QuantizedBytes) else v for k, v in state.items()}


def missing_parameters(model):
    """Keys of the parameters that our layers did not get."""
    return sorted(f"{name}.{p}" for name, module in model.named_modules() for p in getattr(module, "missing", ()))


def test_the_vision_parts_that_the_running_host_knows_are_all_tested():
    newer = hasattr(comfy.sd.TEModel, "QWEN3VL_4B")
    assert KNOWN == (list(TOWERS) if newer else ["qwen2.5-vl 7b"])


def write_text_encoder(tower, path):
    """The header of a text encoder: what it takes to know its family and width."""
    family = tower.family
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    encoders.add_tokenizer(writer, family.tokenizer)
    keys = text_shapes(tower, host_keys=False)
    keys = [key.replace("dt_bias", "dt_proj.bias") for key in keys if not key.startswith(MODULES)]
    names = [encoders.gguf_name(family, key) for key in keys]
    for name in names:
        shape = (8, family.config["hidden_size"]) if name == "token_embd.weight" else (1,)
        writer.add_tensor(name, np.zeros(shape, np.float16))
    encoders.close(writer)
    return path


def build(tower, operations=comfy.ops.manual_cast):
    return tower.family.build(operations)


def text_shapes(tower, host_keys=True):
    shapes = {k: tuple(v.shape) for k, v in build(tower).state_dict().items() if not tower.is_vision(k)}
    return {text_key(tower, key): shape for key, shape in shapes.items()} if host_keys else shapes


def text_key(tower, key):
    """The key of a text encoder by which the host detects it."""
    return key.replace("model.", "model.language_model.", 1) if "qwen35" in tower.clip_name else key


def vision_key(tower, key):
    """The same for the vision part."""
    long = tower.family.detected in ("QWEN3VL_4B", "QWEN3VL_8B", "QWEN35_2B")
    return f"model.{key}" if long else key


def text_state(tower):
    """Random text weights, the same for both models; zeros without memory for the one with many layers."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in text_shapes(tower).items():
        many = tower.family.config["num_hidden_layers"] > 12
        value = torch.zeros(()).expand(shape) if many else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        state[key] = value
    return state


class Written:
    """One tower's files and weights."""

    def __init__(self, tower, folder):
        self.tower = tower
        self.encoder_file = GGUFFile(write_text_encoder(tower, folder / "encoder-Q4_K_M.gguf"))
        self.entry = text_encoders.detect(self.encoder_file.tensors, (self.encoder_file.arch,))
        self.path = folder / "mmproj-F16.gguf"
        self.weights = vision_files.write_mmproj(tower, build(tower), self.path)
        self.text = text_state(tower)
        if self.entry.tokenizer:
            self.text[tokenizers.KINDS[self.entry.tokenizer].key] = tokenizers.build(
                self.encoder_file, self.entry.tokenizer
            )

    def read(self):
        return vision.read(GGUFFile(self.path), self.encoder_file, self.entry)

    def dense(self, **options):
        state = self.text | {vision_key(self.tower, key): value for key, value in self.weights.items()}
        return self.load(state, dtype=torch.float32, **options)

    def quantized(self, part, **options):
        return self.load(self.text | to_host(part), custom_operations=make_ops(), **options)

    def load(self, state, **options):
        """(what encodes tokens, the encoder itself) as the host's service makes them of a state dict."""
        if "qwen35" in self.tower.clip_name:  # not every installation has what its tokenizer needs
            model = build(self.tower, options.get("custom_operations", comfy.ops.manual_cast))
            state = comfy.utils.state_dict_prefix_replace(
                state, {"model.language_model.": "model.", "model.visual.": "visual."}
            )
            assert model.load_state_dict(state, strict=False).unexpected_keys == []
            return None, model
        model = vision_files.load_with_host(state, self.tower, **options).cond_stage_model
        clip = getattr(model, model.clip) if hasattr(model, "clip") else model
        return clip, clip.transformer


@pytest.fixture(params=KNOWN)
def written(request, tmp_path, monkeypatch):
    TOWERS[request.param].shrink(monkeypatch)
    return Written(TOWERS[request.param], tmp_path)


def picture_tokens(model):
    with torch.inference_mode():
        tokens, extra = model.preprocess_embed({"type": "image", "data": PICTURE}, torch.device("cpu"))
    return [tokens, *(extra["deepstack"] if isinstance(extra, dict) else [])]


def test_picture_tokens_equal_those_of_the_dequantized_weights(written):
    tower = written.tower
    part = written.read()
    assert comfy.sd.detect_te_model(written.text | to_host(part)).name == tower.family.detected
    (_, dense), (_, quantized) = written.dense(), written.quantized(part)
    assert [key for key in missing_parameters(quantized) if not key.startswith("audio_")] == []
    shapes = dict(vision_files.vision_shapes(tower, dense))
    assert set(part) == {vision_key(tower, key) for key in shapes}
    found = dict(quantized.state_dict())
    for key, expected in written.weights.items():
        assert tuple(part[vision_key(tower, key)].shape) == shapes[key]
        assert torch.equal(dequantized(found[key]), expected), key
    expected, actual = picture_tokens(dense), picture_tokens(quantized)
    assert len(expected) == (4 if tower.clip_name.startswith("qwen3vl") else 1)
    for one, other in zip(expected, actual, strict=True):
        assert one.isfinite().all()
        assert one.abs().max() > 0
        assert torch.equal(other, one)


def dequantized(value):
    value = value.module.weight if hasattr(value, "module") else value
    return (value.dequantize() if is_quantized(value) else value).float()


@pytest.mark.parametrize("name", [name for name in KNOWN if name in ("qwen2.5-vl 7b", "qwen3-vl 4b", "gemma 3 4b")])
def test_a_prompt_with_a_picture_gives_the_hidden_states_of_the_dequantized_weights(name, tmp_path, monkeypatch):
    tower = TOWERS[name]
    tower.shrink(monkeypatch)
    written = Written(tower, tmp_path)
    clips = written.dense()[0], written.quantized(written.read())[0]
    picture = {"type": "image", "data": PICTURE, "original_type": "image"}
    pairs = [[(5, 1.0), (picture, 1.0), (17, 1.0), (3, 1.0)]]
    with torch.inference_mode():
        expected, actual = (clip.encode_token_weights([list(pair) for pair in pairs])[0] for clip in clips)
        without = clips[1].encode_token_weights([[(5, 1.0), (17, 1.0), (3, 1.0)]])[0]
    assert expected.isfinite().all()
    assert expected.shape[1] > without.shape[1] == 3
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("qwen")])
def test_weights_stay_quantized_where_their_types_allow_it(name, tmp_path, monkeypatch):
    tower = TOWERS[name]
    tower.shrink(monkeypatch)
    written = Written(tower, tmp_path)
    _, model = written.quantized(written.read())
    kept = {key for key, _ in quantized_modules(model)}
    assert "visual.blocks.0.attn.qkv" in kept
    assert "visual.blocks.1.attn.proj" not in kept  # F16 in the file


# -- Without a vision part. --

TYPES_OF = {
    "qwen3-vl 4b": ("krea2", "mage", "flux2", "lumina2"),
    "qwen3-vl 8b": ("ideogram4", "boogu", "joyimage", "flux2", "qwen_image"),
    "qwen3-vl 32b": ("minimax",),
}


@pytest.mark.parametrize(("name", "clip_type"), [(name, kind) for name in QWEN3VL for kind in TYPES_OF[name]])
def test_text_alone_is_what_the_whole_model_makes_of_it(name, clip_type, tmp_path, monkeypatch):
    """A stand-in makes the host choose the class that it chooses with the vision part, and costs no memory."""
    tower = TOWERS[name]
    # The stand-in has the shapes of the real towers, so these are built, without memory.
    with pytest.MonkeyPatch.context() as patch:
        tower.shrink(patch)
        written = Written(tower, tmp_path)
        whole, inner = written.quantized(written.read(), clip_type=clip_type)
    stand_in = vision.placeholder(written.encoder_file, written.entry)
    assert all(value.untyped_storage().nbytes() <= 2 for value in stand_in.values())
    assert comfy.sd.detect_te_model(written.text | stand_in).name == tower.family.detected
    text_only, inner_only = written.quantized(stand_in, clip_type=clip_type)
    for one, other in ((text_only, whole), (inner_only, inner)):
        assert type(one).__qualname__ == type(other).__qualname__
    missing = missing_parameters(inner_only)
    assert all(key.startswith(MODULES) for key in missing)
    if hasattr(inner_only, "visual"):
        assert missing
        layers = [m for m in inner_only.visual.modules() if hasattr(m, "missing") and m.missing == {"weight", "bias"}]
        linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
        assert linear
        assert all(m.weight.untyped_storage().nbytes() <= 4 for m in linear)
    if tower.family.config["num_hidden_layers"] <= 12:
        with torch.inference_mode():
            states = [model.model(torch.tensor([[5, 17, 3]]), dtype=torch.float32)[0] for model in (inner, inner_only)]
        assert torch.equal(*states)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in QWEN3VL])
def test_other_families_need_no_stand_in(name, tmp_path, monkeypatch):
    tower = TOWERS[name]
    tower.shrink(monkeypatch)
    written = Written(tower, tmp_path)
    assert vision.placeholder(written.encoder_file, written.entry) == {}
    _, model = written.quantized({})
    assert all(key.startswith(MODULES) for key in missing_parameters(model))


def test_the_part_in_the_folder_is_found(written):
    found = vision_search.find(written.encoder_file, written.entry)
    assert found.path == str(written.path)
