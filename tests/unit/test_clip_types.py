# SPDX-License-Identifier: Apache-2.0
"""Types of the CLIP loaders: what auto takes, and the words of refusals."""

import pytest
from gguf_kit.models.clip_types import ENCODERS, KNOWN_TYPES, USES, needed, resolve
from gguf_kit.models.text_encoder_table import TEXT_ENCODERS

ONE = ("stable_diffusion", "stable_cascade", "sd3", "ltxv", "pixart", "lumina2", "wan", "hidream", "chroma", "flux2")
TWO = ("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image", "kandinsky5", "ltxv", "ace")


def test_the_table_speaks_of_encoders_and_families_that_there_are():
    assert {name for use in USES for slot in use.slots for name in slot} == set(ENCODERS)
    families = {entry.title for entry in TEXT_ENCODERS}
    assert {family for encoder in ENCODERS.values() for family in encoder.families} == families


@pytest.mark.parametrize(
    ("encoders", "offered", "expected"),
    [
        (["UMT5_XXL"], ONE, "wan"),
        (["LLAMA3_8"], ONE, "hidream"),
        (["MISTRAL3_24B_PRUNED_FLUX2"], ONE, "flux2"),
        (["GEMMA_2_2B"], ONE, "lumina2"),  # this loader has no pixeldit
        (["QWEN3_06B"], ONE, "stable_diffusion"),
        (["QWEN35_4B"], ONE, "stable_diffusion"),
        (["LLAMA3_8", "CLIP_L"], ("hunyuan_video",), "hunyuan_video"),
        (["QWEN3_4B", "QWEN3_06B"], TWO, "ace"),
        (["CLIP_L", "CLIP_G", "T5_XXL"], ("sd3",), "sd3"),
    ],
)
def test_auto_takes_the_one_use_that_files_have(encoders, offered, expected):
    assert resolve("auto", encoders, offered) == (expected, "")


def test_auto_names_the_types_between_which_files_do_not_decide():
    words = "type 'auto' cannot tell what T5-XXL is wanted for: sd3, ltxv, pixart or hidream"
    assert resolve("auto", ["T5_XXL"], ONE) == ("", words)
    words = "type 'auto' cannot tell what CLIP-L + T5-XXL is wanted for: sd3, flux or hidream"
    assert resolve("auto", ["CLIP_L", "T5_XXL"], TWO) == ("", words)


@pytest.mark.parametrize(
    ("type_name", "encoders", "words"),
    [
        ("wan", ["T5_XXL"], "type 'wan' takes UMT5-XXL, and this is T5-XXL, which is for sd3, ltxv"),
        (
            "flux2",
            ["GEMMA_2_2B"],
            "type 'flux2' takes Mistral Small 24B, Mistral Small 24B (pruned), Ministral 3B, Qwen3",
        ),
        (
            "sdxl",
            ["CLIP_L", "T5_XXL"],
            "type 'sdxl' takes CLIP-L + CLIP-G, and this is CLIP-L + T5-XXL, which is for sd3",
        ),
        ("ltxv", ["LLAMA3_8", "T5_XXL"], "type 'ltxv' takes Gemma 3 12B, Gemma 4"),
        (
            "flux",
            ["CLIP_L", "CLIP_L"],
            "type 'flux' takes CLIP-L + T5-XXL, and this is CLIP-L + CLIP-L, for which there is no type here",
        ),
        (
            "sd3",
            ["BYT5_SMALL_GLYPH"],
            "type 'sd3' takes CLIP-L, CLIP-G or T5-XXL, and this is ByT5 small (glyphs), for which there is no type",
        ),
    ],
)
def test_a_mismatch_names_type_and_encoder(type_name, encoders, words):
    type_found, problem = resolve(type_name, encoders, ONE if len(encoders) == 1 else TWO)
    assert type_found == ""
    assert problem.startswith(words)


def test_any_type_will_do_for_encoders_that_no_type_names():
    assert all(resolve(type_name, ["QWEN35_9B"], ONE) == (type_name, "") for type_name in ONE)
    assert needed("hunyuan_image", 2) == "takes Qwen2.5-VL 7B + ByT5 small (glyphs)"


def test_a_type_that_the_table_does_not_know_is_left_to_the_host():
    assert resolve("flux3", ["QWEN3VL_4B"], (*ONE, "flux3")) == ("flux3", "")
    assert "flux3" not in KNOWN_TYPES
    assert set(ONE) | set(TWO) <= KNOWN_TYPES


# Of ComfyUI's own templates: the encoder and the type that their loader has.
TEMPLATES = [
    ("QWEN3_4B", "ltxv"),
    ("QWEN3VL_4B", "ideogram4"),
    ("QWEN3VL_8B", "qwen_image"),
    ("QWEN3_06B", "qwen_image"),
]
TEMPLATES += [("QWEN3_4B", "lumina2"), ("QWEN3_8B", "flux2"), ("MINISTRAL_3_3B", "flux2"), ("GEMMA_3_12B", "ltxv")]


@pytest.mark.parametrize(("encoder", "type_name"), TEMPLATES)
def test_what_published_workflows_choose_is_taken(encoder, type_name):
    assert resolve(type_name, [encoder], KNOWN_TYPES) == (type_name, "")
