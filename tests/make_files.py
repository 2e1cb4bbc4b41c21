# SPDX-License-Identifier: Apache-2.0
"""Makes the tiny Flux's GGUF files with ggml's own quantizer, so that they need not be stored.

    python tests/make_files.py FOLDER [--types TYPE ...]

ggml comes from the PyPI package libggml-python (a prebuilt ggml-base, for test environments only) and is called through
ctypes; it is not the pack's own quantizer, so what is made here can judge the pack. Every block matrix gets the type of
the name, the matrices of KEEP_BF16 are BF16 and vectors F32; no importance matrix is used.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import LlamaFileType
from safetensors.torch import load_file

MODEL = Path(__file__).resolve().parent / "data" / "tiny-flux" / "tiny-flux-bf16.safetensors"
KEEP_BF16 = ("img_in", "txt_in", "time_in", "vector_in", "final_layer")
LIBRARY_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")

# Type name in the file name -> type of the block matrices, general.file_type.
TYPES = {
    "BF16": (QType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (QType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": (QType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q5_K_S": (QType.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "Q4_K_S": (QType.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "Q4_0": (QType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "IQ4_XS": (QType.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
    "Q3_K_S": (QType.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "IQ3_S": (QType.IQ3_S, LlamaFileType.MOSTLY_IQ3_S),
    "Q2_K": (QType.Q2_K, LlamaFileType.MOSTLY_Q2_K),
    "IQ2_S": (QType.IQ2_S, LlamaFileType.MOSTLY_IQ2_S),
}


@functools.cache
def load_ggml() -> ctypes.CDLL:
    """ggml-base of the package libggml-python, with the signature of ggml_quantize_chunk set."""
    package = importlib.util.find_spec("libggml")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("libggml-python is not installed: pip install --no-deps libggml-python")
    folder = Path(package.submodule_search_locations[0])
    found = [path for name in LIBRARY_NAMES for path in folder.rglob(name)]
    if not found:
        raise FileNotFoundError(f"{folder}: none of {', '.join(LIBRARY_NAMES)} is in here")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


def quantize_with_ggml(weights: np.ndarray, qtype: QType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix with ggml.

    Args:
        weights: float32 (rows, columns), columns a multiple of the type's block size.
        qtype: any type; IQ2_XS and smaller ones need importance.
        importance: float32 (columns,) or None.
    Returns:
        uint8 (rows, bytes per row), ggml's blocks.
    """
    if qtype == QType.BF16:  # ggml_quantize_chunk has no BF16; gguf-py rounds as ggml does
        return np.asarray(gguf.quants.quantize(weights, qtype))
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows, columns = weights.shape
    block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
    out = np.empty((rows, columns // block_size * type_size), dtype=np.uint8)
    columns_weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = load_ggml().ggml_quantize_chunk(
        qtype.value,
        weights.ctypes.data,
        out.ctypes.data,
        0,
        rows,
        columns,
        None if columns_weight is None else columns_weight.ctypes.data,
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {qtype.name}, expected {out.nbytes}")
    return out


def write_gguf(type_name: str, path: Path, source: Path = MODEL) -> Path:
    """Write a flux safetensors file as GGUF of one of TYPES; the file appears under its name only when complete."""
    qtype, file_type = TYPES[type_name]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(unfinished, "flux")
    writer.add_name("tiny-flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    for name, tensor in load_file(source).items():
        weights = tensor.float().numpy()
        if weights.ndim == 1:
            writer.add_tensor(name, weights, raw_dtype=QType.F32)
            continue
        used = QType.BF16 if name.split(".")[0] in KEEP_BF16 else qtype
        writer.add_tensor(name, quantize_with_ggml(weights, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write some types, or all of them, into a folder as tiny-flux-TYPE.gguf."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--types", nargs="+", choices=list(TYPES), default=list(TYPES), metavar="TYPE", help=", ".join(TYPES)
    )
    args = parser.parse_args(argv)
    for type_name in args.types:
        write_gguf(type_name, args.folder / f"tiny-flux-{type_name}.gguf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
