"""The sentence of a refusal is the last thing a user reads, wherever it came up."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.last_word import FILE
from specontext_vllm.engine.names import METRICS_FOLDER
from specontext_vllm.engine.worker import STARTING, SpeContextWorkerMixin

CHILD = """
import sys
from pathlib import Path
from pydantic.dataclasses import dataclass
from specontext_vllm.config import ConfigError
from specontext_vllm.engine.last_word import pass_to_front_end, say_last

@dataclass
class Config:
    def __post_init__(self):
        raise ConfigError("budget: found 64.")

case, folder = sys.argv[1:]
Path(folder, "specontext-refusal.txt").write_text("of an engine before")
say_last()
say_last(folder)
if case == "late":
    pass_to_front_end(folder, ConfigError("budget: found 64."))
if case == "plain":
    raise ConfigError("budget: found 64.")
if case == "early":
    Config()
raise RuntimeError("Engine core initialization failed.")
"""


@pytest.mark.parametrize(
    ("case", "last"),
    [
        ("early", ["    For further information visit", "", "budget: found 64."]),
        ("late", ["RuntimeError: Engine core initialization failed.", "", "budget: found 64."]),
        ("plain", ["specontext_vllm.config.errors.ConfigError: budget: found 64."]),
        ("another's", ["RuntimeError: Engine core initialization failed."]),
    ],
)
def test_the_sentence_is_the_last_line_once_and_alone(tmp_path, case, last):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, case, tmp_path], capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()[-len(last) :]
    assert (
        done.returncode == 1
        and [line.partition("https://")[0].rstrip() if "visit" in line else line for line in lines]
        == last
    ), done.stderr


@pytest.mark.parametrize("method", STARTING)
def test_a_worker_s_refusal_at_its_start_is_left_for_the_front_end(tmp_path, method):
    def refuse(self):
        raise ConfigError("budget: found 64.")

    base = type("Base", (), {name: refuse for name in STARTING})
    # A method of ours stands before the base's; what it does with the base's refusal is the same.
    worker = type("Worker", (SpeContextWorkerMixin, base), {})()
    for folder in (None, str(tmp_path / "of another machine"), str(tmp_path)):
        worker.vllm_config = SimpleNamespace(
            observability_config=SimpleNamespace(**{METRICS_FOLDER: folder})
        )
        with pytest.raises(ConfigError):
            getattr(worker, method)()
    assert (tmp_path / FILE).read_text() == "budget: found 64."
