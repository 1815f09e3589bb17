"""SIGTERM to a test run ends it, and with it everything that its tests have started."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CHILD = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "
    "'deaf' else signal.SIG_DFL); print('up', flush=True); time.sleep(600)"
)
TESTS = """
import os, subprocess, sys, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent

def start(kind):
    command = [sys.executable, "-c", {child!r}, kind]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    with (HERE / "pids").open("a") as file:
        file.write(f"{{child.pid}}\\n")
    return child

@pytest.fixture
def server():
    child = start("listens")
    yield child
    child.terminate()
    child.wait()
    (HERE / "torn down").touch()

def test_waits(server):
    start("deaf")  # which nobody ends
    (HERE / "ready").touch()
    time.sleep(600)

def test_never_begins():
    (HERE / "went on").touch()
"""


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(
            timeout=10
        )[0]
        time.sleep(0.1)


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(0, id="in one process"),
        pytest.param(1, id="in a worker", marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_make_test_ends_what_the_tests_started(tmp_path, workers):
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    (tmp_path / "test_servers.py").write_text(TESTS.format(child=CHILD))
    options = (
        f"-p tests.leftovers -p no:cacheprovider --rootdir {tmp_path} "
        f"{f'-n {workers}' if workers else ''} {tmp_path}"
    )
    command = ["make", "test", f"PYTHON={sys.executable}", f"PYTEST={options}"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    make = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tmp_path / "ready", make)
    started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(started) == 2 and all(map(psutil.pid_exists, started))
    make.send_signal(signal.SIGTERM)
    said, _ = make.communicate(timeout=60)
    assert make.returncode != 0
    assert not [pid for pid in started if psutil.pid_exists(pid)], said
    assert (tmp_path / "torn down").exists() and not (tmp_path / "went on").exists(), said
