"""How much host memory a pool takes, for the machine's free memory and those that share it."""

import pytest

from specontext_vllm.config import ConfigError
from specontext_vllm.residency import pool_size
from specontext_vllm.residency.pool_size import (
    asked_host_bytes,
    recommended_host_bytes,
    worker_host_bytes,
)


def test_auto_leaves_a_reserve_and_takes_no_more_than_requests_can_fill():
    gib = 2**30
    assert recommended_host_bytes(20 * gib, 500 * gib) == 12 * gib
    assert recommended_host_bytes(500 * gib, 1000 * gib) == 450 * gib
    assert recommended_host_bytes(500 * gib, 80 * gib) == 80 * gib
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 'auto', but this machine has 7\.00 GiB of memory free, all "
        r"within the 8\.00 GiB that auto leaves alone",
    ):
        recommended_host_bytes(7 * gib, 80 * gib)


def test_engines_on_one_machine_share_what_was_asked_for():
    assert asked_host_bytes(40, 41 << 30, 1) == asked_host_bytes(40, 20 << 30, 2) == 40 << 30
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 40, of which this engine takes 20\.00 GiB, but this machine "
        r"has 19\.00 GiB of memory free; lower it",
    ):
        asked_host_bytes(40, 19 << 30, 2)
    with pytest.raises(
        ConfigError, match=r"takes 20\.00000 GiB, but this machine has 19\.99999 GiB"
    ):
        asked_host_bytes(40, (20 << 30) - 10_000, 2)


@pytest.mark.parametrize(
    ("asked", "gib_each"), [(40, 10), ("auto", 20)], ids=["a number", "auto, as requests can fill"]
)
def test_the_workers_of_all_engines_share_one_setting(asked, gib_each, monkeypatch):
    monkeypatch.setattr(pool_size, "free_host_memory", lambda: 500 << 30)
    assert worker_host_bytes(asked, 20 << 30, workers=2, engines=2) == gib_each << 30
