"""transformers' caches of keys and values."""

from __future__ import annotations

from typing import Any


def cache_before(cache: Any, first: int, rows: int) -> Any:
    """A cache of the first ``first`` tokens of ``cache``, for ``rows`` sequences: its own, once or
    several times.
    """
    from transformers import DynamicCache

    copies, past = rows // len(cache.layers[0].keys), DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = layer.keys[:, :, :first], layer.values[:, :, :first]
        if copies > 1:
            keys, values = keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)
        past.update(keys, values, number)
    return past
