"""Sizes in bytes as text."""

from __future__ import annotations


def in_gib(*sizes: float) -> list[str]:
    """Bytes as GiB, for sizes that a sentence compares: with two decimals, or as many as it takes
    for different sizes to look different from each other and from 0.
    """
    different = {*sizes, 0}
    texts: list[str] = []
    for decimals in range(2, 11):  # ten decimals tell single bytes apart
        texts = [f"{size / 2**30:.{decimals}f}" for size in (*sizes, 0)]
        if len(set(texts)) == len(different):
            break
    return texts[:-1]
