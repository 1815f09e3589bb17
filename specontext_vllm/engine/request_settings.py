"""Settings of single requests: ``SamplingParams.extra_args``, which the OpenAI API calls
``vllm_xargs``.

vLLM: the error that its servers answer with status 400.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from specontext_vllm.config import CONFIG_KEY, SpeContextConfig
from specontext_vllm.engine.backend_choice import is_lossless
from specontext_vllm.step_data import WHOLE

PREFIX = "specontext_"
BUDGET, MODE = "specontext_budget", "specontext_mode"
MODES = ("sparse", "dense", "lossless")


class RequestError(ValueError):
    """A request that cannot be served; its message is one sentence that names the setting, what was
    found and what to do.
    """

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(f"{key}: {sentence}")
        self.key = key


def read_budget(
    extra_args: dict[str, Any] | None, config: SpeContextConfig, max_model_len: int
) -> int | None:
    """Tokens that each decode step of a request reads at the most: ``WHOLE`` in mode dense, None
    where the engine's settings say.

    Args:
        extra_args: of its sampling parameters.
        config: of the engine.
        max_model_len: longest context, in tokens.
    Raises:
        RequestError: what it asks for cannot be, or this engine cannot do it.
    """
    given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(PREFIX)}
    for key in given:
        if key not in (BUDGET, MODE):
            close = difflib.get_close_matches(key, (BUDGET, MODE), n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {BUDGET} and {MODE}."
            raise RequestError(key, f"nothing reads it; {hint}")
    budget, mode = given.get(BUDGET), given.get(MODE)
    if mode is not None:
        _refuse_mode(mode, config, max_model_len)
    if BUDGET in given:
        _refuse_budget(budget, mode, config, max_model_len)
    return WHOLE if mode == "dense" else budget


def _refuse_mode(mode: Any, config: SpeContextConfig, max_model_len: int) -> None:
    found = f"found {mode!r}"
    if mode not in MODES:
        raise RequestError(MODE, f"{found}; use sparse or dense.")
    if config.is_lossless:
        if mode != "lossless":
            raise RequestError(
                MODE,
                f"{found}, but this engine is in mode lossless, whose answers are those of dense "
                "attention for every request; leave it out.",
            )
    elif mode == "lossless":
        raise RequestError(
            MODE,
            f"{found}, which is a mode of whole engines; start it with "
            f"additional_config.{CONFIG_KEY}.mode lossless, or leave it out.",
        )
    elif mode == "dense" and (largest := config.largest_budget(max_model_len)) < max_model_len:
        raise RequestError(
            MODE,
            f"{found}, but the page tables of this engine hold {largest} tokens a request; "
            f"start it with additional_config.{CONFIG_KEY}.max_budget full, or leave it out.",
        )
    elif mode == "sparse" and config.rule.reads_everything:
        raise RequestError(
            MODE, f"{found}, but this engine's retriever reads all pages; leave it out."
        )


def _refuse_budget(budget: Any, mode: Any, config: SpeContextConfig, max_model_len: int) -> None:
    found = f"found {budget!r}"
    largest = config.largest_budget(max_model_len)
    if type(budget) is not int:
        raise RequestError(BUDGET, f"{found}; give a whole number of tokens.")
    if mode == "dense":
        raise RequestError(
            BUDGET, f"{found} with {MODE} dense, which reads all; leave one of them out."
        )
    if config.is_lossless:
        raise RequestError(
            BUDGET,
            f"{found}, but this engine is in mode lossless, whose answers are those of dense "
            "attention for every request; leave it out.",
        )
    if config.rule.reads_everything:
        raise RequestError(
            BUDGET, f"{found}, but this engine's retriever reads all pages; leave it out."
        )
    if budget < config.min_budget:
        raise RequestError(
            BUDGET,
            f"{found}, but sinks, recents and one page to choose need {config.min_budget} tokens; "
            "give more.",
        )
    if budget > largest:
        raise RequestError(
            BUDGET,
            f"{found}, but requests of this engine may have {largest} tokens; give less, or start "
            f"it with a larger additional_config.{CONFIG_KEY}.max_budget.",
        )


def refuse_request(vllm_config: Any, params: Any) -> None:
    """Raise vLLM's VLLMValidationError where an engine on our backend cannot serve a request.

    Args:
        params: its sampling parameters; others have no settings of ours.
    """
    if is_lossless(vllm_config):
        _refuse_sampling(params)
    extra_args = getattr(params, "extra_args", None)
    if not any(str(key).startswith(PREFIX) for key in extra_args or ()):
        return
    from vllm.exceptions import VLLMValidationError

    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    try:
        read_budget(extra_args, config, vllm_config.model_config.max_model_len)
    except RequestError as error:
        raise VLLMValidationError(str(error)) from None


def _refuse_sampling(params: Any) -> None:
    """Raise vLLM's VLLMValidationError for what it cannot sample with where there are drafts, whose
    own sentence (vllm/sampling_params.py, _validate_spec_decode) names an option that a lossless
    engine was not given.
    """
    from vllm.exceptions import VLLMValidationError

    for key in ("min_p", "logit_bias"):
        if found := getattr(params, key, None):
            raise VLLMValidationError(
                f"{key}: found {found!r}, but this engine is in mode lossless, and vLLM does not "
                "apply it to drafts; leave it out (what the model's generation_config.json gives "
                "is left out with --generation-config vllm), or serve with mode sparse.",
                parameter=key,
            )


class RequestBudgets:
    """Which of the requests in flight have a budget of their own.

    Args:
        config: that the engine was started with.
        max_model_len: longest context, in tokens.
    """

    def __init__(self, config: SpeContextConfig, max_model_len: int) -> None:
        self._config, self._max_model_len = config, max_model_len
        self._budgets: dict[str, int] = {}

    def follow(self, scheduler_output: Any) -> None:
        """Take in the requests that come and go with a step."""
        for name in scheduler_output.finished_req_ids:
            self._budgets.pop(name, None)
        for request in scheduler_output.scheduled_new_reqs:
            # A session's next turn may have another.
            self._budgets.pop(request.req_id, None)
            extra_args = getattr(request.sampling_params, "extra_args", None)
            budget = read_budget(extra_args, self._config, self._max_model_len)
            if budget is not None:
                self._budgets[request.req_id] = budget

    def of(self, names: Sequence[str]) -> tuple[int | None, ...]:
        """Tokens of each of these requests, None where the settings say; empty: they say for
        all.
        """
        if not self._budgets or self._budgets.keys().isdisjoint(names):
            return ()
        return tuple(self._budgets.get(name) for name in names)
