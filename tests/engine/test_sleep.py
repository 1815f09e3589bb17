"""Sleep on a GPU: memory is given back, and what is lost was not needed.

The engine is a process of its own, as with `vllm serve`: vLLM's allocator serves one in a process.
"""

from __future__ import annotations

import base64
import pickle

import psutil
import pytest
import torch

from specontext_vllm.retrieval.checkpoint import read_checkpoint
from tests.engine.conftest import DEMO_MODEL, GPU_ROOM, engine
from tests.engine.own_budgets import scattered
from tests.engine.scenarios import sampling
from tests.engine.weights import write_moved

pytestmark = pytest.mark.gpu

GIB = 2**30
ONE_TIER = {"budget": 2048, "retrieval_head": str(DEMO_MODEL / "retrieval_head")}
TWO_TIERS = {**ONE_TIER, "host_kv_gib": 4, "gpu_kv_gib": 1}
ROOM = {"one tier": GPU_ROOM, "two tiers": GIB}


def foul(worker) -> None:
    """Leave NaN in the memory that vLLM has given up."""
    junk = torch.full((2 * GIB // 4,), float("nan"), device=worker.device)
    torch.cuda.synchronize()
    del junk
    torch.cuda.empty_cache()


def pool_bytes(worker) -> int:
    tiers = worker.model_runner.runtime.tiers
    return 0 if tiers is None else tiers.pools.host.nbytes


def used() -> tuple[int, int]:
    """Bytes that are taken of the GPU's memory and of the machine's."""
    free, total = torch.cuda.mem_get_info()
    memory = psutil.virtual_memory()
    return total - free, memory.total - memory.available


def send_weights(llm, model) -> None:
    """To the worker from this process, as a trainer on the same GPU does."""
    from torch.multiprocessing.reductions import reduce_tensor

    model = model.to("cuda")
    gpu = str(torch.cuda.get_device_properties(0).uuid)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    handles = [{gpu: reduce_tensor(weight)[1]} for weight in weights.values()]
    update = {
        "names": list(weights),
        "dtype_names": ["float32"] * len(weights),
        "shapes": [list(weight.shape) for weight in weights.values()],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
    llm.collective_rpc("init_weight_transfer_engine", args=({"packed": False},))
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", args=(update,))
    llm.collective_rpc("finish_weight_update")
    torch.cuda.ipc_collect()


@pytest.fixture(scope="module", params=["one tier", "two tiers"])
def slept(request, prompts, tmp_path_factory):
    settings = ONE_TIER if request.param == "one tier" else TWO_TIERS
    out: dict = {"room": ROOM[request.param], "tiers": request.param, "used": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        # This process may have used CUDA.
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # Functions are sent to the worker.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with engine(
            enable_sleep_mode=True,
            weight_transfer_config={"backend": "ipc"},
            attention_backend="specontext",
            num_gpu_blocks_override=None,
            additional_config={"specontext": settings},
        ) as llm:
            nights(llm, prompts, out)
            folder = tmp_path_factory.mktemp("moved")
            send_weights(llm, write_moved(folder))
            out["sent"] = answers(llm)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            out["read"] = answers(llm)
            out["pool"] = llm.collective_rpc(pool_bytes)[0]
    for when, (gpu, host) in out["used"].items():
        print(f"{request.param}, {when}: GPU {gpu / GIB:.2f} GiB, machine {host / GIB:.2f} GiB")
    return out


def answers(llm) -> list[list[int]]:
    found = []
    for prompt in scattered():
        # One at a time: the same kernels in the same order.
        llm.reset_prefix_cache()
        reply = llm.generate([{"prompt_token_ids": prompt}], sampling(), use_tqdm=False)
        found.append(list(reply[0].outputs[0].token_ids))
    return found


def nights(llm, prompts, out) -> None:
    def note(when: str) -> None:
        out["used"][when] = used()

    def in_the_middle(sleeps: bool) -> list[int]:
        llm.reset_prefix_cache()
        core, tokens, step = llm.llm_engine, [], 0
        # The engine's own process does not wait for its outputs to be read.
        core.add_request("kept", {"prompt_token_ids": prompts[5]}, sampling(max_tokens=900))
        while core.has_unfinished_requests():
            for output in core.step():
                tokens = list(output.outputs[0].token_ids)
            step += 1
            if sleeps and step == 9:
                out["asleep at"] = len(tokens)
                llm.sleep(level=1, mode="keep")
                llm.collective_rpc(foul)
                llm.wake_up()
        return tokens

    out["whole"] = answers(llm)
    out["undisturbed"], out["disturbed"] = in_the_middle(False), in_the_middle(True)
    llm.collective_rpc(
        "specontext_set", kwargs={"budget": 64, "sink_tokens": 16, "recent_tokens": 16}
    )
    # Twice: the second time from graphs.
    out["before"] = [answers(llm), answers(llm)]
    note("awake")
    llm.sleep(level=1)
    note("asleep, level 1")
    llm.collective_rpc(foul)
    llm.wake_up(tags=["weights"])
    note("weights")
    llm.wake_up(tags=["kv_cache"])
    note("awake again")
    llm.collective_rpc("specontext_stats", args=(True,))
    out["after level 1"] = [answers(llm), answers(llm)]
    out["stats"] = llm.collective_rpc("specontext_stats")[0]
    llm.collective_rpc("specontext_audit")
    llm.sleep(level=2)
    note("asleep, level 2")
    llm.collective_rpc(foul)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    note("awake from level 2")
    out["after level 2"] = [answers(llm), answers(llm)]
    llm.collective_rpc("specontext_set", kwargs={"budget": 2048})
    out["whole at last"] = answers(llm)


@pytest.mark.seconds(500)
def test_tokens_after_sleep_are_those_before(slept):
    assert slept["before"][0] == slept["before"][1]
    assert slept["after level 1"] == slept["after level 2"] == slept["before"]
    assert slept["whole at last"] == slept["whole"]
    # The head had something to choose.
    assert slept["stats"]["pages_read"] < 0.6 * slept["stats"]["pages_total"]


def test_a_request_that_slept_goes_on(slept):
    """As it would have. Far on a near-tie may fall otherwise: what was said is a prompt now."""
    end = slept["asleep at"] + 32
    assert 0 < end < 900 == len(slept["disturbed"])
    assert slept["disturbed"][:end] == slept["undisturbed"][:end]


def test_weights_that_a_trainer_sends_are_those_that_are_read(slept):
    assert slept["sent"] == slept["read"] != slept["whole"]


def test_the_gpu_s_memory_is_given_back(slept):
    """The head keeps its weights on the host; of vLLM's own the CUDA context and graphs stay, and
    what torch had cached does not come back.
    """
    gpu = {when: bytes_[0] for when, bytes_ in slept["used"].items()}
    for level in (1, 2):
        assert gpu["awake"] - gpu[f"asleep, level {level}"] > 0.9 * slept["room"]
    # The KV and the head's caches come back with the tag of the KV alone.
    assert gpu["awake again"] - gpu["weights"] > 0.9 * slept["room"]
    assert gpu["awake again"] < gpu["awake"] + 0.1 * GIB
    assert gpu["awake from level 2"] < gpu["awake"] + 0.1 * GIB


def test_the_host_pool_is_given_back(slept):
    if slept["tiers"] == "one tier":
        pytest.skip("has no host pool")
    host = {when: bytes_[1] for when, bytes_ in slept["used"].items()}
    weights = sum(t.nbytes for t in read_checkpoint(DEMO_MODEL / "retrieval_head").tensors.values())
    for level in (1, 2):
        given_back = host["awake"] - host[f"asleep, level {level}"]
        assert given_back > slept["pool"] - weights - 0.5 * GIB > 2 * GIB
