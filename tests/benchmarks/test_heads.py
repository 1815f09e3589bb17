"""Variants of a head for retrieval alone, trained in lockstep: each as it would be alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.heads.held_out import Point
from benchmarks.heads.lockstep import Classroom, all_layers, make_classrooms, make_pupil, train
from benchmarks.heads.results import Results
from benchmarks.heads.trainers import AlignedHead
from benchmarks.heads.variants import DEFAULT, VARIANTS, picked
from benchmarks.marks.measuring import DENSE, Mark, Size
from benchmarks.real.settings import OptionError
from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.head_trainer import stretch_positions
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.options import make_settings
from specontext_vllm.distillation.recall import Recall
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.teacher import Teacher, load_teacher, read_config
from tests.distillation.tiny_models import make_config, write_model
from tests.engine.conftest import DEMO_MODEL

LENGTH, STEPS = 256, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = make_config("llama", num_hidden_layers=9)
    folder = write_model(tmp_path_factory.mktemp("model"), config)
    return load_teacher(folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (STEPS, 2, LENGTH), generator=generator)
    weights = torch.where(torch.rand(STEPS, 2, LENGTH, generator=generator) < 0.1, 1.0, 0.1)
    return list(zip(ids, weights, strict=True))


def plain_settings(config, **changes):
    settings = make_settings(
        config,
        context=LENGTH,
        batch_tokens=2 * LENGTH,
        hours=1.0,
        steps=STEPS,
        loss=None,
        learning_rate=None,
        budget=112,
        seed=5,
        format="specontext",
    )
    return replace(settings, **{"positions": 24, "stretch": 32, **changes})


def pupils_of(model, tmp_path, names, **changes):
    shape = HeadShape.for_target(model.config, max_position=LENGTH)
    settings = plain_settings(model.config, **changes)
    accelerator = Accelerator(cpu=True)
    return {
        name: make_pupil(VARIANTS[name], model, shape, settings, tmp_path / name, accelerator)
        for name in names
    }


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.head.parameters()])


ALIKE = [DEFAULT, "other-seed", "eagle3-shape", "aux-last", "sharp-0", "recents-5", "adamw"]
ALIKE += ["groups-3", "groups-5"]


@pytest.fixture(scope="module")
def together(model, data, tmp_path_factory):
    pupils = pupils_of(model, tmp_path_factory.mktemp("together"), [*ALIKE, "alignment-loss"])
    room = Classroom(model, all_layers(pupils.values()), pupils, data)
    for _ in range(STEPS):
        losses = room.step()
    return pupils, losses


@pytest.mark.parametrize("name", ALIKE)
def test_a_variant_learns_as_it_would_alone(name, together, model, data, tmp_path):
    """The product's own loop, with the same data, is the reference."""
    alone = pupils_of(model, tmp_path, [name])[name].run
    if name == "other-seed":
        # In lockstep all read at the same positions.
        alone.settings = replace(alone.settings, seed=5)
    before = weights_of(alone)
    for batch in data:
        losses = alone.step(*batch)
    mine = together[0][name].run
    learned = (weights_of(alone) - before).abs().mean()
    assert learned > 1e-4
    # AdamW makes whole steps of gradients that are nothing but rounding.
    assert (weights_of(mine) - weights_of(alone)).abs().mean() < 0.01 * learned
    assert together[1][name] == pytest.approx(losses["page"], rel=1e-4)


def test_variants_are_different_heads(together):
    losses = [together[1][name] for name in ALIKE]
    assert len({round(loss, 6) for loss in losses}) == len(ALIKE)


def test_fewer_positions_are_the_first_ones_and_no_stretch_is_none(model, data, tmp_path):
    """The loss of the first step, from the positions that each should have seen."""
    changed = {"few": {"positions": 8}, "none": {"stretch": 0}, "many": {}}
    pupils = {
        name: replace_settings(pupils_of(model, tmp_path, [DEFAULT])[DEFAULT], **changes)
        for name, changes in changed.items()
    }
    room = Classroom(model, all_layers(pupils.values()), pupils, data)
    shown = {}
    for name, pupil in pupils.items():
        keep_lesson(pupil.run, shown, name)
    generator = pupils["many"].run.generator(torch.device("cpu"))
    room.step()
    ids, weights = data[0]
    at, _ = sample_positions(weights[:, 1:], 24, generator, answers_only=False)
    stretch = stretch_positions(ids, 32, generator)
    wanted = {
        "few": torch.cat([at[:, :8], stretch], 1),
        "none": at,
        "many": torch.cat([at, stretch], 1),
    }
    for name, positions in wanted.items():
        lesson, found, run_twice = shown[name]
        torch.testing.assert_close(found, positions)
        assert run_twice == (name != "none")
        assert lesson.target.shape[2] == positions.shape[1]


def replace_settings(pupil, **changes):
    pupil.run.settings = replace(pupil.run.settings, **changes)
    return pupil


def keep_lesson(run, shown, name):
    learn = run.learn

    def keep(lesson, at, *rest, **named):
        shown[name] = lesson, at, "states" in named
        return learn(lesson, at, *rest, **named)

    run.learn = keep


def test_the_alignment_loss_is_that_of_whole_sequences(model, data, tmp_path):
    """Without a stretch: EAGLE-3's loss with queries of every token."""
    from specontext_vllm.distillation.losses import alignment_loss

    run = pupils_of(model, tmp_path, ["alignment-loss"], stretch=0)["alignment-loss"].run
    assert isinstance(run, AlignedHead)
    ids, weights = data[0]
    at = torch.tensor([[40, 77, 150], [90, 120, 190]])
    teacher = Teacher(model, run.head.aux_layers)
    lesson = teacher(ids, at, AttentionTarget(run.settings.window))
    with torch.no_grad():
        (found,) = run.losses(lesson, at, weights, torch.Generator()).values()
        features = run.head.fuse(lesson.aux)
        place = torch.arange(1, LENGTH).expand(2, -1)
        queries = run.head.queries(lesson.embeds[:, 1:], features[:, :-1], place)
        keys = run.head.keys(lesson.embeds, features)[:, :, 1:]
        wanted = alignment_loss(queries, keys, at, lesson.target, lesson.mass, run.settings.window)
    torch.testing.assert_close(found, wanted)


def test_a_stretch_that_reads_all_pages_has_the_dense_states(model, data, tmp_path):
    """The alignment loss takes the stretch apart; its queries are those of the dense run then."""
    changes = {"stretch_halvings": (0, 0), "positions": 8}
    run = pupils_of(model, tmp_path, ["alignment-loss"], **changes)["alignment-loss"].run
    ids, weights = data[0]
    sampled, generator = torch.tensor([[30, 40], [50, 60]]), torch.Generator()
    at = torch.cat([sampled, stretch_positions(ids, 32, generator)], 1)
    teacher = Teacher(model, run.head.aux_layers)
    lesson = teacher(ids, at, AttentionTarget(run.settings.window), keep_cache=True)
    with torch.no_grad():
        chosen = run.stretch_pages(lesson, at[:, 2:], generator)
        states = teacher.decode(ids, lesson.cache, int(at[0, 2]) + 1, chosen)
        found = run.previous_features(lesson, at, states)
        wanted = rows_at(run.head.fuse(lesson.aux), at)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        (twice,) = run.losses(lesson, at, weights, generator, states=states).values()
        (once,) = run.losses(lesson, at, weights, generator).values()
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)


def test_every_variant_differs_from_the_default():
    config = make_config("llama", num_hidden_layers=12)
    shape = HeadShape.for_target(config, max_position=LENGTH)
    settings = plain_settings(config, positions=192, stretch=64)
    found = picked("*", shape, settings, config)
    # Those that say what the default is.
    assert set(VARIANTS) - set(found) == {
        "head-dim-128",
        "rotary-0.5",
        "sharp-0.75",
        "recents-2",
        "copies-0.5",
        "positions-192",
    }
    made = [(v.head(shape, config, 0).shape, v.settings(settings, config)) for v in found.values()]
    kinds = {(*pair, variant.trainer) for pair, variant in zip(made, found.values(), strict=True)}
    assert len(kinds) == len(found)


def test_names_and_patterns():
    config = make_config("llama", num_hidden_layers=9)
    shape = HeadShape.for_target(config, max_position=LENGTH)
    settings = plain_settings(config)
    found = picked("sharp-0, head-dim-*", shape, settings, config)
    assert list(found) == [DEFAULT, "sharp-0", "head-dim-64", "head-dim-256"]
    with pytest.raises(OptionError, match="--variants: found 'sharp-2'"):
        picked("sharp-0,sharp-2", shape, settings, config)


class Numbered:
    """Documents of which every token is drawn."""

    def draw(self, rng, count, held_out):
        import numpy as np

        ids = np.array([rng.randrange(97) for _ in range(count)], dtype=np.int32)
        return ids, np.zeros(count, dtype=bool)


def test_shares_of_copies_have_classrooms_of_their_own(model, tmp_path):
    pupils = pupils_of(model, tmp_path, [DEFAULT, "copies-0", "sharp-0"], steps=4)

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [1]}

    rooms = make_classrooms(model, pupils, Numbered(), tokenizer)
    assert [list(room.pupils) for room in rooms] == [[DEFAULT, "sharp-0"], ["copies-0"]]
    settings = pupils[DEFAULT].run.settings
    told = []
    shares = [pupils[DEFAULT].run.progress.step for _ in train(rooms, settings, 2, told.append)]
    assert shares == [2, 4]
    assert all(pupil.run.progress.step == 4 for pupil in pupils.values())


def point(variant, found, number=0, kind="copy"):
    return Point(variant, kind, 512, 128, number, Recall(found, 0.8, found > 0.3))


def test_rows_compare_with_the_default_by_prompt(tmp_path):
    with (tmp_path / "lines").open("w") as lines:
        results = Results(lines, [512], ["copy"], [128])
        results.add_points(1, 100, 1.0, [point(DEFAULT, 0.0), point("a", 0.0)])
        last = [point(DEFAULT, 0.2, 0), point(DEFAULT, 0.4, 1), point("a", 0.3, 0)]
        results.add_points(2, 200, 2.0, [*last, point("a", 0.5, 1)])
        size = Size(128, 64)
        results.add_mark(DENSE, "copy", 512, Mark(DENSE, None, [-1.0, -2.0], 512))
        results.add_mark(DEFAULT, "copy", 512, Mark("x", size, [-1.5, -2.5], 128))
        results.add_mark("a", "copy", 512, Mark("y", size, [-1.25, -2.25], 128))
    row = results.row("a")
    assert row["share_copy_512_128"] == pytest.approx(0.4 / 0.8)
    assert row["heaviest_copy_512_128"] == pytest.approx(0.5)
    assert row["recall_copy_512_128_difference"] == "+0.100 (+0.100 to +0.100)"
    assert row["forced_copy_512_128"] == pytest.approx(-0.25)
    assert row["forced_copy_512_128_difference"] == "+0.250 (+0.250 to +0.250)"
    assert "recall_copy_512_128_difference" not in results.row(DEFAULT)
    written = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["tokens"] for line in written[:4]] == [100, 100, 200, 200]
    assert written[3]["found"] == [0.3, 0.5] and written[3]["share"] == 0.5
    keys = {column.key for columns in results.tables().values() for column in columns}
    assert {key for key in row if key.endswith("difference")} - keys == set()


DOCS = Path(__file__).parents[2] / "docs"


def test_the_command(tmp_path):
    """Two variants for two steps on a small Qwen with the demo's tokenizer."""
    vocabulary = read_config(DEMO_MODEL).vocab_size
    config = make_config("qwen2", vocab_size=vocabulary, num_hidden_layers=7)
    model = write_model(tmp_path / "small", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, model)
    data = tmp_path / "data.jsonl"
    texts = [path.read_text() for path in sorted(DOCS.rglob("*.md"))]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--model", str(model), "--data", str(data), "--test-data", str(DOCS)]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments += ["--variants", "eagle3-shape,copies-0", "--tokens", "1024", "--points", "2"]
    arguments += ["--context", "512", "--contexts", "512,384", "--budgets", "112,512"]
    arguments += ["--forced-budgets", "112,512"]
    arguments += ["--prompts", "2", "--forced", "4", "--loaders", "0"]
    done = CliRunner().invoke(app, ["heads", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(next((tmp_path / "out").glob("heads-small-*.json")).read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [DEFAULT, "eagle3-shape", "copies-0"]
    settings = {name: made["settings"] for name, made in result["details"]["variants"].items()}
    assert {name: own["copies"] for name, own in settings.items()} == {
        DEFAULT: 0.5,
        "eagle3-shape": 0.5,
        "copies-0": 0.0,
    }
    for row in rows.values():
        for kind in ("text", "copy"):
            assert row[f"forced_{kind}_512_512"] == pytest.approx(0, abs=1e-4)
        for context in (512, 384):
            for kind in ("text", "copy"):
                # All pages of the context are within the larger budget.
                assert row[f"share_{kind}_{context}_512"] == pytest.approx(1)
                assert 0 < row[f"share_{kind}_{context}_112"] < 1
                assert (f"forced_{kind}_{context}_512" in row) == (context == 512)
    assert rows["eagle3-shape"]["parameters"] != rows[DEFAULT]["parameters"]
    lines = [json.loads(line) for line in next((tmp_path / "out").glob("*.jsonl")).open()]
    curves = [line for line in lines if "share" in line]
    assert len(curves) == 2 * 3 * 2 * 2 * 2 and {line["tokens"] for line in curves} == {512, 1024}
    assert len(lines) - len(curves) == 2 * (1 + 3 * 2)
    assert next((tmp_path / "out").glob("*.png")).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "1", "--minutes", "1"], "--minutes, --steps, --tokens: give one"),
        (["--steps", "1", "--variants", "best"], "--variants: found 'best'"),
        (["--steps", "1", "--context", "512", "--contexts", "1024"], "--contexts: found 1024"),
        (["--steps", "1", "--budgets", "32"], "budget: found 32"),
        (["--steps", "1", "--forced-budgets", "144"], "--forced-budgets: found 144"),
    ],
    ids=["length", "variants", "contexts", "budgets", "forced"],
)
def test_a_wrong_option_ends_with_its_name(arguments, told, tmp_path):
    given = ["--model", str(DEMO_MODEL), "--data", str(DOCS / "figures.toml")]
    given += ["--test-data", str(DOCS), "--work", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["heads", *given, *arguments])
    assert done.exit_code == 2 and told in done.stderr
