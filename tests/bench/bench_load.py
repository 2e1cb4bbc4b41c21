# SPDX-License-Identifier: Apache-2.0
"""What loading costs in a real ComfyUI: seconds and memory for large Flux-shaped files, and the pack's import.

    python tests/bench/bench_load.py [--gigabytes 1.5] [--qtype Q4_K] [--tasks full ...] [--save]

    import   the pack's own import in a running ComfyUI
    load     a file of so many gigabytes through the node's function
    touch    the same, then every page of the quantized weights is read
    full     a Flux.1-dev (780 tensors, 6.8 GB as Q4_K) through the node's function; the file has holes for data
    host     what the host alone needs for the same 780 keys and shapes

Each figure is the median of fresh processes, which take turns. "host" is the least that a host can do: its detection,
its building of the model and its load_state_dict(), over one bfloat16 zero seen everywhere, with layers that hold what
they are given; its own layers would also fill 24 GB. "added" is full less host. Memory is resident (Linux): the peak
(VmHWM), and what stays before the first forward (VmRSS), over what it was just before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import hosted
import measure
import torch
from gguf import GGMLQuantizationType as QType
from measure import Report, digits

from demo.host import get_host, host_version

TASKS = ("import", "load", "touch", "full", "host")
SPARSE = ("full", "host")
ROUNDS = 5


def memory_bytes(key: str) -> int:
    """Resident bytes of this process, Linux only: VmRSS now, VmHWM at most; ru_maxrss would start at the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


def host_operations() -> type:
    """The host's layers without weights of their own: each keeps the tensor that it is given."""
    import comfy.ops

    def holding(base: type) -> type:
        class Holder(base):
            def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
                super().__init__(*args, device="meta", dtype=dtype, **kwargs)
                self._held = [name for name, value in self._parameters.items() if value is not None]
                self._parameters.update(dict.fromkeys(self._held))

            def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
                for name in self._held:
                    self._parameters[name] = torch.nn.Parameter(state_dict[prefix + name], requires_grad=False)

        return Holder

    names = ("Linear", "LayerNorm", "RMSNorm")
    held = {name: holding(getattr(comfy.ops.manual_cast, name)) for name in names if hasattr(comfy.ops, "manual_cast")}
    return type("HostOperations", (comfy.ops.manual_cast,), held)


def load_host_alone() -> Any:
    """A Flux.1-dev of the host over weights that take no memory."""
    import comfy.sd
    from gguf_kit.service import norm_name

    zero = torch.zeros((), dtype=torch.bfloat16)
    shapes = hosted.flux_shapes(hosted.N_DOUBLE, hosted.N_SINGLE, guidance=True)
    state = {name.replace("norm.scale", f"norm.{norm_name()}"): zero.expand(shape) for name, shape in shapes.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"custom_operations": host_operations()})


def run_task(task: str, path: str) -> dict[str, float]:
    """One figure, in a process of its own."""
    hosted.boot_host()
    if task == "host":
        import gguf_kit.service  # noqa: F401
    pack, seconds = None, 0.0
    if task != "host":
        start = time.perf_counter()
        pack = hosted.import_pack()
        seconds = time.perf_counter() - start
    if task == "import":
        return {"seconds": seconds}
    peak, resident, start = memory_bytes("VmHWM"), memory_bytes("VmRSS"), time.perf_counter()
    patcher = load_host_alone() if pack is None else pack.load_model(path, pack.OpsOptions())
    seconds = time.perf_counter() - start
    if task == "touch":
        for module in patcher.model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(weight, "_qdata"):
                int(weight._qdata.view(-1)[::4096].sum())
    return {
        "seconds": seconds,
        "peak_added_mb": (memory_bytes("VmHWM") - peak) / 1e6,
        "resident_added_mb": (memory_bytes("VmRSS") - resident) / 1e6,
        "parameters": sum(1 for _ in patcher.model.diffusion_model.named_parameters()),
    }


Result = dict[str, float]


def run_process(task: str, path: Path) -> Result:
    """A task in a fresh process."""
    command = [sys.executable, __file__, "--measure", task, str(path)]
    result: Result = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return result


def medians(results: Sequence[Result]) -> Result:
    return {key: digits(statistics.median(result[key] for result in results)) for key in results[0]}


def differences(full: Sequence[Result], host: Sequence[Result]) -> Result:
    """What the pack adds to the host, the median of the rounds' differences."""
    keys = ("seconds", "peak_added_mb", "resident_added_mb")
    return medians([{key: a[key] - b[key] for key in keys} for a, b in zip(full, host, strict=True)])


def write_files(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Files of the tasks that were asked for: {task: path}."""
    files = {}
    if {"load", "touch"} & {*options.tasks}:
        n_double = hosted.n_blocks_for(options.gigabytes, options.qtype)
        path = hosted.write_model(folder / "flux-shaped.gguf", options.qtype, hosted.flux_shapes(n_double))
        files |= {"load": path, "touch": path}
    if "full" in options.tasks:
        shapes = hosted.flux_shapes(hosted.N_DOUBLE, hosted.N_SINGLE, guidance=True)
        hosted.write_sparse_model(folder / "flux-full.gguf", options.qtype, shapes)
        files["full"] = folder / "flux-full.gguf"
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--qtype", type=measure.parse_qtype, default=QType.Q4_K, metavar="TYPE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(run_task(*options.measure)))
        return 0
    options.tasks = options.tasks or (list(SPARSE) if options.quick else list(TASKS))
    report, rounds = Report("bench_load", options), 1 if options.quick else ROUNDS
    results: dict[str, list[Result]] = {task: [] for task in options.tasks}
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name), options)
        sizes = {task: {"gb": digits(file.stat().st_size / 1e9)} for task, file in files.items()}
        for task in [*options.tasks] * rounds:
            results[task].append(run_process(task, files.get(task, Path(name))))
    common = {"qtype": options.qtype.name, "n": rounds, "comfyui": host_version(get_host())}
    for task, each in results.items():
        report.add({"name": task, **common, **sizes.get(task, {}), **medians(each)})
    if {*SPARSE} <= {*results}:
        full, host = (results[task] for task in SPARSE)
        if full[0]["parameters"] != host[0]["parameters"]:
            report.fail({"name": "added", **common}, f"{full[0]['parameters']} of {host[0]['parameters']} parameters")
        else:
            report.add({"name": "added", **common, **differences(full, host)})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
