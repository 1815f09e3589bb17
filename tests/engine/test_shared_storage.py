"""One engine computes prompts and another one answers them, with files between them: float32, the
demo model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine, unproven_served
from tests.engine.scenarios import ids, preemptions, sampling
from tests.engine.test_offloading import SETTINGS, forget

WHOLE = 2048
BLOCK = 32
"""Tokens of a block, which is two pages."""
WAYS = {
    "small budget": {"retriever": "dlm", "budget": 64},
    "quest": {"retriever": "quest", "budget": 64},
    "whole budget": {"retriever": "dlm", "budget": WHOLE},
}
"""Settings that an engine is asked with in turn. It starts with quest, for its bounds of pages, and
with a head.
"""


def one_of_two(folder: Path, role: str, **others: Any):
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    settings = {
        "attention_backend": "specontext",
        "additional_config": {"specontext": {**SETTINGS, "retriever": "quest", "budget": WHOLE}},
        "kv_transfer_config": transfer,
        "block_size": BLOCK,
        "num_gpu_blocks_override": None,
        # Graphs hold a retriever, and the ways are several.
        "enforce_eager": True,
    }
    return engine(**{**settings, **others})


def answers(llm, prompts) -> tuple[list, list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling(), use_tqdm=False
    )
    return ids(outputs), [output.num_cached_tokens for output in outputs]


def asked(prompts) -> list[list[int]]:
    """Prompts of every kind; of the last two, one ends with a page and one just behind it."""
    return [*prompts, prompts[8][:512], prompts[8][:513]]


def stored_tokens(prompt) -> int:
    return (len(prompt) - 1) // BLOCK * BLOCK


@contextmanager
def hidden(paths: Iterable[Path]) -> Iterator[None]:
    """The files have other names for a while."""
    moved = [path.rename(f"{path}.hidden") for path in list(paths)]
    yield
    for path in moved:
        path.rename(path.with_suffix(""))


@torch.inference_mode()
def forget_bounds(worker: Any) -> None:
    """Of what quest keeps, a page that has not been computed is NaN."""
    if (selector := worker.model_runner.runtime.selector) is not None:
        for vectors in selector.page_vectors:
            vectors.fill_(float("nan"))


def resumed(llm, prompts, afresh) -> list[list[int]]:
    """Answers of requests that lose all they have on their way.

    They are stopped first: vLLM keeps blocks that a step under way may write to, and nothing that
    is put into the caches meanwhile would stay.
    """
    core, tokens = llm.llm_engine, {}
    inner = core.engine_core.engine_core
    for name, prompt in enumerate(prompts):
        core.add_request(str(name), {"prompt_token_ids": prompt}, sampling())
    for step in range(100):
        if not core.has_unfinished_requests():
            break
        if step == 9:
            inner.pause_scheduler("keep", clear_cache=False)
        elif step == 12:
            assert core.reset_prefix_cache(reset_running_requests=True)
            afresh()
            inner.resume_scheduler()
        for output in core.step():
            if output.finished:
                tokens[int(output.request_id)] = ids([output])[0]
    assert preemptions(llm) == len(prompts)
    return [tokens[name] for name in range(len(prompts))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def prefill(prompts, folder) -> dict[str, Any]:
    """The engine that stores. It never loads, so its answers are those of one engine alone."""
    out: dict[str, Any] = {}
    with one_of_two(folder, "kv_producer") as llm:
        for way, settings in WAYS.items():
            llm.collective_rpc("specontext_set", kwargs=settings)
            llm.reset_prefix_cache()
            out[way], out[f"{way}, cached"] = answers(llm, asked(prompts))
    out["stored"] = [
        len(load_file(path)["kv_cache"]) for path in folder.rglob("*") if path.is_file()
    ]
    return out


@pytest.fixture(scope="module")
def decode(prompts, folder, prefill) -> dict[str, Any]:
    """The one that loads."""
    out: dict[str, Any] = {}

    def afresh() -> None:
        assert llm.reset_prefix_cache()
        llm.collective_rpc(forget)
        llm.collective_rpc(forget_bounds)

    with one_of_two(folder, "kv_consumer") as llm:
        for way, settings in WAYS.items():
            llm.collective_rpc("specontext_set", kwargs=settings)
            afresh()
            out[way], out[f"{way}, cached"] = answers(llm, asked(prompts))
        llm.collective_rpc("specontext_set", kwargs=WAYS["small budget"])
        afresh()
        out["resumed"] = resumed(llm, asked(prompts)[5:8], afresh)
        logger, lines = logging.getLogger("vllm.specontext"), []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        for part in ("layers.3.*", "keys"):
            with hidden(folder.rglob(f"*{part}.safetensors")):
                afresh()
                out[f"without {part}"] = answers(llm, asked(prompts)[5:7])
            out[f"lines without {part}"] = list(lines)
        logger.removeHandler(handler)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_two_engines_answer_as_one(prefill, decode, way):
    assert decode[way] == prefill[way]


@pytest.mark.skipif(not CUDA, reason="a CPU has no graphs")
def test_they_do_where_decode_steps_are_graphs(prompts, prefill, tmp_path):
    settings = {"specontext": {**SETTINGS, **WAYS["small budget"]}}
    chosen = asked(prompts)
    with unproven_served():
        for role in ("kv_producer", "kv_consumer"):
            with one_of_two(tmp_path, role, enforce_eager=False, additional_config=settings) as llm:
                assert answers(llm, chosen)[0] == prefill["small budget"], role
                if role == "kv_consumer":
                    assert llm.reset_prefix_cache()
                    _, cached = answers(llm, chosen)
                    assert cached == [stored_tokens(prompt) for prompt in chosen]


def test_within_the_budget_they_answer_as_stock(stock, prefill, decode):
    assert decode["whole budget"][:-2] == stock["plain"]
    assert decode["small budget"] != decode["whole budget"] != decode["quest"]


def test_all_but_the_last_page_comes_from_the_files(prompts, prefill, decode):
    expected = [stored_tokens(prompt) for prompt in asked(prompts)]
    for way in WAYS:
        assert decode[f"{way}, cached"] == expected
        # The last two are of a prompt that was asked before.
        assert not any(prefill[f"{way}, cached"][:9])


def test_a_request_goes_on_from_the_files_after_a_preemption(prefill, decode):
    """What it has generated is computed anew."""
    assert decode["resumed"] == prefill["small budget"][5:8]


def test_prompts_alone_are_stored_whole(prompts, prefill):
    """A file for each layer and two for the head, of nothing that was generated."""
    stored = {tuple(prompt[: stored_tokens(prompt)]) for prompt in asked(prompts)} - {()}
    assert sorted(prefill["stored"]) == sorted((6 + 2) * [len(tokens) for tokens in stored])


def test_prompts_without_the_head_s_part_are_computed(prefill, decode):
    for part, warnings in (("layers.3.*", 0), ("keys", 1)):
        found, cached = decode[f"without {part}"]
        assert found == prefill["small budget"][5:7] and cached == [0, 0]
        lines = decode[f"lines without {part}"]
        said = sum("without what this engine's retrieval head keeps" in line for line in lines)
        assert said == warnings


def test_prompts_are_stored_by_all_that_their_kv_hangs_on():
    from specontext_vllm.engine.shared_storage import _marks

    def marks(lora=None, salt=None, pictures=()):
        lora = lora and SimpleNamespace(lora_name=lora, lora_path="/" + lora)
        features = [SimpleNamespace(identifier=name) for name in pictures]
        return tuple(
            _marks(SimpleNamespace(mm_features=features, lora_request=lora, cache_salt=salt))
        )

    ways = [marks(), marks("a"), marks("b"), marks(salt="a"), marks(pictures=("a",))]
    assert len(set(ways)) == len(ways)


LAYER = torch.randn(3, 2, 16, 8)
"""Three pages of what is stored."""


def storing(folder: Path, *slots: range):
    """A worker's connector in a step that stores prompts of so many tokens, at these slots."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector

    from specontext_vllm.engine.shared_storage import ExampleConnector

    connector = ExampleConnector.__new__(ExampleConnector)
    connector._storage_path, connector._block_size = str(folder), 16
    prompts = [
        example_connector.ReqMeta(
            torch.arange(len(own)), torch.tensor(own), is_store=True, mm_hashes=[]
        )
        for own in slots
    ]
    connector.bind_connector_metadata(example_connector.ExampleConnectorMetadata(prompts))
    return connector


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_engines_with_one_process_id_store_the_same_prompt_at_once(tmp_path, monkeypatch):
    """As on two machines, or in two containers: the second stores while the first does."""
    first, second = (storing(tmp_path, range(16, 48)) for _ in range(2))
    replace = os.replace

    def replace_later(*names):
        monkeypatch.setattr(os, "replace", replace)
        second.save_kv_layer("keys", LAYER, None)
        replace(*names)

    monkeypatch.setattr(os, "replace", replace_later)
    first.save_kv_layer("keys", LAYER, None)
    (stored,) = files_in(tmp_path)
    assert stored.name == "keys.safetensors"
    assert torch.equal(load_file(stored)["kv_cache"], LAYER[1:].transpose(1, 2).flatten(0, 1))


def test_an_error_while_storing_leaves_no_part_behind(tmp_path):
    with pytest.raises(IndexError):
        storing(tmp_path, range(16, 32), range(16, 64)).save_kv_layer("keys", LAYER, None)
    assert not files_in(tmp_path)


def test_a_head_is_named_by_what_it_keeps(own_head):
    from specontext_vllm.retrieval.checkpoint import read_checkpoint
    from specontext_vllm.retrieval.digest import digest_of

    demo = read_checkpoint(DEMO_MODEL / "retrieval_head")
    again = read_checkpoint(DEMO_MODEL / "retrieval_head")
    name = digest_of(demo, (1, 2, 3), 1024)
    assert name == digest_of(again, (1, 2, 3), 1024)
    again.tensors["fc.weight"][0, 0] += 1e-3
    longer = 2 * demo.spec.trained_length
    others = {
        digest_of(again, (1, 2, 3), 1024),
        digest_of(demo, (1, 2, 4), 1024),
        digest_of(demo, (1, 2, 3), longer),
        digest_of(read_checkpoint(own_head), (1, 2, 3), 1024),
    }
    assert len(others) == 4 and name not in others
