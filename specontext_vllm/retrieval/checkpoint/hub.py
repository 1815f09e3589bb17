"""Where a checkpoint is: a folder here, or a Hugging Face hub id."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from specontext_vllm.retrieval.checkpoint.errors import HeadError

logger = logging.getLogger("vllm.specontext")

HUB_PATTERNS = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.bin.index.json",
]


def checkpoint_folder(
    name: str, revision: str | None = None, *, say: Callable[[str], None] = logger.warning
) -> Path:
    """Folder of a checkpoint given as a folder or as a Hugging Face hub id (downloaded, or taken
    from the hub cache).

    A snapshot's folder is named after its commit, so all who read it read the same. Offline
    (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE, as for vLLM) only the cache is read.

    Args:
        revision: commit, tag or branch of the hub id; None for `main`.
        say: called with a sentence that says what is downloaded from where, before it is, and with
            one that names the commit of a revision that is none itself.

    Raises:
        HeadError: neither a folder nor an id the hub or its cache can provide, or a folder with a
            revision.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HeadError(
                f"{name} is a folder, which has no revision {revision!r}: leave "
                "retrieval_head_revision (specontext inspect: --revision) out."
            )
        return path
    if path.is_file():
        raise HeadError(
            f"{name} is a file: give the folder that holds it together with its config.json."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    wanted, offline = revision or "main", constants.HF_HUB_OFFLINE
    pinned = re.fullmatch("[0-9a-f]{40}", wanted) is not None
    try:
        validate_repo_id(name)
        if not offline:
            loose = "" if pinned else ", which is not pinned and may change at any time"
            say(
                f"Retrieval head: taking {name} from {constants.ENDPOINT} at revision "
                f"{wanted}{loose}."
            )
        folder = Path(
            snapshot_download(
                name, revision=wanted, allow_patterns=HUB_PATTERNS, local_files_only=offline
            )
        )
    except HFValidationError as error:
        raise HeadError(
            f"{name} is no folder here, and no id on the Hugging Face hub can be called so: check "
            "the name."
        ) from error
    except Exception as error:  # the hub client's failures share no base class
        if offline and isinstance(error, LocalEntryNotFoundError):
            raise HeadError(
                f"{name} is no folder here, its revision {wanted} is not in the Hugging Face cache "
                f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE or "
                "TRANSFORMERS_OFFLINE keeps it from being fetched: download it where there is a "
                "network, or give a folder."
            ) from error
        raise HeadError(
            f"{name} is no folder here, and the Hugging Face hub did not provide its revision "
            f"{wanted} ({type(error).__name__}): check the "
            "name, or download it where there is a network and give the folder."
        ) from error
    if not pinned:
        say(
            f"Retrieval head: {name} at {wanted} is commit {folder.name}; retrieval_head_revision "
            "(specontext inspect: --revision) pins it."
        )
    return folder
