"""How a command refuses: one sentence on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from specontext_vllm.config import ConfigError


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """End with exit code 2 and one sentence on stderr on an error of these kinds, whose message is
    that sentence, or on a file that cannot be read or written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        sentence = str(error)
    except OSError as error:
        # The error of a loader process begins with its traceback.
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        sentence = (
            f"{error.filename or 'A file'} cannot be read or written ({reason}); correct that or "
            "name another."
        )
    else:
        return
    typer.echo(sentence, err=True)
    raise typer.Exit(2)


def check_range(option: str, value: float | None, minimum: float, maximum: float) -> None:
    """Refuse a number that is out of range; None is not given, and in range.

    Raises:
        ConfigError: it is.
    """
    if value is not None and not minimum <= value <= maximum:
        raise ConfigError(f"{option}: found {value}; give {minimum:g} to {maximum:,.15g}.")
