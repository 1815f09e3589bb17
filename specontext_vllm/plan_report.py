"""A plan of `specontext plan` as tables and a picture."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from specontext_vllm.config import PAGE_SIZE, ConfigError
from specontext_vllm.planning import ACTIVATIONS, GIB, Plan
from specontext_vllm.residency.memory_model import TierPlan
from specontext_vllm.residency.table_rows import default_captured_rows, table_rows


def gpu_parts(tiers: TierPlan) -> dict[str, int]:
    """Bytes on the GPU by part; with one tier, without the parts that only two tiers have."""
    return {name: size for name, size in tiers.parts.items() if tiers.host_layers or size}


def memory_table(plan: Plan) -> Table:
    """The memory by part, and the tokens that fit."""
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
        **({} if plan.drafter is None else {"drafter": plan.drafter.weight_bytes}),
        "activations, graphs (assumed)": ACTIVATIONS,
        **gpu_parts(tiers),
    }
    others = model.others
    # States are as large with no context.
    states, beside = (
        model.beside_bytes(plan.asked, length, host=bool(tiers.host_layers))
        for length in (0, plan.rows[-1]["length"])
    )
    if others.windowed:
        parts[f"KV of {others.windowed} layers' windows ({others.window:,} tokens)"] = (
            beside - states
        )
    if others.states is not None:
        parts[f"states of {others.states.layers} layers, {plan.asked} requests"] = states
    if "tables" in parts:
        parts[
            "tables, for vLLM's default graphs of up to "
            f"{table_rows(plan.asked, default_captured_rows(plan.asked))} rows"
        ] = parts.pop("tables")
    for name, size in parts.items():
        table.add_row(f"GPU: {name}", f"{size / GIB:.2f} GiB")
    if tiers.host_layers:
        table.add_row("host pool (host_kv_gib)", f"{tiers.host_bytes / GIB:.2f} GiB")
    table.add_section()
    if others.count:
        layers = model.read.num_layers
        table.add_row("layers of full attention", f"{layers} of {layers + others.count}")
    if model.readers:
        table.add_row("of these, layers that read the KV of another one", str(model.readers))
    if others.states is not None:
        table.add_row("states of a request", f"{others.state_bytes / 2**20:.2f} MiB")
        table.add_row("tokens of a block, which holds a state", f"{others.states.block_tokens:,}")
    if others.unknown:
        table.add_row("layers whose states are not counted", str(others.unknown))
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
    if plan.requests < plan.asked:
        table.add_row(
            "requests that run at once: more hot buffers\n"
            "would take half of what the host pool adds",
            f"{plan.requests} of {plan.asked}",
        )
    return table


def thresholds_table(plan: Plan) -> Table:
    """The thresholds S_T[i]."""
    table = Table(title=f"Thresholds for {plan.requests} requests", title_justify="left")
    for heading in ("layers offloaded", "longest context S_T, tokens"):
        table.add_column(heading, justify="right")
    for offloaded, tokens in enumerate(plan.thresholds):
        table.add_row(str(offloaded), f"{tokens:,}")
    return table


def lengths_table(plan: Plan) -> Table:
    """Layers, memory and step time by context length."""
    # Rich cuts figures on a narrow terminal: no column may shrink, and together they fit 80
    # characters.
    table = Table(
        title=f"{plan.requests} requests by context length",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
    )
    columns = {
        "length": ("context", ",d"),
        "resident": ("resident\nlayers", "d"),
        "full_share": ("KV in\nfull\nlayers", ".0%"),
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
    if not plan.model.others.count and plan.model.others.states is None:
        del columns["full_share"]
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


def lossless_table(plan: Plan) -> Table:
    """Lossless mode's tokens per second in those of dense attention, by context length and
    acceptance, and from which length it drafts at all.
    """
    lossless = plan.lossless
    assert lossless is not None
    table = Table(
        title=f"Lossless mode, {plan.requests} requests: times dense attention (drafts a round), "
        "by acceptance",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("context", justify="right", no_wrap=True)
    for acceptance in lossless.choices:
        table.add_column(f"{acceptance:.0%}", justify="right", no_wrap=True)
    for place, length in enumerate(lossless.lengths):
        chosen = [choices[place] for choices in lossless.choices.values()]
        table.add_row(
            f"{length:,}", *(f"{gain:.2f} ({drafts})" if drafts else "1" for drafts, gain in chosen)
        )
    table.add_section()
    starts = ("–" if start is None else f"{start:,}" for start in lossless.starts.values())
    table.add_row("pays from", *starts)
    return table


def draw(plan: Plan, out: Path) -> None:
    """Write a PNG: resident layers, bytes by part, and step time over the context length.

    Raises:
        ConfigError: ``out`` is no PNG or cannot be written.
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
    bars = {name: (size, "tab:blue") for name, size in reversed(gpu_parts(plan.tiers).items())}
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
