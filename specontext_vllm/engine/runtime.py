"""What the two runner adapters share: it makes the parts of a worker and binds them to vLLM and to
each other.

vLLM: the mode in which it captures steps, and its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.compat import allocate_kv_cache_as
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.fitted_length import fit_length
from specontext_vllm.engine.head_layers import move_with_kv
from specontext_vllm.engine.kv_group import KVGroup, find_kv_groups
from specontext_vllm.engine.kv_plan import KVPlan
from specontext_vllm.engine.lossless import SelfDrafts
from specontext_vllm.engine.metadata import SpeContextMetadataBuilder
from specontext_vllm.engine.metrics import Exporter
from specontext_vllm.engine.other_blocks import num_other_blocks
from specontext_vllm.engine.our_layers import OurLayers
from specontext_vllm.engine.parts import (
    make_draft_lists,
    make_graphs,
    make_retriever,
    make_selector,
    make_tiers,
)
from specontext_vllm.engine.pipeline import make_stages, make_step
from specontext_vllm.engine.refusals import refuse_captured_writes, refuse_kv_groups
from specontext_vllm.engine.request_settings import RequestBudgets
from specontext_vllm.engine.settings import LiveSettings
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.residency.host_pool import HostPoolError
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.step_data import PageTable, Selection

logger = init_logger("vllm.specontext")


class Runtime:
    """The parts of one worker, bound to its model runner.

    Args:
        vllm_config: the engine's configuration, settled by ``prepare_vllm_config``.
        model: the loaded target.
        device: the worker's device.
        drafter: the loaded EAGLE-3 draft model, where the engine has one.
        memory_pool: vLLM's memory of a tag, which sleep mode offloads or gives up by that. What the
            head's caches and both tiers hold is lost with vLLM's KV; all else of ours is kept.

    Attributes:
        layers: those that run on our backend.
        retriever: chooses the pages that decode rows read.
        stages: of a pipeline that this worker is one of; None: it has all layers.
        selector: does so in each layer, for a rule that asks for it.
        kv_plan: how much KV there is memory for.
        tiers: where the pages lie, with a host pool.
        storage: the connector to a shared folder, if the engine has one.
        kv_groups: the layers' among vLLM's KV-cache groups, from ``own_kv_cache`` on. The head's
            caches are addressed by the pages of the first.
        attention_groups: vLLM's AttentionGroup of each of these, once ``bind`` has found them.
        step: what happens in a step, once ``bind`` has made it.
        settings: of ``specontext_set``, likewise.

    Raises:
        ConfigError: the model cannot hand out auxiliary hidden states, or has no layer for us.
    """

    kv_groups: tuple[KVGroup, ...]
    attention_groups: list[Any]
    step: DecodeStep
    settings: LiveSettings

    def __init__(
        self,
        vllm_config: Any,
        model: Any,
        device: torch.device,
        drafter: torch.nn.Module | None = None,
        memory_pool: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.vllm_config, self.device, self._memory_pool = vllm_config, device, memory_pool
        self.config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        # Once more, now that vLLM has settled what it captures.
        refuse_captured_writes(self.config, vllm_config.compilation_config)
        if device.type == "cpu" and (reason := cpu_kernels.why_not()) is not None:
            logger.warning("SpeContext: %s", reason)
        self.layers = OurLayers(vllm_config, model)
        shape = self.layers.shape
        self.stages = make_stages(vllm_config, self.config, device)
        self.retriever = make_retriever(
            vllm_config, self.config, model, shape, device, drafter, self.stages
        )
        self.kv_plan = KVPlan(vllm_config, self.layers, self.retriever)
        self.selector: LayerSelector | None = None
        if self.config.rule.per_layer:
            self.selector = make_selector(
                vllm_config, self.config, shape, self.retriever.row_totals
            )
        self.tiers: TieredKV | None = None
        self.storage: Any = None
        self._is_profiling = False
        self.exporter: Exporter | None = None
        self._graphs = make_graphs(vllm_config, self.config, device)
        # vLLM may fit --max-model-len auto to its memory later.
        self._max_model_len = vllm_config.model_config.max_model_len

    @property
    def returns_aux(self) -> bool:
        """Whether the model returns auxiliary hidden states beside those that it samples from."""
        if self.stages is None:
            return self.retriever.reads_aux
        return self.stages.is_last and bool(self.stages.own_layers)

    def reserved_bytes(self, max_tokens: int) -> int:
        """GPU memory that may be taken while the engine serves, which no step of ``max_tokens``
        takes by itself: by graphs of our own, and where stages wait for each other's states.
        """
        graphs = 0 if self._graphs is None else self._graphs.max_bytes
        return graphs + (0 if self.stages is None else self.stages.num_bytes(max_tokens))

    @contextmanager
    def own_kv_cache(self, kv_cache_config: Any, is_profiling: bool) -> Iterator[None]:
        """While vLLM sets up its KV cache: bind our layers to our arena instead, when there are two
        tiers.

        Raises:
            ConfigError: blocks of our layers differ, or the host pool cannot be had.
        """
        self._is_profiling = is_profiling
        self.kv_groups = find_kv_groups(self.layers.kv_names, kv_cache_config.kv_cache_groups)
        refuse_kv_groups(self.config, len(self.kv_groups))
        self.tiers = None
        num_pages = self.kv_groups[0].num_pages(kv_cache_config.num_blocks)
        with self._kv_memory():
            self.retriever.allocate_cache(num_pages)
        if self.vllm_config.kv_transfer_config is not None and not is_profiling:
            self.storage = move_with_kv(
                self.vllm_config,
                self._head_cache,
                self.layers.learn_pages,
                kv_cache_config.num_blocks,
            )
        plan = self.kv_plan.of_two_tiers(num_pages, is_profiling)
        if plan is None:
            yield
            return
        self.tiers = make_tiers(
            self.vllm_config,
            self.config,
            plan,
            self.layers,
            self.device,
            self._kv_memory,
        )
        groups = kv_cache_config.kv_cache_groups
        others: dict[int, int] = {}
        if len(groups) > 1:
            ours = [group.index for group in self.kv_groups]
            count = num_other_blocks(self.vllm_config, groups, ours)
            if is_profiling:
                count = min(count, kv_cache_config.num_blocks)
            others = {index: count for index in range(len(groups)) if index not in ours}
        with allocate_kv_cache_as(self.tiers.arena, self.layers.kv_names, others):
            yield

    def _kv_memory(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._is_profiling else self._memory_pool("kv_cache")

    @torch.inference_mode()
    def bind(
        self,
        attention_groups: Sequence[Sequence[Any]],
        num_blocks: int,
        drafters_groups: Sequence[Any] = (),
    ) -> None:
        """Take over the page tables of our layers and make the head's caches.

        Args:
            attention_groups: the model runner's ``attn_groups``.
            drafters_groups: the AttentionGroups with which a drafter drafts token after token.
        Raises:
            ConfigError: our layers do not share one KV shape.
        """
        self.attention_groups = [
            group.attention_group(attention_groups) for group in self.kv_groups
        ]
        builders = [group.get_metadata_builder() for group in self.attention_groups]
        tables = [builder.table for builder in builders]
        fit_length(
            self.vllm_config,
            self.config,
            self._max_model_len,
            tables[0],
            self.retriever,
            has_tiers=self.tiers is not None,
        )
        if self.selector is not None:
            # A block is one KV group's at a time, so their layers share what is kept of it.
            most = max(len(group.layer_names) for group in self.kv_groups)
            num_pages = self.kv_groups[0].num_pages(num_blocks)
            with self._kv_memory():
                self.selector.allocate(most, num_pages, self.vllm_config.model_config.dtype)
        self.layers.bind(self.kv_groups, tables, self.tiers, self.selector)
        draft_lists = make_draft_lists(
            self.vllm_config,
            self.config,
            builders[0].table,
            self.kv_groups[0].index,
            drafters_groups,
        )
        self._make_step(builders, draft_lists)
        self.settings = LiveSettings(
            self.config,
            self._max_model_len,
            captured=self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
            step=self.step,
            selector=self.selector,
            install_selector=self._install_selector,
        )

    def _install_selector(self, config: SpeContextConfig) -> LayerSelector:
        totals = self.retriever.row_totals
        self.selector = make_selector(self.vllm_config, config, self.layers.shape, totals)
        self.layers.select_with(self.selector)
        return self.selector

    def _make_step(
        self, builders: list[SpeContextMetadataBuilder], draft_lists: DraftLists | None
    ) -> None:
        builder, *others = builders
        table, counted = builder.table, pages_for(self._max_model_len)
        if others:
            table = PageTable.allocate(
                table.rows, table.num_kv_heads, table.max_pages, self.device, table.groups
            )
        is_named = self.tiers is None and not others
        selection = Selection.into(table, count_from_start=0 if is_named else counted)
        if self.tiers is not None:
            beside_ours = set(self.attention_groups[0].layer_names) > set(self.layers.names)
            if draft_lists is not None or beside_ours:
                # A drafter's layers read vLLM's own pages of the same selection.
                selection = replace(selection, pages=torch.zeros_like(selection.pages))
            self.tiers.bind(selection)
        if self._graphs is not None:
            self._graphs.clear()
        if self.exporter is not None:
            self.exporter.close()
        # A pipeline's stages read the same pages.
        publishes = self.stages is None or self.stages.is_first
        self.exporter = Exporter(
            self.vllm_config, self.retriever, self.tiers, self.device, publishes=publishes
        )
        self.step = make_step(
            self.stages,
            self.retriever,
            selection,
            builder.table,
            builder.provider,
            tiers=self.tiers,
            graphs=self._graphs,
            exporter=self.exporter,
            kv_group=self.kv_groups[0],
            budgets=RequestBudgets(self.config, self.vllm_config.model_config.max_model_len),
            others=[(other.table, other.provider) for other in others],
            num_drafts=num_drafts(self.vllm_config),
            draft_lists=draft_lists,
        )
        self.step.warm_up()

    def self_drafts(self, model: Any) -> SelfDrafts:
        """What drafts with the target ``model`` in lossless mode."""
        ours = set(self.layers.names)
        return SelfDrafts(
            self.step,
            [
                (ours.intersection(group.layer_names), group.get_metadata_builder())
                for group in self.attention_groups
            ],
            model,
            self.vllm_config,
            self._head_cache,
        )

    @property
    def _head_cache(self) -> HeadCache | None:
        """What the head in this worker keeps, if there is one, from ``own_kv_cache`` on."""
        return None if self.retriever.head is None else self.retriever.head.cache

    # -- while it serves

    def give_back_memory(self) -> None:
        """Before vLLM gives up its KV, when no request holds any of it: let go of what lies in none
        of its pools, our graphs and the host pool.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._graphs is not None:
            self._graphs.clear()
        if self.tiers is not None:
            self.tiers.give_back_host_pool()

    @torch.inference_mode()
    def start_anew(self) -> None:
        """Once vLLM's KV is back, empty: so are the head's caches and both tiers.

        Raises:
            ConfigError: others have the host pool's memory now.
        """
        if (cache := self._head_cache) is not None:
            cache.clear()
        if self.selector is not None:
            self.selector.clear()
        if self.tiers is not None:
            try:
                self.tiers.start_anew()
            except HostPoolError as error:
                raise ConfigError(f"additional_config.{CONFIG_KEY}.{error}") from None

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures since the last reset; see ``Retriever.stats`` and ``TieredKV.stats``."""
        return {
            **self.retriever.stats(reset),
            **({} if self.tiers is None else self.tiers.stats(reset)),
        }

    def audit(self) -> dict[str, int]:
        """Check the accounting of the two tiers; see ``TieredKV.audit``. Empty without them."""
        return {} if self.tiers is None else self.tiers.audit()

    def close(self) -> None:
        """Let go of what outlives this object: the worker's figures in /metrics, and the sidecar's
        actor.
        """
        if self.exporter is not None:
            self.exporter.close()
        self.retriever.close()
