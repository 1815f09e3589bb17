"""The ablation table of docs/distill.md says what the committed result file says."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_ablation_table_is_the_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "losses-cpu.json").read_text())
    lines = (ROOT / "docs" / "distill.md").read_text().splitlines()
    section = lines[lines.index("## What we learned about the loss") :]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section if line.startswith("| ")]
    table = {cells[0]: cells[1:] for cells in rows}
    for row in result["rows"]:
        shown = next(cells for name, cells in table.items() if name.replace(" over layers, weight", ", weight") == row["name"])
        assert shown[0] == f"{row['max_128']:.3f}"
        assert f"{row['max_256']:.3f}" in shown
        for key in ("max_128_difference", "max_256_difference"):
            assert key not in row or row[key] in shown
        assert "agreement" not in row or f"{row['agreement']:.3f}" in shown
