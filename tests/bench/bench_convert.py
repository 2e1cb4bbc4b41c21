# SPDX-License-Identifier: Apache-2.0
"""What converting costs: speed against ggml_quantize_chunk alone on the same threads, and memory.

    python tests/bench/bench_convert.py [--gigabytes 2] [--types Q8_0 Q6_K Q4_K_S] [--threads 2] [--engine ggml]

The source is a Flux-shaped safetensors file of normal BF16 weights. The roofline is ggml's own function, called on
float32 rows that lie in memory, in chunks of the converter's size, with as many threads. Both run in turn; the ratio
is what counts. Memory is the peak of the converter's anonymous pages (Linux), sampled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import _paths  # noqa: F401
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.quantize import ggml
from gguf_kit.quantize.convert import CHUNK_WEIGHTS
from gguf_kit.quantize.encode import GgmlEngine
from gguf_kit.quantize.recipes import RECIPES
from gguf_kit.tools.llama_cpp import build
from hosted import flux_shapes, n_blocks_for
from measure import ROOT, Report, digits, make_parser
from tqdm import tqdm

COLUMNS = 3072


def write_source(path: Path, gigabytes: float) -> int:
    """A safetensors file of about this size, one repeated run of normal BF16 weights; returns the number of weights."""
    shapes = flux_shapes(n_blocks_for(gigabytes, QType.BF16))
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    weights = torch.randn(CHUNK_WEIGHTS, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    data = weights.view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, offset, len(data)):
            file.write(data[: offset - start])
    return sum(map(prod, shapes.values()))


def ggml_alone(type_name: str, n_threads: int) -> float:
    """Million weights per second of ggml_quantize_chunk on rows in memory."""
    engine = GgmlEngine(ggml.find_library() or build.build_ggml(tqdm.write))
    qtype = RECIPES[type_name].base
    rows = torch.randn(CHUNK_WEIGHTS // COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)).mul(0.02)
    engine.encode(rows, qtype, None)
    n_chunks = n_threads
    while True:
        start = time.perf_counter()
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda _: engine.encode(rows, qtype, None), range(n_chunks)))
        seconds = time.perf_counter() - start
        if seconds > 3:
            return n_chunks * rows.numel() / seconds / 1e6
        n_chunks *= 2


def convert(source: Path, type_name: str, n_threads: int, engine: str) -> tuple[float, int]:
    """Seconds of the conversion itself, and the peak of its anonymous memory in bytes."""
    options = ["--type", type_name, "--threads", str(n_threads), "--engine", engine, "--overwrite", "--json"]
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), "--src", str(source), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    reader = ThreadPoolExecutor(1).submit(process.communicate)
    while process.poll() is None:
        lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.05)
    return float(json.loads(reader.result()[0])["seconds"]), peak


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q6_K", "Q4_K_S"], choices=list(RECIPES))
    parser.add_argument("--engine", choices=("ggml", "torch"), default="ggml")
    args = parser.parse_args(argv)
    report = Report("bench_convert", args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "flux-shaped.safetensors"
        n_weights = write_source(source, 0.1 if args.quick else args.gigabytes)
        for type_name in args.types[: 1 if args.quick else None]:
            before = ggml_alone(type_name, args.threads)
            seconds, peak = convert(source, type_name, args.threads, args.engine)
            alone = (before + ggml_alone(type_name, args.threads)) / 2
            speed = n_weights / seconds / 1e6
            figures = {"seconds": seconds, "mweights_per_s": speed, "ggml_alone": alone, "speed_by_ggml": speed / alone}
            figures["peak_mb"] = peak / 1e6
            rounded = {key: digits(value) for key, value in figures.items()}
            report.add({"name": args.engine, "type": type_name, "weights": n_weights, **rounded})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
