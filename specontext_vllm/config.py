"""The plugin's settings: one validated model of ``additional_config["specontext"]``."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from specontext_vllm.retrieval.rules import Rule, find_rule, listed_rules, rule_names

PAGE_SIZE = 16
"""Tokens in a page, the unit that is scored, selected and read. A block of vLLM's holds one or
several.
"""

CONFIG_KEY = "specontext"
AttentionProviderName = Literal["auto", "flash", "triton", "xformers"]
HeadKeyDtype = Literal["auto", "fp8", "model"]
Loading = Literal["adaptive", "elastic", "plain"]
Mode = Literal["sparse", "lossless"]


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one sentence naming the setting, what was found
    and what to do.
    """


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` tokens from the start of a page."""
    return -(-tokens // PAGE_SIZE)


class SpeContextConfig(BaseModel):
    """Settings of the specontext backend. All sizes are in tokens per KV head and request."""

    # strict: true is not 1, nor is "512" 512.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    retrieval_head: str | None = Field(
        default=None,
        description=(
            "Folder or hub id of an EAGLE-3 checkpoint (SafeAILab, SpecForge or speculators "
            "format) or of a head in our own format, or `dummy`: random weights, for benchmarks. "
            "Default: `retrieval_head/` in "
            "the model's folder, else the published head that configs/known_heads.yaml names for "
            "the model."
        ),
    )
    budget: int = Field(
        default=2048,
        gt=0,
        description=(
            "Tokens per KV head that a decode step reads, sink and recent tokens included. A "
            "context within the budget is read whole. At least the sink pages, the recent pages "
            "and one page more: 112 with the defaults."
        ),
    )
    max_budget: int | Literal["full"] | None = Field(
        default=None,
        description=(
            "Largest budget that a request may ask for with `specontext_budget`; `full`: whole "
            "contexts, and `specontext_mode` `dense`. The page tables, and with a host pool the "
            "hot buffers, are made for it. Default: `budget`, so that requests may only lower it."
        ),
    )
    mode: Mode = Field(
        default="sparse",
        description=(
            "`sparse`: answers are made over the selected pages. `lossless`: only drafts are; "
            "the model verifies them over the whole context, and the answers are those of dense "
            "attention."
        ),
    )
    sink_tokens: int = Field(
        default=16,
        ge=1,
        description="Tokens from the start of the context that are always read.",
    )
    recent_tokens: int = Field(
        default=64,
        ge=1,
        description="Newest tokens, which are always read.",
    )
    retriever: str = Field(
        default="dlm",
        json_schema_extra=lambda schema: schema.update(enum=[*listed_rules()]),
        description=("What decides which pages are read: the rule that gives them their scores."),
    )
    rule_settings: dict[str, Any] = Field(
        default={},
        description=(
            "Settings of the rule that `retriever` names, by name. The rules above have none."
        ),
    )
    head_key_dtype: HeadKeyDtype = Field(
        default="auto",
        description=(
            "What the head's keys are kept in: `fp8` (8-bit floats, e4m3), or `model` (the "
            "model's dtype). `auto`: fp8 from compute capability 9.0 on (H100), else the model's "
            "dtype."
        ),
    )
    confidence_threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description=(
            "Share of the head's attention that must lie on the selected pages; a request under "
            "it reads `fallback_budget` tokens in that step. 0: off."
        ),
    )
    fallback_budget: int | None = Field(
        default=None,
        gt=0,
        description=(
            "Tokens that a request under `confidence_threshold` reads, no fewer than `budget`. "
            "Default: four times `budget`."
        ),
    )
    host_kv_gib: float | Literal["auto"] = Field(
        default=0.0,
        description=(
            "GiB of this machine's memory that hold KV beyond the GPU's, shared by its workers. "
            "`auto`: what is free (in the container), less a tenth and at least 8 GiB, and no "
            "more than `--max-num-seqs` requests of full length fill. 0: off."
        ),
    )
    gpu_kv_gib: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Cap in GiB on the GPU memory for KV, the head's caches included. Default: all that "
            "vLLM grants."
        ),
    )
    stickiness: float = Field(
        default=1.0,
        ge=0.0,
        description=(
            "With a host pool: a page that must be fetched has to score 1 + stickiness times a "
            "page that is on the GPU. 1: twice as much. 0: off."
        ),
    )
    loading: Loading = Field(
        default="adaptive",
        description=(
            "With a host pool: `adaptive` offloads as few layers as the load allows. The others "
            "are for comparison: `elastic` always offloads every layer; with `plain` each of them "
            "also fetches, when it runs, all that it reads."
        ),
    )
    cache_generated: bool = Field(
        default=False,
        description=(
            "Keep pages of generated tokens beyond the budget in the prefix cache. The next turn "
            "of a conversation starts sooner, but may be answered otherwise than with a cold "
            "cache, since their KV was made under sparse attention."
        ),
    )
    allow_pickle: bool = Field(
        default=False,
        description=(
            "Read a head's `pytorch_model.bin` (tensors only) where it has no safetensors."
        ),
    )
    retrieval_head_revision: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Commit, tag or branch of a head on the hub. Default: what configs/known_heads.yaml "
            "pins, else `main`."
        ),
    )
    sidecar: Literal["inline", "ray"] = Field(
        default="inline",
        description=(
            "Where the head runs: `inline`, in vLLM's worker; `ray`, in a Ray actor on another "
            "device (extra `sidecar`)."
        ),
    )
    sidecar_gpus: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description=(
            "GPUs, or the fraction of one, that the actor asks Ray for. 0: it runs on a CPU."
        ),
    )
    sidecar_cpus: int = Field(
        default=1,
        ge=1,
        description="CPU cores that the actor asks Ray for.",
    )
    attention_provider: AttentionProviderName = Field(
        default="auto",
        description=(
            "Whose attention kernels run the prefill. Decode over page tables is our own kernel "
            "with `flash` and `triton`; `xformers` (extra of that name) brings its own. `auto`: "
            "FlashAttention where vLLM has it for the GPU, dtype and head size, else Triton; "
            "vLLM's own C++ attention on a CPU."
        ),
    )
    stats: bool = Field(
        default=True,
        description=(
            "Count the pages that decode steps read, for `/metrics` and "
            '`collective_rpc("specontext_stats")`.'
        ),
    )

    @field_validator("retriever")
    @classmethod
    def _rule_exists(cls, value: str) -> str:
        if value not in rule_names():
            raise ValueError(f"retriever: found {value!r}; use one of {', '.join(listed_rules())}.")
        return value

    @field_validator("max_budget", mode="before")
    @classmethod
    def _largest_is_a_budget(cls, value: Any) -> int | str | None:
        if value is not None and value != "full" and (type(value) is not int or value <= 0):
            raise ValueError(
                f'max_budget: found {value!r}; give tokens, no fewer than budget, or "full".'
            )
        return value

    @field_validator("host_kv_gib", mode="before")
    @classmethod
    def _pool_is_a_size(cls, value: Any) -> float | str:
        if value == "auto":
            return value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise ValueError(f'host_kv_gib: found {value!r}; give 0 or more GiB, or "auto".')
        return float(value)

    @model_validator(mode="after")
    def _room_for_choice(self) -> SpeContextConfig:
        if self.budget < self.min_budget:
            raise ValueError(
                f"budget: found {self.budget}, but sinks ({self.sink_pages} pages), recents "
                f"({self.recent_pages} pages) and one page to choose need {self.min_budget} "
                f"tokens; raise budget or lower sink_tokens ({self.sink_tokens}) or recent_tokens "
                f"({self.recent_tokens})."
            )
        if self.rule.per_layer and self.host_kv_gib:
            raise ValueError(
                f"host_kv_gib: found {self.host_kv_gib} with retriever {self.retriever}, which "
                "chooses pages too late for them to be fetched; set it to 0 or use another "
                "retriever."
            )
        if (
            self.head_key_dtype != "auto"
            and not self.rule.needs_head
            and self.retrieval_head is None
        ):
            raise ValueError(
                f"head_key_dtype: found {self.head_key_dtype!r} with retriever {self.retriever!r} "
                "and no retrieval_head, whose keys it is about; leave it out or use retriever dlm."
            )
        if self.fallback_budget is not None and self.fallback_budget < self.budget:
            raise ValueError(
                f"fallback_budget: found {self.fallback_budget}, less than budget ({self.budget}); "
                f"raise it, or leave it out for 4 x budget."
            )
        return self

    @model_validator(mode="after")
    def _requests_fit(self) -> SpeContextConfig:
        if self.max_budget is None:
            return self
        found = f"max_budget: found {self.max_budget!r}"
        if self.max_budget != "full" and self.max_budget < self.budget:
            raise ValueError(
                f"{found}, less than budget ({self.budget}); raise it, or leave it out."
            )
        if self.max_budget == "full" and self.host_kv_gib:
            raise ValueError(
                f"{found} with host_kv_gib {self.host_kv_gib}, whose hot buffers would have to "
                "hold whole contexts; give it in tokens, or set host_kv_gib to 0."
            )
        if self.is_lossless:
            raise ValueError(
                f"{found} with mode lossless, in which requests have no budgets of their own; "
                "leave it out."
            )
        return self

    @model_validator(mode="after")
    def _revision_has_a_head(self) -> SpeContextConfig:
        if self.retrieval_head_revision is not None:
            found = f"retrieval_head_revision: found {self.retrieval_head_revision!r}"
            if self.retrieval_head == "dummy":
                raise ValueError(
                    f"{found} with retrieval_head 'dummy', which no hub holds; leave it out."
                )
            if not self.rule.needs_head and self.retrieval_head is None:
                raise ValueError(
                    f"{found} with retriever {self.retriever!r} and no retrieval_head; leave it "
                    "out."
                )
        return self

    @model_validator(mode="after")
    def _lossless_fits(self) -> SpeContextConfig:
        if not self.is_lossless:
            return self
        for setting, refused, remedy in (
            ("host_kv_gib", bool(self.host_kv_gib), "verification reads all pages: set it to 0"),
            ("sidecar", self.sidecar == "ray", "its actor is not told of drafts: use inline"),
            ("cache_generated", self.cache_generated, "all pages are exact there: leave it out"),
            (
                "attention_provider",
                self.attention_provider == "xformers",
                "it has one query token a row: use auto",
            ),
            (
                "retriever",
                self.rule.reads_everything,
                "its drafts would cost as much as answers: use another one",
            ),
        ):
            if refused:
                found = getattr(self, setting)
                raise ValueError(f"{setting}: found {found!r} with mode lossless; {remedy}.")
        return self

    @model_validator(mode="after")
    def _sidecar_fits(self) -> SpeContextConfig:
        if self.sidecar == "inline":
            for key in ("sidecar_gpus", "sidecar_cpus"):
                if key in self.model_fields_set:
                    raise ValueError(
                        f"{key}: found {getattr(self, key):g}, but sidecar is inline; set sidecar "
                        "to ray or leave it out."
                    )
        elif not self.rule.needs_head:
            raise ValueError(
                f"sidecar: found 'ray' with retriever {self.retriever!r}, which has no head to run "
                "there; use sidecar inline."
            )
        elif self.host_kv_gib:
            raise ValueError(
                f"sidecar: found 'ray' with host_kv_gib {self.host_kv_gib}; the host pool's slot "
                "maps live in vLLM's worker and are not "
                f"sent to the actor: use sidecar inline or leave host_kv_gib out."
            )
        return self

    @model_validator(mode="after")
    def _rule_knows_its_settings(self) -> SpeContextConfig:
        known = list(self.rule.default_settings)
        for name in self.rule_settings:
            if name not in known:
                raise ValueError(
                    f"rule_settings: found {name!r}, which retriever {self.retriever!r} does not "
                    f"know; {f'it has {known}' if known else 'it has no settings: leave it out'}."
                )
        self.rule.check_settings({**self.rule.default_settings, **self.rule_settings})
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
            raise ConfigError(_sentence(error.errors()[0])) from None


def _sentence(error: Any) -> str:
    """Turn pydantic's first complaint into one sentence."""
    where = f"additional_config.{CONFIG_KEY}"
    # The settings are flat; what follows names a member of a union.
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = list(SpeContextConfig.model_fields)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}."
        return f"{where}: unknown key {key!r}; {hint}"
    if error["type"] == "value_error":
        return f"{where}.{error['ctx']['error']}"
    return f"{where}.{key}: found {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}."
