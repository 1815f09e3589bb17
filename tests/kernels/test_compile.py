"""Every kernel compiles for GPUs that are not here, and fits into a program's shared memory there.
Which values they compute, a compiler cannot tell.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_KIB = {86: 99, 90: 227, 120: 99}
"""Most shared memory of a program by compute capability times ten (CUDA C++ Programming Guide,
technical specifications): the least of Ampere and of Blackwell, and Hopper."""


def kernels() -> set[str]:
    """Names of the kernels that the package launches: its jitted functions but for those that
    others call.
    """
    trees = [ast.parse(path.read_text()) for path in (ROOT / "triton_kernels").glob("*.py")]
    functions = [
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    return {function.name for function in functions if function.name.endswith("_kernel")}


@pytest.fixture(scope="module")
def compilers():
    """One process for each, all at once: most of the time is one core's. What Triton has compiled
    before of the same source it does not compile again.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}

    def start(capability: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    running = {capability: start(capability) for capability in SHARED_KIB}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_and_fits(compilers, capability):
    out, errors = compilers[capability].communicate()
    assert compilers[capability].returncode == 0, errors[-3000:]
    compiled = json.loads(out.splitlines()[-1])
    assert {entry["kernel"] for entry in compiled} == kernels()
    for entry in compiled:
        assert entry["shared"] <= 1024 * SHARED_KIB[capability], entry
