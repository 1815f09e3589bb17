"""Drafts in a row against a loop over tokens that keeps a cache as an engine does."""

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import draft_loss
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.steps_ahead import (
    DECAY,
    MEASURED,
    Choices,
    Pairs,
    accepted_drafts,
    agreement,
    draft_losses,
    states_ahead,
)
from tests.distillation.tiny_models import FAMILIES, make_config
from tests.paging import assert_close

LENGTH, STEPS = 24, 5
STARTS = torch.tensor([[3, 19, 0, 22], [7, 21, 12, 8]])


def make_draft(family="llama", **changes):
    """Large weights, so that attention is far from uniform; norms that are not ones."""
    torch.manual_seed(1)
    draft = DraftModel(DraftShape.for_target(make_config(family), max_position=64, **changes))
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return draft


def text(batch=2):
    """``(embeds [B, T + 1, H], aux [B, T + 1, 3H])``."""
    torch.manual_seed(2)
    return torch.randn(batch, LENGTH + 1, 32), torch.randn(batch, LENGTH + 1, 96)


class Served:
    """One request's drafter, a token at a time, in the formulas of vLLM's llama_eagle3.py and from
    the tensors of the checkpoint.
    """

    def __init__(self, draft):
        self.shape, self.tensors, self.rope = draft.shape, draft.checkpoint(), draft.rope
        self.keys, self.values = {}, {}

    def weight(self, name):
        return self.tensors[f"{name}.weight"]

    def norm(self, x, name):
        return x * (x.pow(2).mean() + self.shape.eps) ** -0.5 * self.weight(name)

    def rotate(self, x, position):
        half = x.shape[-1] // 2
        cos, sin = self.rope[position].chunk(2, -1)
        return torch.cat(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin],
            -1,
        )

    def __call__(self, embed, hidden, position):
        """One token ``[H]`` with the hidden state ``[H]`` that goes with it: ``(what the LM head
        reads, what the next step reads)``. Its slot in the cache is its position.
        """
        layer = "midlayer."
        residual = hidden
        x = torch.cat(
            [self.norm(embed, f"{layer}input_layernorm"), self.norm(hidden, f"{layer}hidden_norm")]
        )
        q, k, v = (
            (self.weight(f"{layer}self_attn.{n}_proj") @ x).view(-1, self.shape.head_dim)
            for n in "qkv"
        )
        q, k = self.rotate(q, position), self.rotate(k, position)
        self.keys[position], self.values[position] = k, v
        out = []
        for head, query in enumerate(q):
            kv_head = head // (self.shape.heads // self.shape.kv_heads)
            seen = range(1, position + 1)
            logits = torch.stack([self.keys[p][kv_head] @ query for p in seen])
            share = (logits * self.shape.head_dim**-0.5).softmax(0)
            out.append(sum(s * self.values[p][kv_head] for s, p in zip(share, seen, strict=True)))
        residual = residual + self.weight(f"{layer}self_attn.o_proj") @ torch.cat(out)
        y = self.norm(residual, f"{layer}post_attention_layernorm")
        gated = F.silu(self.weight(f"{layer}mlp.gate_proj") @ y)
        residual = residual + self.weight(f"{layer}mlp.down_proj") @ (
            gated * (self.weight(f"{layer}mlp.up_proj") @ y)
        )
        return self.norm(residual, "norm"), residual


def served_states(draft, embeds, aux, start, steps):
    """States ``[steps, H]`` of a request whose first draft follows token ``start + 1``, and that
    drafts the text's own tokens.
    """
    served = Served(draft)
    fused = aux @ served.weight("fc").T
    found = []
    for position in range(1, start + 2):
        normed, hidden = served(embeds[position], fused[position - 1], position)
    found.append(normed)
    for position in range(start + 2, start + 1 + steps):
        normed, hidden = served(embeds[position], hidden, position)
        found.append(normed)
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_of_an_engine(family):
    draft, (embeds, aux) = make_draft(family), text()
    ahead = list(states_ahead(draft, Pairs.of(draft, embeds, aux), STARTS, STEPS, 3))
    assert [states.shape[1] for states in ahead] == [4, 3, 3, 3, 3]
    for b, starts in enumerate(STARTS.tolist()):
        for s, start in enumerate(starts):
            steps = min(STEPS, LENGTH - start) if s < 3 else 1
            expected = served_states(draft, embeds[b], aux[b], start, steps)
            for step in range(steps):
                name = f"step {step} from {start}"
                assert_close(name, ahead[step][b, s], expected[step], 1e-5)


@torch.no_grad()
def test_the_first_step_is_a_pass_over_the_text():
    draft, (embeds, aux) = make_draft("qwen3"), text()
    pairs = Pairs.of(draft, embeds, aux)
    every = draft.states(pairs.fused, pairs.q, pairs.k, pairs.inputs)
    found = next(states_ahead(draft, pairs, STARTS, 1))
    assert_close("states", found, torch.stack([every[b, STARTS[b]] for b in range(2)]), 1e-5)


@torch.no_grad()
def test_a_chain_reads_nothing_of_others_and_nothing_later():
    """Not a true state behind its start, and no token behind its step."""
    draft, (embeds, aux) = make_draft(), text()
    ahead = list(states_ahead(draft, Pairs.of(draft, embeds, aux), STARTS, STEPS))
    other_embeds, other_aux = embeds.clone(), aux.clone()
    # Row 0's first chain starts at token 4, so its third step reads token 6.
    other_aux[0, 4:] = torch.randn_like(aux[0, 4:])
    other_embeds[0, 7:] = torch.randn_like(embeds[0, 7:])
    pairs = Pairs.of(draft, other_embeds, other_aux)
    others = list(states_ahead(draft, pairs, STARTS, STEPS))
    for step in range(STEPS):
        same = torch.equal(ahead[step][0, 0], others[step][0, 0])
        assert same == (step < 3), step
        assert not torch.allclose(ahead[step][0, 1], others[step][0, 1])


class Told:
    """A teacher whose logits are the states themselves, of a vocabulary as large as the width."""

    def logits(self, hidden, ids=None):
        return hidden if ids is None else hidden[..., ids]


def test_the_losses_are_those_of_each_step():
    draft, (embeds, aux) = make_draft(), text()
    draft.lm_head = torch.nn.Linear(32, 32, bias=False)
    hidden, weights = 3 * torch.randn(2, LENGTH + 1, 32), torch.rand(2, LENGTH + 1) + 0.1
    pairs, logits_of = Pairs.of(draft, embeds, aux), Told().logits
    found = draft_losses(draft, pairs, STARTS, weights, hidden, logits_of, 4, 3)
    by_step = []
    for step, states in enumerate(states_ahead(draft, pairs, STARTS, 4, 3)):
        rows = []
        for b, starts in enumerate(STARTS.tolist()):
            for s, start in enumerate(starts[: states.shape[1]]):
                token = start + 1 + step
                if token > LENGTH:
                    continue
                weight = weights[b, token + 1] if token < LENGTH else 0.02
                one = torch.ones(1)
                loss = draft_loss(draft.lm_head(states[b, s])[None], hidden[b, token][None], one)
                rows.append((loss, weight))
        by_step.append(sum(loss * w for loss, w in rows) / sum(w for _, w in rows))
    assert_close("draft", found["draft"], by_step[0], 1e-5)
    decay = [DECAY**n for n in range(3)]
    mean = sum(d * loss for d, loss in zip(decay, by_step[1:], strict=True)) / sum(decay)
    assert_close("ahead", found["ahead"], mean, 1e-5)
    assert set(draft_losses(draft, pairs, STARTS, weights, hidden, logits_of, 1, 3)) == {"draft"}
    found["ahead"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in draft.parameters())


@pytest.mark.parametrize("reduced", [False, True], ids=["whole-vocabulary", "reduced"])
@torch.no_grad()
def test_agreement_counts_what_greedy_verification_accepts(reduced):
    """Against the served drafter, which is fed what it drafts."""
    draft, (embeds, aux) = make_draft(), text()
    ids = torch.randint(32, (2, LENGTH + 1))
    hidden = torch.randn(2, LENGTH + 1, 32)
    draft.lm_head = torch.nn.Linear(32, 32, bias=False)
    if reduced:
        draft.draft_ids = torch.arange(4, 24)
        draft.lm_head = torch.nn.Linear(32, 20, bias=False)
    table = torch.randn(32, 32)
    embeds = table[ids]
    for b, start in ((0, 3), (1, 7), (1, 12)):
        # The teacher and the text say what it drafts, some tokens long.
        for step in range(3):
            states = served_states(draft, embeds[b], aux[b], start, step + 1)
            drafted = int(draft.lm_head(states[-1]).argmax()) + 4 * reduced
            hidden[b, start + 1 + step] = F.one_hot(torch.tensor(drafted), 32).float() * 9
            if step < 2 or start != 7:
                ids[b, start + 2 + step] = drafted
                embeds = table[ids]
    choices = Choices.of(Told(), ids, hidden, STARTS)
    agreed, asked = agreement(draft, Pairs.of(draft, embeds, aux), choices)
    expected_agreed, expected_asked = [0] * MEASURED, [0] * MEASURED
    for b, starts in enumerate(STARTS.tolist()):
        for start in starts:
            served = Served(draft)
            fused = aux[b] @ served.weight("fc").T
            for position in range(1, start + 2):
                normed, state = served(embeds[b, position], fused[position - 1], position)
            for step in range(MEASURED):
                token = start + 1 + step
                if token > LENGTH:
                    break
                expected_asked[step] += 1
                drafted = int(draft.lm_head(normed).argmax()) + 4 * reduced
                if drafted != int(hidden[b, token].argmax()):
                    break
                expected_agreed[step] += 1
                if token == LENGTH or drafted != int(ids[b, token + 1]):
                    break
                normed, state = served(table[drafted], state, token + 1)
    assert (agreed.tolist(), asked.tolist()) == (expected_agreed, expected_asked)
    assert expected_agreed[2] >= 2 and 0 < expected_asked[3] < expected_asked[0] == 8


def test_accepted_drafts_are_sums_of_products():
    found = accepted_drafts(torch.tensor([8, 3, 0, 0, 0]), torch.tensor([10, 6, 2, 0, 0]))
    assert found == pytest.approx([0.8, 1.2, 1.2, 1.2, 1.2])
