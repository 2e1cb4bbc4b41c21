# SPDX-License-Identifier: Apache-2.0
"""The page's table of architectures is the one that the entries and the tested versions of ComfyUI make."""

import make_arch_table
import pytest
from gguf_kit.models import archs


def test_the_table_is_up_to_date():
    text = make_arch_table.PAGE.read_text(encoding="utf-8")
    table = make_arch_table.make_table()
    assert make_arch_table.replace_block(text, table) == text, "python tests/make_arch_table.py"
    for arch in archs.ARCHS:
        assert arch.title in table


def test_every_tested_model_has_an_entry_and_every_entry_was_tested():
    titles = {title for titles in make_arch_table.read_tested().values() for title in titles}
    assert titles == {arch.title for arch in archs.ARCHS if not arch.reject}


def test_a_page_without_the_markers_is_an_error():
    with pytest.raises(SystemExit, match="has no"):
        make_arch_table.replace_block("# Title", "")
