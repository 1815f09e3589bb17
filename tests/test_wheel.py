"""The source distribution builds, its wheel installs, and what is installed serves the demo model
without a checkout and without what only extras bring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import SUBPROCESSES

ROOT = Path(__file__).parents[1]
TREE = (
    "specontext_vllm",
    "triton_kernels",
    "configs",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
"""What a build reads."""
OF_EXTRAS = ("matplotlib", "accelerate", "ray", "openai")
"""Modules that serving must not need."""

SERVE = f"""
import sys
for name in {OF_EXTRAS!r}:
    sys.modules[name] = None
import json, pathlib, urllib.request
import specontext_vllm
from specontext_vllm.demo.server import VllmServer, device_arguments
from specontext_vllm.synthetic.tasks import make_problem, score

assert pathlib.Path(specontext_vllm.__file__).is_relative_to(sys.prefix), specontext_vllm.__file__
model, config = map(pathlib.Path, sys.argv[1:])
problem = make_problem("needle", seed=1, approx_tokens=1500, layout="question_last")
with VllmServer(model, ["--config", str(config), *device_arguments()]) as server:
    body = {{"model": "demo", "messages": problem.messages, "temperature": 0, "max_tokens": 40}}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {{"Content-Type": "application/json"}},
    )
    answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    stats = server.rpc("specontext_stats")
assert score(problem, answer) == 1.0, answer
assert 0 < stats["pages_read"] < stats["pages_total"], stats
print("served")
"""


def build(backend_call: str, folder: Path, **env: str) -> Path:
    """What ``setuptools.build_meta`` makes of ``folder``."""
    out = folder / "dist"
    code = f"import setuptools.build_meta as b; print(b.{backend_call}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the source distribution holds, as an index's users get it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy2(source, tree)
    sdist = build("build_sdist", tree)
    unpacked = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    """The wheel that is built from it. Compiling takes a minute, so it gets the checkout's kernels;
    bootstrap.py has compiled those.
    """
    kernels = Path("specontext_vllm", "cpu_kernels")
    for library in (ROOT / kernels).glob("*.so"):
        shutil.copy2(library, source / kernels)
    return build("build_wheel", source)


def test_the_source_holds_what_the_kernels_are_built_from_and_nothing_built(source):
    for file in (ROOT / "csrc").rglob("*.*"):
        assert (source / file.relative_to(ROOT)).is_file(), file
    assert not list(source.rglob("*.so"))


def test_without_a_compiler_the_wheel_is_pure_python(source, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("*.so", "build", "dist"))
    built = build("build_wheel", tree, CXX="no-such-compiler")
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]


def test_the_wheel_holds_every_module_and_nothing_at_top_level(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (
        ("specontext_vllm", ROOT / "specontext_vllm"),
        ("specontext_vllm/triton_kernels", ROOT / "triton_kernels"),
        ("specontext_vllm/configs", ROOT / "configs"),
    ):
        for file in folder.rglob("*"):
            inside = file.relative_to(folder)
            if file.is_file() and "__pycache__" not in inside.parts:
                assert f"{package}/{inside}" in names, f"{package}/{inside}"
    assert {name.split("/")[0] for name in names} == {
        "specontext_vllm",
        next(name.split("/")[0] for name in names if ".dist-info" in name),
    }


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of an empty environment with vLLM and the wheel.

    vLLM and what it needs are this environment's own, added to the path behind the new one's
    packages; files that start with __editable__ are not read there, so the checkout is not seen.
    """
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
        + [purelib, str(wheel)],
        check=True,
    )
    (Path(purelib) / "vllm_environment.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith(("site-packages", "/wheels")))
    )
    return python


@pytest.mark.slow
def test_an_installed_wheel_serves_the_demo_without_the_extras(installed, tmp_path):
    # Its processes are forked (tests/subprocesses says how).
    env = {**os.environ, "PYTHONPATH": str(SUBPROCESSES), "SPECONTEXT_TEST_FORKS": "1"}
    done = subprocess.run(
        [installed, "-c", SERVE, ROOT / "models" / "demo", ROOT / "configs" / "demo.yaml"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("served"), done.stderr[-4000:]
