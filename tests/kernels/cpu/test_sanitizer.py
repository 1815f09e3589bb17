"""The kernels' tests once more under AddressSanitizer, for both kinds of x86 CPUs; and the sources
as a machine without a vector width of its own compiles them, and as an Arm machine does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TESTS = ("test_decode.py", "test_score.py", "test_select.py", "test_pack.py")
SOURCES = ROOT / "csrc" / "cpu"
COMPILER = """#!/bin/sh
exec g++ "$@" -fsanitize=address -fno-omit-frame-pointer -O0
"""
"""Its options come after those of setup.py, whose -O3 takes four times as long to compile."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or bool(torch.version.cuda),
        reason="no g++, or a build of torch for GPUs",
    ),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """Folder of libraries that AddressSanitizer watches, kept for as long as their sources, torch
    and the compiler stay what they are.
    """
    inputs = [ROOT / "setup.py", *sorted(SOURCES.iterdir())]
    version = subprocess.check_output(["g++", "--version"])
    key = hashlib.sha256(COMPILER.encode() + torch.__version__.encode() + version)
    for path in inputs:
        key.update(path.read_bytes())
    kept = ROOT / "build" / f"sanitized-{key.hexdigest()[:16]}"
    if not kept.exists():
        built = build_sanitized(tmp_path_factory.mktemp("sanitized"))
        for old in kept.parent.glob("sanitized-*"):
            shutil.rmtree(old, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        # At once: a run that is broken off leaves nothing half done.
        shutil.copytree(built, partly := kept.with_suffix(f".{os.getpid()}"))
        partly.rename(kept)
    return kept


def build_sanitized(tree: Path) -> Path:
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    compiler = tree / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"],
        cwd=tree,
        env={**os.environ, "CC": str(compiler), "CXX": str(compiler)},
        check=True,
        capture_output=True,
    )
    return tree / "lib" / "specontext_vllm" / "cpu_kernels"


def run_sanitized(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with AddressSanitizer. With libstdc++ beside it, whose exceptions it must find when it
    starts.
    """
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **preload, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_no_kernel_leaves_its_buffers(sanitized, capability):
    if not list(sanitized.glob(f"{capability}-*.so")):
        pytest.skip("no x86 CPU")
    if capability == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX-512 here")
    # -s: pytest would keep the report to itself.
    done = run_sanitized(
        *("-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"),
        *(f"tests/kernels/cpu/{name}" for name in TESTS),
        ATEN_CPU_CAPABILITY=capability,
        SPECONTEXT_TEST_KERNELS=str(sanitized),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_the_sanitizer_sees_a_kernel_that_leaves_its_buffer(sanitized):
    """A tensor that claims more than its memory holds."""
    code = f"""
import pathlib, numpy, torch
import specontext_vllm.cpu_kernels as k
k.FOLDER = pathlib.Path({str(sanitized)!r})
assert k.why_not() is None, k.why_not()
memory = numpy.zeros(64, numpy.float32)
lies = numpy.lib.stride_tricks.as_strided(memory, (4, 1, 64), (256, 256, 4))
lies = torch.from_numpy(lies)
cache = torch.zeros(2, 1, 16, 128)
torch.ops.specontext_cpu.write_kv(lies, lies, cache, torch.arange(4))
"""
    done = run_sanitized("-c", code)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr[-2000:]


def compile_sources(*compiler: str, names: set[str]) -> None:
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-fopenmp", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
    paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    for name in sorted(names):
        subprocess.run([*compiler, *flags, *paths, str(SOURCES / name)], check=True)


def test_the_sources_compile_without_a_vector_width_of_their_own():
    names = {source.name for source in SOURCES.glob("*.cpp")} - {"bindings.cpp"}
    compile_sources("g++", "-fsyntax-only", names=names)


def test_the_sources_compile_for_arm(tmp_path):
    """NEON is what every such CPU has."""
    out = ("-c", "-o", str(tmp_path / "made.o"))
    names = {source.name for source in SOURCES.glob("*.cpp")}
    if shutil.which("aarch64-linux-gnu-g++"):
        compile_sources("aarch64-linux-gnu-g++", *out, names=names)
    elif importlib.util.find_spec("ziglang"):
        # It brings no omp.h; GCC's is the same for all machines.
        omp = subprocess.check_output(["g++", "-print-file-name=include/omp.h"], text=True).strip()
        shutil.copy(omp, tmp_path)
        zig = (sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu")
        compile_sources(*zig, *out, f"-I{tmp_path}", names=names)
    else:
        pytest.skip("no aarch64-linux-gnu-g++, and no ziglang of the package index")


def test_the_kernels_compute_the_same_on_arm(tmp_path):
    """Emulated, with one thread; writes are torch's part."""
    if not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")):
        pytest.skip("no aarch64-linux-gnu-g++ and qemu-aarch64-static")
    include = Path(torch.__file__).parent / "include"
    said = {}
    for compiler, *runner in (("aarch64-linux-gnu-g++", "qemu-aarch64-static"), ("g++",)):
        program = tmp_path / compiler
        subprocess.run(
            [
                *(compiler, "-static", "-std=c++20", "-O1", "-w", "-o", str(program)),
                *("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
                *(f"-I{SOURCES}", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
                str(Path(__file__).with_name("arm.cpp")),
                *(str(SOURCES / f"{name}.cpp") for name in ("attention", "score", "select")),
            ],
            check=True,
        )
        done = subprocess.run([*runner, program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[:3000]
        *said[compiler], last = done.stdout.splitlines()
        assert last.endswith(": 108 cases, 0 wrong")
    assert len(said["g++"]) == 15 and said["g++"] == said["aarch64-linux-gnu-g++"]
