"""The demo model with windows in every second layer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from specontext_vllm.demo.decoder import Decoder
from specontext_vllm.demo.model import (
    Model,
    check_equals_transformers,
    save_model,
    windowed_attention,
)
from specontext_vllm.demo.sizes import SIZES
from specontext_vllm.distillation.llama import causal_attention
from specontext_vllm.synthetic import tasks

SIZE = replace(SIZES["smoke"], hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, window=32)
IDS = {tasks.BOS: 1, tasks.END: 2, tasks.PAD: 0}


def make_model() -> Model:
    """Weights large enough that attention matters."""
    torch.manual_seed(0)
    model = Model(SIZE, 80)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        # As they are saved.
        model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return model


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_windowed_attention_is_that_of_a_mask(length):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
    read = torch.ones(length, length, dtype=torch.bool).tril().triu(-31)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=read, enable_gqa=True
    )
    torch.testing.assert_close(windowed_attention(q, k, v, 32), expected)
    whole = torch.allclose(expected, causal_attention(q, k, v), atol=1e-3)
    assert whole is (length <= 32)


def test_the_folder_is_that_of_a_model_with_windows(tmp_path):
    model = make_model()
    save_model(model, 80, IDS, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2 + [
        "sliding_attention"
    ]
    said: list[str] = []
    check_equals_transformers(model, tmp_path, said.append)
    assert "largest difference" in said[0]
    config["sliding_window"] = 31
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="transformers computes other logits"):
        check_equals_transformers(model, tmp_path, said.append)


def test_decoding_token_by_token_is_the_forward_pass_and_selects_for_full_layers():
    model = make_model()
    prompt = torch.randint(3, 80, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    decoder, ids = Decoder(model, None), list(prompt)
    state = decoder.prefill(prompt)
    generator = torch.Generator().manual_seed(0)
    reply = decoder.decode(state, "dense", 0, 20, stop=-1, generator=generator)
    for token in reply:
        assert model(torch.tensor([ids]))[0, -1].argmax() == token
        ids.append(token)
    # What is kept is kept of two layers of five; the windows read on.
    kept = torch.zeros(1, 2, 151, dtype=torch.bool)
    kept[..., :16] = True
    step = (torch.tensor([[5]]), torch.tensor([150]))
    h = model.embed_tokens(step[0])
    with torch.no_grad():
        _, _, logits = decoder.step(h, step[1], list(state.keys), list(state.values), kept)
    assert len(logits) == 2
    assert all((x > float("-inf")).sum(-1).eq(16).all() for x in logits)
