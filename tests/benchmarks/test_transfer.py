"""Loads of the case `transfer`: enough to be fetched, or refused."""

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.transfer import Room


@pytest.mark.parametrize("itemsize", [2, 4], ids=["16-bit", "32-bit"])
def test_the_measured_load_has_to_fetch(itemsize):
    room = Room.of(40, 8000, 512, itemsize)
    assert room.fetches and room.pages >= 40 * 8000 // 16


@pytest.mark.parametrize(
    "load",
    [
        pytest.param((1, 500, 512), id="not one request of full length"),
        pytest.param((2, 500, 512), id="one tier"),
        pytest.param((0, 500, 512), id="none"),
        pytest.param((4, 2000, 112), id="small hot buffers"),
    ],
)
def test_a_load_that_needs_no_fetch_is_refused_in_a_sentence(load):
    assert not Room.of(*load, itemsize=4).fetches
    needles, tokens, budget = map(str, load)
    arguments = ["--needles", needles, "--recitations", "0", "--tokens", tokens]
    result = CliRunner().invoke(app, ["transfer", *arguments, "--budget", budget])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "leave nothing to fetch" in " ".join(result.output.replace("│", " ").split())
