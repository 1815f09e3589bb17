"""One engine computes prompts and another one reads them out of its memory: float32, the demo
model, on a CPU or two engines on one GPU. Two processes, and NIXL's Python package, which no
requirement of ours names: `pip install --no-deps nixl nixl-cu12`.
"""

from __future__ import annotations

import multiprocessing
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine, unproven_served
from tests.engine.scenarios import ids, sampling
from tests.engine.test_offloading import SETTINGS, forget
from tests.engine.test_shared_storage import WAYS, WHOLE, asked, forget_bounds
from tests.forked import context

needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="needs NIXL's package")
STARTS, ANSWERS = 200, 100
"""Seconds."""
# What has imported vLLM for a GPU may have used it, which no forked process survives.
PROCESSES: Any = multiprocessing.get_context("spawn") if CUDA else None


def serve(
    pipe: Any, role: str, port: int, block: int, eager: bool, settings: dict[str, Any]
) -> None:
    """One of the engines: answers what it is asked until it is asked nothing."""
    with (
        nullcontext() if eager else unproven_served(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
        with engine(
            attention_backend="specontext",
            additional_config={"specontext": {**SETTINGS, "budget": WHOLE, **settings}},
            kv_transfer_config={
                "kv_connector": "NixlConnector",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
            },
            block_size=block,
            enforce_eager=eager,
            # All that is asked there, and no more: each block of each layer is described to NIXL.
            num_gpu_blocks_override=1024 if CUDA else None,
        ) as llm:
            pipe.send("started")
            while (question := pipe.recv()) is not None:
                pipe.send(answer(llm, role, *question))


def answer(llm: Any, role: str, way: str, prompts: list, transfers: list, tokens: int) -> Any:
    """Answers, what each request says of its KV, and what the engine has counted."""
    llm.collective_rpc("specontext_set", kwargs=WAYS[way])
    llm.reset_prefix_cache()
    if role == "kv_consumer":
        llm.collective_rpc(forget)
        llm.collective_rpc(forget_bounds)
        if CUDA:
            # Blocks are written beside the stream.
            torch.cuda.synchronize()
    params = [
        sampling(max_tokens=tokens, extra_args=None if it is None else {"kv_transfer_params": it})
        for it in transfers
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return ids(outputs), [output.kv_transfer_params for output in outputs], counted


@contextmanager
def another(role: str, block: int, eager: bool = True, **settings: Any) -> Iterator[Any]:
    """A function that asks an engine of its own process. With graphs, which hold a retriever, it
    can be asked in one way only.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = PROCESSES or context()
    ours, its = processes.Pipe()
    process = processes.Process(target=serve, args=(its, role, port, block, eager, settings))
    process.start()
    its.close()

    def said(seconds: float) -> Any:
        assert ours.poll(seconds), f"the engine said nothing for {seconds} s"
        return ours.recv()

    def ask(*question: Any) -> Any:
        ours.send(question)
        return said(ANSWERS)

    try:
        assert said(STARTS) == "started"
        yield ask
    finally:
        ours.send(None)
        process.join(30)
        process.kill()


def stored_tokens(prompt: list[int], block: int) -> int:
    return (len(prompt) - 1) // block * block


@needs_nixl
@pytest.mark.parametrize(
    ("block", "eager"),
    [
        (16, True),
        (32, True),
        pytest.param(16, False, marks=pytest.mark.skipif(not CUDA, reason="a CPU has no graphs")),
    ],
)
def test_two_engines_answer_as_one(prompts, block, eager):
    chosen = asked(prompts)
    nothing = [None] * len(chosen)
    there = [{"do_remote_decode": True, "do_remote_prefill": False}] * len(chosen)
    loaded = 0.0
    settings = {"retriever": "quest"} if eager else WAYS["small budget"]
    with (
        another("kv_producer", block, eager, **settings) as prefill,
        another("kv_consumer", block, eager, **settings) as decode,
    ):
        for way in WAYS if eager else ["small budget"]:
            alone, _, _ = prefill(way, chosen, nothing, 16)
            _, transfers, _ = prefill(way, chosen, there, 1)
            found, _, counted = decode(way, chosen, transfers, 16)
            assert found == alone
            # All but those prompts' last blocks; some were here already, of a prompt before.
            loaded, before = counted["vllm:external_prefix_cache_hits"], loaded
            assert loaded - before > 0.6 * sum(stored_tokens(p, block) for p in chosen)
            assert counted["vllm:nixl_num_failed_transfers"] == 0


@needs_nixl
def test_a_prompt_of_an_engine_with_another_head_is_computed(prompts, tmp_path):
    """Under the whole budget answers do not hang on the head."""
    head = tmp_path / "head"
    shutil.copytree(DEMO_MODEL / "retrieval_head", head)
    tensors = load_file(head / "model.safetensors")
    tensors["fc.weight"][0, 0] += 1e-2
    save_file(tensors, head / "model.safetensors", {"format": "pt"})
    chosen = asked(prompts)[5:7]
    with (
        another("kv_producer", 16, retriever="quest") as prefill,
        another("kv_consumer", 16, retriever="quest", retrieval_head=str(head)) as decode,
    ):
        alone, _, _ = prefill("whole budget", chosen, [None] * 2, 16)
        there = [{"do_remote_decode": True, "do_remote_prefill": False}] * 2
        _, transfers, _ = prefill("whole budget", chosen, there, 1)
        found, _, counted = decode("whole budget", chosen, transfers, 16)
    assert found == alone and counted["vllm:nixl_num_failed_transfers"] > 0


@pytest.mark.parametrize(
    ("length", "here", "more"),
    [(100, 0, 96), (97, 0, 96), (96, 0, 80), (100, 32, 64), (97, 96, 0), (16, 0, 0), (1, 0, 0)],
)
def test_a_prompt_is_read_up_to_the_block_of_its_last_token(length, here, more):
    """vLLM counts blocks from the last one: as many are told of as are read."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
        NixlPullConnectorScheduler,
    )
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from specontext_vllm.engine.nixl import NixlConnector

    scheduler = NixlPullConnectorScheduler.__new__(NixlPullConnectorScheduler)
    scheduler.__dict__ |= {
        "vllm_config": SimpleNamespace(num_prefill_lookahead_tokens=0),
        "_has_mamba": False,
        "_bounded_replay": False,
        "_reqs_in_batch": set(),
        "_reqs_need_recv": {},
        "is_bidirectional_kv_xfer_enabled": False,
        "use_host_buffer": False,
        "get_exchange_clipped_blocks": lambda blocks: blocks,
    }
    connector = NixlConnector.__new__(NixlConnector)
    connector.__dict__ |= {"block_tokens": 16, "connector_scheduler": scheduler}
    there = {
        "do_remote_prefill": True,
        "remote_block_ids": [list(range(100, 100 + -(-(length + 1) // 16)))],
        **dict.fromkeys(("remote_engine_id", "remote_request_id", "remote_host"), "there"),
        "remote_port": 1,
    }
    request = SimpleNamespace(
        request_id="asked",
        prompt_token_ids=list(range(length)),
        num_prompt_tokens=length,
        kv_transfer_params=there,
    )
    assert connector.get_num_new_matched_tokens(request, here) == (more, more > 0)
    blocks = [KVCacheBlock(number) for number in range(1, 1 + (here + more) // 16)]
    for block in blocks[: here // 16]:
        block._block_hash = b"hashed"  # type: ignore[assignment]
    connector.update_state_after_alloc(request, KVCacheBlocks((blocks,)), more)
    _, local, computed, waits = scheduler._reqs_need_recv["asked"]
    (remote,) = there["remote_block_ids"]
    assert remote == list(range(100, 100 + (length - 1) // 16)) and waits == (more > 0)
    if more:
        assert list(map(list, local)) == [[block.block_id for block in blocks[here // 16 :]]]
        assert len(remote) - here // 16 == len(local[0]) and computed == (here // 16,)
