# SPDX-License-Identifier: Apache-2.0
"""Runs a ComfyUI server on the CPU and speaks to it over its HTTP API, on 127.0.0.1 and with the standard library only.

Everything is computed in float32 on one thread, so results differ by the weights alone and are the same on each run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .host import HostError, is_host

ADDRESS = "127.0.0.1"
SERVER_FLAGS = ("--cpu", "--fp32-unet", "--fp32-vae", "--fp32-text-enc")
QUIET_FLAGS = ("--disable-auto-launch", "--disable-api-nodes", "--disable-metadata", "--disable-all-custom-nodes")
# One thread: with more, small models get slower and results depend on the machine. Nothing may ask the network.
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    "GGUF_KIT_TEST_SERVER": "1",  # demo/test_nodes then ends the server when this process is gone
}
START_SECONDS = 300
STOP_SECONDS = 10
POLL_SECONDS = 0.05
LOG_LINES_SHOWN = 40


class ServerError(RuntimeError):
    """The server did not start, died, or did not answer; the message ends with the last lines of its log."""


class WorkflowError(RuntimeError):
    """A workflow was refused or failed.

    Attributes:
        node_type: class of the node that failed, or "" when the workflow was refused as a whole.
        exception_type: name of the Python exception in the server, or "".
        exception_message: what a user sees in ComfyUI's error dialog.
    """

    def __init__(self, exception_message: str, node_type: str = "", exception_type: str = "") -> None:
        self.node_type = node_type
        self.exception_type = exception_type
        self.exception_message = exception_message
        super().__init__(f"{node_type or 'workflow'}: {exception_type} {exception_message}")


class ComfyServer:
    """A ComfyUI server as a context manager: started and answering inside, stopped for certain outside.

    Attributes:
        url: where it answers.
        log: file with everything it printed.
    """

    def __init__(
        self, host: Path, base: Path, log: Path, python: str | Path = sys.executable, arguments: Sequence[str] = ()
    ) -> None:
        """Say what to run.

        Args:
            host: folder of a ComfyUI.
            base: base directory made by host.make_base; all in its custom_nodes is loaded, and nothing else.
            log: file for the output.
            python: interpreter that has the host's requirements.
            arguments: more command line arguments for main.py.
        """
        if not is_host(host):
            raise HostError(f"{host} is not a ComfyUI. Set COMFYUI_PATH to the folder of one.")
        self.host, self.base, self.log = host, base, log
        self.python, self.arguments = python, tuple(arguments)
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        # Proxy settings of the environment are not for the loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> ComfyServer:
        self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def object_info(self) -> dict[str, Any]:
        """All nodes: id -> description as the browser gets it."""
        nodes: dict[str, Any] = self._get_json("/object_info")
        return nodes

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices as the server reports them."""
        stats: dict[str, Any] = self._get_json("/system_stats")
        return stats

    def submit(self, workflow: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Run a workflow in API form and wait for it.

        Returns:
            the history entry: "outputs" {node id: ...}, "status" {"messages": [...]}.
        Raises:
            WorkflowError: it was refused, or a node failed.
            ServerError: the server died, or timeout seconds passed.
        """
        request = urllib.request.Request(
            self.url + "/prompt",
            data=json.dumps({"prompt": workflow}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            prompt_id = json.loads(self._open(request))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError(_refusal(error.read().decode(errors="replace"))) from error
        entry = self._wait_for_history(prompt_id, timeout)
        for kind, detail in entry["status"]["messages"]:
            if kind == "execution_error":
                raise WorkflowError(detail["exception_message"].strip(), detail["node_type"], detail["exception_type"])
        return entry

    def download(self, output: dict[str, str]) -> bytes:
        """Bytes of a file that a history entry's outputs name: {"filename", "subfolder", "type"}."""
        return self._open(f"{self.url}/view?{urllib.parse.urlencode(output)}")

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        """Last lines of the server's output, without the colours of newer hosts."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Ask the server and what it started to end, and end them if they do not."""
        process = self._process
        if process is None:
            return
        self._process = None
        _signal_group(process, hard=False)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        _signal_group(process, hard=True)
        process.wait()
        if process.stdin:
            process.stdin.close()

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind((ADDRESS, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{ADDRESS}:{port}"
        # Folders of an extra_model_paths.yaml of the host's may hold more node packs: load ours only, by name.
        node_packs = sorted(path.name for path in (self.base / "custom_nodes").iterdir())
        command = [str(self.python), "main.py", *SERVER_FLAGS, *QUIET_FLAGS]
        command += ["--whitelist-custom-nodes", *node_packs, "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--listen", ADDRESS, "--port", str(port), *self.arguments]
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.host,
                env={**os.environ, **SERVER_ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                **group,
            )

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            self._check_alive()
            try:
                self._get_json("/system_stats")
                return
            except ConnectionError:  # not listening yet
                time.sleep(POLL_SECONDS)
        raise ServerError(
            f"ComfyUI did not answer within {START_SECONDS} s. Its log {self.log} ends:\n{self.log_tail()}"
        )

    def _wait_for_history(self, prompt_id: str, timeout: float) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self._check_alive()
            try:
                entries = self._get_json(f"/history/{prompt_id}")
            except ConnectionError:  # it is just dying, and the check above says so with its log
                entries = {}
            if prompt_id in entries:
                entry: dict[str, Any] = entries[prompt_id]
                return entry
            time.sleep(POLL_SECONDS)
        raise ServerError(f"a workflow took more than {timeout} s. The log {self.log} ends:\n{self.log_tail()}")

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = self._process.returncode if self._process else "none"
            raise ServerError(f"ComfyUI ended with status {code}. Its log {self.log} ends:\n{self.log_tail()}")

    def _open(self, request: str | urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=60) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            raise ConnectionError(f"{self.url}: {error.reason}") from error

    def _get_json(self, path: str) -> Any:
        return json.loads(self._open(self.url + path))


def _refusal(body: str) -> str:
    """One line out of the answer to a workflow that ComfyUI refuses."""
    try:
        answer = json.loads(body)
    except json.JSONDecodeError:
        return body.strip()
    details = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    return "; ".join([answer["error"]["message"], *details])


def _signal_group(process: subprocess.Popen[bytes], hard: bool) -> None:
    """End a process and its children: asked (hard=False) or at once."""
    if sys.platform == "win32":
        if hard:
            process.kill()
        else:
            process.terminate()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL if hard else signal.SIGTERM)
    except ProcessLookupError:
        pass


def execution_seconds(entry: dict[str, Any]) -> float:
    """Seconds between start and end of a workflow by the server's own clock, from its history entry."""
    stamps = {kind: detail["timestamp"] for kind, detail in entry["status"]["messages"]}
    return float(stamps["execution_success"] - stamps["execution_start"]) / 1000
