"""`specontext distill` as a command: defaults by the model, refusals in one sentence, folders that
are taken.
"""

import json
import os

import pytest
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.distillation.options import (
    MAX_LOADERS,
    OptionError,
    default_loaders,
    make_settings,
)
from specontext_vllm.distillation.run_folder import claim_folder
from tests.distillation.tiny_models import make_config, write_model
from tests.engine.conftest import DEMO_MODEL
from tests.forked import context

OPTIONS = {
    "batch_tokens": None,
    "hours": 1.0,
    "steps": None,
    "loss": "both",
    "learning_rate": None,
    "budget": None,
    "seed": 0,
}


def invoke(*arguments):
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


@pytest.mark.parametrize(
    ("longest", "context", "expected"),
    [(131072, None, (32768, 2048)), (16384, None, (16384, 1024)), (16384, 512, (512, 112))],
    ids=["large", "model-limit", "short"],
)
def test_context_and_budget_follow_the_model(longest, context, expected):
    settings = make_settings(
        make_config("llama", max_position_embeddings=longest), context=context, **OPTIONS
    )
    assert (
        settings.context,
        settings.budget,
    ) == expected and settings.batch_tokens == settings.context


def test_learning_rate_falls_with_the_width():
    for format, widths, rate in (
        ("eagle3", (128, 256, 4096), 1e-3),
        ("specontext", (128, 576, 9216), 3e-3),
    ):
        options = {**OPTIONS, "loss": None, "format": format}
        rates = [
            make_settings(make_config("llama", hidden_size=w), context=256, **options).learning_rate
            for w in widths
        ]
        assert rates == [rate, rate, rate / 16]


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "expected"),
    [
        (1, 1, False, 0),
        (2, 1, False, 1),
        (16, 1, False, MAX_LOADERS),
        (1, 1, True, 0),
        (2, 1, True, 1),
        (16, 1, True, MAX_LOADERS),
        (16, 8, True, 1),
    ],
)
def test_loaders_leave_cores_to_the_training(monkeypatch, cores, processes, on_gpu, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_loaders(processes, on_gpu) == expected


def test_the_loaders_asked_for_are_the_runs():
    config = make_config("llama", max_position_embeddings=256)
    assert [
        make_settings(config, context=256, loaders=count, **OPTIONS).loaders for count in (0, 3)
    ] == [0, 3]


REFUSED = {
    "context-short": (["--context", 255], "--context: found 255; give 256 to 16384 tokens"),
    "context-long": (["--context", 16385], "--context: found 16385; give 256 to 16384 tokens"),
    "batch": (["--context", 512, "--batch-tokens", 500], "--batch-tokens: found 500"),
    "hours": (["--hours", 0], "--hours: found 0;"),
    "hours-negative": (["--hours", -1], "--hours: found -1;"),
    "steps": (["--steps", 0], "--steps: found 0;"),
    "rate": (["--learning-rate", 0], "--learning-rate: found 0;"),
    "budget": (["--budget", 64], "--budget: found 64;"),
    "copies": (["--copies", 1.5], "--copies: found 1.5; give a share of 0 to 1"),
    "groups": (["--groups", 0], "--groups: found 0; give 1 to 6"),
    "groups-many": (["--groups", 7], "--groups: found 7; give 1 to 6, the model's layers"),
    "groups-of-drafts": (
        ["--format", "eagle3", "--groups", 2],
        "--groups: found 2, but a draft model has one set of queries",
    ),
    "loss-of-drafts": (["--loss", "both"], "--loss: found both, but a head for retrieval alone"),
    "vocabulary-of-drafts": (
        ["--draft-vocabulary", 100],
        "--draft-vocabulary: found 100, but a head for retrieval alone drafts nothing",
    ),
    "init-of-drafts": (
        ["--init", DEMO_MODEL / "retrieval_head"],
        "it has another shape than a new head for this model",
    ),
    "steps-ahead-of-drafts": (
        ["--steps-ahead", 3],
        "--steps-ahead: found 3, but a head for retrieval alone drafts nothing",
    ),
    "steps-ahead": (
        ["--format", "eagle3", "--steps-ahead", 17],
        "--steps-ahead: found 17; give 1 to 16 drafts in a row",
    ),
    "steps-ahead-align": (
        ["--format", "eagle3", "--loss", "align", "--steps-ahead", 3],
        "--steps-ahead: found 3, but --loss align trains no drafts",
    ),
    "freeze-nothing": (
        ["--format", "eagle3", "--freeze-retrieval"],
        "--freeze-retrieval: there is nothing to leave as it is",
    ),
    "freeze-and-align": (
        ["--format", "eagle3", "--init", DEMO_MODEL, "--freeze-retrieval", "--loss", "both"],
        "--freeze-retrieval: found --loss both",
    ),
    "vocabulary": (
        ["--format", "eagle3", "--draft-vocabulary", 4000],
        "--draft-vocabulary: found 4000; give 1 to 3136",
    ),
    "init-missing": (["--init", "/no/such/head"], "/no/such/head is no folder here"),
    "init-no-head": (["--init", DEMO_MODEL], "not an EAGLE-3 checkpoint"),
    "init-and-vocabulary": (
        ["--format", "eagle3", "--init", DEMO_MODEL, "--draft-vocabulary", 100],
        "--init brings its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_option_is_one_sentence_and_leaves_no_folder(tmp_path, name):
    options, why = REFUSED[name]
    result = invoke(
        "--model", DEMO_MODEL, "--data", "synthetic", "--out", tmp_path / "out", *options
    )
    assert result.exit_code == 2 and why in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_loss_names_those_there_are(tmp_path):
    result = invoke(
        "--model", DEMO_MODEL, "--data", "synthetic", "--out", tmp_path, "--loss", "all"
    )
    assert result.exit_code == 2 and all(
        word in result.stderr for word in ("--loss", "both", "draft", "align")
    )


def test_a_model_of_too_few_layers_is_refused(tmp_path):
    from transformers import AutoTokenizer

    write_model(tmp_path / "model", make_config("llama", num_hidden_layers=4))
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "model")
    result = invoke(
        "--model",
        tmp_path / "model",
        "--data",
        "synthetic",
        "--out",
        tmp_path / "out",
        "--context",
        256,
    )
    assert result.exit_code == 2 and "it has 4 layers" in result.stderr


def test_a_folder_belongs_to_the_run_that_began_there(tmp_path):
    out = tmp_path / "out"
    claim_folder(out, {"loss": "both", "seed": 0})
    claim_folder(out, {"loss": "both", "seed": 0})
    with pytest.raises(
        OptionError,
        match=r"--out: .* holds a run with loss 'both' \(now 'align'\); give another folder",
    ):
        claim_folder(out, {"loss": "align", "seed": 0})
    assert json.loads((out / "training" / "run.json").read_text())["loss"] == "both"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OptionError, match="did not make"):
        claim_folder(tmp_path, {})
    with pytest.raises(OptionError, match="is a file"):
        claim_folder(tmp_path / "config.json", {})


def torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    main(arguments)


@pytest.mark.slow
def test_two_processes_train_one_head_and_go_on(tmp_path):
    """gloo on a CPU: together they take twice the tokens; alone each would train, and overwrite, a
    head of its own.
    """
    out, command = tmp_path / "out", tmp_path / "command.py"
    run = "app(sys.argv[1:], standalone_mode=False)"  # or a worker would exit, not return
    command.write_text(f"import sys\nfrom specontext_vllm.cli import app\n{run}\n")
    launch = "--standalone --nproc-per-node 2 --start-method fork --run-path".split()
    options = ["--model", str(DEMO_MODEL), "--data", "synthetic", "--out", str(out)]
    distill = ["distill", *options, "--context", "256", "--steps"]
    for steps in ("2", "3"):
        arguments = [*launch, str(command), *distill, steps]
        process = context().Process(target=torchrun, args=(arguments,))
        process.start()
        process.join(300)
        process.terminate()
        assert process.exitcode == 0
    curve = [
        json.loads(line) for line in (out / "training" / "curve.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["tokens"]) for line in curve] == [
        (0, 0),
        (2, 2 * 2 * 256),
        (3, 3 * 2 * 256),
    ]
    assert json.loads((out / "training" / "run.json").read_text())["processes"] == 2
