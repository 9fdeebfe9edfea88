"""Writes the README's benchmark block from committed results, and checks numbers in the docs.

    python benches/readme.py            # rewrite the block
    python benches/readme.py --check    # exit code 1 where README or docs disagree with the files

The block between the two `benchmarks` comments is made from RESULTS whole. Elsewhere a number is
tied to its source by a comment behind it::

    a call costs 0.55<!-- benches/results/x/full.json /cases/few-rows/rows/0/seconds *1000 --> ms

which holds where the JSON pointer, times the factor, rounds to the number at its digits. A number
that reads like a measurement must stand in a paragraph that names a results file; RECORD is exempt.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benches/results/amd-epyc-2-cpus/full.json"
SECOND = "benches/results/amd-epyc-2-cpus/second/full.json"
# The record of what was measured while tuning: builds that no longer exist, and no file of results.
RECORD = "docs/tuning-notes.md"
BEGIN = "<!-- benchmarks: written by `python benches/readme.py` -->"
END = "<!-- /benchmarks -->"

# Why moso_fast is not the fastest in a case; a case that needs a sentence here and has none fails.
_CALL = "few rows: what a call (`few-rows`) and a head cost by themselves is not paid back"
BEHIND: dict[str, str] = {
    "c1000-d2048": "products this large are where `torch.mm` is at its best, and the sixteen "
    "registers of AVX2 hold a small tile; with AVX-512 ours was ahead",
    "vocab-50257": "the register tiles reach little more than half of the share of the floor "
    "that they reach at 1,000 classes; why is not understood yet",
    "few-rows": "every argument and the result are checked, and six statistics made where three "
    "are compared",
    "grads-c100-d512": _CALL,
    "grads-c100-d2048": _CALL,
    "grads-c1000-d512": _CALL,
    "grads-sequences": _CALL,
    "network-cnn": "the gradients of all samples fit memory for a network this small, and serve "
    "the mean and the products alike; ours keeps none and goes over the data twice",
}

_TIED = re.compile(
    r"(?P<number>[\d,]+(?:\.\d+)?)<!-- (?P<file>\S+\.json) (?P<pointer>/\S+)"
    r"(?: \*(?P<factor>[\d.e+-]+))? -->"
)
# What reads like a measurement in prose: it must stand in a paragraph that names a results file.
_MEASURED = re.compile(
    r"\d\s?(?:ms|GFLOP/s|TFLOP/s|GB/s|MiB|GiB)\b|\d(?:\.\d+)?\s?(?:times as fast|x faster)"
)


def block(results: dict[str, Any], second: dict[str, Any] | None) -> str:
    """Return the Markdown between the two comments, without them."""
    cases = {n: r for n, r in results["cases"].items() if r["speedup"]}
    ahead = {n: r for n, r in cases.items() if _slowest_ratio(r) >= 1}
    first = next(iter(results["cases"].values()))
    folder = Path(RESULTS).parent
    speedups = sorted(record["speedup"] for record in ahead.values())
    machine = results["machine"]
    lines = [
        f"![Time of plain PyTorch over time of moso_fast, case by case]({folder}/full_speed.png)",
        "",
        f"Loss, alignment and self norm of every sample on {machine['threads']} cores of an "
        f"{machine['processor']} with torch {first['measured']['torch']}: in {len(ahead)} of "
        f"{len(cases)} cases faster than everything measured beside it, {speedups[0]:.1f} to "
        f"{speedups[-1]:.1f} times as fast as the best plain PyTorch that builds no per-sample "
        "gradient either (closed form whole, in chunks of four sizes, compiled, through oneDNN; "
        "`torch.func.jvp`; `F.linear_cross_entropy`).",
    ]
    behind = [n for n in cases if n not in ahead]
    if behind:
        lines += ["Where it is not the fastest:", ""]
        lines += [
            f"- `{name}` ({_slowest_ratio(cases[name]):.2f}): {_why(name)}" for name in behind
        ]
    lines += ["", *_table(results), "", *_conditions(results, second)]
    return "\n".join(lines)


def _slowest_ratio(record: dict[str, Any]) -> float:
    """Their time over ours for the fastest opponent of any kind at equal precision."""
    return min(
        row["times_ours"]
        for row in record["rows"]
        if row["family"] != "ours" and row["seconds"] and not row["note"].startswith("products")
        and "no norms" not in row["note"]
    )  # fmt: skip


def _why(name: str) -> str:
    if name not in BEHIND:
        raise SystemExit(f"benches/readme.py: say in BEHIND why {name} is not the fastest")
    return BEHIND[name]


def _table(results: dict[str, Any]) -> list[str]:
    head = ["case", "N", "ms", "best plain PyTorch", "ratio", "jvp", "vmap(grad)", "best library",
            "% of floor", "peak MiB (theirs)", "error"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, record in results["cases"].items():
        rows = {row["provider"]: row for row in record["rows"]}
        ours, plain = rows["moso_fast"], rows.get(record["best_plain"] or "")
        cells = [
            f"`{name}`",
            f"{record['rows_scored']:,}",
            f"{1e3 * ours['seconds']:.3g}",
            record["best_plain"] or "",
            _show(record["speedup"], ".2f"),
            _times(rows.get("torch.func.jvp")),
            _times(rows.get("torch.func.vmap(grad)")),
            _library(record),
            _show(ours.get("percent_of_floor"), ".0f"),
            _mib(ours) + (f" ({_mib(plain)})" if plain else ""),
            f"{max(ours['errors'].values()):.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _conditions(results: dict[str, Any], second: dict[str, Any] | None) -> list[str]:
    records = results["cases"].values()
    commits = sorted({str(r["measured"]["commit"])[:12] for r in records})
    reads = [r["ceilings"]["read_bytes"] / 1e9 for r in records]
    rates = [r["ceilings"]["flops"] / 1e9 for r in records]
    slow = [r["ceilings"]["mm_flops"] / 1e9 for r in records]
    versions: dict[str, str] = {}
    for record in records:
        versions.update(record["measured"]["libraries"])
    libraries = ", ".join(f"{n} {v}" for n, v in versions.items() if n != "triton")
    lines = [
        f"Numbers: [{RESULTS}]({RESULTS}) (all providers, quartiles, memory of each), made by "
        f"`python -m benches run --profile full --against peers` at {', '.join(commits)}; medians "
        "of interleaved runs in one process; every result compared with float64 first, a wrong one "
        "gets no number. ms, error and memory are those of moso_fast (memory beyond the inputs, "
        "in a process of its own, in parentheses that of the best plain PyTorch); the other "
        "columns are times over ours. jvp, libraries and `vmap(grad)` compute less than the three "
        f"quantities or more than they need; each note is in the file. Libraries: {libraries}.",
        "",
        f"Floor: two passes at the ceilings of the same run, reading {min(reads):.0f} to "
        f"{max(reads):.0f} GB/s and float32 products at {min(rates):.0f} to {max(rates):.0f} "
        f"GFLOP/s through oneDNN. `torch.mm`, which the chunked and compiled forms use, reaches "
        f"{min(slow):.0f} to {max(slow):.0f} GFLOP/s on this processor: expect less gain where it "
        "does better.",
    ]
    if second is not None:
        from benches.compare import compare, verdict

        text = verdict(compare(results, second))[1]
        lines += ["", f"A second run ([{SECOND}]({SECOND})): {text}."]
    return lines


def _library(record: dict[str, Any]) -> str:
    peers = [r for r in record["rows"] if r["family"] == "peer" and r["seconds"]]
    best = min(peers, key=lambda row: row["seconds"], default=None)
    return f"{best['times_ours']:.3g} ({best['provider']})" if best else ""


def _times(row: dict[str, Any] | None) -> str:
    return f"{row['times_ours']:.3g}" if row and row["seconds"] else ""


def _mib(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:.3g}" if row["peak_bytes"] else "-"


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def rewritten(text: str, root: Path = ROOT) -> str:
    """Return the README with its block made anew; SystemExit where it has no block."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md must hold {BEGIN} and {END} once each")
    second = root / SECOND
    made = block(
        json.loads((root / RESULTS).read_text(encoding="utf-8")),
        json.loads(second.read_text(encoding="utf-8")) if second.exists() else None,
    )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def number_errors(text: str, root: Path = ROOT, *, record: bool = False) -> list[str]:
    """Return what is wrong with the tied numbers of a text, and measurements with no source.

    ``record``: the text is RECORD, whose measurements need no source.
    """
    errors = []
    for match in _TIED.finditer(text):
        value: Any = json.loads((root / match["file"]).read_text(encoding="utf-8"))
        try:
            for key in match["pointer"].strip("/").split("/"):
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError):
            errors.append(f"{match['file']} has nothing at {match['pointer']}")
            continue
        found = Decimal(match["number"].replace(",", ""))
        exact = Decimal(repr(float(value) * float(match["factor"] or 1)))
        if exact.quantize(found) != found:
            errors.append(f"{found} is {exact} in {match['file']} at {match['pointer']}")
    prose = "" if record else re.sub(r"```.*?```", "", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        found_number = _MEASURED.search(paragraph)
        if found_number and "benches/results/" not in paragraph:
            errors.append(
                f"{found_number[0]!r} stands in a paragraph that names no results file: "
                f"{paragraph.strip()[:80]!r}"
            )
    return errors


def pages(root: Path = ROOT) -> list[Path]:
    """Return the texts that users read."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main() -> int:
    """Rewrite or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = rewritten(text)
    errors = [] if made == text or not options.check else ["README.md: the block is out of date"]
    if not options.check:
        readme.write_text(made, encoding="utf-8")
    for page in pages():
        content = made if page == readme else page.read_text(encoding="utf-8")
        found = page_errors(page, content)
        errors += [f"{page.relative_to(ROOT)}: {error}" for error in found]
    print("\n".join(errors) or "README and docs agree with the results")
    return 1 if errors else 0


def page_errors(page: Path, text: str) -> list[str]:
    """Return what is wrong with the numbers of a page, less its generated block."""
    return number_errors(_outside(text), record=page == ROOT / RECORD)


def _outside(text: str) -> str:
    """Return a text without its generated block."""
    if BEGIN not in text:
        return text
    return text.split(BEGIN)[0] + text.split(END)[1]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
