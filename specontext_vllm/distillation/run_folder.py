"""The folder of a run: which run it belongs to, and resuming from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from specontext_vllm.distillation.options import OptionError
from specontext_vllm.distillation.trainer import Distiller
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file


def check_folder(out: Path, facts: dict[str, Any] | None = None) -> None:
    """Check, before anything is written, that ``out`` is writable, and is free or holds the run
    that these options started.

    Args:
        facts: what identifies a run: model, data, loss, shape, but not its length. None: not known
            yet.
    Raises:
        OptionError: it is not writable, or holds something else.
    """
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OptionError(f"--out: {there} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OptionError(f"--out: {there} cannot be written to; give a folder that can.")
    note = out / "training" / "run.json"
    if not note.is_file():
        if (out / "config.json").exists():
            raise OptionError(
                f"--out: {out} holds a model or a head that `specontext distill` did not make; "
                "give another folder."
            )
        return
    try:
        found = dict(json.loads(note.read_text()))
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"--out: {note} cannot be read ({error}); give another folder, or remove that file to "
            "start afresh."
        ) from None
    if differ := [
        f"{key} {found.get(key)!r} (now {value!r})"
        for key, value in (facts or {}).items()
        if found.get(key) != value
    ]:
        raise OptionError(
            f"--out: {out} holds a run with {', '.join(differ)}; give another folder, or the same "
            "options to resume it."
        )


def claim_folder(out: Path, facts: dict[str, Any]) -> None:
    """``check_folder``, and write down there which run it belongs to."""
    check_folder(out, facts)
    note = out / "training" / "run.json"
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(note) as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")


def resume(run: Distiller[Any]) -> bool:
    """``Distiller.resume``.

    Raises:
        OptionError: the state cannot be read, or belongs to another head.
    """
    try:
        return run.resume()
    except Exception as error:  # whatever torch.load and pickle raise on a damaged file
        reason = str(error).strip().split("\n")[0]
        raise OptionError(
            f"--out: {run.state_file} cannot be resumed from ({type(error).__name__}: {reason}); "
            f"give another folder, or remove {run.state_file.parent} "
            "to start afresh."
        ) from None
