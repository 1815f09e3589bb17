"""KV of prompts in files (vLLM's ExampleConnector): what the head keeps of their pages goes along.

vLLM: its connector to a shared folder.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector
from vllm.logger import init_logger

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.engine.head_layers import MovesHead
from specontext_vllm.engine.names import KV_PRINT

logger = init_logger("vllm.specontext")


class ExampleConnector(MovesHead, example_connector.ExampleConnector):
    """vLLM's connector, with the head's caches as two more layers. The name is vLLM's, since it
    looks a connector's class up by the name in its configuration.

    All blocks of a prompt but that of its last token are in a file for each layer. They are found
    by the prompt's tokens, below a folder for engines whose KV is alike. The head's are named for
    the head: a prompt whose KV is there without them is computed.

    Symptom: a prompt that comes back from the folder has its KV, and keys of the head that were
        made of other tokens. Prompts that are computed in several steps are stored in part, those
        that were preempted are looked for under names that were never written, and those of other
        adapters are taken for their own.
    Reason: vLLM moves the layers that it knows, stores in a request's first step, and names files
        by tokens alone; it calls the connector an example.
    Remove when: the head's caches are layers of vLLM's, and its connector stores what is computed.
    """

    _of_step: Any = None
    """In a worker, what the connector was told of a step that is not learnt yet."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Parts the folder among engines with other KV.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.__init__
        """
        super().__init__(vllm_config, role, kv_cache_config)
        # For vLLM's methods: the tokens of what a layer has a place for.
        self._block_size = PAGE_SIZE
        transfer = vllm_config.kv_transfer_config
        extra = transfer.kv_connector_extra_config
        self._storage_path: str = os.path.join(
            transfer.get_from_extra_config("shared_storage_path", "/tmp"),
            f"specontext-{extra[KV_PRINT]}",
        )
        self._stores, self._loads = transfer.is_kv_producer, transfer.is_kv_consumer
        # Of the scheduler.
        self._to_store: dict[str, Any] = {}
        self._to_load: dict[str, tuple[Any, list[int], int]] = {}
        # Of a worker.
        self._being_written: dict[str, str] | None = None

    # -- in the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens of the prompt that are stored, beyond those that are here already.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.get_num_new_matched_tokens
        """
        more = self.exact_end(request) - num_computed_tokens
        if not self._loads or more <= 0 or not self._is_stored(request):
            return 0, False
        return more, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has its blocks.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.update_state_after_alloc
        """
        if num_external_tokens:
            here = self.exact_end(request) - num_external_tokens
            self._to_load[request.request_id] = request, blocks.get_block_ids()[0], here
        elif self._stores and self.exact_end(request) and request.num_computed_tokens == 0:
            # A session that goes on has answers in its prompt, and never starts from nothing.
            self._to_store[request.request_id] = request

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """What the workers load before this step, and store in it: prompts that it completes.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.build_connector_meta
        """
        meta = example_connector.ExampleConnectorMetadata()
        for request, blocks, here in self._to_load.values():
            meta.requests.append(self._moved(request, blocks, here=here))
        self._to_load.clear()
        for name, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._to_store.get(name)
            # Computed tokens are counted up after the step has been scheduled.
            if request is None or request.num_computed_tokens + tokens < self.exact_end(request):
                continue
            del self._to_store[name]
            if not self._is_stored(request):
                blocks = self._kv_cache_manager.get_block_ids(name)[0]
                meta.requests.append(self._moved(request, blocks))
        return meta

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request that ended before its prompt was computed is not stored.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.request_finished
        """
        self._to_store.pop(request.request_id, None)
        self._to_load.pop(request.request_id, None)
        return super().request_finished(request, block_ids)

    def _is_stored(self, request: Any) -> bool:
        """Whether all files of a prompt are there."""
        tokens = torch.tensor(request.prompt_token_ids[: self.exact_end(request)])
        folder = self._generate_foldername_debug(tokens, _marks(request))
        missing = [
            name
            for name in (*self.kv_layers, *self.head_layers)
            if not os.path.exists(os.path.join(folder, f"{name}.safetensors"))
        ]
        # Where KV is missing too, another engine may still be writing.
        if missing and set(missing) <= set(self.head_layers):
            logger.warning_once(
                "SpeContext: %s has KV of prompts without what this engine's retrieval head keeps "
                "of them, as after an engine with another head or none; they are computed.",
                self._storage_path,
            )
        return not missing

    def _moved(self, request: Any, blocks: list[int], *, here: int | None = None) -> Any:
        """What a worker has to know of a prompt that is stored, or loaded where ``here`` says how
        many of its tokens have their KV already: others may be reading that, so what is loaded of
        them goes to block 0, which is no request's.
        """
        size, end = self.block_tokens, self.exact_end(request)
        places = torch.tensor(blocks[: end // size])
        if here is not None:
            places[: here // size] = 0
        return example_connector.ReqMeta(
            token_ids=torch.tensor(request.prompt_token_ids[:end]),
            slot_mapping=(places[:, None] * size + torch.arange(size)).flatten(),
            is_store=here is None,
            mm_hashes=_marks(request),
        )

    # -- in a worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads what a step begins with.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.start_load_kv
        Uses: vllm.forward_context.ForwardContext.no_compile_layers,
            vllm.forward_context.ForwardContext.attn_metadata
        """
        # The runners load before anything of a step reads the prompts' pages. The V2 runner has
        # selected for the step's decode rows by then, which a request that loads is not one of.
        loads = [r for r in self._get_connector_metadata().requests if not r.is_store]
        if not loads:
            return
        layers = {name: forward_context.no_compile_layers[name] for name in self.kv_layers}
        for name, cache in self.head_caches.items():
            layers[name] = SimpleNamespace(kv_cache=cache)
        context = replace(
            forward_context,
            no_compile_layers=layers,
            # It is asked whether a layer is MLA's, and nothing else.
            attn_metadata=dict.fromkeys(layers),
        )
        super().start_load_kv(context, **kwargs)
        for request in loads:
            slots = request.slot_mapping
            self.learn_pages(slots[slots >= self.block_tokens])

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Keeps what a step stores until it is learnt.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_connector_metadata
        """
        super().bind_connector_metadata(connector_metadata)
        self._of_step = connector_metadata

    def save_head(self) -> None:
        """Store the head's part of what this step stores, once it has learnt the step's tokens: the
        last part, without which no other is read. Nothing in vLLM's own steps before it serves.
        """
        of_step, self._of_step = self._of_step, None
        if of_step is None:
            return
        # The V2 runner of vLLM 0.33 ends the connector's step before it says what was sampled.
        has_ended = not self.has_connector_metadata()
        if has_ended:
            super().bind_connector_metadata(of_step)
        for name, cache in self.head_caches.items():
            self.save_kv_layer(name, cache, None)
        if has_ended:
            self.clear_connector_metadata()

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Stores a layer's part; a file that has its name is whole. On a GPU it waits for it.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector.save_kv_layer
        """
        written: dict[str, str] = {}
        self._being_written = written
        try:
            super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
        except BaseException:
            for temporary in written:
                Path(temporary).unlink(missing_ok=True)
            raise
        finally:
            self._being_written = None
        for temporary, name in written.items():
            os.replace(temporary, name)

    def _generate_filename_debug(self, *args: Any, **kwargs: Any) -> str:
        """A name of its own for a file that is being written.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector._generate_filename_debug
        """
        name = super()._generate_filename_debug(*args, **kwargs)
        if self._being_written is None:
            return name
        # Engines on other machines may have this one's process id.
        temporary = f"{name}.{uuid.uuid4().hex}"
        self._being_written[temporary] = name
        return temporary


def _marks(request: Any) -> list[str]:
    """What KV hangs on beside tokens."""
    marks = [feature.identifier for feature in request.mm_features]
    if (lora := request.lora_request) is not None:
        marks.append(f"lora {lora.lora_name!r} {lora.lora_path!r}")
    if request.cache_salt is not None:
        marks.append(f"salt {request.cache_salt!r}")
    return marks
