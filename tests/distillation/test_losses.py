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
    same = alignment_loss(queries[0], keys[0], at, target, mass, WINDOW)
    entropy = -(target * target.clamp(min=1e-12).log()).sum(-1)
    torch.testing.assert_close(same, (entropy * mass.clamp(max=1)).mean(), rtol=1e-4, atol=1e-5)
    other, other_keys, _ = sample(seed=1, layers=1, heads=2)
    assert alignment_loss(other[0], other_keys[0], at, target, mass, WINDOW) > same


def test_draft_loss_is_zero_only_for_equal_logits():
    logits = torch.randn(2, 5, 11)
    weights = torch.rand(2, 5)
    assert draft_loss(logits, logits, weights).abs() < 1e-6
    assert draft_loss(torch.randn(2, 5, 11), logits, weights) > 0.1


def test_the_saved_head_computes_what_was_trained(tmp_path):
    """DraftModel -> EAGLE-3 file -> RetrievalHead: the same queries and keys."""
    from specontext_vllm.demo.train import SMOKE, draft_shape

    torch.manual_seed(0)
    draft = DraftModel(draft_shape(SMOKE, 128))
    draft.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in draft.state_dict().items()})
    draft.save(tmp_path)
    head = RetrievalHead(read_checkpoint(tmp_path), max_position=64, dtype=torch.float32, device="cpu")
    aux = [torch.randn(40, SMOKE.hidden) for _ in range(3)]
    embeds, positions = torch.randn(40, SMOKE.hidden), torch.arange(40)
    _, q, k, _ = draft.queries_keys(embeds[None], torch.cat(aux, -1)[None], positions)
    got_q, got_k = head.project(embeds, head.fuse(aux), positions)
    assert_close("q", q[0].transpose(0, 1), got_q, 1e-5)
    assert_close("k", k[0].transpose(0, 1), got_k, 1e-5)
