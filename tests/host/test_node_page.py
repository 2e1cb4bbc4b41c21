# SPDX-License-Identifier: Apache-2.0
"""What people see of a node before it runs: names, tooltips, search words, help, translations."""

import json
import os
import re
from pathlib import Path

import app.custom_node_manager
import folder_paths
import make_locales
import pytest
from gguf_kit import nodes, saver, service
from gguf_kit.models import clip_types

NODES = list(nodes.NODE_CLASS_MAPPINGS)
TITLES = nodes.NODE_DISPLAY_NAME_MAPPINGS
PACK = Path(nodes.__file__).parent
DOCS, LOCALES = PACK / "web" / "docs", PACK / "locales"
CATEGORIES = {
    "SaveGGUF": "advanced/model_merging",
    "SaveGGUFCLIP": "advanced/model_merging",
    "ImatrixCollectorGGUF": "advanced/gguf",
}


def inputs_of(node_id):
    groups = nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES().values()
    return {name: options for group in groups for name, (_, options) in group.items()}


def locale(language, name="nodeDefs"):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


# -- definitions --


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_says_what_it_is_and_takes_and_gives(node_id):
    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    assert TITLES.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    assert "GGUF" in TITLES[node_id]
    assert list(TITLES.values()).count(TITLES[node_id]) == 1
    assert node.CATEGORY == CATEGORIES.get(node_id, "loaders/gguf")
    assert node.DESCRIPTION.endswith(".")
    assert callable(getattr(node, node.FUNCTION))
    assert [name for name, options in inputs_of(node_id).items() if not options.get("tooltip", "").endswith(".")] == []
    tooltips = getattr(node, "OUTPUT_TOOLTIPS", ())
    assert len(tooltips) == len(node.RETURN_TYPES)
    assert all(tooltip.endswith(".") for tooltip in tooltips)


@pytest.mark.parametrize("node_id", NODES)
def test_search_words_are_a_tuple_of_lower_case_words_without_repeats(node_id):
    aliases = nodes.NODE_CLASS_MAPPINGS[node_id].SEARCH_ALIASES
    assert isinstance(aliases, tuple)
    assert {"gguf", "quant"} <= {*aliases} or node_id == "ImatrixCollectorGGUF"
    assert len({*aliases}) == len(aliases)
    assert all(alias == alias.lower().strip() for alias in aliases)


@pytest.mark.parametrize(
    ("words", "node_id"),
    [
        ("unet", "UnetLoaderGGUF"),
        ("gguf loader", "UnetLoaderGGUF"),
        ("load model", "UnetLoaderGGUF"),
        ("clip", "CLIPLoaderGGUF"),
        ("text encoder", "DualCLIPLoaderGGUF"),
        ("quantize", "SaveGGUF"),
        ("checkpoint", "CheckpointLoaderGGUF"),
        ("lora", "LoraLoaderModelOnlyGGUF"),
        ("imatrix", "ImatrixCollectorGGUF"),
    ],
)
def test_what_people_type_is_in_a_nodes_words(words, node_id):
    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    assert any(words in text.lower() for text in (TITLES[node_id], *node.SEARCH_ALIASES))


# -- help pages --

INPUT_TITLES = {"en": "Inputs", "zh": "输入"}
TYPE_TITLES = {"en": "Which type takes what", "zh": "各类型对应的编码器"}
ERROR_TITLES = {"en": "When something is wrong", "zh": "出错时怎么办"}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_names_every_input_and_what_to_do_about_errors(node_id, language):
    text = page_of(node_id, language)
    assert text.startswith(f"# {locale(language)[node_id]['display_name']}\n")
    names = [item[0] for item in items_of(text, INPUT_TITLES[language])]
    assert sorted(re.findall(r"\*\*(\w+)\*\*", " ".join(names))) == sorted(inputs_of(node_id))
    assert items_of(text, ERROR_TITLES[language])
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert [name for name in pictures if not (DOCS / name).is_file()] == []


def page_of(node_id, language):
    return (DOCS / node_id / f"{language}.md").read_text(encoding="utf-8")


def items_of(text, title):
    """(what stands before the colon, what follows) of each item of a section's list."""
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^- (.*?)(?:: |\uff1a)(.*(?:\n  .*)*)", section, re.MULTILINE)


@pytest.mark.parametrize("node_id", NODES)
def test_both_languages_have_the_same_parts(node_id):
    texts = [page_of(node_id, language) for language in ("en", "zh")]
    en, zh = (re.findall(r"^(?:#+ |- |\d\. |!)", text, re.MULTILINE) for text in texts)
    assert en == zh
    assert len(re.findall("[\u4e00-\u9fff]", texts[1])) > 150
    assert "\n|" not in "".join(texts), "the help panel is narrow and cuts tables"


@pytest.mark.parametrize("node_id", NODES)
def test_other_languages_get_the_english_page(node_id):
    path, content = make_locales.fallback_page(DOCS, node_id)
    assert path.read_bytes() == content, "run: COMFYUI_PATH=... python tests/make_locales.py"


def test_no_help_page_is_left_over():
    """The frontend asks for ID/LANGUAGE.md, then for ID.md; a page elsewhere would be seen by nobody."""
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    names = [f"{node_id}{end}" for node_id in NODES for end in ("/en.md", "/zh.md", ".md")]
    assert pages == {*names}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", [name for name in NODES if "CLIPLoader" in name])
def test_help_of_clip_loaders_has_their_types(node_id, language):
    text, n_files = page_of(node_id, language), nodes.NODE_CLASS_MAPPINGS[node_id].N_FILES
    refusals = re.findall(r"\*type '(\w+)' (takes .*?), and this is", text)
    assert [(name, clip_types.needed(name, n_files)) for name, _ in refusals] == refusals != []
    listed = re.findall(r"\*\*(\w+)\*\*", "\n".join(name for name, _ in items_of(text, TYPE_TITLES[language])))
    offered = service.clip_types(n_files) if "type" in inputs_of(node_id) else ()
    assert {*offered} & clip_types.KNOWN_TYPES <= {*listed} <= clip_types.KNOWN_TYPES


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_names_types_that_can_be_saved(language):
    items = items_of(page_of("SaveGGUF", language), INPUT_TITLES[language])
    (text,) = [text for name, text in items if name.startswith("**type**")]
    named = re.findall(r"I?Q\d\w+|B?F\d+", text, re.ASCII)
    assert {*named} - {*saver.SAVE_TYPES} == {"IQ2_S"}, "the one that is named as not for this node"


# -- translations --


def test_english_is_what_the_nodes_say():
    assert locale("en") == make_locales.node_defs(nodes.NODE_CLASS_MAPPINGS, TITLES), (
        "run: COMFYUI_PATH=... python tests/make_locales.py"
    )


def keys_of(value, path=()):
    if isinstance(value, dict):
        return {key for name, inner in value.items() for key in keys_of(inner, (*path, name))}
    return {path}


def texts_of(value):
    return [text for inner in value.values() for text in texts_of(inner)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_chinese_has_the_keys_of_english(name):
    en, zh = locale("en", name), locale("zh", name)
    assert keys_of(zh) == keys_of(en)
    assert all(texts_of(zh))


def test_chinese_descriptions_and_tooltips_are_chinese():
    for node_id, node in locale("zh").items():
        texts = [node["description"], *(item["tooltip"] for item in node["inputs"].values())]
        assert all(re.search("[\u4e00-\u9fff]{2}", text) for text in texts), node_id


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_has_what_the_frontend_takes_for_its_own_syntax(language):
    """{name} is a variable, @:key a link and | separates plurals. Source: vue-i18n's message format."""
    texts = [text for name in ("nodeDefs", "main") for text in texts_of(locale(language, name))]
    assert [text for text in texts if set("{}@|") & set(text)] == []


def test_the_host_serves_the_translations(tmp_path, monkeypatch):
    (tmp_path / "gguf-kit").mkdir()
    os.symlink(LOCALES, tmp_path / "gguf-kit" / "locales")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    served = app.custom_node_manager.CustomNodeManager().build_translations()
    for language in ("en", "zh"):
        assert served[language]["nodeDefs"] == locale(language)
        assert served[language]["nodeCategories"] == {"gguf": "GGUF"}
