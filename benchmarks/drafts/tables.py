"""Rows of the case `drafts` from what its engines have reported."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.engines import Cell

STOCK, OURS, LOSSLESS = "stock", "specontext", "lossless"

_ACCEPTANCE = report.Column("acceptance", "acceptance", ".0%")
TABLES = {
    "Drafts of an EAGLE-3 head, tokens/s": (
        report.Column("drafts_cell", "requests x context"),
        report.Column("drafts", "drafts", "d"),
        _ACCEPTANCE,
        report.Column("stock", "stock", ",.0f"),
        report.Column("ours", "specontext", ",.0f"),
        report.Column("stock_drafts", "stock, drafts", ",.0f"),
        report.Column("ours_drafts", "specontext, drafts", ",.0f"),
        report.Column("over_stock", "times stock", ".2f"),
        report.Column("over_stock_drafts", "times stock with drafts", ".2f"),
        report.Column("tokens_per_row", "tokens a step and row", ".2f"),
    ),
    "Lossless mode, tokens/s": (
        report.Column("lossless_cell", "requests x context"),
        _ACCEPTANCE,
        report.Column("stock", "stock", ",.0f"),
        report.Column("lossless", "lossless", ",.0f"),
        report.Column("lossless_over_stock", "times stock", ".2f"),
        report.Column("lossless_drafts", "drafts, mean", ".1f"),
        report.Column("tokens_per_row", "tokens a step and row", ".2f"),
        report.Column("step", "step, ms", ".2f"),
    ),
    "Step time, ms": (
        report.Column("step_cell", "requests x context"),
        report.Column("engine", "engine"),
        _ACCEPTANCE,
        report.Column("step", "median", ".2f"),
        report.Column("spread", "p10 to p90"),
        report.Column("graph", "graph"),
    ),
}


def cell_key(cell: str, acceptance: float | None) -> str:
    """Under which an engine's figures stand."""
    return cell if acceptance is None else f"{cell} at {acceptance:g}"


def make_rows(
    cells: list[Cell], drafts: list[int], acceptances: list[float], details: dict[str, Any]
) -> list[dict[str, Any]]:
    """The tables' rows; what was not measured is absent."""
    engines = {name: engine["cells"] for name, engine in details["engines"].items()}

    def figures(engine: str, cell: Cell, acceptance: float | None = None) -> dict[str, Any] | None:
        found = engines.get(engine, {}).get(cell_key(cell.name, acceptance))
        return found if found and "tokens_per_s" in found else None

    out = []
    for cell in cells:
        label = cell.label(cell.named_requests)
        plain = {
            key: found["tokens_per_s"]
            for key, name in (("stock", STOCK), ("ours", OURS))
            if (found := figures(name, cell))
        }
        for count in drafts:
            for acceptance in acceptances:
                row = {"drafts_cell": label, "drafts": count, "acceptance": acceptance, **plain}
                for key, name in (("stock_drafts", STOCK), ("ours_drafts", OURS)):
                    if found := figures(f"{name}, {count} drafts", cell, acceptance):
                        row |= {
                            key: found["tokens_per_s"],
                            "tokens_per_row": found["tokens_per_row"],
                        }
                if "ours_drafts" in row:
                    for key, under in (
                        ("over_stock", "stock"),
                        ("over_stock_drafts", "stock_drafts"),
                    ):
                        if under in row:
                            row[key] = row["ours_drafts"] / row[under]
                if "ours_drafts" in row or "stock_drafts" in row:
                    out.append(row)
        for acceptance in acceptances:
            if found := figures(LOSSLESS, cell, acceptance):
                row = {
                    "lossless_cell": label,
                    "acceptance": acceptance,
                    **plain,
                    "lossless": found["tokens_per_s"],
                    "lossless_drafts": found["drafts"],
                    "tokens_per_row": found["tokens_per_row"],
                    "step": found["step_ms"]["mean"],
                }
                if "stock" in row:
                    row["lossless_over_stock"] = row["lossless"] / row["stock"]
                out.append(row)
        for name, measured in engines.items():
            for at in (None, *acceptances):
                found = measured.get(cell_key(cell.name, at))
                if found is None:
                    continue
                row = {"step_cell": label, "engine": name, "acceptance": at}
                if "out_of_memory" in found:
                    row["step"] = "out of memory"
                else:
                    step = found["step_ms"]
                    row |= {
                        "step": step["median"],
                        "spread": f"{step['p10']:.2f} to {step['p90']:.2f}",
                        "graph": found.get("graph"),
                    }
                out.append(row)
    return out
