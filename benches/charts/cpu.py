"""The chart of a saved CPU run: how many times faster than plain PyTorch, case by case.

    python -m benches.charts.cpu benches/results/cpu.json benches/results/cpu.png

The run is one of ``pytest benches/suites/bench_cpu.py --save-results``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe-Ito colours: told apart by colour-blind readers.
SERIES = {
    "ratio": ("best of plain PyTorch (chunked, compiled, naive, jvp)", "#0072B2"),
    "naive_x": ("naive closed form", "#E69F00"),
    "jvp_x": ("torch.func.jvp", "#009E73"),
}


def draw(run: dict[str, Any], path: Path) -> None:
    """Draw one group of bars a case, in the order of the run."""
    rows = [row for row in run["rows"] if "naive_x" in row]
    machine = run["machine"]
    height = 0.8 / len(SERIES)
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(rows) + 1.6), layout="constrained")
    for position, (name, (label, colour)) in enumerate(SERIES.items()):
        at = [index + (position - 1) * height for index in range(len(rows))]
        bars = axes.barh(at, [row[name] for row in rows], height, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(
        range(len(rows)), [f"C={r['C']}, D={r['D']}\nN={r['N']:,}" for r in rows], fontsize=8
    )
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of plain PyTorch / time of moso_fast (higher is better)")
    axes.set_title(
        f"Loss, alignment and self norm of every row, float32\n{machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {machine['backend']}",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    draw(json.loads(source.read_text(encoding="utf-8")), target)
