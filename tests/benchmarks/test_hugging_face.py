"""The Hugging Face baseline on a tiny shape: it decodes as `generate` does, and says what does not
fit.
"""

import pytest
import torch

from benchmarks import hugging_face
from benchmarks.engines import Cell, EngineSpec
from benchmarks.shapes import Shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = Shape.named("tiny")
    # float32: bfloat16 has near-ties. The default weights are so small that attention would hardly
    # matter.
    return str(
        Shape("tiny", shape.config | {"torch_dtype": "float32", "initializer_range": 0.3}).write(
            tmp_path_factory.mktemp("model")
        )
    )


def load(folder, name):
    spec = EngineSpec(name, folder, on_gpu=False, budget=256, max_num_seqs=4, steps=4)
    return spec, hugging_face.load_model(spec, torch.device("cpu"))


@pytest.mark.parametrize("name", hugging_face.ATTENTION)
def test_its_greedy_tokens_are_those_of_generate(folder, name):
    _, model = load(folder, name)
    assert model.config._attn_implementation == hugging_face.ATTENTION[name]
    prompts = hugging_face.random_tokens(model, 2, 37)
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 37:]
    assert len(set(expected.flatten().tolist())) > 2  # no model that repeats itself
    assert torch.equal(hugging_face.greedy(model, prompts, 9), expected)


def test_a_filled_cache_is_one_of_that_length(folder):
    _, model = load(folder, "hf-sdpa")
    cache, tokens = hugging_face.filled_cache(model, hugging_face.random_tokens(model, 3, 50))
    assert cache.get_seq_length() == 50 and tokens.shape == (3, 1)
    hugging_face._timed_step(model, cache, tokens)
    assert cache.get_seq_length() == 51


def test_cells_are_timed_and_what_does_not_fit_is_told(folder, monkeypatch):
    spec, _ = load(folder, "hf-eager")
    real = hugging_face._step

    def small(model, cache, tokens):
        if tokens.numel() > 4 * 100:
            raise torch.OutOfMemoryError("no room")
        return real(model, cache, tokens)

    monkeypatch.setattr(hugging_face, "_step", small)
    filled = [
        Cell(4, 128, "filled", prefill=False),
        Cell(None, 256, "room", room=256, prefill=False),
    ]
    cells = [Cell.parse("2x64"), Cell.parse("4x128"), *filled]
    kinds = list(hugging_face.run_hugging_face(spec, cells, {}))
    assert [kind for kind, _ in kinds] == ["ready", "cell", "cell", "cell", "cell"]
    figures = dict(value for kind, value in kinds if kind == "cell")
    assert (
        figures["2x64"]["context_tokens"] == 64 + 4 + 2
        and figures["2x64"]["step_ms"]["median"] > 0
        and figures["2x64"]["prefill_s"] > 0
    )
    assert figures["4x128"] == {"requests": 4, "out_of_memory": "the prefill does not fit"}
    assert "prefill_s" not in figures["filled"] and figures["filled"]["steps"] == 4
    # It never grows beyond its room.
    assert figures["room"]["requests"] == 4 and figures["room"]["prompt_tokens"] == 256 - 4 - 4


def test_requests_are_halved_till_they_fit(folder, monkeypatch):
    _, model = load(folder, "hf-sdpa")
    real = hugging_face.filled_cache

    def small(model, prompts):
        if prompts.shape[0] > most:
            raise hugging_face.OutOfMemory("the KV cache does not fit")
        return real(model, prompts)

    monkeypatch.setattr(hugging_face, "filled_cache", small)
    for most, expected in ((8, 8), (3, 2), (0, 0)):
        assert hugging_face.fitting_requests(model, 8, 40) == expected
    assert hugging_face.measure_cell(model, Cell(None, 40, "c"), 0, 4) == {
        "requests": 0,
        "out_of_memory": "not one request fits",
    }
