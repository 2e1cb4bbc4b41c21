# SPDX-License-Identifier: Apache-2.0
"""The compact text of key lists: ranges, their order, and that the stored files are as short as they can be."""

import model_keys
import pytest


@pytest.mark.parametrize("name", [*model_keys.list_names(), *model_keys.list_encoders()])
def test_a_key_list_is_as_short_as_it_can_be_written(name):
    path = model_keys.FOLDER / f"{name}.keys"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert model_keys.format_keys(model_keys.read_keys(name).items()) == lines


def test_ranges_are_read_block_by_block():
    keys = model_keys.parse_keys(["in 3", "a.{0..1}.b.{2..3}.w 4 5", "a.{0..1}.c", "out 1"])
    assert list(keys) == ["in", "a.0.b.2.w", "a.0.b.3.w", "a.0.c", "a.1.b.2.w", "a.1.b.3.w", "a.1.c", "out"]
    assert (keys["a.1.b.3.w"], keys["a.0.c"]) == ((4, 5), ())
    with pytest.raises(ValueError, match=r"a\.0 occurs twice"):
        model_keys.parse_keys(["a.{0..1} 1", "a.0 1"])
