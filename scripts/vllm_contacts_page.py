"""The made part of docs/developer/port_vllm.md."""

from __future__ import annotations

from scripts.vllm_contacts import REASONS, Contact, Package, contacts


def as_markdown(package: Package | None = None) -> str:
    """The made part of docs/developer/port_vllm.md."""
    found = contacts(package or Package())
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return "\n".join(
        [
            "### Replaced in memory, set, or private\n",
            _reasons_table(by_kind["assignment"] + by_kind["private"]),
            "### Overridden methods\n",
            _overrides_table(by_kind["override"]),
            "### Interfaces implemented\n",
            _interfaces_table(by_kind["override"]),
            "### Read or called though no interface promises it\n",
            _uses_table(by_kind["use"]),
            "### Imported names\n",
            _imports_table(by_kind["import"]),
        ]
    )


KINDS = ("assignment", "private", "override", "use", "import")


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in escaped)


def _reasons_table(found: list[Contact]) -> str:
    touched: dict[str, list[Contact]] = {}
    for contact in found:
        touched.setdefault(contact.where, []).append(contact)
    rows = []
    for where, group in sorted(touched.items()):
        what = ", ".join(f"`{name}`" for name in sorted({c.what for c in group}))
        rows.append([f"`{where}`", what, *(group[0].marks.get(mark, "") for mark in REASONS)])
    return _table(["where", "what", "symptom without it", "reason", "remove when"], rows)


def _overrides_table(found: list[Contact]) -> str:
    rows = [[f"`{c.what}`", f"`{c.where}`", c.summary] for c in found if "Overrides" in c.marks]
    return _table(["vLLM's", "ours", "what it adds"], sorted(rows))


def _interfaces_table(found: list[Contact]) -> str:
    members: dict[tuple[str, str], list[str]] = {}
    for contact in found:
        if "Overrides" not in contact.marks and "Implements" in contact.marks:
            owner, _, name = contact.where.rpartition(".")
            members.setdefault((contact.marks["Implements"], owner), []).append(f"`{name}`")
    rows = [
        [f"`{theirs}`", f"`{ours}`", ", ".join(names)]
        for (theirs, ours), names in sorted(members.items())
    ]
    return _table(["vLLM's", "ours", "members"], rows)


def _uses_table(found: list[Contact]) -> str:
    used: dict[str, list[str]] = {}
    for contact in found:
        used.setdefault(contact.what, []).append(f"`{contact.where}`")
    return _table(
        ["vLLM's", "used in"], [[f"`{k}`", ", ".join(v)] for k, v in sorted(used.items())]
    )


def _imports_table(found: list[Contact]) -> str:
    modules: dict[str, list[Contact]] = {}
    for contact in found:
        modules.setdefault(contact.where, []).append(contact)
    rows = [
        [f"`{where}`", group[0].marks.get("vLLM", ""), ", ".join(f"`{c.what}`" for c in group)]
        for where, group in sorted(modules.items())
    ]
    return _table(["module", "for", "names"], rows)
