"""What is refused before an engine starts, and where the head comes from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine import resolve
from specontext_vllm.engine.resolve import (
    AUX_LAYERS_KEY,
    ENGINES_KEY,
    find_head,
    has_windowed_layers,
    prepare_vllm_config,
    refuse_captured_writes,
    refuse_small_room,
    refuse_unsupported,
)
from tests.engine.conftest import DEMO_MODEL


def vllm_config(additional=None, model=None, cache=None, parallel=None, scheduler_cls=None, **top):
    """A stand-in with the attributes that resolve.py reads, of the demo model."""
    text = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, layer_types=None)
    fields = dict(
        model=str(DEMO_MODEL),
        runner_type="generate",
        use_mla=False,
        is_hybrid=False,
        is_attention_free=False,
        is_encoder_decoder=False,
        is_multimodal_model=False,
        enable_prompt_embeds=False,
        enable_sleep_mode=False,
        hf_text_config=text,
        hf_config=SimpleNamespace(_name_or_path=""),
        get_sliding_window=lambda: None,
        get_hidden_size=lambda: 256,
        get_total_num_kv_heads=lambda: 2,
        get_num_kv_heads=lambda parallel: 2,
        get_head_size=lambda: 64,
        get_vocab_size=lambda: 3136,
        max_model_len=4096,
        original_max_model_len=4096,
        dtype=torch.bfloat16,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **(model or {})}),
        cache_config=SimpleNamespace(
            **{
                "cache_dtype": "auto",
                "block_size": None,
                "user_specified_block_size": False,
                "kv_offloading_size": None,
                "num_gpu_blocks_override": None,
                "kv_cache_memory_bytes": None,
                **(cache or {}),
            }
        ),
        parallel_config=SimpleNamespace(
            **{
                "pipeline_parallel_size": 1,
                "decode_context_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "enable_dbo": False,
                "tensor_parallel_size": 1,
                "data_parallel_size_local": 1,
                "use_ray": False,
                "worker_cls": "auto",
                **(parallel or {}),
            }
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls, max_num_seqs=4),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.NONE,
            mode=CompilationMode.NONE,
            splitting_ops=None,
            use_inductor_graph_partition=False,
            max_cudagraph_capture_size=0,
        ),
        additional_config={} if additional is None else additional,
        **{"speculative_config": None, "kv_transfer_config": None, "lora_config": None, **top},
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"use_mla": True}}, "latent attention (MLA)"),
        (
            {"model": {"hf_text_config": SimpleNamespace(sliding_window=4096)}},
            "sliding-window layers",
        ),
        (
            {
                "model": {
                    "hf_text_config": SimpleNamespace(
                        layer_types=["sliding_attention", "full_attention"], sliding_window=4096
                    )
                }
            },
            "sliding-window layers",
        ),
        (
            {
                "model": {
                    "hf_text_config": SimpleNamespace(
                        dual_chunk_attention_config={"chunk_size": 256}
                    )
                }
            },
            "has dual chunk attention",
        ),
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
        (
            {"cache": {"block_size": 32, "user_specified_block_size": True}},
            "--block-size: found 32",
        ),
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype: found 'fp8'"),
        ({"cache": {"cache_dtype": "float16"}}, "--kv-cache-dtype: found 'float16'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_one_sentence(changes, sentence):
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(vllm_config(**changes))
    text = str(error.value)
    assert (
        sentence in text
        and "--attention-backend specontext does not support" in text
        and "\n" not in text
    )


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


def test_the_head_beside_the_model_is_found_and_a_given_one_wins():
    model = vllm_config().model_config
    assert find_head(SpeContextConfig(), model) == str(DEMO_MODEL / "retrieval_head")
    assert find_head(SpeContextConfig(retrieval_head="dummy"), model) == "dummy"


def test_no_head_anywhere(tmp_path):
    sentence = r"no retrieval_head/ folder in .* and no known EAGLE-3 head .* `specontext distill`, .* needs none: quest, recent, random, oracle, dense\."
    with pytest.raises(ConfigError, match=sentence):
        find_head(SpeContextConfig(), vllm_config(model={"model": str(tmp_path)}).model_config)


def test_a_known_model_asks_the_hub(monkeypatch):
    """The table of known heads is used; here there is no hub, and the sentence says so."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match="retrieval_head: RedHatAI/Qwen3-8B-speculator.eagle3 is no folder here"
    ):
        find_head(SpeContextConfig(), vllm_config(model={"model": "Qwen/Qwen3-8B"}).model_config)


def test_a_head_for_another_model_does_not_fit():
    with pytest.raises(
        ConfigError, match="retrieval_head: .*width 256, but the target's hidden_size is 512"
    ):
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


def test_a_pool_that_this_machine_cannot_hold_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(resolve, "machine_memory", lambda: 64 << 30)
    monkeypatch.setattr(resolve, "free_host_memory", lambda: 40 << 30)
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 65\.00, but this machine has 64\.00 GiB of memory; lower it\.",
    ):
        prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 65}}))
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 41\.00, but this machine has 40\.00 GiB of memory free; lower it\.",
    ):
        prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 41}}))
    config = vllm_config({"specontext": {"host_kv_gib": 40}})
    prepare_vllm_config(config)
    prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": "auto"}}))
    # Checked anew in an engine core: another engine has its share by now.
    monkeypatch.setattr(resolve, "free_host_memory", lambda: 20 << 30)
    prepare_vllm_config(config)
    # Ray's workers may be on larger machines.
    prepare_vllm_config(
        vllm_config({"specontext": {"host_kv_gib": 65}}, parallel={"use_ray": True})
    )


LAYERS = 6
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("text", "windowed"),
    [
        ({"sliding_window": 64}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 64, "layer_types": [SLIDING] * LAYERS}, True),
        ({"sliding_window": 64, "layer_types": [FULL, SLIDING] * 3}, True),
        ({"sliding_window": 64, "layer_types": [FULL] * LAYERS}, False),
        # vLLM takes the window out where --disable-sliding-window is given.
        ({"sliding_window": None, "layer_types": [SLIDING] * LAYERS}, False),
    ],
    ids=["all", "none", "all by type", "some", "a window that no layer has", "disabled"],
)
def test_a_model_is_refused_for_a_window_only_where_vllm_gives_one_to_a_layer(text, windowed):
    assert has_windowed_layers(SimpleNamespace(**text)) is windowed


@pytest.mark.parametrize(
    ("additional", "top", "sentence"),
    [
        (
            {"attention_provider": "flash"},
            {},
            "additional_config.specontext.attention_provider: found 'flash', which needs a GPU; "
            "use auto on a CPU.",
        ),
        (
            {"attention_provider": "xformers"},
            {},
            "additional_config.specontext.attention_provider: found 'xformers', which needs a GPU",
        ),
        (
            {"gpu_kv_gib": 0.0001},
            {},
            "specontext.gpu_kv_gib: found 0.0001, but one request of 4096 tokens (--max-model-len) "
            "needs 0.0129 GiB, the head's",
        ),
        (
            {"gpu_kv_gib": 0.001, "host_kv_gib": 0.5},
            {},
            "specontext.gpu_kv_gib: found 0.001, but one request of 4096 tokens",
        ),
        (
            {"host_kv_gib": 1},
            {"cache": {"kv_cache_memory_bytes": 1 << 20}},
            "--gpu-memory-utilization: it leaves 0.001 GiB for KV, but one request of",
        ),
        (
            {"host_kv_gib": 0.1},
            {"cache": {"kv_cache_memory_bytes": 1 << 30}},
            "host_kv_gib: 0.10 GiB of host memory add less than 2% to what 1.00 GiB",
        ),
        (
            {"host_kv_gib": 0.1},
            {"cache": {"kv_cache_memory_bytes": 1 << 20, "num_gpu_blocks_override": 40000}},
            "host_kv_gib: --num-gpu-blocks-override 40000 pages need",
        ),
    ],
    ids=[
        "flash",
        "xformers",
        "gpu_kv_gib",
        "both tiers",
        "what vLLM takes",
        "gains nothing",
        "blocks",
    ],
)
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a CPU cannot; and keys of the model's dtype"
)
def test_what_can_be_judged_before_anything_is_loaded_is(monkeypatch, additional, top, sentence):
    monkeypatch.setattr(resolve, "free_host_memory", lambda: 40 << 30)
    config = vllm_config({"specontext": additional}, **top)
    with pytest.raises(ConfigError) as error:
        refuse_small_room(config, prepare_vllm_config(config))
    assert (
        sentence in str(error.value)
        and "\n" not in str(error.value)
        and "on the GPU" not in str(error.value)
    )


def test_the_least_room_that_is_named_is_enough():
    refused = vllm_config({"specontext": {"gpu_kv_gib": 0.0001}})
    with pytest.raises(ConfigError) as error:
        refuse_small_room(refused, prepare_vllm_config(refused))
    needed = float(str(error.value).split(" needs ")[1].split()[0])
    enough = vllm_config({"specontext": {"gpu_kv_gib": needed + 0.01}})
    refuse_small_room(enough, prepare_vllm_config(enough))
    # vLLM fits the length to the room, and takes the blocks that it is told to.
    for changes in (
        {"model": {"original_max_model_len": -1}},
        {"cache": {"num_gpu_blocks_override": 300}},
    ):
        config = vllm_config({"specontext": {"gpu_kv_gib": 0.01}}, **changes)
        refuse_small_room(config, prepare_vllm_config(config))


@pytest.mark.parametrize(
    ("compilation", "found"),
    [
        ({}, None),
        (
            {"use_inductor_graph_partition": True},
            "--compilation-config.use_inductor_graph_partition: on",
        ),
        (
            {"splitting_ops": ["vllm::unified_attention_with_output"]},
            "--compilation-config.splitting_ops: found a list without "
            "vllm::unified_kv_cache_update",
        ),
        (
            {
                "splitting_ops": [
                    "vllm::unified_attention_with_output",
                    "vllm::unified_kv_cache_update",
                ]
            },
            None,
        ),
        ({"splitting_ops": []}, None),
        (
            {
                "use_inductor_graph_partition": True,
                "cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY,
            },
            None,
        ),
        ({"use_inductor_graph_partition": True, "mode": CompilationMode.NONE}, None),
    ],
    ids=["default", "partition", "without", "with", "none", "no pieces", "not compiled"],
)
def test_the_two_tiers_writes_are_never_captured_in_piecewise_graphs(compilation, found):
    config = vllm_config({"specontext": {"host_kv_gib": 1}})
    given = {
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
        "mode": CompilationMode.VLLM_COMPILE,
        **compilation,
    }
    for key, value in given.items():
        setattr(config.compilation_config, key, value)
    settings = SpeContextConfig(host_kv_gib=1)
    refuse_captured_writes(SpeContextConfig(), config.compilation_config)
    if found is None:
        refuse_captured_writes(settings, config.compilation_config)
        return
    with pytest.raises(
        ConfigError,
        match=f"^{found}, with which the writes of additional_config.specontext.host_kv_gib",
    ):
        refuse_captured_writes(settings, config.compilation_config)


def test_the_op_that_stores_is_the_one_vllm_takes_out_of_its_pieces():
    from vllm.config import CompilationConfig

    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    compilation.set_splitting_ops_for_v1(all2all_backend="naive")
    assert resolve.KV_UPDATE in compilation.splitting_ops


@pytest.mark.parametrize("name", ["ROCM", "XPU", "TPU", "OOT"])
def test_platforms_that_the_kernels_never_ran_on_are_refused(name):
    with pytest.raises(
        ConfigError,
        match=f"--attention-backend: found specontext on vLLM's platform {name}, but its kernels are for NVIDIA GPUs and CPUs",
    ):
        resolve.refuse_platform(SimpleNamespace(_enum=SimpleNamespace(name=name)))
    for supported in ("CUDA", "CPU"):
        resolve.refuse_platform(SimpleNamespace(_enum=SimpleNamespace(name=supported)))


def test_the_model_runner_that_a_platform_s_worker_does_not_drive_is_refused():
    for v2, is_cpu in ((True, False), (False, True)):
        resolve.refuse_runner(SimpleNamespace(use_v2_model_runner=v2), is_cpu)
    with pytest.raises(
        ConfigError,
        match="^VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V2 model runner, .* on a CPU; set it to 0",
    ):
        resolve.refuse_runner(SimpleNamespace(use_v2_model_runner=True), is_cpu=True)
    with pytest.raises(
        ConfigError,
        match="^VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V1 model runner, .* on a GPU; unset it",
    ):
        resolve.refuse_runner(SimpleNamespace(use_v2_model_runner=False), is_cpu=False)


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
    monkeypatch.setattr(resolve, "front_end_folder", lambda: next(folders))
    config = SimpleNamespace(observability_config=SimpleNamespace())
    # The front end's check, and the same configuration checked again in an engine core's process.
    resolve.name_metrics_folder(config)
    resolve.name_metrics_folder(config)
    assert getattr(config.observability_config, resolve.METRICS_FOLDER) == "first"


def test_a_layer_has_the_last_word_on_what_its_model_asks_for():
    from vllm.config import VllmConfig, set_current_vllm_config

    from specontext_vllm.engine.backend import SpeContextImpl

    with set_current_vllm_config(VllmConfig()):
        harmless = SpeContextImpl(4, 64, 0.125, 2, use_alibi_sqrt=False, sinks=None)
        assert harmless.num_kv_heads == 2
        for asked, named in (
            ({"sinks": torch.zeros(4), "use_alibi_sqrt": False}, "sinks"),
            ({"sliding_window": 64}, "a sliding window"),
        ):
            with pytest.raises(
                ConfigError,
                match=f"^--attention-backend specontext: this model's attention uses {named}, which is not supported",
            ):
                SpeContextImpl(4, 64, 0.125, 2, **asked)
