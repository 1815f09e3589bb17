"""What the teacher reads a page for, against transformers' eager attention; the loss against a
loop; and the states of a run that reads chosen pages only.
"""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.losses import ByGroup
from specontext_vllm.distillation.page_loss import PageTarget, page_loss
from specontext_vllm.distillation.teacher import Teacher, load_teacher
from tests.distillation.tiny_models import FAMILIES, make_config, write_model

LENGTH, RECENTS = 70, 2


def make_teacher(folder, family, kv_heads=2):
    write_model(folder, make_config(family, num_key_value_heads=kv_heads))
    return Teacher(load_teacher(folder, torch.device("cpu"), torch.float32), (1, 3, 5))


@pytest.mark.parametrize("chunk", [1 << 27, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_target_is_the_largest_weight_of_a_page(tmp_path, monkeypatch, family, chunk):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(PageTarget, "CHUNK", chunk)
    teacher = make_teacher(tmp_path, family)
    ids, at = torch.randint(0, 97, (2, LENGTH)), torch.tensor([[68, 33, 47], [12, 60, 20]])
    lesson = teacher(ids, at, PageTarget(RECENTS))
    eager = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        attentions = eager(ids, output_attentions=True).attentions
    for b in range(2):
        for s, p in enumerate(at[b].tolist()):
            token = p + 1
            rows = torch.stack([layer[b, :, token] for layer in attentions])
            heaviest = rows.unflatten(1, (2, -1)).amax((0, 2))
            for page in range(-(-LENGTH // PAGE_SIZE)):
                span = heaviest[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                choosable = 1 <= page <= token // PAGE_SIZE - RECENTS
                wanted = span.amax(-1) if choosable else torch.zeros(2)
                torch.testing.assert_close(
                    lesson.target[b, :, s, page], wanted, rtol=1e-3, atol=1e-6
                )
    torch.testing.assert_close(lesson.mass, lesson.target.sum(-1))
    assert (lesson.mass > 0).any()


def test_groups_of_layers_have_targets_and_pages_of_their_own(tmp_path):
    """Each group as if the others' layers were not there; with one group, bit for bit as before."""
    write_model(tmp_path, make_config("llama", num_key_value_heads=2))
    model = load_teacher(tmp_path, torch.device("cpu"), torch.float32)
    teacher, first = Teacher(model, (1, 3, 5)), 49
    ids, at = torch.randint(0, 97, (2, LENGTH)), torch.tensor([[68, 33], [12, 60]])

    def lesson(groups):
        return teacher(ids, at, ByGroup(groups, lambda: PageTarget(RECENTS)), keep_cache=True)

    plain = teacher(ids, at, PageTarget(RECENTS))
    one, two = lesson([0] * 5), lesson([0, 0, 0, 1, 1])
    assert torch.equal(one.target, plain.target) and torch.equal(one.mass, plain.mass)
    assert two.target.shape[1] == 4 and two.mass.shape == (2, 4, 2)
    each = two.target.split(2, 1)
    assert torch.equal(torch.maximum(*each), plain.target)
    assert not torch.equal(each[0], plain.target) and not torch.equal(each[1], plain.target)

    everything = torch.ones(2, 2, 9, 4, dtype=torch.bool)
    few = everything.clone()
    few[..., 1:3] = False
    whole, late, early = (
        teacher.decode(ids, two.cache, first, torch.cat(pages, 1)).chunk(3, -1)
        for pages in ((everything, everything), (everything, few), (few, everything))
    )
    # States enter layers 1 and 3, and leave layer 4; layers 3 and 4 are the second group.
    assert [torch.equal(a, b) for a, b in zip(whole, late)] == [True, True, False]
    assert [torch.equal(a, b) for a, b in zip(whole, early)] == [False, False, False]
    shared = teacher.decode(ids, two.cache, first, few)
    again = teacher.decode(ids, two.cache, first, torch.cat([few, few], 1))
    assert torch.equal(shared, again) and not torch.equal(shared, torch.cat(whole, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_target_of_a_gpu_is_that_of_a_cpu(dtype):
    at = torch.stack([torch.randperm(499)[:37] for _ in range(2)])
    layers = [
        (torch.randn(2, 6, 500, 64).to(dtype), torch.randn(2, 2, 500, 64).to(dtype))
        for _ in range(3)
    ]
    found = []
    for device in ("cpu", "cuda"):
        target = PageTarget(RECENTS)
        for query, key in layers:
            target.observe(query.to(device), key.to(device), at.to(device))
        found.append([part.cpu() for part in target.result()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_loss_is_the_loops():
    pages, sharp = 9, 0.75
    at = torch.tensor([[140, 90]])
    scores, weights = torch.randn(1, 2, 2, pages), torch.rand(1, 2, 2, pages)
    total = weight_of_all = 0.0
    for s, p in enumerate(at[0].tolist()):
        choosable = range(1, (p + 1) // PAGE_SIZE - RECENTS + 1)
        for page in set(range(pages)) - set(choosable):
            weights[..., s, page] = 0
        for h in range(2):
            w = weights[0, h, s, list(choosable)]
            log_share = scores[0, h, s, list(choosable)].log_softmax(-1)
            target = 0.25 * w / w.sum() + 0.75 * w**2 / (w**2).sum()
            importance = min(1.0, float(w.sum()))
            total -= importance * float((target * log_share).sum())
            weight_of_all += importance
    found = page_loss(scores, weights, weights.sum(-1), at, RECENTS, sharp)
    assert float(found) == pytest.approx(total / weight_of_all, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_reads_the_chosen_pages_only(tmp_path, family):
    """Step by step with keys and values of other pages taken away, and with all of them."""
    from transformers import AutoModelForCausalLM

    first, count, pages = 49, 15, 4
    teacher = make_teacher(tmp_path, family, kv_heads=1)
    ids = torch.randint(0, 97, (1, LENGTH))
    at = torch.arange(first - 1, first - 1 + count)[None]
    lesson = teacher(ids, at, PageTarget(RECENTS), keep_cache=True)
    everything = torch.ones(1, 1, count, pages, dtype=torch.bool)
    torch.testing.assert_close(
        teacher.decode(ids, lesson.cache, first, everything),
        lesson.aux[:, first : first + count],
        rtol=1e-4,
        atol=1e-4,
    )
    chosen = torch.rand(1, 1, count, pages) < 0.5
    chosen[..., 0] = chosen[..., -1] = True
    found = teacher.decode(ids, lesson.cache, first, chosen)

    eager = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    mask = torch.full((1, 1, LENGTH, LENGTH), float("-inf")).triu(1)
    for q in range(count):
        unread = ~chosen[0, 0, q].repeat_interleave(PAGE_SIZE)
        mask[0, 0, first + q, : pages * PAGE_SIZE][unread] = float("-inf")
    with torch.no_grad():
        shown = eager(ids, attention_mask=mask, output_hidden_states=True)
    wanted = torch.cat([shown.hidden_states[i] for i in (1, 3)], -1)[:, first : first + count]
    torch.testing.assert_close(found[..., :64], wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, lesson.aux[:, first : first + count], atol=1e-2)
    # What the cache holds stays as it was.
    torch.testing.assert_close(
        teacher.decode(ids, lesson.cache, first, chosen), found, rtol=0, atol=0
    )
