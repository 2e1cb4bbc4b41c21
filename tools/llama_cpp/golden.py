# SPDX-License-Identifier: Apache-2.0
"""What a build of ggml must compute: the hashes of golden.json over inputs made by integer arithmetic.

    python tools/llama_cpp/golden.py LIBRARY [--types TYPE ...]     exit 0 if the library gives these bytes, else 1
    python tools/llama_cpp/golden.py LIBRARY --write                make golden.json with a ggml that is trusted

A compiler that fuses multiplications and additions, or reorders them, changes some blocks and is found out. The stored
hashes were made with a ggml-base that others built (PyPI package libggml-python), never with a build of our own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _pack  # noqa: F401
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.quantize import ggml

GOLDEN = Path(__file__).resolve().parent / "golden.json"
N_ROWS, N_COLUMNS = 96, 1024
# The last rows hold edge cases: a constant, zeros, values near the smallest float16, one outlier.
N_EDGE_ROWS = 4
N_HASH = 32
# One intra-op thread, and no debugger started where ggml ends the process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
# IQ1_M sums in another order since the trusted build was made; these rows come out the same.
FEWER_ROWS = {"IQ1_S": 16, "IQ1_M": 16, "IQ2_S": 64, "IQ2_XS": 64, "IQ2_XXS": 64, "IQ3_S": 64, "IQ3_XXS": 64}
# ggml prepares its search for the other types for seconds.
PROGRAM_TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ3_XXS",
    "IQ4_NL",
    "IQ4_XS",
)


def mix(n: int, seed: int) -> NDArray[np.uint64]:
    """Pseudo-random 64-bit integers, the same everywhere.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (the SplitMix64 finalizer).
    """
    z = (np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def golden_weights(n_rows: int = N_ROWS) -> torch.Tensor:
    """float32 (n_rows, 1024), about normal with deviation 0.3; all weights of a super-block differ in random rows.

    Equal values would let the order that a C library's qsort leaves decide bytes of IQ1 types.
    """
    z = mix(N_ROWS * N_COLUMNS, 1)
    parts = [((z >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4)]
    near_normal = (parts[0] + parts[1] + parts[2] + parts[3] - 2 * 0xFFFF) >> 3  # 15 bits
    distinct = near_normal * 256 + np.arange(N_ROWS * N_COLUMNS) % 256  # 23 bits: exact in float32
    weights = (distinct.astype(np.float32) * np.float32(2.0**-23)).reshape(N_ROWS, N_COLUMNS)
    edge = weights[-N_EDGE_ROWS:]
    edge[0] = 0.375
    edge[1] = 0.0
    edge[2] *= np.float32(2.0**-20)
    edge[3, ::257] *= np.float32(64.0)
    return torch.from_numpy(weights[:n_rows].copy())


def golden_importance() -> torch.Tensor:
    """float32 (1024,), positive, spread over five powers of two."""
    z = mix(N_COLUMNS, 2)
    values = ((z >> np.uint64(44)) + np.uint64(1)).astype(np.float32) * np.float32(2.0**-20)
    scale = np.float32(2.0) ** ((z & np.uint64(3)).astype(np.float32))
    return torch.from_numpy(values * scale)


def digest(library: ggml.Ggml, qtype: QType, importance: torch.Tensor | None) -> str:
    """Hash of a type's bytes."""
    weights = golden_weights(FEWER_ROWS.get(qtype.name, N_ROWS))
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    out = torch.zeros(weights.shape[0], N_COLUMNS // block_size * type_size, dtype=torch.uint8)
    library.quantize(weights, qtype, importance, out)
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()[:N_HASH]


def digests(library: ggml.Ggml, qtypes: Iterable[QType]) -> dict[str, dict[str, str]]:
    """Type name -> {"plain": hash, "imatrix": hash}; "plain" is left out where ggml wants an importance matrix."""
    found = {}
    for qtype in sorted(qtypes, key=lambda q: q.value):
        plain = {} if ggml.requires_imatrix(qtype) else {"plain": digest(library, qtype, None)}
        found[qtype.name] = {**plain, "imatrix": digest(library, qtype, golden_importance())}
    return found


def wrong_types(library: ggml.Ggml, qtypes: Iterable[QType]) -> list[str]:
    """Names of the types whose bytes are not the stored ones."""
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))["types"]
    return [name for name, found in digests(library, qtypes).items() if stored.get(name) != found]


def write_program_test(folder: Path, program: Path, importance: torch.Tensor | None) -> list[str]:
    """Write what llama-quantize is to encode: a tensor for each type that needs no long preparation, and a recipe.

    Returns:
        The command, to be run in the folder.
    """
    writer = gguf.GGUFWriter(folder / "golden.gguf", "golden")
    for name in PROGRAM_TYPES:
        writer.add_tensor(name, golden_weights(FEWER_ROWS.get(name, N_ROWS)).numpy())
    _write_file(writer)
    (folder / "recipe.txt").write_text("".join(f"{name}={name}\n" for name in PROGRAM_TYPES), encoding="ascii")
    command = [str(program), "--tensor-type-file", "recipe.txt"]
    if importance is not None:
        writer = gguf.GGUFWriter(folder / "imatrix.gguf", "imatrix")
        writer.add_array("imatrix.datasets", ["golden"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 1)
        for name in PROGRAM_TYPES:
            writer.add_tensor(f"{name}.in_sum2", importance.numpy())
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
        _write_file(writer)
        command += ["--imatrix", "imatrix.gguf"]
    return [*command, "golden.gguf", "encoded.gguf", "Q8_0", "2"]


def _write_file(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wrong_in_file(folder: Path, importance: torch.Tensor | None) -> list[str]:
    """Names of the types whose bytes in llama-quantize's file are not the stored ones, or that are missing."""
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))["types"]
    encoded = GGUFFile(folder / "encoded.gguf")
    found = {
        name: hashlib.sha256(encoded.data(name).numpy().tobytes()).hexdigest()[:N_HASH]
        for name, info in encoded.tensors.items()
        if info.qtype.name == name
    }
    return [
        name for name in PROGRAM_TYPES if stored[name]["plain" if importance is None else "imatrix"] != found.get(name)
    ]


def write(library: ggml.Ggml, made_by: str) -> None:
    """Store the hashes of a trusted library."""
    stored = {"made_by": made_by, "types": digests(library, ggml.ENCODABLE)}
    GOLDEN.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: check a library in a process of its own, since a broken one may end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--types", nargs="+", choices=sorted(q.name for q in ggml.ENCODABLE), metavar="TYPE")
    parser.add_argument("--write", metavar="MADE_BY", help="store the hashes, with a word on who built the library")
    args = parser.parse_args(argv)
    try:
        library = ggml.Ggml(args.library)
    except ggml.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if args.write:
        write(library, args.write)
        return 0
    wrong = wrong_types(library, [QType[name] for name in args.types] if args.types else ggml.ENCODABLE)
    if wrong:
        print(f"other bytes than stored: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
