"""The command from a model folder to a head that this plugin serves, and to a draft model that
vLLM's own EAGLE-3 speculative decoding serves.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.synthetic.tasks import make_problem
from tests.engine.conftest import DEMO_MODEL, engine

TOKENS = 40


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


def test_vllms_own_speculative_decoding_takes_it(tmp_path, asked):
    """From the shipped head on, since a draft part takes longer to train from nothing than a test
    may.
    """
    init = DEMO_MODEL / "retrieval_head"
    head = distill(tmp_path / "head", "--format", "eagle3", "--init", init, "--steps", 2)
    prompts, replies = asked
    # vLLM's CPU attention takes blocks of its own size, so none is named.
    with engine(
        speculative_config={"method": "eagle3", "model": str(head), "num_speculative_tokens": 1},
        block_size=None,
        num_gpu_blocks_override=None,
    ) as llm:
        assert generate(llm, prompts) == replies
        counts = {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        }
    drafted, accepted = (
        counts[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")
    )
    assert accepted > 0.5 * drafted > 0
