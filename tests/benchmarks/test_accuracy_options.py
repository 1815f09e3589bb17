"""What the options of the case `accuracy` refuse, and how they name its result."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.accuracy import grid
from benchmarks.report import RESULTS
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.retrieval.rules import find_rule, listed_rules


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "needle"], "--tasks: found 'needle'"),
        (["--retrievers", "best"], "--retrievers: found 'best'"),
        (["--budgets", "many"], "--budgets: found 'many'"),
        (["--budgets", "32", "--contexts", "1024"], "budget: found 32"),
        (["--contexts", "16384", "--tasks", "single", "--prompts", "2"], "--contexts: found 16384"),
        (["--longbench", "."], "--longbench"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_with_its_name(arguments, named, tmp_path):
    ran = CliRunner().invoke(
        app, ["accuracy", *arguments, "--work", str(tmp_path), "--out", str(tmp_path)]
    )
    assert ran.exit_code == 2 and named in ran.stderr


def test_dlm_without_a_head(tmp_path):
    (tmp_path / "model").mkdir()
    assert grid.find_head(tmp_path / "model", None, None) == (
        None,
        [r for r in listed_rules() if not find_rule(r).needs_head],
    )
    with pytest.raises(grid.OptionError, match="--head"):
        grid.find_head(tmp_path / "model", None, "dlm,recent")


def test_another_head_has_a_result_of_its_own(tmp_path):
    """Heads and models by the files that a run without cells writes."""
    heads = [DEMO_MODEL / "retrieval_head", tmp_path / "a" / "align only", tmp_path / "distilled"]
    for folder in heads[1:]:
        shutil.copytree(DEMO_MODEL / "retrieval_head", folder)
    other = shutil.copytree(DEMO_MODEL, tmp_path / "other")
    out = tmp_path / "out"
    runs = [
        [],
        *(["--head", str(head)] for head in heads),
        ["--model", str(other)],
        ["--model", str(other), "--head", str(heads[2])],
    ]
    for number, more in enumerate(runs):
        options = [
            "--tasks",
            "single",
            "--contexts",
            "1024",
            "--prompts",
            "2",
            "--no-measure",
            "--work",
            str(tmp_path / f"work{number}"),
        ]
        done = CliRunner().invoke(app, ["accuracy", *options, "--out", str(out), *more])
        assert done.exit_code == 0, done.output
    found = {
        path.stem.rsplit("-", 1)[0]: json.loads(path.read_text())["title"].partition(":")[0]
        for path in out.glob("*.json")
    }
    assert found == {
        "accuracy": "demo",
        "accuracy-head-align-only": "demo head align-only",
        "accuracy-head-distilled": "demo head distilled",
        "accuracy-other": "other",
        "accuracy-other-head-distilled": "other head distilled",
    }


def test_only_a_result_over_the_same_prompts_is_compared_with(tmp_path):
    options = [
        "accuracy",
        "--tasks",
        "single",
        "--contexts",
        "4096",
        "--no-measure",
        "--work",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "o"),
    ]
    path = RESULTS / "accuracy-cpu.json"
    for more, named in (
        (
            ["--prompts", "3", "--against", str(path)],
            "has 12 prompts of single at 4096 tokens, this grid has 3",
        ),
        (["--prompts", "12", "--against", str(tmp_path / "absent")], "is no result of this case"),
    ):
        done = CliRunner().invoke(app, [*options, *more])
        assert done.exit_code == 2 and named in done.stderr, done.output
    assert (
        CliRunner().invoke(app, [*options, "--prompts", "12", "--against", str(path)]).exit_code
        == 0
    )
