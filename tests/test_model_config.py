"""What a model's config.json says of its layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specontext_vllm.model_config import has_windowed_layers

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
