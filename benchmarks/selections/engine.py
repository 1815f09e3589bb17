"""Misses of real selections, counted by an engine with two tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import room_for_kv
from benchmarks.real.settings import OptionError
from benchmarks.selections.buffers import Policy
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.memory_model import KVShape, MemoryModel
from specontext_vllm.residency.table_rows import default_captured_rows
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.checkpoint import read_checkpoint

Course = tuple[list[list[int]], int, bool]
"""Tokens of each text, tokens of the prompt, and whether the others are forced; see
``scored_steps.Course``.
"""


@dataclass(frozen=True)
class Load:
    """What the engine is made for.

    Attributes:
        model, head: folders.
        dtype: float32 or bfloat16.
        texts: requests at once.
        context: tokens of the longest.
        policies: all that it will follow.
    """

    model: str
    head: str
    dtype: str
    texts: int
    context: int
    policies: Sequence[Policy]
    on_gpu: bool

    def arguments(self) -> dict[str, Any]:
        """Of ``LLM(...)``: a page table as wide as the largest hot buffer, GPU memory for such
        buffers of all requests in all layers, and a host pool for all pages.

        Raises:
            OptionError: the buffers take as much as the pages.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        dtype, spec = getattr(torch, self.dtype), read_checkpoint(Path(self.head)).spec
        layers = config.num_hidden_layers
        shape = KVShape(
            layers,
            heads,
            width,
            dtype.itemsize,
            HeadCache.bytes_per_block(
                spec.num_kv_heads, spec.head_dim, spec.hidden_size, dtype, dtype
            ),
        )
        hot = max(policy.hot_pages for policy in self.policies)
        memory = MemoryModel(
            shape,
            budget_pages=hot,
            table_pages=hot,
            max_num_seqs=self.texts,
            max_model_len=self.context + 1,
            captured_rows=default_captured_rows(self.texts) if self.on_gpu else 0,
        )
        pages = (pages_for(self.context) + 2) * self.texts + 2
        room = memory.size(pages, layers, hot).gpu_bytes
        if room >= memory.size(pages, 1, hot).gpu_bytes:
            raise OptionError(
                f"--slots: buffers of {PAGE_SIZE * hot} tokens leave nothing to offload of "
                f"{self.context} (--context); use smaller ones."
            )
        settings = {
            "retrieval_head": self.head,
            "budget": PAGE_SIZE * hot,
            "gpu_kv_gib": room / 2**30,
            "host_kv_gib": (layers + 1) * pages * shape.page_bytes / 2**30,
        }
        return {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "enable_prefix_caching": True,
            "max_num_seqs": self.texts,
            "block_size": PAGE_SIZE,
            "max_model_len": self.context + 1,
            "num_gpu_blocks_override": pages,
            "disable_log_stats": True,
            "attention_backend": "specontext",
            "additional_config": {"specontext": settings},
            **(room_for_kv(room / 2**30) if self.on_gpu else {"enforce_eager": True}),
        }


def run_engine(load: Load, courses: dict[str, Course]) -> Iterator[tuple[str, Any]]:
    """One engine goes through all courses with each policy; runs in a child.

    Yields:
        ``("ready", arguments)``, then ``("policy", (course, policy, counted))``; see ``follow``.
    """
    from vllm import LLM

    from benchmarks import forcing

    arguments = load.arguments()
    llm = LLM(**arguments, **forcing.engine_arguments(load.on_gpu))
    yield "ready", arguments
    for name, course in courses.items():
        for policy in load.policies:
            yield "policy", (name, policy, follow(llm, policy, course, load.on_gpu))


def follow(llm: Any, policy: Policy, course: Course, on_gpu: bool) -> dict[str, Any]:
    """Go through a course under a policy.

    Returns:
        ``steps``: of each in which no request took its first decode step, (head pages missed, head
        pages selected); ``first_steps``: how many others; ``stats``: the engine's.
    """
    from vllm import SamplingParams

    from benchmarks import forcing

    tokens, start, forced = course
    llm.collective_rpc(_apply, args=(policy,))
    llm.collective_rpc("specontext_stats", args=(True,))
    count = len(tokens[0]) - start
    prompts = [{"prompt_token_ids": text[:start]} for text in tokens]
    params: Any = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    if forced:
        params = [forcing.forced_params(text[start:], on_gpu) for text in tokens]
    llm.generate(prompts, params, use_tqdm=False)
    counted = llm.collective_rpc(_noted, args=(policy,))[0]
    return {**counted, "stats": llm.collective_rpc("specontext_stats")[0]}


def _apply(worker: Any, policy: Policy) -> None:
    """Follow a policy from the next step on, and note each step's misses.

    Raises:
        RuntimeError: the engine has one tier, in which nothing is fetched.
    """
    runtime = worker.model_runner.runtime
    tiers = runtime.tiers
    if tiers is None:
        raise RuntimeError(
            "selections: the GPU's part of the memory holds all KV of this load, so nothing would "
            "be fetched; give more --prompts."
        )
    runtime.settings.change(budget=policy.budget, stickiness=policy.stickiness)
    # Not the time law's choice, which depends on the load.
    tiers.hot_size.choose = lambda ledger: policy.hot_pages
    with torch.inference_mode():
        tiers.resize_hot_buffers(policy.hot_pages)
    if not hasattr(worker, "noted_steps"):
        _note_steps(worker, runtime)
    worker.noted_steps, worker.first_steps, worker.begun = [], 0, set()


def _note_steps(worker: Any, runtime: Any) -> None:
    """Note what is known when the misses are fetched, outside of captured graphs."""
    tiers = runtime.tiers
    place_rows, fetch = tiers.place_rows, tiers.fetch
    rows: list[str] = []

    def place_and_note(names: Sequence[str], table_rows: int) -> None:
        rows[:] = names
        place_rows(names, table_rows)

    def fetch_and_note(table_rows: int) -> None:
        if rows and table_rows:
            lengths = runtime.step.selection.lengths[: len(rows) * tiers.num_kv_heads]
            selected = int(((lengths + PAGE_SIZE - 1) // PAGE_SIZE).sum())
            if worker.begun.issuperset(rows):
                worker.noted_steps.append((int(tiers.misses.count), selected))
            else:
                # The first selection of a request is missed as a whole.
                worker.begun.update(rows)
                worker.first_steps += 1
        fetch(table_rows)

    tiers.place_rows, tiers.fetch = place_and_note, fetch_and_note


def _noted(worker: Any, policy: Policy) -> dict[str, Any]:
    """See ``follow``.

    Raises:
        RuntimeError: the hot buffers had another size than the policy's.
    """
    slots = worker.model_runner.runtime.tiers.status().hot_tokens // PAGE_SIZE
    if slots != policy.hot_pages:
        raise RuntimeError(f"{policy.name}: the hot buffers had {slots} slots")
    return {"steps": worker.noted_steps, "first_steps": worker.first_steps}
