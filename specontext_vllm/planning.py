"""`specontext plan`: the memory model for a model's config, as tables and a picture, without
starting an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.model_config import has_windowed_layers
from specontext_vllm.residency.hot_size import prior_rate
from specontext_vllm.residency.memory_model import (
    KVShape,
    MemoryModel,
    StepTime,
    TierPlan,
    default_captured_rows,
    table_rows,
)

GIB = 2**30
UTILIZATION = 0.92
"""vLLM's default share of the GPU (vllm/config/cache.py, gpu_memory_utilization)."""
ACTIVATIONS = 2 * GIB
"""Assumed for activations and graphs; vLLM measures them."""


@dataclass(frozen=True)
class Model:
    """What the plan needs of a model: its KV's shape, bytes of its weights and of a retrieval head
    of its shape, and the longest context that vLLM serves it with."""

    kv: KVShape
    weight_bytes: int
    head_bytes: int
    max_model_len: int


def read_model(path: Path) -> Model:
    """Read a Hugging Face config.json; the weights are counted on torch's meta device, nothing is
    loaded.

    Args:
        path: folder of the model, or its config.json.
    Raises:
        ConfigError: no config.json, or not one of a causal language model that transformers knows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model: {folder} holds no config.json; give a model's folder or its config.json."
        )
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
            )
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        layers, longest = text.num_hidden_layers, _longest(text)
    except Exception as error:  # an odd config fails wherever its values are first used
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model: {folder}/config.json is not that of a causal language model that "
            f"transformers knows: {reason}"
        ) from None
    for found, what in (
        (has_windowed_layers(text), "sliding windows"),
        (getattr(text, "kv_lora_rank", None), "multi-head latent attention (MLA)"),
    ):
        if found:
            raise ConfigError(
                f"--model: {folder}/config.json is of a model with {what}, which specontext "
                "refuses to serve; plan for another one."
            )
    dtype = text.dtype if isinstance(text.dtype, torch.dtype) else torch.bfloat16
    # fc over three hidden states, q and k over two; the cache: its own keys, and one fused aux
    # state a page. A GPU that is planned for is taken to have 8-bit floats, in which the keys are
    # kept then (`retrieval/cache.py`).
    head = 3 * hidden * hidden + 2 * hidden * head_dim * (heads + kv_heads)
    cache = kv_heads * PAGE_SIZE * head_dim + hidden * dtype.itemsize
    kv = KVShape(layers, kv_heads, head_dim, dtype.itemsize, cache)
    return Model(kv, parameters * dtype.itemsize, head * dtype.itemsize, longest)


def _longest(config: Any) -> int:
    """The longest context of a language model, as vLLM derives it (vllm/config/model.py,
    _get_and_verify_max_len): scaled by RoPE's factor where the config gives the length before
    scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type") in (
        "su",
        "longrope",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
    )
    derived = int(config.max_position_embeddings * (1 if scaled else rope.get("factor") or 1))
    return max(derived, getattr(config, "model_max_length", None) or 0)


@dataclass(frozen=True)
class Plan:
    """One planned engine: the memory model's plan, and what follows for a load of equal requests.

    Attributes:
        kv_bytes: room on the GPU for KV, the head's caches and tables.
        alone: the plan without a host pool.
        thresholds: S_T[i] in tokens, i = 0..M.
        rows: by context length; see ``lengths_table``.
    """

    model: Model
    requests: int
    gpu_bytes: int
    kv_bytes: int
    tiers: TierPlan
    alone: TierPlan
    thresholds: list[int]
    rows: list[dict[str, Any]]


def make_plan(
    model: Model,
    config: SpeContextConfig,
    *,
    gpu_bytes: int,
    host_bytes: int,
    requests: int,
    max_model_len: int,
    miss_rate: float | None,
    link_bytes_per_s: float,
) -> Plan:
    """Plan an engine.

    Args:
        gpu_bytes: memory of the GPU. requests: vLLM's max_num_seqs, and the load of the tables.
        miss_rate: share of the budget's pages fetched a step; None: what the engine expects of its
            hot buffers before it has measured (``prior_rate``).
    Raises:
        ConfigError, MemoryModelError: one sentence with the numbers.
    """
    if not PAGE_SIZE <= max_model_len <= model.max_model_len:
        raise ConfigError(
            f"--length: found {max_model_len}; give {PAGE_SIZE} to {model.max_model_len} tokens, "
            "the model's own longest context."
        )
    if host_bytes and config.budget >= max_model_len:
        raise ConfigError(
            f"--budget: found {config.budget}, which holds the longest context ({max_model_len} "
            "tokens) whole, so that nothing could be left on the host; "
            f"give less, or --host-gib 0."
        )
    room = int(UTILIZATION * gpu_bytes) - model.weight_bytes - model.head_bytes - ACTIVATIONS
    if room <= 0:
        raise ConfigError(
            f"--gpu-gib: {UTILIZATION:.0%} of {gpu_bytes / GIB:.1f} GiB do not hold the weights "
            f"({model.weight_bytes / GIB:.1f} GiB), the "
            f"retrieval head ({model.head_bytes / GIB:.2f} GiB) and {ACTIVATIONS / GIB:.0f} GiB "
            "for activations; give more."
        )
    memory = MemoryModel(
        model.kv,
        budget_pages=config.budget_pages,
        table_pages=config.table_pages(max_model_len),
        max_num_seqs=requests,
        max_model_len=max_model_len,
        captured_rows=default_captured_rows(requests),
    )
    tiers = memory.plan(room, host_bytes)
    alone = memory.plan(room, 0)
    if miss_rate is None:
        miss_rate = prior_rate(tiers.hot_pages, config.table_pages(max_model_len))
    law = StepTime(model.weight_bytes + model.head_bytes, link_bytes_per_s=link_bytes_per_s)
    rows = []
    for length in _lengths(max_model_len):
        offloaded = memory.offloaded_layers(tiers, length, requests)
        row: dict[str, Any] = {
            "length": length,
            "dense_ms": 1e3 * law.dense_step(model.kv, requests=requests, length=length),
        }
        if offloaded is not None:
            compute, transfer, moved = law.step(
                model.kv,
                requests=requests,
                length=length,
                budget_pages=config.budget_pages,
                offloaded=offloaded,
                miss_rate=miss_rate,
            )
            kv = requests * pages_for(length) * model.kv.page_bytes
            row |= {
                "resident": model.kv.num_layers - offloaded,
                "moved_mb": moved / 1e6,
                "compute_ms": 1e3 * compute,
                "transfer_ms": 1e3 * transfer,
                "step_ms": 1e3 * max(compute, transfer),
                "gpu_gib": (
                    kv * (model.kv.num_layers - offloaded)
                    + offloaded * requests * tiers.hot_pages * model.kv.page_bytes
                )
                / GIB,
                "host_gib": kv * tiers.host_layers / GIB,
            }
        rows.append(row)
    if not any("resident" in row for row in rows):
        raise ConfigError(
            f"--requests: {requests} requests of {rows[0]['length']} tokens each do not fit; both "
            f"tiers hold {tiers.num_pages * PAGE_SIZE} tokens; "
            f"ask for fewer, or give more memory."
        )
    return Plan(
        model, requests, gpu_bytes, room, tiers, alone, memory.thresholds(tiers, requests), rows
    )


def _lengths(longest: int) -> list[int]:
    lengths = [1024 * 2**i for i in range(20) if 1024 * 2**i < longest]
    middles = [3 * n // 2 for n in lengths if n >= 8192 and 3 * n // 2 < longest]
    return sorted({*lengths, *middles, longest})


def _parts(tiers: TierPlan) -> dict[str, int]:
    """Bytes on the GPU by part, without those that only two tiers have where there is one."""
    return {name: size for name, size in tiers.parts.items() if tiers.host_layers or size}


def memory_table(plan: Plan) -> Table:
    """Bytes by part, and what they hold."""
    tiers, model = plan.tiers, plan.model
    table = Table(
        title=f"Memory: {plan.gpu_bytes / GIB:g} GiB on the GPU",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    parts = {
        "weights": model.weight_bytes,
        "retrieval head": model.head_bytes,
        "activations, graphs (assumed)": ACTIVATIONS,
        **_parts(tiers),
    }
    if "tables" in parts:
        parts[
            "tables, for vLLM's default graphs of up to "
            f"{table_rows(plan.requests, default_captured_rows(plan.requests))} rows"
        ] = parts.pop("tables")
    for name, size in parts.items():
        table.add_row(f"GPU: {name}", f"{size / GIB:.2f} GiB")
    if tiers.host_layers:
        table.add_row("host pool (host_kv_gib)", f"{tiers.host_bytes / GIB:.2f} GiB")
    table.add_section()
    table.add_row("tokens that fit", f"{tiers.num_pages * PAGE_SIZE:,}")
    if not tiers.host_layers:
        return table
    table.add_row("the same without a host pool", f"{plan.alone.num_pages * PAGE_SIZE:,}")
    table.add_row(
        "layers with a mirror on the host", f"{tiers.host_layers} of {model.kv.num_layers}"
    )
    table.add_row(
        "hot buffer of a request and offloaded layer", f"{tiers.hot_pages * PAGE_SIZE:,} tokens"
    )
    return table


def thresholds_table(plan: Plan) -> Table:
    """S_T[i]."""
    table = Table(title=f"Thresholds for {plan.requests} requests", title_justify="left")
    for heading in ("layers offloaded", "longest context S_T, tokens"):
        table.add_column(heading, justify="right")
    for offloaded, tokens in enumerate(plan.thresholds):
        table.add_row(str(offloaded), f"{tokens:,}")
    return table


def lengths_table(plan: Plan) -> Table:
    """What happens at each context length."""
    # Rich would cut figures where a terminal is narrow: no column may shrink, and all of them
    # together fit in 80 characters.
    table = Table(
        title=f"{plan.requests} requests by context length",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
    )
    columns = {
        "length": ("context", ",d"),
        "resident": ("resident\nlayers", "d"),
        "gpu_gib": ("KV on\nGPU\nGiB", ".2f"),
        "host_gib": ("on\nhost\nGiB", ".2f"),
        "moved_mb": ("PCIe\nMB/step", ".0f"),
        "compute_ms": ("compute\nms", ".2f"),
        "transfer_ms": ("transfer\nms", ".2f"),
        "step_ms": ("step\nms", ".2f"),
        "dense_ms": ("dense, all\non a GPU\nms", ".2f"),
    }
    if not plan.tiers.host_layers:
        columns = {
            key: column
            for key, column in columns.items()
            if key not in ("host_gib", "moved_mb", "transfer_ms")
        }
    for heading, _ in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            *(
                format(row[key], style)
                if key in row
                else "does not fit"
                if key == "resident"
                else "–"
                for key, (_, style) in columns.items()
            )
        )
    return table


def draw(plan: Plan, out: Path) -> None:
    """Write the picture, a PNG: resident layers and the time of a step over the context length.

    Raises:
        ConfigError: it cannot be written there.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(
            f"--out: found {out}; the picture is a PNG, so give a file that ends in .png."
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    fitting = [row for row in plan.rows if "resident" in row]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(16, 4.5), constrained_layout=True
    )
    longest = [n for n in plan.thresholds if n]
    layers = plan.model.kv.num_layers
    left.step(
        [PAGE_SIZE, *longest],
        [layers, *(layers - i for i, n in enumerate(plan.thresholds) if n)],
        where="pre",
    )
    left.set(
        xlabel=f"context of each of {plan.requests} requests",
        ylabel="resident layers",
        ylim=(-0.5, layers + 0.5),
        title="What stays on the GPU",
    )
    bars = {name: (size, "tab:blue") for name, size in reversed(_parts(plan.tiers).items())}
    if plan.tiers.host_layers:
        bars = {"host pool": (plan.tiers.host_bytes, "tab:orange"), **bars}
    middle.barh(
        list(bars),
        [size / GIB for size, _ in bars.values()],
        color=[color for _, color in bars.values()],
    )
    middle.set(xlabel="GiB", title="Bytes by part (blue: GPU)")
    lengths = [row["length"] for row in fitting]
    for key, label in (("compute_ms", "compute"), ("transfer_ms", "transfer"), ("step_ms", "step")):
        right.plot(
            lengths,
            [row[key] for row in fitting],
            label=label,
            linewidth=3 if key == "step_ms" else 1.5,
            alpha=0.6 if key == "step_ms" else 1,
        )
    right.plot(
        [row["length"] for row in plan.rows],
        [row["dense_ms"] for row in plan.rows],
        "--",
        color="gray",
        label="dense, were it to fit",
    )
    right.set(
        xlabel="context",
        ylabel="ms",
        title="Time of a decode step (the time law)",
        ylim=(0, 3 * max(row["step_ms"] for row in fitting)),
    )
    right.legend()
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlim(lengths[0], plan.rows[-1]["length"])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror}); name another."
        ) from None
    finally:
        pyplot.close(figure)
