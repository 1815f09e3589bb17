"""--max-model-len auto: vLLM fits the longest context to the memory that it measures, when the head
is long there.

vLLM: its log.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.step_data import PageTable

logger = init_logger("vllm.specontext")


def fit_length(
    vllm_config: Any,
    config: SpeContextConfig,
    asked: int,
    table: PageTable,
    retriever: Retriever,
    *,
    has_tiers: bool,
) -> None:
    """Shrink the retriever to the length that vLLM has settled on.

    Args:
        asked: longest context in tokens by which the retriever was made.
        table: what attention reads, which is made for the fitted length.
    Raises:
        ConfigError: the two tiers were laid out for a larger budget.
    """
    fitted = vllm_config.model_config.max_model_len
    if fitted >= asked:
        return
    needed = config.table_pages(asked, num_drafts(vllm_config))
    if has_tiers and table.max_pages < needed:
        raise ConfigError(
            f"--max-model-len: found auto, which vLLM fitted to {fitted}, less than the "
            "budget for which the two tiers were laid out; "
            f"set --max-model-len {fitted}, or a smaller budget."
        )
    if (
        config.reads_everything(asked) is None
        and (sentence := config.reads_everything(fitted)) is not None
    ):
        logger.warning(sentence)
    retriever.shrink(fitted, table.max_pages)
