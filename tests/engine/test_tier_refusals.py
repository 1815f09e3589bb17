"""A host pool that cannot be had stops the engine at its start, with a sentence that has the numbers."""

from __future__ import annotations

import pytest

from tests.engine.conftest import DEMO_MODEL, engine

HEAD = {"retrieval_head": str(DEMO_MODEL / "retrieval_head"), "budget": 128}


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ({}, {"host_kv_gib": 1e6}, r"host_kv_gib: found 1000000.0, but this machine has [\d.]+ GiB of memory; lower it"),
        ({"max_num_seqs": 256}, {"host_kv_gib": 0.1, "gpu_kv_gib": 0.05}, r"host_kv_gib: hot buffers for --max-num-seqs 256 may take .*--max-num-seqs \d+ is the largest"),
        ({"num_gpu_blocks_override": 40000}, {"host_kv_gib": 0.1, "gpu_kv_gib": 0.01}, r"host_kv_gib: --num-gpu-blocks-override 40000 pages need"),
    ],
    ids=["too large", "gains nothing", "too many blocks"],
)  # fmt: skip
def test_refused_with_the_numbers(shape, settings, sentence):
    arguments = {"attention_backend": "specontext", "num_gpu_blocks_override": None, **shape}
    with pytest.raises(ValueError, match=sentence):
        with engine(**arguments, additional_config={"specontext": {**HEAD, **settings}}):
            pass
