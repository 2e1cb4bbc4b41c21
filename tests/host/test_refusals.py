# SPDX-License-Identifier: Apache-2.0
"""What a user reads who picks a wrong file: one sentence about it and one that says what to do, all of them here.

The files are as small as their kind can be told by; the words in <> change with the host.
"""

import re

import comfy.sd
import encoders
import gguf
import numpy as np
import pytest
from gguf_kit.errors import GGUFError
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_clip, load_model

FLUX = {
    "img_in.weight": (64, 64),
    "vector_in.in_layer.weight": (64, 32),
    "double_blocks.0.img_attn.proj.weight": (64, 64),
    "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
}
T5 = {
    "enc.output_norm.weight": (64,),
    "token_embd.weight": (100, 64),
    "enc.blk.0.attn_rel_b.weight": (32, 4),
    **{
        f"enc.blk.0.{name}.weight": (64, 64)
        for name in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")
    },
    **{f"enc.blk.0.{name}_norm.weight": (64,) for name in ("attn", "ffn")},
}
DECODER = {
    "token_embd.weight": (96, 64),
    "output_norm.weight": (64,),
    **{f"blk.0.{name}.weight": (64,) for name in ("attn_norm", "ffn_norm")},
    **{
        f"blk.0.{name}.weight": (64, 64)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    },
}
QWEN3 = DECODER | {f"blk.0.attn_{part}_norm.weight": (16,) for part in "qk"}
GEMMA2 = DECODER | {f"blk.0.{name}_norm.weight": (64,) for name in ("post_attention", "post_ffw")}
VISION = {
    "v.blk.0.attn_q.weight": (64, 64),
    "v.patch_embd.weight": (64, 3, 14, 14),
    "mm.0.weight": (64, 64),
}
NATIVE_T5 = {
    "shared.weight": (100, 64),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "encoder.block.0.layer.0.SelfAttention.k.weight": (64, 64),
}
CLIP_L = {
    "text_model.embeddings.token_embedding.weight": (100, 64),
    "text_model.encoder.layers.0.mlp.fc1.weight": (64, 64),
}
FUSED = {"token_embd.weight": (96, 64), "blk.0.attn_qkv.weight": (192, 64)}
TAKE_SAFETENSORS = (
    "Take the safetensors file of this encoder; with llama.cpp's names this version loads: T5 v1.1, T5 v1.0, UMT5, "
    "Qwen2, Llama, Mistral, Qwen3, Qwen3-VL, Gemma 2, Gemma 3, Gemma 4, GPT-OSS, Qwen3.5."
)

# (what was picked, tensors, general.architecture, loader and its type, what the user reads)
REFUSALS = [
    ("a chat model that no host knows", DECODER | {"blk.0.attn_qkv.weight": (192, 64)}, "phi3", "auto",
     "1 tensor names match no Llama rule: blk.0.attn_qkv.weight. "
     "Take the encoder from another source, or its safetensors file."),
    ("a chat model with other names", FUSED, "phi3", "auto",
     f"it is no text encoder that can be loaded from GGUF here (general.architecture 'phi3'). {TAKE_SAFETENSORS}"),
    ("a chat model of a size of no use", QWEN3, "qwen3", "lumina2",
     "ComfyUI <> has no text encoder that is a Qwen3 of this size. Of this family it has <>."),
    ("a full T5", T5 | {"dec.blk.0.attn_q.weight": (64, 64)}, "t5", "sd3",
     "this T5 v1.1 cannot be used: it is a full encoder-decoder; take a file with the encoder only "
     "(general.architecture t5encoder)."),
    ("a full T5 in native names", NATIVE_T5 | {"decoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}, "", "sd3",
     "this T5 cannot be used: it is a full encoder-decoder; take a file with the encoder only "
     "(general.architecture t5encoder)."),
    ("a vision part", VISION, "clip", "qwen_image",
     "it is the vision part (mmproj) of a text encoder, without the encoder itself. "
     'Choose the main file in "CLIPLoader (GGUF)", and this one as its vision part.'),
    ("a vision part as diffusion model", VISION, "clip", "model",
     "it is the vision part (mmproj) of a text encoder, without the encoder itself. "
     'Choose the main file in "CLIPLoader (GGUF)", and this one as its vision part.'),
    ("a diffusion model as text encoder", FLUX, "flux", "sd3",
     'it is a diffusion model (Flux.1 schnell), not a text encoder. Load it with "Unet Loader (GGUF)".'),
    ("a text encoder as diffusion model", T5, "t5encoder", "model",
     "it is a text encoder (general.architecture 't5encoder'), not a diffusion model. "
     'Load it with "CLIPLoader (GGUF)".'),
    ("a text encoder in native names as diffusion model", NATIVE_T5, "", "model",
     'it is a text encoder, not a diffusion model. Load it with "CLIPLoader (GGUF)".'),
    ("two encoders in one file",
     {f"text_encoders.clip_l.transformer.{key}": shape for key, shape in CLIP_L.items()}
     | {f"text_encoders.t5xxl.transformer.{key}": shape for key, shape in NATIVE_T5.items()}, "", "flux",
     "it holds 2 text encoders (behind text_encoders.t5xxl.transformer., text_encoders.clip_l.transformer.). "
     "Take a file with one encoder for each input of the loader."),
    ("an encoder without its tokenizer", GEMMA2, "gemma2", "lumina2",
     "this Gemma 2 has no tokenizer (metadata key 'tokenizer.ggml.tokens'), and ComfyUI brings none. "
     "Take a file that llama.cpp has converted."),
    ("a type of another encoder", T5, "t5encoder", "wan",
     "type 'wan' takes UMT5-XXL, and this is T5-base, which is for stable_audio. "
     "Choose another type or another encoder."),
    ("a type that the file alone does not tell", CLIP_L, "", "auto",
     "type 'auto' cannot tell what CLIP-L is wanted for: stable_diffusion, sd3 or hidream. "
     "Choose another type or another encoder."),
]  # fmt: skip


def write(path, shapes, tag):
    """A file of zeros with these tensors."""
    writer = gguf.GGUFWriter(path, tag or "none")
    if not tag:
        writer.kv_data[0].pop("general.architecture")
    writer.add_head_count(4)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    encoders.close(writer)
    return str(path)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case[0])
def test_a_wrong_file_is_refused_in_words(tmp_path, case):
    kind, shapes, tag, type_name, words = case
    if "of a size" in kind and not hasattr(comfy.sd.TEModel, "QWEN3_8B"):
        pytest.skip("this ComfyUI takes every Qwen3 for the 4B, and names the shapes that differ")
    path = write(tmp_path / "picked.gguf", shapes, tag)
    with pytest.raises(GGUFError) as caught:
        load_model(path, OpsOptions()) if type_name == "model" else load_clip((path,), type_name)
    assert re.fullmatch(re.escape(f"picked.gguf: {words}").replace("<>", ".+"), str(caught.value))


def test_a_vision_part_for_an_encoder_that_takes_none(tmp_path):
    encoder, part = write(tmp_path / "t5.gguf", T5, "t5encoder"), write(tmp_path / "mmproj.gguf", VISION, "clip")
    with pytest.raises(GGUFError) as caught:
        load_clip((encoder,), "stable_audio", vision=part)
    assert str(caught.value) == (
        "mmproj.gguf: it was chosen as vision part, but none of the encoders is a GGUF file in llama.cpp's names that "
        "takes one. Set the vision part to auto or none."
    )
