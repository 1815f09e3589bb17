"""The V1 runner's drafter in lossless mode: the target itself.

vLLM: the drafter to derive from.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.spec_decode.draft_model import DraftModelProposer


class SelfDrafter(DraftModelProposer):
    """A draft model that has neither weights nor layers of its own; the runner drafts."""

    def load_model(self, target_model: Any) -> None:
        """Loads nothing.

        Overrides: vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.load_model
        """

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """There are no other layers than the target's.

        Overrides:
            vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.initialize_attn_backend
        """

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """The target has just made its own.

        Overrides: vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.dummy_run
        """
