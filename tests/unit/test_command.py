# SPDX-License-Identifier: Apache-2.0
"""How a command line ends when a signal stops it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A thread that nothing waits for is inside torch when the process ends, and a file is to be removed.
SCRIPT = """
import contextlib, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import _pack
import torch
from gguf_kit.tools._command import run_command

inside = threading.Event()

def work():
    while True:
        torch.zeros(2**20).to(torch.float16)
        inside.set()

@contextlib.contextmanager
def unfinished():
    open(sys.argv[2], "w").close()
    try:
        yield
    finally:
        os.unlink(sys.argv[2])

def chunks():
    with unfinished():
        while True:
            yield 0

def command():
    threading.Thread(target=work, daemon=True).start()
    inside.wait()
    print("buffered")
    for _ in chunks():
        signal.raise_signal(int(sys.argv[3]))

sys.exit(run_command("tool", command))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_ends_the_process_whatever_its_threads_do(tmp_path, number):
    path = tmp_path / "m.part"
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "tools"), str(path), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (
        128 + number,
        "buffered\n",
        "tool: stopped; nothing was written\n",
    )
    assert not path.exists()
