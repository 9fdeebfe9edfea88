"""The table of layouts that are tested: what scoring does with each head, output, order and label.

    python tools/layouts_table.py > docs/layouts.md

Made of the very lists that tests/test_layouts.py and tests/test_layouts_models.py run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from layouts import NOT_TRIED, Layout
from layouts_models import LAYOUTS as MODELS
from layouts_torch import LAYOUTS as PLAIN


def outcome(wanted: str | None, tolerance: float) -> str:
    """Return what happens, as a cell of the table."""
    if wanted is None:
        return f"right to {tolerance:g}"
    return "not tried" if wanted == NOT_TRIED else f"refused: *... {wanted} ...*"


def rows(layouts: list[Layout]) -> list[str]:
    """Return lines of Markdown, one a layout."""
    return [
        f"| {one.library} | {one.name} | {outcome(one.last, one.tolerance)} "
        f"| {outcome(one.full, one.tolerance)} |"
        for one in layouts
    ]


def main() -> None:
    """Print the table."""
    print("# Layouts that are tested\n")
    print(
        "Each is scored at up to three checkpoints and held against autograd of the model's own "
        "loss, one sample at a time, in float64: the largest error relative to the largest score. "
        "What cannot be scored right is refused by an error of one line.\n"
    )
    print("| library | layout | `gradient='last_layer'` | `gradient='full'` |")
    print("|---|---|---|---|")
    print("\n".join(rows(PLAIN) + rows(MODELS)))


if __name__ == "__main__":
    main()
