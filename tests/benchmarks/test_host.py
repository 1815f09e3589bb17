"""Turns come in order, and engines are compared round by round."""

from __future__ import annotations

import threading

import pytest

from benchmarks.engines import Cell
from benchmarks.host import engine
from benchmarks.host.command import make_rows
from benchmarks.host.engine import Turns


def test_turns_go_round(monkeypatch):
    places, seen = [threading.Semaphore(0) for _ in range(3)], []

    def work(own):
        for turn in range(4):
            with Turns(places, own).turn():
                seen.append((turn, own))

    threads = [threading.Thread(target=work, args=(own,)) for own in (2, 0, 1)]
    for thread in threads:
        thread.start()
    places[0].release()
    for thread in threads:
        thread.join(20)
    assert seen == [(turn, own) for turn in range(4) for own in range(3)]
    monkeypatch.setattr(engine, "TURN_SECONDS", 0.01)
    with (
        pytest.raises(RuntimeError, match="waited 0.01 s for the turn of another engine"),
        Turns(places, 1).turn(),
    ):
        pass


def test_a_host_that_slows_down_for_all_does_not_change_the_ratio():
    calls = {"execute_model": 1.0, "sample_tokens": 0.5, "wait": 0.25}

    def rounds(*medians):
        return {
            "rounds_ms": [[m - 0.1, m, m + 3] for m in medians],
            "busy_ms": 1.5,
            "calls_ms": calls,
        }

    details = {
        "engines": {
            "stock": {"2x1k": rounds(2, 4, 8)},
            "specontext": {"2x1k": rounds(2.2, 4.4, 9.6)},
        }
    }
    stock, ours = make_rows([Cell.parse("2x1k")], ["stock", "specontext", "two-tiers"], details)
    assert (
        "ratio" not in stock
        and ours["ratio"] == pytest.approx(1.1)
        and ours["ratios"] == "1.10 to 1.20"
    )
    assert ours["rest"] == pytest.approx(ours["step"] - 1.75)
