"""The losses against loops, and the trained module against the head that serves it."""

import torch

from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import alignment_loss, attention_target, draft_loss
from specontext_vllm.retrieval.checkpoint import read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from tests.paging import assert_close

WINDOW = 5


def sample(seed=0, layers=2, batch=2, heads=4, kv_heads=2, length=23, d=8):
    generator = torch.Generator().manual_seed(seed)
    queries = [torch.randn(batch, heads, length, d, generator=generator) for _ in range(layers)]
    keys = [torch.randn(batch, kv_heads, length, d, generator=generator) for _ in range(layers)]
    return queries, keys, torch.tensor([[7, 22], [15, 9]])


def test_target_is_the_loops_answer():
    queries, keys, at = sample()
    target, mass = attention_target(queries, keys, at, WINDOW)
    for b in range(2):
        for h in range(2):
            for s in range(2):
                p = int(at[b, s])
                best = torch.zeros(23)
                for q, k in zip(queries, keys):
                    for g in range(2):
                        weight = (k[b, h, : p + 1] @ q[b, h * 2 + g, p] * 8**-0.5).softmax(0)
                        best[: p + 1] = torch.maximum(best[: p + 1], weight)
                best[max(0, p - WINDOW) :] = 0
                torch.testing.assert_close(mass[b, h, s], best.sum())
                torch.testing.assert_close(target[b, h, s], best / best.sum())


def test_alignment_is_least_when_the_head_looks_where_the_teacher_looks():
    queries, keys, at = sample(layers=1, heads=2)
    target, mass = attention_target(queries, keys, at, WINDOW)
    same = alignment_loss(queries[0], keys[0], at, target, mass, WINDOW, sharpness=1.0)
    entropy = -(target * target.clamp(min=1e-12).log()).sum(-1)
    torch.testing.assert_close(same, (entropy * mass.clamp(max=1)).mean(), rtol=1e-4, atol=1e-5)
    other, other_keys, _ = sample(seed=1, layers=1, heads=2)
    assert alignment_loss(other[0], other_keys[0], at, target, mass, WINDOW, sharpness=1.0) > same


def test_a_sharper_loss_would_rather_have_the_heaviest_token_than_the_crowd():
    """One token with weight 0.3, fourteen that share the rest: of two heads the one that finds it
    must lose less, which takes sharpness.
    """
    length, heavy = 23, 4
    at, mass = torch.tensor([[22]]), torch.ones(1, 1, 1)
    target = torch.zeros(1, 1, 1, length)
    target[..., 1:16] = 0.05
    target[..., heavy] = 0.3

    def loss(weights, sharpness):
        keys = torch.zeros(1, 1, length, 8)
        keys[..., 0] = weights.clamp(min=1e-9).log() * 8**0.5
        query = torch.zeros(1, 1, length, 8)
        query[..., 0] = 1.0
        return float(alignment_loss(query, keys, at, target, mass, WINDOW, sharpness))

    finds, spreads = torch.full((length,), 0.02), target[0, 0, 0].clone()
    finds[heavy] = 0.7
    spreads[heavy] = 0.05
    assert loss(finds, 1.0) > loss(spreads, 1.0)
    assert loss(finds, 2.0) < loss(spreads, 2.0)


def test_the_query_heads_of_a_group_may_share_the_tokens():
    """Two tokens that weigh the same: one query head for each finds both, as selection would; one
    head for all can only divide itself.
    """
    length = 23
    at, mass = torch.tensor([[22]]), torch.ones(1, 1, 1)
    target = torch.zeros(1, 1, 1, length)
    target[..., [4, 9]] = 0.5
    keys = torch.eye(length)[None, None]
    shared, divided = torch.zeros(1, 2, length, length), torch.zeros(1, 2, length, length)
    shared[:, 0, 22, 4] = shared[:, 1, 22, 9] = 100.0
    divided[:, :, 22, 4] = divided[:, :, 22, 9] = 100.0
    assert float(alignment_loss(shared, keys, at, target, mass, WINDOW)) < 0.01
    assert float(alignment_loss(divided, keys, at, target, mass, WINDOW)) > 0.6
    assert float(alignment_loss(shared, keys, at, target, mass, WINDOW, each_token=False)) > 5
    assert (
        0.6 < float(alignment_loss(divided, keys, at, target, mass, WINDOW, each_token=False)) < 0.8
    )


def test_sharpness_takes_the_power_of_the_teachers_weights():
    queries, keys, at = sample()
    other, other_keys, _ = sample(seed=1)
    target, mass = attention_target(queries, keys, at, WINDOW)
    power = target**2
    wanted = alignment_loss(
        other[0],
        other_keys[0],
        at,
        power / power.sum(-1, keepdim=True),
        mass,
        WINDOW,
        sharpness=1.0,
    )
    torch.testing.assert_close(
        alignment_loss(other[0], other_keys[0], at, target, mass, WINDOW, sharpness=2.0), wanted
    )
    assert torch.isfinite(
        alignment_loss(
            other[0], other_keys[0], at, torch.zeros_like(target), torch.zeros_like(mass), WINDOW
        )
    )


def test_draft_loss_is_zero_only_for_equal_logits():
    logits = torch.randn(2, 5, 11)
    weights = torch.rand(2, 5)
    assert draft_loss(logits, logits, weights).abs() < 1e-6
    assert draft_loss(torch.randn(2, 5, 11), logits, weights) > 0.1


def test_the_saved_head_computes_what_was_trained(tmp_path):
    """DraftModel -> EAGLE-3 file -> RetrievalHead: the same queries and keys."""
    from specontext_vllm.demo.sizes import SMOKE
    from specontext_vllm.demo.train import draft_shape

    torch.manual_seed(0)
    draft = DraftModel(draft_shape(SMOKE, 128))
    draft.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in draft.state_dict().items()})
    draft.save(tmp_path)
    head = RetrievalHead(
        read_checkpoint(tmp_path), max_position=64, dtype=torch.float32, device="cpu"
    )
    aux = [torch.randn(40, SMOKE.hidden) for _ in range(3)]
    embeds, positions = torch.randn(40, SMOKE.hidden), torch.arange(40)
    _, q, k, _ = draft.queries_keys(embeds[None], torch.cat(aux, -1)[None], positions)
    got_q, got_k = head.project(embeds, head.fuse(aux), positions)
    assert_close("q", q[0].transpose(0, 1), got_q, 1e-5)
    assert_close("k", k[0].transpose(0, 1), got_k, 1e-5)
