# SPDX-License-Identifier: Apache-2.0
"""What a T5-XXL of real size costs on a CPU: seconds and memory to load it and to encode a prompt, quantized and not.

    python tests/bench/bench_text_encoder.py [--qtype Q3_K] [--threads 2]

Needs a ComfyUI (COMFYUI_PATH, else the one that the demo fetches), 20 GB of free memory and 12 GB of disk. The file is
random bytes with finite scales, 4.76 G weights in llama.cpp's names; "dequantized" is the same weights as a float16
safetensors file in ComfyUI's own loader. The prompt is padded to 256 tokens, as Flux and Mochi take it. Figures come
from fresh processes. Memory is the peak over what it was before loading (/proc, Linux): resident, and the part of it
that is not the mapped file, which the system can drop. The roofline is the time of the matrix products alone, at the
rate that float32 products of one layer's size reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import _paths  # noqa: F401
import weights
from gguf import GGMLQuantizationType as QType
from hosted import boot_host, import_pack
from measure import Report, digits, make_parser, parse_qtype

from demo.host import get_host, host_version

D_MODEL, D_FF, N_BLOCKS, N_HEADS, VOCABULARY = 4096, 10240, 24, 64, 32128
N_TOKENS = 256
PROMPT = "a red seven on black ground"
MATRICES = {
    **{f"attn_{name}": (D_MODEL, D_MODEL) for name in "qkvo"},
    "ffn_gate": (D_FF, D_MODEL),
    "ffn_up": (D_FF, D_MODEL),
    "ffn_down": (D_MODEL, D_FF),
}


def write_t5(path: Path, qtype: QType) -> None:
    """An encoder of real size: matrices of the type, the embedding too, vectors F32."""
    import gguf
    import numpy as np

    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, D_MODEL), "enc.output_norm": (D_MODEL,)}
    for i in range(N_BLOCKS):
        shapes |= {f"enc.blk.{i}.{name}": shape for name, shape in MATRICES.items()}
        shapes |= {f"enc.blk.{i}.{name}_norm": (D_MODEL,) for name in ("attn", "ffn")}
    writer = gguf.GGUFWriter(path, "t5encoder", use_temp_file=True)
    writer.add_tensor("enc.blk.0.attn_rel_b.weight", np.zeros((32, N_HEADS), dtype=np.float32))
    for i, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
            continue
        writer.add_tensor(f"{name}.weight", weights.make_bytes(qtype, shape, seed=i).numpy(), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_dense(path: Path) -> None:
    """The same weights as float16 safetensors."""
    import torch
    from gguf_kit.loader import load_text_encoder
    from safetensors.torch import save_file

    state = load_text_encoder(path)[0]
    dense = {k: v.dequantize(torch.float16) if hasattr(v, "qtype") else v.half() for k, v in state.items()}
    save_file(dense, path.with_suffix(".safetensors"))


class Memory(threading.Thread):
    """Watches this process's resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.now()
        self.peak = dict(self.start_bytes)
        self.start()

    @staticmethod
    def now() -> dict[str, int]:
        """Bytes by kind."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
        }
        return {"resident": found["VmRSS"], "anonymous": found["RssAnon"]}

    def run(self) -> None:
        while True:
            self.peak = {kind: max(n, self.peak[kind]) for kind, n in self.now().items()}
            time.sleep(0.02)

    def added(self) -> dict[str, int]:
        """Peaks over what it was at the start."""
        return {kind: n - self.start_bytes[kind] for kind, n in self.peak.items()}


def measure(task: str, path: str, n_threads: int) -> dict[str, float]:
    """Run in a process of its own: "quantized" or "dequantized"."""
    import torch

    boot_host()
    torch.set_num_threads(n_threads)
    pack = import_pack()
    import comfy.sd

    memory, start = Memory(), time.perf_counter()
    if task == "quantized":
        clip = pack.load_clip((path,), "mochi")
    else:
        dense = str(Path(path).with_suffix(".safetensors"))
        clip = comfy.sd.load_clip([dense], clip_type=comfy.sd.CLIPType.MOCHI)
    loaded = time.perf_counter() - start
    tokens, seconds = clip.tokenize(PROMPT), []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            n_tokens = clip.encode_from_tokens(tokens).shape[1]
            seconds.append(time.perf_counter() - start)
    if n_tokens != N_TOKENS:
        raise SystemExit(f"the prompt has {n_tokens} tokens, expected {N_TOKENS}")
    peaks = {f"{kind}_gb": n / 1e9 for kind, n in memory.added().items()}
    return {"load": loaded, "first": seconds[0], "next": seconds[1]} | peaks


def roofline(n_threads: int) -> float:
    """Seconds of all matrix products in float32, at the rate of one layer's."""
    import torch

    torch.set_num_threads(n_threads)
    x, weight = torch.randn(N_TOKENS, D_MODEL), torch.randn(D_FF, D_MODEL)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    n_weights = N_BLOCKS * sum(n * k for n, k in MATRICES.values())
    return sorted(seconds)[2] * n_weights / weight.numel()


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--qtype", type=parse_qtype, default=QType.Q3_K, metavar="TYPE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        task, path = args.measure
        if task == "write":
            write_dense(Path(path))
        else:
            print(json.dumps(measure(task, path, args.threads)))
        return 0
    if args.quick:
        parser.error("a T5-XXL cannot be quick")
    report = Report("bench_text_encoder", args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t5-xxl.gguf"
        write_t5(path, args.qtype)
        subprocess.check_call([sys.executable, __file__, "--measure", "write", str(path)])
        common = {"qtype": args.qtype.name, "file_gb": digits(path.stat().st_size / 1e9)}
        common["comfyui"] = host_version(get_host())
        for task in ("quantized", "dequantized"):
            command = [sys.executable, __file__, "--threads", str(args.threads), "--measure", task, str(path)]
            result = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            report.add({"name": task, **common, **{key: digits(value) for key, value in result.items()}})
        report.add({"name": "roofline", **common, "next": digits(roofline(args.threads))})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
