"""One table a stage, and the lines behind all of them: aims, what failed, what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .record import Result
from .stages import Stage

# A column: its head, and what stands in it for a result's data and its row of aims.py (or {}).
Column = tuple[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]]


def _key(name: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    return lambda data, row: data.get(name)


def _worst(data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """Largest error of the last size, None where one is NaN."""
    sizes = [each for name, each in data.items() if name.startswith("errors at")]
    errors = list(sizes[-1].values()) if sizes else []
    return max(errors) if errors and None not in errors else None


def _of_predicted(data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """How many times what was predicted a call takes."""
    predicted = data.get("predicted_milliseconds")
    return data["milliseconds"] / predicted if predicted else None


def _predicted(index: int) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    return lambda data, row: (data.get("predicted_milliseconds") or (None, None))[index]


def _top(data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    kernels = data.get("kernels") or []
    return kernels[0]["kernel"][:40] if kernels else None


def _profiled(data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """Name the kernels that take longest, with memory, tensor cores and the first stall."""
    kernels = sorted(data.get("kernels") or [], key=lambda k: -(k.get("microseconds") or 0))
    return "; ".join(map(_profile_of, kernels[:3])) or None


def _profile_of(kernel: Mapping[str, Any]) -> str:
    us, dram, tensor = (
        _cell(kernel.get(name)) for name in ("microseconds", "dram_percent", "tensor_percent")
    )
    stall = (kernel.get("stalls") or [["?", 0]])[0][0]
    return f"{kernel['kernel'][:28]} {us} us, dram {dram}%, tensor {tensor}%, {stall}"


def _tiles(data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """Name the quickest tile of each search point."""
    found = []
    for key, lines in data.items():
        each = lines if isinstance(lines, list) else []
        timed = [t for t in each if isinstance(t, dict) and {"tile", "milliseconds"} <= t.keys()]
        if timed:
            best = min(timed, key=lambda t: t["milliseconds"])
            found.append(f"{key.split(',')[0]}: {best['tile'][:60]} {best['milliseconds']:.3g} ms")
    plans = data.get("plans") or []
    if plans:
        best = min(plans, key=lambda t: t["first_milliseconds"])
        found.append(f"{best['plan']}: {best['first_milliseconds']:.3g} ms")
    return "; ".join(found) or None


_COLUMNS: dict[str, tuple[Column, ...]] = {
    "smoke": (("largest error", _worst),),
    "ceilings": tuple((n, _key(n)) for n in ("read", "copy", "medium", "high", "highest")),
    "kernels": (
        ("first ms", _key("first_milliseconds")),
        ("predicted", _predicted(0)),
        ("second ms", _key("second_milliseconds")),
        ("predicted", _predicted(1)),
        ("graph ms", _key("graph_milliseconds")),
        ("error", _key("relative_error")),
        ("longest kernel", _top),
        ("quickest tiles", _tiles),
    ),
    "profile": (("kernels", _profiled),),
    "calls": (
        ("ms", _key("milliseconds")),
        ("predicted", _key("predicted_milliseconds")),
        ("x pred.", _of_predicted),
        ("% floor", lambda data, row: row.get("percent_of_floor")),
        ("x eager", lambda data, row: _of_plain(row, "eager")),
        ("host ms", _key("host_milliseconds")),
        ("graph ms", _key("graph_milliseconds")),
        ("predicted", _key("predicted_graph_milliseconds")),
        ("peak MiB", lambda data, row: _mib(data.get("peak_bytes"))),
        ("J", _key("joules")),
        ("error", _key("relative_error")),
    ),
    "tests": (("tests", _key("tests")), ("skipped", _key("skipped"))),
    "compile": (
        ("ms", _key("milliseconds")),
        ("% floor", lambda data, row: row.get("percent_of_floor")),
        ("peak MiB", lambda data, row: _mib(data.get("peak_bytes"))),
        ("error", _key("relative_error")),
    ),
    "sanitizer": (("tests", _key("tests")),),
    "network": (
        ("ms a sample", lambda data, row: (data.get("milliseconds_a_sample") or {}).get("ours")),
        ("x loop", _key("times_loop")),
        ("whole setting, min", _key("setting_minutes")),
        ("loop, min", _key("setting_minutes_of_loop")),
    ),
    "pruning": (("Spearman with CPU", _key("spearman_with_cpu")), ("seconds", _key("seconds"))),
}


def _of_plain(row: Mapping[str, Any], name: str) -> float | None:
    """Ratio to plain PyTorch at the precision of the row."""
    words = {"highest": "fp32", "high": "tf32", "medium": "bf16"}
    found = row.get("times", {}).get(f"{name} {words.get(row.get('precision', ''), '')}")
    return None if found is None else float(found)


def _mib(value: float | None) -> float | None:
    return None if value is None else value / 2**20


def table(stage: Stage, results: Sequence[Result], rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of a stage's table; ``rows`` by unit, from aims.py."""
    columns = _COLUMNS[stage.name]
    used = [
        (head, value)
        for head, value in columns
        if any(value(r.data, rows.get(r.unit, {})) is not None for r in results if r.done)
    ]
    cells = [["", *(head for head, _ in used), "s"]]
    notes = {}
    for result in results:
        name = result.unit.removeprefix(f"{stage.name} ")
        if not result.done:
            notes[len(cells)] = f"{result.outcome}: {result.why}"
            cells.append([name])
            continue
        row = rows.get(result.unit, {})
        values = [_cell(value(result.data, row)) for _, value in used]
        cells.append([name, *values, f"{result.seconds:.1f}"])
    widths = [
        max((len(line[i]) for line in cells if len(line) > i), default=0)
        for i in range(len(used) + 2)
    ]
    lines = [f"--- {stage.name}: {stage.title}"]
    for number, line in enumerate(cells):
        padded = [line[0].ljust(widths[0])]
        padded += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=False)]
        lines.append("  ".join([*padded, notes[number]] if number in notes else padded).rstrip())
    return lines


def _cell(value: Any) -> str:
    """Four digits of a number, any text as it is."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def aim_lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line an aim."""
    lines = []
    for aim in found:
        value = "not measured" if aim["found"] is None else f"{aim['found']:.3g}"
        verdict = "" if aim["met"] is None else f", {'met' if aim['met'] else 'MISSED'}"
        who = f" ({aim['contender']})" if aim["contender"] else ""
        lines.append(f"aim {aim['row']}: {aim['what']} {aim['asked']:g}: {value}{who}{verdict}")
    return lines
