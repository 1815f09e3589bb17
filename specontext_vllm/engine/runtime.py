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
from specontext_vllm.cpu_kernels.huge_pages import use_huge_pages
from specontext_vllm.engine.backend import SpeContextImpl
from specontext_vllm.engine.compat import allocate_kv_cache_as
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.kv_dtype import refuse_scales
from specontext_vllm.engine.kv_group import Block, KVGroup, find_kv_groups
from specontext_vllm.engine.kv_plan import plan_one_tier, plan_two_tiers
from specontext_vllm.engine.layers import our_layer_names, shape_of
from specontext_vllm.engine.lossless import SelfDrafts
from specontext_vllm.engine.memory import memory_model
from specontext_vllm.engine.metadata import SpeContextMetadataBuilder
from specontext_vllm.engine.metrics import Exporter
from specontext_vllm.engine.other_blocks import num_other_blocks
from specontext_vllm.engine.parts import (
    make_draft_lists,
    make_graphs,
    make_retriever,
    make_selector,
    make_tiers,
)
from specontext_vllm.engine.refusals import (
    refuse_captured_writes,
    refuse_kv_groups,
    refuse_shared_kv,
)
from specontext_vllm.engine.request_settings import RequestBudgets
from specontext_vllm.engine.settings import LiveSettings
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.residency.host_pool import HostPoolError
from specontext_vllm.residency.memory_model import MemoryModel, TierPlan
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.checkpoint import layer_groups
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.local import LocalRetriever
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
        retriever: chooses the pages that decode rows read.
        selector: does so in each layer, for a rule that asks for it.
        tiers: where the pages lie, with a host pool.
        layer_names: layers that run on our backend, in the model's order.
        kv_names: those of them that keep KV; the others read that of one of these.
        shape: what they have in common.
        kv_groups: theirs among vLLM's KV-cache groups, from ``own_kv_cache`` on. The head's caches
            are addressed by the pages of the first.
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
        self.layer_names = our_layer_names(vllm_config, model)
        self.shape = shape_of(vllm_config, self.layer_names)
        refuse_scales(vllm_config, self.layer_names)
        layers = vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            layers[name].impl.is_selected_for = True
        self.kv_names = [n for n in self.layer_names if layers[n].impl.kv_owner is None]
        self.retriever = make_retriever(
            vllm_config, self.config, model, self.shape, device, drafter
        )
        self.selector: LayerSelector | None = None
        if self.config.rule.per_layer:
            self.selector = make_selector(
                vllm_config, self.config, self.shape, self.retriever.row_totals
            )
        self.tiers: TieredKV | None = None
        self._is_profiling = False
        self.exporter: Exporter | None = None
        self._graphs = make_graphs(vllm_config, self.config, device)
        self._plan: TierPlan | None = None
        self._layers: list[SpeContextImpl] = []
        # vLLM may fit --max-model-len auto to its memory later.
        self._max_model_len = vllm_config.model_config.max_model_len

    # -- how much fits, before there is a KV cache

    @property
    def reads_aux(self) -> bool:
        """Whether the model must return auxiliary hidden states."""
        return self.retriever.reads_aux

    @property
    def graph_bytes(self) -> int:
        """GPU memory that graphs of our own may take while the engine serves."""
        return 0 if self._graphs is None else self._graphs.max_bytes

    def plan_blocks(self, gpu_bytes: int, block: Block) -> int:
        """Blocks that vLLM's scheduler may hand out when there are ``gpu_bytes`` of GPU memory for
        KV: what they hold beside the head's caches, together with the host pool. All workers must
        call it together.

        Args:
            block: what a block is like; see ``kv_group.expected_block``.
        Raises:
            ConfigError: a sentence with the numbers when that is too little; a host pool beside
                layers that read the KV of others, or for several groups of layers.
        """
        memory = self._memory_model(block)
        if not self.config.host_kv_gib:
            return plan_one_tier(self.vllm_config, memory, gpu_bytes, block.num_bytes)
        refuse_kv_groups(self.config, block.groups, num_drafts(self.vllm_config))
        if len(self.kv_names) < len(self.layer_names):
            refuse_shared_kv(self.vllm_config)
        self._plan = plan_two_tiers(
            self.vllm_config, memory, gpu_bytes, beside_others=block.apart_bytes is not None
        )
        return self._plan.num_pages // memory.block_pages

    def _memory_model(self, block: Block) -> MemoryModel:
        kept_per_layer = LayerSelector.bytes_per_block(
            self.config,
            block.layers,
            self.shape.num_kv_heads,
            self.shape.head_dim,
            self.vllm_config.model_config.dtype,
        )
        return memory_model(
            self.vllm_config,
            len(self.kv_names),
            self.shape,
            self.retriever.bytes_per_block + kept_per_layer,
            block.pages,
            block.other_bytes // block.pages,
            (block.apart_bytes or 0) if self.config.host_kv_gib else 0,
        )

    # -- binding, when there is one

    @contextmanager
    def own_kv_cache(self, kv_cache_config: Any, is_profiling: bool) -> Iterator[None]:
        """While vLLM sets up its KV cache: bind our layers to our arena instead, when there are two
        tiers.

        Raises:
            ConfigError: blocks of our layers differ, or the host pool cannot be had.
        """
        self._is_profiling = is_profiling
        self.kv_groups = find_kv_groups(self.kv_names, kv_cache_config.kv_cache_groups)
        refuse_kv_groups(self.config, len(self.kv_groups), num_drafts(self.vllm_config))
        self.tiers = None
        num_pages = self.kv_groups[0].num_pages(kv_cache_config.num_blocks)
        with self._kv_memory():
            self.retriever.allocate_cache(num_pages)
        if self.vllm_config.kv_transfer_config is not None and not is_profiling:
            self._move_with_kv(kv_cache_config.num_blocks)
        plan = self._tier_plan(num_pages, is_profiling)
        if plan is None:
            yield
            return
        self.tiers = make_tiers(
            self.vllm_config,
            self.config,
            plan,
            len(self.kv_names),
            self.shape,
            self.device,
            self._kv_memory,
        )
        groups = kv_cache_config.kv_cache_groups
        others = None
        if len(groups) > 1:
            ours = [group.index for group in self.kv_groups]
            others = num_other_blocks(self.vllm_config, groups, ours)
            if is_profiling:
                others = min(others, kv_cache_config.num_blocks)
        with allocate_kv_cache_as(self.tiers.arena, self.kv_names, others):
            yield

    def _move_with_kv(self, num_blocks: int) -> None:
        """What moves the KV of a block moves what the head keeps of it; to be said before vLLM
        registers its own caches.
        """
        if isinstance(self.retriever, LocalRetriever) and self.retriever.head is not None:
            # vLLM's connectors, which few engines have.
            from specontext_vllm.engine.offloading import take_along

            take_along(self.retriever.head.cache, num_blocks)

    def _kv_memory(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._is_profiling else self._memory_pool("kv_cache")

    def _tier_plan(self, num_pages: int, is_profiling: bool) -> TierPlan | None:
        if not self.config.host_kv_gib or (self._plan is not None and not self._plan.host_layers):
            return None
        if is_profiling:
            # vLLM captures a few graphs to learn what they take; they read the null frame only.
            hot = self.config.table_pages(
                self.vllm_config.model_config.max_model_len, num_drafts(self.vllm_config)
            )
            return TierPlan(num_pages, len(self.kv_names), hot, 1, 0, 0, 0, {})
        assert self._plan is not None
        return replace(self._plan, num_pages=min(self._plan.num_pages, num_pages))

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
        num_pages = self.kv_groups[0].num_pages(num_blocks)
        self._fit_length(builders[0].table)
        self._bind_layers(num_pages, [builder.table for builder in builders])
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

    def _fit_length(self, table: PageTable) -> None:
        """With --max-model-len auto vLLM measures the memory for KV first, when the head is long
        there.
        """
        fitted, asked = self.vllm_config.model_config.max_model_len, self._max_model_len
        if fitted >= asked:
            return
        needed = self.config.table_pages(asked, num_drafts(self.vllm_config))
        if self.tiers is not None and table.max_pages < needed:
            raise ConfigError(
                f"--max-model-len: found auto, which vLLM fitted to {fitted}, less than the "
                "budget for which the two tiers were laid out; "
                f"set --max-model-len {fitted}, or a smaller budget."
            )
        if (
            self.config.reads_everything(asked) is None
            and (sentence := self.config.reads_everything(fitted)) is not None
        ):
            logger.warning(sentence)
        self.retriever.shrink(fitted, table.max_pages)

    def _bind_layers(self, num_pages: int, tables: list[PageTable]) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        self._layers = [layers[name].impl for name in self.layer_names]
        if self.device.type == "cpu":
            use_huge_pages(layers[name].kv_cache for name in self.layer_names)
        if self.selector is not None:
            dtype = self.vllm_config.model_config.dtype
            # A block is one KV group's at a time, so their layers share what is kept of it.
            most = max(len(group.layer_names) for group in self.kv_groups)
            with self._kv_memory():
                self.selector.allocate(most, num_pages, dtype)
        places = {
            name: (index, table)
            for group, table in zip(self.kv_groups, tables, strict=True)
            for index, name in enumerate(group.layer_names)
        }
        # vLLM counts a model's other layers too; the head was trained for those that are ours.
        groups = layer_groups(len(self._layers), tables[0].groups)
        for name, layer, group in zip(self.layer_names, self._layers, groups, strict=True):
            layer.tiers, layer.selector = self.tiers, self.selector
            layer.layer, table = places[layer.kv_owner or name]
            if table.groups > 1:
                layer.group_table = table.of_group(group)

    def _install_selector(self, config: SpeContextConfig) -> LayerSelector:
        totals = self.retriever.row_totals
        self.selector = make_selector(self.vllm_config, config, self.shape, totals)
        for layer in self._layers:
            layer.selector = self.selector
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
            beside_ours = set(self.attention_groups[0].layer_names) > set(self.layer_names)
            if draft_lists is not None or beside_ours:
                # A drafter's layers read vLLM's own pages of the same selection.
                selection = replace(selection, pages=torch.zeros_like(selection.pages))
            self.tiers.bind(selection)
        if self._graphs is not None:
            self._graphs.clear()
        if self.exporter is not None:
            self.exporter.close()
        self.exporter = Exporter(self.vllm_config, self.retriever, self.tiers, self.device)
        self.step = DecodeStep(
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
        head = self.retriever.head if isinstance(self.retriever, LocalRetriever) else None
        return SelfDrafts(
            self.step,
            self.attention_groups[0].get_metadata_builder(),
            self.layer_names,
            model,
            self.vllm_config,
            None if head is None else head.cache,
        )

    # -- while it serves

    def set(self, *args: Any, **changes: Any) -> dict[str, Any]:
        """Change settings between steps; see ``LiveSettings.change``."""
        return self.settings.change(*args, **changes)

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
        if isinstance(self.retriever, LocalRetriever):
            self.retriever.clear_cache()
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


def attach_runtime(
    runner: Any, memory_pool: Callable[[str], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Make the runtime of a model runner whose models are loaded, and let the target return the
    hidden states that the head reads.

    Args:
        memory_pool: see ``Runtime``.

    Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.use_aux_hidden_state_outputs,
        vllm.v1.worker.gpu.model_runner.GPUModelRunner.use_aux_hidden_state_outputs,
        vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter,
        vllm.v1.worker.gpu.model_runner.GPUModelRunner.speculator
    Symptom: the head learns nothing, since the model returns no auxiliary hidden states.
    Reason: the runner asks for them (use_aux_hidden_state_outputs) for its own drafter only.
    Remove when: a setting of vLLM's asks for auxiliary hidden states.
    """
    config, drafter = runner.vllm_config, None
    if config.speculative_config is not None and config.speculative_config.method == "eagle3":
        holder = runner.speculator if config.use_v2_model_runner else runner.drafter
        drafter = holder.model
    with memory_pool("runtime"):
        runner.runtime = Runtime(config, runner.model, runner.device, drafter, memory_pool)
    runner.use_aux_hidden_state_outputs |= runner.runtime.reads_aux
