"""`specontext prune`."""

import pytest
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.retrieval.checkpoint import read_checkpoint, save_head
from tests.cli.inspecting import run as inspect
from tests.cli.inspecting import write_target
from tests.retrieval.eagle3_files import Layout, write_checkpoint
from tests.retrieval.own_heads import make_own


def run(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def head(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    return write_checkpoint(folder, Layout(own_embedding=True))


def test_a_pruned_head_is_offered_written_and_fits(head, tmp_path):
    kept = 4 * (40 * 120 + 2 * 40 + (60 + 30) * 80 + 77 * 40)
    whole = (
        kept + 4 * (30 * 80 + 40 * 60 + 3 * 56 * 40 + 2 * 40 + 33 * 40) + 8 * 33 + 77
    )  # d2t and t2d come last
    offer = f"`specontext prune` writes the {kept:,} of {whole:,} bytes that selection reads."
    assert inspect(head).stdout.endswith(f"{offer}\n")
    pruned, target = tmp_path / "pruned", write_target(tmp_path)
    result = run(head, pruned)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"Wrote {pruned}: {kept:,} of {whole:,} bytes. It selects as the whole head does; it "
        "cannot serve as a draft model.\n"
    )
    result = inspect(pruned, "--target", target)
    assert (
        result.exit_code == 0
        and f"Fits {target}: reads its layers 2, 6, 9" in result.stdout
        and "specontext prune" not in result.stdout
    )


def test_a_head_of_our_own_keeps_all_that_it_is(tmp_path):
    made = make_own(q_mlp=12)
    save_head(tmp_path / "head", made.spec, made.tensors)
    result = run(tmp_path / "head", tmp_path / "pruned")
    assert result.exit_code == 0, result.output
    assert read_checkpoint(tmp_path / "pruned").spec == read_checkpoint(tmp_path / "head").spec


def test_a_head_in_8_bits_is_written_and_shown(tmp_path):
    made = make_own(q_mlp=12)
    save_head(tmp_path / "head", made.spec, made.tensors)
    result = run(tmp_path / "head", tmp_path / "pruned", "--int8")
    assert result.exit_code == 0, result.output
    weights = sum(tensor.numel() for tensor in made.tensors.values())
    matrices = [tensor for tensor in made.tensors.values() if tensor.dim() == 2]
    written = 2 * weights - sum(tensor.numel() - 4 * len(tensor) for tensor in matrices)
    assert result.stdout == (
        f"Wrote {tmp_path / 'pruned'}: {written:,} of {2 * weights:,} bytes. It selects nearly as "
        "the whole head does; it cannot serve as a draft model.\n"
    )
    shown = inspect(tmp_path / "pruned", "--target", write_target(tmp_path)).stdout
    for text in (
        "bfloat16, int8 with a scale for each row",
        f"{weights:,} of {weights:,}: 0.0 % pruned",
        "q_mlp.up_proj.weight.scale",
        f"{written:,}",
        "Fits ",
    ):
        assert text in shown
    assert "specontext prune" not in shown
    again = run(tmp_path / "pruned", tmp_path / "again")
    assert f"{written:,} of {written:,} bytes. It selects as the whole head does" in again.stdout


@pytest.mark.parametrize(
    "place, sentence",
    [
        ("head", "holds something already"),
        ("head/config.json/new", "cannot be written (NotADirectoryError"),
    ],
)
def test_a_place_that_cannot_take_the_head_is_one_line_on_stderr(head, tmp_path, place, sentence):
    before = (head / "config.json").read_bytes()
    result = run(head, tmp_path / place)
    assert result.exit_code == 2 and sentence in result.stderr and result.stderr.count("\n") == 1
    assert (head / "config.json").read_bytes() == before


def test_what_is_no_head_is_one_line_on_stderr_and_nothing_is_written(tmp_path):
    result = run(tmp_path, tmp_path / "pruned")
    assert result.exit_code == 2 and "holds no config.json" in result.stderr
    assert not (tmp_path / "pruned").exists()
