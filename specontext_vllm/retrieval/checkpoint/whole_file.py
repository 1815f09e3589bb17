"""Files that are complete or do not exist."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, contended: bool = False) -> Iterator[Path]:
    """A temporary file that becomes ``path`` in one step at the end, so that a kill leaves the old
    file or the new one. After an error in the block it is gone.

    Args:
        contended: several processes may write it at the same time, on other machines too; the last
            one wins.
    """
    part = path.with_name(f"{path.name}{'.' + uuid.uuid4().hex if contended else ''}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
