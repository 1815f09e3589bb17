"""Where the retrieval head comes from, and whether it fits the model."""

from __future__ import annotations

import pytest

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.teacher import read_config
from specontext_vllm.engine.find_head import find_head
from specontext_vllm.engine.names import AUX_LAYERS_KEY, LAYER_GROUPS_KEY
from specontext_vllm.engine.prepare import prepare_vllm_config
from tests.engine.configs import vllm_config
from tests.engine.conftest import DEMO_MODEL


def test_the_head_in_the_model_s_folder_is_found_and_a_given_one_wins():
    model = vllm_config().model_config
    assert find_head(SpeContextConfig(), model) == str(DEMO_MODEL / "retrieval_head")
    assert find_head(SpeContextConfig(retrieval_head="dummy"), model) == "dummy"


def test_no_head_anywhere(tmp_path):
    sentence = (
        r"no retrieval_head/ folder in .* and no known EAGLE-3 head .* `specontext distill`, "
        r".* needs none: dense, oracle, quest, random, recent\."
    )
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


def test_a_head_with_queries_for_groups_of_layers_needs_one_tier_here(tmp_path):
    config = read_config(DEMO_MODEL)
    shape = HeadShape.for_target(config, max_position=config.max_position_embeddings, groups=3)
    HeadModel(shape).save(tmp_path)

    def prepared(layer_types=None, **settings):
        given = {"retrieval_head": str(tmp_path), **settings}
        served = vllm_config({"specontext": given})
        text = served.model_config.hf_text_config
        text.layer_types, text.sliding_window = layer_types, layer_types and 64
        prepare_vllm_config(served)
        return served.additional_config

    assert prepared()[LAYER_GROUPS_KEY] == 3
    two = ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"] * 2
    with pytest.raises(ConfigError, match="3 groups of layers, but only 2 layers of this model"):
        prepared(two)
    for setting, value in (("host_kv_gib", 0.1), ("sidecar", "ray")):
        with pytest.raises(ConfigError, match=f"{setting}: found {value}.* queries for 3 groups"):
            prepared(**{setting: value})


@pytest.mark.parametrize("retriever", ["recent", "quest"])
def test_a_retriever_without_a_head_needs_none(tmp_path, retriever):
    config = vllm_config({"specontext": {"retriever": retriever}}, model={"model": str(tmp_path)})
    prepare_vllm_config(config)
    assert AUX_LAYERS_KEY not in config.additional_config
