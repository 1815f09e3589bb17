"""What is refused before an engine starts, and where the head comes from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine import resolve
from specontext_vllm.engine.resolve import AUX_LAYERS_KEY, ENGINES_KEY, find_head, prepare_vllm_config, refuse_unsupported
from tests.engine.conftest import DEMO_MODEL


def vllm_config(additional=None, model=None, cache=None, parallel=None, scheduler_cls=None, **top):
    """A stand-in with the attributes that resolve.py reads, of the demo model."""
    text = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, layer_types=None)
    fields = dict(
        model=str(DEMO_MODEL), runner_type="generate", use_mla=False, is_hybrid=False, is_attention_free=False, is_encoder_decoder=False,
        is_multimodal_model=False, enable_prompt_embeds=False, enable_sleep_mode=False, hf_text_config=text,
        hf_config=SimpleNamespace(_name_or_path=""), get_sliding_window=lambda: None, get_hidden_size=lambda: 256,
        get_total_num_kv_heads=lambda: 2, get_vocab_size=lambda: 3136, max_model_len=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **(model or {})}),
        cache_config=SimpleNamespace(**{"cache_dtype": "auto", "block_size": None, "user_specified_block_size": False, "kv_offloading_size": None, **(cache or {})}),
        parallel_config=SimpleNamespace(
            **{
                "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
                "enable_dbo": False, "tensor_parallel_size": 1, "data_parallel_size_local": 1, "use_ray": False, "worker_cls": "auto", **(parallel or {}),
            }
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls),
        additional_config={} if additional is None else additional,
        **{"speculative_config": None, "kv_transfer_config": None, "lora_config": None, **top},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"use_mla": True}}, "latent attention (MLA)"),
        ({"model": {"get_sliding_window": lambda: 4096}}, "sliding-window layers"),
        ({"model": {"hf_text_config": SimpleNamespace(layer_types=["sliding_attention", "full_attention"])}}, "sliding-window layers"),
        ({"model": {"is_hybrid": True}}, "keep no KV pages"),
        ({"model": {"is_multimodal_model": True}}, "takes images or audio"),
        ({"model": {"enable_sleep_mode": True}}, "--enable-sleep-mode"),
        ({"model": {"runner_type": "pooling"}}, "--runner: found 'pooling'"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls: found my.Scheduler"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"cache": {"kv_offloading_size": 0.5}}, "--kv-offloading-size: found 0.5"),
        ({"parallel": {"worker_cls": "my.Worker"}}, "--worker-cls: found my.Worker"),
        ({"lora_config": object()}, "--enable-lora: on"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size: found 2"),
        ({"cache": {"block_size": 32, "user_specified_block_size": True}}, "--block-size: found 32"),
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype: found 'fp8'"),
        ({"cache": {"cache_dtype": "float16"}}, "--kv-cache-dtype: found 'float16'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_one_sentence(changes, sentence):
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(vllm_config(**changes))
    text = str(error.value)
    assert sentence in text and "--attention-backend specontext does not support" in text and "\n" not in text


def test_a_supported_engine_is_prepared_in_place_and_twice_is_the_same():
    config = vllm_config({"specontext": {"budget": 512}, "other": 1})
    prepare_vllm_config(config)
    once = json.dumps(config.additional_config, sort_keys=True)
    assert config.additional_config["specontext"]["retrieval_head"] == str(DEMO_MODEL / "retrieval_head")
    assert config.additional_config[AUX_LAYERS_KEY] == [1, 3, 4]
    assert config.additional_config["other"] == 1
    assert (config.cache_config.block_size, config.cache_config.user_specified_block_size) == (16, True)
    prepare_vllm_config(config)
    assert json.dumps(config.additional_config, sort_keys=True) == once


def test_the_head_beside_the_model_is_found_and_a_given_one_wins():
    model = vllm_config().model_config
    assert find_head(SpeContextConfig(), model) == str(DEMO_MODEL / "retrieval_head")
    assert find_head(SpeContextConfig(retrieval_head="dummy"), model) == "dummy"


def test_no_head_anywhere(tmp_path):
    with pytest.raises(ConfigError, match=r"retrieval_head: none given, no retrieval_head/ folder in .* and no known EAGLE-3 head"):
        find_head(SpeContextConfig(), vllm_config(model={"model": str(tmp_path)}).model_config)


def test_a_known_model_asks_the_hub(monkeypatch):
    """The table of known heads is used; here there is no hub, and the sentence says so."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="retrieval_head: RedHatAI/Qwen3-8B-speculator.eagle3 is no folder here"):
        find_head(SpeContextConfig(), vllm_config(model={"model": "Qwen/Qwen3-8B"}).model_config)


def test_a_head_for_another_model_does_not_fit():
    with pytest.raises(ConfigError, match="retrieval_head: .*width 256, but the target's hidden_size is 512"):
        prepare_vllm_config(vllm_config(model={"get_hidden_size": lambda: 512}))


def test_heads_that_workers_cannot_divide_are_refused():
    with pytest.raises(ConfigError, match="--tensor-parallel-size: found 3"):
        prepare_vllm_config(vllm_config(parallel={"tensor_parallel_size": 3}))


def test_engines_on_one_machine_are_counted_before_they_know_of_themselves_only():
    config = vllm_config(parallel={"data_parallel_size_local": 4})
    prepare_vllm_config(config)
    config.parallel_config.data_parallel_size_local = 1  # as vLLM sets it in each engine's process
    prepare_vllm_config(config)
    assert config.additional_config[ENGINES_KEY] == 4


@pytest.mark.parametrize("retriever", ["recent", "quest"])
def test_a_retriever_without_a_head_needs_none(tmp_path, retriever):
    config = vllm_config({"specontext": {"retriever": retriever}}, model={"model": str(tmp_path)})
    prepare_vllm_config(config)
    assert AUX_LAYERS_KEY not in config.additional_config


def test_a_pool_larger_than_the_machine_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(resolve, "machine_memory", lambda: 64 << 30)
    with pytest.raises(ConfigError, match="host_kv_gib: found 65.0, but this machine has 64.0 GiB of memory; lower it."):
        prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 65}}))
    prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 64}}))
    prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": "auto"}}))
    # Ray's workers may be on larger machines.
    prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 65}}, parallel={"use_ray": True}))


def test_the_metrics_folder_that_a_configuration_names_stays(monkeypatch):
    folders = iter(["first", "second", "third"])
    monkeypatch.setattr(resolve, "front_end_folder", lambda: next(folders))
    config = SimpleNamespace(observability_config=SimpleNamespace())
    # The front end's check, and the same configuration checked again in an engine core's process.
    resolve.name_metrics_folder(config)
    resolve.name_metrics_folder(config)
    assert getattr(config.observability_config, resolve.METRICS_FOLDER) == "first"
