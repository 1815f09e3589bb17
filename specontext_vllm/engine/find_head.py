"""Find the retrieval head and check that it fits the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig
from specontext_vllm.retrieval.checkpoint import (
    HeadCheckpoint,
    HeadError,
    checkpoint_folder,
    dummy_checkpoint,
    read_checkpoint,
)
from specontext_vllm.retrieval.head import check_head
from specontext_vllm.retrieval.known_heads import known_head
from specontext_vllm.retrieval.rules import find_rule, listed_rules

HEAD_FOLDER = "retrieval_head"
DUMMY = "dummy"


def find_head(config: SpeContextConfig, model_config: Any) -> str:
    """Folder of the head's checkpoint, or ``"dummy"``; of one on the hub, the commit's that
    ``retrieval_head_revision`` names.

    Looked for in this order: the ``retrieval_head`` setting, a ``retrieval_head/`` folder inside
    the model's folder, the table of known public EAGLE-3 heads (configs/known_heads.yaml).
    """
    if config.retrieval_head == DUMMY:
        return DUMMY
    setting = f"additional_config.{CONFIG_KEY}.retrieval_head"
    source, revision = config.retrieval_head, config.retrieval_head_revision
    in_model = Path(model_config.model, HEAD_FOLDER)
    if source is None and in_model.is_dir():
        source = str(in_model.resolve())
    elif source is None:
        known = known_head(model_config.model) or known_head(
            getattr(model_config.hf_config, "_name_or_path", "")
        )
        if known is None:
            headless = [name for name in listed_rules() if not find_rule(name).needs_head]
            raise ConfigError(
                f"{setting}: none given, no {HEAD_FOLDER}/ folder in {model_config.model!r} and no "
                "known EAGLE-3 head for it; set it to a folder or "
                "hub id of an EAGLE-3 checkpoint, train one with `specontext distill`, or use a "
                f"retriever that needs none: {', '.join(headless)}."
            )
        source, revision = known.head, revision or known.revision
    try:
        return str(checkpoint_folder(source, revision))
    except HeadError as error:
        raise ConfigError(f"{setting}: {error}") from None


def load_head(head: str, vllm_config: Any) -> HeadCheckpoint:
    """Read a head found by ``find_head`` and check it against the model, so that no worker refuses
    it.

    Raises:
        ConfigError: one sentence when it cannot be read or does not fit.
    """
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    shape = {
        "target_hidden_size": model.get_hidden_size(),
        "num_layers": num_hidden_layers(vllm_config),
        "num_kv_heads": model.get_total_num_kv_heads(),
        "vocab_size": model.get_vocab_size(),
    }
    if head == DUMMY:
        return dummy_checkpoint(
            hidden_size=shape["target_hidden_size"],
            num_layers=shape["num_layers"],
            num_heads=text.num_attention_heads,
            num_kv_heads=shape["num_kv_heads"],
            head_dim=model.get_head_size(),
            rope_theta=10000.0,
            max_position=model.max_model_len,
            dtype=model.dtype,
            seed=model.seed,
        )
    try:
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        checkpoint = read_checkpoint(Path(head), allow_pickle=config.allow_pickle)
        check_head(
            checkpoint,
            target=shape,
            max_position=model.max_model_len,
            dtype=model.dtype,
            workers=vllm_config.parallel_config.tensor_parallel_size,
        )
    except HeadError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.retrieval_head: {error}") from None
    return checkpoint


def num_hidden_layers(vllm_config: Any) -> int:
    """Decoder layers of the target."""
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)
