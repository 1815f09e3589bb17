"""docs/models.toml, which the table of docs/models.md is made from: every architecture of vLLM's
stands there once, and what it says of each is so.
"""

from __future__ import annotations

from collections import Counter

import pytest

from scripts.model_table import EAGLE3, architectures, derives_from, read_table, rows
from tests.distillation.tiny_models import FAMILIES, make_config
from tests.engine.families import CHUNKED, HYBRID, PLAIN, WINDOWED
from tests.engine.pictures import SEEING
from tests.engine.test_architectures import MIXTURES


def test_every_architecture_is_listed_once():
    counts = Counter(name for names in rows().values() for name in names)
    assert counts == Counter(architectures().keys())
    assert len(architectures()) > 250


def test_those_that_are_said_to_run_in_ci_do():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    made = [family() for family in (HYBRID | PLAIN | CHUNKED | WINDOWED | MIXTURES).values()]
    made += [make_config(family) for family in FAMILIES]
    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] for config in made}
    seeing = [family()[0] for family in SEEING.values()]
    names |= {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type] for config in seeing}
    assert sorted(names) == sorted(read_table()["tested"])
    served = [name for what, names in rows().items() if what.startswith("served") for name in names]
    assert names <= set(served)


@pytest.mark.parametrize(
    ("name", "has_head"),
    [
        ("LlamaForCausalLM", True),
        ("MistralForCausalLM", True),  # derives from Llama's class
        ("Olmo3ForCausalLM", True),  # runs on vLLM's backend for transformers' models
        ("GptOssForCausalLM", True),
        ("Gemma3ForCausalLM", False),
        ("Cohere2ForCausalLM", False),
    ],
)
def test_whether_a_model_serves_a_head_is_what_vllm_finds(name, has_head):
    from importlib import import_module

    from vllm.model_executor.models.interfaces import supports_eagle3

    assert derives_from(name, EAGLE3) is has_head
    module, class_name = architectures()[name]
    assert supports_eagle3(getattr(import_module(module), class_name)) is has_head
