"""What a cluster of our own finds of the machine, and how long a step waits for an actor."""

from __future__ import annotations

import os

import pytest

from specontext_vllm.sidecar.cluster import only_other_gpus
from specontext_vllm.sidecar.link import (
    FIRST_SECONDS,
    REPLY_SECONDS,
    SLACK,
    Patience,
)


@pytest.mark.parametrize(
    ("visible", "worker_gpu", "found"),
    [("4,5,6", 1, "4,6"), ("4,5", None, "4,5"), ("7", 0, "7")],
    ids=["others are left", "no GPU in the worker", "only the worker's own"],
)
def test_the_workers_gpu_is_left_alone_if_there_are_others(monkeypatch, visible, worker_gpu, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with only_other_gpus(worker_gpu):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == found
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_step_waits_for_seconds_and_longer_only_where_it_usually_takes_long():
    patience = Patience()
    assert patience.seconds(0) == patience.seconds(1000) == FIRST_SECONDS
    patience.note(0, learning=0.0, selecting=0.1)
    assert patience.seconds(0) == pytest.approx(REPLY_SECONDS + SLACK * 0.1)
    assert patience.seconds(1000) == FIRST_SECONDS, "no prompt has been learned yet"
    patience.note(1000, learning=2.0, selecting=0.3)
    # Selections took 0.2 s on average, prompt tokens 2 ms.
    assert patience.seconds(0) == pytest.approx(REPLY_SECONDS + SLACK * 0.2)
    assert patience.seconds(100) == pytest.approx(REPLY_SECONDS + SLACK * 0.4)
    assert patience.seconds(100_000) == FIRST_SECONDS
    # A single pause weighs little in the end.
    patience.note(0, learning=0.0, selecting=4.0)
    for _ in range(1000):
        patience.note(0, learning=0.0, selecting=0.003)
    assert patience.seconds(0) < REPLY_SECONDS + 0.1
