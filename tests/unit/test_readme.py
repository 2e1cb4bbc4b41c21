# SPDX-License-Identifier: Apache-2.0
"""The READMEs say the same in both languages, and every link in them and in docs/ leads somewhere."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tools/*/README.md")})
LANGUAGES = {"README.md", "README.zh-CN.md"}  # the READMEs link each other in their second lines

FENCE = re.compile(r"\s*(```|~~~)")
HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")
LIST_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"(!?)\[[^\[\]]*\]\(\s*<?([^()\s<>]+)>?[^()]*\)")
EMPHASIS = re.compile(r"(?<!\*)\*([^*\n]+)\*(?!\*)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
MARKER = re.compile(r"<!--.*?-->|<<[A-Z]+>>")
RULE_CELL = re.compile(r":?-+:?")


def read(path):
    return path.read_text(encoding="utf-8")


def split_code(text):
    """(lines, those of code blocks emptied; the code blocks): fenced ones, and indented ones behind a paragraph."""
    prose, blocks, fence, in_list, before = [], [], "", False, "blank"
    for line in text.splitlines():
        found = FENCE.match(line)
        if not line.strip() and not fence:
            now = "code" if before == "code" else "blank"
        elif fence or found:
            now = "fence"
            blocks += [[]] if not fence else [] if found else [[*blocks.pop(), line]]
            fence = found[1] if found and not fence else "" if found else fence
        elif line.startswith("    ") and not in_list and before in ("blank", "code"):
            now = "code"
            blocks += [[*(blocks.pop() if before == "code" else []), line]]
        else:
            now = "text"
            in_list = bool(LIST_ITEM.match(line)) or (in_list and (line.startswith(" ") or before == "text"))
        prose.append(line if now == "text" else "")
        before = now
    return prose, ["\n".join(block) for block in blocks]


def headings(text):
    """[(level, title)] in order."""
    found = (HEADING.fullmatch(line) for line in split_code(text)[0])
    return [(len(each[1]), each[2]) for each in found if each]


def anchors(text):
    """Anchors as GitHub makes them: lower case, no punctuation, hyphens for blanks, -1, -2 ... behind repeats."""
    made = []
    for _, title in headings(text):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "").lower()
        base = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        made.append(next(name for name in numbered(base) if name not in made))
    return made


def numbered(base):
    """base, base-1, base-2, ..."""
    yield base
    for i in range(1, 1000):
        yield f"{base}-{i}"


def links(text):
    """[("!" for a picture, target)] in order, without those in code."""
    prose = CODE_SPAN.sub("`", "\n".join(split_code(text)[0]))
    return [(found[1], found[2]) for found in LINK.finditer(prose)]


def tables(text):
    """Each table as a list of rows, each a list of cells."""
    found = [[]]
    for line in split_code(text)[0]:
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def sections(text):
    """The prose of each heading, the title with it, with line breaks as blanks."""
    parts = [[]]
    for line in split_code(text)[0]:
        if HEADING.fullmatch(line):
            parts.append([])
        parts[-1].append(line.strip())
    return [" ".join(part) for part in parts]


def spans(pattern, group, text):
    """What a pattern finds, sorted, with any line breaks in it as blanks."""
    return sorted(" ".join(found[group].split()) for found in pattern.finditer(text))


def cells_of(table):
    return " | ".join(cell for row in table for cell in row)


def target_of(page, target):
    """(file, anchor) that a relative link means."""
    name, _, anchor = unquote(target).partition("#")
    return (page.parent / name).resolve() if name else page, anchor


def broken(page, text):
    """Relative links of a page that lead nowhere."""
    bad = []
    for _, target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, anchor = target_of(page, target)
        if not path.exists() or not path.is_relative_to(ROOT):
            bad.append(target)
        elif anchor and anchor not in anchors(text if path == page else read(path)):
            bad.append(target)
    return bad


def compare(english, chinese):
    """What differs between two texts that should say the same: names of the comparisons that fail."""
    differ = []
    both = english, chinese
    for name, take in COMPARED.items():
        first, second = (take(text) for text in both)
        if first != second:
            differ.append(f"{name}: {first_difference(first, second)}")
    return differ


def first_difference(first, second):
    """The first place in which two lists differ."""
    for i, pair in enumerate(zip(first, second, strict=False)):
        if pair[0] != pair[1]:
            return f"number {i}: {pair[0]!r} and {pair[1]!r}"
    return f"{len(first)} and {len(second)}"


def own_anchors(text):
    """Numbers of the headings that a text's links to itself mean."""
    known = anchors(text)
    found = [target[1:] for _, target in links(text) if target.startswith("#")]
    return sorted(known.index(unquote(name)) if unquote(name) in known else -1 for name in found)


def other_targets(text):
    """Targets outside of the text, without the other language."""
    return sorted(link for link in links(text) if not link[1].startswith("#") and link[1] not in LANGUAGES)


COMPARED = {
    "levels of headings": lambda text: [level for level, _ in headings(text)],
    "code blocks": lambda text: split_code(text)[1],
    "shapes of tables": lambda text: [[len(row) for row in table] for table in tables(text)],
    "rules of tables": lambda text: [
        row for table in tables(text) for row in table if all(map(RULE_CELL.fullmatch, row))
    ],
    "numbers in tables": lambda text: [spans(NUMBER, 0, cells_of(table)) for table in tables(text)],
    "quoted texts in tables": lambda text: [spans(EMPHASIS, 1, cells_of(table)) for table in tables(text)],
    "code spans of each section": lambda text: [spans(CODE_SPAN, 2, part) for part in sections(text)],
    "pictures and other links": other_targets,
    "links to own headings": own_anchors,
    "markers and gaps": lambda text: MARKER.findall(text),
}


def test_both_languages_have_the_same_headings_code_tables_numbers_and_links():
    assert compare(read(ENGLISH), read(CHINESE)) == []


@pytest.mark.parametrize(("this", "other"), [(ENGLISH, CHINESE), (CHINESE, ENGLISH)], ids=["english", "chinese"])
def test_each_language_links_the_other_under_its_title(this, other):
    title, _, switch, *_ = read(this).splitlines()
    assert title.startswith("# ")
    assert f"]({other.name})" in switch


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    assert broken(page, read(page)) == []


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_no_gap_is_left_to_fill(page):
    assert re.findall(r"<<[A-Z]+>>", read(page)) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("\n## 安装\n", "\n### 安装\n", "levels of headings"),
        ("--src flux1-dev.safetensors --type Q4_K_S", "--src a.safetensors --type Q4_K_S", "code blocks"),
        ("| BF16 | 23.81 |", "| BF16 | 23.18 |", "numbers in tables"),
        ("| Q6_K | 9.85 | 6.6 | |\n", "", "shapes of tables"),
        ("| 12 GB |", "| 12 GB | |", "shapes of tables"),
        ("*ComfyUI … does not recognise this model*", "*ComfyUI 认不出这个模型*", "quoted texts in tables"),
        ("`--target-bpw`", "`--bpw`", "code spans of each section"),
        ("(docs/contact_sheet.jpg)", "(docs/quality.jpg)", "pictures and other links"),
        ("(#保存模型)", "(#安装)", "links to own headings"),
        ("<!-- end of the table of quality -->", "", "markers and gaps"),
    ],
)
def test_a_difference_between_the_languages_is_seen(old, new, name):
    chinese = read(CHINESE)
    assert old in chinese
    assert name in {each.partition(":")[0] for each in compare(read(ENGLISH), chinese.replace(old, new, 1))}


@pytest.mark.parametrize(
    "link", ["[a](no.md)", "![a](docs/no.jpg)", "[a](#no)", "[a](docs/models.md#no)", "[a](../README.md)"]
)
def test_a_link_that_leads_nowhere_is_seen(link):
    target = link[link.index("(") + 1 : -1]
    assert broken(ENGLISH, f"# Title\n\nText with [a link](docs/models.md#text-encoders) and {link}.\n") == [target]


def test_links_in_code_and_to_other_sites_are_left_alone():
    text = "# Title\n\n    [a](no.md)\n\n`[a](no.md)`\n\n```\n[a](no.md)\n```\n\n[a](https://example.org/no)\n"
    assert broken(ENGLISH, text) == []
    assert split_code(text)[1] == ["    [a](no.md)", "[a](no.md)"]


def test_anchors_are_made_as_github_makes_them():
    made = {
        "GGUF Kit: a `nodes.py` & more": "gguf-kit-a-nodespy--more",
        "制作自己的 GGUF 文件": "制作自己的-gguf-文件",
        "测过什么、没跑过什么": "测过什么没跑过什么",
        "[Link](a.md) in a_b-c": "link-in-a_b-c",
        "Same": "same",
        "*Same*": "same-1",
    }
    assert anchors("\n\n".join(f"## {title}" for title in made)) == list(made.values())
