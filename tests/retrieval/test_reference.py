"""The definition of scores and choices against loops over tokens and pages."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
    grouped_logits,
    page_scores,
    reduce_to_pages,
    token_scores,
)

PAGE = 16


def some_logits(tokens, seed=0, heads=2, group=3):
    return torch.randn(heads, group, tokens, generator=torch.Generator().manual_seed(seed)) * 4


def test_logits_are_those_of_the_queries_asked_for():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 9, 8, generator=generator)
    keys = torch.randn(2, 2, 9, 8, generator=generator)
    at = torch.tensor([[3, 8], [0, 5]])
    found = grouped_logits(queries, keys, at)
    assert found.shape == (2, 2, 2, 2, 9)
    for row in range(2):
        for s in range(2):
            for head in range(4):
                query = queries[row, head, at[row, s]]
                wanted = keys[row, head // 2] @ query / 8**0.5
                torch.testing.assert_close(found[row, head // 2, s, head % 2], wanted)
    torch.testing.assert_close(
        grouped_logits(queries, keys, scale=2.0)[:, :, 3],
        2 * 8**0.5 * grouped_logits(queries, keys)[:, :, 3],
    )


@pytest.mark.parametrize("tokens", [16, 37, 64])
def test_a_pages_score_is_its_heaviest_tokens_and_its_mass_their_sum(tokens):
    logits = some_logits(tokens)
    scores, mass = page_scores(*reduce_to_pages(logits, PAGE))
    weights = logits.softmax(-1)
    for page, part in enumerate(weights.split(PAGE, -1)):
        torch.testing.assert_close(scores[:, page].exp(), part.amax((-1, -2)))
        torch.testing.assert_close(mass[:, page], part.sum(-1).mean(-1))
    for page, part in enumerate(token_scores(logits).split(PAGE, -1)):
        torch.testing.assert_close(scores[:, page], part.amax(-1))


def test_what_is_not_finite_is_the_worst_and_a_head_without_scores_has_no_say():
    page_max, page_lse = (torch.randn(2, 3, 5), torch.randn(2, 3, 5) + 3)
    page_max[0, :, 1] = float("nan")
    page_lse[0, :, 2] = float("inf")
    page_max[1, 0] = float("inf")
    scores, mass = page_scores(page_max, page_lse)
    assert scores[0, 1] == scores[0, 2] == float("-inf") and not mass[0, 1:3].any()
    assert scores[0, [0, 3, 4]].isfinite().all()
    alone, _ = page_scores(page_max[1:, 1:], page_lse[1:, 1:])
    assert torch.equal(scores[1:], alone)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([1.0, 2 / 3]))


def chosen_by_a_loop(scores, count, budget):
    pages = list(range(count))
    if count <= budget.total:
        return pages
    forced = {*pages[: budget.sinks], *pages[count - budget.recents :]}
    rest = sorted((p for p in pages if p not in forced), key=lambda p: (-scores[p], p))
    return sorted([*forced, *rest[: budget.total - len(forced)]])


@pytest.mark.parametrize("budget", [Budget(6, 1, 2), Budget(9, 2, 5), Budget(4, 1, 1)], ids=str)
def test_chosen_are_sinks_recents_and_the_best_older_first(budget):
    counts = torch.tensor([3, 9, 12, 20])
    scores = torch.randint(0, 6, (4, 2, 20), generator=torch.Generator().manual_seed(1)).float()
    scores[2, 1, 4:8] = float("-inf")
    chosen = chosen_pages(scores, counts[:, None, None], budget)
    for row, count in enumerate(counts.tolist()):
        for head in range(2):
            wanted = chosen_by_a_loop(scores[row, head].tolist(), count, budget)
            assert chosen[row, head].nonzero()[:, 0].tolist() == wanted
            one = chosen_pages(scores[row, head, :count], count, budget)
            assert torch.equal(one, chosen[row, head, :count])


def test_a_budget_of_everything_leaves_nothing_out():
    assert chosen_pages(torch.randn(2, 30), 30, Budget.everything(30)).all()
    config = SpeContextConfig(budget=512, sink_tokens=20, recent_tokens=64)
    assert Budget.of(config) == Budget(32, 2, 5)
