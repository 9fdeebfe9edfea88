"""What a table file holds, before a ScoreTable is made of it, and the errors of such files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DIRECTION = "higher_is_better"  # no metric can have this name
# How pandas names a column that had no name: written, read back, and from parquet files.
NAMELESS = re.compile(r"|Unnamed: \d+(\.\d+)?|__index_level_\d+__")

Columns = dict[str, npt.NDArray[Any]]


@dataclass
class Content:
    """What a file holds: columns, the JSON text that describes them, what was left out and why."""

    columns: Columns
    text: str | None
    notes: list[str] = field(default_factory=list)


@dataclass
class Stored:
    """The parts of a table as arrays, whatever its file looks like.

    ``scores`` and ``index`` (N,), ``metrics`` name -> (N,), ``per_checkpoint`` name -> (K, N);
    ``notes`` say what a reader of the file should know.
    """

    scores: npt.NDArray[Any]
    index: npt.NDArray[Any]
    metrics: Columns
    per_checkpoint: Columns
    higher_is_better: bool
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_columns(
        cls, path: Path, columns: Columns, direction: bool, provenance: dict[str, Any]
    ) -> Stored:
        """Sort the ``columns`` of a file by what they are.

        Raises
        ------
        ValueError
            A column ``name@...`` without a number, or a checkpoint's column that is missing.
        """
        metrics: Columns = {}
        checkpoints: dict[str, dict[int, npt.NDArray[Any]]] = {}
        for name, values in columns.items():
            if name in ("index", "score"):
                continue
            base, mark, number = name.partition("@")
            if not mark:
                metrics[name] = values
            elif number.isdecimal():
                checkpoints.setdefault(base, {})[int(number)] = values
            else:
                raise not_a_table(path, f"the column {name!r} is unknown")
        for base, rows in checkpoints.items():
            if sorted(rows) != list(range(len(rows))):
                raise not_a_table(path, f"a column of {base}@0 .. {base}@{max(rows)} is missing")
        return cls(
            scores=columns["score"],
            index=columns["index"],
            metrics=metrics,
            per_checkpoint={
                base: np.stack([rows[k] for k in range(len(rows))])
                for base, rows in checkpoints.items()
            },
            higher_is_better=direction,
            provenance=provenance,
        )

    def columns(self, with_direction: bool) -> Columns:
        """Return the columns of a file; ``with_direction``: also the one of the direction."""
        columns: Columns = {"index": self.index, "score": self.scores, **self.metrics}
        if with_direction:
            columns[DIRECTION] = np.full(len(self.scores), self.higher_is_better, dtype=np.bool_)
        for name, values in self.per_checkpoint.items():
            columns |= {f"{name}@{k}": row for k, row in enumerate(values)}
        return columns


def check_names(path: Path, names: list[str], nameless: Sequence[str] = (), why: str = "") -> None:
    """Raise unless ``names`` hold what a table needs, each once; ``nameless`` were left out.

    ``why`` begins the message where something is missing.
    """
    for name in ("index", "score"):
        if name not in names:
            hint = ""
            if name == "index" and nameless:
                hint = (
                    f"; the column {nameless[0]!r} counts rows of pandas: if it holds the "
                    "data-set indices, give it the name 'index'"
                )
            raise not_a_table(path, f"{why}the column {name!r} is missing{hint}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise not_a_table(path, f"a column stands there twice: {twice[0]!r}")


def not_a_table(path: Path, reason: str) -> ValueError:
    """Return the error for a file that can be read and is no score table."""
    return ValueError(f"{path} is not a score table: {reason}")


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is not a score table, or is damaged: {reason}")
