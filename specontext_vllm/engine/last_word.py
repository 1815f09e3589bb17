"""What the user reads last when an engine is refused: the sentence, once more and alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from specontext_vllm.config import ConfigError

FILE = "specontext-refusal.txt"
"""In the folder that carries a worker's figures to the front end."""

_folders: set[str] = set()


def say_last(folder: str | None = None) -> None:
    """Print the sentence of a refusal that ends this process below everything else.

    Symptom: a refusal stands above 60 to 230 lines of tracebacks, or in the middle of pydantic's
        frame.
    Reason: vLLM starts workers in processes of their own and tells their parents only that they
        died; and it checks its configuration in a pydantic dataclass, which wraps every ValueError.
    Remove when: vLLM ends with the error of the worker, and without a frame around it.

    Args:
        folder: where this engine's workers leave their sentence; None: not known yet. Idempotent.
    """
    if folder is not None:
        Path(folder, FILE).unlink(missing_ok=True)  # of an engine before
        _folders.add(folder)
    if getattr(sys.excepthook, "_specontext", False):
        return
    original = sys.excepthook

    @functools.wraps(original)
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        original(kind, error, trace)
        if (sentence := _sentence(error)) is not None:
            print(f"\n{sentence}", file=sys.stderr, flush=True)

    ours: Any = excepthook
    ours._specontext = True
    sys.excepthook = ours


def pass_to_front_end(folder: str | None, error: Exception) -> None:
    """In a worker: put its sentence where ``say_last`` finds it. On another machine than the front
    end's only the log has it.
    """
    if folder is not None:
        with suppress(OSError):
            Path(folder, FILE).write_text(str(error))


def _sentence(error: BaseException) -> str | None:
    """What the last line of ``error``'s own traceback does not say."""
    if isinstance(error, ConfigError):
        return None
    for link in _chain(error):
        if isinstance(link, ConfigError):
            return str(link)
        for detail in (
            link.errors(include_url=False, include_input=False)
            if isinstance(link, ValidationError)
            else ()
        ):
            if isinstance(wrapped := detail.get("ctx", {}).get("error"), ConfigError):
                return str(wrapped)
    for folder in _folders:
        with suppress(OSError):
            return Path(folder, FILE).read_text()
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
