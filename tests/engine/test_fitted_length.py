"""`--max-model-len auto`: vLLM fits the length to its memory when the head is there already, laid
out for a longer one.
"""

from __future__ import annotations

from vllm import SamplingParams

from tests.engine.conftest import engine

BUDGET = 8192


def test_a_length_fitted_below_the_budget_is_followed(prompts, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts[-2:]]
    room = dict(max_model_len=-1, num_gpu_blocks_override=None, kv_cache_memory_bytes=22_000_000)
    with engine(
        attention_backend="specontext", additional_config={"specontext": {"budget": BUDGET}}, **room
    ) as llm:
        assert max(map(len, prompts)) < llm.llm_engine.model_config.max_model_len < BUDGET

        def answers():
            return [
                output.outputs[0].token_ids
                for output in llm.generate(asked, sampling, use_tqdm=False)
            ]

        whole = answers()
        llm.collective_rpc("specontext_set", kwargs={"retriever": "dense"})
        assert answers() == whole
