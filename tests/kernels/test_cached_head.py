"""A head's decode rows through the kernels, against its torch methods on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.cached_head import CachedHead
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.step_data import StepBatch
from tests.paging import assert_close
from tests.retrieval.own_heads import KINDS, make_own

VOCAB, BLOCKS, MOST_ROWS = 77, 20, 8
LENGTHS = [3, 47, 30, 0]
"""Tokens that each row has learned before; the last row is padding."""


class Rows:
    """A cached head that has learned some tokens of each row, and decodes the next ones."""

    def __init__(self, checkpoint, dtype, device, *, kernels, key_dtype="model"):
        self.device = device
        head = RetrievalHead(checkpoint, max_position=64, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(11)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        embedding = random(VOCAB, checkpoint.spec.embed_size)
        self.cached = CachedHead(
            head, lambda ids: F.embedding(ids, embedding), key_dtype, device, MOST_ROWS
        )
        self.cached.allocate(BLOCKS)
        # Nobody reads what is not written here; torch's path writes padding into the last page.
        self.cached.cache.keys.fill_(float("nan"))
        self.cached.cache.fused.copy_(random(BLOCKS + 1, checkpoint.spec.hidden_size))
        if kernels:
            # On a CPU they run in Triton's interpreter.
            self.cached.device = SimpleNamespace(type="cuda")
        width = checkpoint.spec.target_hidden_size
        self.aux = [3 * random(4, len(LENGTHS), width) for _ in range(checkpoint.spec.num_aux)]
        self.ids = torch.randint(VOCAB, (4, len(LENGTHS)), generator=generator).to(device)
        self.table = torch.randperm(BLOCKS - 1, generator=generator)[:16].view(4, 4).int()

    def step(self, index, *, with_queries=True):
        """The queries of the ``index``-th token that is decoded in each row."""
        positions = torch.tensor(LENGTHS) + index
        blocks = self.table.gather(1, (positions // PAGE_SIZE)[:, None]).squeeze(1).long()
        slots = blocks * PAGE_SIZE + positions % PAGE_SIZE
        slots[-1] = -1
        rows = len(LENGTHS)
        batch = StepBatch(
            token_ids=self.ids[index],
            positions=positions.to(self.device),
            slots=slots.to(self.device),
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            seq_lens=(positions + 1).int().to(self.device),
            block_table=self.table.to(self.device),
            seq_lens_bound=(positions[:-1] + 1).tolist(),
            num_decodes=rows - 1,
            table_rows=rows,
            num_tokens=rows - 1,
        )
        embeds = self.cached.embed(batch.token_ids)
        queries = self.cached.project(batch, rows, embeds, with_queries=with_queries)
        self.cached.learn_decodes(batch, rows, [state[index] for state in self.aux])
        return None if queries is None else queries[:-1].float().cpu()

    def cache(self):
        """Keys and fused aux, but for what nobody reads."""
        cache = self.cached.cache
        return cache.keys[:-1].float().cpu(), cache.fused[:-1].float().cpu()


@pytest.mark.parametrize("kind", ["previous-mlps", "own", "own-all-of-it"])
@pytest.mark.parametrize(
    ("dtype", "key_dtype", "ratio"),
    [
        pytest.param(torch.float32, "model", 1e-5, id="fp32"),
        pytest.param(torch.bfloat16, "model", 2e-2, id="bf16", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, "fp8", 4e-2, id="8-bit-keys", marks=pytest.mark.gpu),
    ],
)
@torch.inference_mode()
def test_kernels_and_torch_leave_the_same(kind, dtype, key_dtype, ratio, device):
    checkpoint = make_own(**KINDS[kind])
    kernels = Rows(checkpoint, dtype, device, kernels=True, key_dtype=key_dtype)
    plain = Rows(checkpoint, torch.float32, torch.device("cpu"), kernels=False)
    for name in ("aux", "ids"):
        given = getattr(kernels, name)
        setattr(
            plain,
            name,
            [state.float().cpu() for state in given] if name == "aux" else given.cpu(),
        )
    plain.cached.cache.fused.copy_(kernels.cached.cache.fused)
    embedding = kernels.cached.embed(torch.arange(VOCAB, device=device)).float().cpu()
    plain.cached.embed = lambda ids: F.embedding(ids, embedding)
    for index in range(4):
        with_queries = index != 1
        found = kernels.step(index, with_queries=with_queries)
        wanted = plain.step(index, with_queries=with_queries)
        assert (found is None) == (wanted is None) == (not with_queries)
        if wanted is not None:
            assert_close(f"queries {index}", wanted, found, ratio)
    for name, wanted, found in zip(("keys", "fused"), plain.cache(), kernels.cache(), strict=True):
        written = ~wanted.isnan()
        assert torch.equal(written, ~found.isnan()), f"{name}: other places were written"
        assert_close(name, wanted[written], found[written], ratio)
