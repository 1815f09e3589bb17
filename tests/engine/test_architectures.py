"""Models of the families that have EAGLE-3 heads, each through a real engine: what transformers
computes with the same weights is the reference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.engine.names import AUX_LAYERS_KEY
from tests.distillation.tiny_models import FAMILIES, make_config, make_model
from tests.engine.conftest import engine
from tests.engine.families import GPT_OSS

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
OWN = {"qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 99}}
"""A window that no layer has, which vLLM serves as full attention."""
LENGTHS, TOKENS = (1, 130, 400), 12
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from transformers' in their last digits",
)


def make_mixture() -> object:
    """Qwen3's mixture of experts, two of four in each layer."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=97,
        num_hidden_layers=5,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        **SHAPE,
    )


def make_gpt_oss() -> object:
    """Windows in every second layer, learned sinks, and a mixture of experts."""
    from transformers import GptOssConfig

    return GptOssConfig(
        **{**SHAPE, **GPT_OSS},
        vocab_size=97,
        num_hidden_layers=5,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    )


MIXTURES = {"qwen3_moe": make_mixture, "gpt_oss": make_gpt_oss}


def write_with_head(folder: Path, family: str) -> torch.nn.Module:
    """The family's random model, in a folder with a random head of its own."""
    config = (
        MIXTURES[family]()
        if family in MIXTURES
        else make_config(family, **SHAPE, **OWN.get(family, {}))
    )
    if family == "llama":
        # A window as wide as no context is here, which transformers does not know in this family.
        # vLLM keeps the other layers in four groups.
        full = ["full_attention"] * 2
        config.layer_types, config.sliding_window = [*full, "sliding_attention", *full], 1000
    model = make_model(config)
    model.save_pretrained(folder)
    torch.manual_seed(1)
    DraftModel(DraftShape.for_target(config, max_position=1024)).save(folder / "retrieval_head")
    return model.eval()


def continue_densely(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


def keys_of(
    head: torch.nn.Module, aux_layers: list[int], model: torch.nn.Module, prompt: list[int]
) -> torch.Tensor:
    """The head's keys ``[T - 1, nkv, D]`` of the prompt from its second token on, from the states
    that transformers gives.
    """
    ids = torch.tensor(prompt)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
        aux = [states[layer][0] for layer in aux_layers]
        return head.keys(
            model.get_input_embeddings()(ids[1:]), head.fuse(aux)[:-1], torch.arange(1, len(prompt))
        )


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_family_s_model_answers_as_transformers_does_and_its_head_sees_its_states(
    family, tmp_path
):
    from vllm import SamplingParams, TokensPrompt

    model = write_with_head(tmp_path, family)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    settings = {"budget": 1024, "sink_tokens": 16, "recent_tokens": 16}
    arguments = {
        "model": str(tmp_path),
        "attention_backend": "specontext",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 500,
    }
    with engine(**arguments, additional_config={"specontext": settings}) as llm:

        def answer(asked: list[list[int]]) -> list[list[int]]:
            replies = llm.generate(
                [TokensPrompt(prompt_token_ids=prompt) for prompt in asked], params, use_tqdm=False
            )
            return [list(reply.outputs[0].token_ids) for reply in replies]

        runtime = llm.llm_engine.model_executor.driver_worker.worker.model_runner.runtime
        assert len(runtime.kv_groups) == (4 if family == "llama" else 1)
        retriever, pages = runtime.retriever, []
        with pytest.MonkeyPatch.context() as patch:
            before = runtime.step.before_model

            def before_model(batch):
                pages[:] = batch.block_table[0].tolist()
                before(batch)

            patch.setattr(runtime.step, "before_model", before_model)
            assert answer(prompts[-1:]) == [continue_densely(model, prompts[-1])]
        positions = torch.arange(1, len(prompts[-1]))
        stored = retriever.cache.keys_at(torch.tensor(pages)[positions // 16] * 16 + positions % 16)
        aux_layers = llm.llm_engine.vllm_config.additional_config[AUX_LAYERS_KEY]
        torch.testing.assert_close(
            stored,
            keys_of(retriever.head.head, aux_layers, model, prompts[-1]),
            rtol=1e-3,
            atol=1e-3,
        )
        assert answer(prompts) == [continue_densely(model, prompt) for prompt in prompts]
        llm.collective_rpc("specontext_stats", args=(True,))
        llm.collective_rpc("specontext_set", kwargs={"budget": 64})
        sparse = answer(prompts)
        stats = llm.collective_rpc("specontext_stats")[0]
    assert sparse[0] == continue_densely(model, prompts[0]) and sparse[-1] != continue_densely(
        model, prompts[-1]
    )
    assert 0 < stats["pages_read"] < 0.4 * stats["pages_total"]
