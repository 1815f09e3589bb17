"""Adapters and priorities beside stock vLLM: float32, the demo model. A head that was trained on
the base serves adapters.

On a GPU vLLM's kernels for adapters take 16 bits, in which two engines may part ways at a near-tie.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.retrieval.checkpoint import read_checkpoint
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
    grouped_logits,
    page_scores,
    reduce_to_pages,
)
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, STOCK, engine
from tests.engine.scenarios import preemptions, sampling
from tests.engine.test_layer_kinds_gpu import AGREED, agreed
from tests.retrieval.test_own_head import naive_head

RANK, ALPHA = 4, 8
AGAIN = 4, 5, 4
ADAPTERS = {"queries": ("q_proj", "v_proj", "down_proj"), "tokens": ("embed_tokens", "o_proj")}
"""What each changes. The second one's own embedding is not the head's."""
SIZE = {"queries": 0.5, "tokens": 0.4}
BUDGET = {"budget": 96, "sink_tokens": 16, "recent_tokens": 16}


def write_adapter(folder, name: str) -> None:
    """An adapter in peft's files, random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
    generator = torch.Generator().manual_seed(len(name))
    tensors = {}
    for module, weight in model.named_parameters():
        module = module.removesuffix(".weight")
        if module.rpartition(".")[2] not in ADAPTERS[name]:
            continue
        out, width = weight.shape
        size = SIZE[name] * weight.std() * width**0.5 / RANK**0.5
        if module.endswith("embed_tokens"):
            # Here the first factor has a column for each token.
            first = torch.randn(RANK, out, generator=generator)
            second = 0.5 * weight.std() * torch.randn(width, RANK, generator=generator)
            names = "lora_embedding_A", "lora_embedding_B"
        else:
            first = torch.randn(RANK, width, generator=generator) / width**0.5
            second = size * torch.randn(out, RANK, generator=generator)
            names = "lora_A.weight", "lora_B.weight"
        for part, tensor in zip(names, (first, second), strict=True):
            tensors[f"base_model.model.{module}.{part}"] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(ADAPTERS[name]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ADAPTERS:
        write_adapter(folder / name, name)
    return {name: folder / name for name in ADAPTERS}


def ask(llm, prompts, adapters) -> list[list[int]]:
    """Answers of one batch: the base and both adapters to one prompt, and again the base and the
    adapters to prompts of other lengths.
    """
    from vllm.lora.request import LoRARequest

    requests = [None] + [
        LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    ]
    llm.reset_prefix_cache()
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[i]} for i in (-1, -1, -1, *AGAIN)],
        sampling(),
        lora_request=requests * 2,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def as_good_as_equal(first: list[list[int]], second: list[list[int]]) -> bool:
    return agreed(first, second) >= AGREED if CUDA else first == second


def by_priority(llm, prompts) -> dict[str, object]:
    """Answers of requests for which there is too little room, the urgent one last and alone."""
    llm.reset_prefix_cache()
    core, before, answers = llm.llm_engine, preemptions(llm), {}
    crowd = [prompts[i][::way] for i in (8, 7, 6) for way in (1, -1)]
    for number, prompt in enumerate(crowd):
        urgent = number == len(crowd) - 2
        if urgent:
            continue
        params = sampling(max_tokens=90)
        core.add_request(f"{number}", {"prompt_token_ids": prompt}, params, priority=5)
    for _ in range(14):
        core.step()
    core.add_request("urgent", {"prompt_token_ids": prompts[6]}, sampling(max_tokens=60))
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                name = output.request_id.partition("-")[0]
                answers[name] = output.outputs[0].token_ids, output.metrics.num_preemptions
    preempted = preemptions(llm) - before
    llm.reset_prefix_cache()
    (alone,) = llm.generate(
        [{"prompt_token_ids": prompts[6]}], sampling(max_tokens=60), use_tqdm=False
    )
    tokens = {name: list(found) for name, (found, _) in answers.items()}
    return {
        "tokens": tokens,
        "preempted": preempted,
        "urgent": answers["urgent"][1],
        "alone": list(alone.outputs[0].token_ids),
    }


def watch_choices(worker) -> None:
    """Note the pages that a request's first decode step reads, each KV head's by their places."""
    step, worker.choices = worker.model_runner.runtime.step, {}
    choose = step.choose_pages

    def noted(batch, *args):
        choose(batch, *args)
        heads = step.selection.num_kv_heads
        for row, name in enumerate(batch.names[: batch.num_decodes]):
            table = batch.block_table[row].tolist()
            chosen = []
            for head in range(heads):
                place = row * heads + head
                count = -(-int(step.selection.lengths[place]) // 16)
                pages = step.selection.pages[place, :count] // heads
                chosen.append([table.index(page) for page in pages.tolist()])
            worker.choices.setdefault(name, (int(batch.seq_lens[row]), chosen))

    step.choose_pages = noted


def choices(worker) -> list[tuple[int, list[list[int]]]]:
    """In the order in which the requests came."""
    return [
        worker.choices[name]
        for name in sorted(worker.choices, key=lambda n: int(n.partition("-")[0]))
    ]


PAGES = 176
LORA = {
    "dtype": "bfloat16" if CUDA else "float32",
    "scheduling_policy": "priority",
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_num_seqs": 6,
}


@pytest.fixture(scope="module")
def stock_answers(prompts, adapters):
    blocks = PAGES * 16 // STOCK.get("block_size", 16)
    with engine(**{**STOCK, **LORA, "num_gpu_blocks_override": blocks}) as llm:
        return {
            "whole": ask(llm, prompts, adapters),
            "by priority": by_priority(llm, prompts),
        }


@pytest.fixture(scope="module")
def answers(prompts, adapters):
    """With a budget over the context, and with a small one; and what was chosen then."""
    settings = {"retrieval_head": str(DEMO_MODEL / "retrieval_head"), "budget": 2048}
    with engine(
        **{**LORA, "num_gpu_blocks_override": PAGES},
        attention_backend="specontext",
        additional_config={"specontext": settings},
    ) as llm:
        out = {
            "whole": ask(llm, prompts, adapters),
            "by priority": by_priority(llm, prompts),
        }
        llm.collective_rpc("specontext_set", kwargs=BUDGET)
        if not CUDA:
            llm.collective_rpc(watch_choices)
        out["small"] = ask(llm, prompts, adapters)
        out["chosen"] = [] if CUDA else llm.collective_rpc(choices)[0]
        out["small by priority"] = by_priority(llm, prompts)
    return out


def test_two_adapters_and_the_base_in_one_batch_answer_as_stock(stock_answers, answers):
    expected = stock_answers["whole"]
    assert as_good_as_equal(answers["whole"], expected)
    # The adapters are not without effect, nor the same.
    assert len({tuple(tokens) for tokens in expected[:3]}) == 3


@pytest.mark.skipif(CUDA, reason="a GPU's graphs hold what is watched here")
def test_an_adapter_s_tokens_are_read_where_the_head_looks(prompts, adapters, answers):
    """The head's formulas over the adapted model's states and the base's embedding."""
    from transformers import AutoModelForCausalLM

    checkpoint = read_checkpoint(DEMO_MODEL / "retrieval_head")
    base = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
    embedding = base.get_input_embeddings().weight.detach().clone()
    assert len(answers["chosen"]) == 6
    for row, name in enumerate((None, *adapters), start=3):
        tokens = [*prompts[AGAIN[row - 3]], answers["small"][row][0]]
        model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
        if name is not None:
            merge(model, adapters[name])
        with torch.inference_mode():
            states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        aux = [states[layer][0] for layer in checkpoint.spec.aux_layer_ids]
        length, chosen = answers["chosen"][row]
        assert length == len(tokens)
        assert chosen == naive_choice(checkpoint, aux, embedding[tokens])
        if name == "tokens":
            # With its own embedding the head would have looked elsewhere.
            own = model.get_input_embeddings().weight.detach()[tokens]
            assert chosen != naive_choice(checkpoint, aux, own)


def test_an_urgent_request_goes_first_and_all_answer_as_stock(stock_answers, answers):
    stock, ours = stock_answers["by priority"], answers["by priority"]
    small = answers["small by priority"]
    for found in (stock, ours, small):
        assert found["preempted"] > 0 and found["urgent"] == 0 and len(found["tokens"]) == 6
        assert as_good_as_equal([found["tokens"]["urgent"]], [found["alone"]])
    names = sorted(stock["tokens"])
    assert names == sorted(ours["tokens"])
    assert as_good_as_equal([ours["tokens"][n] for n in names], [stock["tokens"][n] for n in names])
    assert small["tokens"] != stock["tokens"]


def merge(model, folder) -> None:
    """Add an adapter to the weights."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if (first := tensors.get(f"{module}.lora_A.weight")) is not None:
                weight += ALPHA / RANK * tensors[f"{module}.lora_B.weight"] @ first
            elif (first := tensors.get(f"{module}.lora_embedding_A")) is not None:
                weight += ALPHA / RANK * (tensors[f"{module}.lora_embedding_B"] @ first).T


def naive_choice(checkpoint, aux, embeds) -> list[list[int]]:
    """Of the last token, for each KV head."""
    _, queries, keys = naive_head(checkpoint, aux, embeds)
    # Token 0 has no pair, and its page is a sink.
    keys[0] = 0
    logits = grouped_logits(queries[-1:].transpose(0, 1)[None], keys.transpose(0, 1)[None])
    logits[..., 0] = float("-inf")
    scores, _ = page_scores(*reduce_to_pages(logits[0, :, 0], 16))
    budget = Budget.of(SpeContextConfig.from_settings(BUDGET))
    chosen = chosen_pages(scores, scores.shape[-1], budget)
    return [row.nonzero()[:, 0].tolist() for row in chosen]
