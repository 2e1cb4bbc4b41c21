# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that need a host run in it, check what they time, and record what their tables need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.host import get_host

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize(
    ("script", "options", "fields"),
    [
        ("bench_linear", ["--qtypes", "Q8_0"], {"dtype", "shape", "tokens", "ms", "against"}),
        ("bench_step", [], {"model", "dtype", "tokens", "ms", "against"}),
        ("bench_lora", ["--loras", "1"], {"loras", "rank", "tokens", "ms", "against"}),
        ("bench_collect", [], {"model", "rows", "tokens", "ms", "against"}),
        ("bench_load", [], {"seconds", "resident_added_mb", "peak_added_mb"}),
    ],
    ids=["Linear", "step", "LoRA", "collector", "loading"],
)
def test_a_benchmark_runs(tmp_path, script, options, fields):
    command = [
        sys.executable,
        str(BENCH / f"{script}.py"),
        "--quick",
        "--threads",
        "1",
        "--save",
        str(tmp_path / "kind"),
    ]
    environment = os.environ | {"COMFYUI_PATH": str(get_host())}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "kind.json").read_text(encoding="utf-8"))
    assert records
    for record in records:
        assert (fields | {"bench", "name", "comfyui", "device", "threads", "git"}) <= {*record}, record
    assert (tmp_path / "kind.md").read_text(encoding="utf-8").count("\n|") >= 2 + 1
