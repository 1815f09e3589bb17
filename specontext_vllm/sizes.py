"""Sizes in sentences."""

from __future__ import annotations


def in_gib(*sizes: float) -> list[str]:
    """Bytes as GiB, to be set against each other in a sentence: two decimals, or as many as tell
    different sizes apart, and from 0.
    """
    different = {*sizes, 0}
    texts: list[str] = []
    for decimals in range(2, 11):  # the tenth tells single bytes apart
        texts = [f"{size / 2**30:.{decimals}f}" for size in (*sizes, 0)]
        if len(set(texts)) == len(different):
            break
    return texts[:-1]
