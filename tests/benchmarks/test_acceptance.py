"""How many drafts a model accepts, from the verdicts on rounds of the most drafts."""

from __future__ import annotations

import random

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.acceptance import LENGTHS, accepted_rows
from specontext_vllm.engine.draft_length import MAX_DRAFTS


def test_a_shorter_round_accepts_what_the_longer_one_does_up_to_its_end():
    draws = random.Random(3)
    verdicts = [draws.randint(0, MAX_DRAFTS) for _ in range(200)]
    row = accepted_rows(verdicts)
    assert row["rounds"] == 200
    for k in LENGTHS:
        assert row[f"accepted_{k}"] == pytest.approx(sum(min(v, k) for v in verdicts) / 200)
        asked = [v for v in verdicts if v >= k - 1]
        assert row[f"share_{k}"] == pytest.approx(sum(v >= k for v in asked) / len(asked))


def test_where_nothing_is_accepted_later_positions_have_no_share():
    row = accepted_rows([0, 0, 0])
    assert row["accepted_6"] == 0 and row["share_1"] == 0 and row["share_2"] is None
    assert accepted_rows([])["rounds"] == 0


def test_an_unknown_task_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    options = ["--model", str(tmp_path), "--texts", str(tmp_path / "a.txt"), "--head", "x"]
    done = CliRunner().invoke(app, ["acceptance", *options, "--tasks", "poems"])
    assert done.exit_code == 2 and done.output.startswith("--tasks: found 'poems'; use text")
