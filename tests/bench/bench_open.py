# SPDX-License-Identifier: Apache-2.0
"""Times opening a text encoder with a 262,144-entry vocabulary, against gguf-py's reader, and rebuilding tokenizers.

    python tests/bench/bench_open.py [--repeat N] [--without-gguf-py]

The file has tokens, scores, token types, 514,906 merges and the tensor table of a 34-layer model, as Gemma 3 has them;
its tensors are empty, since opening reads none. gguf-py is timed once: it takes seconds.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _paths  # noqa: F401
import gguf
import gguf_builder as build
import make_tokenizers
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.models import tokenizers
from measure import Report, Timing, digits, make_parser

N_TOKENS = 262_144
N_MERGES = 514_906
N_LAYERS = 34
TENSORS_PER_LAYER = 13
TOKENS = "tokenizer.ggml.tokens"
TOKENIZERS = (("llama", "spiece"), ("gemma4", "json"))  # tokenizer.ggml.model, key of tokenizers.KINDS


def write_text_encoder(path: Path) -> None:
    metadata = {
        "general.architecture": (build.STRING, "gemma3"),
        TOKENS: (build.ARRAY, (build.STRING, [f"token-{i}" for i in range(N_TOKENS)])),
        "tokenizer.ggml.scores": (build.ARRAY, (build.F32, [float(-i) for i in range(N_TOKENS)])),
        "tokenizer.ggml.token_type": (build.ARRAY, (build.I32, [1] * N_TOKENS)),
        "tokenizer.ggml.merges": (build.ARRAY, (build.STRING, [f"left-{i} right" for i in range(N_MERGES)])),
    }
    names = [f"blk.{i}.tensor_{j}.weight" for i in range(N_LAYERS) for j in range(TENSORS_PER_LAYER)]
    path.write_bytes(build.build_gguf(metadata, [(name, 0, (0, 2560), b"") for name in names]))


def rebuild_tokenizer(path: Path, kind: str) -> None:
    tokenizers.build(GGUFFile(path), kind)


def take_time(action: Callable[[], object], n_runs: int) -> Timing:
    """Run it so many times in a row."""
    times = []
    for _ in range(n_runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return Timing(tuple(times))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--repeat", type=int, default=9, help="runs of each case but gguf-py's")
    parser.add_argument("--without-gguf-py", action="store_true")
    options = parser.parse_args(argv)
    report = Report("bench_open", options)
    n_runs = 1 if options.quick else options.repeat
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text-encoder.gguf"
        write_text_encoder(path)
        cases = [
            ("GGUFFile: open", lambda: GGUFFile(path), n_runs),
            ("GGUFFile: open, decode tokens", lambda: GGUFFile(path).metadata[TOKENS], n_runs),
            ("GGUFFile: open, decode all", lambda: dict(GGUFFile(path).metadata), n_runs),
        ]
        for model, kind in TOKENIZERS:
            large = make_tokenizers.write_large(Path(folder) / f"{model}.gguf", model)
            rebuild = functools.partial(rebuild_tokenizer, large, kind)
            cases.append((f"open, rebuild tokenizer ({kind})", rebuild, n_runs))
        if not (options.without_gguf_py or options.quick):
            cases.append(("gguf.GGUFReader: open", lambda: gguf.GGUFReader(path), 1))
        size = {"mb": digits(path.stat().st_size / 1e6), "tensors": N_LAYERS * TENSORS_PER_LAYER}
        for label, action, n in cases:
            report.add({"name": label, **size, **take_time(action, n).describe()})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
