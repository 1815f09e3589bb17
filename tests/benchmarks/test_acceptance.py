"""How many drafts a model accepts, from the verdicts on rounds of the most drafts or by vLLM's own
counters; the prompts of chats and the picture.
"""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.acceptance import command, plots
from benchmarks.acceptance.chat import QUESTIONS, chat_group
from benchmarks.acceptance.command import Method, accepted_row, groups_left
from benchmarks.acceptance.engine import EAGLE3_DRAFTS, measure_eagle3, reached_by
from benchmarks.real.prompts import Group, Prompt, PromptError, Writer
from benchmarks.real.texts import Texts
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.engine.draft_length import MAX_DRAFTS
from specontext_vllm.synthetic.tasks import make_problem

LENGTHS = Method.LOSSLESS.lengths
HEAD = DEMO_MODEL / "retrieval_head"


def lossless_row(verdicts):
    return accepted_row({MAX_DRAFTS: reached_by(verdicts)}, LENGTHS)


@pytest.fixture(scope="module")
def writer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    words = random.Random(5).choices(
        "the amber key of Osric lies in Quenby, far away.".split(), k=4000
    )
    return Writer(tokenizer, Texts([[" ".join(words)]], tokenizer))


def test_a_shorter_round_accepts_what_the_longer_one_does_up_to_its_end():
    draws = random.Random(3)
    verdicts = [draws.randint(0, MAX_DRAFTS) for _ in range(200)]
    row = lossless_row(verdicts)
    assert row["rounds"] == 200
    for k in LENGTHS:
        assert row[f"accepted_{k}"] == pytest.approx(sum(min(v, k) for v in verdicts) / 200)
        asked = [v for v in verdicts if v >= k - 1]
        assert row[f"share_{k}"] == pytest.approx(sum(v >= k for v in asked) / len(asked))


def test_where_nothing_is_accepted_later_positions_have_no_share():
    row = lossless_row([0, 0, 0])
    assert row["accepted_6"] == 0 and row["share_1"] == 0 and row["share_2"] is None


def test_without_rounds_there_are_no_means(tmp_path):
    """As where every answer ends with its first token; 0 would say that drafts were rejected."""
    row = lossless_row([])
    assert row["rounds"] == 0 and row["accepted_1"] is None and row["positions_1"] is None
    cells = [{"task": "chat", "context": 8, **row}]
    plots.draw(cells, LENGTHS, "A title", tmp_path / "curve.png")


def test_a_chat_asks_about_a_text_and_leaves_room_for_the_answer(writer):
    group = chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=0)
    (text,) = writer.texts.sources[0]
    for number, prompt in enumerate(group.prompts):
        assert 1024 - 96 - 8 <= len(prompt.tokens) <= 1024 - 96
        question = QUESTIONS[number % len(QUESTIONS)]
        asked = writer.tokenizer.decode(prompt.tokens)
        before, after = asked.split(question)
        # As the chat template has it: the text in the user's turn, and the answer's turn begun.
        opened = writer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False
        )
        start, end = opened.split("@")
        assert before.startswith(start) and after == end
        assert before.removeprefix(start).rstrip() in text
    assert group.prompts[0] != group.prompts[len(QUESTIONS)], "another text each time"
    assert group == chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=0)
    assert group != chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=1)


def test_a_context_without_room_for_a_text_is_refused(writer):
    with pytest.raises(PromptError, match="^--contexts: found 160, too few tokens for chat with"):
        chat_group(writer, 160, 1, answer=96, seed=0)


def test_the_picture_has_a_panel_for_each_task_and_a_curve_for_each_context(tmp_path):
    rows = [
        {"task": task, "context": context, **lossless_row([context % 7, 3, 6])}
        for context in (2048, 4096)
        for task in ("text", "chat")
    ]
    figure = plots.draw(rows, LENGTHS, "A title", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["text", "chat"]
    for axis in figure.axes:
        labels = [line.get_label() for line in axis.get_lines()]
        assert labels == ["all of them", "2,048 tokens", "4,096 tokens"]
        drawn = axis.get_lines()[2].get_ydata()
        assert list(drawn) == [rows[2][f"accepted_{k}"] for k in LENGTHS]


def test_rounds_of_each_number_of_drafts_count_for_themselves():
    reached = {1: [10, 9], 2: [8, 6, 3], 3: [5, 4, 1, 0]}
    row = accepted_row(reached, range(1, 4))
    assert [row[f"rounds_{k}"] for k in (1, 2, 3)] == [10, 8, 5] and row["rounds"] == 5
    assert [row[f"accepted_{k}"] for k in (1, 2, 3)] == [0.9, 9 / 8, 1.0]
    assert row["positions_2"] == [6 / 8, 3 / 8]
    assert [row[f"share_{k}"] for k in (1, 2, 3)] == [0.8, 0.25, 0]


def test_only_the_very_same_prompts_are_not_asked_again():
    short, long = Group("text", 8, [Prompt([1])]), Group("text", 16, [Prompt([1])])
    cells = {"text at 8": {"prompts": short.digest}, "text at 16": {"prompts": "of others"}}
    assert groups_left([short, long], cells) == [long]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--head", str(HEAD), "--tasks", "poems"], "--tasks: found 'poems'; use text"),
        ([], "--head: found none; name the folder of a retrieval head."),
        (["--method", "eagle3"], "--drafter: found none; with --method eagle3 name an EAGLE-3"),
        (["--drafter", str(HEAD)], "--drafter: in lossless mode the model drafts; use --method"),
        (["--method", "eagle3", "--drafter", "/none"], "--head: found no config.json in /none"),
    ],
)
def test_other_options_are_refused(tmp_path, given, sentence):
    (tmp_path / "a.txt").write_text("text " * 100)
    options = ["--model", str(tmp_path), "--texts", str(tmp_path / "a.txt"), *given]
    done = CliRunner().invoke(app, ["acceptance", *options])
    assert done.exit_code == 2 and done.output.startswith(sentence)


def test_a_drafter_with_too_few_positions_is_refused():
    draft, model = SimpleNamespace(max_model_len=2048), SimpleNamespace(max_model_len=4100)
    speculative = SimpleNamespace(draft_model_config=draft)
    config = SimpleNamespace(speculative_config=speculative, model_config=model)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(ValueError, match="^--drafter: it drafts up to position 2048, .* the 4100"):
        measure_eagle3(llm)


def test_rounds_of_another_number_of_drafts_are_no_figures():
    """As where an engine does not do as the scheduler says."""

    class Engine:
        def __init__(self):
            self.scheduler = SimpleNamespace()
            draft = SimpleNamespace(max_model_len=100)
            config = SimpleNamespace(
                speculative_config=SimpleNamespace(draft_model_config=draft),
                model_config=SimpleNamespace(max_model_len=100),
                scheduler_config=SimpleNamespace(max_num_seqs=2),
            )
            core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
            self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=core)
            self.rounds = 0

        def generate(self, *args, **kwargs):
            self.rounds += 3
            assert self.scheduler.dynamic_sd_lookup == [1, 1, 1]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2, 3, 4])])]

        def get_metrics(self):
            counts = {"drafts": self.rounds, "draft_tokens": 5 * self.rounds}
            metrics = [
                SimpleNamespace(name=f"vllm:spec_decode_num_{name}", value=value)
                for name, value in counts.items()
            ]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            return [*metrics, SimpleNamespace(name=name, values=[0] * EAGLE3_DRAFTS)]

    with pytest.raises(RuntimeError, match="^rounds of 1 drafts: 3 of them verified 15 drafts"):
        measure_eagle3(Engine())(Group("text", 8, [Prompt([1])]), 4)


@pytest.mark.slow
def test_an_eagle3_head_drafts_with_every_number_of_drafts(forked_children, tmp_path):
    texts, prompts, tokens = tmp_path / "facts.txt", 2, 24
    # Of the kind that the demo model and its head were trained on.
    texts.write_text(
        "\n\n".join(
            make_problem("recitation", seed=seed, approx_tokens=2000).messages[0]["content"]
            for seed in range(2)
        )
    )
    options = f"--method eagle3 --prompts {prompts} --answer-tokens {tokens} --dtype float32"
    given = ["acceptance", "--model", str(DEMO_MODEL), "--texts", str(texts)]
    given += [*options.split(), "--drafter", str(HEAD), "--tasks", "copy,chat"]
    given += ["--contexts", "448", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    done = CliRunner(env={"VLLM_CPU_KVCACHE_SPACE": "1"}).invoke(app, given)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("acceptance-demo-eagle3-*.json")
    result = json.loads(path.read_text())
    assert [(row["task"], row["context"]) for row in result["rows"]] == [
        ("copy", 448),
        ("chat", 448),
    ]
    copy = result["rows"][0]
    reached = result["details"]["cells"]["copy at 448"]["reached"]
    assert list(reached) == [str(k) for k in range(1, EAGLE3_DRAFTS + 1)]
    assert copy["tokens"] == prompts * tokens
    for k in range(1, EAGLE3_DRAFTS + 1):
        rounds, *accepted = reached[str(k)]
        assert len(accepted) == k and sorted(accepted, reverse=True) == accepted
        assert copy[f"accepted_{k}"] == pytest.approx(sum(accepted) / rounds)
        # The first token of an answer is the prompt's; each round samples one and keeps drafts,
        # the last one perhaps more than were asked for.
        beyond = rounds + sum(accepted) - prompts * (tokens - 1)
        assert 0 <= beyond <= k * prompts
    # The demo's head was trained to draft one token.
    assert copy["accepted_1"] > 0.3
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # What was measured is not measured again.
    def none(*args, **kwargs):
        raise AssertionError("an engine was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_child", none)
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        other = CliRunner().invoke(app, [*given, "--budget", "256"])
    assert json.loads(path.read_text())["rows"] == result["rows"]
    assert other.exit_code == 2 and "was made with another budget (512, now 256)" in other.output
