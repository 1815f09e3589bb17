"""Runs on the demo model: a kill in the middle changes nothing, gradients reach what each loss
trains, and the head learns.
"""

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from specontext_vllm.distillation.data import Sequences, Synthetic
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.draft_trainer import DraftDistiller
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.head_trainer import HeadDistiller
from specontext_vllm.distillation.page_loss import PageTarget
from specontext_vllm.distillation.recall import HeldOut
from specontext_vllm.distillation.settings import Progress, Settings, rate_at
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import Teacher, load_teacher, read_config, read_tokenizer
from specontext_vllm.distillation.trainer import HELD_OUT_SEQUENCES
from tests.engine.conftest import DEMO_MODEL
from tests.forked import context

STEPS, CONTEXT = 10, 256
SETTINGS = {
    "context": CONTEXT,
    "batch_tokens": CONTEXT,
    "budget": 128,
    "steps": STEPS,
    "save_seconds": 0.0,
    "draft_positions": 32,
}


def make_run(out: Path, **changes) -> DraftDistiller:
    settings = Settings(**{**SETTINGS, **changes})
    tokenizer = read_tokenizer(DEMO_MODEL)
    torch.manual_seed(settings.seed)
    draft = DraftModel(DraftShape.for_target(read_config(DEMO_MODEL), max_position=CONTEXT))
    teacher = Teacher(
        load_teacher(DEMO_MODEL, torch.device("cpu"), torch.float32), draft.shape.aux_layers
    )
    data, held_out = (
        Sequences(Synthetic(tokenizer), settings.lengths, CONTEXT, held_out=held)
        for held in (False, True)
    )
    return DraftDistiller(teacher, draft, data, held_out, settings, out, Accelerator(cpu=True))


def run_to_the_end(out: Path) -> None:
    torch.set_num_threads(1)
    run = make_run(out)
    run.resume()
    list(run.run())


@pytest.fixture(scope="module")
def start() -> Callable[[Path], BaseProcess]:
    """Starts ``run_to_the_end`` in a process of its own. In this one vLLM may have bound the
    threads (its CPU worker takes torch.set_num_threads away), and sums differ in their last bits
    with the number of threads.
    """

    def start(out: Path) -> BaseProcess:
        process = context().Process(target=run_to_the_end, args=(out,))
        process.start()
        return process

    return start


def end(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    end(start(out))
    return out


def steps_of(out: Path) -> list[int]:
    return [
        json.loads(line)["step"]
        for line in (out / "training" / "curve.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(start, uninterrupted, tmp_path):
    process = start(tmp_path)
    state = tmp_path / "training" / "state.pt"
    try:
        while process.is_alive() and not (
            state.is_file() and 3 <= torch.load(state, weights_only=True)["progress"]["step"]
        ):
            time.sleep(0.02)
        assert process.is_alive(), "the run was over before it could be killed"
    finally:
        process.kill()
        process.join()
    stopped = torch.load(state, weights_only=True)["progress"]["step"]
    assert 3 <= stopped < STEPS
    end(start(tmp_path))
    for name, tensor in load_file(uninterrupted / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], tensor), name
    assert steps_of(tmp_path) == steps_of(uninterrupted) == [0, STEPS]


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_state(uninterrupted, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.step(*run.data[0])
    run.save()
    run.step(*run.data[1])

    def half(_, part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    monkeypatch.undo()
    again = make_run(tmp_path)
    assert again.resume() and again.progress.step == 1


def test_a_resumed_curve_forgets_what_came_after_the_state(tmp_path):
    run = make_run(tmp_path)
    run.step(*run.data[0])
    run.save()
    run.curve_file.write_text('{"step": 0}\n{"step": 1}\n{"step": 7}\n{"ste')
    again = make_run(tmp_path)
    again.resume()
    assert steps_of(tmp_path) == [0, 1]


TRAINED = {
    "align": {"fc", "input_layernorm", "hidden_norm", "q_proj", "k_proj"},
    "draft": {
        "fc",
        "input_layernorm",
        "hidden_norm",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "post_attention_layernorm",
        "norm",
        "lm_head",
    },
}
TRAINED["both"] = TRAINED["draft"]


@pytest.mark.parametrize("loss", TRAINED)
def test_each_loss_trains_its_part(tmp_path, loss):
    run = make_run(tmp_path, loss=loss)
    before = {name: p.detach().clone() for name, p in run.head.named_parameters()}
    found = run.step(*run.data[0])
    drafts = {"draft", "ahead"}
    assert set(found) == {"align": {"align"}, "draft": drafts, "both": drafts | {"align"}}[loss]
    changed = {
        name.removesuffix(".weight")
        for name, p in run.head.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert changed == TRAINED[loss]
    assert all(p.grad is None for p in run.teacher.model.parameters())


def test_a_frozen_head_learns_to_draft_alone(tmp_path):
    run = make_run(tmp_path, loss="draft", freeze_retrieval=True)
    before = {name: p.detach().clone() for name, p in run.head.named_parameters()}
    for number in range(2):
        run.step(*run.data[number])
    for name, parameter in run.head.named_parameters():
        frozen = name.removesuffix(".weight") in TRAINED["align"]
        assert torch.equal(parameter, before[name]) == frozen, name
    run.save()
    again = make_run(tmp_path, loss="draft", freeze_retrieval=True)
    assert again.resume() and again.progress.step == 2


def test_what_is_drafted_is_measured_beside_recall(tmp_path):
    """Unless there is nothing that drafts."""
    for loss, steps in (("both", 1), ("align", 2)):
        out = tmp_path / loss
        list(make_run(out, loss=loss, steps=steps).run())
        lines = (out / "training" / "curve.jsonl").read_text().splitlines()
        accepted = [json.loads(line).get("accepted") for line in lines]
        if loss == "align":
            assert accepted == [None, None]
        else:
            assert len(accepted) == 2 and all(len(of_drafts) == 5 for of_drafts in accepted)


def test_no_tensor_is_sequence_by_sequence_or_sequence_by_vocabulary(tmp_path):
    """Every result of every operation of a step, with a sequence so long that such a tensor would
    be the largest by far.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    length, vocabulary = CONTEXT * 4, 3136
    # Flash attention's own CPU kernel is one operation; its inside is not seen, and is not T x T.
    run = make_run(tmp_path, align_positions=8, draft_positions=16)
    run.head.rope = torch.zeros(length, run.head.shape.head_dim)
    largest = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest[tensor.numel()] = (str(function), tuple(tensor.shape))
            return result

    ids = torch.randint(0, vocabulary, (1, length))
    with Watch():
        run.step(ids, torch.full((1, length), 0.1))
    assert max(largest) < min(length * length, length * vocabulary), largest[max(largest)]


def test_the_teacher_sees_held_out_sequences_once_and_the_figures_stay(tmp_path, monkeypatch):
    """A report after every step, each against one that asks the teacher anew."""
    run = make_run(tmp_path, steps=3, report_seconds=0.0, measuring_share=float("inf"))
    held_out = list(make_run(tmp_path).held_out.batches)
    assert len(held_out) == HELD_OUT_SEQUENCES
    seen, ask = [], Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda self, ids, *rest: seen.append(ids) or ask(self, ids, *rest)
    )

    def times():
        return [sum(torch.equal(ids, asked) for asked in seen) for ids, _ in held_out]

    found = []
    for figures in run.run():
        if figures.get("measured"):
            assert times() == [1] * HELD_OUT_SEQUENCES
            fresh = HeldOut(
                run.teacher, held_out, run.settings.budget, run.settings.align_positions
            )
            with monkeypatch.context() as unwatched:
                unwatched.setattr(Teacher, "__call__", ask)
                anew = fresh.recall(run.head)
            found.append((figures["recall"], figures["recall_best"]))
            assert found[-1] == (round(anew.found, 4), round(anew.best, 4))
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert (
        len(found) == 4
        and len({recall for recall, _ in found}) > 1
        and len({best for _, best in found}) == 1
    )


class Slow(HeldOut):
    """Seconds that the teacher takes for the sequences besides, and a measurement."""

    looked, measured = 0.5, 0.2

    def prepare(self):
        if self._seen is None:
            time.sleep(self.looked)
        super().prepare()

    def recall(self, draft):
        time.sleep(self.measured)
        return super().recall(draft)


def slow_run(out: Path, **changes) -> DraftDistiller:
    run = make_run(out, report_seconds=0.0, save_seconds=1e9, **changes)
    run.held_out = Slow(
        run.teacher, list(run.held_out.batches), run.settings.budget, run.settings.align_positions
    )
    return run


def test_measuring_is_no_training_time(tmp_path):
    run = slow_run(tmp_path, steps=2, measuring_share=float("inf"))
    began = time.monotonic()
    list(run.run())
    assert steps_of(tmp_path) == [0, 1, 2]
    assert 0 < run.progress.seconds <= time.monotonic() - began - Slow.looked - 3 * Slow.measured


def test_a_run_by_the_clock_trains_for_all_of_its_hours(tmp_path):
    run = slow_run(tmp_path, steps=None, hours=0.6 / 3600)
    list(run.run())
    assert run.progress.seconds >= 0.6 and run.progress.step >= 1


def test_measuring_takes_a_tenth_of_the_time_at_most(tmp_path):
    list(slow_run(tmp_path).run())
    lines = [
        json.loads(line)
        for line in (tmp_path / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert lines[0]["step"] == 0 and lines[-1]["step"] == STEPS
    gaps = [
        after["seconds"] - before["seconds"]
        for before, after in zip(lines, lines[1:-1], strict=False)
    ]
    # The curve has tenths of seconds.
    assert all(gap >= Slow.measured / 0.1 - 0.1 for gap in gaps) and len(lines) < STEPS


def test_a_run_that_was_over_is_not_measured_again(tmp_path):
    list(make_run(tmp_path, steps=1).run())
    again = make_run(tmp_path, steps=1)
    assert again.resume()
    list(again.run())
    assert steps_of(tmp_path) == [0, 1]


def test_what_is_kept_of_held_out_sequences_is_what_the_docstring_says(tmp_path):
    run = make_run(tmp_path)
    run.held_out.recall(run.head)
    hidden, tokens = run.head.shape.hidden, HELD_OUT_SEQUENCES * CONTEXT
    tensors = [tensor for kept in run.held_out._seen for tensor in vars(kept).values()]
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors)
    # A view would hold what it is a view of.
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    states = tokens * 4 * hidden * 4
    assert states <= held < 1.15 * states


def test_learning_rate_rises_then_falls_by_steps_or_by_the_clock():
    by_steps = Settings(**{**SETTINGS, "steps": 1000})
    rates = [rate_at(by_steps, Progress(step=step)) for step in (0, 49, 500, 999)]
    assert rates[0] < rates[1] > rates[2] > rates[3] >= 0.1 * by_steps.learning_rate
    by_clock = Settings(**{**SETTINGS, "steps": None, "hours": 1.0})
    assert rate_at(by_clock, Progress(step=5000, seconds=3600)) == pytest.approx(
        0.1 * by_clock.learning_rate
    )
    assert Progress(seconds=1800).share(by_clock) == 0.5


def make_head_run(out: Path, **changes) -> HeadDistiller:
    settings = Settings(**{**SETTINGS, "context": 512, "positions": 16, "stretch": 16, **changes})
    config = read_config(DEMO_MODEL)
    torch.manual_seed(settings.seed)
    head = HeadModel(HeadShape.for_target(config, max_position=512))
    model = load_teacher(DEMO_MODEL, torch.device("cpu"), torch.float32)
    data, held_out = (
        Sequences(Synthetic(read_tokenizer(DEMO_MODEL)), [512], 512, held_out=held)
        for held in (False, True)
    )
    teacher = Teacher(model, head.aux_layers)
    return HeadDistiller(teacher, head, data, held_out, settings, out, Accelerator(cpu=True))


def test_a_head_goes_on_where_it_stopped_and_all_of_it_learns(tmp_path):
    one = make_head_run(tmp_path / "one")
    before = {name: t.clone() for name, t in one.head.tensors().items()}
    one.step(*one.data[0])
    one.save()
    two = make_head_run(tmp_path / "one")
    assert two.resume()
    for run in (one, two):
        run.step(*run.data[1])
    for name, tensor in one.head.tensors().items():
        torch.testing.assert_close(tensor, two.head.tensors()[name], rtol=0, atol=0)
        assert not torch.equal(tensor, before[name]), name


def test_a_stretch_sees_what_is_missing(tmp_path):
    """The loss differs from that of dense states, unless everything is read."""
    run = make_head_run(tmp_path)
    ids, weights = run.data[0]
    generator = run.generator(ids.device)
    stretch = torch.arange(300, 316).expand(ids.shape[0], -1)
    lesson = run.teacher(ids, stretch, PageTarget(2), keep_cache=True)
    chosen = run.stretch_pages(lesson, stretch, generator)
    few, all_pages = (
        run.losses(
            lesson,
            stretch,
            weights,
            generator,
            states=run.teacher.decode(ids, lesson.cache, 301, pages),
        )["page"]
        for pages in (chosen, torch.ones_like(chosen))
    )
    dense = run.losses(lesson, stretch, weights, generator)["page"]
    assert few != dense
    torch.testing.assert_close(all_pages, dense)
