"""Every bad setting gives one sentence that names the key, what was found and what to do."""

import pytest

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.retrieval.rules import listed_rules


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"budgett": 512}, "unknown key 'budgett'; did you mean 'budget'?"),
        ({"colour": 1}, "unknown key 'colour'; the keys are retrieval_head, budget"),
        (
            {"budget": 64},
            "budget: found 64, but sinks (1 pages), recents (5 pages) and one page to choose need "
            "112 tokens",
        ),
        ({"budget": "many"}, "budget: found 'many'; input should be a valid integer"),
        ({"budget": True}, "budget: found True; input should be a valid integer"),
        ({"budget": "512"}, "budget: found '512'; input should be a valid integer"),
        (
            {"sidecar": "ray", "sidecar_cpus": True},
            "sidecar_cpus: found True; input should be a valid integer",
        ),
        ({"stickiness": True}, "stickiness: found True; input should be a valid number"),
        ({"gpu_kv_gib": "4"}, "gpu_kv_gib: found '4'; input should be a valid number"),
        ({"host_kv_gib": True}, "host_kv_gib: found True; give 0 or more GiB"),
        ({"host_kv_gib": "4"}, "host_kv_gib: found '4'; give 0 or more GiB"),
        ({"stats": "yes"}, "stats: found 'yes'; input should be a valid boolean"),
        ({"budget": -1}, "budget: found -1; input should be greater than 0"),
        (
            {"retriever": "magic"},
            f"retriever: found 'magic'; use one of {', '.join(listed_rules())}.",
        ),
        (
            {"rule_settings": {"speed": 2}},
            "rule_settings: found 'speed', which retriever 'dlm' does not know; it has no settings",
        ),
        (
            {"retriever": "driven", "rule_settings": {"speed": 2}},
            "rule_settings: found 'speed', which retriever 'driven' does not know; it has "
            "['shares']",
        ),
        *(
            (
                {"retriever": "driven", "rule_settings": {"shares": shares}},
                f"specontext.rule_settings: found shares {shares!r}; give a list of numbers from "
                "0 to 1.",
            )
            for shares in ([], [0.5, 2], [True], ["0.5"], [float("nan")], 0.5, None)
        ),
        ({"retrieval_head": ""}, "retrieval_head: found ''; string should have at least 1 char"),
        (
            {"confidence_threshold": 2},
            "confidence_threshold: found 2; input should be less than or equal to 1",
        ),
        ({"fallback_budget": 512}, "fallback_budget: found 512, less than budget (2048)"),
        (
            {"head_key_dtype": "fp8", "retriever": "quest"},
            "head_key_dtype: found 'fp8' with retriever 'quest' and no retrieval_head",
        ),
        ({"host_kv_gib": -1}, 'host_kv_gib: found -1; give 0 or more GiB, or "auto".'),
        ({"host_kv_gib": 1, "retriever": "quest"}, "host_kv_gib: found 1.0 with retriever quest"),
        (
            {"host_kv_gib": "lots"},
            "specontext.host_kv_gib: found 'lots'; give 0 or more GiB, or \"auto\".",
        ),
        ({"host_kv_gib": float("nan")}, "host_kv_gib: found nan; give 0 or more GiB"),
        ({"host_kv_gib": float("inf")}, "host_kv_gib: found inf; give 0 or more GiB"),
        ({"host_kv_gib": [1]}, "host_kv_gib: found [1]; give 0 or more GiB"),
        ({"gpu_kv_gib": float("inf")}, "gpu_kv_gib: found inf; input should be a finite number"),
        ({"stickiness": float("nan")}, "stickiness: found nan; input should be"),
        ({"gpu_kv_gib": 0}, "gpu_kv_gib: found 0; input should be greater than 0"),
        (
            {"stickiness": -0.5},
            "stickiness: found -0.5; input should be greater than or equal to 0",
        ),
        ({"sidecar": "yes"}, "sidecar: found 'yes'; input should be 'inline' or 'ray'."),
        (
            {"sidecar_gpus": 0.5},
            "sidecar_gpus: found 0.5, but sidecar is inline; set sidecar to ray or leave it out.",
        ),
        (
            {"sidecar": "ray", "sidecar_gpus": 2},
            "sidecar_gpus: found 2; input should be less than or equal to 1",
        ),
        (
            {"sidecar": "ray", "sidecar_cpus": 0},
            "sidecar_cpus: found 0; input should be greater than or equal to 1",
        ),
        ({"mode": "exact"}, "mode: found 'exact'; input should be 'sparse' or 'lossless'"),
        (
            {"mode": "lossless", "host_kv_gib": 1},
            "host_kv_gib: found 1.0 with mode lossless; verification reads all pages",
        ),
        ({"mode": "lossless", "sidecar": "ray"}, "sidecar: found 'ray' with mode lossless;"),
        (
            {"mode": "lossless", "cache_generated": True},
            "cache_generated: found True with mode lossless;",
        ),
        (
            {"mode": "lossless", "attention_provider": "xformers"},
            "attention_provider: found 'xformers' with mode lossless;",
        ),
        (
            {"mode": "lossless", "retriever": "dense"},
            "retriever: found 'dense' with mode lossless; its drafts would cost",
        ),
        (
            {"sidecar": "ray", "retriever": "recent"},
            "sidecar: found 'ray' with retriever 'recent', which has no head",
        ),
        (
            {"sidecar": "ray", "host_kv_gib": 1},
            "sidecar: found 'ray' with host_kv_gib 1.0; the host pool's slot maps live in vLLM's "
            "worker",
        ),
        ("no", "found 'no', expected an object"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict | str) and len(str(value)) < 40 else "",
)
def test_one_sentence(settings, sentence):
    with pytest.raises(ConfigError) as error:
        SpeContextConfig.from_settings(settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["specontex", "SpeContext", "spec_context"])
def test_a_key_that_is_nearly_ours_is_not_passed_over(key):
    with pytest.raises(
        ConfigError,
        match=(
            f"additional_config: found the key '{key}', which nothing reads; this plugin's "
            f"settings are under 'specontext'"
        ),
    ):
        SpeContextConfig.from_additional_config({key: {"budget": 128}})


@pytest.mark.parametrize("given", [{}, {"specontext": {"budget": 256}}], ids=str)
def test_a_setting_outside_of_its_object_is_not_passed_over(given):
    """Named regression: the engine started with the default of it."""
    for key in SpeContextConfig.model_fields:
        with pytest.raises(ConfigError) as error:
            SpeContextConfig.from_additional_config({**given, key: 128})
        assert f"found the key '{key}'" in str(error.value)
        assert f'put it under \'specontext\', as in {{"specontext": {{"{key}"' in str(error.value)


def test_keys_of_other_plugins_are_theirs():
    assert (
        SpeContextConfig.from_additional_config({"gdn_kernel": {}, "specontext_aux_layers": [1]})
        == SpeContextConfig()
    )
    assert (
        SpeContextConfig.from_additional_config(
            {"specontex": 1, "specontext": {"budget": 128}}
        ).budget
        == 128
    )


def test_pages_cover_the_tokens():
    config = SpeContextConfig(sink_tokens=17, recent_tokens=64)
    assert (config.sink_pages, config.recent_pages, config.budget_pages) == (2, 5, 128)
    # The newest page may hold a single token: even then 64 of the newest tokens are in 5 pages.
    assert (config.recent_pages - 1) * 16 + 1 >= 64


def test_table_is_as_wide_as_the_widest_selection():
    assert SpeContextConfig().table_pages(131072) == 128
    assert SpeContextConfig().table_pages(1000) == 63
    assert SpeContextConfig(confidence_threshold=0.5).table_pages(131072) == 512
    assert (
        SpeContextConfig(confidence_threshold=0.5, fallback_budget=4096).table_pages(131072) == 256
    )
    assert SpeContextConfig(retriever="dense").table_pages(131072) == 8192
    # Rows are read whole while the sidecar is away, but what it selects is no wider than ever.
    assert SpeContextConfig(sidecar="ray").table_pages(131072) == 8192
    assert SpeContextConfig(sidecar="ray").selection_pages(131072) == 128


def test_in_lossless_mode_every_page_may_be_read_and_is_exact():
    config = SpeContextConfig(mode="lossless", budget=128)
    assert config.table_pages(1000, num_drafts=3) == 63
    assert config.exact_tokens(1000) == 1000
    assert SpeContextConfig(budget=128).exact_tokens(1000) == 128


def test_keys_of_a_head_that_another_retriever_leaves_idle_may_be_named():
    """Another retriever may be switched to dlm while the engine runs, if the engine has a head."""
    settings = {"head_key_dtype": "fp8", "retrieval_head": "dummy"}
    assert (
        SpeContextConfig.from_settings({**settings, "retriever": "dense"}).head_key_dtype == "fp8"
    )
    assert SpeContextConfig.from_settings(
        {"head_key_dtype": "auto", "retriever": "quest"}
    ) == SpeContextConfig(retriever="quest")


def test_whole_numbers_are_taken_for_fractions():
    assert (
        SpeContextConfig.from_settings(
            {"stickiness": 0, "gpu_kv_gib": 4, "host_kv_gib": 4}
        ).host_kv_gib
        == 4.0
    )


def test_a_budget_that_holds_every_context_is_said():
    assert SpeContextConfig(budget=1000).reads_everything(1009) is None
    # A budget is whole pages: 1000 tokens are 62 of them, and 1000 tokens of context lie in 63.
    assert SpeContextConfig(budget=1000).reads_everything(1000) is None
    sentence = SpeContextConfig(budget=2048).reads_everything(1536)
    assert sentence.startswith(
        "additional_config.specontext.budget: found 2048, which holds the longest context there "
        "can be (--max-model-len 1536)"
    )
    assert "retriever: found 'dense'" in SpeContextConfig(retriever="dense").reads_everything(
        131072
    )


def test_absent_settings_are_the_defaults():
    assert (
        SpeContextConfig.from_additional_config(None)
        == SpeContextConfig.from_additional_config({})
        == SpeContextConfig()
    )
