"""The lossless mode: the model drafts over its selected pages and verifies over all of them, so the
tokens, and the KV that stays, are those of dense attention (docs/how-it-works/lossless.md).

For vLLM this is speculative decoding with a draft model that happens to be the target.

vLLM: its speculative configuration, its estimate of what a model reads, and the context in which a
model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.draft_length import (
    ALL_LENGTHS,
    MAX_DRAFTS,
    DraftLength,
    StepBytes,
    lengths_by_batch,
)
from specontext_vllm.engine.kv_group import spec_of
from specontext_vllm.engine.metadata import SpeContextMetadataBuilder
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.model_config import has_windowed_layers
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.step_data import StepBatch

SETTING = f"additional_config.{CONFIG_KEY}.mode: found 'lossless'"


def drafts_itself(vllm_config: Any) -> bool:
    """Whether the engine's drafts are those of ``draft_with_target``."""
    speculative = vllm_config.speculative_config
    return speculative is not None and (
        speculative.method == "draft_model"
        and speculative.draft_model_config is speculative.target_model_config
    )


def draft_with_target(vllm_config: Any) -> None:
    """In lossless mode, tell vLLM that the target is its own draft model. Idempotent.

    The rows' places for drafts, their verification and its figures are vLLM's then.

    Uses: vllm.config.vllm.VllmConfig.speculative_config,
        vllm.config.speculative.SpeculativeConfig.method,
        vllm.config.speculative.SpeculativeConfig.num_speculative_tokens_per_batch_size
    Symptom: a draft model of the target's own path is loaded a second time.
    Reason: vLLM knows no drafter that is the target. Made as one that needs no model, and renamed,
        the configuration refers to the target's own.
    Remove when: it does.
    """
    if vllm_config.speculative_config is not None:
        return
    from vllm.config import SpeculativeConfig

    model = vllm_config.model_config
    made = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=MAX_DRAFTS,
        target_model_config=model,
        target_parallel_config=vllm_config.parallel_config,
    )
    made.method, made.model = "draft_model", model.model
    # Rows then have as many drafts as the scheduler says, and none are padded with made-up ones.
    made.num_speculative_tokens_per_batch_size = lengths_by_batch(
        vllm_config.scheduler_config.max_num_seqs
    )
    vllm_config.speculative_config = made


def refuse_lossless(vllm_config: Any, is_cpu: bool) -> None:
    """Raise a ConfigError for an engine that cannot draft with its target."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None and not drafts_itself(vllm_config):
        raise ConfigError(
            f"{SETTING} with --speculative-config {vllm_config.speculative_config.method}, but the "
            "model drafts for itself there: leave one of the two out."
        )
    for what, refused in (
        ("some of whose layers keep a state instead of KV", model.is_hybrid),
        (
            "some of whose layers have a window, on a GPU",
            has_windowed_layers(model.hf_text_config) and not is_cpu,
        ),
        ("which takes images or audio", model.is_multimodal_model),
    ):
        if refused:
            raise ConfigError(
                f"{SETTING} with {model.model}, {what}, which is not supported; use mode sparse."
            )
    for option, given in (
        ("--logits-processors", model.logits_processors),
        (
            "--structured-outputs-config.backend lm-format-enforcer",
            vllm_config.structured_outputs_config.backend == "lm-format-enforcer",
        ),
    ):
        if given:
            raise ConfigError(
                f"{SETTING} with {option}, which vLLM does not run on drafts; leave it out, or use "
                "mode sparse."
            )
    if vllm_config.lora_config is not None:
        raise ConfigError(
            f"{SETTING} with --enable-lora, but vLLM sets the adapters of a step's tokens, and "
            "drafts are made in passes of their own; use mode sparse."
        )
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    if config.rule.per_layer and not is_cpu:
        raise ConfigError(
            f"{SETTING} with retriever {config.retriever!r}, but a GPU's graphs of plain steps are "
            "replayed for drafts there, and would hold the selection; use retriever dlm."
        )
    if vllm_config.scheduler_config.max_num_seqs == 1 and not is_cpu:
        raise ConfigError(
            f"{SETTING} with --max-num-seqs 1, for which vLLM captures no graphs of plain steps; "
            "use 2 or more."
        )
    if (size := parallel.data_parallel_size) > 1:
        raise ConfigError(
            f"{SETTING} with --data-parallel-size {size}, which is not supported; use mode sparse."
        )


def choose_drafts(vllm_config: Any, kv_cache_config: Any) -> DraftLength:
    """What chooses how many tokens this engine drafts: on a GPU among those numbers of which it has
    graphs.
    """
    lengths = list(ALL_LENGTHS)
    if vllm_config.device_config.device_type != "cpu":
        schedule = vllm_config.speculative_config.num_speculative_tokens_per_batch_size
        lengths = [drafts for _, _, drafts in schedule]
    return DraftLength(step_bytes(vllm_config, kv_cache_config), lengths)


def step_bytes(vllm_config: Any, kv_cache_config: Any) -> StepBytes:
    """What this engine's steps read.

    Uses: vllm.v1.metrics.perf.ModelMetrics, vllm.v1.metrics.perf.ExecutionContext
    Symptom: the scheduler does not know at which lengths drafts pay.
    Reason: the weights are the workers'; vLLM estimates what a step reads, for its own figures.
    Remove when: a worker can tell the scheduler.
    """
    from vllm.logger import suppress_logging
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    groups = kv_cache_config.kv_cache_groups
    # What layers with a window read does not grow with the context.
    specs = [spec_of(group, name) for group in groups for name in group.layer_names]
    full = [spec for spec in specs if isinstance(spec, FullAttentionSpec)]
    kv = sum(spec.page_size_bytes / spec.block_size for spec in full)
    with suppress_logging():
        estimate = ModelMetrics(vllm_config)
    weights = estimate.get_read_bytes(ExecutionContext.from_single_request(1, 1, is_prefill=False))
    scores = 0.0
    if config.rule.needs_head:
        # Keys of one layer, if the head's are like the target's.
        scores = kv / len(full) / 2
    elif config.rule.per_layer:
        scores = kv * (config.rule.page_vectors / (2 * PAGE_SIZE) or 0.5)
    return StepBytes(weights, kv, scores, config.budget)


@dataclass(frozen=True)
class OtherLayers:
    """Layers of the target that are not ours, with windows, which a pass over drafts runs too.

    Attributes:
        names: those of one of vLLM's attention groups.
        builder: makes their metadata.
        block_table: ``[R, W]`` their blocks of R requests.
        block_size: tokens of these.
    """

    names: Sequence[str]
    builder: Any
    block_table: Tensor
    block_size: int

    def describe(self, common: Any, positions: Tensor) -> tuple[Any, Tensor]:
        """Their metadata and slots for a step of one token a row, at ``positions [R]``."""
        slots = slots_of(self.block_table, positions, self.block_size)
        described = replace(common, block_table_tensor=self.block_table, slot_mapping=slots)
        return self.builder.build(0, described), slots


class SelfDrafts:
    """Drafts of one worker: the model runs one token a row ahead of its answers, over the pages
    selected for each.

    What it leaves in the KV cache and among the head's keys lies behind the rows' ends, where the
    next step writes before anything reads. Only what a page remembers of its latest token is put
    back.

    Args:
        step: selects and learns.
        layers: the names of our layers of each KV group, and what makes their metadata.
        model: the target.
        vllm_config: the engine's configuration.
        head_cache: what the head remembers, if there is a head.
    """

    def __init__(
        self,
        step: DecodeStep,
        layers: Sequence[tuple[Collection[str], SpeContextMetadataBuilder]],
        model: Any,
        vllm_config: Any,
        head_cache: HeadCache | None,
    ) -> None:
        self.step, self.layers = step, layers
        self.model, self.vllm_config = model, vllm_config
        self.head_cache = head_cache
        self.max_model_len = vllm_config.model_config.max_model_len

    def draft(
        self,
        count: int,
        tokens: Tensor,
        known: Tensor,
        block_tables: Sequence[Tensor],
        names: Sequence[str],
        others: Sequence[OtherLayers] = (),
    ) -> Tensor:
        """``[R, count]`` drafts of R requests, each of which has a next token without KV.

        Args:
            tokens: ``[R]`` those tokens, of the dtype of the drafts.
            known: ``[R]`` int64 tokens that have KV; the next one's position.
            block_tables: ``[R, W]`` int32 pages of each KV group of ours, with room for the drafts.
            names: R request ids.
            others: the target's layers that are not ours.
        """
        last_pages = block_tables[0].gather(1, ((known - 1) // PAGE_SIZE)[:, None])
        drafts = []
        with self.page_memory(last_pages[:, 0].long()):
            for ahead in range(count):
                # Beyond the longest context nothing is ever verified.
                positions = (known + ahead).clamp(max=self.max_model_len - 1)
                batch = one_token_a_row(tokens, positions, block_tables, names)
                tokens = self.next_tokens(batch, partial(self._run, batch, others))
                drafts.append(tokens)
        return torch.stack(drafts, 1)

    @contextmanager
    def page_memory(self, pages: Tensor) -> Iterator[None]:
        """Within the block drafts are made; what ``pages [R]`` remember is then as before."""
        fused = None if self.head_cache is None else self.head_cache.fused
        latest = None if fused is None else fused[pages]
        yield
        if fused is not None and latest is not None:
            fused[pages] = latest

    def next_tokens(self, batch: StepBatch, run: Callable[[], Any] | None = None) -> Tensor:
        """The likeliest tokens ``[R]`` after those of ``batch``, one a row, of their dtype.

        Args:
            run: runs the model on them, as from a graph; None: it is called.
        """
        self.step.before_model(batch)
        output = self._run(batch) if run is None else run()
        hidden, aux = output if isinstance(output, tuple) else (output, None)
        self.step.after_model(batch, aux)
        logits = self.model.compute_logits(hidden[: batch.num_rows])
        return logits.argmax(-1).to(batch.token_ids.dtype)

    def _run(self, batch: StepBatch, others: Sequence[OtherLayers] = ()) -> Any:
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        common = CommonAttentionMetadata(
            query_start_loc=batch.query_starts,
            query_start_loc_cpu=torch.arange(batch.num_rows + 1, dtype=torch.int32),
            seq_lens=batch.seq_lens,
            num_reqs=batch.num_rows,
            num_actual_tokens=batch.num_tokens,
            max_query_len=1,
            max_seq_len=max(batch.seq_lens_bound),
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slots,
        )
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        tables = (batch.block_table, *batch.other_block_tables)
        for (names, builder), table in zip(self.layers, tables, strict=True):
            places = batch.slots
            if table is not batch.block_table:
                places = slots_of(table, batch.positions, PAGE_SIZE)
            own = replace(common, block_table_tensor=table, slot_mapping=places)
            metadata |= dict.fromkeys(names, builder.build_draft(own))
            slots |= dict.fromkeys(names, places)
        for other in others:
            described, places = other.describe(common, batch.positions)
            metadata |= dict.fromkeys(other.names, described)
            slots |= dict.fromkeys(other.names, places)
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=batch.num_tokens, slot_mapping=slots
        ):
            return self.model(
                input_ids=batch.token_ids,
                positions=batch.positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )


def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """``[R]`` int64 slots of one token a row, at ``positions [R]``."""
    blocks = block_table.gather(1, (positions // block_size)[:, None]).squeeze(1).long()
    return blocks * block_size + positions % block_size


def one_token_a_row(
    tokens: Tensor, positions: Tensor, block_tables: Sequence[Tensor], names: Sequence[str]
) -> StepBatch:
    """A step of the rows' next tokens ``[R]`` at ``positions [R]``; waits for the device.

    Args:
        block_tables: ``[R, W]`` int32 of each KV group.
    """
    rows, (block_table, *others) = len(tokens), block_tables
    seq_lens = (positions + 1).int()
    return StepBatch(
        token_ids=tokens,
        positions=positions,
        slots=slots_of(block_table, positions, PAGE_SIZE),
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=seq_lens,
        block_table=block_table,
        seq_lens_bound=seq_lens.tolist(),
        num_decodes=rows,
        table_rows=rows,
        num_tokens=rows,
        names=names,
        query_lens=[1] * rows,
        other_block_tables=tuple(others),
    )
