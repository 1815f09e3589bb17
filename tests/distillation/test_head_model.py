"""A head for retrieval alone: what is trained is what is served."""

from itertools import product

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import HeadShape, spread_layers
from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.reference import page_scores, reduce_to_pages
from tests.distillation.tiny_models import make_config

LENGTH = 90


def make_head(seed=0, **changes):
    config = make_config("llama", num_hidden_layers=9)
    torch.manual_seed(seed)
    shape = HeadShape.for_target(config, max_position=128)
    model = HeadModel(HeadShape(**{**shape.__dict__, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of ones and an MLP of zeros would hide that they are left out.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("own_states", [True, False])
@pytest.mark.parametrize(("mlp", "groups"), [(12, 1), (0, 1), (12, 3)])
def test_scores_are_those_of_the_served_head(tmp_path, own_states, mlp, groups):
    model = make_head(own_states=own_states, mlp=mlp, groups=groups)
    shape = model.shape
    embeds = torch.randn(1, LENGTH, shape.target_hidden)
    aux = torch.randn(1, LENGTH, len(shape.aux_layers) * shape.target_hidden) * 3
    at = torch.tensor([[40, 57, LENGTH - 2]])
    with torch.no_grad():
        found = model.page_scores(embeds, aux, at)
    model.save(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    served = RetrievalHead(checkpoint, max_position=128, dtype=torch.float32, device="cpu")
    parts = aux[0].chunk(len(shape.aux_layers), -1)
    # bfloat16 is what it is stored in.
    reloaded = HeadModel.load(tmp_path, shape)
    with torch.no_grad():
        rounded = reloaded.page_scores(embeds, aux, at)
        fused = served.fuse(parts)
        place = torch.arange(1, LENGTH)
        keys = served.keys(embeds[0, 1:], fused[:-1], place, fused[1:] if own_states else None)
        queries = served.queries(embeds[0, 1:], fused[:-1], place)
    torch.testing.assert_close(found, rounded, rtol=0.05, atol=0.3)
    group = shape.heads // shape.kv_heads
    for s, p in enumerate(at[0].tolist()):
        token = p + 1
        newest = token - 1 if own_states else token
        for r, h in product(range(groups), range(shape.kv_heads)):
            first = (h * groups + r) * group
            q = queries[p, first : first + group]
            logits = torch.full((group, LENGTH), float("-inf"))
            logits[:, 1 : newest + 1] = q @ keys[:newest, h].T * shape.head_dim**-0.5
            wanted = page_scores(*reduce_to_pages(logits, PAGE_SIZE))[0]
            seen = wanted.isfinite()
            row = rounded[0, r * shape.kv_heads + h, s]
            torch.testing.assert_close(row[seen], wanted[seen], rtol=1e-3, atol=1e-3)
            assert (row[~seen] < -1e20).all()


def test_states_of_tokens_that_are_not_there_yet_change_nothing():
    """What serving does not have, training must not use: own states of the newest token, and
    anything later."""
    model = make_head()
    shape = model.shape
    embeds = torch.randn(1, LENGTH, shape.target_hidden)
    aux = torch.randn(1, LENGTH, len(shape.aux_layers) * shape.target_hidden)
    at = torch.tensor([[40, 57]])
    with torch.no_grad():
        found = model.page_scores(embeds, aux, at)
        aux[:, 58:] = torch.randn_like(aux[:, 58:])
        embeds[:, 59:] = torch.randn_like(embeds[:, 59:])
        pages = 58 // PAGE_SIZE + 1
        torch.testing.assert_close(
            model.page_scores(embeds, aux, at)[..., :pages], found[..., :pages]
        )
        aux[:, 57] += 1.0
        moved = model.page_scores(embeds, aux, at)
    assert not torch.allclose(moved[0, :, 1, :pages], found[0, :, 1, :pages])


def test_another_shape_is_not_trained_further(tmp_path):
    make_head().save(tmp_path)
    for changes in ({"mlp": 16}, {"groups": 2}):
        with pytest.raises(HeadError, match="--init .*another shape than a new head"):
            HeadModel.load(tmp_path, make_head(**changes).shape)


def test_layers_are_spread():
    assert spread_layers(30) == (2, 8, 14, 21, 27)
    assert spread_layers(32) == (2, 9, 16, 22, 29)
    for count in range(5, 80):
        layers = spread_layers(count)
        assert len(set(layers)) == len(layers) >= 2 and list(layers) == sorted(layers)
