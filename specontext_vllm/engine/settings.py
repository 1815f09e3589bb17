"""Settings of the selection that change while an engine runs (``specontext_set``).

vLLM: its log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.retrieval.layer_selection import LayerSelector

logger = init_logger("vllm.specontext")

CHANGEABLE = (
    "retriever",
    "rule_settings",
    "budget",
    "recent_tokens",
    "sink_tokens",
    "stickiness",
    "confidence_threshold",
    "fallback_budget",
)
"""Settings that a running engine can change."""


class LiveSettings:
    """The settings of one worker, and how they change between steps.

    Args:
        at_start: those that the engine was started with.
        max_model_len: longest context that the engine was started with, in tokens.
        captured: vLLM's graphs hold decode steps, and with them a selection that is made per layer.
        step: has the settings in force.
        selector: what selects per layer, if anything does so far.
        install_selector: makes such a selector and hands it to the layers.
    """

    def __init__(
        self,
        at_start: SpeContextConfig,
        max_model_len: int,
        *,
        captured: bool,
        step: DecodeStep,
        selector: LayerSelector | None,
        install_selector: Callable[[SpeContextConfig], LayerSelector],
    ) -> None:
        self._at_start, self._max_model_len = at_start, max_model_len
        self._captured, self._step = captured, step
        self._selector, self._install_selector = selector, install_selector

    def change(self, **asked: Any) -> dict[str, Any]:
        """Change settings of ``CHANGEABLE`` between steps, None: leave as it is. The settings in
        force are returned.

        Raises:
            ConfigError: one sentence when the settings cannot be, or this engine cannot follow; the
                ones before stay in force.
        """
        changes = {key: value for key, value in asked.items() if value is not None}
        fixed = SpeContextConfig.model_fields.keys() - set(CHANGEABLE)
        if key := next((key for key in changes if key in fixed), None):
            raise ConfigError(
                f"specontext: {key}: found {changes[key]!r}, which cannot change while an engine "
                f"runs, as {', '.join(CHANGEABLE)} can; start the engine with it."
            )
        if "retriever" in changes:
            # Those of another rule say nothing to this one.
            changes.setdefault("rule_settings", {})
        config = SpeContextConfig.from_settings(
            {**self._step.retriever.config.model_dump(exclude_unset=True), **changes}
        )
        self._refuse_per_layer(config)
        self._step.configure(config)
        self._warn_of_prefix_cache(config)
        self._warn_of_fallbacks(config)
        self._warn_of_small_budgets(config)
        if self._selector is None and config.rule.per_layer:
            self._selector = self._install_selector(config)
        if self._selector is not None:
            self._selector.configure(config)
        return config.model_dump()

    def _refuse_per_layer(self, config: SpeContextConfig) -> None:
        """Refuse what a rule that selects per layer cannot change any more."""
        before = self._step.retriever.config
        if config.rule.per_layer and self._step.num_drafts and not config.is_lossless:
            raise ConfigError(
                f"specontext: retriever {config.retriever} selects in each layer, for one query "
                "token a row, and this engine verifies drafts; start it without "
                "--speculative-config."
            )
        selector = self._selector
        knows_pages = selector is not None and selector.knows_pages_for(config.rule)
        if config.rule.page_vectors and not knows_pages:
            raise ConfigError(
                f"specontext: retriever {config.retriever} keeps vectors of every page from the "
                "start; start the engine with it to switch to it."
            )
        per_layer = before.rule.per_layer or config.rule.per_layer
        if self._captured and per_layer and before != config:
            raise ConfigError(
                "specontext: this engine's CUDA graphs hold the selection (retriever "
                f"{before.retriever}, budget {before.budget}); start it "
                f"with enforce_eager to change them, or with the settings wanted."
            )

    def _warn_of_fallbacks(self, config: SpeContextConfig) -> None:
        """The page table holds what the settings' own fallback reads; a request may ask for more
        than their budget, by the settings of the start, and would fall back to more.
        """
        if not (config.confidence_threshold and config.rule.needs_head):
            return
        asked = self._at_start.largest_budget(self._max_model_len)
        wanted = min(pages_for(self._max_model_len), config.fallback_pages_of(asked))
        held = self._step.selection.pages.shape[1] - pages_for(self._step.num_drafts)
        if wanted > held:
            logger.warning(
                "SpeContext: requests may still ask for a budget of %d tokens, and fall back to %d "
                "instead of %d, since this engine's page table holds no more; set fallback_budget, "
                "or start it with this confidence_threshold.",
                asked,
                held * PAGE_SIZE,
                wanted * PAGE_SIZE,
            )

    def _warn_of_small_budgets(self, config: SpeContextConfig) -> None:
        least = self._at_start.min_budget
        if config.min_budget > least:
            logger.warning(
                "SpeContext: requests may still ask for a budget of %d tokens; one under %d reads "
                "%d, since sinks, recents and a page to choose need as many now.",
                least,
                config.min_budget,
                config.min_budget,
            )

    def _warn_of_prefix_cache(self, config: SpeContextConfig) -> None:
        exact, at_start = (
            settings.exact_tokens(self._max_model_len) for settings in (config, self._at_start)
        )
        if exact < at_start and not self._at_start.cache_generated:
            logger.warning(
                "SpeContext: contexts over %d tokens are read in part now, but generated pages "
                "still enter the prefix cache up to %d, as the engine was "
                "started; what hits them may answer otherwise than with a cold cache.",
                exact,
                at_start,
            )
