"""A copy shows what the tensors held when it was asked for, once."""

import torch

from specontext_vllm.late_copy import LateCopy


def arrived(copy: LateCopy):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy.take()


def test_a_copy_is_of_the_moment_it_was_asked_for(device):
    counts, sums = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
    )
    copy = LateCopy(counts, sums)
    assert copy.take() is None
    counts += 1
    assert copy.ask()
    counts += 1
    assert not copy.ask(), "the first copy has not been taken"
    first = arrived(copy)
    assert [part.tolist() for part in first] == [[1, 1], [0.0]]
    assert copy.take() is None
    assert copy.ask()
    assert arrived(copy)[0].tolist() == [2, 2]
    assert first[0].tolist() == [1, 1], "a copy that was taken stays"


def test_waiting_gives_the_present_and_drops_what_was_asked_for(device):
    counts = torch.ones(1, device=device)
    copy = LateCopy(counts)
    copy.ask()
    counts += 1
    assert copy.wait()[0].tolist() == [2.0]
    assert arrived(copy) is None
