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
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.utils import extract_layer_index

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.backend import SpeContextImpl, SpeContextMetadataBuilder, max_table_rows
from specontext_vllm.engine.compat import allocate_kv_cache_as
from specontext_vllm.engine.find_head import load_head, num_hidden_layers
from specontext_vllm.engine.kv_plan import plan_one_tier, plan_two_tiers
from specontext_vllm.engine.memory import memory_model
from specontext_vllm.engine.metrics import Exporter
from specontext_vllm.engine.names import AUX_LAYERS_KEY
from specontext_vllm.engine.refusals import refuse_captured_writes
from specontext_vllm.engine.scheduled import ScheduleReader
from specontext_vllm.engine.settings import LiveSettings
from specontext_vllm.engine.stopwatch import Stopwatch
from specontext_vllm.residency.host_pool import HostPoolError
from specontext_vllm.residency.memory_model import MemoryModel, TierPlan
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, describe_aux_layers
from specontext_vllm.retrieval.graphs import StepGraphs
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.shard import shard_checkpoint
from specontext_vllm.sidecar.remote import RemoteRetriever
from specontext_vllm.step_data import Selection, StepBatch, Stickiness

logger = init_logger("vllm.specontext")

REPORT_SECONDS = 10
"""Time between two lines about the tiers in the log, as between vLLM's own."""


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
        self.selector = self._make_selector(self.config) if self.config.rule.per_layer else None
        self.builder: SpeContextMetadataBuilder | None = None
        self.plan: TierPlan | None = None
        self._two_tiers = bool(self.config.host_kv_gib)
        self.tiers: TieredKV | None = None
        self._schedule = ScheduleReader()
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
        return StepGraphs(self.device) if captured and not self.config.rule.per_layer else None

    @property
    def graph_bytes(self) -> int:
        """GPU memory that graphs of our own may take while the engine serves."""
        return 0 if self._graphs is None else self._graphs.most_bytes

    @property
    def reads_aux(self) -> bool:
        """Whether the model must return auxiliary hidden states."""
        return self.retriever.reads_aux

    def plan_pages(self, gpu_bytes: int) -> int:
        """Logical pages that vLLM's scheduler may hand out when there are ``gpu_bytes`` of GPU
        memory for KV: what they hold beside the head's caches, together with the host pool. All
        workers must call it together.

        Raises:
            ConfigError: a sentence with the numbers when that is too little.
        """
        memory = self._memory_model()
        if not self.config.host_kv_gib:
            return plan_one_tier(self.vllm_config, memory, gpu_bytes)
        self.plan = plan_two_tiers(self.vllm_config, memory, gpu_bytes)
        self._two_tiers = self.plan.host_layers > 0
        return self.plan.num_pages

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
        tiers.follow(self._schedule.read(out))
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
        self._selection = Selection.into(table)
        if self.tiers is not None:
            self.tiers.bind(self._selection)
        self.builder.provider.warm_up(table)
        self.retriever.warm_up(table.pages, table.lengths, self._ids(1), self._stickiness())
        if self.selector is not None:
            self.selector.allocate(
                self._num_layers, num_blocks, self.vllm_config.model_config.dtype
            )
        for layer, impl in enumerate(self._attention_layers()):
            impl.tiers, impl.selector, impl.layer = self.tiers, self.selector, layer
        self.settings = LiveSettings(
            self.config,
            self._max_model_len,
            captured=self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
            retriever=self.retriever,
            selector=self.selector,
            install_selector=self._install_selector,
        )
        if self._exporter is not None:
            self._exporter.close()
        self._exporter = Exporter(self.vllm_config, self.retriever, self.tiers, self.device)

    def _attention_layers(self) -> list[SpeContextImpl]:
        layers = self.vllm_config.compilation_config.static_forward_context
        return [
            layers[name].impl for name in sorted(self.builder.layer_names, key=extract_layer_index)
        ]

    def _install_selector(self, config: SpeContextConfig) -> LayerSelector:
        self.selector = self._make_selector(config)
        for impl in self._attention_layers():
            impl.selector = self.selector
        return self.selector

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
        return None if tiers is None or not stickiness else tiers.stickiness(math.log1p(stickiness))

    def before_forward(self, batch: StepBatch) -> None:
        """Fill the page table and let the attention provider plan the step."""
        table, tiers, decodes = self.builder.table, self.tiers, batch.num_decodes
        behind = None
        if tiers is not None:
            tiers.place_rows(batch.names[:decodes], batch.table_rows)

            def behind() -> None:
                tiers.resolve(self._selection, batch)

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
                tiers.fetch(batch.table_rows)
        self._exporter.counted()
        if tiers is not None:
            tiers.stage(batch)
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

    def set(self, *args: Any, **changes: Any) -> dict[str, Any]:
        """Change settings between steps; see ``LiveSettings.change``."""
        return self.settings.change(*args, **changes)
