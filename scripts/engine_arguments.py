"""Starts an engine with every argument of vLLM's ``EngineArgs`` beside stock vLLM and writes what
became of it to docs/engine_arguments.toml, which `make docs` makes a table of.

    python scripts/engine_arguments.py [--only NAME ...]

On a CPU, with the demo model in float32 and a budget over the context, so that tokens must be
stock's. Several arguments share a start; where stock or we refuse one of them, or tokens differ,
the group is halved until it is known which. Every start is a forked process of its own. The whole
sweep takes about ten minutes; tests/docs/test_engine_arguments.py holds the file to ``EngineArgs``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.engine_argument_values import (  # noqa: E402
    ALONE,
    BASE,
    EXPLAINED,
    NOT_STARTED,
    OUR_OWN,
    TOGETHER,
    WITH,
)
from scripts.engine_arguments_page import (  # noqa: E402
    ELSEWHERE,
    FAILED,
    FILE,
    OTHER,
    OURS,
    SERVED,
    STOCK,
    read_file,
)

LIMIT_S = 150
"""A start that takes longer has failed."""

GROUP = 12


class Extension:
    """A worker's extension, for ``worker_extension_cls``."""

    def specontext_sweep(self) -> bool:
        return True


def tried() -> dict[str, Any]:
    """Every argument that a start has, and its value; those of every start too."""
    return {**BASE, **OUR_OWN, **TOGETHER, **ALONE}


# --- one start ---


def ask(arguments: dict[str, Any], ours: bool) -> list[list[int]]:
    """The tokens of an engine with ``arguments``: three prompts, twice."""
    from vllm import LLM, SamplingParams

    llm = LLM(**{**BASE, **(OUR_OWN if ours else {}), **arguments})
    if "worker_extension_cls" in arguments:
        assert llm.collective_rpc("specontext_sweep") == [True]
    prompts = [
        [5 + (seed * 31 + 7 * i + i * i) % 3000 for i in range(150 + 90 * seed)]
        for seed in (0, 1, 2)
    ]
    common = {"max_tokens": 8, "ignore_eos": True, "detokenize": False}
    sampling = [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0, repetition_penalty=1.3, **common),
        SamplingParams(temperature=0, **common),
    ]
    tokens = []
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
    return tokens


def sentence_of(error: BaseException) -> tuple[str, bool]:
    """What an error says in one line, and whether it is one of ours."""
    from specontext_vllm.config import ConfigError
    from specontext_vllm.retrieval.checkpoint import HeadError

    chain: list[BaseException] = []
    unread: list[BaseException | None] = [error]
    while unread:
        found = unread.pop()
        if found is None or found in chain:
            continue
        chain.append(found)
        unread += [found.__cause__, found.__context__]
        if callable(entries := getattr(found, "errors", None)):
            unread += [
                entry.get("ctx", {}).get("error") for entry in entries() if isinstance(entry, dict)
            ]
    for found in chain:
        if isinstance(found, ConfigError | HeadError):
            return str(found), True
    text = str(error) or type(error).__name__
    if callable(entries := getattr(error, "errors", None)):
        text = re.sub(r"^(Value|Assertion) error, ", "", entries()[0]["msg"])
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:200]}", False


def start(arguments: dict[str, Any], ours: bool) -> dict[str, Any]:
    """What becomes of an engine in a process of its own: ``tokens``, or ``error`` and
    ``is_ours``.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(readable)
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            answer: dict[str, Any] = {"tokens": ask(arguments, ours)}
        except BaseException as error:
            text, is_ours = sentence_of(error)
            answer = {"error": text, "is_ours": is_ours}
        os.write(writable, json.dumps(answer).encode())
        os._exit(0)
    os.close(writable)
    ready, _, _ = select.select([readable], [], [], LIMIT_S)
    text = os.read(readable, 1 << 20) if ready else b""
    os.close(readable)
    try:
        os.killpg(child, signal.SIGKILL)  # its workers, too
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)
    if not text:
        what = "the process died" if ready else f"no answer in {LIMIT_S} s"
        return {"error": what, "is_ours": False}
    return json.loads(text)


def prepare() -> None:
    """Import here what every start would import for itself."""
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import llama, registry  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.v1.engine import core  # noqa: F401
    from vllm.v1.worker import cpu_model_runner, cpu_worker  # noqa: F401

    from specontext_vllm.engine import (  # noqa: F401
        backend,
        memory,
        prepare,
        refusals,
        runner_v1,
        scheduler,
        worker_cpu,
    )

    # It goes through all modules, and vLLM asks for it at every start.
    current_platform.register_triton_kernel_overrides()
    current_platform.register_triton_kernel_overrides = lambda: None
    # It would look at the model's class in another process that imports all anew.
    registry._run_in_subprocess = lambda inspect: inspect()


# --- the sweep ---


def judge(names: list[str], values: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Outcome and sentence of each argument of a group."""
    arguments = WITH.get(names[0], {}) | {name: values[name] for name in names}
    ours = start(arguments, ours=True)
    if ours.get("is_ours") and len(names) == 1:
        return {names[0]: (OURS, ours["error"])}
    stock = start(arguments, ours=False)
    if "tokens" in ours and ours == stock:
        return dict.fromkeys(names, (SERVED, ""))
    if len(names) > 1:
        half = len(names) // 2
        return judge(names[:half], values) | judge(names[half:], values)
    if "error" in stock:
        # What stock does not serve either is vLLM's to explain.
        found = (STOCK, stock["error"])
        if "tokens" in ours:
            found = (FAILED, f"served, where vLLM itself says {stock['error']}")
    elif "error" in ours:
        found = (OURS if ours["is_ours"] else FAILED, ours["error"])
    elif names[0] in EXPLAINED:
        found = (OTHER, EXPLAINED[names[0]])
    else:
        found = (FAILED, "other tokens than stock's")
    return {names[0]: found}


def write(found: dict[str, tuple[str, str]]) -> None:
    """The file, in the order of ``EngineArgs``: what has been started so far."""
    from vllm.engine.arg_utils import EngineArgs

    values = tried()
    lines = [
        "# What became of an engine on our backend with each of EngineArgs' fields, beside stock",
        "# vLLM with the same: written by scripts/engine_arguments.py.",
        "",
    ]
    for name in (field.name for field in fields(EngineArgs) if field.name in found):
        outcome, sentence = found[name]
        value = (
            "" if outcome == ELSEWHERE else json.dumps(values[name]).replace(str(ROOT) + "/", "")
        )
        sentence = sentence.replace(str(ROOT) + "/", "")
        lines += [
            f"[{name}]",
            f"value = {json.dumps(value)}",
            f"outcome = {json.dumps(outcome)}",
            f"sentence = {json.dumps(sentence, ensure_ascii=False)}",
            "",
        ]
    FILE.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these arguments; others are kept"
    )
    only = parser.parse_args().only
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    prepare()
    from vllm.engine.arg_utils import EngineArgs

    names = [field.name for field in fields(EngineArgs)]
    values = tried()
    if missing := [name for name in names if name not in values and name not in NOT_STARTED]:
        sys.exit(f"scripts/engine_arguments.py: no value for {', '.join(missing)}; add them.")
    found = {
        name: (entry["outcome"], entry["sentence"])
        for name, entry in (read_file() if only else {}).items()
    }
    found |= {name: (ELSEWHERE, why) for name, why in NOT_STARTED.items()}
    plain = [name for name in names if name in BASE or name in OUR_OWN]
    together = [name for name in names if name in TOGETHER and name not in WITH]
    groups = [together[i : i + GROUP] for i in range(0, len(together), GROUP)]
    groups += [[name] for name in names if name in ALONE or name in WITH]
    if only:
        groups = [[name for name in group if name in only] for group in groups]
    else:
        ours, stock = start({}, ours=True), start({}, ours=False)
        if "error" in ours or ours != stock:
            sys.exit(f"scripts/engine_arguments.py: without an argument: {ours} beside {stock}")
        found |= dict.fromkeys(plain, (SERVED, ""))
    for group in filter(None, groups):
        judged = judge(group, values)
        found |= judged
        for name, (outcome, sentence) in judged.items():
            print(f"{name}: {outcome} {sentence}", flush=True)
        write(found)


if __name__ == "__main__":
    main()
