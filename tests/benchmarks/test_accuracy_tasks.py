"""The prompts: their answers can be had from their text, their length is what was asked for,
LongBench's records become prompts.
"""

import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from benchmarks.accuracy import drafts, longbench, tasks
from benchmarks.accuracy.summary import score
from benchmarks.accuracy.writer import Example, Writer
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.synthetic import tasks as demo


class Words:
    """A tokenizer of another kind: every word and sign is a token, no chat template."""

    chat_template = None

    def __init__(self):
        self.words = []

    def __call__(self, text, add_special_tokens=True):
        first = len(self.words)
        self.words += ["<s>"] * add_special_tokens + re.findall(r"\s*(?:\w+|\S)", text)
        return {"input_ids": list(range(first, len(self.words)))}

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.fixture(scope="module")
def writer():
    return Writer(AutoTokenizer.from_pretrained(str(DEMO_MODEL)))


@pytest.mark.parametrize("context", [1024, 4096])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_prompt_has_the_length_asked_for(writer, name, context):
    for seed in range(2):
        example = tasks.TASKS[name].make(writer, seed, context)
        assert 0.96 * context <= len(example.prompt) <= context


@pytest.mark.parametrize("name", ["single", "multi_key", "recitation"])
def test_another_tokenizer_without_a_chat_template(name):
    writer = Writer(Words())
    example = tasks.TASKS[name].make(writer, 0, 2000)
    assert 0.96 * 2000 <= len(example.prompt) <= 2000
    assert writer.tokenizer.decode(example.prompt).endswith("\nAnswer:")


DRAFTS = {
    "single": drafts.single,
    "multi_key": drafts.multi_key,
    "multi_query": drafts.multi_query,
    "one_value": lambda seed, size: drafts.multi_value(seed, size, False),
    "recitation": drafts.recitation,
    "long_recitation": drafts.long_recitation,
    "key_among_passages": drafts.key_among_passages,
    "demo_needle": drafts.demo_needle,
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_answer_stands_once_in_the_text_and_the_right_reply_scores_full(name):
    for seed in range(5):
        draft = DRAFTS[name](seed, 2000)
        text = "\n".join(message["content"] for message in draft.messages)
        assert all(text.count(answer) == 1 for answer in draft.answers)
        asked = Example([], draft.answers, 0)
        assert (
            score(tasks.TASKS[name], asked, draft.reply) == 1.0
            and score(tasks.TASKS[name], asked, "") == 0.0
        )


@pytest.mark.parametrize("name", ["list_facts", "multi_value", "variables", "common_words"])
def test_a_full_reply_fits_the_limit_and_scores_full(writer, name):
    task = tasks.TASKS[name]
    draft = {
        "list_facts": drafts.list_facts,
        "variables": drafts.variables,
        "common_words": drafts.common_words,
        "multi_value": lambda seed, size: drafts.multi_value(seed, size, True),
    }[name](3, 2000)
    example = task.make(writer, 3, 2000)
    assert len(example.answers) >= 4
    assert task.metric(draft.reply, draft.answers) == 1.0
    assert len(writer.encode(draft.reply)) <= example.reply_tokens


def test_the_asked_name_tells_the_value():
    for seed in range(5):
        draft = drafts.multi_key(seed, 4096)
        text, question = draft.messages[0]["content"].rsplit("\n", 1)
        names = [word for word in re.findall(r"\w+", question) if word in drafts.KEYS]
        stated = [
            line for line in re.split(r"(?<=\.)\s", text) if re.search(rf"\b{names[0]}\b", line)
        ]
        assert len(names) == 1 and len(stated) == 1 and draft.answers[0] in stated[0]
        others = {
            word
            for line in re.split(r"(?<=\.)\s", text)
            for word in re.findall(r"\w+", line)
            if word in drafts.KEYS
        } - set(names)
        assert len(others) == 31


def test_a_conversation_answers_the_earlier_questions_from_the_text():
    draft = drafts.multi_query(0, 4096)
    roles = [message["role"] for message in draft.messages]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    for message in draft.messages[1::2]:
        name, value = re.fullmatch(r"The code of (\w+) is (.+)\.", message["content"]).groups()
        assert re.search(rf"\b{name}\b[^.]*{value}", draft.messages[0]["content"])


def test_a_key_among_passages_has_the_facts_and_passages_of_the_demos_own_problem():
    text = drafts.key_among_passages(0, 4096).messages[0]["content"]
    problem = demo.make_problem("needle", seed=0, approx_tokens=4096, layout="question_last")

    def counted(text):
        return len(re.findall(r"^Passage \w+:", text, re.MULTILINE)), len(
            {w for w in re.findall(r"\w+", text) if w in drafts.KEYS}
        )

    assert counted(text) == counted(problem.messages[0]["content"]) == (8, 40)


def test_the_demos_needles_come_in_all_of_its_layouts():
    questions = [drafts.demo_needle(seed, 2000).messages for seed in range(len(demo.LAYOUTS))]
    assert [len(m) for m in questions] == [
        {"split": 3, "multi_turn": 3}.get(layout, 1) for layout in demo.LAYOUTS
    ]


def test_variables_lead_back_to_the_number():
    draft = drafts.variables(1, 2000)
    text, question = draft.messages[0]["content"].rsplit("\n", 1)
    stands_for = {}
    for name, value, source in re.findall(r"Let (\w+) be (?:(\d+)|the same as (\w+))\.", text):
        stands_for[name] = value or stands_for[source]
    number = re.search(r"number (\d+)", question)[1]
    assert {name for name, value in stands_for.items() if value == number} == set(draft.answers)
    assert len(stands_for) == drafts.CHAINS * drafts.HOPS


@pytest.mark.parametrize("size", [1000, 4096, 32768])
def test_common_words_are_ten_times_as_common(size):
    draft = drafts.common_words(2, size)
    counts = Counter(draft.messages[0]["content"].split(".\n")[0].split(", "))
    common = [counts.pop(word) for word in draft.answers]
    assert len(common) == 10 and set(common) == {10 * n for n in set(counts.values())}


def test_tasks_of_one_document_share_its_text(writer):
    def shared(one, other):
        a, b = (tasks.TASKS[name].make(writer, 1, 4096).prompt for name in (one, other))
        return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)

    assert shared("multi_key", "multi_query") > 3900 and shared("multi_key", "list_facts") > 3900
    assert shared("one_value", "multi_value") > 3900
    recitation, perplexity = (
        tasks.TASKS[name].make(writer, 1, 4096) for name in ("recitation", "perplexity")
    )
    assert recitation.prompt == perplexity.prompt and recitation.forced is None
    assert perplexity.answers[0] in writer.tokenizer.decode(perplexity.forced)


def test_prompts_are_held_out_and_differ_by_seed(writer):
    made = {tuple(tasks.TASKS["multi_key"].make(writer, seed, 1024).prompt) for seed in range(8)}
    assert len(made) == 8
    # The trainer draws from the split "train" only.
    assert drafts.document_random("facts/8", 0).random() != demo.random_for(0, "train").random()


def write_records(folder, name, **fields):
    record = {
        "context": "Adam lives in Rome. " * 400,
        "input": "Where does Adam live?",
        "answers": ["Rome"],
        "all_classes": None,
        **fields,
    }
    (folder / f"{name}.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")


def test_longbench_records_become_prompts_that_lose_their_middle(tmp_path, writer):
    write_records(tmp_path, "hotpotqa", context="START " + "Adam lives in Rome. " * 400 + " END")
    write_records(
        tmp_path, "trec", input="Type of this:", answers=["Food"], all_classes=["Food", "Sport"]
    )
    write_records(tmp_path, "dureader")
    # JSON strings may hold Unicode's own line separators.
    write_records(tmp_path, "2wikimqa", context="one\u2028two\u0085three")
    found, left_out = longbench.read_folder(tmp_path)
    assert list(found) == [
        "longbench/2wikimqa",
        "longbench/hotpotqa",
        "longbench/trec",
    ] and left_out == ["dureader.jsonl"]
    example = found["longbench/hotpotqa"].make(writer, 0, 512)
    text = writer.tokenizer.decode(example.prompt)
    assert (
        450 < len(example.prompt) <= 512
        and "START" in text
        and "END" in text
        and "Where does Adam live?" in text
    )
    assert found["longbench/hotpotqa"].count == 1
    assert score(found["longbench/hotpotqa"], example, "in Rome") == pytest.approx(2 / 3)
    few_shot = found["longbench/trec"].make(writer, 0, 512)
    assert writer.tokenizer.decode(few_shot.prompt).endswith("Type of this:")
    assert score(found["longbench/trec"], few_shot, "Food\nType of that: Sport") == 1.0


def test_unusable_longbench_files_are_named(tmp_path):
    with pytest.raises(longbench.LongBenchError, match="--longbench: .* holds none"):
        longbench.read_folder(tmp_path)
    (tmp_path / "qasper.jsonl").write_text('{"context": "x", "input": "y"}\n')
    with pytest.raises(longbench.LongBenchError, match="line 1 of .*qasper.jsonl"):
        longbench.read_folder(tmp_path)
