"""The demo model with linear attention in most layers: from nothing to a folder with a head."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from specontext_vllm.demo import train
from specontext_vllm.demo.sizes import SIZES, Size
from specontext_vllm.distillation.teacher import load_teacher, read_config
from specontext_vllm.model_config import num_full_layers
from specontext_vllm.retrieval.checkpoint import read_checkpoint

SIZE = replace(
    SIZES["hybrid"],
    hidden=64,
    ffn=96,
    head_dim=16,
    phases=((4, 256, 1.0, 0.5),),
    head_batches=((1, 256),),
    eval_budgets=(128,),
    max_position=512,
    workers=1,
)


@pytest.mark.slow
def test_a_hybrid_is_trained_and_its_head_distilled(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "hybrid", SIZE)
    arguments = ["train", "--size", "hybrid", "--out", str(tmp_path), "--minutes", "0.2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--device", "cpu"])
    train.main()
    config = read_config(tmp_path)
    assert (config.model_type, num_full_layers(config)) == ("qwen3_5_text", 2)
    model = load_teacher(tmp_path, torch.device("cpu"), torch.float32)
    assert model.config.vocab_size == config.vocab_size
    spec = read_checkpoint(tmp_path / "retrieval_head").spec
    assert (spec.num_kv_heads, spec.target_hidden_size) == (2, 64)
    log = (tmp_path / "training_log.txt").read_text()
    assert "end of 256 tokens after" in log and log.rstrip().endswith("done")


def test_every_fourth_layer_attends_fully():
    size = SIZES["hybrid"]
    assert [i for i in range(size.layers) if size.is_full(i)] == [3, 7]
    assert all(Size().is_full(i) for i in range(6))
