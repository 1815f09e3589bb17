"""Which steps the case `capacity` counts as steady decode."""

from itertools import accumulate

from benchmarks.capacity.engine import SETTLE, steady_decode


def timed(*waves):
    """Ends and output counts of waves of (steps, requests, seconds a step)."""
    counts = [requests for steps, requests, _ in waves for _ in range(steps)]
    return list(accumulate(seconds for steps, _, seconds in waves for _ in range(steps))), counts


def test_the_full_wave_counts_and_not_a_longer_last_one():
    ends, counts = timed((40, 1, 0.9), (300, 26, 0.030), (5, 0, 1.0), (400, 14, 0.020))
    at_once, steps = steady_decode(ends, counts)
    assert (
        at_once == 26
        and len(steps) == 300 - SETTLE
        and max(abs(step - 30) for step in steps) < 1e-6
    )


def test_a_number_that_held_for_a_few_steps_does_not_count():
    ends, counts = timed((SETTLE + 10, 30, 0.5), (300, 20, 0.010))
    assert steady_decode(ends, counts)[0] == 20


def test_nothing_steady():
    ends, counts = timed(*[(2, requests, 0.1) for requests in (1, 2, 3, 2)])
    assert steady_decode(ends, counts) == (3, [])
