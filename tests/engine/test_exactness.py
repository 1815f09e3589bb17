"""With a budget that covers the context, the tokens are stock vLLM's: float32, real weights, every
way a request can go.
"""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import read_checkpoint
from tests.engine.conftest import DEMO_MODEL, STOCK, engine
from tests.paging import assert_close
from tests.retrieval.test_own_head import naive_head

MAX_TOKENS = 24
END_TOKEN = 2  # <|end|> of the demo model


def sampling(**changes):
    from vllm import SamplingParams

    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "detokenize": False,
            **changes,
        }
    )


def preemptions(llm) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def ids(outputs) -> list[list[int]]:
    return [until_sure(list(o.outputs[0].token_ids)) for o in outputs]


def until_sure(tokens: list[int]) -> list[int]:
    """All tokens on a CPU. On a GPU those up to the end of the answer: float32 matrix products run
    on tf32 units there, in other orders in other kernels, and what a model says after its answer
    hangs on near-ties."""
    if not torch.cuda.is_available():
        return tokens
    return tokens[: tokens.index(END_TOKEN) + 1] if END_TOKEN in tokens else tokens


def scenarios(llm, prompts) -> dict[str, object]:
    """Every scenario on one engine; the same calls for the stock engine and ours."""

    def generate(chosen, **changes):
        return llm.generate(
            [{"prompt_token_ids": p} for p in chosen], sampling(**changes), use_tqdm=False
        )

    out: dict[str, object] = {}
    # Each prompt alone; those over 256 tokens take several chunks.
    out["plain"] = [ids(generate([p]))[0] for p in prompts]
    before = preemptions(llm)
    # All at once with long answers, the longest first: ragged batches, decode and prefill rows
    # mixed, more pages than the engine has.
    crowd = generate(prompts[::-1], max_tokens=90)
    out["ragged"] = ids(crowd)
    out["preempted"] = preemptions(llm) - before
    out["undisturbed"] = [output.metrics.num_preemptions == 0 for output in crowd]
    generate([prompts[-1]], max_tokens=1)
    hit = generate([prompts[-1]])
    out["prefix hit"] = ids(hit)
    out["cached tokens"] = hit[0].num_cached_tokens
    # The hit may end inside what was generated, and the next turn goes on behind it.
    longer = prompts[-1] + ids(hit)[0] + prompts[4][:40]
    turn = generate([longer])
    out["next turn"] = ids(turn)
    llm.reset_prefix_cache()
    out["next turn, cold"] = ids(generate([longer]))
    llm.reset_prefix_cache()
    out["neighbour alone"] = ids(generate([prompts[-2][:255]]))[0]
    llm.reset_prefix_cache()
    # Its neighbour leaves one token of the step to the second prompt: a chunk of one token with
    # more to come, from the start and behind a hit.
    out["chunk of one"] = ids(generate([prompts[-2][:255], prompts[-1]]))
    llm.reset_prefix_cache()
    generate([prompts[-1]], max_tokens=1)
    out["chunk of one behind a hit"] = ids(generate([prompts[-2][:255], prompts[-1]]))
    llm.reset_prefix_cache()
    # The same prompt several times at once, and its beginning: its pages are in the prefix cache
    # before they are computed. One token is left to do behind the hit, so that a twin that did not
    # wait would be a decode row over pages that nobody has seen yet.
    twin = prompts[-1][: (len(prompts[-1]) - 1) // 16 * 16 + 1]
    out["twin alone"] = ids(generate([twin]))[0]
    llm.reset_prefix_cache()
    twins = generate([twin, prompts[3], twin, twin[:-100] + prompts[5][:30], twin])
    out["twins"] = [tokens for i, tokens in enumerate(ids(twins)) if i in (0, 2, 4)]
    out["twins' hits"] = [twins[i].num_cached_tokens for i in (2, 4)]
    llm.reset_prefix_cache()
    out["neighbour aborted"] = abort_neighbour(llm, prompts)
    return out


def abort_neighbour(llm, prompts) -> list[int]:
    """Tokens of a request whose neighbours are aborted in prefill and in decode."""
    core = llm.llm_engine
    for name, prompt in (
        ("kept", prompts[-2]),
        ("decoding", prompts[5]),
        ("prefilling", prompts[-1]),
    ):
        core.add_request(name, {"prompt_token_ids": prompt}, sampling())
    final, step = [], 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.request_id.startswith("kept") and output.finished:
                final = until_sure(list(output.outputs[0].token_ids))
        step += 1
        if step == 4:
            core.abort_request(["prefilling"])
        if step == 9:
            core.abort_request(["decoding"])
    return final


OTHER_WAYS = [
    "ragged",
    "next turn",
    "chunk of one",
    "chunk of one behind a hit",
    "neighbour aborted",
]


def by_another_way(out: dict, scenario: str) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of a scenario, and those of the same prompts gone another way: alone, or with a cold
    cache. They are the same under any budget.
    """
    if scenario == "ragged":
        # A preempted request's answer so far is prefilled when it comes back, which is dense.
        kept = [i for i, undisturbed in enumerate(out["undisturbed"]) if undisturbed]
        assert len(kept) >= 5
        return [out["ragged"][i][:MAX_TOKENS] for i in kept], [out["plain"][::-1][i] for i in kept]
    if scenario == "next turn":
        return out["next turn"], out["next turn, cold"]
    if scenario == "neighbour aborted":
        return [out["neighbour aborted"]], [out["plain"][-2]]
    return out[scenario], [out["neighbour alone"], out["plain"][-1]]


@pytest.fixture(scope="module")
def stock(prompts):
    with engine(**STOCK) as llm:
        return scenarios(llm, prompts)


@pytest.fixture(scope="module")
def sparse(prompts):
    settings = {
        "specontext": {"retrieval_head": str(DEMO_MODEL / "retrieval_head"), "budget": 2048}
    }
    with engine(attention_backend="specontext", additional_config=settings) as llm:
        out = scenarios(llm, prompts)
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        # The same engine with a budget that does not cover the longer prompts: answers go on, but
        # pages are left out.
        llm.collective_rpc("specontext_set", kwargs={"budget": 160})
        llm.collective_rpc("specontext_stats", args=(True,))
        out["small budget"] = scenarios(llm, prompts)
        out["small stats"] = llm.collective_rpc("specontext_stats")[0]
        return out


@pytest.mark.parametrize(
    "scenario",
    [
        "plain",
        "ragged",
        "prefix hit",
        "next turn",
        "next turn, cold",
        "chunk of one",
        "chunk of one behind a hit",
        "twins",
        "neighbour aborted",
    ],
)
def test_tokens_equal_stock(stock, sparse, scenario):
    assert sparse[scenario] == stock[scenario]


def test_the_scenarios_happened(stock, sparse):
    """Preemptions, prefix hits and decode steps took place, in both engines."""
    assert stock["preempted"] > 0 and sparse["preempted"] > 0
    assert sparse["cached tokens"] >= 256
    assert sparse["stats"]["pages_read"] == sparse["stats"]["pages_total"] > 0
    assert sparse["neighbour aborted"]


def test_a_small_budget_reads_less_and_survives_the_same_scenarios(sparse):
    small = sparse["small stats"]
    assert small["pages_read"] < 0.6 * small["pages_total"]
    assert 0 < small["kept_mass_mean"] < 1
    assert all(sparse["small budget"]["plain"])


def test_twins_answer_as_alone_and_share_their_pages(sparse):
    """Under a small budget too: a hit waits for the step that computes its pages."""
    small = sparse["small budget"]
    assert small["twins"] == [small["twin alone"]] * 3
    assert min(small["twins' hits"]) >= 256


@pytest.mark.parametrize("scenario", OTHER_WAYS)
def test_a_small_budget_s_tokens_do_not_hang_on_a_request_s_way(sparse, scenario):
    tokens, otherwise = by_another_way(sparse["small budget"], scenario)
    assert tokens == otherwise


def test_a_prefix_hit_selects_as_a_cold_start_does(sparse):
    """Under a small budget too: the head's keys continue exactly behind a hit on prompt pages."""
    assert sparse["small budget"]["prefix hit"][0] == sparse["small budget"]["plain"][-1]


# A head in the format of our own, whose keys are made from the states of their own tokens.


def watch_slots(worker) -> None:
    """Note in which slot each position of the one running request lies."""
    retriever = worker.model_runner.runtime.retriever
    learn, worker.slots = retriever.learn, {}

    def noted(batch, rows, aux):
        tokens = slice(batch.num_tokens)
        positions, slots = batch.positions[tokens].tolist(), batch.slots[tokens].tolist()
        worker.slots.update(zip(positions, slots, strict=True))
        learn(batch, rows, aux)

    retriever.learn = noted


def keys_by_position(worker) -> torch.Tensor:
    slots = [slot for _, slot in sorted(worker.slots.items())]
    device = worker.model_runner.runtime.device
    cache = worker.model_runner.runtime.retriever.cache
    return cache.keys_at(torch.tensor(slots, device=device)).float().cpu()


def at_once(llm, tokens: int) -> None:
    """A step has room for so many tokens."""
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens


@pytest.fixture(scope="module")
def own(prompts, own_head):
    settings = {"retrieval_head": str(own_head), "budget": 2048, "head_key_dtype": "model"}
    prompt, out = prompts[-1], {}
    with engine(
        # The slots are read in the steps, which no graph may hold then.
        enforce_eager=True,
        attention_backend="specontext",
        additional_config={"specontext": settings},
    ) as llm:

        def generate():
            return llm.generate([{"prompt_token_ids": prompt}], sampling(), use_tqdm=False)

        llm.collective_rpc(watch_slots)
        first = generate()
        out["plain"], out["raw"] = ids(first)[0], list(first[0].outputs[0].token_ids)
        out["keys"] = llm.collective_rpc(keys_by_position)[0]
        hit = generate()
        out["hit"], out["cached"] = ids(hit)[0], hit[0].num_cached_tokens
        out["keys behind a hit"] = llm.collective_rpc(keys_by_position)[0]
        # Pages are left out now.
        llm.collective_rpc(
            "specontext_set", kwargs={"budget": 64, "sink_tokens": 16, "recent_tokens": 16}
        )
        llm.collective_rpc("specontext_stats", args=(True,))
        ways = []
        for room in (256, 256, 77, 256):
            at_once(llm, room)
            # With a cold cache, behind a hit, and in other chunks.
            if room != 256 or not ways:
                llm.reset_prefix_cache()
            ways.append(ids(generate())[0])
        out["small budget"] = ways
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        return out


def test_a_head_of_our_own_leaves_stock_s_tokens(stock, own):
    assert own["plain"] == own["hit"] == stock["plain"][-1] and own["cached"] >= 256


def test_a_head_of_our_own_keeps_the_formulas_keys(prompts, own, own_head):
    from transformers import AutoModelForCausalLM

    checkpoint = read_checkpoint(own_head)
    model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float64)
    # The last token of an answer is never computed.
    tokens = torch.tensor([prompts[-1] + own["raw"][:-1]])
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
        embeds = model.get_input_embeddings()(tokens)[0]
    aux = [states[layer][0] for layer in checkpoint.spec.aux_layer_ids]
    _, keys = naive_head(checkpoint, aux, embeds, "k")
    ratio = 2e-2 if torch.cuda.is_available() else 1e-4
    for name in ("keys", "keys behind a hit"):
        assert own[name].shape == keys.shape
        assert_close(name, keys, own[name], ratio)
        # The decode rows' alone.
        assert_close(name, keys[len(prompts[-1]) :], own[name][len(prompts[-1]) :], ratio)


def test_a_head_of_our_own_selects_the_same_whatever_a_request_s_way(own):
    assert all(tokens == own["small budget"][0] for tokens in own["small budget"])
    assert own["stats"]["pages_read"] < 0.2 * own["stats"]["pages_total"]
