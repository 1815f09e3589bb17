"""The settings by name: kinds, defaults, descriptions, and what each may be by itself."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specontext_vllm.retrieval.rules import listed_rules, rule_names

AttentionProviderName = Literal["auto", "flash", "triton", "xformers"]
HeadKeyDtype = Literal["auto", "fp8", "model"]
Loading = Literal["adaptive", "elastic", "plain"]
Mode = Literal["sparse", "lossless"]


class SettingFields(BaseModel):
    """Settings of the specontext backend. All sizes are in tokens per KV head and request."""

    # strict: true is not 1, nor is "512" 512.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    retrieval_head: str | None = Field(
        default=None,
        min_length=1,
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
        description=(
            "Newest tokens, which are always read. Heads that were not trained to choose near "
            "pages need 64; with budgets under 256 one in our own format may do better with 16."
        ),
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
