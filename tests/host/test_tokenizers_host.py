# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's own tokenizer classes give the same tokens from a rebuilt tokenizer as from the original.

Which classes there are depends on the host: each is tried in every host that has it.
"""

import importlib
import json

import make_tokenizers as make
import numpy as np
import pytest
import torch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import tokenizers

# Module of comfy.text_encoders, class, key of its tokenizer_data, and which of the tokenizers below it gets.
CLASSES = (
    ("wan", "WanT5Tokenizer", "spiece_model", "umt5"),
    ("ace", "UMT5BaseTokenizer", "spiece_model", "umt5"),
    ("lumina2", "LuminaTokenizer", "spiece_model", "gemma"),
    ("lumina2", "NTokenizer", "spiece_model", "gemma"),
    ("pixeldit", "PixelDiTGemma2Tokenizer", "spiece_model", "gemma"),
    ("lt", "LTXAVGemmaTokenizer", "spiece_model", "gemma"),
    ("sa3", "SAT5GemmaTokenizer", "spiece_model", "gemma"),
    ("gemma4", "Gemma4Tokenizer", "tokenizer_json", "gemma4"),
    ("gpt_oss", "LensTokenizer", "tokenizer_json", "gpt-oss"),
)
OLDEST = {"WanT5Tokenizer", "UMT5BaseTokenizer", "LuminaTokenizer", "NTokenizer"}


def host_class(module, name):
    """The class, or None where the host has none."""
    try:
        return getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name, None)
    except ModuleNotFoundError:
        return None


KNOWN = [row for row in CLASSES if host_class(*row[:2])]


def tensor(raw):
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Kind of tokenizer -> its original and what is rebuilt from its GGUF, as uint8 tensors."""
    folder = tmp_path_factory.mktemp("tokenizers")
    umt5 = make.train_spiece(model_type="unigram", byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    gemma = make.train_gemma()
    gemma4 = make.train_gemma4()
    gpt_oss = make.train_gpt_oss()
    tekken = make.train_tekken()
    made = {
        "umt5": (umt5, make.write_t5(folder / "umt5.gguf", umt5), "spiece"),
        "gemma": (gemma, make.write_gemma(folder / "gemma.gguf", gemma), "spiece"),
        "gemma4": (gemma4.to_str().encode(), make.write_gemma4(folder / "gemma4.gguf", gemma4), "json"),
        "gpt-oss": (gpt_oss.to_str().encode(), make.write_gpt_oss(folder / "gpt-oss.gguf", gpt_oss), "json"),
        "tekken": (json.dumps(tekken).encode(), make.write_tekken(folder / "tekken.gguf", tekken), "tekken"),
    }
    return {name: (tensor(raw), tokenizers.build(GGUFFile(path), kind)) for name, (raw, path, kind) in made.items()}


def test_the_host_has_the_classes_that_every_supported_one_has():
    assert {row[1] for row in KNOWN} >= OLDEST


@pytest.mark.parametrize(("module", "name", "key", "made"), KNOWN, ids=[row[1] for row in KNOWN])
def test_the_hosts_tokenizer_gives_the_same_tokens(both, module, name, key, made):
    original, rebuilt = (host_class(module, name)(tokenizer_data={key: raw}) for raw in both[made])
    seen = set()
    for text in make.TEXTS:
        expected, got = (t.tokenize_with_weights(text) for t in (original, rebuilt))
        assert got == expected, text
        seen.add(repr(expected))
    assert len(seen) > len(make.TEXTS) // 2


@pytest.mark.parametrize(("module", "name", "key", "made"), KNOWN, ids=[row[1] for row in KNOWN])
def test_what_the_host_saves_gives_the_same_tokens(both, module, name, key, made):
    rebuilt = host_class(module, name)(tokenizer_data={key: both[made][1]})
    (saved,) = (value for name, value in rebuilt.state_dict().items() if key in name)
    again = host_class(module, name)(tokenizer_data={key: saved})
    for text in make.TEXTS:
        assert again.tokenize_with_weights(text) == rebuilt.tokenize_with_weights(text), text


def test_mistrals_tokenizer_is_made_of_the_same_vocabulary(both, monkeypatch):
    """Newer hosts build it themselves; older ones hand the vocabulary to a class of transformers, in order."""
    flux = importlib.import_module("comfy.text_encoders.flux")
    if hasattr(flux, "from_tekken_json"):
        first, second = (flux.Mistral3Tokenizer(tokenizer_data={"tekken_model": raw}) for raw in both["tekken"])
        for text in (*make.TEXTS, "[SYSTEM_PROMPT]a[/SYSTEM_PROMPT][INST]b[/INST]"):
            assert second.tokenize_with_weights(text) == first.tokenize_with_weights(text), text
        return
    handed = []

    class Converter:
        def __init__(self, vocab, additional_special_tokens):
            handed.append((list(vocab.items()), additional_special_tokens))

        def converted(self):
            return None

    monkeypatch.setattr("transformers.integrations.mistral.MistralConverter", Converter)
    for raw in both["tekken"]:
        flux.load_mistral_tokenizer(raw)
    assert handed[0] == handed[1]
    assert len(handed[0][0]) == 256 + 444 + len(make.TEKKEN_SPECIALS)
