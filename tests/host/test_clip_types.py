# SPDX-License-Identifier: Apache-2.0
"""Which encoders belong to which type: the table against what the running host does, and what the nodes make of it."""

import itertools
import types

import comfy.sd
import pytest
from gguf_kit.models.clip_types import ENCODERS, USES, resolve
from gguf_kit.service import clip_types

HOST_NAMES = {"UMT5_XXL": "T5_XXL", "UMT5_BASE": "T5_BASE"}
UNKNOWN_TO_THE_ENUM = {"LTX_PROJECTION"}  # parts that the host finds by their keys


def in_host(name):
    return name in UNKNOWN_TO_THE_ENUM or hasattr(comfy.sd.TEModel, HOST_NAMES.get(name, name))


def outcome(monkeypatch, encoders, type_name):
    """Names of the model class and the tokenizer class that the host takes for detected encoders and a type."""
    made = []

    def record(target, **kwargs):
        made.append(target)
        return types.SimpleNamespace(load_sd=lambda state: ((), ()))

    detected = {str(i): name for i, name in enumerate(encoders)}
    members = {
        i: getattr(comfy.sd.TEModel, HOST_NAMES.get(name, name), None) if name not in UNKNOWN_TO_THE_ENUM else None
        for i, name in detected.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(comfy.sd, "detect_te_model", lambda state: members[state["number"]])
        patch.setattr(comfy.sd, "CLIP", record)
        patch.setattr(comfy.utils, "calculate_parameters", lambda state: 0)
        clip_type = getattr(comfy.sd.CLIPType, type_name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
        states = [
            {"number": i, "spiece_model": None} if name == "UMT5_BASE" else {"number": i}
            for i, name in detected.items()
        ]
        comfy.sd.load_text_encoder_state_dicts(states, clip_type=clip_type)
    return described(made[0].clip), described(made[0].tokenizer)


def described(made):
    """A class by its name and by what the function that made it was told."""
    name = f"{made.__module__}.{made.__qualname__}"
    init = made.__init__
    cells = init.__closure__ or () if isinstance(init, types.FunctionType) else ()
    values = [cell.cell_contents for cell in cells]
    return name, sorted(repr(value) for value in values if isinstance(value, (bool, str)))


def single_uses():
    """(encoder, its uses in this host with the types that it offers) for each encoder of this host."""
    offered = clip_types(1)
    for name in ENCODERS:
        uses = [[t for t in use.types if t in offered] for use in USES if use.takes([name])]
        if in_host(name) and uses:
            yield name, [u for u in uses if u]


@pytest.mark.parametrize(("encoder", "uses"), single_uses(), ids=lambda value: value if isinstance(value, str) else "")
def test_types_of_one_use_give_one_model_and_those_of_others_another(monkeypatch, encoder, uses):
    made = [[outcome(monkeypatch, [encoder], type_name) for type_name in use] for use in uses]
    for one_use in made:
        assert all(result == one_use[0] for result in one_use)
    knows_klein = hasattr(comfy.sd.TEModel, "QWEN3_8B")  # older hosts make one thing of Qwen3 4B, whatever the type
    for one, other in itertools.combinations(made, 2):
        assert one[0] != other[0] or (encoder == "QWEN3_4B" and not knows_klein)


def test_types_that_no_use_names_are_those_of_other_encoders(monkeypatch):
    """A type of the host that the table has forgotten would be refused for every encoder."""
    for n_files in (1, 2):
        named = {name for use in USES if len(use.slots) == n_files for name in use.types}
        assert set(clip_types(n_files)) <= named


PAIRS = {
    "sdxl": ["CLIP_L", "CLIP_G"],
    "flux": ["CLIP_L", "T5_XXL"],
    "sd3": ["CLIP_G", "T5_XXL"],
    "hunyuan_video": ["LLAMA3_8", "CLIP_L"],
    "hunyuan_image": ["QWEN25_7B", "BYT5_SMALL_GLYPH"],
}


@pytest.mark.parametrize("type_name", PAIRS)
def test_pairs_are_taken_in_any_order(type_name):
    for order in (PAIRS[type_name], PAIRS[type_name][::-1]):
        assert resolve(type_name, order, clip_types(2)) == (type_name, "")
