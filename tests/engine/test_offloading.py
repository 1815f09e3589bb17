"""KV that left the GPU comes back with what the head keeps of it: float32, the demo model.

vLLM copies between a GPU and its host alone; on a CPU a stand-in does its copies, and all else is
vLLM's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.scenarios import ids, sampling

SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": 64,
    "sink_tokens": 16,
    "recent_tokens": 16,
}
HOST_GIB = 0.25


def copying_worker(spec: Any, kv_caches: Any) -> Any:
    """Moves blocks between two kinds of a CPU's memory."""
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

    class Copying(OffloadingWorker):
        def __init__(self) -> None:
            self.tensors = [found.tensor for found in kv_caches.tensors]
            sizes = [tensor.shape[1] for tensor in self.tensors]
            assert sum(sizes) == spec.cpu_page_size_per_worker
            self.host = [
                torch.zeros(spec.num_chunks, size, dtype=torch.int8, device="cpu") for size in sizes
            ]
            self.done: list[TransferResult] = []

        def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.copy(job_id, self.tensors, src_spec, self.host, dst_spec)

        def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.copy(job_id, self.host, src_spec, self.tensors, dst_spec)

        def copy(self, job_id: int, source: Any, src: Any, target: Any, dst: Any) -> bool:
            for old, new in zip(source, target, strict=True):
                new[dst.block_ids] = old[src.block_ids]
            self.done.append(TransferResult(job_id, True))
            return True

        def get_finished(self) -> list[TransferResult]:
            done, self.done = self.done, []
            return done

        def wait(self, job_ids: set[int]) -> None:
            pass

    return Copying()


def forget(worker: Any) -> None:
    """Nothing that was computed is left on the device; of the head's caches a page that has not
    come back is NaN.
    """
    runtime = worker.model_runner.runtime
    runtime.retriever.cache.keys.view(torch.uint8).fill_(255)  # NaN in every dtype of keys
    runtime.retriever.cache.fused.fill_(float("nan"))
    layers = worker.vllm_config.compilation_config.static_forward_context
    for name in runtime.layers.kv_names:
        layers[name].kv_cache.normal_()


def run(prompts, **arguments) -> dict[str, Any]:
    with engine(
        **{"num_gpu_blocks_override": None, **arguments},
        attention_backend="specontext",
        additional_config={"specontext": SETTINGS},
    ) as llm:

        def answers(chosen) -> tuple[list, list[int]]:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in chosen], sampling(), use_tqdm=False
            )
            return ids(outputs), [output.num_cached_tokens for output in outputs]

        out: dict[str, Any] = {}
        asked = [*prompts[5:8], prompts[8][:512]]
        out["first"], _ = answers(asked)
        longer = [prompt + out["first"][i] + prompts[4][:40] for i, prompt in enumerate(asked)]
        if "kv_offloading_size" in arguments:
            # Another step, in which the last stores are submitted.
            answers([prompts[4]])
            llm.reset_prefix_cache()
            llm.collective_rpc(forget)
            out["again"], out["cached again"] = answers(asked)
            out["at once"], out["cached at once"] = answers(asked)
            llm.reset_prefix_cache()
            llm.collective_rpc(forget)
            out["next turn"], out["cached next turn"] = answers(longer)
        else:
            llm.reset_prefix_cache()
            out["next turn"], _ = answers(longer)
    return out


@pytest.fixture(scope="module")
def without(prompts):
    return run(prompts)


@pytest.fixture(scope="module")
def offloading(prompts):
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

            patch.setattr(CPUOffloadingSpec, "create_worker", copying_worker)
            patch.setattr(CPUOffloadingSpec, "get_worker", lambda self, kv: self.create_worker(kv))
        return run(prompts, kv_offloading_size=HOST_GIB)


def test_answers_are_those_without_offloading(without, offloading):
    assert offloading["first"] == without["first"]
    assert offloading["next turn"] == without["next turn"]


def test_what_comes_back_is_what_left(prompts, offloading):
    """Of a prompt of whole blocks the last one is computed."""
    assert offloading["again"] == offloading["at once"] == offloading["first"]
    expected = [(len(prompt) - 1) // 16 * 16 for prompt in (*prompts[5:8], prompts[8][:512])]
    assert offloading["cached again"] == offloading["cached at once"] == expected


def test_generated_tokens_are_not_offloaded(prompts, offloading):
    """Beyond the budget their KV is not that of a prompt."""
    expected = [len(prompt) // 16 * 16 for prompt in (*prompts[5:8], prompts[8][:512])]
    assert offloading["cached next turn"] == expected
