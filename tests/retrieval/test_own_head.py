"""A head in the format of our own against its formulas, spelled out in double precision."""

import pytest
import torch

from specontext_vllm.retrieval.head import RetrievalHead
from tests.retrieval.own_heads import KINDS, make_own
from tests.retrieval.test_head import naive_norm, naive_rope


def naive_head(checkpoint, aux, embeds, kinds="qk"):
    """``(fused, q, k)`` of a sequence of tokens at positions 0, 1, ..., token by token; of q and k
    those that ``kinds`` names.
    """
    spec, t = checkpoint.spec, {name: w.double() for name, w in checkpoint.tensors.items()}

    def heads(kind, x, position):
        y = t[f"{kind}_proj.weight"] @ x + t.get(f"{kind}_proj.bias", 0)
        if f"{kind}_mlp.gate_proj.weight" in t:
            gate, up, down = (t[f"{kind}_mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            gated = gate @ x
            y = y + down @ (gated / (1 + (-gated).exp()) * (up @ x))
        rows = []
        for row in y.split(spec.head_dim):
            if spec.qk_norm:
                row = naive_norm(row, t[f"{kind}_norm.weight"])
            rows.append(naive_rope(row, position, spec.rope_theta))
        return torch.stack(rows)

    fused, made = [], {kind: [] for kind in kinds}
    before = torch.zeros(spec.hidden_size).double()
    for token in range(len(embeds)):
        states = [state[token].double() for state in aux]
        if spec.fc_norm:
            states = [naive_norm(state, t[f"fc_norm.{i}.weight"]) for i, state in enumerate(states)]
        own = t["fc.weight"] @ torch.cat(states) + t.get("fc.bias", 0)
        u = naive_norm(embeds[token].double(), t["embed_norm.weight"])
        n_before, n = (naive_norm(f, t["feature_norm.weight"]) for f in (before, own))
        x = {"q": [u, n_before], "k": [u, n_before]}
        if spec.key_states == "own":
            x["k"].append(n)
        for kind in kinds:
            made[kind].append(heads(kind, torch.cat(x[kind]), token))
        fused.append(own)
        before = own
    return torch.stack(fused), *(torch.stack(made[kind]) for kind in kinds)


def make_sequence(spec, tokens, seed=3):
    """Aux states and embeddings of made-up tokens."""
    generator = torch.Generator().manual_seed(seed)
    aux = [
        3 * torch.randn(tokens, spec.target_hidden_size, generator=generator)
        for _ in range(spec.num_aux)
    ]
    return aux, 0.02 * torch.randn(tokens, spec.embed_size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_the_formulas(kind):
    checkpoint = make_own(**KINDS[kind])
    head = RetrievalHead(checkpoint, max_position=64, dtype=torch.float32, device="cpu")
    aux, embeds = make_sequence(checkpoint.spec, 9)
    want_fused, want_q, want_k = naive_head(checkpoint, aux, embeds)
    fused, positions = head.fuse(aux), torch.arange(9)
    previous = torch.cat([torch.zeros_like(fused[:1]), fused[:-1]])
    own = fused if checkpoint.spec.key_states == "own" else None
    found = {
        "fused": (fused, want_fused),
        "q": (head.queries(embeds, previous, positions), want_q),
        "k": (head.keys(embeds, previous, positions, own), want_k),
    }
    if own is None:
        q, k = head.project(embeds, previous, positions)
        found |= {"q of both": (q, want_q), "k of both": (k, want_k)}
    for name, (got, want) in found.items():
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, msg=lambda m: name + m)
    assert head.num_bytes == sum(
        tensor.nbytes * {"q_norm": 12, "k_norm": 3}.get(name.split(".")[0], 1)
        for name, tensor in checkpoint.tensors.items()
    )


def test_keys_from_own_states_cannot_be_made_with_the_queries():
    checkpoint = make_own()
    head = RetrievalHead(checkpoint, max_position=64, dtype=torch.float32, device="cpu")
    aux, embeds = make_sequence(checkpoint.spec, 2)
    with pytest.raises(ValueError, match="keys from own states"):
        head.project(embeds, head.fuse(aux), torch.arange(2))
