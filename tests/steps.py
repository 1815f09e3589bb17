"""Decode steps without an engine."""

from __future__ import annotations

from types import SimpleNamespace

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.engine.request_settings import RequestBudgets
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.step_data import PageTable, Selection


def bare_step(retriever, selection: Selection, *, tiers=None, graphs=None) -> DecodeStep:
    """One that counts, times and attends nothing; its hooks are those of an engine."""
    table = PageTable(selection.pages, selection.lengths, selection.num_kv_heads)
    provider = SimpleNamespace(plan=lambda table, rows: None, warm_up=lambda table: None)
    exporter = SimpleNamespace(
        counting=False,
        end_selection=lambda: None,
        begin_step=lambda idle: None,
        select=None,
        learn=None,
    )
    return DecodeStep(
        retriever,
        selection,
        table,
        provider,
        exporter=exporter,
        kv_group=KVGroup(index=0, layer_names=("layer",), block_pages=1),
        budgets=RequestBudgets(SpeContextConfig(), 512),
        tiers=tiers,
        graphs=graphs,
    )
