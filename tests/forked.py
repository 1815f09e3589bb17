"""Processes of tests that are forked from one that has imported what they need, which takes each
ten seconds. All processes of a test session share it; it starts with the first that is asked for.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

ROOT = Path(__file__).parents[1]
FOLDER = "SPECONTEXT_TEST_FORK_SERVER"
"""Environment variable that all processes of a session inherit: the folder of its fork server."""
IMPORTED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor",
    "accelerate",
    "specontext_vllm.distillation.command",
    "torch._dynamo",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
"""What engines, servers and a training run on the demo model import."""
OF_A_CPU = ("vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu_worker")
END_SECONDS = 10
SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class ForkServer:
    """Owns the fork server's folder, and ends it; in the main process of a test session."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="specontext-forks-"))
        os.mkfifo(self._folder / "alive")
        # The fork server ends when nobody has this open any more. Read, too, so that this waits
        # for nobody.
        self._alive = os.open(self._folder / "alive", os.O_RDWR)
        os.environ[FOLDER] = str(self._folder)

    def close(self) -> None:
        """Ask the fork server, if there is one, to end."""
        _leave()
        os.close(self._alive)
        os.environ.pop(FOLDER, None)
        with suppress(FileNotFoundError, psutil.Error):
            psutil.Process(int((self._folder / "pid").read_text())).wait(END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)


class Process(ForkServerProcess):
    """Has the environment in which it was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def _bootstrap(self, *args: Any, **kwargs: Any) -> int:
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None
        return super()._bootstrap(*args, **kwargs)


class Context(ForkServerContext):
    Process = Process


def context() -> ForkServerContext:
    """A context of ``multiprocessing`` for processes of the session's fork server."""
    server = forkserver._forkserver
    folder = Path(os.environ[FOLDER])
    if server._forkserver_alive_fd is None:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "socket").exists():
                _start(folder)
        server._forkserver_address = str(folder / "socket")
        server._forkserver_alive_fd = os.open(folder / "alive", os.O_WRONLY)
        # It would start one of this process's own.
        server.ensure_running = resource_tracker.ensure_running
    return Context()


def _start(folder: Path) -> None:
    """Start a fork server, as ``multiprocessing`` does."""
    modules, environment = list(IMPORTED), dict(os.environ)
    if not torch.cuda.is_available():
        modules += OF_A_CPU
        environment["SPECONTEXT_TEST_FORKS"] = "1"
    modules.append("tests.subprocesses.frozen")
    alive = os.open(folder / "alive", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        fds = (listener.fileno(), alive)
        code = f"from multiprocessing.forkserver import main; main(*{fds}, {modules})"
        started = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
        )
    os.close(alive)
    (folder / "pid").write_text(str(started.pid))


def _leave() -> None:
    server = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = server._forkserver_address = None


class ServerProcess:
    """Stands in for ``subprocess.Popen`` of `vllm serve`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: dict[str, str],
        stdout: BinaryIO,
        **options: Any,
    ) -> None:
        assert list(command[:3]) == SERVE, command
        self.returncode: int | None = None
        arguments = (list(command[3:]), str(cwd), env, stdout.name)
        self._process = context().Process(target=_serve, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("vllm serve", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Raises nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    """Be the process of `vllm ARGUMENTS`, in a session of its own."""
    from vllm.entrypoints.cli.main import main

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["vllm", *arguments]
    # To vLLM it is a main process, whose shared memory goes with it.
    process.current_process().name, process._parent_process = "MainProcess", None
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    finally:
        # Of these ``multiprocessing`` knows nothing.
        atexit._run_exitfuncs()
