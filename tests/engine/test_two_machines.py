"""One engine on two machines, as far as one machine can be two: the second is a network namespace
at the end of a cable, with processes, temporary files and shared memory that the first cannot see.
vLLM's own `--nnodes` carries us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from specontext_vllm.demo.server import (
    VllmServer,
    device_arguments,
    serve_command,
    server_environment,
)
from specontext_vllm.observability import catalog
from specontext_vllm.synthetic.tasks import make_problem, score
from tests.engine.conftest import DEMO_MODEL
from tests.engine.test_metrics import REST_SECONDS, Page, check_decodes, page_at_rest, worker_stats

SETTINGS = {"budget": 256, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0115, "stickiness": 0}
METRICS_PORT = 9464

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's test"),
    pytest.mark.skipif(not (DEMO_MODEL / "config.json").exists(), reason="models/demo is missing"),
]


class Second:
    """The second machine.

    Args:
        interface, address: its end of the cable.
        tmp: its folder for temporary files.
        log: of its `vllm serve`.
    """

    def __init__(self, name: str, interface: str, address: str, tmp: Path, log: Path) -> None:
        self.name, self.interface, self.address, self.tmp, self.log = (
            name,
            interface,
            address,
            tmp,
            log,
        )

    def popen(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        apart = 'mount -t tmpfs none /dev/shm && exec "$@"'
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    self.name,
                    "unshare",
                    "--mount",
                    "--ipc",
                    "bash",
                    "-c",
                    apart,
                    "-",
                    *command,
                ],
                env={**environment, "TMPDIR": str(self.tmp)},
                cwd=self.tmp,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def cable(tmp: Path) -> Iterator[tuple[str, str, Second]]:
    """Our end's interface and address, and the second machine at the other end.

    Skips where this process may not make them.
    """
    number = os.getpid() % 250
    name, ours, theirs = f"specontext-{number}", f"sc-{number}-a", f"sc-{number}-b"
    first, second = f"10.201.{number}.1", f"10.201.{number}.2"
    begin = [
        f"ip netns add {name}",
        f"ip link add {ours} type veth peer name {theirs} netns {name}",
        f"ip addr add {first}/24 dev {ours}",
        f"ip link set {ours} up",
        f"ip -n {name} addr add {second}/24 dev {theirs}",
        f"ip -n {name} link set {theirs} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for line in begin:
            try:
                done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("needs the `ip` command (iproute2)")
            if done.returncode:
                pytest.skip(
                    f"this process may not make network namespaces: {line}: {done.stderr.strip()}"
                )
        (tmp / "tmp").mkdir()
        yield ours, first, Second(name, theirs, second, tmp / "tmp", tmp / "second.log")
    finally:
        left = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        ).stdout.split()
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "link", "del", ours], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def two_machines(forking_servers, tmp_path_factory) -> Iterator[tuple[VllmServer, str]]:
    """The server on the first machine, and where the second one's `specontext metrics` is."""
    folder = tmp_path_factory.mktemp("machines")
    (folder / "first").mkdir()
    with cable(folder) as (interface, address, second), pytest.MonkeyPatch.context() as patch:
        nodes = [
            "--attention-backend",
            "specontext",
            "--served-model-name",
            "demo",
            "--tensor-parallel-size",
            "2",
            "--nnodes",
            "2",
            "--master-addr",
            address,
            "--master-port",
            "29517",
            "--max-model-len",
            "4096",
            "--max-num-seqs",
            "4",
            "--num-gpu-blocks-override",
            "520",
            "--gpu-memory-utilization",
            "0.2",
            "--additional-config",
            json.dumps({"specontext": SETTINGS}),
            *device_arguments(),
        ]
        there = {
            **server_environment(),
            "GLOO_SOCKET_IFNAME": second.interface,
            "VLLM_HOST_IP": second.address,
            "SPECONTEXT_TEST_FORKS": "1",
        }
        worker = second.popen(
            serve_command(DEMO_MODEL, *nodes, "--node-rank", "1", "--headless"), there
        )
        metrics = second.popen(
            [
                sys.executable,
                "-m",
                "specontext_vllm.cli",
                "metrics",
                "--host",
                second.address,
                "--port",
                str(METRICS_PORT),
            ],
            there,
        )
        for key, value in {
            "GLOO_SOCKET_IFNAME": interface,
            "VLLM_HOST_IP": address,
            "SPECONTEXT_TEST_FORKS": "1",
            "TMPDIR": str(folder / "first"),
        }.items():
            patch.setenv(key, value)
        with VllmServer(DEMO_MODEL, [*nodes, "--node-rank", "0"]) as server:
            yield server, f"http://{second.address}:{METRICS_PORT}"
        for process in (worker, metrics):
            process.terminate()
            process.wait(60)
        left = [str(path) for path in folder.glob("*/specontext-metrics-*")]
        assert not left, left


def test_a_worker_on_each_machine_selects_for_its_heads_and_each_machine_has_its_figures(
    two_machines,
):
    server, elsewhere = two_machines
    worker_stats(server.url, reset=True)
    before, before_there = Page(server.url), Page(elsewhere)
    assert {rank for _, rank, _ in before.samples} == {"0", None} and {
        rank for _, rank, _ in before_there.samples
    } == {"1"}
    before.samples |= before_there.samples
    problems = [make_problem("needle", seed=40 + i, approx_tokens=2500) for i in range(3)]
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        for problem in problems:
            answer = client.chat.completions.create(
                model="demo", messages=problem.messages, temperature=0, max_tokens=32
            )
            assert score(problem, answer.choices[0].message.content) == 1.0, answer.choices[
                0
            ].message.content
    stats = worker_stats(server.url)
    assert len(stats) == 2
    page = page_at_rest(server.url, before, stats)
    deadline = time.monotonic() + REST_SECONDS
    there = Page(elsewhere)
    while (
        there.get(catalog.PAGES_READ, 1) - before.get(catalog.PAGES_READ, 1)
        < stats[1]["pages_read"]
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
        there = Page(elsewhere)
    page.samples |= there.samples
    check_decodes(before, page, stats)
    for rank, worker in enumerate(stats):
        assert worker["pages_read"] < 0.12 * worker["pages_total"]
        assert (
            page.get(catalog.FETCHED_BYTES, rank) - before.get(catalog.FETCHED_BYTES, rank)
            == worker["fetched_bytes"]
            > 0
        )
        assert page.get(catalog.HOST_POOL_BYTES, rank) == worker["host_pool_bytes"] > 0
