# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the readers of files and reports crashes, other errors than refusals, hangs and memory.

    python tests/fuzz/run.py --minutes 20 [--seed N] [--target NAME ...] [--out FOLDER]

Cases are numbered; a seed and a number always give the same file. The readers run in a process of their own, which is
started again when it dies. Files that gave a finding are kept in the folder. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

import _pack  # noqa: E402, F401
from fuzz.mutate import Content, damaged  # noqa: E402
from gguf_kit.errors import GGUFError  # noqa: E402

HANG_CPU_SECONDS = 2.0  # of one case; of the CPU, for a busy machine is no hang
START_SECONDS = 120.0
HANG_SECONDS = 20.0  # until a case that does not end is killed
MAX_GROWTH = 200 << 20  # bytes of one case
TARGETS = "fuzz.targets"  # module with the table; imported late, for it brings torch
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Finding:
    """A case that is none of read and refused."""

    target: str
    number: int
    kind: str
    text: str


def case_bytes(target: str, sound: Sequence[Content], seed: int, number: int) -> bytes:
    """The file of a case."""
    return damaged(random.Random(f"{seed}/{target}/{number}"), sound)


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory of this process since it was reset last; 0 where the system does not tell."""
    if reset and RESET.exists():
        RESET.write_text("5")
    if not STATUS.exists():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def run_case(target: Any, path: Path) -> tuple[str, str]:
    """("read" or "refused", ""), or the kind of a finding and what to say of it."""
    before, started = peak_bytes(reset=True), time.process_time()
    try:
        target.read(path)
        outcome, text = "read", ""
    except GGUFError as error:
        outcome, text = "refused", ""
        if not target.names_file(error, path):
            outcome, text = "unnamed file", str(error)
    except BaseException as error:  # a panic of a library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "?"
        outcome, text = "error", f"{type(error).__name__} at {place}: {str(error)[:200]}"
    seconds, growth = time.process_time() - started, peak_bytes() - before
    if seconds > HANG_CPU_SECONDS:
        return "slow", f"{seconds:.1f} s"
    if growth > MAX_GROWTH:
        return "memory", f"{growth >> 20} MB"
    return outcome, text


def targets_of(module: str) -> Mapping[str, Any]:
    """The table of a module: name -> Target."""
    targets: Mapping[str, Any] = importlib.import_module(module).TARGETS
    return targets


def work(pipe: Any, module: str, seed: int, first: int, names: Sequence[str], folder: str) -> None:
    """Run cases from `first` on until the other end of the pipe is closed; report each before and after."""
    warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
    targets = targets_of(module)
    sounds = {name: targets[name].make() for name in names}
    for number in range(first, sys.maxsize):
        name = names[number % len(names)]
        path = Path(folder) / f"case-{number}{targets[name].suffix}"
        path.write_bytes(case_bytes(name, sounds[name], seed, number))
        pipe.send((number, name, None, None))
        pipe.send((number, name, *run_case(targets[name], path)))
        path.unlink()


def say(text: str) -> None:
    """A line of output, at once also where it goes to a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Campaign:
    """Cases of some targets in a process that is watched."""

    def __init__(
        self, seed: int, names: Sequence[str], out: Path, *, module: str = TARGETS, patience: float = HANG_SECONDS
    ) -> None:
        self.seed, self.names, self.out, self.module, self.patience = seed, names, out, module, patience
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.findings: list[Finding] = []
        self.next = 0

    def run(self, seconds: float, enough: int = sys.maxsize) -> None:
        """Start the worker, again after each death, until the time is over or there are enough findings."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.findings) < enough:
            with tempfile.TemporaryDirectory() as folder:
                self._watch(end, folder)

    def _watch(self, end: float, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, self.module, self.seed, self.next, self.names, folder)
        worker = context.Process(target=work, args=arguments, daemon=True)
        worker.start()
        theirs.close()
        running, patience = "", START_SECONDS  # importing takes a while
        try:
            while time.monotonic() < end:
                if not ours.poll(min(patience, max(end - time.monotonic(), 0))):
                    if time.monotonic() < end:
                        self._report(running, "hang", f"more than {patience} s")
                    return
                number, running, outcome, text = ours.recv()
                self.next, patience = number + 1, self.patience
                if outcome is not None:
                    self._count(number, running, outcome, text)
        except EOFError:
            worker.join(10)
            self._report(running, "crash", f"the process ended with {worker.exitcode}")
        finally:
            worker.kill()
            worker.join()

    def _count(self, number: int, name: str, outcome: str, text: str) -> None:
        if outcome not in ("read", "refused"):
            self._report(name, outcome, text)
        else:
            self.outcomes[name, outcome] += 1

    def _report(self, name: str, kind: str, text: str) -> None:
        if not name:
            raise SystemExit(f"the worker does not start: {text}")
        number = self.next - 1
        self.outcomes[name, kind] += 1
        known = any((f.target, f.kind, f.text) == (name, kind, text) for f in self.findings)
        self.findings.append(Finding(name, number, kind, text))
        if not known:
            self.out.mkdir(parents=True, exist_ok=True)
            target = targets_of(self.module)[name]
            content = case_bytes(name, target.make(), self.seed, number)
            (self.out / f"{name}-{number}{target.suffix}").write_bytes(content)
            say(f"{name} {number}: {kind}: {text}")

    def summary(self) -> str:
        """A line for each target and one for the whole."""
        lines = []
        for name in self.names:
            counts = {kind: n for (target, kind), n in sorted(self.outcomes.items()) if target == name}
            lines.append(f"{name}: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
        return "\n".join([*lines, f"{sum(self.outcomes.values())} cases, {len(self.findings)} findings"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=[*targets_of(TARGETS)], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args(argv)
    campaign = Campaign(arguments.seed, arguments.target or [*targets_of(TARGETS)], arguments.out)
    campaign.run(60 * arguments.minutes)
    say(campaign.summary())
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
