"""The case `real` without engines: its prompts, its settings and the engines they take, its store
and its figures.
"""

import csv
import json
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.real import figures, files, forced, labels, long, ruler, tables
from benchmarks.real.leaks import Training, check_leaks
from benchmarks.real.prompts import Group, Prompt
from benchmarks.real.run import Run
from benchmarks.real.settings import (
    DENSE,
    LIVE,
    EngineKind,
    OptionError,
    Setting,
    Variant,
    engines,
    parse_heads,
    parse_variants,
    settings_of,
)
from benchmarks.real.store import Cell, Store
from benchmarks.real.tasks import Sources, make_groups
from benchmarks.real.texts import TextError, read_texts
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import ConfigError

DOCS = Path(__file__).parents[2] / "docs"
CONTEXT = 2048
SOURCES = Sources(DEMO_MODEL, (DOCS,), forced_tokens=32, long_tokens=1024)
TASKS = SOURCES.tasks()[0]


@pytest.fixture(scope="module")
def writer():
    return SOURCES.writer()


def one(writer, task, seed=0, context=CONTEXT):
    return TASKS[task].make(writer, Random(seed), context, 0)


# -- prompts


def test_a_passage_is_text_of_the_files_and_depends_on_the_seed(writer):
    begin = writer.tokenizer.bos_token_id
    prompts = [one(writer, "text", seed) for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert [len(p.tokens) + len(p.forced[0]) for p in prompts] == [CONTEXT] * 3
    sources = [text for source in writer.texts.sources for text in source]
    for prompt in prompts:
        assert prompt.tokens[0] == begin and begin not in prompt.tokens[1:]
        text = writer.tokenizer.decode([*prompt.tokens[1:], *prompt.forced[0]])
        assert any(text in source for source in sources)


def test_a_copy_goes_on_with_its_passage(writer):
    prompt = one(writer, "copy")
    shown, copied = prompt.tokens[-forced.SHOWN :], prompt.forced[0]
    assert len(prompt.tokens) + len(copied) == CONTEXT and len(copied) == 32
    again = writer.encode(forced.AGAIN)
    body = prompt.tokens[: -len(again) - len(shown)]
    assert prompt.tokens[len(body) : -len(shown)] == again
    passage = [*shown, *copied]
    places = [at for at in range(len(body)) if body[at : at + len(passage)] == passage]
    # The words are few, so the passage may stand elsewhere, too.
    assert any(200 <= at < len(body) - 256 - len(passage) for at in places)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_rulers_prompts_have_the_length_and_hold_the_answers(writer, task):
    prompt = one(writer, task)
    limit = CONTEXT - prompt.reply_tokens
    assert 0.93 * limit <= len(prompt.tokens) <= limit and not prompt.forced
    text = writer.tokenizer.decode(prompt.tokens)
    assert all(answer in text for answer in prompt.answers)
    assert len(set(prompt.answers)) == {
        "niah_multivalue": 4,
        "niah_multiquery": 4,
        "vt": 5,
        "cwe": 10,
        "fwe": 3,
    }.get(task, 1)
    assert ruler.match_all(prompt, [f"They are: {', '.join(prompt.answers).upper()}."]) == 1
    assert ruler.match_all(prompt, ["none"]) == ruler.match_part(prompt, ["none"]) == 0


def test_a_needle_is_asked_for_in_rulers_words(writer):
    prompt = one(writer, "niah_single_2")
    text = writer.tokenizer.decode(prompt.tokens)
    (number,) = prompt.answers
    key = text.rsplit("magic number for ", 1)[1].split(" ")[0]
    assert text.count(f"One of the special magic numbers for {key} is: {number}.") == 1
    assert text.endswith(f"The special magic number for {key} mentioned in the provided text is")
    assert f"What is the special magic number for {key} mentioned in the provided text?" in text
    many = writer.tokenizer.decode(one(writer, "niah_multiquery").tokens)
    assert "Some special magic numbers are hidden within" in many
    assert "What are all the special magic numbers for " in many and ", and " in many


def test_the_most_frequent_words_are_the_answers(writer):
    text = writer.tokenizer.decode(one(writer, "fwe").tokens)
    words = text.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    assert counts[0][1] == "..."
    assert [word for _, word in counts[1:4]] == one(writer, "fwe").answers


def test_examples_tell_the_label(writer):
    prompt = one(writer, "labels")
    assert len(prompt.tokens) + prompt.reply_room <= CONTEXT < len(prompt.tokens) + 200
    text = writer.tokenizer.decode(prompt.tokens)
    options = [writer.tokenizer.decode(ids).removeprefix(":").strip() for ids in prompt.forced]
    assert len(set(options)) == labels.KINDS == len(prompt.forced)
    *examples, asked = text.split("Sentence: ")[1:]
    shown = [example.strip().rsplit("\nKind: ", 1) for example in examples]
    assert {label for _, label in shown} <= set(options) and asked.endswith("\nKind")
    sentence = asked.removesuffix("\nKind")
    assert sentence not in [other for other, _ in shown]
    # The word that decides stands in the asked sentence and in all examples of its kind only.
    mine = [other for other, label in shown if label == options[0]]
    others = [other for other, label in shown if label != options[0]]
    assert mine and any(
        all(word in other for other in mine) and not any(word in other for other in others)
        for word in re.findall(r"[a-z]{4,}", sentence)
    )
    scores = [[-9.0] * prompt.unscored + [-float(place)] for place in range(1, 9)]
    assert labels.most_probable(prompt, scores) == 1
    assert labels.most_probable(prompt, [*scores[1:], scores[0]]) == 0
    assert labels.most_probable(prompt, [scores[0], *scores[:7]]) == 0, "a tie"


def test_measures_of_long_replies(writer):
    prompt = one(writer, "long")
    assert len(prompt.tokens) == prompt.reply_tokens == 1024 and not prompt.forced
    assert long.repeated([1, 2, 3, 4, 5, 6]) == 0
    assert long.repeated([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert long.equal_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert long.equal_tokens([1, 2], [1, 2]) == 2
    assert long.positions(2048) == [16, 64, 256, 1024]
    assert long.perplexity([-1.0, -3.0]) == pytest.approx(math.exp(2))


def test_questions_of_squad_and_hotpotqa(writer, tmp_path):
    assert set(files.QA_FILES) == set(files.qa_tasks(None)[1]) == set(files.qa_tasks(tmp_path)[1])
    paragraphs = [
        {
            "context": f"The capital of land {number} is city {number}.",
            "qas": [
                {
                    "question": f"What is the capital of land {number}?",
                    "answers": [{"text": f"city {number}"}],
                    "is_impossible": number == 1,
                }
            ],
        }
        for number in range(30)
    ]
    (tmp_path / "dev-v2.0.json").write_text(
        json.dumps({"data": [{"paragraphs": paragraphs[:2]}, {"paragraphs": paragraphs[2:]}]})
    )
    record = {
        "question": "Who?",
        "answer": "Ada",
        "context": [["Ada", ["Ada ", "did."]], ["Bob", ["Bob did not."]]],
    }
    (tmp_path / "hotpotqa.json").write_text(json.dumps([record]))
    found, absent = files.qa_tasks(tmp_path)
    assert not absent
    for seed in range(5):
        prompt = found["qa_1"].make(writer, Random(seed), 512, 0)
        text = writer.tokenizer.decode(prompt.tokens)
        number = text.rsplit("capital of land ", 1)[1].split("?")[0]
        assert number != "1" and prompt.answers == [f"city {number}"]
        assert f"\nThe capital of land {number} is city {number}." in text
        assert text.endswith("Answer:") and len(prompt.tokens) <= 512 - 32
        assert found["qa_1"].score(prompt, [f"It is City {number}"]) == 1
    text = writer.tokenizer.decode(found["qa_2"].make(writer, Random(0), 512, 0).tokens)
    assert "Ada\nAda did." in text and "Question: Who?" in text
    (tmp_path / "squad.json").write_text("[]")
    with pytest.raises(OptionError, match="--qa"):
        files.qa_tasks(tmp_path)


def test_longbench_is_asked_as_accuracy_asks_it(writer, tmp_path):
    record = {"context": "Ada wrote it. " * 400, "input": "Who wrote it?", "answers": ["Ada"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record) + "\n")
    (task,) = files.longbench_tasks(tmp_path)[0].values()
    prompt = task.make(writer, Random(0), 512, 0)
    assert (task.name, task.count, prompt.reply_tokens) == ("longbench/hotpotqa", 1, 32)
    assert 400 < len(prompt.tokens) <= 480 and task.score(prompt, ["Ada"]) == 1


def test_prompts_do_not_depend_on_who_makes_them(monkeypatch):
    asked = SOURCES, ["niah_single_1", "text"], [512], 30, 7
    alone = make_groups(*asked)
    assert [len(group.prompts) for group in alone] == [30, 30]
    assert make_groups(SOURCES, ["text"], [512], 28, 7)[0].prompts == alone[1].prompts[:28]
    # One thread in the place of processes, which take seconds to start; what they are sent is that.
    monkeypatch.setattr("benchmarks.real.tasks.FEW", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(
        "benchmarks.real.tasks.ProcessPoolExecutor",
        lambda processes, context, **start: ThreadPoolExecutor(1, **start),
    )
    assert make_groups(*asked) == alone
    assert pickle.loads(pickle.dumps(SOURCES)) == SOURCES


def test_prompts_that_were_trained_on_are_refused(writer, tmp_path):
    groups = make_groups(SOURCES, ["text"], [512], 3, 0)
    (tmp_path / "other.txt").write_text("Quite another text, about something else. " * 50)
    assert check_leaks(Training([tmp_path]), groups, writer.tokenizer) == {"text": 0.0}
    trained = writer.tokenizer.decode(groups[0].prompts[1].tokens[100:300])
    line = {"messages": [{"role": "user", "content": trained}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(OptionError, match="--leaks: .*% of all 13 words in a row of task text"):
        check_leaks(Training([tmp_path]), groups, writer.tokenizer)
    assert 0.1 < Training([tmp_path]).share([trained[:200], "something else " * 50]) < 0.9


def test_texts_that_cannot_be_used(writer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(TextError, match="--texts"):
            read_texts("--texts", [path])
    with pytest.raises(TextError, match="no passage of 900000 tokens"):
        writer.texts.passage(Random(0), 900_000)


# -- settings


def test_live_settings_are_those_that_an_engine_changes():
    from specontext_vllm.engine.settings import CHANGEABLE

    assert sorted(CHANGEABLE) == sorted(["retriever", "budget", *LIVE])


def test_heads_and_variants(tmp_path):
    own = parse_heads(DEMO_MODEL, [])
    assert own == {"own": DEMO_MODEL / "retrieval_head"}
    with pytest.raises(OptionError, match="--head: found 'a'"):
        parse_heads(DEMO_MODEL, ["a"])
    heads = {"a": tmp_path, "b": tmp_path}
    variants = parse_variants(
        "dlm,quest", ["near:recent_tokens=16", "one:retriever=mass,head=b"], heads
    )
    assert [(v.name, v.retriever, v.head) for v in variants] == [
        ("dlm a", "dlm", "a"),
        ("dlm b", "dlm", "b"),
        ("quest", "quest", None),
        ("near a", "dlm", "a"),
        ("near b", "dlm", "b"),
        ("one", "mass", "b"),
    ]
    near = Setting(variants[3], 512).changes()
    assert (near["recent_tokens"], near["sink_tokens"], near["budget"]) == (16, 16, 512)
    assert Setting(variants[0], 64).changes()["recent_tokens"] == 16
    for given, named in (
        (["x:retriever=best"], "best"),
        (["x:head=c"], "head=c"),
        (["x:recent_tokens=16", "x:recent_tokens=32"], "twice"),
    ):
        with pytest.raises(OptionError, match=named):
            parse_variants("", given, {"a": tmp_path})
    with pytest.raises(OptionError, match="--head"):
        parse_variants("dlm", [], {})
    with pytest.raises(ConfigError, match="nonsense"):
        settings_of(parse_variants("", ["x:nonsense=1"], {"a": tmp_path}), [512])


def test_engines_are_few():
    dlm = [Variant(f"dlm {head}", "dlm", head) for head in "ab"]
    fp8 = Variant("fp8", "dlm", "a", (("head_key_dtype", "fp8"),))
    settings = settings_of(
        [*dlm, fp8, *(Variant(name, name) for name in ("quest", "recent"))], [512]
    )
    on_gpu = {
        kind: [setting.name for setting in mine] for kind, mine in engines(settings, True).items()
    }
    assert on_gpu == {
        EngineKind("a", (), False): [DENSE, "recent 512", "dlm a 512"],
        EngineKind("b", (), False): ["dlm b 512"],
        EngineKind("a", (("head_key_dtype", "fp8"),), False): ["fp8 512"],
        EngineKind(None, (), True): ["quest 512"],
    }
    assert next(iter(on_gpu.values()))[0] == DENSE
    assert len(engines(settings, False)) == 3
    assert len(engines(settings_of([Variant("quest", "quest")], [512]), False)) == 1


# -- cells


QUEST = Setting(Variant("quest", "quest"), 128)
DENSE_SETTING = Setting(Variant(DENSE, DENSE))


def test_a_store_keeps_whole_cells_of_the_same_making(tmp_path):
    group = Group("text", 512, [Prompt([1, 2], [[3, 4]])])
    other = Group("text", 512, [Prompt([1, 2], [[3, 5]])])
    path = tmp_path / "cells.jsonl"
    store = Store(path, {"dtype": "float32"}, {})
    store.put(group, QUEST, {"scores": [-1.0]})
    with path.open("a") as file:
        file.write('{"key": "half')
    again = Store(path, {"dtype": "float32"}, {})
    assert again.get(group, QUEST)["scores"] == [-1.0]
    again.put(other, QUEST, {"scores": [-2.0]})
    assert Store(path, {"dtype": "float32"}, {}).get(other, QUEST)["scores"] == [-2.0]
    assert again.get(group, DENSE_SETTING) is None
    assert again.get(group, Setting(QUEST.variant, 256)) is None
    assert Store(path, {"dtype": "bfloat16"}, {}).get(group, QUEST) is None
    assert [json.loads(line)["scores"] for line in path.read_text().splitlines()] == [[-1], [-2]]


STATS = {"decode_rows": 4, "pages_read": 1, "pages_total": 4, "kept_mass_mean": None}


def result(scores):
    return {"scores": scores, "tokens": 8, "seconds": 1.0, "cached": 1.0, "stats": STATS}


def test_figures_are_paired_and_failed_tasks_do_not_count():
    scores = {
        ("text", DENSE_SETTING): [-2.0, -3.0, -4.0],
        ("text", QUEST): [-2.1, -3.2, -4.3],
        ("vt", DENSE_SETTING): [1.0, 0.8, 0.6],
        ("vt", QUEST): [1.0, 0.6, 0.6],
        ("cwe", DENSE_SETTING): [0.1, 0.2, 0.0],
        ("cwe", QUEST): [0.0, 0.0, 0.0],
    }
    cells = {Cell(task, 4096, setting): result(s) for (task, setting), s in scores.items()}
    lines = figures.figures(cells, TASKS)
    dense, quest = tables.rows(lines)
    assert quest["text"] == pytest.approx(-3.2)
    # Student's t over -0.1, -0.2, -0.3: 0.2 +- 4.303 * 0.1 / sqrt(3).
    assert quest["text_difference_text"] == "-0.200 (-0.448 to +0.048)"
    assert dense["text_difference_text"] == "-3.000" and dense["cwe_text"] == "0.10 †"
    assert dense["mean"] == pytest.approx(0.8) and dense["mean_tasks"] == 1
    assert quest["mean_difference"] == pytest.approx(-0.2 / 3)
    assert quest["pages_read"] == 0.25
    last = tables.compact(lines).splitlines()
    assert last[1].split() == [DENSE, "-3.000", "0.80", "0.10", "†"]
    assert last[2].split() == ["quest", "128", "-0.200", "-0.067", "-0.100"]


def test_a_run_goes_on_and_writes_what_is_there(tmp_path):
    groups = [
        Group(task, context, [Prompt([1, context], [[3, 4]])] * 3)
        for context in (512, 1024)
        for task in ("text", "vt")
    ]

    def run():
        return Run(
            TASKS,
            groups,
            [DENSE_SETTING, QUEST],
            Store(tmp_path / "cells.jsonl", {}, {}),
            report.Report("real-demo", "demo on real text: 3 prompts a cell", {}),
            tmp_path / "out",
        )

    first = run()
    assert [len(open_) for _, open_ in first.missing([DENSE_SETTING, QUEST])] == [2] * 4
    first.add(groups[0], DENSE_SETTING, result([-2.0, -3.0, -4.0]))
    first.add(groups[0], QUEST, result([-2.5, -3.0, -4.5]))
    first.add(groups[1], DENSE_SETTING, result([0.0, 0.2, 0.1]))
    again = run()
    # Dense cannot do vt at 512 tokens, so it is asked of nothing from there on.
    assert [
        (g.task, g.context, [s.name for s in open_]) for g, open_ in again.missing([QUEST])
    ] == [("text", 1024, ["quest 128"])]
    again.write()
    (text,) = (path.read_text() for path in (tmp_path / "out").glob("real-demo-*.md"))
    assert "| dense | 512 | -3.000 | " in text and "0.10 †" in text
    assert "| quest 128 | 512 | -0.333 (" in text
    assert "2 cells have not been measured" in text
    (table,) = (tmp_path / "out").glob("*.csv")
    with table.open() as file:
        assert [(line["task"], line["setting"]) for line in csv.DictReader(file)] == [
            ("text", DENSE),
            ("text", "quest 128"),
            ("vt", DENSE),
        ]
    (picture,) = (tmp_path / "out").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_long_replies_and_quest_have_tables_of_their_own():
    dlm = Setting(Variant("dlm", "dlm", "own"), 128)
    tokens = {DENSE: [1, 2, 3, 4] * 5, "dlm": [1, 2, 3, 4] * 4 + [9, 8, 7, 6]}
    cells = {
        Cell("long", 4096, setting): result([score, score]) | {"replies": [tokens[name]] * 2}
        for name, setting, score in ((DENSE, DENSE_SETTING, -1.0), ("dlm", dlm, -2.0))
    }
    cells |= {
        Cell("copy", 4096, setting): result(scores)
        for setting, scores in (
            (DENSE_SETTING, [-1.0, -1.0]),
            (QUEST, [-3.0, -4.0]),
            (dlm, [-1.5, -2.5]),
        )
    }
    lines = figures.figures(cells, TASKS)
    found = {row["name"]: row for row in tables.rows(lines)}
    assert found["dlm 128"]["equal_16"] == 1.0 and found[DENSE]["repeated"] == 1 - 4 / 17
    assert found["dlm 128"]["perplexity"] == pytest.approx(math.exp(2))
    assert found["dlm 128"]["copy_over_rival_text"].startswith("+1.500 (")
    assert "rival_name" not in found["quest 128"] and "long_name" not in found["quest 128"]
    assert list(tables.tables(lines)) == [
        "Dense, and differences to it",
        "Less quest at the same budget",
        "Long replies",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "needle"], "--tasks: found 'needle'"),
        (["--retrievers", "best"], "--retrievers: found 'best'"),
        (["--budgets", "many"], "--budgets: found 'many'"),
        (["--budgets", "32"], "budget: found 32"),
        (["--contexts", "65536"], "--contexts: found 65536"),
        (["--contexts", "64", "--tasks", "copy"], "--contexts: found 64"),
        (["--texts", "absent"], "--texts: absent"),
        (["--label", "a b"], "--label"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_with_its_name(arguments, named, tmp_path):
    base = ["real", "--model", str(DEMO_MODEL), "--texts", str(DOCS), "--contexts", "512"]
    base += ["--work", str(tmp_path), "--out", str(tmp_path), "--prompts", "2"]
    ran = CliRunner().invoke(app, [*base, *arguments])
    assert ran.exit_code == 2 and named in ran.stderr
