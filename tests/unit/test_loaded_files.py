# SPDX-License-Identifier: Apache-2.0
"""What the loader tells those who listen: one description for each file, in order, and only inside the block."""

import threading

import gguf
import numpy as np
import pytest
from gguf_kit import loader
from gguf_kit.errors import GGUFError


def write(path, file_type=None):
    """A file with a vector in F32 and a matrix in Q8_0, as any component may be."""
    writer = gguf.GGUFWriter(path, "anything")
    if file_type is not None:
        writer.add_uint32("general.file_type", file_type)
    writer.add_tensor("norm.weight", np.ones(32, np.float32))
    blocks = gguf.quants.quantize(np.ones((2, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("layer.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_are_told_in_order_and_inside_the_block_only(tmp_path):
    paths = [write(tmp_path / name) for name in ("b.gguf", "a.gguf")]
    with loader.loaded_files() as infos:
        for path in paths:
            loader.load_component(path)
    loader.load_component(paths[0])
    assert [info.path for info in infos] == [str(path) for path in paths]
    assert infos[0].type_bytes == {"Q8_0": 2 * 34, "F32": 4 * 32}


def test_an_inner_block_hears_alone_and_an_error_ends_it(tmp_path):
    path = write(tmp_path / "m.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with loader.loaded_files() as outer:
        with pytest.raises(GGUFError), loader.loaded_files() as inner:
            loader.load_component(tmp_path / "bad.gguf")
        loader.load_component(path)
    assert (len(outer), inner) == (1, [])


def test_another_thread_is_not_heard(tmp_path):
    path = write(tmp_path / "m.gguf")
    with loader.loaded_files() as infos:
        thread = threading.Thread(target=loader.load_component, args=(path,))
        thread.start()
        thread.join()
    assert infos == []


@pytest.mark.parametrize(("value", "name"), [(14, "Q4_K_S"), (7, "Q8_0"), (0, "F32"), (9999, ""), (None, "")])
def test_the_type_that_a_file_names(tmp_path, value, name):
    with loader.loaded_files() as infos:
        loader.load_component(write(tmp_path / "m.gguf", value))
    assert infos[0].file_type == name
