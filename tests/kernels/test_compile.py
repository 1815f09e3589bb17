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
def compiled() -> dict[str, list | str]:
    """By capability, what a process of its own found. What Triton has compiled before of the same
    source it does not compile again.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels", *map(str, SHARED_KIB)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_and_fits(compiled, capability):
    found = compiled[str(capability)]
    assert isinstance(found, list), found[-3000:]
    assert {entry["kernel"] for entry in found} == kernels()
    for entry in found:
        # Without matrix products it takes as much elsewhere, where not each shape is compiled.
        limits = [SHARED_KIB[capability]] if entry["products"] else SHARED_KIB.values()
        assert entry["shared"] <= 1024 * min(limits), entry
