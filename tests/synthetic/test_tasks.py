"""The demo's problems: sizes, layouts, scoring, and that what is trained on is what is served."""

from __future__ import annotations

from random import Random

import pytest

from specontext_vllm.synthetic import tasks
from specontext_vllm.synthetic import words as W
from specontext_vllm.synthetic.vocabulary import vocabulary

KINDS = ("needle", "recitation")


def stretches(problem: tasks.Problem) -> list[str]:
    """The prompt as the server sees it, in the training format."""
    if problem.layout == "plain":
        return [text for text, _ in tasks.render([("text", problem.messages[0]["content"])])]
    turns = [(m["role"], m["content"]) for m in problem.messages]
    return [text for text, _ in tasks.render(turns)] + [tasks.ASSISTANT]


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1024, 4096, 8192])
def test_prompt_has_the_size_asked_for(kind: str, layout: str, size: int):
    problem = tasks.make_problem(kind, seed=3, approx_tokens=size, layout=layout)
    length = sum(len(tasks.pieces(text)) for text in stretches(problem))
    assert abs(length - size) <= 0.03 * size


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_answer_stands_once_in_the_prompt_and_scores_full(kind: str, layout: str):
    problem = tasks.make_problem(kind, seed=11, approx_tokens=2048, layout=layout)
    assert problem.messages[-1]["role"] == "user"
    text = "\n".join(m["content"] for m in problem.messages)
    assert text.count(problem.answer) == 1
    assert tasks.score(problem, problem.answer) == 1.0
    assert tasks.score(problem, "") == 0.0


def test_same_seed_same_problem_and_splits_differ():
    make = lambda **kw: tasks.make_problem("needle", approx_tokens=1024, **kw)  # noqa: E731
    assert make(seed=5) == make(seed=5)
    assert make(seed=5) != make(seed=6)
    assert make(seed=5) != make(seed=5, split="train")


def test_distractors_are_facts_under_other_names():
    problem = tasks.make_problem(
        "needle", seed=2, approx_tokens=8192, layout="question_last", distractors=128
    )
    stated = [
        line for m in problem.messages for line in m["content"].replace(". ", ".\n").split("\n")
    ]
    names = [
        word
        for line in stated
        if not line.startswith("Passage")
        for word in W.KEYS
        if f" {word} " in f"{line} "
    ]
    assert len(set(names)) >= 129


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The code of Marlow is 482913.", 1.0),
        ("482913", 1.0),
        ("The code of Marlow is 482914.", 0.0),
        ("4829130", 0.0),
        ("It is 48 2913.", 0.0),
    ],
)
def test_needle_score(reply: str, expected: float):
    problem = tasks.Problem("needle", "question_last", [{"role": "user", "content": "?"}], "482913")
    assert tasks.score(problem, reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Bakers sold seven apples.", 1.0),
        ("Passage Harbor: Bakers sold seven apples.", 1.0),
        (" Passage Harbor: Bakers sold nine apples.", 0.5),
        ("Bakers sold seven apples. Queens sang.", 1.0),
        ("Queens sang.", 0.0),
    ],
)
def test_recitation_score_is_the_right_share_from_the_start(reply: str, expected: float):
    problem = tasks.Problem(
        "recitation", "plain", [{"role": "user", "content": "?"}], "Bakers sold seven apples."
    )
    assert tasks.score(problem, reply) == expected


@pytest.mark.parametrize("size", [256, 512, 2048, 12288])
def test_training_documents_fit_and_use_known_pieces(size: int):
    known = {*vocabulary(), *tasks.SPECIALS}
    rng = tasks.random_for(7, "train")
    for _ in range(5):
        document = tasks.training_document(rng, size)
        cut = [piece for text, _ in document for piece in tasks.pieces(text)]
        assert len(cut) <= size
        assert set(cut) <= known
        assert "".join(cut) == "".join(text for text, _ in document)
        assert any(produced for _, produced in document)


def test_training_format_ends_every_answer():
    rendered = tasks.render(
        [("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("assistant", "So.")]
    )
    assert "".join(text for text, _ in rendered) == (
        "<|bos|><|user|>Who?<|end|><|assistant|>I.<|end|><|user|>Why?<|end|><|assistant|>So.<|end|>"
    )
    assert [text for text, produced in rendered if produced] == ["I.<|end|>", "So.<|end|>"]


def test_names_in_a_document_are_distinct():
    items = tasks.make_items(Random(1), facts=120, passages=16)
    facts = {item.answer.split(" is ")[0] for item in items if item.kind == "needle"}
    passages = {item.answer.split(":")[0] for item in items if item.kind == "recitation"}
    assert (len(facts), len(passages)) == (120, 16)
    assert not {f.split()[-1] for f in facts} & {p.split()[-1] for p in passages}


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"kind": "riddle"}, "kind"),
        ({"kind": "needle", "layout": "sideways"}, "layout"),
        ({"kind": "needle", "distractors": 5000}, "distractors"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, named: str):
    with pytest.raises(ValueError, match=named):
        tasks.make_problem(seed=0, approx_tokens=512, **kwargs)


def test_tokenizer_takes_one_token_a_piece_and_serves_the_training_format(tmp_path):
    """Pieces joined by the chat template and encoded whole give the ids that training put together
    piece by piece.
    """
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from specontext_vllm.demo.tokenizer import train_tokenizer

    ids, _ = train_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for seed, layout in enumerate(tasks.LAYOUTS):
        problem = tasks.make_problem("needle", seed=seed, approx_tokens=1024, layout=layout)
        wanted = [ids[piece] for text in stretches(problem) for piece in tasks.pieces(text)]
        if layout == "plain":
            served = tokenizer(problem.messages[0]["content"]).input_ids
        else:
            text = tokenizer.apply_chat_template(
                problem.messages, tokenize=False, add_generation_prompt=True
            )
            served = tokenizer(text, add_special_tokens=False).input_ids
        assert served == wanted, layout
        assert served.count(ids[tasks.BOS]) == 1
    anything = "Grüße, 12 €\t\n\nZebra!"
    assert tokenizer.decode(tokenizer(anything, add_special_tokens=False).input_ids) == anything
