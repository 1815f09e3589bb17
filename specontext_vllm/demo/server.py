"""A `vllm serve` process that is always stopped: for the demo, benchmarks and tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 600.0
"""Longest start: compiling and capturing graphs on a GPU takes one to two minutes."""

STOP_SECONDS = 30.0
"""Time for an orderly shutdown, after which the whole process group is killed."""

ENGINE_STOP_SECONDS = 5.0
"""Time for the engine's processes to end after the server."""

LOG_TAIL = 30
"""Lines of the log in the message of a failed start."""


class ServerError(RuntimeError):
    """The server ended or did not answer in time; the message ends with the tail of its log."""


def has_gpu() -> bool:
    """Whether vLLM would find a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def device_arguments() -> list[str]:
    """Options of `vllm serve` for this machine.

    On a CPU nothing is compiled, which would take a C++ compiler and minutes, and float32 replaces
    bfloat16, which most CPUs only emulate.
    """
    return [] if has_gpu() else ["--enforce-eager", "--dtype", "float32"]


def server_environment() -> dict[str, str]:
    """The server's environment: this process's, offline, with the endpoint for `collective_rpc`."""
    env = dict(os.environ)
    # Tests set these for engines in their own process; a server needs an engine process.
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "TRITON_INTERPRET"):
        env.pop(name, None)
    env |= {
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not has_gpu():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    elif importlib.util.find_spec("flashinfer") is None:
        env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return env


def serve_command(model: Path, *arguments: str) -> list[str]:
    """`vllm serve` of the running interpreter, whatever PATH says."""
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(model.resolve()),
        *arguments,
    ]


class VllmServer:
    """A context manager around one server on a free port of 127.0.0.1.

    Args:
        model: the model's folder.
        arguments: further options of `vllm serve`.
        on_wait: called about once a second with the seconds waited so far, while the server starts.

    Raises:
        ServerError: on entering, when the server does not come up.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str] = (),
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self._model, self._arguments, self._on_wait = model, arguments, on_wait
        self._process: subprocess.Popen[bytes] | None = None
        # Kept after a failure, whose message names the log in it.
        self.folder = Path(tempfile.mkdtemp(prefix="specontext-serve-"))
        self.log = self.folder / "server.log"
        self.port = _free_port()
        self.start_seconds = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server; its engine's processes are its children."""
        return self._running.pid

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("The server was not started: use it as a context manager.")
        return self._process

    def __enter__(self) -> VllmServer:
        command = serve_command(
            self._model, *self._arguments, "--host", "127.0.0.1", "--port", str(self.port)
        )
        with self.log.open("wb") as log:
            # Its own session: Ctrl-C reaches only this process, which stops the server. Its own
            # folder: a source tree in the current one must not shadow the installed plugin.
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._stop(grace=0.0)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def rpc(self, method: str, **kwargs: Any) -> Any:
        """The first worker's answer to `collective_rpc`."""
        body = json.dumps({"method": method, "kwargs": kwargs}).encode()
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["results"][0]

    def resident_bytes(self) -> int:
        """Resident memory of the server and all processes it started; shared pages count once for
        each.
        """
        import psutil

        total = 0
        server = psutil.Process(self.pid)
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])

    def _wait(self) -> None:
        begin = time.monotonic()
        while True:
            self.start_seconds = time.monotonic() - begin
            code = self._running.poll()
            if code is not None:
                raise ServerError(
                    f"The server ended with exit code {code} while it started; {self.log} "
                    f"says:\n{self.log_tail()}"
                )
            if self.start_seconds > START_SECONDS:
                raise ServerError(
                    f"The server did not answer within {START_SECONDS:.0f} s; {self.log} "
                    f"says:\n{self.log_tail()}"
                )
            with contextlib.suppress(OSError):  # not listening yet
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            if self._on_wait:
                self._on_wait(self.start_seconds)
            time.sleep(1)

    def _stop(self, grace: float = STOP_SECONDS) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(grace)
            # The engine's processes notice that the server is gone, and free their memory.
            deadline = time.monotonic() + min(grace, ENGINE_STOP_SECONDS)
            while time.monotonic() < deadline and _group_lives(self._process.pid):
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
