"""Recall against a loop over pages, and against the selection that the engine makes."""

from types import SimpleNamespace

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.distillation.draft import head_scores
from specontext_vllm.distillation.recall import (
    Seen,
    choose,
    heaviest_pages,
    page_sums,
    recall_of,
)

HEADS, KV_HEADS, D, LENGTH = 4, 2, 8, 300


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(1, HEADS, LENGTH, D, generator=generator),
        torch.randn(1, KV_HEADS, LENGTH, D, generator=generator),
    )
    target = torch.rand(1, KV_HEADS, 2, LENGTH, generator=generator)
    return q, k, torch.tensor([[LENGTH - 1, 190]]), target / target.sum(-1, keepdim=True)


@pytest.mark.parametrize("pages", [8, 11])
def test_chosen_pages_are_those_of_the_engine(pages):
    """One row of the served selection, as docs/how-it-works/decode-step.md has it, in a loop."""
    q, k, at, target = sample()
    chosen = choose(head_scores(q, k, at), at, pages)
    sums = page_sums(target)
    config = SpeContextConfig(budget=pages * PAGE_SIZE)
    for s, p in enumerate(at[0].tolist()):
        token = p + 1  # row p of the head is token p + 1
        last = token // PAGE_SIZE
        for h in range(KV_HEADS):
            scores = {}
            for page in range(last + 1):
                tokens = [
                    t for t in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) if 1 <= t <= token
                ]
                weights = [
                    (k[0, h, :token] @ q[0, h * 2 + g, p] * D**-0.5).softmax(0) for g in range(2)
                ]
                scores[page] = max(float(w[t - 1]) for w in weights for t in tokens)
                held = sum(
                    float(target[0, h, s, t - 1])
                    for t in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                    if 1 <= t <= LENGTH
                )
                assert sums[0, h, s, page] == pytest.approx(held, abs=1e-5)
            always = {*range(config.sink_pages), *range(last - config.recent_pages + 1, last + 1)}
            rest = sorted(set(scores) - always, key=lambda page: -scores[page])[
                : pages - len(always)
            ]
            assert set(chosen[0, h, s].nonzero().flatten().tolist()) == always | set(rest)


def test_a_budget_of_everything_recalls_everything():
    q, k, at, target = sample(1)
    chosen = choose(head_scores(q, k, at), at, 1 + LENGTH // PAGE_SIZE)
    past = target * (torch.arange(LENGTH) <= at[:, None, :, None])
    torch.testing.assert_close((page_sums(past) * chosen).sum(-1), past.sum(-1))


def test_recall_is_the_loops():
    """Shares and the heaviest page, by hand, of a head whose queries and keys are given."""
    q, k, at, target = sample(2)
    target = target.masked_fill(
        torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < 0.9, 0.0
    )
    mass = torch.rand(1, KV_HEADS, 2)
    draft = SimpleNamespace(page_scores=lambda *_: head_scores(q, k, at))
    seen = Seen(
        torch.zeros(1, LENGTH + 1, 1),
        torch.zeros(1, LENGTH + 1, 1),
        at,
        page_sums(target),
        heaviest_pages(target),
        mass,
    )
    chosen = choose(head_scores(q, k, at), at, 8)
    found = heaviest = 0.0
    for h in range(KV_HEADS):
        for s in range(2):
            share = mass[0, h, s] / mass.sum()
            pages = chosen[0, h, s].nonzero().flatten().tolist()
            found += share * sum(
                target[0, h, s, t] for t in range(LENGTH) if (t + 1) // PAGE_SIZE in pages
            )
            heaviest += share * ((int(target[0, h, s].argmax()) + 1) // PAGE_SIZE in pages)
    recall = recall_of(draft, seen, [8 * PAGE_SIZE])[8 * PAGE_SIZE]
    assert recall.found == pytest.approx(
        float(found), abs=1e-5
    ) and recall.heaviest == pytest.approx(float(heaviest), abs=1e-5)
    assert recall.found < recall.best and 0 < recall.heaviest < 1
