"""What tests of several benchmarks share."""

from random import Random

import pytest


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file that stays the same, whatever is written in the docs."""
    random, path = Random(0), tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join("".join(random.choices("aeinorst", k=4)) for _ in range(4000)))
    return path
