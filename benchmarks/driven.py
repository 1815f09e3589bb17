"""Selections that change as a real model's do, since random weights select at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def driven(shares: Sequence[float]) -> dict[str, Any]:
    """Settings of the rule `driven`: in step i the share ``shares[i]`` of the pages is scored anew
    (specontext_vllm/retrieval/rules/driven.py).
    """
    return {"retriever": "driven", "rule_settings": {"shares": list(shares)}}


DRIVEN = (
    "Random weights select at random, so the selections are driven: the head scores as ever, then "
    "a share of the pages gets new scores in "
    "each step. Stickiness is off, since it would distort that share. Later passes of an engine "
    "use the same prompts and hit the prefix cache; their times end to end are left out."
)
