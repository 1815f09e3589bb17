"""Settings that exclude each other. Each refusal is a ValueError whose message is a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specontext_vllm.config.settings import SpeContextConfig


def refuse_exclusions(config: SpeContextConfig) -> None:
    """Raise a ValueError where two settings exclude each other."""
    _check_selection(config)
    _check_own_budgets(config)
    _check_revision(config)
    _check_lossless(config)
    _check_sidecar(config)
    _check_rule_settings(config)


def _check_selection(config: SpeContextConfig) -> None:
    if config.budget < config.min_budget:
        raise ValueError(
            f"budget: found {config.budget}, but sinks ({config.sink_pages} pages), recents "
            f"({config.recent_pages} pages) and one page to choose need {config.min_budget} "
            f"tokens; raise budget or lower sink_tokens ({config.sink_tokens}) or recent_tokens "
            f"({config.recent_tokens})."
        )
    if config.rule.per_layer and config.host_kv_gib:
        raise ValueError(
            f"host_kv_gib: found {config.host_kv_gib} with retriever {config.retriever}, which "
            "chooses pages too late for them to be fetched; set it to 0 or use another "
            "retriever."
        )
    if (
        config.head_key_dtype != "auto"
        and not config.rule.needs_head
        and config.retrieval_head is None
    ):
        raise ValueError(
            f"head_key_dtype: found {config.head_key_dtype!r} with retriever {config.retriever!r} "
            "and no retrieval_head, whose keys it is about; leave it out or use retriever dlm."
        )
    if config.fallback_budget is not None and config.fallback_budget < config.budget:
        raise ValueError(
            f"fallback_budget: found {config.fallback_budget}, less than budget ({config.budget}); "
            f"raise it, or leave it out for 4 x budget."
        )


def _check_own_budgets(config: SpeContextConfig) -> None:
    if config.max_budget is None:
        return
    found = f"max_budget: found {config.max_budget!r}"
    if config.max_budget != "full" and config.max_budget < config.budget:
        raise ValueError(f"{found}, less than budget ({config.budget}); raise it, or leave it out.")
    if config.max_budget == "full" and config.host_kv_gib:
        raise ValueError(
            f"{found} with host_kv_gib {config.host_kv_gib}, whose hot buffers would have to "
            "hold whole contexts; give it in tokens, or set host_kv_gib to 0."
        )
    if config.is_lossless:
        raise ValueError(
            f"{found} with mode lossless, in which requests have no budgets of their own; "
            "leave it out."
        )


def _check_revision(config: SpeContextConfig) -> None:
    if config.retrieval_head_revision is not None:
        found = f"retrieval_head_revision: found {config.retrieval_head_revision!r}"
        if config.retrieval_head == "dummy":
            raise ValueError(
                f"{found} with retrieval_head 'dummy', which no hub holds; leave it out."
            )
        if not config.rule.needs_head and config.retrieval_head is None:
            raise ValueError(
                f"{found} with retriever {config.retriever!r} and no retrieval_head; leave it out."
            )


def _check_lossless(config: SpeContextConfig) -> None:
    if not config.is_lossless:
        return
    for setting, refused, remedy in (
        ("host_kv_gib", bool(config.host_kv_gib), "verification reads all pages: set it to 0"),
        ("sidecar", config.sidecar == "ray", "its actor is not told of drafts: use inline"),
        ("cache_generated", config.cache_generated, "all pages are exact there: leave it out"),
        (
            "attention_provider",
            config.attention_provider == "xformers",
            "it has one query token a row: use auto",
        ),
        (
            "retriever",
            config.rule.reads_everything,
            "its drafts would cost as much as answers: use another one",
        ),
    ):
        if refused:
            found = getattr(config, setting)
            raise ValueError(f"{setting}: found {found!r} with mode lossless; {remedy}.")


def _check_sidecar(config: SpeContextConfig) -> None:
    if config.sidecar == "inline":
        for key in ("sidecar_gpus", "sidecar_cpus"):
            if key in config.model_fields_set:
                raise ValueError(
                    f"{key}: found {getattr(config, key):g}, but sidecar is inline; set sidecar "
                    "to ray or leave it out."
                )
    elif not config.rule.needs_head:
        raise ValueError(
            f"sidecar: found 'ray' with retriever {config.retriever!r}, which has no head to run "
            "there; use sidecar inline."
        )
    elif config.host_kv_gib:
        raise ValueError(
            f"sidecar: found 'ray' with host_kv_gib {config.host_kv_gib}; the host pool's slot "
            "maps live in vLLM's worker and are not "
            f"sent to the actor: use sidecar inline or leave host_kv_gib out."
        )


def _check_rule_settings(config: SpeContextConfig) -> None:
    known = list(config.rule.default_settings)
    for name in config.rule_settings:
        if name not in known:
            raise ValueError(
                f"rule_settings: found {name!r}, which retriever {config.retriever!r} does not "
                f"know; {f'it has {known}' if known else 'it has no settings: leave it out'}."
            )
    config.rule.check_settings({**config.rule.default_settings, **config.rule_settings})
