"""What our workers add to vLLM's: room for the head's caches, and answers to ``collective_rpc``."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.specontext")


class SpeContextWorkerMixin:
    """What both workers add to vLLM's."""

    def determine_available_memory(self) -> int:
        """Bytes for KV: vLLM's figure less the share of the head's caches; with a host pool, what both tiers hold."""
        available = super().determine_available_memory()
        runtime = self.model_runner.runtime
        per_block = sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())
        if runtime.config.gpu_kv_gib is not None:
            available = min(available, int(runtime.config.gpu_kv_gib * 2**30))
        if runtime.config.host_kv_gib:
            return runtime.plan_tiers(available) * per_block
        share = runtime.kv_share(per_block)
        logger.info("SpeContext: the head's caches take %.1f %% of the KV memory.", 100 * (1 - share))
        return int(available * share)

    def shutdown(self) -> None:
        """Take the figures out of /metrics and end the sidecar's actor, if there is one, before vLLM's worker lets go of the rest."""
        if (runtime := getattr(getattr(self, "model_runner", None), "runtime", None)) is not None:
            runtime.close()
        super().shutdown()

    def specontext_stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures of this worker's decode steps since the last reset; see ``Retriever.stats``."""
        return self.model_runner.runtime.stats(reset)

    def specontext_audit(self) -> dict[str, int]:
        """Check the books of the two tiers; see ``Ledger.audit``. Empty without a host pool."""
        tiers = self.model_runner.runtime.tiers
        return {} if tiers is None else tiers.ledger.audit()

    def specontext_set(self, **changes: Any) -> dict[str, Any]:
        """Change settings between steps; see ``Runtime.set``. The settings in force are returned."""
        return self.model_runner.runtime.set(**changes)
