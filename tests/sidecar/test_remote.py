"""A sidecar in a real Ray process selects what the head in the worker does, step for step, and densely while it is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
from specontext_vllm.sidecar.remote import RemoteRetriever
from tests.retrieval.test_retriever import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MAX_LEN, VOCAB, World

BLOCKS = 200


class Twins:
    """An inline retriever and a remote one that see the same steps; stands in for ``World.retriever``."""

    def __init__(self, inline, remote, device):
        self.inline, self.remote, self.config = inline, remote, inline.config
        self.pages = torch.zeros(8 * KV_HEADS, MAX_LEN // PAGE_SIZE, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(8 * KV_HEADS, dtype=torch.int32, device=device)

    def before_forward(self, batch, pages, lengths):
        self.inline.before_forward(batch, pages, lengths)
        self.remote.before_forward(batch, self.pages, self.lengths)

    def after_forward(self, batch, aux):
        self.inline.after_forward(batch, aux)
        self.remote.after_forward(batch, aux)


@pytest.fixture(scope="module")
def world():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    world = World(device)
    checkpoint = dummy_checkpoint(
        hidden_size=HIDDEN, num_layers=12, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope_theta=1e4, max_position=MAX_LEN,
        dtype=torch.float32, seed=0,
    )  # fmt: skip
    config = replace_config(world.config, sidecar="ray")
    remote = RemoteRetriever(
        config, checkpoint, lambda ids: F.embedding(ids, world.table), vocab_size=VOCAB, num_kv_heads=KV_HEADS, max_model_len=MAX_LEN,
        max_rows=8, max_tokens=256, dtype=torch.float32, device=device,
    )  # fmt: skip
    remote.allocate_cache(BLOCKS)
    world.retriever = Twins(world.retriever, remote, device)
    yield world
    remote.close()


def replace_config(config, **changes):
    return type(config).from_settings({**config.model_dump(exclude_unset=True), **changes})


def actor_pid() -> int:
    """The actor's process, a grandchild of this one."""
    import psutil

    actors = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Sidecar")]
    assert len(actors) == 1, [p.name() for p in psutil.Process().children(recursive=True)]
    return actors[0].pid


def row_of(lengths, pages, row):
    """What a row of the page table holds, per head."""
    heads = range(row * KV_HEADS, (row + 1) * KV_HEADS)
    return [(int(lengths[h]), pages[h, : pages_for(int(lengths[h]))].tolist()) for h in heads]


def whole(world, name, length):
    return [(length, [block * KV_HEADS + head for block in world.rows[name][: pages_for(length)]]) for head in range(KV_HEADS)]


def step(world, *spans):
    """A step; per decode row, in the order of ``spans``, what the inline head selects and what the page table of the remote holds."""
    world.step(*spans)
    twins, decodes = world.retriever, [s for s in spans if s[2] - s[1] == 1]
    return [(row_of(world.lengths, world.pages, i), row_of(twins.lengths, twins.pages, i)) for i in range(len(decodes))]
