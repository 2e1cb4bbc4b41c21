# SPDX-License-Identifier: Apache-2.0
"""What loading costs: seconds and memory for a large Flux-shaped file in a real ComfyUI, and the pack's import.

    python tests/bench/bench_load.py [--gigabytes 1.5] [--qtype Q4_K]

Needs a ComfyUI (COMFYUI_PATH, else the one that the demo fetches). Each figure comes from a fresh process; memory is
the peak resident size of the process (VmHWM, Linux) over what it was just before. The file is random bytes with finite
scales.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT)]

HIDDEN, MLP = 3072, 12288
DOUBLE = {
    **{f"{s}_attn.qkv": (3 * HIDDEN, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_attn.proj": (HIDDEN, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_mlp.0": (MLP, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_mlp.2": (HIDDEN, MLP) for s in ("img", "txt")},
    **{f"{s}_mod.lin": (6 * HIDDEN, HIDDEN) for s in ("img", "txt")},
}
SINGLE = {
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
}
OUTER = {
    "img_in": (HIDDEN, 64),
    "txt_in": (HIDDEN, 4096),
    "time_in.in_layer": (HIDDEN, 256),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, 768),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (64, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}


def flux_shapes(n_blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Flux.1 schnell with so many double and twice as many single blocks."""
    layers = dict(OUTER)
    norms: dict[str, tuple[int, ...]] = {}
    for i in range(n_blocks):
        layers |= {f"double_blocks.{i}.{name}": shape for name, shape in DOUBLE.items()}
        for s in ("img", "txt"):
            norms |= {f"double_blocks.{i}.{s}_attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    for i in range(2 * n_blocks):
        layers |= {f"single_blocks.{i}.{name}": shape for name, shape in SINGLE.items()}
        norms |= {f"single_blocks.{i}.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()} | norms


def write_model(path: Path, gigabytes: float, qtype_name: str) -> None:
    """A file of about this size: block matrices of the type, outer matrices BF16, vectors F32."""
    import _pack  # noqa: F401
    import gguf
    import numpy as np
    from gguf_kit.layouts import LAYOUTS, n_bytes
    from quant_data import random_blocks  # blocks with finite scales

    qtype = gguf.GGMLQuantizationType[qtype_name]
    per_block = sum(n_bytes(qtype, s) for s in DOUBLE.values()) + 2 * sum(n_bytes(qtype, s) for s in SINGLE.values())
    n_blocks = max(1, round(gigabytes * 1e9 / per_block))
    writer = gguf.GGUFWriter(path, "flux")
    for i, (name, shape) in enumerate(flux_shapes(n_blocks).items()):
        used = qtype if "_blocks." in name else gguf.GGMLQuantizationType.BF16
        if len(shape) == 1:
            writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
            continue
        layout = LAYOUTS[used]
        data = random_blocks(layout, shape[0] * shape[-1] // layout.block_size, seed=i)
        writer.add_tensor(name, data.reshape(shape[0], -1), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def boot_host() -> None:
    """Import a real ComfyUI for the CPU, and what its own loaders need."""
    from demo.host import get_host

    sys.path.insert(0, str(get_host()))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd  # noqa: F401

    import nodes  # noqa: F401


def import_pack() -> object:
    """Import the pack as ComfyUI does: a package named by its path."""
    spec = importlib.util.spec_from_file_location(str(ROOT), ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(ROOT)] = module
    spec.loader.exec_module(module)
    return sys.modules[f"{ROOT}.nodes"]


def peak_bytes() -> int:
    """Largest resident size of this process so far, Linux only; ru_maxrss would start at the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(task: str, path: str) -> dict[str, float]:
    """Run in a process of its own: "import", "load" or "touch" (load, then read every weight)."""
    boot_host()
    start = time.perf_counter()
    pack = import_pack()
    if task == "import":
        return {"seconds": time.perf_counter() - start}
    before, start = peak_bytes(), time.perf_counter()
    patcher = pack.load_model(path, pack.OpsOptions())
    seconds = time.perf_counter() - start
    if task == "touch":
        for module in patcher.model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(weight, "_qdata"):
                int(weight._qdata.view(-1)[::4096].sum())
    return {"seconds": seconds, "added": peak_bytes() - before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--qtype", default="Q4_K")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-shaped.gguf"
        write_model(path, args.gigabytes, args.qtype)
        size = path.stat().st_size
        print(f"{args.qtype}, {size / 1e9:.2f} GB")
        for task in ("import", "load", "touch"):
            command = [sys.executable, __file__, "--measure", task, str(path)]
            results = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(3)]
            line = f"{task:7} {sorted(r['seconds'] for r in results)[1]:.3f} s"
            if "added" in results[0]:
                added = max(r["added"] for r in results)
                line += f", peak added resident memory {added / 1e6:.0f} MB ({added / size:.3f} of the file)"
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
