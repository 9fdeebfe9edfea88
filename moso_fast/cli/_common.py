"""Options and output that the commands share."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from ..tables.table import ScoreTable

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")]
TableFile = Annotated[
    Path | None,
    typer.Argument(
        help="Score table: .parquet, .csv or .npz.", metavar="SCORES", show_default=False
    ),
]
ScoresFile = Annotated[
    Path | None,
    typer.Option("--scores", help="The score table, in place of the argument.", metavar="FILE"),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Classes of the whole data set: .npy or .safetensors[:NAME].", metavar="FILE"
    ),
]


def load_table(argument: Path | None, option: Path | None, command: str) -> ScoreTable:
    """Read the table that was given as the argument or as ``--scores``; warnings go to stderr.

    Raises
    ------
    ValueError
        Neither or both were given; no score table.
    """
    from ..tables.table import ScoreTable

    path = argument if option is None else option
    if path is None:
        raise ValueError(f"give the score table: moso-fast {command} SCORES ...")
    if argument is not None and option is not None:
        raise ValueError(f"give the score table once: got {argument} and --scores {option}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = ScoreTable.load(path)
    for warning in caught:
        print(f"moso-fast: warning: {warning.message}", file=sys.stderr)
    return table


def emit(result: Mapping[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Print ``result`` as JSON, or as aligned lines, or not at all."""
    if as_json:
        print(json.dumps(jsonable(result), allow_nan=False))
    elif not quiet:
        print_pairs({name.replace("_", " "): value for name, value in result.items()})


def jsonable(value: Any) -> Any:
    """Copy of ``value`` in JSON's types; numbers that JSON lacks become null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values in two aligned columns."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        print(f"{name.ljust(width)}  {_show(value)}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: drawn by rich on a terminal, aligned plain text elsewhere."""
    cells = [[_show(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for row in cells:
            table.add_row(*row)
        Console(markup=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [list(columns), *cells]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


@contextmanager
def caption_bar(
    caption: str, total: int | None, *, shown: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Bar on stderr, where that is a terminal: yields "show this caption" and "one more done"."""
    if not shown or not sys.stderr.isatty():
        yield (lambda _: None), (lambda: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(caption, total=total)
        yield (
            lambda text: bar.update(task, description=text),
            lambda: bar.update(task, advance=1),
        )


def labels_of(path: str, index: Tensor) -> Tensor:
    """Labels of the rows of a table with these data-set indices.

    Raises
    ------
    ValueError
        The file covers fewer samples than the table refers to.
    """
    from ..sources.arrays import read_labels

    return rows_of(read_labels(path), index, path, "labels")


def rows_of(values: Tensor, index: Tensor, path: str, what: str) -> Tensor:
    """Entries of a whole data set's ``values`` for the rows of a table."""
    needed = int(index.max()) + 1 if index.numel() else 0
    if values.dim() == 0 or values.shape[0] < needed:
        found = values.shape[0] if values.dim() else "a single number"
        raise ValueError(
            f"{path} must hold {what} of the whole data set: the scores refer to index "
            f"{needed - 1}, the file has {found}"
        )
    return values[index]


def describe(scores: Tensor) -> dict[str, Any]:
    """Count, lowest, median and highest of the scores that are not NaN."""
    found = scores[~scores.isnan()]
    facts: dict[str, Any] = {"scored": found.numel(), "unscored": scores.numel() - found.numel()}
    if found.numel():
        low, middle, high = float(found.min()), float(found.median()), float(found.max())
        facts["score"] = {"min": low, "median": middle, "max": high}
    return facts


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(entry) for entry in value)
    return "none" if value is None else str(value)
