"""What a cluster of our own finds of the machine."""

from __future__ import annotations

import os

import pytest

from specontext_vllm.sidecar.link import _other_gpus


@pytest.mark.parametrize(
    ("visible", "worker_gpu", "found"),
    [("4,5,6", 1, "4,6"), ("4,5", None, "4,5"), ("7", 0, "7")],
    ids=["others are left", "no GPU in the worker", "only the worker's own"],
)
def test_the_workers_gpu_is_left_alone_if_there_are_others(monkeypatch, visible, worker_gpu, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with _other_gpus(worker_gpu):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == found
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
