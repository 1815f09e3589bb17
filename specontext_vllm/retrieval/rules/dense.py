"""``dense``: every decode step reads its whole context; the baseline of all others."""

from specontext_vllm.retrieval.rules import Rule


class Dense(Rule):
    """Leaves nothing out, so there is nothing to score."""

    reads_everything = True
