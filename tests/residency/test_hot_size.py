"""The size of the hot buffers follows the time law, and the figures it rests on are those of the
counters.
"""

import numpy as np
import pytest
import torch

from specontext_vllm.residency.hot_size import (
    PRIOR_RATES,
    SETTLE_READINGS,
    HotSizePolicy,
    prior_rate,
)
from specontext_vllm.residency.ledger import Ledger
from specontext_vllm.residency.meter import POLL_STEPS, Meter, miss_rates, ratios
from specontext_vllm.step_data import ScheduledStep, StartedRequest


def loaded(pages, requests=4, frames=2000):
    """The ledger of a load of equal requests: 10 layers, all of them mirrored."""
    ledger = Ledger(
        num_layers=10,
        num_pages=requests * pages,
        frames=np.arange(frames),
        host_layers=10,
        hot_pages=40,
        max_requests=requests,
        keep_unreferenced=False,
        return_pages=10**6,
    )
    started = [
        StartedRequest(f"r{i}", list(range(i * pages, (i + 1) * pages)), 0) for i in range(requests)
    ]
    ledger.follow(ScheduledStep(started=started, decoding=[request.name for request in started]))
    return ledger


def settled(policy, ledger):
    for _ in range(SETTLE_READINGS):
        size = policy.choose(ledger)
    return size


def test_long_contexts_keep_large_buffers_and_short_ones_get_small_ones():
    long, short = loaded(300), loaded(60)
    # 60 pages a request: 4 x 60 x 10 = 2400 pages for 2000 frames; large buffers (40) free 80 a
    # layer, small ones (20) 160.
    assert (short.layers_to_offload(40), short.layers_to_offload(20)) == (5, 3)
    policy = HotSizePolicy(20, 40)
    for _ in range(20):
        policy.observe(0.10, 0.11, None)
    assert settled(policy, long) == 40, "10 x 0.10 against 9 x 0.11"
    assert settled(policy, short) == 20, "5 x 0.10 against 3 x 0.11"


def test_it_comes_back_when_misses_rise_together_and_does_not_flutter():
    policy, short, long = HotSizePolicy(20, 40), loaded(60), loaded(300)
    for _ in range(20):
        policy.observe(0.05, 0.06, 0.5)
    assert settled(policy, short) == 20
    sizes = [policy.choose(short) for _ in range(100)]
    assert set(sizes) == {20}
    policy.rates[40] = 0.2 * policy.rates[20]
    before = policy.rates[40] / policy.rates[20]
    for _ in range(50):
        policy.observe(0.3, 0.3, None)
    assert policy.rates[40] / policy.rates[20] == pytest.approx(before), (
        "what larger buffers would save is not seen in small ones"
    )
    assert settled(policy, long) == 40


def test_sizes_stay_while_the_copies_hide_behind_the_compute():
    policy, short = HotSizePolicy(20, 40), loaded(60)
    for late, size in ((0.0, 40), (0.04, 40), (0.06, 20), (0.0, 20)):
        for _ in range(20):
            policy.observe(0.10, 0.11, late)
        assert settled(policy, short) == size


def test_priors_and_equal_sizes():
    assert HotSizePolicy(20, 40).rates == {20: PRIOR_RATES[0], 40: PRIOR_RATES[1]}
    assert HotSizePolicy(20, 20).rates == {20: PRIOR_RATES[0]}
    assert HotSizePolicy(20, 30).rates[30] == pytest.approx(sum(PRIOR_RATES) / 2)
    assert prior_rate(10, 20) == PRIOR_RATES[0] and prior_rate(100, 20) == PRIOR_RATES[1]
    same = HotSizePolicy(20, 20)
    same.observe(0.5, 0.5, None)
    assert settled(same, loaded(60)) == 20


def test_meter_shows_the_counters_late_and_exactly(device):
    meter = Meter(device)
    meter.counts += 1
    meter.counts[1] += 2
    news = []
    for _ in range(POLL_STEPS + 20):
        news.append(meter.poll())
        if device.type == "cuda":
            # A step takes longer than the copy; here there is no step.
            torch.cuda.synchronize()
    seen = [n for n in news if n is not None]
    assert news[: POLL_STEPS - 1] == [None] * (POLL_STEPS - 1) and seen[0].tolist() == [
        1,
        3,
        1,
        1,
        1,
        1,
        1,
        1,
    ]
    assert meter.seen.tolist() == seen[0].tolist()
    assert (
        meter.read(reset=True).tolist() == [1, 3, 1, 1, 1, 1, 1, 1]
        and not meter.read(reset=False).any()
    )


def test_ratios_of_counters():
    counted = np.array([200, 20, 30, 80, 10, 2, 5000, 7])
    assert miss_rates(counted) == (0.1, 0.25) and miss_rates(0 * counted) is None
    assert ratios(counted, 8192) == {
        "hit_rate": 0.9,
        "fetched_bytes": 80 * 8192,
        "late_share": 0.2,
        "late_us": 2.5,
    }
