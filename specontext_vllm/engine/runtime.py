"""What the two runner adapters share: building the retriever, its share of the KV memory, and a
step's two hooks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tp_group,
    in_the_same_node_as,
)
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.utils import extract_layer_index

from specontext_vllm.config import CONFIG_KEY, PER_LAYER, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.backend import SpeContextImpl, SpeContextMetadataBuilder, max_table_rows
from specontext_vllm.engine.compat import allocate_kv_cache_as
from specontext_vllm.engine.find_head import load_head, num_hidden_layers
from specontext_vllm.engine.memory import memory_model, refuse_less_than_one_request
from specontext_vllm.engine.metrics import Exporter
from specontext_vllm.engine.names import AUX_LAYERS_KEY, ENGINES_KEY
from specontext_vllm.engine.refusals import refuse_captured_writes
from specontext_vllm.engine.stopwatch import Stopwatch
from specontext_vllm.residency.host_memory import free_host_memory
from specontext_vllm.residency.host_pool import HostPoolError
from specontext_vllm.residency.ledger import StartedRequest
from specontext_vllm.residency.memory_model import MemoryModel, MemoryModelError, TierPlan
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, describe_aux_layers
from specontext_vllm.retrieval.graphs import StepGraphs
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.shard import shard_checkpoint
from specontext_vllm.sidecar.remote import RemoteRetriever
from specontext_vllm.sizes import in_gib
from specontext_vllm.step_data import StepBatch, Stickiness

logger = init_logger("vllm.specontext")

HOST_RESERVE_SHARE = 0.1
"""Share of the machine's free memory that host_kv_gib "auto" leaves alone; and never less than
HOST_RESERVE_BYTES.
"""
HOST_RESERVE_BYTES = 8 << 30

REPORT_SECONDS = 10
"""Time between two lines about the tiers in the log, as between vLLM's own."""


def host_reserve(free: int) -> int:
    """Bytes of ``free`` host memory that host_kv_gib "auto" leaves alone."""
    return max(HOST_RESERVE_BYTES, int(HOST_RESERVE_SHARE * free))


def recommended_host_bytes(free: int, in_flight: int) -> int:
    """The pool of host_kv_gib "auto" on this machine, in bytes.

    Args:
        free: memory that may be taken. in_flight: KV of as many and as long requests as may run at
            once. More would hold only pages without a request, and every page costs GPU memory for
            the head's caches.
    Raises:
        ConfigError: nothing is left beside the reserve.
    """
    if free <= host_reserve(free):
        there, reserve = in_gib(free, host_reserve(free))
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found 'auto', but this machine has "
            f"{there} GiB of memory free, all within the "
            f"{reserve} GiB that auto leaves alone; give a number, or 0."
        )
    return min(free - host_reserve(free), in_flight)


def asked_host_bytes(gib: float, free: int, engines: int) -> int:
    """The pool of a host_kv_gib in numbers on this machine, in bytes.

    Args:
        free: memory that may be taken now. The machine's other engines may have taken their shares
            already, or not yet: then the last one to allocate is refused.
        engines: data-parallel engines on this machine, which share the pool.
    Raises:
        ConfigError: this engine's share is not free.
    """
    if (share := gib * 2**30 / engines) > free:
        taken, there = in_gib(share, free)
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found {gib}, of which this engine takes "
            f"{taken} GiB, but this machine has "
            f"{there} GiB of memory free; lower it."
        )
    return int(gib * 2**30)


def workers_on_this_machine() -> int:
    """Tensor-parallel workers of this engine that share this machine's memory; all workers must
    call it together.
    """
    group = get_tp_group()
    neighbours = 1
    for source in range(group.world_size if group.world_size > 1 else 0):
        same = in_the_same_node_as(group.cpu_group, source)
        if source == group.rank_in_group:
            neighbours = sum(same)
    return neighbours


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
        # Once more, now that vLLM has settled what it captures.
        refuse_captured_writes(self.config, vllm_config.compilation_config)
        model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.num_kv_heads = model_config.get_num_kv_heads(parallel)
        self._graphs: StepGraphs | None = None
        checkpoint = None
        if self.config.retrieval_head is not None:
            if not supports_eagle3(model):
                raise ConfigError(
                    f"model: {type(model).__name__} cannot hand out the hidden states that an "
                    "EAGLE-3 head reads (vLLM's "
                    "SupportsEagle3); use a model that can, or "
                    f"additional_config.{CONFIG_KEY}.retriever quest, which needs none."
                )
            checkpoint = load_head(self.config.retrieval_head, vllm_config)
            tp = parallel.tensor_parallel_size
            if tp > 1:
                checkpoint = shard_checkpoint(
                    checkpoint, rank=get_tensor_model_parallel_rank(), size=tp
                )
            model.set_aux_hidden_state_layers(tuple(vllm_config.additional_config[AUX_LAYERS_KEY]))
        self.retriever = self._make_retriever(checkpoint)
        if checkpoint is not None:
            weights = (
                sum(tensor.numel() for tensor in checkpoint.tensors.values())
                * model_config.dtype.itemsize
            )
            logger.info(
                "SpeContext retrieval head: %s, %.1f MB, keys in %s, aux layers %s; settings %s",
                self.config.retrieval_head,
                weights / 1e6,
                str(self.retriever.key_dtype).removeprefix("torch."),
                describe_aux_layers(checkpoint.spec, vllm_config.additional_config[AUX_LAYERS_KEY]),
                self.config.model_dump_json(exclude_none=True),
            )
        self.selector = (
            self._make_selector(self.config) if self.config.retriever in PER_LAYER else None
        )
        self.builder: SpeContextMetadataBuilder | None = None
        self.plan: TierPlan | None = None
        self._two_tiers = bool(self.config.host_kv_gib)
        self.tiers: TieredKV | None = None
        self._prefill_ends: dict[str, int] = {}
        """Of the requests in flight: tokens that are computed as a prompt."""
        self._exporter: Exporter | None = None
        self._next_report = 0.0
        self._max_model_len = model_config.max_model_len
        self._page_ids = torch.arange(
            pages_for(self._max_model_len), dtype=torch.int32, device=device
        )

    def _make_retriever(
        self, checkpoint: HeadCheckpoint | None
    ) -> LocalRetriever | RemoteRetriever:
        model, config = self.vllm_config.model_config, self.config
        shape = {
            "num_kv_heads": self.num_kv_heads,
            "max_model_len": model.max_model_len,
            "device": self.device,
        }
        embed = self.model.embed_input_ids
        if config.sidecar == "ray":
            scheduler = self.vllm_config.scheduler_config
            return RemoteRetriever(
                config,
                checkpoint,
                embed,
                vocab_size=model.get_vocab_size(),
                max_rows=scheduler.max_num_seqs,
                max_tokens=scheduler.max_num_batched_tokens,
                dtype=model.dtype,
                **shape,
            )
        head = None
        if checkpoint is not None:
            head = RetrievalHead(
                checkpoint, max_position=model.max_model_len, dtype=model.dtype, device=self.device
            )
        fixed_width = self.device.type != "cpu" or config.host_kv_gib
        width = (
            config.table_pages(model.max_model_len)
            if fixed_width
            else pages_for(model.max_model_len)
        )
        # Captured, vLLM's exchange between workers would want its own context.
        apart = self.vllm_config.parallel_config.tensor_parallel_size > 1
        self._graphs = self._step_graphs()
        return LocalRetriever(
            config, head, embed, table_pages=width, graphs=self._graphs, embeds_apart=apart, **shape
        )

    def _step_graphs(self) -> StepGraphs | None:
        """Where vLLM replays decode steps as whole graphs, so do we."""
        mode = self.vllm_config.compilation_config.cudagraph_mode
        captured = (
            self.device.type == "cuda"
            and mode is not None
            and mode.decode_mode() == CUDAGraphMode.FULL
        )
        # What selects per layer is part of vLLM's graphs, and cannot change then.
        return (
            StepGraphs(self.device) if captured and self.config.retriever not in PER_LAYER else None
        )

    @property
    def graph_bytes(self) -> int:
        """GPU memory that graphs of our own may take while the engine serves."""
        return 0 if self._graphs is None else self._graphs.most_bytes

    @property
    def reads_aux(self) -> bool:
        """Whether the model must return auxiliary hidden states."""
        return self.retriever.reads_aux

    def plan_one_tier(self, gpu_bytes: int) -> int:
        """Pages that ``gpu_bytes`` of GPU memory hold beside what the retriever keeps of them.

        Raises:
            ConfigError: a sentence with the numbers when gpu_kv_gib is too small.
        """
        memory = self._memory_model()
        refuse_less_than_one_request(self.vllm_config, memory, gpu_bytes, 0)
        kv, beside = self._num_layers * memory.shape.page_bytes, memory.shape.head_page_bytes
        logger.info(
            "SpeContext: the head's caches take %.1f %% of the KV memory.",
            100 * beside / (kv + beside),
        )
        return gpu_bytes // (kv + beside)

    # -- two tiers
    # ----------------------------------------------------------------------------------------------------

    def plan_tiers(self, gpu_bytes: int) -> int:
        """Logical pages that ``gpu_bytes`` of GPU memory and the host pool hold together.

        Raises:
            ConfigError: a sentence with the numbers when they hold too little.
        """
        model = self._memory_model()
        asked = self.config.host_kv_gib
        free = free_host_memory()
        # The setting is the machine's; the workers on it share it.
        engines = self.vllm_config.additional_config[ENGINES_KEY]
        sharers = workers_on_this_machine() * engines
        if asked == "auto":
            host_bytes = recommended_host_bytes(free, sharers * model.in_flight_bytes)
            logger.info(
                "SpeContext tiers: host_kv_gib auto takes %.1f of %.1f GiB of free memory; at "
                "least %.1f are left alone, and no more is taken than "
                "--max-num-seqs requests of --max-model-len tokens fill.",
                host_bytes / 2**30,
                free / 2**30,
                host_reserve(free) / 2**30,
            )
        else:
            host_bytes = asked_host_bytes(asked, free, engines)
        host_bytes //= sharers
        refuse_less_than_one_request(self.vllm_config, model, gpu_bytes, host_bytes)
        try:
            self.plan = model.plan(
                gpu_bytes, host_bytes, self.vllm_config.cache_config.num_gpu_blocks_override
            )
        except MemoryModelError as error:
            raise ConfigError(f"additional_config.{CONFIG_KEY}.host_kv_gib: {error}") from None
        plan, layers = self.plan, self._num_layers
        if not plan.host_layers:
            self._two_tiers = False
            logger.warning(
                "SpeContext tiers: host_kv_gib %s, but no layer is mirrored: the %d pages of "
                "--num-gpu-blocks-override take %s GiB, and the engine "
                "has %s GiB for KV without it. It runs with one tier; leave host_kv_gib out, or "
                "ask for more blocks.",
                asked,
                plan.num_pages,
                *in_gib(plan.gpu_bytes, gpu_bytes),
            )
            return plan.num_pages
        where = "on the GPU" if self.device.type == "cuda" else "in the engine's own memory for KV"
        logger.info(
            "SpeContext tiers: %d tokens fit, of which %d in all layers %s; %d of %d layers are "
            "mirrored in %.2f GiB of host "
            "memory; hot buffers of %d tokens a request; %.2f GiB %s.",
            plan.num_pages * 16,
            model.plan(gpu_bytes, 0).num_pages * 16,
            where,
            plan.host_layers,
            layers,
            plan.host_bytes / 2**30,
            plan.hot_pages * 16,
            plan.gpu_bytes / 2**30,
            where,
        )
        requests = self.vllm_config.scheduler_config.max_num_seqs
        longest = model.thresholds(plan, requests)
        logger.info(
            "SpeContext tiers: %d requests keep every layer %s up to %d tokens each, and fit up to "
            "%d with all mirrored layers offloaded.",
            requests,
            where,
            longest[0],
            longest[-1],
        )
        return plan.num_pages

    @property
    def _num_layers(self) -> int:
        return num_hidden_layers(self.vllm_config)

    def _memory_model(self) -> MemoryModel:
        model = self.vllm_config.model_config
        bounds = LayerSelector.bytes_per_block(
            self.config, self._num_layers, self.num_kv_heads, model.get_head_size(), model.dtype
        )
        return memory_model(self.vllm_config, self.retriever.bytes_per_block + bounds)

    @contextmanager
    def own_kv_cache(self, num_blocks: int, is_profiling: bool) -> Iterator[None]:
        """While vLLM sets up its KV cache: bind every layer to our arena instead, when there are
        two tiers.
        """
        self.tiers = None
        if not self._two_tiers:
            yield
            return
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        layers = self._num_layers
        if is_profiling:
            # vLLM captures a few graphs to learn what they take; they read the null frame only.
            hot = self.config.table_pages(model.max_model_len)
            plan = TierPlan(num_blocks, layers, hot, 1, 0, 0, 0, {})
        else:
            plan = replace(self.plan, num_pages=min(self.plan.num_pages, num_blocks))
        try:
            with torch.inference_mode():
                self.tiers = TieredKV(
                    plan,
                    num_layers=layers,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=model.get_head_size(),
                    dtype=model.dtype,
                    max_requests=scheduler.max_num_seqs,
                    max_rows=max_table_rows(self.vllm_config),
                    table_pages=self.config.table_pages(model.max_model_len),
                    max_pages=pages_for(model.max_model_len),
                    keep_unreferenced=bool(self.vllm_config.cache_config.enable_prefix_caching),
                    timed=self.config.stats,
                    device=self.device,
                )
        except HostPoolError as error:
            raise ConfigError(f"additional_config.{CONFIG_KEY}.{error}") from None
        with allocate_kv_cache_as(self.tiers.arena):
            yield

    @torch.inference_mode()
    def begin_step(self, scheduler_output: Any) -> None:
        """Let the tiers follow what the scheduler decided, and publish figures."""
        if self.tiers is not None:
            self._follow(self.tiers, scheduler_output)
        self._exporter.step(idle=not scheduler_output.total_num_scheduled_tokens)

    def _follow(self, tiers: TieredKV, out: Any) -> None:
        """Pages handed out, requests gone, rows that decode, pages that are written."""
        cached = out.scheduled_cached_reqs
        released = [*out.finished_req_ids, *(out.preempted_req_ids or ())]
        for name in out.finished_req_ids:
            self._prefill_ends.pop(name, None)
        started, grown, written, computed_tokens = [], [], [], {}
        for request in out.scheduled_new_reqs:
            # The V2 runner is told of a resumed request's own tokens as well, which it computes
            # like a prompt.
            self._prefill_ends[request.req_id] = len(
                request.prefill_token_ids or request.prompt_token_ids
            )
            computed_tokens[request.req_id] = request.num_computed_tokens
            started.append(
                StartedRequest(
                    request.req_id,
                    list(request.block_ids[0]),
                    pages_for(request.num_computed_tokens),
                )
            )
            # A session goes on within a page.
            written.append((request.req_id, request.num_computed_tokens // 16))
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed_tokens[name] = computed
            if name in cached.resumed_req_ids:
                released.append(name)
                started.append(StartedRequest(name, list(blocks[0]), pages_for(computed)))
                continue
            written.append((name, computed // 16))
            if blocks is not None and blocks[0]:
                grown.append((name, list(blocks[0])))
        decoding, prefilling = [], []
        for name, tokens in out.num_scheduled_tokens.items():
            is_prefill = tokens > 1 or computed_tokens[name] < self._prefill_ends[name]
            (prefilling if is_prefill else decoding).append(name)
        tiers.begin_step(released, started, grown, decoding, prefilling, written)
        now = time.monotonic()
        if self.config.stats and now >= self._next_report:
            self._next_report = now + REPORT_SECONDS
            if (report := tiers.report()) is not None:
                logger.info("SpeContext tiers: %s.", report)

    # -- one engine
    # -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def bind(self, builders: Sequence[SpeContextMetadataBuilder], num_blocks: int) -> None:
        """Take over the page table of the engine's one attention group and allocate the head's
        caches.

        Raises:
            ConfigError: the model's layers do not share one KV shape.
        """
        if len(builders) != 1 or not isinstance(builders[0], SpeContextMetadataBuilder):
            raise ConfigError(
                "model: its layers need more than one attention group (their KV heads or head "
                "sizes differ), but "
                "--attention-backend specontext makes one selection for all layers; serve it with "
                "another backend."
            )
        self.builder = builders[0]
        table, fitted = self.builder.table, self.vllm_config.model_config.max_model_len
        if fitted < self._max_model_len:
            # --max-model-len auto: vLLM measures the room for KV first, when the head is long
            # there.
            if self.tiers is not None and table.max_pages < self.config.table_pages(
                self._max_model_len
            ):
                raise ConfigError(
                    f"--max-model-len: found auto, which vLLM fitted to {fitted}, less than the "
                    "budget for which the two tiers were laid out; "
                    f"set --max-model-len {fitted}, or a smaller budget."
                )
            if (
                self.config.reads_everything(self._max_model_len) is None
                and (sentence := self.config.reads_everything(fitted)) is not None
            ):
                logger.warning(sentence)
            self.retriever.shrink(fitted, table.max_pages)
        self.retriever.allocate_cache(num_blocks)
        if self.tiers is not None:
            self.tiers.bind(table.pages, table.lengths)
        self.builder.provider.warm_up(table)
        self.retriever.warm_up(table.pages, table.lengths, self._ids(1), self._stickiness())
        if self.selector is not None:
            self.selector.allocate(
                self._num_layers, num_blocks, self.vllm_config.model_config.dtype
            )
        for layer, impl in enumerate(self._attention_layers()):
            impl.tiers, impl.selector, impl.layer = self.tiers, self.selector, layer
        if self._exporter is not None:
            self._exporter.close()
        self._exporter = Exporter(self.vllm_config, self.retriever, self.tiers, self.device)

    def _attention_layers(self) -> list[SpeContextImpl]:
        layers = self.vllm_config.compilation_config.static_forward_context
        return [
            layers[name].impl for name in sorted(self.builder.layer_names, key=extract_layer_index)
        ]

    def _make_selector(self, config: SpeContextConfig) -> LayerSelector:
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        return LayerSelector(
            config,
            num_heads=model.get_num_attention_heads(parallel),
            num_kv_heads=self.num_kv_heads,
            head_dim=model.get_head_size(),
            max_pages=pages_for(model.max_model_len),
            max_rows=max_table_rows(self.vllm_config),
            device=self.device,
        )

    def _ids(self, rows: int) -> Tensor | None:
        """What the selection lists instead of blocks: with two tiers, pages counted from the
        request's start.
        """
        return None if self.tiers is None else self._page_ids.expand(rows, -1)

    def _stickiness(self) -> Stickiness | None:
        tiers, stickiness = self.tiers, self.retriever.config.stickiness
        return (
            None
            if tiers is None or not stickiness
            else Stickiness(tiers.lanes, tiers.hot.slot_of, math.log1p(stickiness))
        )

    def before_forward(self, batch: StepBatch) -> None:
        """Fill the page table and let the attention provider plan the step."""
        table, tiers, decodes = self.builder.table, self.tiers, batch.num_decodes
        behind = None
        if tiers is not None:
            tiers.place_rows(batch.names[:decodes], batch.table_rows)

            def behind() -> None:
                tiers.resolve(
                    table.pages, table.lengths, batch.seq_lens, batch.block_table, batch.table_rows
                )

        with self._timed(batch, self._exporter.select):
            self.retriever.before_forward(
                batch,
                table.pages,
                table.lengths,
                self._ids(batch.table_rows),
                self._stickiness(),
                behind,
            )
            if tiers is not None:
                tiers.fetch_misses(batch.table_rows)
        self._exporter.counted()
        if tiers is not None:
            tokens = sum(batch.query_lens[decodes:])
            tiers.begin_prefill(
                batch.block_table[decodes:],
                batch.positions[batch.num_tokens - tokens :],
                batch.seq_lens_bound[decodes:],
                batch.query_lens[decodes:],
            )
        if batch.table_rows:
            self.builder.provider.plan(table, batch.table_rows)

    def after_forward(self, batch: StepBatch, aux: Sequence[Tensor] | None) -> None:
        """Hand the step's auxiliary hidden states to the head."""
        if aux is not None:
            with self._timed(batch, self._exporter.learn):
                self.retriever.after_forward(batch, aux)

    def _timed(self, batch: StepBatch, watch: Stopwatch) -> AbstractContextManager[None]:
        return watch.lap() if self.config.stats and batch.num_decodes else nullcontext()

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures since the last reset; see ``LocalRetriever.stats`` and ``TieredKV.stats``."""
        return {
            **self.retriever.stats(reset),
            **({} if self.tiers is None else self.tiers.stats(reset)),
        }

    def close(self) -> None:
        """Let go of what outlives this object: the worker's figures in /metrics, and the sidecar's
        actor.
        """
        if self._exporter is not None:
            self._exporter.close()
        if isinstance(self.retriever, RemoteRetriever):
            self.retriever.close()

    def set(
        self,
        retriever: str | None = None,
        budget: int | None = None,
        *,
        recent_tokens: int | None = None,
        stickiness: float | None = None,
        confidence_threshold: float | None = None,
        fallback_budget: int | None = None,
    ) -> dict[str, Any]:
        """Change settings of the selection between steps, None: leave as it is; see
        ``LocalRetriever.configure``.

        Raises:
            ConfigError: one sentence when the settings cannot be, or this engine cannot follow; the
                ones before stay in force.
        """
        asked = {
            "retriever": retriever,
            "budget": budget,
            "recent_tokens": recent_tokens,
            "stickiness": stickiness,
            "confidence_threshold": confidence_threshold,
            "fallback_budget": fallback_budget,
        }
        changes = {key: value for key, value in asked.items() if value is not None}
        config = SpeContextConfig.from_settings(
            {**self.retriever.config.model_dump(exclude_unset=True), **changes}
        )
        self._check_per_layer(config)
        self.retriever.configure(config)
        exact, at_start = (
            settings.exact_tokens(self._max_model_len) for settings in (config, self.config)
        )
        if exact < at_start and not self.config.cache_generated:
            logger.warning(
                "SpeContext: contexts over %d tokens are read in part now, but generated pages "
                "still enter the prefix cache up to %d, as the engine was "
                "started; what hits them may answer otherwise than with a cold cache.",
                exact,
                at_start,
            )
        if self.selector is None and config.retriever in PER_LAYER:
            self.selector = self._make_selector(config)
            for impl in self._attention_layers():
                impl.selector = self.selector
        if self.selector is not None:
            self.selector.config = config
        return config.model_dump()

    def _check_per_layer(self, config: SpeContextConfig) -> None:
        """Refuse what a retriever that selects per layer cannot change any more."""
        before = self.retriever.config
        if config.retriever == "quest" and (self.selector is None or self.selector.bounds is None):
            raise ConfigError(
                "specontext: retriever quest keeps bounds of every page from the start; start the "
                "engine with it to switch to it."
            )
        captured = self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        if captured and {before.retriever, config.retriever} & set(PER_LAYER) and before != config:
            raise ConfigError(
                "specontext: this engine's CUDA graphs hold the selection (retriever "
                f"{before.retriever}, budget {before.budget}); start it "
                f"with enforce_eager to change them, or with the settings wanted."
            )
