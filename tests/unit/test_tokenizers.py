# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that went through a GGUF give the ids of the original; others are refused in one sentence."""

import base64
import json
import math
import os
import struct

import gguf_builder
import make_tokenizers as make
import pytest
import sentencepiece
import tokenizers as hf
from gguf import TokenType
from gguf_kit.errors import BadFile, GGUFError, UnsupportedArch
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import tokenizers

# A GGUF of Gemma 3 that llama.cpp made; too large to lie here.
GEMMA3 = os.environ.get("GGUF_KIT_TEST_GEMMA3", "")
SYMBOLS = {"user_defined_symbols": ["<turn>", "<a b>", "▁▁"], "control_symbols": ["<ctl>"]}


def build(path, kind):
    """The bytes of a file's tokenizer."""
    tensor = tokenizers.build(GGUFFile(path), kind)
    assert str(tensor.dtype) == "torch.uint8"
    assert tensor.dim() == 1
    return tensor.numpy().tobytes()


def assert_same_pieces(model, path, **ends):
    """The rebuilt model cuts every text into the pieces of the original, and reads them back."""
    first, second = (
        sentencepiece.SentencePieceProcessor(model_proto=raw, **ends) for raw in (model, build(path, "spiece"))
    )
    for text in make.TEXTS:
        ids = first.encode(text)
        assert second.encode(text) == ids, (text, first.encode(text, out_type=str), second.encode(text, out_type=str))
        assert second.decode(ids) == first.decode(ids)
    return first, second


@pytest.mark.parametrize("byte_fallback", [False, True], ids=["", "bytes"])
@pytest.mark.parametrize("normalizer", ["nmt_nfkc", "nfkc_cf", "identity"])
def test_a_unigram_model_gives_the_same_ids(tmp_path, normalizer, byte_fallback):
    options = {"normalization_rule_name": normalizer, "byte_fallback": byte_fallback, "pad_id": 3}
    model = make.train_spiece(model_type="unigram", **SYMBOLS, **options)
    first, second = assert_same_pieces(model, make.write_t5(tmp_path / "t5.gguf", model), add_eos=True)
    assert second.eos_id() == first.eos_id() >= 0
    assert second.pad_id() == first.pad_id()


def test_umt5s_order_of_special_pieces_is_kept(tmp_path):
    model = make.train_spiece(model_type="unigram", byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    _, second = assert_same_pieces(model, make.write_t5(tmp_path / "umt5.gguf", model), add_eos=True)
    assert (second.pad_id(), second.eos_id(), second.unk_id(), second.bos_id()) == (0, 1, 2, -1)
    assert second.encode("") == [1]


@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("collapse", [False, True], ids=["all spaces", "one space"])
def test_the_treatment_of_spaces_is_kept(tmp_path, prefix, collapse):
    model = make.train_spiece(model_type="unigram", add_dummy_prefix=prefix, remove_extra_whitespaces=collapse)
    assert_same_pieces(model, make.write_t5(tmp_path / "t5.gguf", model))


def test_a_bpe_model_gives_the_same_ids(tmp_path):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    model = make.train_spiece(model_type="bpe", **SYMBOLS, **options)
    arrays = make.spiece_arrays(model, 1000)
    path = make.write_gguf(tmp_path / "llama.gguf", "llama", "llama", arrays, roles={"bos": 1, "eos": 2, "pad": 0})
    _, second = assert_same_pieces(model, path, add_bos=True)
    assert second.encode("")[0] == 1


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_gemma_gives_the_same_ids_though_its_types_were_changed(tmp_path, arch):
    model = make.train_gemma()
    path = make.write_gemma(tmp_path / "gemma.gguf", model, arch)
    _, second = assert_same_pieces(model, path, add_bos=True)
    assert [second.bos_id(), second.eos_id(), second.pad_id(), second.unk_id()] == [2, 1, 0, 3]
    assert "<start_of_turn>" in second.encode("<start_of_turn>user", out_type=str)


def test_a_gemma_without_the_key_for_the_prefix_adds_none(tmp_path):
    model = make.train_gemma()
    assert_same_pieces(model, make.write_gemma(tmp_path / "gemma.gguf", model, spaces={}), add_bos=True)


def test_a_gemma_whose_end_of_text_is_its_end_of_turn_still_finds_the_turns(tmp_path):
    model = make.train_gemma()
    end_of_turn = 4 + make.GEMMA_SYMBOLS.index("<end_of_turn>")
    path = make.write_gemma(tmp_path / "gemma.gguf", model, roles=make.GEMMA_ROLES | {"eos": end_of_turn})
    _, second = assert_same_pieces(model, path, add_bos=True)
    assert second.eos_id() == 1
    assert end_of_turn in second.encode("a<end_of_turn>b")


def test_a_byte_piece_that_became_its_character_is_one_again(tmp_path):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    model = make.train_spiece(model_type="bpe", **options)
    arrays = make.spiece_arrays(model)
    tab = arrays.tokens.index("<0x09>")
    arrays.set(tab, "\t", -1000.0, TokenType.USER_DEFINED)
    path = make.write_gguf(tmp_path / "gemma.gguf", "llama", "llama", arrays, roles={"bos": 1})
    _, second = assert_same_pieces(model, path)
    assert tab in second.encode("a\tb")


def test_the_message_has_the_fields_of_a_sentencepiece_model(tmp_path):
    model = make.train_spiece(model_type="unigram", byte_fallback=True, pad_id=3)
    ours = make.read_message(build(make.write_t5(tmp_path / "t5.gguf", model), "spiece"))
    pieces = [dict(make.read_message(value)) for number, value in ours if number == 1]
    original = [dict(make.read_message(value)) for number, value in make.read_message(model) if number == 1]
    for got, expected in zip(pieces, original, strict=False):  # behind them stands the padding of the embedding
        assert got == {1: expected[1], 2: expected[2], 3: expected.get(3, 1)}
    trainer, normalizer = (dict(make.read_message(dict(ours)[number])) for number in (2, 3))
    assert trainer == {3: 1, 4: len(pieces), 35: 1, 40: 0, 41: 1, 42: 2, 43: 3,
                       45: b"<unk>", 46: b"<s>", 47: b"</s>", 48: b"<pad>"}  # fmt: skip
    assert normalizer.pop(1) == b"gguf"
    assert normalizer == {2: make.normalizer_of(model)[2], 3: 1, 4: 1, 5: 1}


def test_of_several_unknown_tokens_the_one_that_the_file_names_is_taken(tmp_path):
    arrays = renamed(llama_arrays(), 3, "<oov>", TokenType.UNKNOWN)
    path = make.write_gguf(tmp_path / "unknown.gguf", "llama", "llama", arrays, roles={"bos": 1, "unk": 3})
    processor = sentencepiece.SentencePieceProcessor(model_proto=build(path, "spiece"))
    assert (processor.unk_id(), processor.is_control(0)) == (3, True)


def test_long_pieces_get_lengths_of_two_bytes(tmp_path):
    arrays = llama_arrays()
    arrays.add("猫" * 100, -9.0, TokenType.USER_DEFINED)
    path = make.write_gguf(tmp_path / "long.gguf", "llama", "llama", arrays, roles={"bos": 1})
    processor = sentencepiece.SentencePieceProcessor(model_proto=build(path, "spiece"))
    assert processor.encode("猫" * 100)[-1] == len(arrays.tokens) - 1


def test_tekken_is_rebuilt_word_for_word(tmp_path):
    tekken = make.train_tekken()
    assert json.loads(build(make.write_tekken(tmp_path / "tekken.gguf", tekken), "tekken")) == tekken


def test_tekken_leaves_out_the_padding_of_the_embedding(tmp_path):
    arrays = tekken_arrays()
    arrays.add("[PAD300]", 0.0, TokenType.UNUSED)
    made = json.loads(build(make.write_gguf(tmp_path / "t.gguf", "llama", "gpt2", arrays), "tekken"))
    assert made["config"]["default_vocab_size"] == 258
    assert [base64.b64decode(word["token_bytes"])[0] for word in made["vocab"]] == list(range(256))
    assert made["special_tokens"] == [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]


def assert_same_tokens(original, path, *texts):
    rebuilt = hf.Tokenizer.from_str(build(path, "json").decode())
    for text in (*make.TEXTS, *texts):
        expected, got = original.encode(text), rebuilt.encode(text)
        assert got.ids == expected.ids, (text, expected.tokens, got.tokens)
        for skip in (False, True):
            assert rebuilt.decode(got.ids, skip_special_tokens=skip) == original.decode(
                got.ids, skip_special_tokens=skip
            )


def test_gemma_4_gives_the_same_ids_and_text(tmp_path):
    original = make.train_gemma4()
    path = make.write_gemma4(tmp_path / "gemma4.gguf", original)
    assert_same_tokens(original, path, "<|turn>user\n\nhi  there<turn|>", "x<unused0>y <mask>")


def test_a_gemma_4_whose_merges_were_cut_off_is_refused(tmp_path, monkeypatch):
    original = make.train_gemma4()
    path = make.write_gemma4(tmp_path / "gemma4.gguf", original, merges=["\u2581 \u2581"])
    monkeypatch.setattr(tokenizers, "MAX_UNMERGED", 100)
    with pytest.raises(BadFile, match=r"all but \d+ of \d+ tokens, so merges are missing"):
        build(path, "json")


def test_gpt_oss_gives_the_same_ids_and_text(tmp_path):
    original = make.train_gpt_oss()
    path = make.write_gpt_oss(tmp_path / "gpt-oss.gguf", original)
    assert_same_tokens(original, path, "<|start|>system<|message|>You are<|end|>")


def test_a_tokenizer_json_that_the_file_carries_is_taken_as_it_is(tmp_path):
    text = '{"model": {"type": "BPE"}}'
    path = tmp_path / "carried.gguf"
    path.write_bytes(gguf_builder.build_gguf({"tokenizer.huggingface.json": (gguf_builder.STRING, text)}, []))
    assert build(path, "json") == text.encode()
    path.write_bytes(gguf_builder.build_gguf({"tokenizer.huggingface.json": (gguf_builder.STRING, "{")}, []))
    with pytest.raises(BadFile, match="is not JSON"):
        build(path, "json")


def llama_arrays():
    """The smallest vocabulary of sentencepiece's kind."""
    arrays = make.Arrays()
    for token, kind in (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)):
        arrays.add(token, 0.0, kind)
    for i, token in enumerate(("ab", "a", "b", "\u2581")):
        arrays.add(token, -1.0 - i, TokenType.NORMAL)
    return arrays


def tekken_arrays():
    """The smallest vocabulary of tekken's kind: two special tokens and the bytes."""
    arrays = make.Arrays()
    for token in ("<unk>", "<s>"):
        arrays.add(token, 0.0, TokenType.CONTROL)
    to_char = {byte: char for char, byte in tokenizers.BYTE_ALPHABET.items()}
    for i in range(256):
        arrays.add(to_char[i], 0.0, TokenType.NORMAL)
    return arrays


def renamed(arrays, i, token, kind=TokenType.NORMAL):
    """Arrays with another token at one place."""
    arrays.set(i, token, -1, kind)
    return arrays


def retyped(arrays, i, kind):
    """Arrays with another type at one place."""
    arrays.types[i] = kind
    return arrays


def longer(arrays, token, kind=TokenType.NORMAL):
    """Arrays with one more token."""
    arrays.add(token, 0, kind)
    return arrays


def shorter(arrays, name):
    """Arrays one of which lacks its last item."""
    getattr(arrays, name).pop()
    return arrays


def scored(score):
    """Arrays with one score replaced, or without any."""
    arrays = llama_arrays()
    arrays.scores = [] if score is None else [*arrays.scores[:-1], score]
    return arrays


def broken_charsmap(root=None, n_texts=None):
    """The character map of nmt_nfkc with another first unit in its double array, or fewer bytes of text."""
    charsmap = bytearray(make.normalizer_of(make.train_spiece(model_type="unigram"))[2])
    if root is not None:
        struct.pack_into("<I", charsmap, 4, root)
    if n_texts is not None:
        del charsmap[4 + int.from_bytes(charsmap[:4], "little") : -n_texts]
    return bytes(charsmap)


L, T = llama_arrays, tekken_arrays
CONTROL, BYTE = TokenType.CONTROL, TokenType.BYTE
GPT = {"pre": "gpt-4o"}
MAP_OUT, MAP_TEXT_OUT = {"charsmap": {"root": 0x7FFFFC00}}, {"charsmap": {"n_texts": 1}}
# What is wrong, kind of tokenizer, llama.cpp's name for it, arrays, further metadata, error, what the message says.
WRONG = (
    ("no scores", "spiece", "llama", scored(None), {}, UnsupportedArch, "ggml.scores'"),
    ("a score of nan", "spiece", "t5", scored(math.nan), {}, BadFile, "has nan for a score"),
    ("fewer scores", "spiece", "llama", shorter(L(), "scores"), {}, BadFile, "6 items for 7 tokens"),
    ("fewer types", "spiece", "t5", shorter(L(), "types"), {}, BadFile, "6 items for 7 tokens"),
    ("type 9", "spiece", "t5", retyped(L(), 3, 9), {}, BadFile, "token 3 the type 9"),
    ("type -1", "tekken", "gpt2", retyped(T(), 3, -1), {}, BadFile, "token 3 the type -1"),
    ("a token twice", "spiece", "t5", renamed(L(), 3, "b"), {}, BadFile, "'b' twice, as token 3 and 5"),
    ("an empty token", "spiece", "t5", renamed(L(), 3, ""), {}, BadFile, "token 3 with 0 characters"),
    ("a huge token", "tekken", "gpt2", renamed(T(), 3, "a" * 9999), {}, BadFile, "token 3 with 9999 characters"),
    ("a zero byte", "spiece", "t5", renamed(L(), 3, "a\0"), {}, BadFile, "a token with a zero byte"),
    ("no UTF-8", "spiece", "t5", renamed(L(), 3, b"\xff"), {}, BadFile, "not UTF-8"),
    ("no unknown", "spiece", "t5", renamed(L(), 0, "x"), {}, BadFile, "ggml.unknown_token_id' is missing"),
    ("no end", "spiece", "t5", renamed(L(), 2, "x", CONTROL), {}, BadFile, "ggml.eos_token_id' is missing"),
    ("no beginning", "spiece", "llama", renamed(L(), 1, "x", CONTROL), {}, BadFile, "ggml.bos_token_id' is missing"),
    ("an id too large", "spiece", "llama", L(), {"roles": {"bos": 7}}, BadFile, "is 7, expected the id of one of 7"),
    ("one byte", "spiece", "t5", longer(L(), "<0x41>", BYTE), {}, BadFile, "marks 1 tokens as bytes"),
    ("an odd byte", "spiece", "t5", longer(L(), "<0x4>", BYTE), {}, BadFile, "marks 1 tokens as bytes"),
    ("another kind", "spiece", "bert", L(), {}, UnsupportedArch, "'bert', expected 't5' or 'llama'"),
    ("an odd flag", "spiece", "t5", L(), {"odd": ("add_space_prefix", 1)}, BadFile, "is 1, expected a bool"),
    ("a short map", "spiece", "t5", L(), {"charsmap": b"\0\4\0\0abc\0"}, BadFile, "8 bytes that are no character map"),
    ("a map that leads out", "spiece", "t5", L(), MAP_OUT, BadFile, "points outside of itself"),
    ("a map whose text is outside", "spiece", "t5", L(), MAP_TEXT_OUT, BadFile, "points outside of itself"),
    ("special behind", "tekken", "gpt2", longer(T(), "<x>", CONTROL), {}, BadFile, "special tokens after the ordinary"),
    ("special between", "tekken", "gpt2", retyped(T(), 9, CONTROL), {}, BadFile, "does not list special tokens first"),
    ("no special", "tekken", "gpt2", retyped(T(), 0, 1), {}, BadFile, "does not list special tokens first"),
    (
        "a foreign letter",
        "tekken",
        "gpt2",
        longer(T(), "\u732b"),
        {},
        BadFile,
        "character '\\u732b', which spells no byte",
    ),
    ("255 bytes", "tekken", "gpt2", renamed(T(), 40, "ab"), {}, BadFile, "no token for 1 of 256 bytes"),
    ("sentencepiece", "tekken", "llama", L(), {}, UnsupportedArch, "'llama', expected 'gpt2'"),
    ("no merges", "json", "gpt2", T(), GPT, UnsupportedArch, "ggml.merges'"),
    ("a merge of one", "json", "gpt2", T(), {**GPT, "merges": ["ab"]}, BadFile, "'ab' as merge 0"),
    ("a merge to nothing", "json", "gpt2", T(), {**GPT, "merges": ["a b"]}, BadFile, "'a b' as merge 0"),
    ("a merge of three", "json", "gpt2", T(), {**GPT, "merges": ["a b c"]}, BadFile, "'a b c' as merge 0"),
    ("a rule of words", "json", "gpt2", T(), {"pre": "qwen9"}, UnsupportedArch, "'qwen9', which is not known"),
    ("no rule of words", "json", "gpt2", T(), {}, UnsupportedArch, "ggml.pre'"),
    ("gemma 3 for 4", "json", "llama", L(), {}, UnsupportedArch, "'llama', expected 'gemma4' or 'gpt2'"),
)


@pytest.mark.parametrize("case", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_vocabulary_is_refused_in_one_sentence(tmp_path, case):
    kind, model, arrays, more, error, says = case
    more = dict(more)
    if isinstance(more.get("charsmap"), dict):
        more["charsmap"] = broken_charsmap(**more["charsmap"])
    path = tmp_path / "wrong.gguf"
    if "odd" in more:
        write_odd_flag(path, arrays, model, *more["odd"])
    else:
        make.write_gguf(path, "any", model, arrays, **more)
    with pytest.raises(GGUFError) as caught:
        build(path, kind)
    message = str(caught.value)
    assert type(caught.value) is error
    assert says in message
    assert message.startswith("wrong.gguf: ")
    assert "\n" not in message
    assert caught.value.hint


def write_odd_flag(path, arrays, model, name, value):
    """A file one of whose flags is a number."""
    b = gguf_builder
    metadata = {
        "model": (b.STRING, model),
        "tokens": (b.ARRAY, (b.STRING, arrays.tokens)),
        "scores": (b.ARRAY, (b.F32, arrays.scores)),
        "token_type": (b.ARRAY, (b.I32, arrays.types)),
        name: (b.U32, value),
    }
    path.write_bytes(b.build_gguf({f"tokenizer.ggml.{key}": typed for key, typed in metadata.items()}, []))


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_file_without_tokenizer_is_refused(tmp_path, kind):
    path = tmp_path / "bare.gguf"
    path.write_bytes(gguf_builder.build_gguf({}, []))
    with pytest.raises(UnsupportedArch, match=r"it has no metadata key 'tokenizer\.ggml"):
        build(path, kind)


@pytest.mark.parametrize("normalizer", ["nmt_nfkc", "nmt_nfkc_cf", "nfkc"])
def test_every_sound_character_map_is_taken(tmp_path, normalizer):
    model = make.train_spiece(model_type="unigram", normalization_rule_name=normalizer, vocab_size=300)
    assert make.normalizer_of(build(make.write_t5(tmp_path / "t5.gguf", model), "spiece"))[2]


def test_a_vocabulary_as_large_as_gemmas_is_rebuilt_whole(tmp_path):
    n_tokens = make.LARGE_VOCABULARY
    spiece = build(make.write_large(tmp_path / "llama.gguf", "llama"), "spiece")
    assert sentencepiece.SentencePieceProcessor(model_proto=spiece).vocab_size() == n_tokens
    model = json.loads(build(make.write_large(tmp_path / "gemma4.gguf", "gemma4"), "json"))["model"]
    assert len(model["vocab"]) == n_tokens
    assert len(model["merges"]) == make.LARGE_MERGES


# Ids that Gemma 3 is known by, and texts whose ids another BPE implementation gives from the same vocabulary.
GEMMA3_IDS = {
    "Hello world": [9259, 1902],
    "<start_of_turn>user\n": [105, 2364, 107],
    "<end_of_turn>\n<start_of_turn>model\n": [106, 107, 105, 4368, 107],
    "a  b\n\n\tc": [236746, 138, 236763, 108, 255968, 236755],
}


@pytest.mark.slow
@pytest.mark.skipif(not GEMMA3, reason="GGUF_KIT_TEST_GEMMA3 names no file")
def test_the_real_gemma_3_gives_its_known_ids():
    file = GGUFFile(GEMMA3)
    model = tokenizers.build(file, "spiece").numpy().tobytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert {text: processor.encode(text) for text in GEMMA3_IDS} == GEMMA3_IDS
    other = merge_by_rank(file)
    for text in make.TEXTS:
        assert processor.encode(text) == other.encode(text).ids, text


def merge_by_rank(file):
    """The vocabulary of a Gemma 3 in Hugging Face's BPE, its merges derived from the scores as transformers does it."""
    types, scores = (file.metadata[f"tokenizer.ggml.{key}"].tolist() for key in ("token_type", "scores"))
    typed = [
        (token, TokenType(kind)) for token, kind in zip(file.metadata["tokenizer.ggml.tokens"], types, strict=True)
    ]
    typed = [(t.replace(" ", "\u2581") if kind == TokenType.USER_DEFINED else t, kind) for t, kind in typed]
    ids = {token: i for i, (token, _) in enumerate(typed)}
    normal = {token for token, kind in typed if kind == TokenType.NORMAL}
    merges = [(t[:i], t[i:]) for t in normal for i in range(1, len(t)) if t[:i] in normal and t[i:] in normal]
    merges.sort(key=lambda pair: (-scores[ids[pair[0] + pair[1]]], ids[pair[0]], ids[pair[1]]))
    bpe = hf.models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = hf.Tokenizer(bpe)
    tokenizer.normalizer = hf.normalizers.Replace(" ", "\u2581")
    whole = {token for token, kind in typed if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)}
    whole -= {"<bos>", "<eos>", "<pad>", "<unk>"}
    tokenizer.add_tokens([hf.AddedToken(token, normalized="\u2581" in token) for token in sorted(whole)])
    return tokenizer
