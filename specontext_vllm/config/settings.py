"""The settings, read from ``additional_config["specontext"]``, and what follows from them."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError, model_validator

from specontext_vllm.config.errors import CONFIG_KEY, ConfigError, sentence_of
from specontext_vllm.config.exclusions import refuse_exclusions
from specontext_vllm.config.fields import SettingFields
from specontext_vllm.config.pages import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.rules import Rule, find_rule


class SpeContextConfig(SettingFields):
    """The settings of an engine, which do not exclude each other."""

    @model_validator(mode="after")
    def _no_exclusions(self) -> SpeContextConfig:
        refuse_exclusions(self)
        return self

    @property
    def rule(self) -> type[Rule]:
        """The rule that ``retriever`` names, to ask for its needs."""
        return find_rule(self.retriever)

    @property
    def is_lossless(self) -> bool:
        """Whether selected pages make drafts only."""
        return self.mode == "lossless"

    def reading_everything(self) -> SpeContextConfig:
        """These settings, with every decode step reading its whole context."""
        return self.model_copy(update={"retriever": "dense", "rule_settings": {}})

    @property
    def budget_pages(self) -> int:
        return self.budget // PAGE_SIZE

    @property
    def min_budget(self) -> int:
        """The smallest budget: sinks, recents and one page to choose."""
        return PAGE_SIZE * (self.sink_pages + self.recent_pages + 1)

    def largest_budget(self, max_model_len: int) -> int:
        """Tokens of the largest budget that a request may have; ``PAGE_SIZE`` times the pages of
        the longest context where it may read all.
        """
        if self.max_budget == "full" or self.rule.reads_everything:
            return pages_for(max_model_len) * PAGE_SIZE
        return self.budget if self.max_budget is None else self.max_budget

    def exact_tokens(self, max_model_len: int, budget: int | None = None) -> int:
        """Leading tokens of a context whose KV is that of dense attention, since the steps that
        make it read all of it.

        Args:
            budget: the request's own, in tokens.
        """
        if self.rule.reads_everything or self.is_lossless:
            return max_model_len
        budget = self.budget if budget is None else budget
        return min(max_model_len, budget // PAGE_SIZE * PAGE_SIZE)

    @property
    def sink_pages(self) -> int:
        """Pages read from the start: at least one, as token 0 has no pair in the head's K cache."""
        return pages_for(self.sink_tokens)

    @property
    def recent_pages(self) -> int:
        """Pages read at the end: the newest holds one token at least, the others are full."""
        return pages_for(self.recent_tokens - 1) + 1

    def fallback_pages_of(self, budget: int) -> int:
        """Pages of a request with a budget of so many tokens, whose confidence is under the
        threshold.
        """
        wider = 4 * budget if self.fallback_budget is None else self.fallback_budget
        return max(budget, wider) // PAGE_SIZE

    def table_pages(self, max_model_len: int, num_drafts: int = 0) -> int:
        """Columns of the page table: the most pages one KV head of one request may read in a step,
        those that its drafts begin included.

        With a sidecar that is its whole context, since requests are read whole while the actor is
        away, and so it is where drafts are verified over all of it.
        """
        whole = pages_for(max_model_len)
        if self.sidecar == "ray" or self.is_lossless:
            return whole
        return min(whole, self.selection_pages(max_model_len) + pages_for(num_drafts))

    def allocated_table_pages(
        self, max_model_len: int, device_type: str, num_drafts: int = 0
    ) -> int:
        """Columns that the page table has from the start. On a CPU without a host pool nothing is
        captured and memory is plenty: whole contexts fit, and any budget may be set later.
        """
        if device_type == "cpu" and not self.host_kv_gib:
            return pages_for(max_model_len)
        return self.table_pages(max_model_len, num_drafts)

    def selection_pages(self, max_model_len: int) -> int:
        """Pages that the rule may select for one KV head of one request."""
        budget = self.largest_budget(max_model_len)
        falls_back = self.confidence_threshold > 0
        selected = self.fallback_pages_of(budget) if falls_back else budget // PAGE_SIZE
        return min(pages_for(max_model_len), selected)

    def reads_everything(self, max_model_len: int) -> str | None:
        """One sentence if no decode step of contexts up to ``max_model_len`` tokens will leave
        anything out.
        """
        where = f"additional_config.{CONFIG_KEY}"
        if self.rule.reads_everything:
            return (
                f"{where}.retriever: found {self.retriever!r}, so every decode step reads its "
                "whole context; leave it out, unless a baseline is wanted."
            )
        if self.budget_pages >= pages_for(max_model_len):
            return (
                f"{where}.budget: found {self.budget}, which holds the longest context there can "
                f"be (--max-model-len {max_model_len}), so nothing "
                "will be sparse but requests with a smaller specontext_budget; lower budget, or "
                "serve longer contexts."
            )
        return None

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SpeContextConfig:
        """Read ``additional_config["specontext"]`` (absent: defaults).

        Raises:
            ConfigError: one sentence naming the key, what was found and what to do.
        """
        given = additional_config if isinstance(additional_config, dict) else {}
        if CONFIG_KEY not in given and (
            close := [
                key
                for key in given
                if difflib.get_close_matches(str(key).lower(), [CONFIG_KEY], cutoff=0.8)
            ]
        ):
            raise ConfigError(
                f"additional_config: found the key {close[0]!r}, which nothing reads; this "
                f"plugin's settings are under {CONFIG_KEY!r}."
            )
        if misplaced := [key for key in given if key in cls.model_fields]:
            raise ConfigError(
                f"additional_config: found the key {misplaced[0]!r} beside or without "
                f"{CONFIG_KEY!r}, where nothing reads it; put it under {CONFIG_KEY!r}, as in "
                f'{{"{CONFIG_KEY}": {{"{misplaced[0]}": ...}}}}.'
            )
        return cls.from_settings(given.get(CONFIG_KEY, {}))

    @classmethod
    def from_settings(cls, settings: Any) -> SpeContextConfig:
        """Validate a dict of settings; see ``from_additional_config``."""
        if not isinstance(settings, dict):
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}: found {settings!r}, expected an object such as "
                '{"budget": 2048}.'
            )
        try:
            return cls(**settings)
        except ValidationError as error:
            sentence = sentence_of(error.errors()[0], list(cls.model_fields))
            raise ConfigError(sentence) from None
