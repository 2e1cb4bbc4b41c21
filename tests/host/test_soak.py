# SPDX-License-Identifier: Apache-2.0
"""Fifty rounds of loading, sampling with changing LoRAs and unloading leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.host import get_host

SOAK = Path(__file__).with_name("soak.py")
N_ROUNDS = 50
COUNTS = ("tensors", "modules", "maps", "mapped files", "open files", "loaded models")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_rounds_leave_nothing_behind(tiny_flux):
    command = [sys.executable, str(SOAK), *(str(tiny_flux(name)) for name in ("Q4_K_S", "Q8_0"))]
    done = subprocess.run(
        [*command, "--rounds", str(N_ROUNDS)],
        env={**os.environ, "COMFYUI_PATH": str(get_host()), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    looks = {look["round"]: look for look in map(json.loads, done.stdout.splitlines())}
    early, late = looks[5], looks[N_ROUNDS]
    assert late["rss"] <= 1.02 * early["rss"], looks
    assert [late[name] for name in COUNTS] == [early[name] for name in COUNTS], looks
    assert late["maps"] == late["mapped files"] == late["loaded models"] == 0
    # 30 rounds apart the file and the LoRAs are the same again.
    assert looks[35]["sums"] == early["sums"]
    assert looks[40]["sums"] == looks[10]["sums"]
