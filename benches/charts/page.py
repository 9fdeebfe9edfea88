"""Draw the charts of a results file, and write a page: conditions, charts inline, a table a case.

    python -m benches page benches/results/MACHINE/full.json

The page is one HTML file that needs no other. Without matplotlib it has no charts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moso_fast.bench import store
from moso_fast.cli.bench_output import emit
from moso_fast.util.files import atomic_path

from ..arguments import bad_input, parser
from .figures import draw_all, subtitle

__all__ = ["draw", "write_page"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, td:last-child { text-align: left; }
tr.ours { background: #eef5fb; font-weight: 600; }
img { max-width: 100%; }
.quiet { color: #666; }
"""
_HEAD = ("provider", "ms", "quartiles", "x ours", "% of floor", "peak MiB", "error", "notes")


def main(arguments: Sequence[str]) -> int:
    """Draw one file and say what was written."""
    made = parser("page", __doc__)
    made.add_argument("results", type=Path, metavar="RESULTS.json")
    options = made.parse_args(arguments)
    with bad_input():
        store.load(options.results)
    emit({"wrote": draw(options.results)}, as_json=options.json, quiet=options.quiet)
    return 0


def draw(path: Path) -> list[str]:
    """Write charts and page beside a results file; return the paths."""
    results = store.load(path)
    drawable = find_spec("matplotlib") is not None
    charts = draw_all(results, path.parent) if drawable else []
    html = write_page(results, charts, path.with_suffix(".html"))
    return [str(written) for written in (*charts, html)]


def write_page(results: dict[str, Any], charts: list[Path], path: Path) -> Path:
    """Write the page; charts are embedded, so that one file can be sent around."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>moso_fast benchmarks</title><style>{_STYLE}</style>",
        "<h1>moso_fast benchmarks</h1>",
        f"<p>{escape(subtitle(results))}; profile {escape(results['profile'])}.</p>",
        "<p>Medians of interleaved runs in one process. Every result was compared with float64 "
        "first; a wrong one has no number. Times over ours above 1 mean that moso_fast is faster. "
        "The floor is what the ceilings measured in the same run allow; peak memory is that of a "
        "process of its own, beyond the inputs.</p>",
    ]
    for chart in charts:
        data = base64.b64encode(chart.read_bytes()).decode()
        parts.append(f"<p><img alt='{escape(chart.stem)}' src='data:image/png;base64,{data}'></p>")
    parts += [_case(name, record) for name, record in results["cases"].items()]
    parts.append("</html>")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def _case(name: str, record: dict[str, Any]) -> str:
    sizes = f"N={record['rows_scored']:,}, C={record['classes']:,}, D={record['dim']:,}"
    if record["heads"] > 1:
        sizes += f", K={record['heads']}"
    measured = record["measured"]
    roof = record["ceilings"]
    conditions = (
        f"{measured['date']}, commit {str(measured['commit'])[:12]}, reading "
        f"{roof['read_bytes'] / 1e9:.3g} GB/s, products {roof['flops'] / 1e9:.4g} GFLOP/s"
    )
    lines = [
        f"<h2>{escape(name)}</h2><p>{escape(record['title'])}: {sizes}, {record['dtype']}.",
        f"<span class='quiet'>{escape(conditions)}</span></p>",
        "<table><tr>" + "".join(f"<th>{escape(word)}</th>" for word in _HEAD) + "</tr>",
    ]
    ordered = sorted(record["rows"], key=lambda row: row["seconds"] or float("inf"))
    lines += [_row(row) for row in ordered]
    lines.append("</table>")
    if record["skipped"]:
        skipped = "; ".join(f"{s['provider']} ({s['why']})" for s in record["skipped"])
        lines.append(f"<p class='quiet'>Skipped: {escape(skipped)}</p>")
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    spread = ""
    if seconds and row["rounds"] > 1:
        low, high = row["quartiles"]
        spread = f"{1e3 * low:.4g} to {1e3 * high:.4g}"
    notes = [row["problem"] or "", row["note"]]
    if seconds and row["rounds"] == 1:
        notes.append("one call")
    errors = [e for e in row["errors"].values() if e is not None]
    cells = (
        row["provider"],
        f"{1e3 * seconds:.4g}" if seconds else "no number",
        spread,
        _number(row.get("times_ours"), ".3g"),
        _number(row.get("percent_of_floor"), ".3g"),
        _number(row["peak_bytes"] and row["peak_bytes"] / 2**20, ",.4g"),
        _number(max(errors, default=None), ".1e"),
        "; ".join(filter(None, notes)),
    )
    kind = " class='ours'" if row["family"] == "ours" else ""
    return f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
