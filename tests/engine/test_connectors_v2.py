"""Our connectors under the V2 runner, with its own objects and no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specontext_vllm.engine.our_layers import OurLayers
from specontext_vllm.float8 import FP8, to_float8
from specontext_vllm.retrieval.rules.quest import update_bounds_reference
from tests.engine.test_drafts_v2 import input_batch, runner  # noqa: F401
from tests.engine.test_refusals import NIXL, STORAGE
from tests.engine.test_shared_storage import storing


@pytest.fixture
def sampling(runner, monkeypatch):  # noqa: F811
    """The runner, whose streams and events are noted, in a step that is about to sample."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    notes: list[str] = []
    runner.notes, runner._kept = notes, None

    def sample(self, grammar):
        output = object.__new__(AsyncOutput)
        output.copy_event = SimpleNamespace(record=lambda stream: notes.append("recorded"))
        notes.append("tokens copied")
        self.postprocess_sampled(torch.tensor([0]))
        return output

    monkeypatch.setattr(GPUModelRunner, "postprocess_sampled", lambda *_, **__: None)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", sample)
    monkeypatch.setattr(GPUModelRunner, "main_stream", "main")
    runner.output_copy_stream = SimpleNamespace(
        wait_stream=lambda stream: notes.append(f"waits for {stream}")
    )
    runner.runtime.step.after_model = lambda batch, aux: notes.append("learnt")
    runner.execute_model_state = SimpleNamespace(aux_hidden_states=["aux"])
    runner.prepare_attn(input_batch([40], [0], prompts=1))
    return runner


def test_the_head_s_part_is_stored_once_it_has_learnt(sampling):
    sampling.vllm_config.kv_transfer_config = STORAGE["kv_transfer_config"]
    sampling.runtime.storage = SimpleNamespace(save_head=lambda: sampling.notes.append("stored"))
    sampling.sample_tokens(None)
    assert sampling.notes == ["tokens copied", "learnt", "stored"]


def test_tokens_wait_for_what_is_learnt_where_others_read_the_memory(sampling):
    sampling.vllm_config.kv_transfer_config = NIXL["kv_transfer_config"]
    sampling.sample_tokens(None)
    assert sampling.notes == ["tokens copied", "learnt", "waits for main", "recorded"]


def test_tokens_wait_for_nothing_without_a_connector(sampling):
    sampling.vllm_config.kv_transfer_config = None
    sampling.sample_tokens(None)
    assert sampling.notes == ["tokens copied", "learnt"]


def test_nothing_is_stored_in_vllm_s_steps_before_it_serves(tmp_path):
    """In which a connector is told nothing, as after a step that was learnt."""
    connector = storing(tmp_path, range(16, 48))
    connector.head_caches = {"keys": torch.randn(3, 2, 16, 8)}
    connector.save_head()
    connector.clear_connector_metadata()
    (file,) = tmp_path.rglob("keys.safetensors")
    file.unlink()
    connector.save_head()
    assert not file.exists()


@pytest.mark.parametrize("first", ["vLLM", "the head"])
def test_the_head_s_part_is_stored_whoever_ends_a_step_first(tmp_path, first):
    """vLLM 0.33 ends a step's transfers before it says what was sampled, 0.32 after that."""
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

    connector = storing(tmp_path, range(16, 48))
    connector.head_caches = {"keys": torch.randn(3, 2, 16, 8)}
    of_vllm = object.__new__(ActiveKVConnector)
    of_vllm.kv_connector, of_vllm._pending_load_kwargs, of_vllm._disabled = connector, None, False
    ends = [lambda: of_vllm.post_forward(set()), connector.save_head]
    for end in ends if first == "vLLM" else ends[::-1]:
        end()
    assert len(list(tmp_path.rglob("keys.safetensors"))) == 1
    assert not connector.has_connector_metadata()


def test_what_was_stored_is_loaded_where_a_step_s_context_has_no_metadata(tmp_path):
    """As in a step whose model is one graph."""
    from vllm.forward_context import ForwardContext

    connector = storing(tmp_path, range(16, 48))
    there = {"layer": torch.randn(4, 2, 16, 8), "keys": torch.randint(0, 255, (4, 2, 16, 8)).byte()}
    for name, cache in there.items():
        connector.save_kv_layer(name, cache, None)
    (request,) = connector._get_connector_metadata().requests
    # To other pages; what is here already goes to page 0.
    request.is_store, request.slot_mapping = (
        False,
        torch.cat((torch.arange(16), torch.arange(48, 64))),
    )
    here = {name: torch.zeros_like(cache) for name, cache in there.items()}
    connector.kv_layers, connector.block_tokens = ["layer"], 16
    connector.head_caches, told = {"keys": here["keys"]}, []
    connector.learn_pages = told.append
    layers = {"layer": SimpleNamespace(kv_cache=here["layer"]), "other": SimpleNamespace()}
    connector.start_load_kv(ForwardContext(layers, None, {}))
    for name, cache in here.items():
        assert torch.equal(cache[3], there[name][2]) and not cache[1:3].any()
    assert told[0].tolist() == list(range(48, 64))


def layers_with(*impls, caches) -> OurLayers:
    made = object.__new__(OurLayers)
    made._layers = [
        SimpleNamespace(impl=impl, kv_cache=cache)
        for impl, cache in zip(impls, caches, strict=True)
    ]
    return made


def impl_with(selector, *, float8=False, owner=None, layer=0):
    from specontext_vllm.engine.backend import SpeContextImpl

    made = object.__new__(SpeContextImpl)
    made.selector, made.kv_owner, made.float8_kv, made.layer = selector, owner, float8, layer
    return made


def test_pages_are_learnt_from_where_the_cache_is():
    """A connector says where on the host; the layers that keep no KV learn nothing."""
    told: list = []
    selector = SimpleNamespace(learn=lambda layer, cache, slots: told.append((layer, slots)))
    cache = torch.empty(2, 1, 16, 8, device="meta")
    impls = impl_with(selector), impl_with(selector, owner="a"), impl_with(None)
    layers_with(*impls, caches=[cache] * 3).learn_pages(torch.arange(16))
    ((layer, slots),) = told
    assert layer == 0 and slots.device.type == "meta" and slots.shape == (16,)
    layers_with(impl_with(None), caches=[cache]).learn_pages(torch.arange(16))
    assert len(told) == 1


def test_pages_of_8_bit_floats_are_learnt_as_those():
    """vLLM keeps them as bytes."""
    cache = to_float8(torch.randn(3, 2, 16, 16))
    bounds, expected = (torch.zeros(3, 2, 2, 8) for _ in range(2))
    selector = SimpleNamespace(
        learn=lambda layer, cache, slots: update_bounds_reference(cache, slots, bounds)
    )
    slots = torch.arange(16, 48)
    impl = impl_with(selector, float8=True)
    layers_with(impl, caches=[cache.view(torch.uint8)]).learn_pages(slots)
    update_bounds_reference(cache, slots, expected)
    assert cache.dtype == FP8 and torch.equal(bounds, expected) and bounds[1:].any()
