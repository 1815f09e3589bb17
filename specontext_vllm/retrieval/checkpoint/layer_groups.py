"""The groups of layers for each of which a head makes a selection."""

from __future__ import annotations


def layer_groups(num_layers: int, count: int) -> tuple[int, ...]:
    """The group of each of ``num_layers`` layers: ``count`` groups of neighbours, of which the
    first ones have a layer more where it does not come out even.

    Raises:
        ValueError: fewer layers than groups.
    """
    if not 1 <= count <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be {count} groups.")
    each, more = divmod(num_layers, count)
    return tuple(group for group in range(count) for _ in range(each + (1 if group < more else 0)))
