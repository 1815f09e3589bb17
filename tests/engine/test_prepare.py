"""vLLM's configuration is settled in place."""

from __future__ import annotations

import json
from types import SimpleNamespace

from specontext_vllm.engine import prepare
from specontext_vllm.engine.names import AUX_LAYERS_KEY, ENGINES_KEY, METRICS_FOLDER
from specontext_vllm.engine.prepare import prepare_vllm_config
from tests.engine.configs import vllm_config
from tests.engine.conftest import DEMO_MODEL


def test_a_supported_engine_is_prepared_in_place_and_twice_is_the_same():
    config = vllm_config({"specontext": {"budget": 512}, "other": 1})
    prepare_vllm_config(config)
    once = json.dumps(config.additional_config, sort_keys=True)
    assert config.additional_config["specontext"]["retrieval_head"] == str(
        DEMO_MODEL / "retrieval_head"
    )
    assert config.additional_config[AUX_LAYERS_KEY] == [1, 3, 4]
    assert config.additional_config["other"] == 1
    assert (config.cache_config.block_size, config.cache_config.user_specified_block_size) == (
        16,
        True,
    )
    prepare_vllm_config(config)
    assert json.dumps(config.additional_config, sort_keys=True) == once


def test_engines_on_one_machine_are_counted_before_they_know_of_themselves_only():
    config = vllm_config(parallel={"data_parallel_size_local": 4})
    prepare_vllm_config(config)
    config.parallel_config.data_parallel_size_local = 1  # as vLLM sets it in each engine's process
    prepare_vllm_config(config)
    assert config.additional_config[ENGINES_KEY] == 4


def test_a_start_says_once_that_nothing_will_be_sparse(monkeypatch):
    from vllm import logger

    said = []
    monkeypatch.setattr(logger, "init_logger", lambda name: SimpleNamespace(warning=said.append))
    config = vllm_config({"specontext": {"budget": 4096}})
    prepare_vllm_config(config)
    prepare_vllm_config(config)
    assert (
        len(said) == 1
        and "budget: found 4096" in said[0]
        and "--max-model-len 4096" in said[0]
        and "lower budget" in said[0]
    )
    prepare_vllm_config(vllm_config({"specontext": {"budget": 4080}}))
    assert len(said) == 1


def test_the_metrics_folder_that_a_configuration_names_stays(monkeypatch):
    folders = iter(["first", "second", "third"])
    monkeypatch.setattr(prepare, "front_end_folder", lambda: next(folders))
    config = SimpleNamespace(observability_config=SimpleNamespace())
    # The front end's check, and the same configuration checked again in an engine core's process.
    prepare.name_metrics_folder(config)
    prepare.name_metrics_folder(config)
    assert getattr(config.observability_config, METRICS_FOLDER) == "first"
