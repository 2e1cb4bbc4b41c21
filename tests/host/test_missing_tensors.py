# SPDX-License-Identifier: Apache-2.0
"""A file without one of its tensors, whichever it is, is refused in words or means the model without it."""

import re

import gguf
import pytest
import torch
from gguf_kit.errors import UnsupportedArch
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model
from odd_files import NORM, rewrite, small_model
from small_models import forward, host_model, make_file

BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
# Keys by which hosts know the model or count its parts: without them they say so, not the pack.
DETECTED = {
    "flux dev": {"img_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.key_norm"},
    "wan i2v": {"patch_embedding.weight", "blocks.0.ffn.0.weight", "head.modulation", "head.head.weight"},
    "wan s2v": {
        "patch_embedding.weight", "blocks.0.ffn.0.weight", "head.modulation", "head.head.weight",
        "casual_audio_encoder.encoder.final_linear.weight",
    },
    "sd3": {"x_embedder.proj.weight", "joint_blocks.0.context_block.attn.qkv.weight"},
    "aura": {"positional_encoding", "cond_seq_linear.weight", "double_layers.0.attn.w1q.weight"},
    "hunyuan video": {
        "img_in.proj.weight", "txt_in.input_embedder.weight", "final_layer.linear.weight",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    },
}  # fmt: skip
# Keys without which hosts build a model that has no use for them.
OPTIONAL = {
    "flux dev": {"vector_in.in_layer.weight", "guidance_in.in_layer.weight"},
    "wan i2v": {"img_emb.proj.0.bias"},
    "sd3": {"pos_embed", "y_embedder.mlp.0.weight", "context_embedder.weight"},
}


@pytest.mark.parametrize("name", DETECTED)
def test_each_tensor_that_is_missing(name, tmp_path, monkeypatch):
    """One of every kind, whether a layer's or a parameter of the model's own."""
    small, plain = small_model(name, tmp_path, monkeypatch)
    weights = make_file(small, plain)
    kinds = {BLOCK.sub("N", key): key for key in reversed(weights)}
    assert len(kinds) > 25
    for key in kinds.values():
        norm = NORM.fullmatch(key)
        base = norm[1] if norm else key
        path = rewrite(plain, tmp_path / "odd.gguf", lambda n, data, key=key: None if n == key else (n, data))
        try:
            patcher = load_model(path, OpsOptions())
        except UnsupportedArch as error:
            named = f"1 tensors that ComfyUI needs are missing: diffusion_model.{base}"
            assert named in str(error) or base in DETECTED[name]  # noqa: PT017 (some hosts load it)
            continue
        assert key in OPTIONAL.get(name, ())
        result = forward(patcher, small)
        assert result.isfinite().all()
        assert torch.equal(result, forward(host_model({k: w for k, w in weights.items() if k != key}), small))


BARE = [
    ("flux dev", "double_blocks.0.img_attn.norm.query_norm.scale"),
    ("wan t2v", "blocks.0.modulation"),
    ("wan vace", "vace_blocks.0.modulation"),
    ("z-image", "x_pad_token"),
    ("aura", "register_tokens"),
]


@pytest.mark.parametrize(("name", "key"), BARE)
def test_a_missing_parameter_is_no_quiet_nan(name, key, tmp_path, monkeypatch):
    _, plain = small_model(name, tmp_path, monkeypatch)
    base = key.rpartition(".")[0] if NORM.fullmatch(key) else key
    path = rewrite(plain, tmp_path / "odd.gguf", lambda n, data: None if n.startswith(base) else (n, data))
    assert len(gguf.GGUFReader(path).tensors) == len(gguf.GGUFReader(plain).tensors) - 1
    with pytest.raises(UnsupportedArch, match=rf"1 tensors that ComfyUI needs are missing: diffusion_model\.{base}"):
        load_model(path, OpsOptions())


def test_a_parameter_that_no_host_uses_may_be_missing(tmp_path, monkeypatch):
    """Older hosts give Z-Image a last norm that its files do not have and its forward does not ask for."""
    small, plain = small_model("z-image", tmp_path, monkeypatch)
    path = rewrite(plain, tmp_path / "odd.gguf", lambda n, data: None if n == "norm_final.weight" else (n, data))
    assert torch.equal(
        forward(load_model(path, OpsOptions()), small), forward(load_model(str(plain), OpsOptions()), small)
    )
