"""What a model's config.json says of its layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specontext_vllm.model_config import has_windowed_layers, num_full_layers

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
def test_a_model_has_windows_only_where_vllm_gives_one_to_a_layer(text, windowed):
    assert has_windowed_layers(SimpleNamespace(**text)) is windowed


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ({}, LAYERS),
        ({"sliding_window": 64}, 0),
        ({"sliding_window": 64, "layer_types": [FULL, SLIDING, SLIDING] * 2}, 2),
        ({"sliding_window": 64, "layer_types": [SLIDING] * LAYERS}, 0),
        ({"sliding_window": None, "layer_types": [FULL, SLIDING] * 3}, LAYERS),
        ({"layer_types": ["linear_attention"] * 4 + [FULL] * 2}, 2),
        ({"layers_block_type": ["mamba", "mlp", "attention"] * 2}, 2),
    ],
    ids=["plain", "all", "some", "all by type", "disabled", "linear", "mamba"],
)
def test_the_layers_that_attend_to_the_whole_context_are_counted(text, full):
    assert num_full_layers(SimpleNamespace(num_hidden_layers=LAYERS, **text)) == full
