"""What is wrapped of vLLM's engine core and of where requests enter it, as in compat.py.

vLLM: where requests enter, and the engine core.
"""

from __future__ import annotations

import functools
from typing import Any

from specontext_vllm.engine.backend_choice import is_selected
from specontext_vllm.engine.wrapping import is_ours, mark_as_ours


def judge_requests() -> None:
    """Refuse a request whose settings an engine on our backend cannot follow, in the front end,
    which answers with status 400, before an answer is streamed.

    Uses: vllm.v1.engine.async_llm.AsyncLLM.generate,
        vllm.v1.engine.input_processor.InputProcessor
    Symptom: a wrong ``specontext_budget`` is found by a worker, whose error ends the engine.
    Reason: vLLM lets logits processors alone judge a request's extra arguments
        (vllm/v1/engine/input_processor.py, _validate_params), and engines with drafts have none.
    Remove when: a backend can judge requests.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if is_ours(InputProcessor._validate_params):
        return
    stream, validate = AsyncLLM.generate, InputProcessor._validate_params

    @functools.wraps(stream)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        # Called before the status is sent, run after it.
        _judge(self.vllm_config, sampling_params)
        return stream(self, prompt, sampling_params, *args, **kwargs)

    @functools.wraps(validate)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        _judge(self.vllm_config, params)
        return validate(self, params, *args, **kwargs)

    mark_as_ours(_validate_params)
    AsyncLLM.generate = generate
    InputProcessor._validate_params = _validate_params


def hook_engine_core() -> None:
    """Hook all that is hooked of the process in which the engine core runs.

    Uses: vllm.v1.engine.core
    Symptom: a hook works where the front end runs the core itself, and is missing where the core
        has a process of its own.
    Reason: such a process loads plugins but does not check its configuration again, so the hooks
        are set from two places.
    Remove when: the functions called here are gone.
    """
    judge_requests_in_the_core()
    run_as_many_as_have_lanes()


def judge_requests_in_the_core() -> None:
    """What ``judge_requests`` does in the front end, in the engine core's process.

    Uses: vllm.v1.engine.core.EngineCore.preprocess_add_request
    Symptom: a front end of another make sends a wrong ``specontext_budget``, and the worker's error
        ends the engine.
    Reason: the engine core judges no request (vllm/v1/engine/core.py).
    Remove when: a backend can judge requests.
    """
    from vllm.v1.engine.core import EngineCore

    preprocess = EngineCore.preprocess_add_request
    if is_ours(preprocess):
        return

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        _judge(self.vllm_config, request.sampling_params)
        return preprocess(self, request)

    mark_as_ours(preprocess_add_request)
    EngineCore.preprocess_add_request = preprocess_add_request


def _judge(vllm_config: Any, params: Any) -> None:
    if is_selected(vllm_config):
        from specontext_vllm.engine.request_settings import refuse_request

        refuse_request(vllm_config, params)


def run_as_many_as_have_lanes() -> None:
    """With two tiers the scheduler runs as many requests at once as the workers have lanes for.

    Uses: vllm.v1.engine.core.EngineCore._initialize_kv_caches,
        vllm.config.scheduler.SchedulerConfig.max_num_active_seqs
    Symptom: requests beyond the lanes end the engine.
    Reason: workers learn what fits when they measure their memory, and tell the scheduler a number
        of bytes alone (vllm/v1/engine/core.py).
    Remove when: workers can bound the number of running requests.
    """
    from vllm.v1.engine.core import EngineCore

    original = EngineCore._initialize_kv_caches
    if is_ours(original):
        return

    @functools.wraps(original)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        found = original(self, vllm_config)
        if is_selected(vllm_config):
            lanes = [n for n in self.collective_rpc("specontext_lanes") if n is not None]
            if lanes:
                vllm_config.scheduler_config.max_num_active_seqs = min(lanes)
        return found

    mark_as_ours(_initialize_kv_caches)
    EngineCore._initialize_kv_caches = _initialize_kv_caches
