"""The stages of a step: which of them there are, in which order, and what a graph holds of them."""

from types import SimpleNamespace

import pytest
import torch

from specontext_vllm.step_data import PageTable, RowPart, Selection, StepBatch, StepShape
from tests.steps import bare_step


class Recorder:
    """Notes the name of each method that is called, and returns what it was told to."""

    def __init__(self, calls, **returns):
        self._calls, self._returns = calls, returns

    def __getattr__(self, name):
        def call(*arguments, **named):
            self._calls.append(name)
            return self._returns.get(name)

        return call


class Graphs:
    """Notes what was to be captured, and under which name."""

    def __init__(self, calls):
        self.calls, self.names = calls, []

    def run(self, name, inputs, function, *arguments):
        self.names.append(name)
        self.calls.append("graph")
        function(*arguments)
        self.calls.append("end of graph")


@pytest.fixture
def calls():
    return []


def make(calls, shape, *, two_tiers=True, graphs=None, capturable=True):
    retriever = Recorder(calls, shape_step=shape)
    retriever.config = SimpleNamespace(stickiness=1.0)
    retriever.capturable = capturable
    tiers = Recorder(calls) if two_tiers else None
    selection = Selection.into(PageTable.allocate(4, 1, 2, torch.device("cpu")))
    step = bare_step(retriever, selection, tiers=tiers, graphs=graphs)
    step.attention = [(table, Recorder(calls)) for table, _ in step.attention]
    return step


def batch(decodes, prompts=0, table_rows=None, replayable=False):
    rows = decodes + prompts
    numbers = torch.zeros(rows, dtype=torch.int64)
    return StepBatch(
        token_ids=numbers,
        positions=numbers,
        slots=numbers,
        query_starts=numbers,
        seq_lens=numbers,
        block_table=numbers[:, None],
        seq_lens_bound=[1] * rows,
        num_decodes=decodes,
        table_rows=decodes if table_rows is None else table_rows,
        num_tokens=rows,
        replayable=replayable,
    )


def one_part(rows, chooses=True):
    return StepShape(rows, chooses, (RowPart(range(rows), 100),))


CHOOSING = ["project", "score", "stickiness", "select", "resolve"]


def test_all_stages_of_a_decode_step(calls):
    make(calls, one_part(2)).before_model(batch(2))
    assert calls == ["place_rows", "shape_step", *CHOOSING, "fetch", "stage", "plan"]


def test_with_one_tier_the_selection_is_the_page_table(calls):
    make(calls, one_part(2), two_tiers=False).before_model(batch(2))
    assert calls == ["shape_step", "project", "score", "select", "plan"]


def test_rows_whose_scores_do_not_fit_the_workspace_are_resolved_together(calls):
    parts = (RowPart(range(1), 9), RowPart(range(1, 2), 9))
    make(calls, StepShape(2, True, parts)).before_model(batch(2))
    again = ["score", "stickiness", "select"]
    assert calls[1:] == [
        "shape_step",
        "project",
        *again,
        *again,
        "resolve",
        "fetch",
        "stage",
        "plan",
    ]


def test_a_step_of_prompts_alone_selects_nothing(calls):
    """It is sent on all the same, to a sidecar; and a layer that comes back is copied."""
    make(calls, StepShape(0, False, ())).before_model(batch(0, prompts=2))
    assert calls == ["place_rows", "shape_step", "project", "fetch", "stage"]


def test_a_graph_holds_what_lies_between_tokens_and_page_tables(calls):
    graphs = Graphs(calls)
    make(calls, one_part(3), graphs=graphs).before_model(batch(3, table_rows=4, replayable=True))
    assert calls == [
        *("place_rows", "shape_step", "embed_outside", "graph", *CHOOSING, "end of graph"),
        *("fetch", "stage", "plan"),
    ]
    # Padding included, and an upper bound of the pages that many steps share.
    assert graphs.names == [("choose", StepShape(4, True, (RowPart(range(4), 128),)))]


@pytest.mark.parametrize(
    ("replayable", "capturable", "parts"), [(False, True, 1), (True, False, 1), (True, True, 2)]
)
def test_other_steps_are_launched_one_by_one(calls, replayable, capturable, parts):
    graphs = Graphs(calls)
    shape = StepShape(2, True, tuple(RowPart(range(i, i + 1), 9) for i in range(parts)))
    step = make(calls, shape, graphs=graphs, capturable=capturable)
    step.before_model(batch(2, replayable=replayable))
    assert not graphs.names and "select" in calls


def test_what_is_learned_of_decode_rows_is_captured_too(calls):
    graphs = Graphs(calls)
    step = make(calls, one_part(3), graphs=graphs)
    step.after_model(batch(3, table_rows=4, replayable=True), [torch.zeros(4, 1)])
    assert calls == ["graph", "learn", "end of graph"] and graphs.names == [("learn", 4, 1)]
    # A model that returns no padding, or prompt rows.
    step.after_model(batch(3, table_rows=4, replayable=True), [torch.zeros(3, 1)])
    step.after_model(batch(3, prompts=1), [torch.zeros(4, 1)])
    assert calls[3:] == ["learn", "learn"]
    step.after_model(batch(3), None)
    assert calls[3:] == ["learn", "learn"]
