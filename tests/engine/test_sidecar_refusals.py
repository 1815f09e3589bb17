"""An engine whose head cannot run in a Ray actor is refused before it starts, in one sentence."""

from __future__ import annotations

import importlib.util

import pytest

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.prepare import prepare_vllm_config
from tests.engine.configs import vllm_config

SIDECAR = {"specontext": {"sidecar": "ray"}}


def test_ray_is_not_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else find_spec(name, *rest),
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"sidecar: found 'ray', but Ray is not installed; pip install "
            r"'specontext-vllm\[sidecar\]'"
        ),
    ):
        prepare_vllm_config(vllm_config(SIDECAR))


def test_several_workers():
    pytest.importorskip("ray")
    with pytest.raises(
        ConfigError,
        match="sidecar: found 'ray' with --tensor-parallel-size 2; .*use sidecar inline",
    ):
        prepare_vllm_config(vllm_config(SIDECAR, parallel={"tensor_parallel_size": 2}))


def test_vllms_own_ray_executor():
    pytest.importorskip("ray")
    with pytest.raises(
        ConfigError,
        match="sidecar: found 'ray' with --distributed-executor-backend ray; .*use sidecar inline",
    ):
        prepare_vllm_config(vllm_config(SIDECAR, parallel={"use_ray": True}))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"model": {"enable_sleep_mode": True}}, "--enable-sleep-mode"),
        ({"weight_transfer_config": object()}, "--weight-transfer-config"),
    ],
)
def test_memory_and_weights_that_the_actor_would_keep(changes, option):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=f"sidecar: found 'ray' with {option}; the actor would"):
        prepare_vllm_config(vllm_config(SIDECAR, **changes))


def test_one_worker_is_prepared():
    pytest.importorskip("ray")
    config = vllm_config(SIDECAR, parallel={"tensor_parallel_size": 1})
    prepare_vllm_config(config)
    assert config.additional_config["specontext"]["sidecar"] == "ray"
