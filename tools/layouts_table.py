"""The table of layouts that are tested: what scoring does with each head, output, order and label.

    python tools/layouts_table.py            # writes docs/layouts.md
    python tools/layouts_table.py --check    # exit code 1 where the page is not what this makes

Made of the very lists that test_layouts.py and test_layouts_models.py in tests/scoring run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from layouts import NOT_TRIED, Layout
from layouts_models import LAYOUTS as MODELS
from layouts_torch import LAYOUTS as PLAIN

PAGE = Path(__file__).resolve().parents[1] / "docs" / "layouts.md"


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


def page() -> str:
    """Return the page."""
    return "\n".join(
        [
            "# Layouts that are tested",
            "",
            "Models, heads, what lies behind them, orders of rows and kinds of labels, and what "
            "scoring does with each. Every one is scored at up to three checkpoints and held "
            "against autograd of the model's own loss, one sample at a time, in float64; the limit "
            "is relative to the largest score. What cannot be scored right is refused by an error "
            "of one line, part of which is shown.",
            "",
            "`python tools/layouts_table.py` makes this page of the lists that `pytest "
            "tests/scoring/test_layouts.py` and, with the extra `models`, `pytest -m models` run.",
            "",
            "| library | layout | `gradient='last_layer'` | `gradient='full'` |",
            "|---|---|---|---|",
            *rows(PLAIN),
            *rows(MODELS),
            "",
        ]
    )


def main() -> int:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE} is {'current' if same else 'not what python tools/layouts_table.py makes'}")
        return 0 if same else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
