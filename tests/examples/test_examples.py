"""The programs in examples/ do what they say, on the demo model."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from specontext_vllm.demo.server import device_arguments, server_environment
from specontext_vllm.synthetic.tasks import make_problem, score
from tests.conftest import CUDA
from tests.engine.conftest import cheap_collections, import_vllm

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEMO_MODEL = ROOT / "models" / "demo"
START_SECONDS, STOP_SECONDS = 300, 30

pytestmark = pytest.mark.slow


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs an example's main() in this process, which has imported vLLM already."""

    def run(name: str, *arguments: str) -> str:
        from vllm.distributed import cleanup_dist_env_and_memory

        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", str(DEMO_MODEL), *arguments])
        capsys.readouterr()
        import_vllm()
        with cheap_collections():
            try:
                module.main()
            finally:
                gc.collect()
                cleanup_dist_env_and_memory()
        return capsys.readouterr().out

    return run


def test_offline_answers_from_a_part_of_the_pages(run_here):
    said = run_here("offline", "--tokens", "2500")
    expected = re.search(r"^expected: (.+)$", said, re.M)[1]
    assert expected in re.search(r"^answer: (.+)$", said, re.M)[1]
    assert 0.1 < float(re.search(r"pages read: ([\d.]+)%", said)[1]) / 100 < 0.3


def test_more_context_serves_more_than_the_gpu_holds(run_here):
    said = run_here("more_context")
    answers = re.findall(r"^answer: (.+) \(expected: (.+)\)$", said, re.M)
    assert len(answers) == 4 and sum(expected in answer for answer, expected in answers) >= 3
    # Of the 14,000 tokens that are asked about, less than half fit into the GPU's share.
    assert int(re.search(r"^(\d+) tokens fit at once", said, re.M)[1]) > 14_000
    resident, layers = re.search(r"^(\d) of (\d) layers are whole", said, re.M).groups()
    assert resident < layers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that distill_and_serve.sh has started with a head of a few steps."""
    folder = tmp_path_factory.mktemp("served")
    for command, module in (
        ("specontext", "specontext_vllm.cli"),
        ("vllm", "vllm.entrypoints.cli.main"),
    ):
        (folder / command).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (folder / command).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = server_environment() | {"STEPS": "2", "CONTEXT": "256"}
    if not CUDA:
        env["SPECONTEXT_TEST_FORKS"] = "1"
    env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    script = [EXAMPLES / "distill_and_serve.sh", DEMO_MODEL, folder / "head", *options]
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*map(str, script), *device_arguments(), "--gpu-memory-utilization", "0.3"],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")


def test_a_distilled_head_is_served_and_the_answer_streams(served, tmp_path):
    problem = make_problem("needle", seed=3, approx_tokens=400, layout="question_last")
    text, _, question = problem.messages[-1]["content"].rpartition("\n")
    (tmp_path / "text.txt").write_text(text)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "chat_streaming.py"), question, "--url", served]
        + ["--file", str(tmp_path / "text.txt")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert score(problem, done.stdout) == 1.0, done.stdout
    with urllib.request.urlopen(f"{served}/metrics", timeout=10) as answer:
        rows = re.search(
            r"^vllm:specontext_decode_rows_total\S* (\S+)", answer.read().decode(), re.M
        )
    assert float(rows[1]) > 0


def test_every_example_is_in_the_index_and_tested():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    index, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(name in index for name in names)
    assert all(name in here or f'"{name.removesuffix(".py")}"' in here for name in names)
