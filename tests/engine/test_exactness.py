"""With a budget that covers the context, the tokens are stock vLLM's: float32, real weights, every
way a request can go.
"""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import read_checkpoint
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.scenarios import OTHER_WAYS, SCENARIOS, by_another_way, ids, sampling
from tests.paging import assert_close
from tests.retrieval.test_own_head import naive_head


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_equal_stock(stock, both_budgets, scenario):
    assert both_budgets[scenario] == stock[scenario]


def test_tokens_do_not_hang_on_the_cpu_s_kernels(stock, both_budgets):
    """Float32: with the C++ kernels and with the definitions in torch."""
    assert both_budgets["without kernels"] == stock["plain"]
    assert both_budgets["small budget"]["without kernels"] == both_budgets["small budget"]["plain"]


def test_the_scenarios_happened(stock, both_budgets):
    """Preemptions, prefix hits and decode steps took place, in both engines."""
    assert stock["preempted"] > 0 and both_budgets["preempted"] > 0
    assert both_budgets["cached tokens"] >= 256
    assert both_budgets["stats"]["pages_read"] == both_budgets["stats"]["pages_total"] > 0
    assert both_budgets["neighbour aborted"]


def test_a_small_budget_reads_less_and_survives_the_same_scenarios(both_budgets):
    small = both_budgets["small budget"]["stats"]
    assert small["pages_read"] < 0.6 * small["pages_total"]
    assert 0 < small["kept_mass_mean"] < 1
    assert all(both_budgets["small budget"]["plain"])


def test_twins_answer_as_alone_and_share_their_pages(both_budgets):
    """Under a small budget too: a hit waits for the step that computes its pages."""
    small = both_budgets["small budget"]
    assert small["twins"] == [small["twin alone"]] * 3
    assert min(small["twins' hits"]) >= 256


@pytest.mark.parametrize("scenario", OTHER_WAYS)
def test_a_small_budget_s_tokens_do_not_hang_on_a_request_s_way(both_budgets, scenario):
    tokens, otherwise = by_another_way(both_budgets["small budget"], scenario)
    assert tokens == otherwise


def test_a_prefix_hit_selects_as_a_cold_start_does(both_budgets):
    """Under a small budget too: the head's keys continue exactly behind a hit on prompt pages."""
    assert (
        both_budgets["small budget"]["prefix hit"][0] == both_budgets["small budget"]["plain"][-1]
    )


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
