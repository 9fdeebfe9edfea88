"""Options, the table at the end, and the JSON of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import moso_fast

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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine_facts() -> dict[str, Any]:
    """Return what a number needs beside it: machine, versions, commit."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": moso_fast.backends()["cpu"].reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moso_fast": moso_fast.__version__,
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the rows as a table, and write them where asked."""
    rows = config.stash[ROWS]
    if not rows:
        return
    facts = machine_facts()
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
