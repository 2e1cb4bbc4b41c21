# SPDX-License-Identifier: Apache-2.0
"""Architectures over the key lists of real models: recognised, every tensor's role, what keeps its precision."""

import functools
import re
from collections import Counter
from math import prod

import model_keys
import pytest
from gguf_kit.models import arch_table, archs
from gguf_kit.models.archs import Category, Role
from safetensors import safe_open

C = Category
KEPT = (C.EMBED, C.OUTPUT)

# Stored list -> name and title of its entry; lists called other-* stand for models that no entry knows.
KNOWN = {
    "anima": ("cosmos", "Anima"),
    "aura": ("aura", "AuraFlow"),
    "chroma": ("chroma", "Chroma"),
    "chroma-radiance": ("chroma", "Chroma Radiance"),
    "cosmos-predict2-2b": ("cosmos", "Cosmos Predict2"),
    "cosmos1-7b": ("cosmos", "Cosmos 1"),
    "flux-canny": ("flux", "Flux.1 Canny or Depth"),
    "flux-dev": ("flux", "Flux.1 dev"),
    "flux-fill": ("flux", "Flux.1 Fill"),
    "flux-lite-8b": ("flux", "Flux.1 dev"),
    "flux-longcat": ("flux", "LongCat-Image"),
    "flux-ovis": ("flux", "Ovis-Image"),
    "flux-schnell": ("flux", "Flux.1 schnell"),
    "flux2-dev": ("flux2", "Flux.2"),
    "flux2-klein-4b": ("flux2", "Flux.2"),
    "flux2-klein-9b": ("flux2", "Flux.2"),
    "hidream": ("hidream", "HiDream"),
    "hyimg21": ("hyvid", "HunyuanImage 2.1"),
    "hyimg21-refiner": ("hyvid", "HunyuanImage 2.1 refiner"),
    "hyvid": ("hyvid", "HunyuanVideo"),
    "hyvid-comfy": ("hyvid", "HunyuanVideo"),
    "hyvid15": ("hyvid", "HunyuanVideo 1.5"),
    "ltx2": ("ltxv", "LTX-2"),
    "ltx23": ("ltxv", "LTX-2"),
    "ltxv-13b": ("ltxv", "LTX-Video"),
    "ltxv-2b": ("ltxv", "LTX-Video"),
    "lumina2": ("lumina2", "Lumina Image 2.0"),
    "qwen-image": ("qwen_image", "Qwen-Image"),
    "sd1": ("sd1", "Stable Diffusion 1"),
    "sd1-inpaint": ("sd1", "Stable Diffusion 1"),
    "sd2": ("sd1", "Stable Diffusion 2"),
    "sd3-medium": ("sd3", "Stable Diffusion 3"),
    "sd35-large": ("sd3", "Stable Diffusion 3.5"),
    "sd35-medium": ("sd3", "Stable Diffusion 3.5"),
    "sdxl": ("sdxl", "Stable Diffusion XL"),
    "sdxl-refiner": ("sdxl", "Stable Diffusion XL refiner"),
    "sdxl-ssd-1b": ("sdxl", "Stable Diffusion XL"),
    "wan21-1.3b": ("wan", "Wan"),
    "wan21-14b": ("wan", "Wan"),
    "wan21-camera": ("wan", "Wan Camera"),
    "wan21-humo": ("wan", "HuMo"),
    "wan21-i2v": ("wan", "Wan"),
    "wan21-scail": ("wan", "SCAIL"),
    "wan21-vace": ("wan", "Wan VACE"),
    "wan21-scail2": ("wan", "SCAIL 2"),
    "wan22-5b": ("wan", "Wan"),
    "wan22-dancer": ("wan", "WanDancer"),
    "wan22-animate": ("wan", "Wan Animate"),
    "wan22-i2v": ("wan", "Wan"),
    "wan22-s2v": ("wan", "Wan S2V"),
    "zimage": ("z_image", "Z-Image"),
    "krea2": ("krea2", "Krea 2"),
    "omnigen2": ("omnigen2", "OmniGen2"),
    "kandinsky5": ("kandinsky5", "Kandinsky 5"),
    "ideogram4": ("ideogram4", "Ideogram 4"),
    "boogu": ("boogu", "Boogu-Image"),
    "mochi": ("mochi", "Mochi"),
    "hunyuan-dit": ("hydit", "Hunyuan-DiT"),
    "ernie-image": ("ernie_image", "ERNIE-Image"),
    "lens": ("lens", "Lens"),
    "mage-flow": ("mage_flow", "Mage-Flow"),
    "joyimage": ("joyimage", "JoyImage"),
    "minimax-h3": ("minimax_h3", "MiniMax H3"),
    "pixeldit": ("pixeldit", "PixelDiT"),
    "seedvr2-3b": ("seedvr2", "SeedVR2"),
    "hidream-o1": ("hidream_o1", "HiDream-O1"),
    "ace-step": ("ace", "ACE-Step"),
    "cogvideox-5b": ("cogvideox", "CogVideoX"),
    "cogvideox15-i2v": ("cogvideox", "CogVideoX"),
    "svd": ("svd", "Stable Video Diffusion"),
    "stable-audio": ("stable_audio", "Stable Audio"),
    "stable-audio3": ("stable_audio", "Stable Audio"),
    "ace-step15": ("ace15", "ACE-Step 1.5"),
    "minimax-music3": ("minimax_music3", "MiniMax Music 3"),
    "seedvr2-7b": ("seedvr2", "SeedVR2"),
    "seedvr2-7b-shared": ("seedvr2", "SeedVR2"),
    "hunyuan3d": ("hunyuan3d", "Hunyuan3D 2"),
    "hunyuan3d21": ("hunyuan3d", "Hunyuan3D 2.1"),
    "triposplat": ("triposplat", "TripoSplat"),
    "sd21-unclip-l": ("sd1", "Stable Diffusion 2.1 unCLIP L"),
    "sd21-unclip-h": ("sd1", "Stable Diffusion 2.1 unCLIP H"),
    "lotus-d": ("sd1", "Lotus"),
    "cascade-b": ("cascade", "Stable Cascade B"),
    "cascade-c": ("cascade", "Stable Cascade C"),
    "newbie": ("lumina2", "NewBie"),
    "zimage-pixels": ("z_image", "Z-Image in pixel space"),
    "kandinsky5-image": ("kandinsky5", "Kandinsky 5"),
    "pixart-alpha": ("pixart", "PixArt"),
    "pixart-sigma": ("pixart", "PixArt"),
    "pid": ("pid", "PiD"),
}
OTHERS = [name for name in model_keys.list_names() if name.startswith("other-")]

# What the widespread loader accepts in general.architecture.
COMMON_TAGS = set("flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image".split())

# What its forks and other programs write into files of models that it does not know.
FORK_TAGS = set("krea2 ideogram4 lens minimax_h3 minimax_music3 mochi pixart".split())
# No program was seen to write files of these; the tag is the entry's name, and nothing reads it.
OWN_TAGS = set(
    "ace ace15 boogu cascade cogvideox ernie_image hidream_o1 hunyuan3d hydit joyimage kandinsky5 mage_flow "
    "omnigen2 pid pixeldit seedvr2 stable_audio triposplat".split()
)

# Projections between the blocks of Wan and those of VACE: neither attention nor feed-forward.
NO_CATEGORY = re.compile(r"vace_blocks\.\d+\.(before|after)_proj\.weight")


read_keys = functools.cache(model_keys.read_keys)


@functools.cache
def roles_of(name, is_generic=False):
    """(shapes, roles) of a stored model, by its own entry if it has one and the generic policy is not asked for."""
    shapes = read_keys(name)
    own = archs.detect(shapes)
    return shapes, archs.roles(archs.GENERIC if is_generic or own is None else own, shapes)


def is_kept(role):
    """Whether a tensor keeps its precision in all recipes."""
    return role.category in KEPT or role.f32


def n_weights(shapes, roles, wanted):
    """Weights of matrices whose role is wanted."""
    return sum(prod(shape) for key, shape in shapes.items() if len(shape) > 1 and wanted(roles[key]))


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_a_real_model_is_recognised_as_exactly_one_entry(name):
    found = archs.find_all(read_keys(name))
    assert [(arch.name, arch.title) for arch in found] == ([KNOWN[name]] if name in KNOWN else [])


def test_every_stored_list_is_expected_to_be_something():
    assert sorted([*KNOWN, *OTHERS]) == model_keys.list_names()
    assert len(OTHERS) >= 3


def test_every_entry_is_somebodys_model():
    unseen = {arch.title for arch in archs.ARCHS} - {title for _, title in KNOWN.values()}
    assert unseen == {"Flux.1 in diffusers layout"}


def test_the_tiny_flux_is_a_schnell():
    path = model_keys.FOLDER.parent / "tiny-flux" / "tiny-flux-bf16.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert [arch.title for arch in archs.find_all(shapes)] == ["Flux.1 schnell"]


def test_the_order_of_the_table_is_of_no_account(monkeypatch):
    monkeypatch.setattr(archs, "ARCHS", archs.ARCHS[::-1])
    assert {archs.detect(read_keys(name)).title for name in KNOWN} == {title for _, title in KNOWN.values()}
    assert not any(archs.named(name).reject for name, _ in KNOWN.values())


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_every_tensor_has_a_role_and_a_place(name):
    shapes, roles = roles_of(name)
    assert list(roles) == list(shapes)
    for key, role in roles.items():
        assert (0 <= role.block < role.n_blocks) or (role.block, role.n_blocks) == (-1, 0), key


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_every_matrix_in_a_block_has_a_category_of_its_own(name):
    """Of layers, that is: parameters that are no layer's weight are never quantized, whatever their category."""
    shapes, roles = roles_of(name)
    for key, role in roles.items():
        if len(shapes[key]) > 1 and role.n_blocks and not role.f32 and key.endswith(".weight"):
            assert role.category not in (*KEPT, C.OTHER) or NO_CATEGORY.fullmatch(key), key


@pytest.mark.parametrize("name", KNOWN)
def test_outside_the_blocks_is_what_feeds_or_follows_them(name):
    _, roles = roles_of(name)
    outside = Counter(role.category for role in roles.values() if not role.n_blocks)
    shared_modulation = {C.MODULATION} if name.startswith("flux2") else set()
    tokens = {C.TOKEN_EMBD} if name == "hidream-o1" else set()
    assert set(outside) == {C.EMBED, C.OUTPUT} | shared_modulation | tokens


@pytest.mark.parametrize(
    ("name", "key", "category", "block", "n_blocks"),
    [
        ("flux-dev", "double_blocks.18.img_attn.qkv.weight", C.ATTN_QKV, 18, 19),
        ("flux-dev", "double_blocks.2.txt_attn.proj.weight", C.ATTN, 2, 19),
        ("flux-dev", "double_blocks.0.img_mod.lin.weight", C.MODULATION, 0, 19),
        ("flux-dev", "double_blocks.0.txt_mlp.0.weight", C.FFN, 0, 19),
        ("flux-dev", "double_blocks.0.txt_mlp.2.weight", C.FFN_DOWN, 0, 19),
        ("flux-dev", "single_blocks.10.linear1.weight", C.ATTN_QKV, 10, 38),
        ("flux-dev", "single_blocks.37.linear2.weight", C.FFN_DOWN, 37, 38),
        ("flux-dev", "single_blocks.9.modulation.lin.weight", C.MODULATION, 9, 38),
        ("flux-dev", "vector_in.in_layer.weight", C.EMBED, -1, 0),
        ("flux-dev", "final_layer.adaLN_modulation.1.weight", C.OUTPUT, -1, 0),
        ("flux-lite-8b", "double_blocks.7.img_mlp.2.weight", C.FFN_DOWN, 7, 8),
        ("flux-ovis", "double_blocks.0.img_mlp.down_proj.weight", C.FFN_DOWN, 0, 6),
        ("flux-ovis", "double_blocks.0.img_mlp.gate_proj.weight", C.FFN, 0, 6),
        ("flux2-dev", "single_blocks.47.linear1.weight", C.ATTN_QKV, 47, 48),
        ("flux2-dev", "double_stream_modulation_txt.lin.weight", C.MODULATION, -1, 0),
        ("chroma", "distilled_guidance_layer.layers.4.in_layer.weight", C.EMBED, -1, 0),
        ("chroma-radiance", "nerf_blocks.3.param_generator.weight", C.OUTPUT, -1, 0),
        ("chroma-radiance", "img_in_patch.weight", C.EMBED, -1, 0),
        ("sd1", "input_blocks.0.0.weight", C.EMBED, -1, 0),
        ("sd1", "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight", C.ATTN_V, 0, 16),
        ("sd1", "middle_block.1.transformer_blocks.0.ff.net.2.weight", C.FFN_DOWN, 6, 16),
        ("sd1", "output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight", C.ATTN, 15, 16),
        ("sd1", "output_blocks.3.0.in_layers.2.weight", C.CONV, 17, 26),
        ("sd1", "input_blocks.3.0.op.weight", C.CONV, 2, 26),
        ("sd1", "input_blocks.1.1.proj_in.weight", C.ATTN, 0, 26),
        ("sd1", "middle_block.1.proj_out.weight", C.ATTN, 12, 26),
        ("sd1", "input_blocks.2.0.emb_layers.1.weight", C.MODULATION, 1, 26),
        ("sdxl", "input_blocks.4.1.transformer_blocks.1.ff.net.0.proj.weight", C.FFN, 1, 70),
        ("sdxl", "output_blocks.0.1.transformer_blocks.9.attn1.to_out.0.weight", C.ATTN, 43, 70),
        ("sdxl", "label_emb.0.2.weight", C.EMBED, -1, 0),
        ("sdxl", "out.2.weight", C.OUTPUT, -1, 0),
        ("sd3-medium", "joint_blocks.23.x_block.mlp.fc2.weight", C.FFN_DOWN, 23, 24),
        ("sd35-medium", "joint_blocks.12.x_block.attn2.qkv.weight", C.ATTN_QKV, 12, 24),
        ("sd35-large", "joint_blocks.0.context_block.adaLN_modulation.1.weight", C.MODULATION, 0, 38),
        ("sd35-large", "pos_embed", C.EMBED, -1, 0),
        ("aura", "double_layers.3.attn.w2v.weight", C.ATTN_V, 3, 4),
        ("aura", "single_layers.31.mlp.c_fc2.weight", C.FFN, 31, 32),
        ("aura", "single_layers.31.mlp.c_proj.weight", C.FFN_DOWN, 31, 32),
        ("aura", "double_layers.0.modX.1.weight", C.MODULATION, 0, 4),
        ("aura", "modF.1.weight", C.OUTPUT, -1, 0),
        ("hidream", "double_stream_blocks.15.block.attn1.to_v_t.weight", C.ATTN_V, 15, 16),
        ("hidream", "single_stream_blocks.3.block.ff_i.experts.3.w2.weight", C.FFN_DOWN, 3, 32),
        ("hidream", "single_stream_blocks.3.block.ff_i.shared_experts.w3.weight", C.FFN, 3, 32),
        ("hidream", "caption_projection.48.linear.weight", C.EMBED, -1, 0),
        ("cosmos1-7b", "blocks.block27.blocks.1.block.attn.to_v.0.weight", C.ATTN_V, 27, 28),
        ("cosmos1-7b", "blocks.block10.blocks.2.block.layer2.weight", C.FFN_DOWN, 10, 28),
        ("cosmos-predict2-2b", "blocks.9.cross_attn.v_proj.weight", C.ATTN_V, 9, 28),
        ("cosmos-predict2-2b", "blocks.9.adaln_modulation_mlp.2.weight", C.MODULATION, 9, 28),
        ("anima", "llm_adapter.blocks.5.mlp.2.weight", C.FFN_DOWN, 5, 6),
        ("anima", "llm_adapter.embed.weight", C.EMBED, -1, 0),
        ("ltxv-2b", "transformer_blocks.27.attn2.to_v.weight", C.ATTN_V, 27, 28),
        ("ltxv-2b", "transformer_blocks.2.ff.net.0.proj.weight", C.FFN, 2, 28),
        ("ltxv-2b", "adaln_single.linear.weight", C.EMBED, -1, 0),
        ("ltx2", "transformer_blocks.47.audio_to_video_attn.to_v.weight", C.ATTN_V, 47, 48),
        ("ltx23", "video_embeddings_connector.transformer_1d_blocks.7.ff.net.2.weight", C.FFN_DOWN, 7, 8),
        ("ltx23", "audio_proj_out.weight", C.OUTPUT, -1, 0),
        ("hyvid", "double_blocks.19.img_attn_qkv.weight", C.ATTN_QKV, 19, 20),
        ("hyvid", "double_blocks.19.txt_mlp.fc2.weight", C.FFN_DOWN, 19, 20),
        ("hyvid", "single_blocks.39.modulation.linear.weight", C.MODULATION, 39, 40),
        ("hyvid-comfy", "double_blocks.19.img_mlp.2.weight", C.FFN_DOWN, 19, 20),
        ("hyvid-comfy", "txt_in.individual_token_refiner.blocks.1.mlp.2.weight", C.EMBED, -1, 0),
        ("hyvid15", "double_blocks.53.txt_attn.proj.weight", C.ATTN, 53, 54),
        ("wan21-14b", "blocks.39.self_attn.v.weight", C.ATTN_V, 39, 40),
        ("wan21-14b", "blocks.39.cross_attn.o.weight", C.ATTN, 39, 40),
        ("wan21-14b", "blocks.10.ffn.2.weight", C.FFN_DOWN, 10, 40),
        ("wan21-14b", "time_projection.1.weight", C.EMBED, -1, 0),
        ("wan21-i2v", "blocks.0.cross_attn.v_img.weight", C.ATTN_V, 0, 40),
        ("wan21-vace", "vace_blocks.7.ffn.0.weight", C.FFN, 7, 8),
        ("wan21-humo", "blocks.39.audio_cross_attn_wrapper.audio_cross_attn.v.weight", C.ATTN_V, 39, 40),
        ("wan22-s2v", "audio_injector.injector.11.v.weight", C.ATTN_V, 11, 12),
        ("wan22-s2v", "audio_injector.injector_adain_layers.0.linear.weight", C.MODULATION, 0, 12),
        ("wan22-animate", "face_adapter.fuser_blocks.7.linear1_kv.weight", C.ATTN_QKV, 7, 8),
        ("wan22-animate", "face_adapter.fuser_blocks.7.linear2.weight", C.ATTN, 7, 8),
        ("wan22-animate", "motion_encoder.enc.net_app.convs.8.weight", C.EMBED, -1, 0),
        ("lumina2", "layers.25.attention.qkv.weight", C.ATTN_QKV, 25, 26),
        ("lumina2", "layers.25.feed_forward.w2.weight", C.FFN_DOWN, 25, 26),
        ("zimage", "context_refiner.1.feed_forward.w2.weight", C.EMBED, -1, 0),
        ("zimage", "layers.29.attention.out.weight", C.ATTN, 29, 30),
        ("qwen-image", "transformer_blocks.59.attn.add_v_proj.weight", C.ATTN_V, 59, 60),
        ("qwen-image", "transformer_blocks.59.txt_mlp.net.2.weight", C.FFN_DOWN, 59, 60),
        ("qwen-image", "transformer_blocks.0.attn.to_add_out.weight", C.ATTN, 0, 60),
        ("qwen-image", "norm_out.linear.weight", C.OUTPUT, -1, 0),
        ("krea2", "blocks.27.attn.wv.weight", C.ATTN_V, 27, 28),
        ("krea2", "blocks.27.attn.gate.weight", C.ATTN, 27, 28),
        ("krea2", "blocks.27.mlp.down.weight", C.FFN_DOWN, 27, 28),
        ("krea2", "last.linear.weight", C.OUTPUT, -1, 0),
        ("omnigen2", "layers.31.feed_forward.linear_2.weight", C.FFN_DOWN, 31, 32),
        ("kandinsky5", "visual_transformer_blocks.31.self_attention.to_value.weight", C.ATTN_V, 31, 32),
        ("ideogram4", "layers.33.attention.qkv.weight", C.ATTN_QKV, 33, 34),
        ("ideogram4", "llm_cond_proj.weight", C.EMBED, -1, 0),
        ("svd", "input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight", C.ATTN_V, 0, 16),
        ("svd", "output_blocks.11.1.time_stack.0.attn2.to_v.weight", C.ATTN_V, 15, 16),
        ("svd", "input_blocks.1.1.time_stack.0.ff_in.net.2.weight", C.FFN_DOWN, 0, 16),
        ("svd", "middle_block.0.time_stack.in_layers.2.weight", C.CONV, 11, 26),
        ("svd", "input_blocks.1.1.time_pos_embed.2.weight", C.MODULATION, 0, 26),
        ("wan22-dancer", "music_injector.injector.7.v.weight", C.ATTN_V, 7, 8),
        ("wan22-dancer", "head_global.head.weight", C.OUTPUT, -1, 0),
        ("wan22-dancer", "music_encoder.1.self_attn.v_proj.weight", C.EMBED, -1, 0),
        ("seedvr2-7b", "blocks.35.attn.proj_qkv.txt.weight", C.ATTN_QKV, 35, 36),
        ("seedvr2-7b", "blocks.35.mlp.vid.proj_out.weight", C.FFN_DOWN, 35, 36),
        ("seedvr2-7b-shared", "blocks.35.mlp.all.proj_in_gate.weight", C.FFN, 35, 36),
        ("cogvideox15-i2v", "blocks.41.v.weight", C.ATTN_V, 41, 42),
        ("cogvideox15-i2v", "ofs_embedding_linear_1.weight", C.EMBED, -1, 0),
        ("ace-step15", "decoder.layers.23.cross_attn.v_proj.weight", C.ATTN_V, 23, 24),
        ("ace-step15", "encoder.timbre_encoder.layers.3.mlp.down_proj.weight", C.FFN_DOWN, 11, 12),
        ("ace-step15", "detokenizer.layers.0.mlp.down_proj.weight", C.EMBED, -1, 0),
        ("ace-step15", "decoder.proj_out.1.weight", C.OUTPUT, -1, 0),
        ("stable-audio", "transformer.layers.23.self_attn.to_qkv.weight", C.ATTN_QKV, 23, 24),
        ("stable-audio", "transformer.layers.0.cross_attn.to_kv.weight", C.ATTN_QKV, 0, 24),
        ("stable-audio", "transformer.layers.0.ff.ff.0.proj.weight", C.FFN, 0, 24),
        ("stable-audio", "transformer.layers.0.ff.ff.2.weight", C.FFN_DOWN, 0, 24),
        ("stable-audio", "transformer.project_out.weight", C.OUTPUT, -1, 0),
        ("stable-audio3", "transformer.layers.0.to_local_embed.2.weight", C.MODULATION, 0, 24),
        ("stable-audio3", "transformer.global_cond_embedder.2.weight", C.EMBED, -1, 0),
        ("minimax-music3", "diffusion_transformer.transformer.layers.35.ff.ff.2.weight", C.FFN_DOWN, 35, 36),
        ("minimax-music3", "latent_conditioners.0.weight", C.EMBED, -1, 0),
        ("hunyuan3d", "single_blocks.31.linear1.weight", C.ATTN_QKV, 31, 32),
        ("hunyuan3d", "cond_in.weight", C.EMBED, -1, 0),
        ("hunyuan3d21", "blocks.20.attn2.to_v.weight", C.ATTN_V, 20, 21),
        ("hunyuan3d21", "blocks.20.moe.experts.7.net.2.weight", C.FFN_DOWN, 20, 21),
        ("hunyuan3d21", "blocks.20.moe.shared_experts.net.0.proj.weight", C.FFN, 20, 21),
        ("hunyuan3d21", "blocks.20.skip_linear.weight", C.FFN, 20, 21),
        ("triposplat", "blocks.23.mlp.mlp.2.weight", C.FFN_DOWN, 23, 24),
        ("triposplat", "noise_refiner.1.mlp.mlp.2.weight", C.EMBED, -1, 0),
        ("triposplat", "cam_out_layer.weight", C.OUTPUT, -1, 0),
        ("other-depth-anything3", "backbone.encoder.layer.23.attention.attention.value.weight", C.ATTN_V, 23, 24),
        ("other-depth-anything3", "backbone.encoder.layer.0.attention.output.dense.weight", C.ATTN, 0, 24),
    ],
)
def test_role(name, key, category, block, n_blocks):
    assert roles_of(name)[1][key] == Role(category, block, n_blocks)


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_values_are_found_where_queries_are(name):
    """As a matrix of their own, or in one with the keys."""
    shapes, roles = roles_of(name)
    matrices = [(key, roles[key]) for key in shapes if len(shapes[key]) > 1 and roles[key].n_blocks]
    is_query = re.compile(r".*(to_q|to_query|linear_q|\.q|\.query|\.q_proj|q_linear|w\dq|wq)(\.0)?\.weight")
    has_values = re.compile(r".*([._]kv|kv_proj|kv_linear)\.weight")
    queries = {(r.block, r.n_blocks) for key, r in matrices if is_query.fullmatch(key)}
    values = {(r.block, r.n_blocks) for _, r in matrices if r.category is C.ATTN_V}
    fused = {(r.block, r.n_blocks) for key, r in matrices if r.category is C.ATTN_QKV and has_values.fullmatch(key)}
    assert queries <= values | fused
    assert values <= queries
    assert values or any(role.category is C.ATTN_QKV for _, role in matrices)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("wan21-14b", r"blocks\.\d+\.modulation"),
        ("wan21-14b", r"head\.modulation"),
        ("wan22-s2v", r"casual_audio_encoder\.encoder\.padding_tokens"),
        ("ltxv-2b", r"transformer_blocks\.\d+\.scale_shift_table"),
        ("ltx23", r"(audio_)?scale_shift_table"),
        ("ltx23", r"transformer_blocks\.\d+\.scale_shift_table_a2v_ca_audio"),
        ("ltx23", r"\w+_embeddings_connector\.learnable_registers"),
        ("ltx23", r"transformer_blocks\.\d+\.audio_attn1\.to_gate_logits\.weight"),
        ("hidream", r"(double|single)_stream_blocks\.\d+\.block\.ff_i\.gate\.weight"),
        ("cosmos1-7b", r"extra_pos_embedder\.pos_emb_\w"),
        ("zimage", r"(x|cap)_pad_token"),
        ("aura", r"register_tokens"),
        ("wan22-dancer", r"head_global\.modulation"),
        ("seedvr2-7b", r"(positive|negative)_conditioning"),
        ("ace-step15", r"decoder\.layers\.\d+\.scale_shift_table|null_condition_emb|detokenizer\.special_tokens"),
        ("stable-audio", r"timestep_features\.weight"),
        ("stable-audio3", r"transformer\.memory_tokens"),
        ("minimax-music3", r"diffusion_transformer\.timestep_features\.weight"),
        ("hunyuan3d21", r"blocks\.\d+\.moe\.gate\.weight"),
        ("triposplat", r"(blocks\.\d+\.)?shift_table"),
        ("triposplat", r"(blocks|context_refiner)\.\d+\.attn\.[qk]_norm\.gamma"),
        ("chroma", r"distilled_guidance_layer\.in_proj\.weight|img_in\.weight|final_layer\.linear\.weight"),
    ],
)
def test_bare_parameters_and_gates_stay_float32(name, pattern):
    shapes, roles = roles_of(name)
    found = [role.f32 for key, role in roles.items() if re.fullmatch(pattern, key)]
    assert found
    assert all(found)
    assert n_weights(shapes, roles, lambda role: role.f32) < 0.003 * sum(map(prod, shapes.values()))


# Part of the weights that keeps its precision, in percent, where it is more than 4, and what that is.
MUCH_KEPT = {
    "chroma-radiance": 9.4,  # the decoder to pixels, and what makes the modulation of all blocks
    "lumina2": 13.0,  # refiners of noise and text
    "newbie": 9.8,
    "zimage": 11.8,
    "zimage-pixels": 16.5,  # these refiners and the decoder to pixels
    "omnigen2": 15.6,  # refiners of noise, references and text
    "boogu": 10.3,
    "triposplat": 18.4,  # refiners of noise and picture, a model of 0.4 G weights
    "sd35-medium": 10.0,  # a table of positions
    "wan21-camera": 4.4,  # convolutions over the camera's path
    "kandinsky5": 4.9,  # the blocks of the text
    "hunyuan-dit": 4.1,  # what T5's text comes in by
    "pid": 5.0,  # gates and convolutions of the picture that is made larger
    "ace-step": 4.7,  # projectors for training
    "ace-step15": 11.7,  # what turns sound into tokens and back
    "hidream-o1": 6.1,  # what sees pictures, as in text encoders
}


@pytest.mark.parametrize("name", KNOWN)
def test_little_keeps_its_precision(name):
    shapes, roles = roles_of(name)
    percent = 100 * n_weights(shapes, roles, is_kept) / sum(map(prod, shapes.values()))
    if name in MUCH_KEPT:
        assert percent == pytest.approx(MUCH_KEPT[name], abs=0.06)
    else:
        assert 0.05 < percent < 4


@pytest.mark.parametrize(
    ("bits", "gigabytes"),
    [(16, 23.81), (8.5, 12.71), (6.5625, 9.85), (5.5, 8.28), (4.5, 6.80), (3.4375, 5.23), (2.625, 4.02)],
    ids=["F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"],
)
def test_flux_dev_has_the_published_sizes(bits, gigabytes):
    shapes, roles = roles_of("flux-dev")
    assert (len(shapes), sum(map(prod, shapes.values()))) == (780, 11_901_408_320)
    kept = n_weights(shapes, roles, is_kept)
    quantized = n_weights(shapes, roles, lambda role: not is_kept(role))
    vectors = sum(prod(shape) for shape in shapes.values() if len(shape) == 1)
    assert (vectors * 4 + kept * 2 + quantized * bits / 8) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize("name", KNOWN)
def test_files_carry_a_tag_that_other_loaders_know(name):
    assert archs.detect(read_keys(name)).tag in COMMON_TAGS | FORK_TAGS | OWN_TAGS


def test_every_tag_is_somebodys():
    assert {archs.detect(read_keys(name)).tag for name in KNOWN} == COMMON_TAGS | FORK_TAGS | OWN_TAGS


def test_only_unets_store_kernels_as_rows():
    assert {arch.name for arch in (*archs.ARCHS, archs.GENERIC) if arch.reshape_conv} == {"sd1", "sdxl", "svd"}


# Where the generic policy keeps more matrices of layers than the entry does: percent of the weights, and which.
GENERIC_KEEPS_MORE = {
    "anima": 4.8,  # the adapter
    "flux2-dev": 1.8,  # modulation that all blocks share
    "flux2-klein-4b": 3.7,
    "flux2-klein-9b": 2.8,
    "ltx2": 3.6,  # connectors
    "ltx23": 9.6,
    "krea2": 2.7,  # what joins the layers of the text encoder
    "ace-step": 2.5,  # the encoder of lyrics
    "hidream-o1": 7.7,  # the table of tokens
    "sdxl-ssd-1b": 2.3,  # a middle that is too small for a stack
    "wan22-animate": 4.9,  # the face adapter
    "wan22-dancer": 4.9,  # the music injector
    "wan22-s2v": 3.9,  # layers without a name of their own
}
# And where it keeps less: the decoder to pixels, routers, what sees pictures, and the first convolution, whose rows no
# type can hold.
GENERIC_KEEPS_LESS = re.compile(
    r"nerf_blocks\.\d+\..*|.*\.(ff_i|moe)\.gate\.weight|visual\.blocks\..*|input_blocks\.0\.0\.weight"
)


@pytest.mark.parametrize("name", KNOWN)
def test_the_generic_policy_keeps_nearly_what_the_entry_keeps(name):
    shapes, own = roles_of(name)
    _, generic = roles_of(name, is_generic=True)
    matrices = [key for key, shape in shapes.items() if len(shape) > 1 and key.endswith(".weight")]
    less = [key for key in matrices if is_kept(own[key]) and not is_kept(generic[key])]
    more = [key for key in matrices if is_kept(generic[key]) and not is_kept(own[key])]
    assert [key for key in less if not GENERIC_KEEPS_LESS.fullmatch(key)] == []
    percent = 100 * sum(prod(shapes[key]) for key in more) / sum(map(prod, shapes.values()))
    assert percent == pytest.approx(GENERIC_KEEPS_MORE.get(name, 0), abs=0.06)


def test_every_pattern_of_the_table_is_of_use():
    keys_of = {name: set() for name, _ in KNOWN.values()}
    for name, (arch_name, _) in KNOWN.items():
        keys_of[arch_name] |= {re.sub(r"\d+", "1", key, count=1) for key in read_keys(name)}
    for arch in archs.ARCHS:
        for pattern in (*arch.blocks, *(p for p, _ in arch.outer), *arch.keep_f32, *arch.drop):
            assert pattern in UNSEEN or any(re.match(pattern, key) for key in keys_of[arch.name]), (arch.name, pattern)
    others = {key for name in OTHERS for key in read_keys(name)}
    parts = {re.sub(r"\D*\d+\.", "", key, count=1) for key in set().union(others, *keys_of.values())}
    for pattern, _ in arch_table.BLOCK_RULES:
        assert any(re.fullmatch(pattern, part) for part in parts), pattern


# Of variants that are not stored, or of files but not of the host's class, which computes it.
UNSEEN = {
    r"img_emb\.emb_pos",  # Wan with a first and a last frame
    r"keyframes_abs_pos_embedding",  # LTX-2.5
    r"register",  # SD 3
    r"adaln_t_table",  # MiniMax H3 with modulation over a table of time
    r"patch_embed\.pos_embedding",  # CogVideoX 5B I2V
    r"pos_embed",  # PixArt
}
