"""The command from a model folder to a head that this plugin serves, and to a draft model that
vLLM's own EAGLE-3 speculative decoding serves.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.steps_ahead import Pairs, states_ahead
from specontext_vllm.distillation.teacher import Teacher, load_teacher
from specontext_vllm.synthetic.tasks import make_problem
from tests.engine.conftest import DEMO_MODEL, engine

TOKENS, DRAFTS = 40, 3


def distill(out, *options):
    arguments = [
        "distill",
        "--model",
        DEMO_MODEL,
        "--data",
        "synthetic",
        "--out",
        out,
        "--context",
        256,
        *options,
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return distill(tmp_path_factory.mktemp("head"), "--steps", 50)


@pytest.fixture(scope="module")
def asked():
    """Prompts, and what transformers answers greedily in float32."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    problems = [
        make_problem(
            "recitation" if i else "needle", seed=40 + i, approx_tokens=400, layout="question_last"
        )
        for i in range(2)
    ]
    prompts = [
        tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, return_dict=False)
        for p in problems
    ]
    replies = [
        model.generate(torch.tensor([p]), max_new_tokens=TOKENS, do_sample=False)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    return prompts, replies


def generate(llm, prompts):
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        use_tqdm=False,
    )
    return [output.outputs[0].token_ids for output in outputs]


def test_recall_rises(head):
    curve = [
        json.loads(line) for line in (head / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert curve[0]["step"] == 0 and curve[-1]["step"] == 50
    assert (
        curve[-1]["recall"] > curve[0]["recall"] + 0.02
        and curve[-1]["recall"] < curve[-1]["recall_best"]
    )


def test_the_plugin_serves_it(head, asked):
    prompts, replies = asked
    settings = {"retrieval_head": str(head), "budget": 1024}
    with engine(attention_backend="specontext", additional_config={"specontext": settings}) as llm:
        assert generate(llm, prompts) == replies
        llm.collective_rpc("specontext_set", kwargs={"retriever": "dlm", "budget": 128})
        llm.collective_rpc("specontext_stats", args=(True,))
        assert all(generate(llm, prompts))
        stats = llm.collective_rpc("specontext_stats")[0]
    assert 0 < stats["pages_read"] < 0.5 * stats["pages_total"]


@torch.no_grad()
def drafts_accepted(folder, prompts, replies):
    """How many first, second, ... drafts greedy verification accepts, by the draft model that is
    trained: ``(rounds, [DRAFTS])``.
    """
    model = load_teacher(DEMO_MODEL, torch.device("cpu"), torch.float32)
    layers, width = model.config.num_hidden_layers, model.config.vocab_size
    draft = DraftModel.load(folder, max_position=1024, num_layers=layers, vocabulary=width)
    rounds, accepted = 0, [0] * DRAFTS
    for prompt, reply in zip(prompts, replies, strict=True):
        last = len(prompt) + len(reply) - 1
        ids = torch.tensor([prompt + reply])
        # Drafts may be accepted beyond the end.
        for _ in range(DRAFTS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        nowhere = torch.zeros(1, 1, dtype=torch.long)
        lesson = Teacher(model, draft.aux_layers)(ids, nowhere, AttentionTarget(0))
        pairs = Pairs.of(draft, lesson.embeds, lesson.aux)
        # The newest token is one that the target has chosen: at first, the reply's first.
        newest = len(prompt)
        while newest < last:
            start = torch.tensor([[newest - 1]])
            rounds += 1
            for step, states in enumerate(states_ahead(draft, pairs, start, DRAFTS)):
                if draft.lm_head(states).argmax() != ids[0, newest + 1]:
                    break
                accepted[step] += 1
                newest += 1
            newest += 1
    return rounds, accepted


def test_vllms_own_speculative_decoding_accepts_what_training_says(tmp_path, asked):
    """Draft by draft. From the shipped head on, since a draft part takes longer to train from
    nothing than a test may.
    """
    init = DEMO_MODEL / "retrieval_head"
    options = ("--steps", 2, "--learning-rate", 1e-5)
    head = distill(tmp_path / "head", "--format", "eagle3", "--init", init, *options)
    prompts, replies = asked
    rounds, expected = drafts_accepted(head, prompts, replies)
    method = {"method": "eagle3", "model": str(head), "num_speculative_tokens": DRAFTS}
    # vLLM's CPU attention takes blocks of its own size, so none is named.
    with engine(speculative_config=method, block_size=None, num_gpu_blocks_override=None) as llm:
        assert generate(llm, prompts) == replies
        counts = {metric.name: metric for metric in llm.get_metrics()}
    name = "vllm:spec_decode_num"
    assert counts[f"{name}_drafts"].value == rounds
    assert counts[f"{name}_accepted_tokens_per_pos"].values == expected
    # Of a head trained one step ahead 26, 1 and 0 of 26 were.
    assert expected[0] > 0.5 * rounds > 0 and expected[1] > 0.2 * rounds and expected[2] > 0
