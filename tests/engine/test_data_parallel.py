"""Two engines behind one server, and a mixture of experts whose experts are shared out over two
workers.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
import vllm
from openai import OpenAI
from packaging.version import Version
from prometheus_client.parser import text_string_to_metric_families

from specontext_vllm.demo.server import VllmServer, device_arguments
from specontext_vllm.observability import catalog
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, GPU_OPTIONS, engine
from tests.engine.scenarios import MAX_TOKENS, until_sure
from tests.engine.shared_runs import SETTINGS, SMALL
from tests.engine.test_architectures import LENGTHS, write_with_head

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
POOL = 0.25
WHOLE = 384
"""A budget over the contexts of some of the prompts, which leaves something to mirror."""
ENGINES = ("0", "1")
MEMORY_NODES = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


@pytest.fixture(scope="module")
def two_engines(forking_servers):
    if not CUDA and MEMORY_NODES < len(ENGINES) and Version(vllm.__version__) >= Version("0.33"):
        pytest.skip("on a CPU vLLM 0.33 wants a memory node for each engine")
    settings = {
        **SETTINGS,
        "max_budget": WHOLE,
        "host_kv_gib": POOL,
        # Less than the blocks below take in float32.
        "gpu_kv_gib": 0.0115,
    }
    arguments = [
        "--attention-backend",
        "specontext",
        "--served-model-name",
        "demo",
        "--data-parallel-size",
        "2",
        "--max-model-len",
        "704",
        "--max-num-seqs",
        "3",
        "--max-num-batched-tokens",
        "256",
        "--num-gpu-blocks-override",
        "140",
        "--additional-config",
        json.dumps({"specontext": settings}),
        *device_arguments(),
        *(["--dtype", "float32"] if CUDA else []),
        *GPU_OPTIONS,
    ]
    with VllmServer(DEMO_MODEL, arguments) as server:
        yield server


def shown(url: str, metric: catalog.Metric) -> dict[str, float]:
    """A metric's value by engine."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name == metric.name:
                name = sample.labels["engine"]
                found[name] = found.get(name, 0) + sample.value
    return found


def ask(server: VllmServer, prompt: list[int], name: str, budget: int) -> list[int]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        reply = client.completions.create(
            model="demo",
            prompt=prompt,
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_headers={"X-data-parallel-rank": name},
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "vllm_xargs": {"specontext_budget": budget},
            },
        )
    return until_sure(reply.choices[0].token_ids)


@pytest.mark.parametrize("budget", [WHOLE, SMALL])
def test_each_of_two_engines_answers_as_one_alone(
    two_engines, prompts, stock, both_budgets, budget
):
    expected = (stock if budget == WHOLE else both_budgets["small budget"])["plain"]
    if budget == WHOLE:
        prompts = [prompt for prompt in prompts if len(prompt) + MAX_TOKENS <= WHOLE]
        assert len(prompts) == 6
    expected = expected[: len(prompts)]
    before = shown(two_engines.url, catalog.DECODE_ROWS)
    for name in ENGINES:
        answers = [ask(two_engines, prompt, name, budget) for prompt in prompts]
        assert answers == expected
    after = shown(two_engines.url, catalog.DECODE_ROWS)
    # The first token of an answer is the prompt's step's.
    rows = len(prompts) * (MAX_TOKENS - 1)
    assert {name: after[name] - before[name] for name in ENGINES} == dict.fromkeys(ENGINES, rows)


def test_they_share_the_host_pool(two_engines):
    pools = shown(two_engines.url, catalog.HOST_POOL_BYTES)
    assert set(pools) == set(ENGINES)
    assert 0 < pools["0"] == pools["1"] <= POOL * 2**30 / 2


@pytest.mark.gpu
def test_workers_with_half_of_the_experts_each_answer_as_one_with_all(tmp_path):
    """A CPU's kernels for experts end the worker with a segmentation fault, in stock vLLM too."""
    from vllm import SamplingParams, TokensPrompt

    write_with_head(tmp_path, "qwen3_moe")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    # Sums of experts are in other orders, and further on near-ties decide.
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    two = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "mp",
    }
    answers = {}
    for name, shape in (("one", {}), ("two", two)):
        with engine(
            **shape,
            model=str(tmp_path),
            attention_backend="specontext",
            skip_tokenizer_init=True,
            max_model_len=1024,
            num_gpu_blocks_override=500,
            additional_config={
                "specontext": {"budget": 1024, "sink_tokens": 16, "recent_tokens": 16}
            },
        ) as llm:
            for budget in (1024, 64):
                llm.collective_rpc("specontext_set", kwargs={"budget": budget})
                llm.reset_prefix_cache()
                replies = llm.generate(
                    [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
                    params,
                    use_tqdm=False,
                )
                answers[name, budget] = [list(reply.outputs[0].token_ids) for reply in replies]
    assert answers["two", 1024] == answers["one", 1024]
    assert answers["two", 64] == answers["one", 64] != answers["one", 1024]
