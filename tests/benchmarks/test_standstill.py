"""What is timed has the machine to itself: others that share it stand still meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.standstill import ROOT, Standstill

COUNT = "import sys, time\nwhile True:\n    print(flush=True); time.sleep(0.01)"
TIMED = """
import os, subprocess, sys, time
from benchmarks.standstill import Standstill
own = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=open(sys.argv[2], "w"))
with Standstill() as others:
    others.stop_others()
    others.stop_others()
    print("stopped", flush=True)
    input()
print("over", flush=True)
input()
own.kill()
"""


def lines_in(path: Path, seconds: float = 0.6) -> int:
    """How many lines a process adds to its file."""
    before = path.stat().st_size
    time.sleep(seconds)
    return path.stat().st_size - before


@pytest.fixture
def started():
    processes = []

    def start(*arguments: str, **options) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, "-c", *arguments], **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("shared", [True, False])
def test_others_stop_and_go_on(started, tmp_path, shared):
    other, own = tmp_path / "other", tmp_path / "own"
    started(COUNT, stdout=other.open("w"))
    env = {**os.environ, **({ROOT: str(os.getpid())} if shared else {})}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    timed = started(TIMED, COUNT, str(own), **pipes)
    assert timed.stdout.readline() == "stopped\n"
    deadline = time.monotonic() + 20
    while not own.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bool(lines_in(other)) is not shared
    assert lines_in(own), "what the timed process started goes on"
    timed.stdin.write("\n")
    timed.stdin.flush()
    assert timed.stdout.readline() == "over\n"
    assert lines_in(other)
    timed.communicate("\n")


def test_nothing_is_stopped_unless_told(monkeypatch):
    monkeypatch.delenv(ROOT, raising=False)
    with Standstill() as others:
        others.stop_others()
