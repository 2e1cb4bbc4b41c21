# SPDX-License-Identifier: Apache-2.0
"""Three and four encoders at once: GGUF in several packagings beside safetensors, through the nodes."""

import dataclasses
import functools
import json
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import encoders
import pytest
import safetensors.torch
import torch
from gguf_kit import nodes
from gguf_kit.host.compat import quantized_modules
from gguf_kit.host.text_encoders import missing_parameters
from test_text_encoders import CPU, SMALL, Q, float_state, random_clip_l, write_t5

# The layers by which the host knows T5-XXL for HiDream.
T5 = SMALL | {"num_layers": 24, "d_model": 4096, "num_heads": 2, "d_ff": 256, "vocab_size": 32128}
# The layers by which the host knows CLIP-G, and nothing else of its size.
CLIP_G = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 32}
LLAMA = encoders.TINY | encoders.HEADS | {"num_hidden_layers": 32, "vocab_size": 128256}


def clip_g_config():
    """The host's configuration of CLIP-G, narrowed."""
    return json.loads(Path(comfy.sdxl_clip.__file__).with_name("clip_config_bigg.json").read_text()) | CLIP_G


def random_clip_g():
    """Weights of a narrow CLIP-G."""
    model = comfy.clip_model.CLIPTextModel(clip_g_config(), torch.float32, CPU, comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(value.shape, generator=generator) * 0.02 for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CLIP-L in safetensors, CLIP-G as stable-diffusion.cpp writes it, T5 and Llama as llama.cpp does."""
    path = tmp_path_factory.mktemp("encoders")
    safetensors.torch.save_file(random_clip_l(), path / "clip_l.safetensors")
    encoders.write_native(path / "clip_g.gguf", random_clip_g(), lambda key: f"text_encoders.clip_g.transformer.{key}")
    write_t5(path / "t5.gguf", T5, Q.Q4_0)
    encoders.write_encoder(dataclasses.replace(encoders.FAMILIES["llama 3"], config=LLAMA), path / "llama.gguf")
    return path


@pytest.fixture
def small_sizes(monkeypatch):
    """Let the host build the encoders in the sizes of the files."""
    load, init = comfy.sd.load_text_encoder_state_dicts, comfy.sd1_clip.SDClipModel.__init__
    sizes = {"t5xxl_model_config": T5, "llama_model_config": LLAMA}

    def init_small(self, *args, textmodel_json_config=None, **kwargs):
        is_clip_g = "bigg" in str(textmodel_json_config)  # the host sets the option for its sizes itself
        init(self, *args, textmodel_json_config=clip_g_config() if is_clip_g else textmodel_json_config, **kwargs)

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", init_small)

    @functools.wraps(load)
    def load_small(*args, model_options, **kwargs):
        return load(*args, model_options=model_options | sizes, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_small)
    return load_small


def floats(path):
    """The state dict of a file, dequantized."""
    return float_state(path) if path.suffix == ".gguf" else safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    ("node", "type_name", "names"),
    [
        (nodes.TripleCLIPLoaderGGUF, "SD3", ["clip_g.gguf", "clip_l.safetensors", "t5.gguf"]),
        (nodes.QuadrupleCLIPLoaderGGUF, "HIDREAM", ["clip_l.safetensors", "clip_g.gguf", "t5.gguf", "llama.gguf"]),
    ],
    ids=["triple", "quadruple"],
)
def test_any_mix_encodes_as_the_dequantized_encoders_do(folder, small_sizes, monkeypatch, node, type_name, names):
    for key in ("clip_gguf", "text_encoders"):
        paths, extensions = nodes.folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, key, ([*paths, str(folder)], extensions))
    (clip,) = node().load_clip(**{f"clip_name{i + 1}": name for i, name in enumerate(names)})
    dense = small_sizes(
        [floats(folder / name) for name in names],
        clip_type=comfy.sd.CLIPType[type_name],
        model_options={"dtype": torch.float32},
    )
    n_gguf = sum(name.endswith(".gguf") for name in names)
    missing = list(missing_parameters(clip.cond_stage_model, [floats(folder / name) for name in names]))
    assert sorted(one.index for one in missing) == list(range(len(names)))  # each encoder has its own file
    owners = {name.split(".")[0] for name, _ in quantized_modules(clip.cond_stage_model)}
    assert len(owners) == n_gguf
    with torch.inference_mode():
        actual, expected = (
            loaded.encode_from_tokens(loaded.tokenize("a 7"), return_dict=True) for loaded in (clip, dense)
        )
        assert actual.keys() == expected.keys()
        for key, value in actual.items():
            assert value is expected[key] is None or torch.equal(value, expected[key])
            assert value is None or value.isfinite().all()
