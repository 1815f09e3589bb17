"""Serving needs no package of an extra; what needs one names the extra to install."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.config import ConfigError
from specontext_vllm.extras import require_extra

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Not openai, which vLLM imports itself.
PACKAGES = ("accelerate", "matplotlib", "ray", "xformers")
# Each is for one platform; the CPU's replaces torch.Event for the whole process.
WORKERS = {"specontext_vllm.engine.worker_cpu", "specontext_vllm.engine.worker_gpu"}

IMPORT_ALL = f"""
import sys
for name in {PACKAGES}:
    sys.modules[name] = None
import importlib, pkgutil, specontext_vllm
for module in pkgutil.walk_packages(specontext_vllm.__path__, "specontext_vllm."):
    # What torch loads as a library is no module.
    library = module.name.startswith("specontext_vllm.cpu_kernels.")
    if module.name not in {WORKERS} and not module.name.endswith("__main__") and not library:
        importlib.import_module(module.name)
import specontext_vllm.demo.__main__
"""


def hide(monkeypatch, package):
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.slow
def test_every_module_imports_without_the_extras():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "package, arguments, sentence",
    [
        (
            "matplotlib",
            ["plan", "--model", "models/demo", "--gpu-gib", "1", "--out", "plan.png"],
            "--out needs matplotlib, which is not installed; pip install 'specontext-vllm[plan]'.",
        ),
        (
            "accelerate",
            ["distill", "--model", "models/demo", "--out", "head", "--data", "synthetic"],
            "specontext distill needs accelerate, which is not installed; pip install "
            "'specontext-vllm[distill]'.",
        ),
    ],
    ids=["plan", "distill"],
)
def test_a_missing_package_is_one_sentence_that_names_its_extra(
    monkeypatch, tmp_path, package, arguments, sentence
):
    hide(monkeypatch, package)
    monkeypatch.chdir(tmp_path)
    arguments = [str(ROOT / a) if a == "models/demo" else a for a in arguments]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"{sentence}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_says_what_it_needs(monkeypatch):
    import typer

    from specontext_vllm.demo.__main__ import main

    hide(monkeypatch, "openai")
    demo = typer.Typer()
    demo.command()(main)
    result = CliRunner().invoke(demo, [])
    assert result.exit_code == 1 and result.stderr == (
        "The demo needs openai, which is not installed; pip install 'specontext-vllm[demo]'.\n"
    )


@pytest.mark.parametrize(
    "package, extra", [("matplotlib", "plan"), ("accelerate", "distill"), ("openai", "demo")]
)
def test_an_extra_installs_what_is_asked_of_it(package, extra):
    assert package in {Requirement(line).name for line in EXTRAS[extra]}


def test_what_is_installed_is_not_refused():
    require_extra("torch", "plan", "This")
    with pytest.raises(ConfigError, match="This needs no_such_package, which is not installed"):
        require_extra("no_such_package", "plan", "This")
