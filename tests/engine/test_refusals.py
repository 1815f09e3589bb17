"""Engines that are refused before they start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine import refusals
from specontext_vllm.engine.kv_dtype import kv_dtype, refuse_scales
from specontext_vllm.engine.lossless import (
    refuse_lossless,
)
from specontext_vllm.engine.prepare import prepare_vllm_config
from specontext_vllm.engine.refusals import (
    KV_UPDATE,
    refuse_captured_writes,
    refuse_kv_groups,
    refuse_platform,
    refuse_runner,
    refuse_unproven,
    refuse_unsupported,
)
from tests.engine.configs import vllm_config


def drafts(**changes):
    """A --speculative-config that is served but for the changes."""
    fields = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "parallel_drafting": False,
        "enable_adaptive_verification": False,
        "num_speculative_tokens_per_batch_size": None,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        ({}, {"parallel_drafting": True}, "found parallel_drafting True, with which rows"),
        (
            {},
            {"num_speculative_tokens_per_batch_size": [(1, 4, 2)]},
            "found num_speculative_tokens_per_batch_size",
        ),
        ({"retriever": "quest"}, {}, "retriever: found 'quest' with --speculative-config ngram"),
        ({"sidecar": "ray"}, {}, "sidecar: found 'ray' with --speculative-config ngram"),
        ({"attention_provider": "xformers"}, {}, "attention_provider: found 'xformers' with"),
    ],
)
def test_settings_that_do_not_go_with_drafts_are_refused(settings, changes, sentence):
    config = vllm_config({"specontext": settings}, speculative_config=drafts(**changes))
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(config)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    refuse_unsupported(vllm_config(speculative_config=drafts()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speculative_config": drafts()}, "with --speculative-config ngram, but the model drafts"),
        ({"model": {"is_hybrid": True}}, "some of whose layers keep a state instead of KV"),
        ({"model": {"is_multimodal_model": True}}, ", which takes images or audio"),
        ({"lora_config": object()}, "with --enable-lora, but vLLM sets the adapters of a step's"),
        ({"model": {"logits_processors": ["a:B"]}}, "with --logits-processors, which vLLM does"),
        (
            {"structured_outputs_config": SimpleNamespace(backend="lm-format-enforcer")},
            "with --structured-outputs-config.backend lm-format-enforcer, which vLLM does not",
        ),
        ({"parallel": {"data_parallel_size": 2}}, "with --data-parallel-size 2"),
    ],
)
def test_engines_that_cannot_draft_with_their_target_are_refused(changes, sentence):
    parallel = {"data_parallel_size": 1, **changes.pop("parallel", {})}
    with pytest.raises(ConfigError) as error:
        refuse_lossless(vllm_config(parallel=parallel, **changes), is_cpu=True)
    text = str(error.value)
    assert text.startswith("additional_config.specontext.mode: found 'lossless' with")
    assert sentence in text and "\n" not in text
    refuse_lossless(vllm_config(parallel={"data_parallel_size": 1}), is_cpu=True)


def test_lossless_mode_is_refused_with_rules_of_a_layer_and_windows_on_a_gpu():
    gpu = vllm_config({"specontext": {"retriever": "quest"}}, parallel={"data_parallel_size": 1})
    refuse_lossless(gpu, is_cpu=True)
    with pytest.raises(ConfigError, match="with retriever 'quest', but a GPU's graphs"):
        refuse_lossless(gpu, is_cpu=False)
    gpu = vllm_config(parallel={"data_parallel_size": 1})
    refuse_lossless(gpu, is_cpu=False)
    gpu.scheduler_config.max_num_seqs = 1
    with pytest.raises(ConfigError, match="with --max-num-seqs 1, for which vLLM captures no"):
        refuse_lossless(gpu, is_cpu=False)
    windows = {"hf_text_config": SimpleNamespace(sliding_window=8)}
    gpu = vllm_config(model=windows, parallel={"data_parallel_size": 1})
    refuse_lossless(gpu, is_cpu=True)
    with pytest.raises(ConfigError, match="some of whose layers have a window, on a GPU, which"):
        refuse_lossless(gpu, is_cpu=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"use_mla": True}}, "latent attention (MLA)"),
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
        ({"model": {"is_attention_free": True}}, "keeps no KV"),
        ({"model": {"is_mm_prefix_lm": True}}, "lets the tokens of an image attend to later ones"),
        ({"cache": {"kv_sharing_fast_prefill": True}}, "--kv-sharing-fast-prefill"),
        ({"model": {"runner_type": "pooling"}}, "--runner: found 'pooling'"),
        ({"speculative_config": drafts(method="medusa")}, "found method 'medusa'"),
        (
            {"speculative_config": drafts(), "model": {"is_multimodal_model": True}},
            "which takes images or audio",
        ),
        (
            {"speculative_config": drafts(), "model": {"is_hybrid": True}},
            "keep a state instead of KV",
        ),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls: found my.Scheduler"),
        ({"parallel": {"worker_cls": "my.Worker"}}, "--worker-cls: found my.Worker"),
        ({"parallel": {"enable_dbo": True}}, "--enable-dbo: on"),
        (
            {"cache": {"block_size": 24, "user_specified_block_size": True}},
            "--block-size: found 24",
        ),
        *(
            ({"cache": {"cache_dtype": dtype}}, f"--kv-cache-dtype: found '{dtype}'")
            for dtype in ("float16", "fp8_e5m2", "fp8_per_token_head", "nvfp4", "turboquant_k8v4")
        ),
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


def connector(name: str, path: str | None = None, **extra):
    return {
        "kv_transfer_config": SimpleNamespace(
            kv_connector=name, kv_connector_module_path=path, kv_connector_extra_config=extra
        )
    }


OFFLOADING = connector("OffloadingConnector", cpu_bytes_to_use=2**30)
STORAGE = connector("ExampleConnector", shared_storage_path="/tmp")
NIXL = connector("NixlConnector", bidirectional_kv_xfer=False)


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        (
            {},
            connector("LMCacheConnectorV1"),
            "found kv_connector 'LMCacheConnectorV1', which does not move the head's keys with the "
            "KV; use OffloadingConnector, ExampleConnector, NixlConnector, or leave it out.",
        ),
        (
            {},
            connector("NixlConnector", bidirectional_kv_xfer=True),
            "found bidirectional_kv_xfer in kv_connector_extra_config, which brings pages of gene",
        ),
        (
            {},
            connector("OffloadingConnector", spec_name="TieringOffloadingSpec"),
            "found spec_name 'TieringOffloadingSpec' in kv_connector_extra_config, which",
        ),
        (
            {},
            connector("OffloadingConnector", canonical_layout=True),
            "found canonical_layout True in kv_connector_extra_config, which",
        ),
        (
            {},
            {"cache": {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"}},
            "--kv-offloading-backend: found 'lmcache', which does not move the head's keys",
        ),
        (
            {"host_kv_gib": 1},
            {"cache": {"kv_offloading_size": 2}},
            "--kv-offloading-size: found 2 with additional_config.specontext.host_kv_gib 1.0, whi",
        ),
        ({"sidecar": "ray"}, OFFLOADING, "found one with additional_config.specontext.sidecar"),
        ({"retriever": "quest"}, OFFLOADING, "with additional_config.specontext.retriever 'quest'"),
        ({"mode": "lossless"}, OFFLOADING, "with additional_config.specontext.mode 'lossless'"),
        ({}, {"speculative_config": drafts(), **OFFLOADING}, "found one with --speculative-config"),
        (
            {},
            {"parallel": {"tensor_parallel_size": 2}, **OFFLOADING},
            "found one with --tensor-parallel-size 2, which",
        ),
        ({}, {"model": {"is_hybrid": True}, **OFFLOADING}, "some of whose layers do not attend to"),
        ({"host_kv_gib": 1}, STORAGE, "with additional_config.specontext.host_kv_gib 1.0, which"),
        (
            {},
            connector("ExampleConnector", "my.own"),
            "found kv_connector_module_path 'my.own', whose connector does not move the head's",
        ),
    ],
)
def test_connectors_that_leave_what_the_head_keeps_behind_are_refused(settings, changes, sentence):
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(vllm_config({"specontext": settings}, **changes))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    for served in (OFFLOADING, STORAGE, NIXL):
        refuse_unsupported(vllm_config(**served))
    for served in (STORAGE, NIXL):
        refuse_unsupported(vllm_config({"specontext": {"retriever": "quest"}}, **served))


def test_another_way_of_offloading_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    with pytest.raises(ConfigError, match="^VLLM_USE_SIMPLE_KV_OFFLOAD: it is on, and that way"):
        refuse_unsupported(vllm_config(cache={"kv_offloading_size": 1}))


def test_an_8_bit_cache_needs_a_gpu_that_converts_it(monkeypatch):
    from vllm.platforms import current_platform

    fp8 = vllm_config(cache={"cache_dtype": "fp8"})
    refuse_unsupported(fp8)
    capability = [8, 6]
    for name, found in {
        "is_cuda": True,
        "get_device_capability": capability,
        "get_device_name": "a GPU",
    }.items():
        monkeypatch.setattr(current_platform, name, lambda found=found: found, raising=False)
    with pytest.raises(ConfigError, match="found fp8, but a GPU cannot convert 8-bit floats .*8.6"):
        refuse_unsupported(fp8)
    refuse_unsupported(vllm_config())
    capability[1] = 9
    refuse_unsupported(fp8)


def test_an_8_bit_cache_is_one_for_all_layers_of_full_attention():
    skipping = {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    refuse_unsupported(vllm_config(cache=skipping))
    skipping["kv_cache_dtype_skip_layers"] += ["0", "11"]
    with pytest.raises(ConfigError, match="--kv-cache-dtype-skip-layers: found 0, 11, but"):
        refuse_unsupported(vllm_config(cache=skipping))


def test_scales_of_each_head_are_refused():
    def layer(float8_kv, heads):
        scales = dict.fromkeys(("_k_scale", "_v_scale"), torch.ones(heads))
        return SimpleNamespace(impl=SimpleNamespace(float8_kv=float8_kv), **scales)

    config = vllm_config()
    config.compilation_config.static_forward_context = {"a": layer(True, 1), "b": layer(False, 2)}
    refuse_scales(config, ("a", "b"))
    config.compilation_config.static_forward_context["c"] = layer(True, 2)
    with pytest.raises(ConfigError, match="has scales of its KV cache for each head, but"):
        refuse_scales(config, ("a", "b", "c"))


def test_a_checkpoint_s_own_kv_cache_dtype_counts():
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    declared = vllm_config(model={"hf_config": SimpleNamespace(quantization_config=scheme)})
    assert kv_dtype(declared) == torch.float8_e4m3fn
    declared.cache_config.cache_dtype = "bfloat16"
    assert kv_dtype(declared) == kv_dtype(vllm_config()) == declared.model_config.dtype


WINDOWED = {"num_hidden_layers": 2, "sliding_window": 4096}


@pytest.mark.parametrize("types", [None, ["sliding_attention"] * 2], ids=["all", "all by type"])
def test_a_model_whose_every_layer_has_a_window_is_refused(types):
    text = SimpleNamespace(layer_types=types, **WINDOWED)
    with pytest.raises(ConfigError, match="has no layer that attends to its whole context, so"):
        refuse_unsupported(vllm_config(model={"hf_text_config": text}))


def test_a_host_pool_beside_layers_of_other_kinds():
    text = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], **WINDOWED)
    host = {"specontext": {"host_kv_gib": 1, "retriever": "recent"}}
    refuse_unsupported(vllm_config(host, model={"hf_text_config": text}))
    refuse_unsupported(vllm_config(host, model={"is_hybrid": True}))
    with pytest.raises(ConfigError, match="host_kv_gib: found 1.0, but .* such that keep a state"):
        refuse_unsupported(vllm_config(host, model={"is_hybrid": True, "hf_text_config": text}))


def test_a_pool_that_this_machine_cannot_hold_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(refusals, "machine_memory", lambda: 64 << 30)
    monkeypatch.setattr(refusals, "free_host_memory", lambda: 40 << 30)
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 65\.00, but this machine has 64\.00 GiB of memory; lower it\.",
    ):
        prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 65}}))
    with pytest.raises(
        ConfigError,
        match=(
            r"host_kv_gib: found 41\.00, but this machine has 40\.00 GiB of memory free; lower "
            r"it\."
        ),
    ):
        prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": 41}}))
    config = vllm_config({"specontext": {"host_kv_gib": 40}})
    prepare_vllm_config(config)
    prepare_vllm_config(vllm_config({"specontext": {"host_kv_gib": "auto"}}))
    # Checked anew in an engine core: another engine has its share by now.
    monkeypatch.setattr(refusals, "free_host_memory", lambda: 20 << 30)
    prepare_vllm_config(config)
    # Ray's workers may be on larger machines.
    prepare_vllm_config(
        vllm_config({"specontext": {"host_kv_gib": 65}}, parallel={"use_ray": True})
    )


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
    assert KV_UPDATE in compilation.splitting_ops


def platform(name):
    """One of vLLM's platforms, as far as it is asked."""
    return SimpleNamespace(
        device_name=name.lower(), is_cuda=lambda: name == "CUDA", is_cpu=lambda: name == "CPU"
    )


@pytest.mark.parametrize("name", ["ROCM", "XPU", "TPU", "OOT"])
def test_platforms_that_the_kernels_never_ran_on_are_refused(name):
    with pytest.raises(
        ConfigError,
        match=(
            f"--attention-backend: found specontext on vLLM's platform {name}, but its kernels "
            f"are for NVIDIA GPUs and CPUs"
        ),
    ):
        refuse_platform(platform(name))
    for supported in ("CUDA", "CPU"):
        refuse_platform(platform(supported))


@pytest.mark.parametrize("value", ["", "false", "00"])
def test_a_switch_of_the_kernels_that_is_neither_on_nor_off_is_refused(monkeypatch, value):
    monkeypatch.setenv("SPECONTEXT_CPU_KERNELS", value)
    with pytest.raises(ConfigError, match=f"^SPECONTEXT_CPU_KERNELS: found '{value}'; give 0 "):
        refuse_platform(platform("CPU"))
    refuse_platform(platform("CUDA"))
    for known in ("0", "1"):
        monkeypatch.setenv("SPECONTEXT_CPU_KERNELS", known)
        refuse_platform(platform("CPU"))


@pytest.mark.parametrize(
    ("settings", "changes", "found"),
    [
        ({"mode": "lossless"}, {}, "additional_config.specontext.mode 'lossless'"),
        ({"host_kv_gib": 1}, {}, "additional_config.specontext.host_kv_gib 1.0"),
        ({"sidecar": "ray"}, {}, "additional_config.specontext.sidecar 'ray'"),
        ({}, {"speculative_config": drafts()}, "--speculative-config"),
        ({}, OFFLOADING, "--kv-transfer-config"),
        ({}, {"model": {"is_hybrid": True}}, "other kinds than full attention"),
        ({}, {"model": {"is_multimodal_model": True}}, "which takes images or audio"),
        (
            {},
            {"parallel": {"distributed_executor_backend": "external_launcher"}},
            "--distributed-executor-backend external_launcher",
        ),
    ],
)
def test_what_has_not_been_shown_with_stages_is_refused_with_them(settings, changes, found):
    parallel = {"pipeline_parallel_size": 2, **changes.get("parallel", {})}
    config = vllm_config({"specontext": settings}, **{**changes, "parallel": parallel})
    with pytest.raises(ConfigError) as error:
        refuse_unsupported(config)
    text = str(error.value)
    assert text.startswith("--pipeline-parallel-size: found 2 with ")
    assert found in text and "\n" not in text
    refuse_unsupported(vllm_config(parallel={"pipeline_parallel_size": 2}))


def test_what_has_not_run_on_a_gpu_is_refused_there():
    gpu, cpu = (SimpleNamespace(is_cuda=lambda cuda=cuda: cuda) for cuda in (True, False))
    stages = vllm_config(parallel={"pipeline_parallel_size": 2})
    with pytest.raises(ConfigError) as error:
        refuse_unproven(stages, gpu)
    text = str(error.value)
    assert text.startswith("--pipeline-parallel-size: found 2, but on a GPU") and "\n" not in text
    for found in (STORAGE, NIXL):
        config = vllm_config(**found)
        config.model_config.enforce_eager = False
        with pytest.raises(ConfigError, match="found kv_connector '[EN].* with CUDA graphs"):
            refuse_unproven(config, gpu)
        config.model_config.enforce_eager = True
        config.kv_transfer_config.kv_buffer_device = "cuda"
        refuse_unproven(config, gpu)
        config.kv_transfer_config.kv_buffer_device = "cpu"
        with pytest.raises(ConfigError, match="found kv_buffer_device 'cpu', but on a GPU"):
            refuse_unproven(config, gpu)
    for served in (stages, vllm_config(**STORAGE), vllm_config(**NIXL)):
        refuse_unproven(served, cpu)
    for served in (vllm_config(), vllm_config(**OFFLOADING)):
        refuse_unproven(served, gpu)


def test_the_model_runner_that_a_platform_s_worker_does_not_drive_is_refused():
    for v2, is_cpu in ((True, False), (False, True)):
        refuse_runner(SimpleNamespace(use_v2_model_runner=v2), is_cpu)
    with pytest.raises(
        ConfigError,
        match="^VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V2 model runner, .* on a CPU; set it to 0",
    ):
        refuse_runner(SimpleNamespace(use_v2_model_runner=True), is_cpu=True)
    with pytest.raises(
        ConfigError,
        match="^VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V1 model runner, .* on a GPU; unset it",
    ):
        refuse_runner(SimpleNamespace(use_v2_model_runner=False), is_cpu=False)


def test_a_sidecar_and_two_tiers_know_the_pages_of_one_group():
    sidecar = SpeContextConfig.from_settings({"sidecar": "ray"})
    refuse_kv_groups(sidecar, 1)
    refuse_kv_groups(SpeContextConfig(), 9)
    with pytest.raises(ConfigError, match=r"sidecar: found 'ray', but vLLM keeps .* in 9 groups"):
        refuse_kv_groups(sidecar, 9)
    with pytest.raises(ConfigError, match=r"host_kv_gib: found 1.0, but .* in 9 groups"):
        refuse_kv_groups(SpeContextConfig(host_kv_gib=1.0), 9)


def test_a_layer_has_the_last_word_on_what_its_model_asks_for():
    from vllm.config import VllmConfig, set_current_vllm_config

    from specontext_vllm.engine.backend import SpeContextImpl

    with set_current_vllm_config(VllmConfig()):
        harmless = SpeContextImpl(
            4, 64, 0.125, 2, use_alibi_sqrt=False, sinks=torch.zeros(4), logits_soft_cap=30.0
        )
        assert harmless.num_kv_heads == 2
        for asked, named in (
            ({"alibi_slopes": [0.5] * 4, "use_alibi_sqrt": False}, "ALiBi slopes"),
            ({"sliding_window": 64}, "a sliding window"),
        ):
            with pytest.raises(
                ConfigError,
                match=(
                    f"^--attention-backend specontext: this model's attention uses {named}, "
                    f"which is not supported"
                ),
            ):
                SpeContextImpl(4, 64, 0.125, 2, **asked)
