"""The plain-torch decoder that chooses pages, and the case that compares who chooses them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.plain_model import plain_model
from benchmarks.questions import answer, questions
from specontext_vllm.demo.decoder import Decoder
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import Teacher, load_teacher, read_config, read_tokenizer
from tests.engine.conftest import DEMO_MODEL

NEWEST, BUDGET = 5, 128


@pytest.fixture(scope="module")
def decoder():
    shape = DraftShape.for_target(read_config(DEMO_MODEL), max_position=0)
    return Decoder(
        plain_model(
            Teacher(load_teacher(DEMO_MODEL, torch.device("cpu"), torch.float32), shape.aux_layers)
        ),
        None,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(DEMO_MODEL)


@pytest.mark.parametrize("length", [500, 512, 513])
def test_the_heaviest_pages_are_kept(decoder, length):
    layers = list(torch.randn(3, 1, decoder.model.size.kv_heads, 2, length) * 3)
    kept = decoder.select("common", BUDGET, layers, length, torch.Generator())
    weight = torch.stack([layer.softmax(-1).amax(2) for layer in layers]).amax(0)
    count = -(-length // 16)
    always = {0, *range(count - NEWEST, count)}
    for head in range(weight.shape[1]):
        heaviest = {
            page: float(weight[0, head, 16 * page : 16 * page + 16].max())
            for page in range(count)
            if page not in always
        }
        best = sorted(heaviest, key=heaviest.get)[-(BUDGET // 16 - len(always)) :]
        assert {int(token) // 16 for token in kept[0, head].nonzero()} == always | set(best)


def test_a_step_reads_what_is_kept_and_says_what_each_layer_looks_at(decoder):
    """Against one whole forward pass; tokens that are not kept may hold anything."""
    ids = torch.randint(5, 900, (1, 101), generator=torch.Generator().manual_seed(0))
    state = decoder.prefill(ids[0, :100].tolist())
    embed, position = decoder.model.embed_tokens(ids[:, 100:]), torch.tensor([100])
    keys, values = list(state.keys), list(state.values)
    with torch.no_grad():
        h, _, logits = decoder.step(embed, position, keys, values, None)
        torch.testing.assert_close(
            decoder.model.head(h)[0, 0], decoder.model(ids)[0, -1], rtol=1e-4, atol=1e-4
        )
        assert len(logits) == len(keys) and keys[0].shape[2] == 101
        assert all(layer.shape[-1] == 101 and layer.isfinite().all() for layer in logits)
        kept = (
            torch.rand(
                1, decoder.model.size.kv_heads, 101, generator=torch.Generator().manual_seed(1)
            )
            < 0.5
        )
        kept[..., -1] = True
        sparse, _, logits = decoder.step(
            embed, position, list(state.keys), list(state.values), kept
        )
        for layer in logits:
            assert torch.equal(layer.isfinite(), kept[:, :, None].expand_as(layer))
        spoiled = [torch.where(kept[..., :100, None], k, 1e4) for k in state.keys]
        torch.testing.assert_close(
            decoder.step(embed, position, spoiled, list(state.values), kept)[0], sparse
        )
        assert not torch.allclose(sparse, h)


def test_the_common_choice_answers_where_random_pages_do_not(decoder, tokenizer):
    problems = [
        (problem, decoder.prefill(prompt)) for problem, prompt in questions(tokenizer, 1024, 6)
    ]
    scores = {
        method: sum(answer(decoder, tokenizer, *one, method, BUDGET) for one in problems)
        for method in ("dense", "common", "random")
    }
    assert min(scores["dense"], scores["common"]) >= 5 and scores["random"] < 3, scores


def test_the_case_writes_who_loses_what(tmp_path):
    command = [
        "choices",
        "--questions",
        "3",
        "--context",
        "768",
        "--budgets",
        "112,128",
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    result = json.loads(next(tmp_path.glob("choices-*.json")).read_text())
    assert [(row["method"], row["budget"]) for row in result["rows"]] == [
        ("dense", None),
        *((m, b) for b in (112, 128) for m in ("dlm", "common")),
    ]
    for row in result["rows"]:
        found = result["details"]["scores"][f"{row['method']} {row['budget'] or 0}"]
        assert len(found) == 3 and row["score"] == pytest.approx(sum(found) / 3)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--budgets", "64"), ("--budgets", "many"), ("--budgets", "128,-1"), ("--task", "poem")],
)
def test_budgets_that_choose_nothing_and_unknown_tasks_are_refused(option, value):
    done = CliRunner().invoke(app, ["choices", option, value])
    assert done.exit_code == 2 and f"{option}: found" in done.stderr


def test_a_passage_is_recited_with_the_pages_in_common(decoder, tokenizer):
    ((problem, prompt),) = questions(tokenizer, 768, 1, "recitation")
    state = decoder.prefill(prompt)
    assert (
        answer(decoder, tokenizer, problem, state, "common", BUDGET)
        == answer(decoder, tokenizer, problem, state, "dense", 0)
        == 1.0
    )
