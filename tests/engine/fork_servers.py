"""Several `vllm serve` processes for one import of vLLM, which is most of a start that fails.

    python -m tests.engine.fork_servers < starts.json > ends.json

Reads a list of ``{"arguments": [...], "log": path}``. All start at once, each in a child that is
forked when vLLM has been imported and writes its stderr to its log. Prints their exit codes; a
child that is still there after ``SECONDS`` is killed, which is code -9.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

SECONDS = 180


def serve(arguments: list[str], log: Path) -> NoReturn:
    """Be the process of `vllm serve ARGUMENTS`."""
    from vllm.entrypoints.cli.main import main

    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["vllm", "serve", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        # As the interpreter does with what nobody has caught.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, deadline: float) -> int:
    """The exit code of a child; it is killed when the time is up."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.1)


def run(starts: list[dict]) -> list[int]:
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.cli.serve
    import vllm.entrypoints.openai.api_server  # noqa: F401

    children = []
    for start in starts:
        child = os.fork()
        if child == 0:
            serve(start["arguments"], Path(start["log"]))
        children.append(child)
    deadline = time.monotonic() + SECONDS
    return [ended(child, deadline) for child in children]


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
