"""Models that are shown pictures, through vLLM's chat interface: prompts hold the pictures' tokens,
and the pages of those are selected and cached like others.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from specontext_vllm.demo.server import VllmServer, device_arguments
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.engine.names import AUX_LAYERS_KEY
from tests.engine.conftest import client_of
from tests.engine.families import serving
from tests.engine.pictures import LETTERS, SEEING, decoded, picture, write_gemma3, write_seeing
from tests.engine.test_layer_kinds import BUDGET, PROMPTS
from tests.engine.test_layer_kinds import scenarios as text_scenarios

TOKENS = 16
SETTINGS = {"budget": 1024, "sink_tokens": 16, "recent_tokens": 16}
generator = torch.Generator().manual_seed(5)
TEXT = "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (300,), generator=generator))
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from stock vLLM's in their last digits",
)


def asked(text: str, *seeds: int) -> dict[str, Any]:
    """A message of pictures with text behind them."""
    shown = [{"type": "image_url", "image_url": {"url": picture(seed)}} for seed in seeds]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


CHATS = [[asked(TEXT, 1)], [asked(TEXT, 2)], [asked("What is it?", 1)], [asked("What?")]]


def chat(engine: Any, chats: list[list[dict[str, Any]]]) -> tuple[list[list[int]], list[int]]:
    """The answers, and of each prompt how many tokens were in the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    replies = engine.llm.chat(chats, params, use_tqdm=False)
    answers = [list(reply.outputs[0].token_ids) for reply in replies]
    return answers, [reply.num_cached_tokens for reply in replies]


def scenarios(engine: Any) -> dict[str, Any]:
    """Pictures in prompts of several chunks; again, with prefix hits; and a next turn in which
    another picture is shown.
    """
    out = {"first": chat(engine, CHATS), "again": chat(engine, CHATS)}
    turns = [[*shown, {"role": "assistant", "content": "A"}, asked("And?", 3)] for shown in CHATS]
    out["next turn"] = chat(engine, turns)
    return out


@pytest.fixture(scope="module", params=SEEING)
def served(request, tmp_path_factory) -> dict[str, Any]:
    """What a family's model answers: in stock vLLM, and in ours with a random head."""
    folder = tmp_path_factory.mktemp(request.param)
    out: dict[str, Any] = {"model": write_seeing(folder, request.param), "folder": folder}
    shape = DraftShape.for_target(out["model"].config.text_config, max_position=1024)
    torch.manual_seed(1)
    DraftModel(shape).save(folder / "retrieval_head")
    arguments = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    with serving(folder, **arguments) as stock:
        out["stock"] = scenarios(stock)
    with serving(folder, settings=SETTINGS, **arguments) as ours:
        runtime, pages = ours.runner.runtime, []
        with pytest.MonkeyPatch.context() as patch:
            before = runtime.step.before_model

            def before_model(batch: Any) -> None:
                pages[:] = batch.block_table[0].tolist()
                before(batch)

            patch.setattr(runtime.step, "before_model", before_model)
            chat(ours, CHATS[:1])
        out["head"] = runtime.retriever.head.head
        out["aux"] = ours.llm.llm_engine.vllm_config.additional_config[AUX_LAYERS_KEY]
        out["keys"] = lambda at: runtime.retriever.cache.keys_at(
            torch.tensor(pages)[at // 16] * 16 + at % 16
        )
        out["stored"] = stored_keys(out)
        ours.llm.reset_prefix_cache()
        out["ours"] = scenarios(ours)
        ours.set(budget=64)
        out["sparse"], out["stats"] = chat(ours, CHATS)[0], ours.stats
    return out


def stored_keys(served: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's keys ``[T - 1, nkv, D]`` of the first chat's prompt, and those of the states that
    transformers gives.
    """
    from transformers import AutoProcessor

    model, head = served["model"], served["head"]
    processor = AutoProcessor.from_pretrained(served["folder"])
    messages = [asked(TEXT, 1)]
    messages[0]["content"][0] = {"type": "image", "image": decoded(picture(1))}
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, positions = inputs["input_ids"][0], torch.arange(1, inputs["input_ids"].shape[1])
    # What enters a layer; transformers' hidden states leave one, and Qwen3-VL adds to them between.
    entering: dict[int, torch.Tensor] = {}
    for place, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda _, given, named, place=place: entering.update(
                {place: (given[0] if given else named["hidden_states"])[0]}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**inputs)
        fused = head.fuse([entering[layer] for layer in served["aux"]])[:-1]
        wanted = head.keys(model.get_input_embeddings()(ids[1:]), fused, positions)
    return served["keys"](positions), wanted


def test_pictures_are_answered_about_as_stock_vllm_does(served):
    for scenario, (answers, _) in served["stock"].items():
        assert served["ours"][scenario][0] == answers, scenario
    # Another picture, another answer.
    first = served["stock"]["first"][0]
    assert first[0] != first[1]


def test_the_prefix_cache_knows_one_picture_from_another(served):
    # The last prompt of the first picture begins as the first one does.
    first, again = served["ours"]["first"][1], served["ours"]["again"][1]
    assert first[:2] == [0, 0] and first[3] == 0
    assert min(again[:2]) > 300


def test_the_head_learns_the_states_of_a_picture_s_tokens(served):
    torch.testing.assert_close(*served["stored"], rtol=1e-3, atol=1e-3)


def test_a_small_budget_reads_a_part_of_pictures_and_text(served):
    whole, stats = served["stock"]["first"][0], served["stats"]
    assert served["sparse"][-1] == whole[-1] and served["sparse"][:2] != whole[:2]
    assert 0 < stats["pages_read"] < 0.5 * stats["pages_total"]


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_a_server_is_asked_about_a_picture_in_a_conversation(served, forking_servers):
    """Over HTTP, as a user asks: a picture, text, an answer, another picture."""
    settings = json.dumps({"specontext": SETTINGS})
    arguments = ["--attention-backend", "specontext", "--additional-config", settings]
    arguments += ["--max-model-len", "1024", "--num-gpu-blocks-override", "200"]
    arguments += ["--served-model-name", "seeing"]
    arguments += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}', *device_arguments()]
    turn = [CHATS[0][0], {"role": "assistant", "content": "A"}, asked("And?", 3)]
    with VllmServer(served["folder"], arguments) as server:
        client = client_of(server)

        def reply() -> list[int]:
            answer = client.chat.completions.create(
                model="seeing",
                messages=turn,
                temperature=0,
                max_tokens=TOKENS,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert answer.usage.prompt_tokens > 300
            return answer.choices[0].token_ids

        assert reply() == served["stock"]["next turn"][0][0]
        server.rpc("specontext_set", budget=64)
        server.rpc("specontext_stats", reset=True)
        assert reply() != served["stock"]["next turn"][0][0]
        stats = server.rpc("specontext_stats")
        assert 0 < stats["pages_read"] < 0.5 * stats["pages_total"]


def test_of_a_model_whose_pictures_look_ahead_the_text_is_served(tmp_path):
    write_gemma3(tmp_path)
    settings = {**SETTINGS, "retriever": "quest"}
    with pytest.raises(ValueError, match=r"attend to later ones.*\(--language-model-only\)"):
        with serving(tmp_path, settings=settings):
            pass
    with serving(tmp_path, language_model_only=True) as stock:
        expected = text_scenarios(stock)
    with serving(tmp_path, settings=settings, language_model_only=True) as ours:
        assert text_scenarios(ours) == expected
        ours.set(budget=BUDGET)
        assert ours.answer(PROMPTS[-1:], TOKENS) != [expected["first"][-1][:TOKENS]]
