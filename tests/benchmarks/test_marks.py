"""Upper marks and heads on real text: the model that reads chosen pages, the selections made from
its own attention, a head beside it, the command.
"""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.marks.heads import SERVINGS, HeadBeside, forced, load_head
from benchmarks.marks.inputs import make_prompts
from benchmarks.marks.measuring import DENSE, Choosers, Size, measure
from benchmarks.marks.own_attention import OWN_SELECTIONS, Attention, tokens_read
from benchmarks.marks.paged_model import PagedModel, token_log_probs
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.draft import DraftModel, head_scores
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import TeacherError, read_config
from specontext_vllm.retrieval.checkpoint import save_head
from specontext_vllm.retrieval.reference import Budget, chosen_pages
from tests.distillation.tiny_models import make_config, make_model
from tests.engine.conftest import DEMO_MODEL
from tests.engine.families import gemma3
from tests.retrieval.own_heads import make_own

PIECES, LENGTH, SCORED = 2, 150, 11
START = LENGTH - SCORED
PAGES = -(-LENGTH // PAGE_SIZE)
BUDGET = Budget(total=4, sinks=1, recents=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (PIECES, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return make_model(make_config("llama")).eval().requires_grad_(False)


def prefilled(model, ids, places=()):
    paged = PagedModel(model, len(ids), LENGTH, places)
    for _ in paged.prefill(ids[:, :START]):
        pass
    return paged


def random_reads(layers, heads, seed=0):
    """Page 0 and some others, by layer and head; the second layer reads all."""
    generator = torch.Generator().manual_seed(seed)
    reads = [
        torch.rand(PIECES, heads, SCORED, PAGES, generator=generator) < 0.4 for _ in range(layers)
    ]
    for chosen in reads:
        chosen[..., 0] = True
    return [reads[0], None, *reads[2:]]


class NaiveReads:
    """Attention in loops, token by token, that leaves out what a page table leaves out."""

    def __init__(self, reads):
        self.reads = reads

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **rest):
        out = torch.zeros_like(query)
        group = query.shape[1] // key.shape[1]
        for piece in range(query.shape[0]):
            for head in range(query.shape[1]):
                for token in range(query.shape[2]):
                    seen = torch.arange(token + 1)
                    reads = self.reads[module.layer_idx]
                    if reads is not None and token >= START:
                        pages = reads[piece, head // group, token - START]
                        seen = seen[pages[seen // PAGE_SIZE]]
                    keys, values = (x[piece, head // group, seen] for x in (key, value))
                    weights = (keys @ query[piece, head, token] * scaling).softmax(0)
                    out[piece, head, token] = weights @ values
        return out.transpose(1, 2), None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_layer_and_head_reads_its_pages(family, ids, monkeypatch):
    from transformers import AttentionInterface, AttentionMaskInterface

    model = make_model(make_config(family)).eval().requires_grad_(False)
    reads = random_reads(5, 2)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        dense = model(ids).logits[:, START:]
        AttentionInterface.register("naive", NaiveReads(reads))
        AttentionMaskInterface.register("naive", lambda *_, **__: None)
        model.set_attn_implementation("naive")
        sparse = model(ids).logits[:, START:]
    paged = prefilled(model, ids)
    assert (dense - sparse).abs().max() > 1e-2
    torch.testing.assert_close(paged.forward(ids[:, START:], START), dense, rtol=1e-4, atol=1e-4)
    found = paged.forward(ids[:, START:], START, reads)
    torch.testing.assert_close(found, sparse, rtol=1e-4, atol=1e-4)
    # Token by token, in place of what the passes before have left.
    for step in range(SCORED):
        here = [None if chosen is None else chosen[:, :, step : step + 1] for chosen in reads]
        one = paged.forward(ids[:, START + step :][:, :1], START + step, here)
        torch.testing.assert_close(one[:, 0], sparse[:, step], rtol=1e-4, atol=1e-4)


def watched(paged, ids):
    attention = Attention(len(paged.layers))
    paged.forward(ids[:, START:], START, watch=attention.watch)
    return attention


def test_what_is_watched_is_the_attention(llama, ids):
    with torch.no_grad():
        llama.set_attn_implementation("eager")
        layers = llama(ids, output_attentions=True).attentions
    attention = watched(prefilled(llama, ids), ids)
    for number, weights in enumerate(layers):
        paged = torch.nn.functional.pad(weights[:, :, START:], (0, PAGES * PAGE_SIZE - LENGTH))
        paged = paged.unflatten(1, (2, 2)).unflatten(-1, (PAGES, PAGE_SIZE))
        largest, sums = paged.amax(-1).amax(2), paged.sum(-1).mean(2)
        torch.testing.assert_close(attention.scores[number].exp(), largest, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(attention.mass[number], sums, rtol=1e-3, atol=1e-6)


def test_selections_share_what_they_say(llama, ids):
    """Each chooser's pages, found again from the weights one layer, head and token at a time."""
    attention = watched(prefilled(llama, ids), ids)
    weight, mass = attention.scores.exp(), attention.mass
    positions = torch.arange(START, LENGTH)
    alone = ("groups-5", "groups-10", "layer-max", "layer-mass")
    split = {"groups-2": [3, 2], "groups-3": [2, 2, 1], **{name: [1] * 5 for name in alone}}

    def page_value(name, layers, head, piece, token, page):
        place = (piece, head, token, page)
        if name in ("mass", "layer-mass"):
            return sum(float(mass[(layer, *place)]) for layer in layers)
        if name == "square":
            return sum(float(weight[(layer, *place)]) ** 2 for layer in layers)
        heads = range(2) if name == "heads" else [head]
        return max(
            float(weight[(layer, piece, other, token, page)]) for layer in layers for other in heads
        )

    for name, own in OWN_SELECTIONS.items():
        reads = own.reads(attention, positions, BUDGET)
        dense = int(name[-1]) if name.startswith("dense") else 0
        assert [chosen is None for chosen in reads] == [layer < dense for layer in range(5)]
        first = dense
        for size in split.get(name, [5 - dense]):
            layers = range(first, first + size)
            first += size
            for piece, head, token in [(0, 0, 0), (1, 1, 7), (0, 1, SCORED - 1)]:
                wanted = set()
                for at in [token, token - 1] if name == "united" and token else [token]:
                    count = (START + at) // PAGE_SIZE + 1
                    values = {
                        page: page_value(name, layers, head, piece, at, page)
                        for page in range(1, count - 2)
                    }
                    wanted |= {0, count - 1, count - 2, max(values, key=values.get)}
                for layer in layers:
                    found = reads[layer][piece, head, token].nonzero().flatten().tolist()
                    assert set(found) == wanted, (name, layer)


def test_tokens_read_counts_dense_layers_whole():
    positions = torch.tensor([15, 16])
    chosen = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    chosen[..., 0] = True
    assert tokens_read([chosen], positions) == 16
    assert tokens_read([None, chosen], positions) == (24 + 16) / 2


OWN_HEAD = {
    "target_hidden_size": 32,
    "embed_size": 32,
    "num_heads": 8,
    "num_kv_heads": 4,
    "aux_layer_ids": (1, 2, 4),
    "num_aux": 3,
    "target_vocab_size": 97,
    "trained_length": LENGTH,
}
"""With two KV heads for each of the model's."""


GROUPED_HEAD = {**OWN_HEAD, "num_heads": 8, "num_kv_heads": 2, "layer_groups": 2}
"""With two query heads for each KV head and group."""
GROUPS = [0, 0, 0, 1, 1]


@pytest.fixture(scope="module", params=["eagle", "own", "groups"])
def head_folder(request, llama, tmp_path_factory):
    """Folders of a head whose keys are made before the model runs, after it, and of one with
    queries for groups of layers.
    """
    folder = tmp_path_factory.mktemp("head")
    if request.param == "eagle":
        torch.manual_seed(1)
        DraftModel(DraftShape.for_target(llama.config, max_position=LENGTH)).save(folder)
    else:
        changes = OWN_HEAD if request.param == "own" else GROUPED_HEAD
        checkpoint = make_own(q_mlp=12, **changes)
        save_head(folder, checkpoint.spec, checkpoint.tensors, dtype=None)
    return folder


def naive_run(paged, beside, ids, serving):
    """Everything from the beginning at each step: the model's pass over all tokens so far, with the
    pages chosen so far, and the head's queries and keys of all of them.
    """
    layers, head = len(paged.layers), beside.head
    count_of_groups = head.spec.layer_groups
    groups = GROUPS if count_of_groups == 2 else [0] * layers
    reads, looked = [[] for _ in range(count_of_groups)], None
    prompts = [
        [paged.states[place][0] for place in beside.places] for _ in paged.prefill(ids[:, :START])
    ]
    for step in range(SCORED - 1):
        later = [torch.empty(len(ids), 0, head.spec.target_hidden_size)] * 3
        if step:
            read = [torch.stack(reads[group], 2) for group in groups]
            given = read if serving.own_states else None
            paged.forward(ids[:, START : START + step], START, given)
            later = [paged.states[place] for place in beside.places]
        chosen = [[] for _ in range(count_of_groups)]
        for piece in range(len(ids)):
            aux = [
                torch.cat([part, more[piece]])
                for part, more in zip(prompts[piece], later, strict=True)
            ]
            fused = head.fuse(aux)
            place = torch.arange(1, START + step + 1)
            embeds = paged.embed(ids[piece, place])
            query = head.queries(embeds, fused, place)[-1:]
            if head.spec.key_states == "own":
                # The newest token has none.
                keys = head.keys(embeds[:-1], fused[:-1], place[:-1], fused[1:])
            else:
                keys = head.keys(embeds, fused, place)
            at = torch.tensor([[len(keys) - 1]])
            for group in range(count_of_groups):
                # Of each KV head the group's own query heads.
                own = query.unflatten(1, (head.spec.num_kv_heads, count_of_groups, -1))[:, :, group]
                q = own.flatten(1, 2).expand(len(keys), -1, -1).transpose(0, 1)[None]
                scores = head_scores(q, keys.transpose(0, 1)[None], at)[0, :, 0]
                count = (START + step) // PAGE_SIZE + 1
                missing = count - scores.shape[-1]
                scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
                # The larger score of the head's KV heads that stand for one of the model's.
                scores = scores.unflatten(0, (2, -1)).amax(1)
                if looked is not None and serving.last_look:
                    old = looked[group][piece][:, : scores.shape[-1]]
                    scores[:, : old.shape[-1]] = scores[:, : old.shape[-1]].maximum(old)
                pages = chosen_pages(scores, count, BUDGET)
                pages = torch.nn.functional.pad(pages, (0, PAGES - pages.shape[-1]))
                chosen[group].append(pages)
        for group in range(count_of_groups):
            reads[group].append(torch.stack(chosen[group]))
        attention = Attention(layers)
        given = [torch.stack(reads[group], 2) for group in groups]
        logits = paged.forward(ids[:, START : START + step + 1], START, given, attention.watch)
        looked = [
            attention.scores[[layer for layer in range(layers) if groups[layer] == group]].amax(0)
            for group in range(count_of_groups)
        ]
        looked = [part[:, :, -1] for part in looked]
    return token_log_probs(logits, ids[:, START + 1 :])


@pytest.mark.parametrize("name", SERVINGS)
def test_a_head_token_by_token_is_one_that_starts_anew_at_each(name, llama, ids, head_folder):
    with torch.no_grad():
        head = load_head(head_folder, llama, LENGTH)
        places = HeadBeside(head, PagedModel(llama, PIECES, LENGTH)).places
        paged = PagedModel(llama, PIECES, LENGTH, places)
        beside = HeadBeside(head, paged)
        for number, _ in enumerate(paged.prefill(ids[:, :START])):
            beside.learn_prompt(number, ids[number, :START])
        dense = token_log_probs(paged.forward(ids[:, START:-1], START), ids[:, START + 1 :])
        states = beside.fuse_states()
        arguments = paged, beside, ids[:, START:], START
        everything = forced(*arguments, Budget.everything(PAGES), SERVINGS[name], states)
        torch.testing.assert_close(everything, dense, rtol=1e-4, atol=1e-4)
        found = forced(*arguments, BUDGET, SERVINGS[name], states)
        assert (found - dense).abs().max() > 1e-2
        wanted = naive_run(paged, beside, ids, SERVINGS[name])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_ways_to_serve_a_head_differ(llama, ids, head_folder):
    """Else the test above would hold of a run that knows one way only."""
    head = load_head(head_folder, llama, LENGTH)
    choosers = Choosers([], {"h": head}, list(SERVINGS.values()))
    size = Size(112, 16)
    marks = list(measure(llama, ids, SCORED, choosers, [size]))
    assert [mark.by for mark in marks][0] == DENSE and len(marks) == 5
    assert len({tuple(mark.log_probs) for mark in marks}) == 5
    assert {mark.read for mark in marks[1:]} == {112.0}


def test_one_more_mark_only_in_time(llama, ids):
    left = iter([True, False])
    choosers = Choosers(list(OWN_SELECTIONS.values()), {}, [])
    marks = list(measure(llama, ids, SCORED, choosers, [Size(112, 64)], lambda: next(left)))
    assert [mark.by for mark in marks] == [DENSE, OWN_SELECTIONS["max"].name]


def test_the_command(texts, tmp_path):
    arguments = ["--model", str(DEMO_MODEL), "--texts", str(texts), "--out", str(tmp_path)]
    arguments += ["--context", "256"]
    arguments += ["--prompts", "3", "--at-once", "2", "--forced", "4", "--budgets", "112,256"]
    arguments += ["--selections", "max,layer-mass", "--servings", "own-look", "--label", "try"]
    done = CliRunner().invoke(app, ["marks", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(next(tmp_path.glob("marks-demo-256-try-*.json")).read_text())
    rows = {(row["by"], row.get("budget")): row for row in result["rows"]}
    assert len(rows) == 1 + 3 * 2
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    # Two kinds, each in two portions.
    assert len(lines) == 4 * 7
    head = "own, its own states, last look"
    for kind in ("text", "copy"):
        # All pages of the context are within the larger budget.
        for by in (head, "all layers one, maximum"):
            assert rows[by, 256][f"{kind}_figures"]["difference"] == pytest.approx(0, abs=1e-4)
            assert abs(rows[by, 112][f"{kind}_figures"]["difference"]) > 1e-3
            assert rows[by, 112][f"{kind}_figures"]["pieces"] == 3
        pieces = [
            a - b
            for line in lines
            if (line["kind"], line["by"], line.get("budget")) == (kind, head, 112)
            for a, b in zip(line["log_probs"], line["dense"], strict=True)
        ]
        assert rows[head, 112][f"{kind}_figures"]["difference"] == pytest.approx(sum(pieces) / 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--context", "1000000"], "--context: found 1000000, but the model reaches"),
        (["--kinds", "prose"], "--kinds: found 'prose'; use some of text, copy."),
        (["--budgets", "64"], "budget: found 64"),
        (["--budgets", "many"], "--budgets: found 'many'"),
        (["--context", "256", "--head", "a=/nowhere"], "--head: found 'a=/nowhere'"),
    ],
    ids=["context", "kinds", "budget", "numbers", "head"],
)
def test_a_wrong_option_ends_with_its_name(arguments, told, texts, tmp_path):
    given = ["--model", str(DEMO_MODEL), "--texts", str(texts), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["marks", *given, *arguments])
    assert done.exit_code == 2 and told in done.stderr


def test_a_model_with_windows_is_refused(tmp_path):
    """The benchmarks' own attention would read the whole context in every layer."""
    gemma3().save_pretrained(tmp_path)
    read_config(tmp_path)
    with pytest.raises(TeacherError, match="gemma3_text has layers that look back"):
        make_prompts(tmp_path, [], ["text"], 64, 8, 2, 0)
