"""What our workers add to vLLM's: memory for the head's caches, and answers to
``collective_rpc``.

vLLM: its worker for GPUs, from which the CPU's derives too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.kv_group import expected_block
from specontext_vllm.engine.last_word import pass_to_front_end
from specontext_vllm.engine.memory import cap_bytes
from specontext_vllm.engine.names import METRICS_FOLDER
from specontext_vllm.retrieval.checkpoint import HeadError

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    # The base of both, which is not imported before vLLM imports a worker's module.
    Worker = object

STARTING = (
    "init_device",
    "load_model",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
"""What vLLM calls of a worker until the engine has started."""


class SpeContextWorkerMixin(Worker):
    """What both workers add to vLLM's. A refusal is also told to the front end, to be its last
    word.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in STARTING:
            setattr(cls, name, _telling_front_end(getattr(cls, name)))

    def determine_available_memory(self) -> int:
        """Bytes for KV: vLLM's figure less the share of the head's caches; with a host pool, what
        both tiers hold.

        Overrides: vllm.v1.worker.gpu_worker.Worker.determine_available_memory
        """
        available = super().determine_available_memory()
        runtime = self.model_runner.runtime
        block = expected_block(self.vllm_config, self.get_kv_cache_spec(), runtime.layers.kv_names)
        if (cap := cap_bytes(runtime.config)) is not None:
            available = min(available, cap)
        return runtime.kv_plan.num_blocks(available, block) * block.num_bytes

    def shutdown(self) -> None:
        """Take the figures out of /metrics and end the sidecar's actor, if there is one, before
        vLLM's worker lets go of the rest.

        Overrides: vllm.v1.worker.gpu_worker.Worker.shutdown
        """
        if (runtime := getattr(getattr(self, "model_runner", None), "runtime", None)) is not None:
            runtime.close()
        super().shutdown()

    def specontext_lanes(self) -> int | None:
        """Requests that may run at once; see ``KVPlan.lanes``."""
        return self.model_runner.runtime.kv_plan.lanes

    def specontext_stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures of this worker's decode steps since the last reset; see ``Runtime.stats``."""
        return self.model_runner.runtime.stats(reset)

    def specontext_audit(self) -> dict[str, int]:
        """Check the accounting of the two tiers; see ``Runtime.audit``."""
        return self.model_runner.runtime.audit()

    def specontext_set(self, **changes: Any) -> dict[str, Any]:
        """Change settings between steps, and return those in force; see ``LiveSettings.change``."""
        return self.model_runner.runtime.settings.change(**changes)


def _telling_front_end(method: Any) -> Any:
    """A worker's ``method``, whose refusal is told to the front end on its way out."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (ConfigError, HeadError) as error:
            pass_to_front_end(
                getattr(self.vllm_config.observability_config, METRICS_FOLDER, None), error
            )
            raise

    return call
