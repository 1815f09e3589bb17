"""What the two runner adapters share: building the retriever, its share of the KV memory, and a step's two hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.backend import SpeContextMetadataBuilder
from specontext_vllm.engine.resolve import AUX_LAYERS_KEY, describe, load_head
from specontext_vllm.retrieval.batch import StepBatch
from specontext_vllm.retrieval.shard import shard_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.retriever import Retriever

logger = init_logger("vllm.specontext")


class Runtime:
    """The retriever of one worker, bound to its model runner.

    Args:
        vllm_config: the engine's configuration, resolved by ``prepare_vllm_config``.
        model: the loaded target.
        device: the worker's device.

    Raises:
        ConfigError: the model cannot hand out auxiliary hidden states.
    """

    def __init__(self, vllm_config: Any, model: torch.nn.Module, device: torch.device) -> None:
        self.vllm_config, self.model, self.device = vllm_config, model, device
        self.config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.num_kv_heads = model_config.get_num_kv_heads(parallel)
        head = None
        if self.config.retrieval_head is not None:
            if not supports_eagle3(model):
                raise ConfigError(
                    f"model: {type(model).__name__} cannot hand out the hidden states that an EAGLE-3 head reads (vLLM's "
                    f"SupportsEagle3); use a model that can, or additional_config.{CONFIG_KEY}.retriever random, recent or dense."
                )
            checkpoint = load_head(self.config.retrieval_head, vllm_config)
            tp = parallel.tensor_parallel_size
            if tp > 1:
                checkpoint = shard_checkpoint(checkpoint, rank=get_tensor_model_parallel_rank(), size=tp)
            model.set_aux_hidden_state_layers(tuple(vllm_config.additional_config[AUX_LAYERS_KEY]))
            head = RetrievalHead(checkpoint, max_position=model_config.max_model_len, dtype=model_config.dtype, device=device)
            logger.info(
                "SpeContext retrieval head: %s, %.1f MB, aux layers %s; settings %s",
                self.config.retrieval_head, head.num_bytes / 1e6, vllm_config.additional_config[AUX_LAYERS_KEY], describe(self.config),
            )  # fmt: skip
        width = self.config.table_pages(model_config.max_model_len) if device.type != "cpu" else pages_for(model_config.max_model_len)
        self.retriever = Retriever(
            self.config, head, model.embed_input_ids, num_kv_heads=self.num_kv_heads, max_model_len=model_config.max_model_len,
            table_pages=width, device=device,
        )  # fmt: skip
        self.builder: SpeContextMetadataBuilder | None = None

    @property
    def reads_aux(self) -> bool:
        """Whether the model must return auxiliary hidden states."""
        return self.retriever.head is not None

    def kv_share(self, kv_bytes_per_block: int) -> float:
        """Share of the memory for KV that is left once the head's caches have theirs."""
        return kv_bytes_per_block / (kv_bytes_per_block + self.retriever.bytes_per_block)

    def bind(self, builders: Sequence[SpeContextMetadataBuilder], num_blocks: int) -> None:
        """Take over the page table of the engine's one attention group and allocate the head's caches.

        Raises:
            ConfigError: the model's layers do not share one KV shape.
        """
        if len(builders) != 1 or not isinstance(builders[0], SpeContextMetadataBuilder):
            raise ConfigError(
                "model: its layers need more than one attention group (their KV heads or head sizes differ), but "
                "--attention-backend specontext makes one selection for all layers; serve it with another backend."
            )
        self.builder = builders[0]
        self.retriever.allocate_cache(num_blocks)
        self.retriever.warm_up(self.builder.table.pages, self.builder.table.lengths)

    def before_forward(self, batch: StepBatch) -> None:
        """Fill the page table and let the attention provider plan the step."""
        table = self.builder.table
        self.retriever.before_forward(batch, table.pages, table.lengths)
        if batch.table_rows:
            self.builder.provider.plan(table, batch.table_rows)

    def after_forward(self, batch: StepBatch, aux: Sequence[Tensor] | None) -> None:
        """Hand the step's auxiliary hidden states to the head."""
        if aux is not None:
            self.retriever.after_forward(batch, aux)

    def set(self, retriever: str | None, budget: int | None) -> dict[str, Any]:
        """Change retriever or budget between steps; see ``Retriever.configure``."""
        changes = {key: value for key, value in (("retriever", retriever), ("budget", budget)) if value is not None}
        config = SpeContextConfig.from_settings({**self.retriever.config.model_dump(exclude_unset=True), **changes})
        self.retriever.configure(config)
        return config.model_dump()
