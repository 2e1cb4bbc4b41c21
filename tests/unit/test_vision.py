# SPDX-License-Identifier: Apache-2.0
"""Vision parts (mmproj): names against gguf-py's tables, weights put together, refusals."""

import contextlib
import re

import gguf
import numpy as np
import pytest
import torch
from gguf_kit import loader
from gguf_kit.errors import BadFile, GGUFError, UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import text_encoders, vision, vision_search
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.models.vision_table import MODULES, VISION_PARTS
from vision_parts import HIDDEN, INNER, WIDTH, Q, close, open_encoder, write_part, write_text_encoder

SUFFIXES = (".weight", ".bias", ".input_min", ".input_max", ".output_min", ".output_max")
TABLE = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)


def read(tmp_path, kind, arch=None, width=WIDTH, **named):
    """(state dict, stored values) of a part beside a text encoder."""
    encoder_file, entry = open_encoder(write_text_encoder(tmp_path / "text.gguf", arch or kind, width))
    values = write_part(tmp_path / "mmproj.gguf", kind, **{"width": width, **named})
    return vision.read(GGUFFile(tmp_path / "mmproj.gguf"), encoder_file, entry), values


def floats(value):
    return value.dequantize() if isinstance(value, QuantizedBytes) else value.float()


# -- Names. --

# Keys whose name llama.cpp's converter gives without its table.
BY_HAND = {
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
    **{
        f"deepstack_merger_list.{{bid}}.{layer}": f"v.deepstack.{{bid}}.{name}"
        for name, layer in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2"))
    },
}
ORIGINALS = {"qwen2vl": "visual.", "qwen3vl": "visual.", "qwen35": "visual.", "gemma3": "vision_tower.", "gemma4": ""}


def gemma4_original(key):
    """The original name as llama.cpp's converter hands it to its table."""
    if key.startswith("multi_modal_projector."):
        return key.replace("multi_modal_projector", "model.embed_vision")
    if ".patch_embedder." in key:
        return f"model.vision_tower.{key.removeprefix('vision_model.')}"
    return key.replace("vision_model.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")


def expected_name(kind, key):
    """gguf-py's name for a key of the table."""
    path, _, suffix = key.rpartition(".")
    if path in BY_HAND:
        return f"{BY_HAND[path]}.{suffix}"
    if kind == "gemma4":
        original = gemma4_original(key)
    else:
        original = key.replace("_weight", ".weight") if key.startswith("multi_modal") else ORIGINALS[kind] + key
    name = TABLE.get_name(original.replace("{bid}", "7"), try_suffixes=SUFFIXES)
    return name.replace(".7.", ".{bid}.") if name else None


@pytest.mark.parametrize("kind", ORIGINALS)
def test_names_are_those_of_gguf_py(kind):
    part = VISION_PARTS[kind][0]
    expected = {name: expected_name(kind, key) for name, key in part.keys.items()}
    assert {name.removesuffix(".weight"): value.removesuffix(".weight") for name, value in expected.items()} == {
        name.removesuffix(".weight"): name.removesuffix(".weight") for name in part.keys
    }
    for key, names in part.joined.items():
        expected = tuple(f"v.blk.{{bid}}.attn_{letter}.{key.rpartition('.')[2]}" for letter in "qkv")
        assert names == expected
        for letter, name in zip("qkv", names, strict=True):
            assert expected_name(kind, key.replace("qkv", letter)) in (name, None)  # only Qwen2's are in the table
    patch = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_EMBD_PATCH]
    assert all(names == (f"{patch}.weight", f"{patch}.weight.1") for names in part.frames.values())


def test_every_family_that_a_text_encoder_names_has_an_entry_of_its_own():
    named = {entry.vision for entry in text_encoders.TEXT_ENCODERS} - {""}
    assert set(VISION_PARTS) == named
    parts = [part for entries in VISION_PARTS.values() for part in entries]
    assert len({part.title for part in parts}) == len(parts)
    for part in parts:
        keys = {part.prefix + key for key in part.keys.values()}
        assert all(key.removeprefix("model.").startswith(MODULES) for key in keys)


# -- Values. --


@pytest.mark.parametrize("kind", ["qwen2vl", "qwen3vl"])
def test_q_k_and_v_of_one_type_are_put_together_as_bytes(tmp_path, kind):
    state, values = read(tmp_path, kind, qtype=Q.Q8_0)
    prefix = VISION_PARTS[kind][0].prefix
    weight = state[f"{prefix}blocks.1.attn.qkv.weight"]
    assert (weight.qtype, weight.shape) == (Q.Q8_0, (3 * HIDDEN, HIDDEN))
    file = GGUFFile(tmp_path / "mmproj.gguf")
    stored = [file.data(f"v.blk.1.attn_{letter}.weight") for letter in "qkv"]
    assert torch.equal(weight.data.flatten(), torch.cat(stored))
    for end in ("weight", "bias"):
        joined = torch.cat([values[f"v.blk.1.attn_{letter}.{end}"] for letter in "qkv"])
        assert torch.equal(floats(state[f"{prefix}blocks.1.attn.qkv.{end}"]), joined)


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ((Q.F16, Q.F16, Q.F16), torch.float16),
        ((Q.BF16, Q.BF16, Q.BF16), torch.bfloat16),
        ((Q.F16, Q.BF16, Q.F16), torch.float32),
        ((Q.Q8_0, Q.Q8_0, Q.F16), torch.float32),
        ((Q.Q4_0, Q.Q8_0, Q.Q8_0), torch.float32),
    ],
    ids=str,
)
def test_q_k_and_v_of_any_types_keep_their_values(tmp_path, types, dtype):
    names = [f"v.blk.0.attn_{letter}.weight" for letter in "qkv"]
    state, values = read(tmp_path, "qwen2vl", special=dict(zip(names, types, strict=True)))
    weight = state["visual.blocks.0.attn.qkv.weight"]
    assert weight.dtype == dtype
    assert torch.equal(weight.float(), torch.cat([values[name] for name in names]))


def test_a_fused_qkv_is_taken_as_it_is(tmp_path):
    def fuse(shapes):
        shapes = {name: shape for name, shape in shapes.items() if not re.search(r"attn_[qkv]\.", name)}
        for bid in (0, 1):
            shapes[f"v.blk.{bid}.attn_qkv.weight"] = (3 * HIDDEN, HIDDEN)
            shapes[f"v.blk.{bid}.attn_qkv.bias"] = (3 * HIDDEN,)
        return shapes

    state, values = read(tmp_path, "qwen3vl", qtype=Q.Q8_0, change=fuse)
    weight = state["model.visual.blocks.0.attn.qkv.weight"]
    assert (weight.qtype, weight.shape) == (Q.Q8_0, (3 * HIDDEN, HIDDEN))
    assert torch.equal(weight.dequantize(), values["v.blk.0.attn_qkv.weight"])


def test_frames_become_one_convolution_over_time(tmp_path):
    state, values = read(tmp_path, "qwen2vl")
    weight = state["visual.patch_embed.proj.weight"]
    assert (tuple(weight.shape), weight.dtype) == ((HIDDEN, 3, 2, 14, 14), torch.float16)
    for i, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        assert torch.equal(weight[:, :, i].float(), values[name])


@pytest.mark.parametrize("spelling", ["deepstack", "deepstast"])
def test_deepstack_blocks_are_counted_from_zero(tmp_path, spelling):
    state, values = read(
        tmp_path, "qwen3vl", change=lambda shapes: {k.replace("deepstack", spelling): v for k, v in shapes.items()}
    )
    for rank, bid in enumerate((5, 11, 17)):
        for name, layer in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2")):
            for end in ("weight", "bias"):
                key = f"model.visual.deepstack_merger_list.{rank}.{layer}.{end}"
                assert torch.equal(floats(state[key]), values[f"v.{spelling}.{bid}.{name}.{end}"])
    assert not any(".deepstack_merger_list.3." in key for key in state)


def swap_mlp(shapes):
    """First and last layer of the MLPs under each other's names."""
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return {re.sub("ffn_(up|down)", lambda m: other[m.group()], name): shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("kind", "first"), [("qwen2vl", "visual.blocks.1.mlp.up_proj"), ("gemma3", "fc1")])
def test_older_files_with_the_layers_of_the_mlp_swapped_are_put_right(tmp_path, kind, first):
    first = "vision_model.encoder.layers.1.mlp.fc1" if first == "fc1" else first
    last = first.replace("up_proj", "down_proj").replace("fc1", "fc2")
    state, values = read(tmp_path, kind, change=swap_mlp)
    for end in ("weight", "bias"):
        assert torch.equal(floats(state[f"{first}.{end}"]), values[f"v.blk.1.ffn_down.{end}"])
        assert torch.equal(floats(state[f"{last}.{end}"]), values[f"v.blk.1.ffn_up.{end}"])
    assert state[f"{first}.weight"].shape == (INNER, HIDDEN)


def test_gemma_3_has_its_norm_counted_from_zero_and_tables_as_floats(tmp_path):
    state, values = read(tmp_path, "gemma3", qtype=Q.Q8_0)
    norm = state["multi_modal_projector.mm_soft_emb_norm.weight"]
    assert torch.equal(norm, values["mm.soft_emb_norm.weight"] - 1)
    for name, key in (
        ("v.position_embd.weight", "vision_model.embeddings.position_embedding.weight"),
        ("mm.input_projection.weight", "multi_modal_projector.mm_input_projection_weight"),
    ):
        assert torch.equal(state[key], values[name])
    assert isinstance(state["vision_model.encoder.layers.0.mlp.fc1.weight"], QuantizedBytes)


@pytest.mark.parametrize(("width", "prefix"), [(2560, "model.visual."), (4096, "model.visual."), (5120, "visual.")])
def test_the_prefix_of_qwen3_vl_is_the_one_by_which_comfyui_knows_its_size(tmp_path, width, prefix):
    state, _ = read(tmp_path, "qwen3vl", width=width)
    assert all(key.startswith(prefix) for key in state)
    encoder_file, entry = open_encoder(tmp_path / "text.gguf")
    stand_in = vision.placeholder(encoder_file, entry)
    assert set(stand_in) <= set(state)
    assert f"{prefix}deepstack_merger_list.0.norm.weight" in stand_in
    assert all(value.untyped_storage().nbytes() == 2 and not value.any() for value in stand_in.values())


@pytest.mark.parametrize(("arch", "width"), [("qwen2vl", 3584), ("gemma3", 2560), ("qwen3vl", 2048), ("llama", 4096)])
def test_no_stand_in_where_comfyui_needs_none(tmp_path, arch, width):
    assert vision.placeholder(*open_encoder(write_text_encoder(tmp_path / "text.gguf", arch, width))) == {}


# -- Refusals: one sentence, both files named. --


def refusal(tmp_path, arch="qwen2vl", name="mmproj.gguf", width=WIDTH):
    encoder_file, entry = open_encoder(write_text_encoder(tmp_path / "text.gguf", arch, width))
    with pytest.raises(GGUFError) as caught:
        vision.read(GGUFFile(tmp_path / name), encoder_file, entry)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message


def test_the_vision_part_of_another_family(tmp_path):
    write_part(tmp_path / "mmproj.gguf", "gemma3")
    message = refusal(tmp_path)
    assert "it is the vision part of Gemma 3, but the text encoder text.gguf needs that of Qwen2.5-VL." in message


def test_the_vision_part_of_another_size(tmp_path):
    write_part(tmp_path / "mmproj.gguf", "qwen2vl", width=192)
    message = refusal(tmp_path)
    assert "'mm.2.weight' has shape (192, 256), but the text encoder text.gguf is 128 wide" in message


def test_a_text_encoder_in_place_of_the_vision_part(tmp_path):
    write_text_encoder(tmp_path / "chat.gguf", "llama")
    message = refusal(tmp_path, name="chat.gguf")
    assert "it is no vision part (general.architecture 'llama'), but the text encoder text.gguf needs" in message


def test_a_vision_part_that_is_not_known(tmp_path):
    write_part(tmp_path / "mmproj.gguf", change=lambda shapes: {k: v for k, v in shapes.items() if "mm." not in k})
    assert "it is a vision part that is not known here" in refusal(tmp_path)


def test_a_text_encoder_that_takes_none(tmp_path):
    write_part(tmp_path / "mmproj.gguf")
    message = refusal(tmp_path, arch="llama")
    assert "the text encoder text.gguf is Llama, which takes no vision part" in message


def test_names_that_match_no_rule(tmp_path):
    write_part(tmp_path / "mmproj.gguf", change=lambda shapes: shapes | {"a.blk.0.ln1.weight": (8,)})
    assert "1 tensor names match no rule" in refusal(tmp_path)
    assert "a.blk.0.ln1.weight" in refusal(tmp_path)


def test_q_and_v_without_k(tmp_path):
    write_part(tmp_path / "mmproj.gguf", change=lambda s: {k: v for k, v in s.items() if k != "v.blk.1.attn_k.weight"})
    message = refusal(tmp_path)
    assert "v.blk.1.attn_q.weight, v.blk.1.attn_v.weight" in message


def test_parts_that_do_not_fit_together(tmp_path):
    write_part(tmp_path / "mmproj.gguf", change=lambda shapes: shapes | {"v.blk.1.attn_k.weight": (HIDDEN, 32)})
    assert "have shapes (64, 64), (64, 32), (64, 64), which do not fit together" in refusal(tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        {"v.deepstack.005.norm.weight": (8,)},
        {"v.deepstack.\u0665.norm.weight": (8,)},
        {"v.blk.0.ln1.weight": ()},
        {f"v.blk.0.attn_{letter}.bias": () for letter in "qkv"},
        {"v.patch_embd.weight": (8,), "v.patch_embd.weight.1": (8,)},
        {"v.patch_embd.weight": (8, 0), "v.patch_embd.weight.1": (8, 0)},
        {"mm.2.weight": ()},
        {"v.blk.0.ffn_down.weight": ()},
    ],
    ids=str,
)
def test_odd_names_and_shapes_are_at_most_refused(tmp_path, odd):
    encoder_file, entry = open_encoder(write_text_encoder(tmp_path / "text.gguf", "qwen3vl"))
    write_part(tmp_path / "mmproj.gguf", "qwen3vl", change=lambda shapes: shapes | odd)
    with contextlib.suppress(GGUFError):  # and nothing else
        vision.read(GGUFFile(tmp_path / "mmproj.gguf"), encoder_file, entry)


def test_tags_of_an_odd_type_say_nothing(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "clip")
    writer.add_array("general.type", [1, 2])
    writer.add_array("clip.has_vision_encoder", [True, True])
    writer.add_tensor("x", np.zeros(4, np.float32))
    close(writer)
    assert not vision.is_vision_part(GGUFFile(tmp_path / "odd.gguf"))


def test_a_damaged_vision_part(tmp_path):
    (tmp_path / "mmproj.gguf").write_bytes(b"GGUF\x03")
    encoder_file, entry = open_encoder(write_text_encoder(tmp_path / "text.gguf"))
    with pytest.raises(BadFile, match=r"^mmproj\.gguf: "):
        vision.read(GGUFFile(tmp_path / "mmproj.gguf"), encoder_file, entry)


def test_what_is_a_vision_part(tmp_path):
    for tags in (True, False):
        write_part(tmp_path / "mmproj.gguf", tags=tags)
        assert vision.is_vision_part(GGUFFile(tmp_path / "mmproj.gguf"))
    assert not vision.is_vision_part(GGUFFile(write_text_encoder(tmp_path / "text.gguf")))


def test_a_size_whose_class_sees_no_pictures_takes_no_part(tmp_path):
    """ComfyUI's Qwen2.5-VL 3B is text only; of Qwen3-VL it has no 2B, and would take one with pictures for the 8B."""
    for arch in ("qwen2vl", "qwen3vl"):
        encoder_file, entry = open_encoder(write_text_encoder(tmp_path / "encoder.gguf", arch, width=2048))
        write_part(tmp_path / "mmproj.gguf", arch, width=2048)
        with pytest.raises(
            UnsupportedArch, match=r"mmproj\.gguf: ComfyUI's Qwen.* that is 2048 wide, as encoder\.gguf is"
        ):
            vision.read(GGUFFile(tmp_path / "mmproj.gguf"), encoder_file, entry)
        assert vision_search.find(encoder_file, entry) is None


def test_a_part_inside_the_encoders_own_file_is_read_as_one_beside_it(tmp_path):
    write_part(tmp_path / "mmproj.gguf")
    write_text_encoder(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "both.gguf", "qwen2vl")
    for name in ("text", "mmproj"):
        for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    close(writer)
    (tmp_path / "mmproj.gguf").rename(tmp_path / "mmproj.bak")
    file, entry = open_encoder(tmp_path / "both.gguf")
    part = vision.inside(file)
    assert part is not None
    found = vision.read(part, file, entry)
    expected = vision.read(GGUFFile(tmp_path / "mmproj.bak"), *open_encoder(tmp_path / "text.gguf"))
    assert found.keys() == expected.keys()
    state, info = loader.load_text_encoder(tmp_path / "both.gguf")
    assert found.keys() < state.keys()
    assert info.vision == str(tmp_path / "both.gguf")
    assert not loader.load_text_encoder(tmp_path / "both.gguf", loader.NONE)[0].keys() & found.keys()
    assert vision.inside(open_encoder(tmp_path / "text.gguf")[0]) is None
