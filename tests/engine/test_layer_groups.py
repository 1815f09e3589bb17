"""An engine whose head selects for groups of layers. The same model and head in transformers,
token by token, each layer with the pages of its own group, are the reference.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.marks.heads import SERVINGS, HeadBeside, forced, load_head
from benchmarks.marks.paged_model import PagedModel
from specontext_vllm.retrieval.checkpoint import aux_layers_of, save_head
from specontext_vllm.retrieval.reference import Budget
from tests.distillation.tiny_models import make_config, make_model
from tests.engine.conftest import engine
from tests.engine.poison import poison_unread
from tests.engine.test_architectures import SHAPE, continue_densely
from tests.engine.test_lossless import CLOSE, Drafting
from tests.retrieval.own_heads import make_own

LENGTHS, TOKENS, GROUPS = (210, 400, 37, 333), 24, 3
BUDGET, SINKS, RECENTS = 64, 16, 16
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from transformers' in their last digits",
)


def make_parts(folder):
    """A random model and head. Queries and keys are large, so that groups differ."""
    model = make_model(make_config("llama", **SHAPE))
    model.save_pretrained(folder)
    head = make_own(
        target_hidden_size=128,
        embed_size=128,
        num_heads=2 * 2 * GROUPS,
        num_kv_heads=2,
        head_dim=16,
        aux_layer_ids=(1, 2, 4),
        num_aux=3,
        target_vocab_size=97,
        trained_length=1024,
        layer_groups=GROUPS,
    )
    tensors = {n: t * (3 if n.endswith("_proj.weight") else 1) for n, t in head.tensors.items()}
    save_head(folder / "retrieval_head", head.spec, tensors, dtype=None)
    return model.eval().requires_grad_(False)


def emulated(model, folder, ids, start, groups=None):
    """Log-probabilities of the tokens behind the one at ``start``."""
    head = load_head(folder / "retrieval_head", model, len(ids))
    paged = PagedModel(model, 1, len(ids), aux_layers_of(head.spec, 5))
    try:
        beside = HeadBeside(head, paged)
        if groups is not None:
            beside.groups = groups
        for _ in paged.prefill(ids[None, :start]):
            beside.learn_prompt(0, ids[:start])
        pages = Budget(BUDGET // 16, SINKS // 16, RECENTS // 16 + 1)
        own = SERVINGS["own"]
        return forced(paged, beside, ids[None, start:], start, pages, own, torch.empty(0))[0]
    finally:
        paged.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The model, and the folder of both."""
    folder = tmp_path_factory.mktemp("model")
    return make_parts(folder), folder


def arguments(folder, **settings):
    sizes = {"budget": BUDGET, "sink_tokens": SINKS, "recent_tokens": RECENTS}
    return {
        "model": str(folder),
        "attention_backend": "specontext",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "additional_config": {"specontext": sizes | settings},
    }


def test_each_layer_reads_what_its_group_chose(parts):
    from vllm import SamplingParams, TokensPrompt

    model, folder = parts
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0
    )
    with engine(**arguments(folder)) as llm:

        def answers():
            replies = llm.generate(
                [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
                params,
                use_tqdm=False,
            )
            llm.reset_prefix_cache()
            found = []
            for reply in replies:
                tokens = list(reply.outputs[0].token_ids)
                steps = zip(tokens, reply.outputs[0].logprobs, strict=True)
                found.append((tokens, torch.tensor([step[t].logprob for t, step in steps])))
            return found

        found = answers()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("specontext_vllm.cpu_kernels.available", lambda: False)
            in_torch = answers()
        stats = llm.collective_rpc("specontext_stats")[0]
        for changes in ({"budget": 1024}, {"retriever": "oracle"}, {"retriever": "dense"}):
            llm.collective_rpc("specontext_set", kwargs=changes)
            for prompt, (tokens, _) in zip(prompts, answers(), strict=True):
                dense = continue_densely(model, prompt)
                assert tokens[: len(dense)] == dense, changes
    assert [tokens for tokens, _ in in_torch] == [tokens for tokens, _ in found]
    others = 0
    for prompt, (tokens, log_probs) in zip(prompts, found, strict=True):
        ids = torch.tensor(prompt + tokens)
        wanted = emulated(model, folder, ids, len(prompt))
        torch.testing.assert_close(log_probs[1:], wanted, rtol=1e-3, atol=1e-3)
        if len(prompt) > 200:
            for groups in ([0] * 5, [2, 2, 1, 0, 0]):
                other = emulated(model, folder, ids, len(prompt), groups)
                others += int((other - wanted).abs().max() > 0.02)
    # Else any group's pages would do.
    assert others == 6
    assert 0 < stats["pages_read"] < 0.5 * stats["pages_total"]
    assert 0 < stats["kept_mass_mean"] < 1


def test_lossless_mode_drafts_with_the_pages_of_each_group(parts, monkeypatch):
    """Its tokens and KV are those of dense attention at every budget."""
    model, folder = parts
    prompt = torch.randint(5, 97, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    with engine(**arguments(folder, mode="lossless")) as llm:
        drafting = Drafting(llm)
        drafting.draft(0)
        tokens = drafting.answer(prompt, 40)
        dense = continue_densely(model, prompt)
        assert tokens[: len(dense)] == dense
        drafting.answer(prompt + tokens[:-1], 1)
        kv = drafting.kv(439).clone()

        def accepted(budget: int, drafts: int) -> list[int]:
            drafting.set(budget=budget)
            drafting.draft(drafts)
            assert drafting.answer(prompt, 40) == tokens
            torch.testing.assert_close(drafting.kv(439), kv, atol=10 * CLOSE, rtol=CLOSE)
            return list(drafting.accepted)

        assert set(accepted(1024, 4)[:-1]) == {4}
        of_groups = {drafts: accepted(BUDGET, drafts) for drafts in (1, 4)}
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in drafting.runtime.layers.names]
        with monkeypatch.context() as patch:
            for layer in layers:
                patch.setattr(layer.impl, "group_table", layers[0].impl.group_table)
            # Answers are the same with any pages, drafts are not.
            assert accepted(BUDGET, 4) != of_groups[4]
        seen = {}
        poison_unread(drafting.runner, seen)
        assert accepted(BUDGET, 4) == of_groups[4] and seen["poisoned pages"] > 0
