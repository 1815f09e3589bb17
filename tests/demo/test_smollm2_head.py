"""The committed head of `make demo-smollm2`."""

import json
from pathlib import Path

from specontext_vllm.retrieval.checkpoint import check_fits, read_checkpoint

HEAD = Path(__file__).parents[2] / "models" / "smollm2-head"


def test_the_head_is_small_and_fits_the_model():
    head = read_checkpoint(HEAD)
    assert head.is_int8 and head.spec.partial_rotary_factor == 0.5
    check_fits(head.spec, target_hidden_size=576, num_layers=30, num_kv_heads=3, vocab_size=49152)
    assert sum(file.stat().st_size for file in HEAD.iterdir()) < 5_000_000


def test_its_log_names_no_place_on_a_machine():
    assert "/" not in (HEAD / "run.json").read_text()
    steps = [json.loads(line)["step"] for line in (HEAD / "curve.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 2128
