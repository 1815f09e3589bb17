"""docs/engine_arguments.toml, which scripts/engine_arguments.py writes: every argument of vLLM's
engines stands there once, with an outcome, and none misbehaves.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
from vllm.engine.arg_utils import EngineArgs

from scripts.engine_argument_values import ALONE, BASE, EXPLAINED, NOT_STARTED, OUR_OWN, TOGETHER
from scripts.engine_arguments_page import (
    ELSEWHERE,
    OTHER,
    OURS,
    SERVED,
    STOCK,
    read_file,
)

NAMES = [field.name for field in fields(EngineArgs)]


def test_every_argument_is_listed_once():
    """A new argument of vLLM's has no value to be started with yet: add it to
    scripts/engine_argument_values.py and run the script.
    """
    assert list(read_file()) == NAMES
    lists = [*BASE, *OUR_OWN, *TOGETHER, *ALONE, *NOT_STARTED]
    assert sorted(lists) == sorted(NAMES)


def test_each_is_served_or_said_not_to_be():
    for name, entry in read_file().items():
        assert entry["outcome"] in (SERVED, OTHER, OURS, STOCK, ELSEWHERE), (name, entry)
        assert entry["outcome"] != OTHER or name in EXPLAINED
        assert (entry["outcome"] == ELSEWHERE) == (name in NOT_STARTED), name
        assert (entry["sentence"] == "") == (entry["outcome"] == SERVED), name


def test_our_refusals_name_the_setting_and_are_one_sentence():
    refused = [entry["sentence"] for entry in read_file().values() if entry["outcome"] == OURS]
    assert refused
    for sentence in refused:
        assert sentence.endswith(".") and "\n" not in sentence and ": " in sentence


@pytest.mark.parametrize("name", [name for name in NAMES if name in TOGETHER | ALONE])
def test_a_started_value_is_not_the_default(name):
    """A start with the default would say nothing."""
    default = getattr(EngineArgs(model=BASE["model"]), name)
    assert (TOGETHER | ALONE)[name] != default
