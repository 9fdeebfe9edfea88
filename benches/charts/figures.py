"""Charts of a results file: speed ratios, roofline, memory, growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moso_fast.bench.providers.ours import OURS
from moso_fast.bench.runner import best_plain, find_row
from moso_fast.util.plot import COLOURS, GREY, MARKERS, new_axes, new_figure, save_png

from ..growth import AXES

__all__ = ["draw_all", "growth", "memory", "roofline", "speed", "subtitle"]

_SHOWN = {
    "naive": "naive closed form",
    "torch.func.jvp": "torch.func.jvp",
    "torch.func.vmap(grad)": "vmap(grad)",
}


def draw_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write every chart that the results suffice for; returns the files."""
    written = []
    charts = {"speed": speed, "roofline": roofline, "memory": memory, "growth": growth}
    for name, draw in charts.items():
        figure = draw(results)
        if figure is not None:
            written.append(save_png(figure, folder / f"{results['profile']}_{name}.png"))
    return written


def subtitle(results: dict[str, Any]) -> str:
    """Machine, threads and versions in one line."""
    machine = results["machine"]
    measured = next(iter(results["cases"].values()))["measured"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {measured['torch']}, {measured['backend']}"


def speed(results: dict[str, Any]) -> Any:
    """Bars: time of the best plain PyTorch, of three others and of the best library over ours."""
    cases = {name: record for name, record in results["cases"].items() if record["speedup"]}
    if not cases:
        return None
    colours = dict(
        zip(["best plain PyTorch", *_SHOWN.values(), "best library"], COLOURS, strict=False)
    )
    series = [s for s in colours if any(_ratio(r, s) is not None for r in cases.values())]
    figure, axes = new_axes(8.5, 0.6 * len(cases) + 1.6)
    height = 0.8 / len(series)
    for position, label in enumerate(series):
        for index, record in enumerate(cases.values()):
            value = _ratio(record, label)
            if value is None:
                continue
            at = index + (position - (len(series) - 1) / 2) * height
            bar = axes.barh(
                at, value, height, color=colours[label], label=label if index == 0 else None
            )
            axes.bar_label(bar, fmt="%.2g" if value >= 100 else "%.1f", padding=2, fontsize=6)
    axes.set_yticks(
        range(len(cases)),
        [f"{name}\nN={record['rows_scored']:,}" for name, record in cases.items()],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("their time / time of moso_fast (right of 1: moso_fast is faster)")
    axes.set_title(
        f"Loss, alignment and self norm of every sample\n{subtitle(results)}", fontsize=9
    )
    handles = [axes.barh([0], [0], color=colours[label], label=label) for label in series]
    axes.legend(handles=handles, fontsize=7, loc="best")
    return figure


def _ratio(record: dict[str, Any], label: str) -> float | None:
    if label == "best plain PyTorch":
        return record["speedup"]
    if label == "best library":
        peers = [r["times_ours"] for r in record["rows"] if r["family"] == "peer" and r["seconds"]]
        return min(peers, default=None)
    name = next(name for name, shown in _SHOWN.items() if shown == label)
    row = find_row(record, name)
    return row["times_ours"] if row else None


def roofline(results: dict[str, Any]) -> Any:
    """FLOP/s over FLOPs a byte of the features, under the ceilings of the same run."""
    cases = {n: r for n, r in results["cases"].items() if r["floor_seconds"] and find_row(r)}
    cases = {n: r for n, r in cases.items() if r["dtype"] == "float32"}
    if not cases:
        return None
    figure, axes = new_axes(8, 5)
    read = max(record["ceilings"]["read_bytes"] for record in cases.values())
    flops = max(record["ceilings"]["flops"] for record in cases.values())
    low, high = 0.5, 3e5
    knee = flops / read
    axes.plot([low, knee, high], [low * read / 1e9, flops / 1e9, flops / 1e9], color="black")
    axes.annotate(f"reading {read / 1e9:.3g} GB/s", (low * 1.2, low * 1.5 * read / 1e9), fontsize=8)
    axes.annotate(
        f"products {flops / 1e9:.3g} GFLOP/s", (high / 200, flops * 1.06 / 1e9), fontsize=8
    )
    for position, (label, pick) in enumerate({OURS: find_row, "best plain": best_plain}.items()):
        points = []
        for record in cases.values():
            row = pick(record)
            if row:
                points.append((row["flops"] / row["read_bytes"], row["flops"] / 1e9))
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                color=COLOURS[position],
                marker=MARKERS[position],
                s=28,
                label=label,
                zorder=3,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs of the three products a byte of two reads of the features")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Roofline, float32 cases\n{subtitle(results)}", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def memory(results: dict[str, Any]) -> Any:
    """Peak memory beyond the inputs, by case: ours, best plain, per-sample gradients, libraries."""
    cases = {
        n: r for n, r in results["cases"].items() if (row := find_row(r)) and row["peak_bytes"]
    }
    if not cases:
        return None
    figure, axes = new_axes(8.5, 0.32 * len(cases) + 1.8)
    picks = {
        OURS: find_row,
        "best plain PyTorch": best_plain,
        "naive": lambda record: find_row(record, "naive"),
        "vmap(grad)": lambda record: find_row(record, "torch.func.vmap(grad)"),
        "leanest library": _leanest,
    }
    for position, (label, pick) in enumerate(picks.items()):
        at, values = [], []
        for index, record in enumerate(cases.values()):
            row = pick(record)
            if row and row["peak_bytes"]:
                at.append(index)
                values.append(row["peak_bytes"] / 2**20)
        if at:
            axes.scatter(
                values, at, color=COLOURS[position], marker=MARKERS[position], s=26, label=label
            )
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("peak MiB beyond inputs and results held before")
    axes.set_title(f"Peak memory, one process a measurement\n{subtitle(results)}", fontsize=9)
    axes.legend(fontsize=7)
    return figure


def _leanest(record: dict[str, Any]) -> dict[str, Any] | None:
    peers = [row for row in record["rows"] if row["family"] == "peer" and row["peak_bytes"]]
    return min(peers, key=lambda row: row["peak_bytes"], default=None)


def growth(results: dict[str, Any]) -> Any:
    """Time (top) and memory (bottom) against N, C, D and K, log axes, exponents in the legend."""
    sweeps = results.get("growth") or {}
    if not sweeps:
        return None
    figure = new_figure(3.2 * len(sweeps), 6)
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for column, axis in enumerate(a for a in AXES if a in sweeps):
        sweep = sweeps[axis]
        for row, (field, scale, unit) in enumerate(
            (("seconds", 1e3, "ms"), ("peak_bytes", 2.0**-20, "peak MiB"))
        ):
            axes = panels[row][column]
            for position, (name, entry) in enumerate(sweep["providers"].items()):
                pairs = [
                    (s, v * scale) for s, v in zip(sweep["sizes"], entry[field], strict=False) if v
                ]
                exponent = entry.get("time_exponent" if field == "seconds" else "memory_exponent")
                label = name if exponent is None else f"{name}: {axis}^{exponent:.2f}"
                if pairs:
                    axes.plot(
                        *zip(*pairs, strict=True),
                        color=COLOURS[position],
                        marker=MARKERS[position],
                        markersize=4,
                        label=label,
                    )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(axis)
            axes.set_ylabel(unit)
            axes.grid(True, alpha=0.25, linewidth=0.6)
            if axes.lines:  # memory may not have been measured
                axes.legend(fontsize=6, facecolor="white", edgecolor=GREY)
        fixed = ", ".join(f"{n}={s:,}" for n, s in sweep["fixed"].items())
        panels[0][column].set_title(fixed, fontsize=8)
    figure.suptitle(subtitle(results), fontsize=9)
    return figure
