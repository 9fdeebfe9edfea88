"""Options, the table at the end, and the JSON of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moso_fast.bench.facts import conditions, machine

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--save-results``."""
    parser.addoption("--save-results", metavar="FILE.json", help="write the rows of the table here")


def pytest_configure(config: pytest.Config) -> None:
    """Start with no rows."""
    config.stash[ROWS] = []


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Any:
    """Append one row (a flat dict) to the table of this run."""
    return request.config.stash[ROWS].append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the rows as a table, and write them where asked."""
    rows = config.stash[ROWS]
    if not rows:
        return
    facts = {**machine(), **conditions()}
    write = terminalreporter.write_line
    write("")
    write("  ".join(f"{name}={value}" for name, value in facts.items()))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        write("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    path = config.getoption("--save-results")
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
