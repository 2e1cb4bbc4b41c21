# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: cases, clocks, the machine, and records that become JSON lines and Markdown tables.

Owns how time is taken. Contestants of one group take turns in one process, each round starting with another, so that a
busy machine slows all of them; a ratio is the median over the rounds of the ratio within a round. A result is checked
before it is timed: a wrong one prints FAIL and has no figure. tables.py says how records are shown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import _paths
import numpy as np
import tables
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit import layouts

ROOT = _paths.ROOT
RESULTS = ROOT / "tests" / "bench" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Matrices of real models, rows by columns.
LAYERS = {
    "flux-proj": (3072, 3072),
    "flux-qkv": (9216, 3072),
    "flux-mlp-up": (12288, 3072),
    "flux-mlp-down": (3072, 12288),
    "flux-linear1": (21504, 3072),
    "flux-linear2": (3072, 15360),
    "t5-ff": (10240, 4096),
}
FLAGS_SHOWN = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
SHORTEST = 1e-3  # seconds; an action that is faster runs several times for one sample
LONG = 50 * SHORTEST  # the first run, slow as it may be, then says that one is enough
MISSING = "not installed"

Action = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What a figure is about.

    Attributes:
        name: who ran: a backend or a baseline.
        qtype: of the weights; None: they are dense.
        shape: of the weights, rows by columns.
        dtype: of the dense weights and the activations.
        tokens: rows that are multiplied; 0: the weights are only dequantized or copied.
        reads, writes: bytes of a dequantization where they are not those of the weights in qtype and dtype: a copy
            reads what it writes, and ggml writes float32.
    """

    name: str
    qtype: QType | None
    shape: tuple[int, int]
    dtype: torch.dtype
    tokens: int = 0
    reads: int | None = None
    writes: int | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    def n_bytes(self) -> int:
        """Bytes that are read and written at least once, activations included."""
        dense = self.n_weights * self.dtype.itemsize
        stored = dense if self.qtype is None else layouts.n_bytes(self.qtype, self.shape)
        if self.tokens:
            return stored + self.tokens * sum(self.shape) * self.dtype.itemsize
        return (stored if self.reads is None else self.reads) + (dense if self.writes is None else self.writes)

    def n_flops(self) -> int:
        return 2 * self.tokens * self.n_weights

    def describe(self) -> dict[str, object]:
        """The case as fields of a record."""
        fields: dict[str, object] = {"name": self.name, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}
        if self.qtype is not None:
            fields["qtype"] = self.qtype.name
        return fields | ({"tokens": self.tokens} if self.tokens else {})


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as records and options have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one figure per round."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def median(self) -> float:
        return self.percentile(50)

    def over(self, other: Timing) -> float:
        """This one's time by another one's of the same group: the median of the rounds' ratios."""
        return float(np.median([a / b for a, b in zip(self.seconds, other.seconds, strict=True)]))

    def describe(self) -> dict[str, object]:
        """The timing as fields of a record."""
        low, high = self.percentile(20), self.percentile(80)
        return {"ms": digits(1e3 * self.median), "p20": digits(1e3 * low), "p80": digits(1e3 * high)} | {
            "n": len(self.seconds)
        }


def digits(number: float) -> float:
    """A number with four significant digits."""
    return float(f"{number:.4g}")


@dataclass(frozen=True)
class Budget:
    """How long a group is measured: at least `rounds`, then until `seconds` are over, never more than `most` rounds."""

    seconds: float = 10
    rounds: int = 5
    most: int = 100


class Clock:
    """Takes the time of actions on a device.

    On CUDA it is that of the device between two events, after the L2 cache was overwritten and, unless `with_launch`,
    behind a wait that is long enough for all launches to be queued; with launches it is the clock on the wall.
    """

    def __init__(self, device: torch.device, with_launch: bool = False) -> None:
        self.device = device
        self.with_launch = with_launch
        if device.type == "cuda":
            n_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(n_bytes, 1 << 26), dtype=torch.uint8, device=device)

    def sample(self, action: Action, n: int = 1) -> float:
        """Seconds of one run, the mean of n runs in a row."""
        if self.device.type == "cuda":
            return self._sample_cuda(action)
        start = time.perf_counter()
        for _ in range(n):
            action()
        return (time.perf_counter() - start) / n

    def _sample_cuda(self, action: Action) -> float:
        self._flush.zero_()
        if self.with_launch:
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            action()
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # some 1 ms of cycles
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3

    def warm_up(self, action: Action) -> int:
        """Run it once or twice; returns how many runs one sample needs to be longer than SHORTEST, on CUDA one."""
        seconds = self.sample(action)
        if self.device.type == "cuda" or seconds > LONG:
            return 1
        return max(1, math.ceil(SHORTEST / max(self.sample(action), 1e-9)))


def take_turns(actions: Mapping[str, Action], clock: Clock, budget: Budget) -> dict[str, Timing]:
    """Time the contestants of a group in turns, each warmed up before."""
    n_runs = {name: clock.warm_up(action) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names, start = list(actions), time.perf_counter()
    for i in range(budget.most):
        if i >= budget.rounds and time.perf_counter() - start > budget.seconds:
            break
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds[name].append(clock.sample(actions[name], n_runs[name]))
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


# -- the machine --


def describe_machine(device: torch.device, n_threads: int) -> dict[str, object]:
    """What a figure depends on besides the case: device, driver, threads, versions, commit."""
    host = sys.modules.get("comfyui_version")
    fields: dict[str, object] = {"device": device_name(device), "threads": n_threads, "torch": torch.__version__}
    for name in ("triton", "llvmlite"):
        fields[name] = installed_version(name)
    if host is not None:
        fields["comfyui"] = host.__version__
    if device.type == "cuda":
        fields["driver"] = run_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        fields["isa"] = " ".join(cpu_flags())
    return fields | {"python": platform.python_version(), "git": commit()}


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next(iter(cpu_info("model name")), "") or platform.processor() or platform.machine()


def cpu_info(key: str) -> list[str]:
    """Values of a key in /proc/cpuinfo, one for each processor; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def cpu_flags() -> list[str]:
    """Those instruction sets of the processor that these figures depend on."""
    found = next(iter(cpu_info("flags") or cpu_info("Features")), "").split()
    return [flag for flag in FLAGS_SHOWN if flag in found]


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def commit() -> str:
    """Short hash of the checkout, with "-dirty" if files differ from it."""
    return run_line(["git", "describe", "--always", "--dirty", "--exclude=*"])


def run_line(command: Sequence[str]) -> str:
    """First line that a command prints, "" where it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


def machine_kind(device: torch.device, n_threads: int) -> str:
    """File name for the results of such a machine: cpu-2-threads, or the card's name."""
    if device.type != "cuda":
        return f"cpu-{n_threads}-thread{'s' if n_threads > 1 else ''}"
    return "-".join(torch.cuda.get_device_name(device).lower().split())


# -- options --


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; the module's docstring is the manual."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU (all of them)")
    parser.add_argument("--quick", action="store_true", help="small and short, only to see that it runs")
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="PATH",
        help="write the records into PATH.json and PATH.md, in place of this benchmark's older ones there; "
        "without PATH: tests/bench/results, named by the kind of machine",
    )
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for benchmarks that run elsewhere too."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)


def add_budget(parser: argparse.ArgumentParser, seconds: float = 10, rounds: int = 5) -> None:
    """--seconds and --rounds, for benchmarks whose contestants take turns."""
    parser.add_argument("--seconds", type=float, default=seconds, help=f"per group of contestants ({seconds})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"at least so many ({rounds})")


def parse_shape(text: str) -> tuple[int, int]:
    """A name of LAYERS, or rows and columns as 3072x12288."""
    if text in LAYERS:
        return LAYERS[text]
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCOLUMNS and none of {', '.join(LAYERS)}")
    return int(rows), int(columns)


def parse_qtype(text: str) -> QType:
    """A name of a type that can be dequantized."""
    qtype = QType.__members__.get(text.upper())
    if qtype not in layouts.LAYOUTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(each.name for each in layouts.LAYOUTS)}")
    return qtype


def require_cuda(parser: argparse.ArgumentParser, what: str) -> None:
    """End with a usage error where there is no GPU."""
    if not torch.cuda.is_available():
        parser.error(f"{what} needs a CUDA device, and torch {torch.__version__} sees none here")


# -- records --


class Report:
    """Collects the records of one run of a benchmark, prints each as a JSON line, and shows and saves them.

    Attributes:
        records: what add() was given, with the benchmark's name and the machine.
    """

    def __init__(self, bench: str, options: argparse.Namespace, device: torch.device | None = None) -> None:
        self.bench = bench
        self.records: list[dict[str, object]] = []
        self._save = options.save
        self._device = device or torch.device("cpu")
        self._threads = options.threads
        self._machine: dict[str, object] = {}
        torch.set_num_threads(options.threads)

    def add(self, fields: Mapping[str, object]) -> None:
        """One record; "result" is what a wrong one says instead of figures."""
        self._machine = self._machine or describe_machine(self._device, self._threads)  # now a host is imported
        record = {"bench": self.bench, **fields, **self._machine}
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def add_timing(
        self, case: Case, timing: Timing, against: Mapping[str, tuple[Case, Timing]], **fields: object
    ) -> None:
        """A timed case, with its speed and how its time relates to those of baselines."""
        speed: dict[str, object] = {"gb_per_s": digits(case.n_bytes() / timing.median / 1e9)}
        if case.tokens:
            speed["gflops"] = digits(case.n_flops() / timing.median / 1e9)
        else:
            speed["mweights_per_s"] = digits(case.n_weights / timing.median / 1e6)
        ratios = {}
        for name, (base, other) in against.items():
            ratio = timing.over(other)
            ratios[name] = {"ms": digits(1e3 * other.median), "time": digits(ratio)}
            ratios[name]["bandwidth"] = digits(case.n_bytes() / base.n_bytes() / ratio)
        self.add({**case.describe(), **fields, **timing.describe(), **speed, "against": ratios})

    def fail(self, fields: Mapping[str, object], reason: str) -> None:
        """A case whose result is wrong."""
        self.add({**fields, "result": f"FAIL: {reason}"})

    def finish(self) -> int:
        """Show the tables, save if asked to; the exit status is 1 if a result was wrong."""
        print(f"\n{tables.make_page(self.records)}")
        if self._save is not None:
            path = Path(self._save) if self._save else RESULTS / machine_kind(self._device, self._threads)
            save(path, self.bench, self.records)
        return 1 if any("result" in record for record in self.records) else 0


def save(path: Path, bench: str, records: Iterable[Mapping[str, object]]) -> None:
    """Put records into PATH.json, a line each, in place of the benchmark's older ones, and all tables into PATH.md."""
    file = path.with_name(path.name + ".json")
    kept = [record for record in read_records(file) if record["bench"] != bench] if file.exists() else []
    merged = sorted([*kept, *records], key=lambda record: str(record["bench"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in merged)
    write_whole(file, f"[\n{lines}\n]\n")
    write_whole(path.with_name(path.name + ".md"), tables.make_page(merged))


def read_records(file: Path) -> list[dict[str, object]]:
    """The records of a file that save() wrote."""
    records: list[dict[str, object]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def write_whole(file: Path, text: str) -> None:
    """Write a file that appears under its name only when complete."""
    unfinished = file.with_name(file.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


# -- results --


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 difference; inf if it is not finite."""
    error = torch.linalg.vector_norm((result - expected).float()) / torch.linalg.vector_norm(expected.float())
    return float(error) if bool(error.isfinite()) else math.inf
