"""``dense``: nothing is left out, so there is nothing to score."""

from specontext_vllm.retrieval.rules import Rule


class Dense(Rule):
    """Every decode step reads the whole context; a baseline, for comparison."""

    reads_everything = True
