"""ScoreTable: scores of a data set with their metrics, checkpoints and origin, and its files.

One row a sample. Columns of the files: ``index``, ``score``, the metrics by name, the direction as
``higher_is_better`` (1 or 0 in every row; not in .npz), and the values per checkpoint as
``name@k``. Parquet keeps the origin in its schema, .npz in the entry ``@meta``, .csv in
``<name>.csv.meta.json`` beside it. Files that pandas, polars or a spreadsheet wrote anew load too,
without an origin.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..util.array_like import as_tensor
from . import files
from .content import DIRECTION, Stored, not_a_table

METRICS = (
    "alignment",
    "grad_sqnorm",
    "loss",
    "el2n",
    "margin",
    "entropy",
    "grand",
    "self_influence",
)


@dataclass(eq=False)
class ScoreTable:
    """Scores of N samples; high = informative = keep where ``higher_is_better``.

    Values may be tensors, arrays, columns of pandas or lists; all but tensors are copied.

    Parameters
    ----------
    scores
        (N,) float32 or float64; NaN for a sample that was not scored.
    metrics
        Name -> (N,): means over checkpoints (alignment, grad_sqnorm, loss, el2n, margin, entropy,
        grand, self_influence). Likely label errors have a low score or margin, and a high
        self_influence, el2n or loss.
    per_checkpoint
        Name -> (K, N).
    index
        (N,) int64 data-set indices of the rows; None = 0 .. N-1.
    higher_is_better
        False where a low score means keep.
    provenance
        JSON-able facts: versions, backend, formula, checkpoints, data-set length, seed.

    Raises
    ------
    ValueError
        Shapes that disagree, a repeated or negative index, a name with "@" or ",".
    TypeError
        Values that are not float32 or float64.
    """

    scores: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_checkpoint: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor = None  # type: ignore[assignment]  # filled in below
    higher_is_better: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = _floats("scores", self.scores, 1)
        rows = self.scores.shape[0]
        if self.index is None:
            self.index = torch.arange(rows, device="cpu")
        self.index = _own("index", self.index)
        if self.index.shape != (rows,):
            raise ValueError(
                f"index must have shape ({rows},), as scores; got {tuple(self.index.shape)}"
            )
        real_or_complex = self.index.is_floating_point() or self.index.is_complex()
        if real_or_complex or self.index.dtype == torch.bool:
            raise TypeError(f"index must hold integers, got {self.index.dtype}")
        self.index = self.index.detach().cpu().long()
        if rows and int(self.index.min()) < 0:
            raise ValueError(f"index must not be negative; got {int(self.index.min())}")
        _check_unique(self.index)
        self.metrics = {
            name: self._column("metrics", name, values, 1) for name, values in self.metrics.items()
        }
        self.per_checkpoint = {
            name: self._column("per_checkpoint", name, values, 2)
            for name, values in self.per_checkpoint.items()
        }

    def _column(self, kind: str, name: str, values: Tensor, rank: int) -> Tensor:
        reserved = kind == "metrics" and name in ("index", "score", DIRECTION)
        if not name or reserved or any(mark in name for mark in '@,/"\n\r'):
            raise ValueError(f"{kind} cannot have the name {name!r}")
        values = _floats(f"{kind}[{name!r}]", values, rank)
        if values.shape[-1] != self.scores.shape[0]:
            raise ValueError(
                f"{kind}[{name!r}] must have {self.scores.shape[0]} values a row, as scores; "
                f"got shape {tuple(values.shape)}"
            )
        return values

    def __len__(self) -> int:
        return self.scores.shape[0]

    def __repr__(self) -> str:
        unscored = int(self.scores.isnan().sum())
        depths = {values.shape[0] for values in self.per_checkpoint.values()}
        depth = f", {max(depths)} checkpoints" if depths else ""
        return (
            f"ScoreTable({len(self)} samples, {unscored} without a score{depth}, "
            f"metrics: {', '.join(self.metrics) or 'none'})"
        )

    def column(self, name: str) -> Tensor:
        """Return (N,) values by column name: ``"score"`` or a metric.

        Raises
        ------
        ValueError
            No such column; the message lists those there are.
        """
        columns = {"score": self.scores, **self.metrics}
        if name not in columns:
            raise ValueError(f"the table has no column {name!r}; it has {', '.join(columns)}")
        return columns[name]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to ``path`` (.parquet, .csv or .npz), whole or not at all.

        Every value comes back bitwise, NaN as NaN. An existing file is replaced. The direction
        stands in the file itself, so that a .csv keeps it without the file beside it.

        Raises
        ------
        ValueError
            Another suffix.
        TypeError
            Provenance that JSON cannot hold.
        OSError
            The folder does not exist or cannot be written.
        ModuleNotFoundError
            .parquet without pyarrow (``pip install "moso-fast[table]"``).
        """
        stored = Stored(
            scores=self.scores.numpy(),
            index=self.index.numpy(),
            metrics={name: values.numpy() for name, values in self.metrics.items()},
            per_checkpoint={name: values.numpy() for name, values in self.per_checkpoint.items()},
            higher_is_better=self.higher_is_better,
            provenance=self.provenance,
        )
        return files.save(stored, Path(path))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, higher_is_better: bool | None = None
    ) -> ScoreTable:
        """Read a table that :meth:`save` wrote, or what another program made of it.

        That may have sorted or left out rows, changed the order of the columns, or added one that
        counts rows (without a name, ignored); a .csv may have a byte-order mark, ``;`` or tabs
        between its cells, decimal commas (where nothing else can be meant) and empty cells, which
        are NaN. Columns of text are left out, with a warning. A .csv without the file beside it
        is read as float32 unless that would lose digits.

        Parameters
        ----------
        path
            A .parquet, .csv or .npz file.
        higher_is_better
            The direction of a file that does not say its own; None = True, with a warning.

        Raises
        ------
        ValueError
            Another suffix, a damaged file, a file that is no score table or can be read in two
            ways, an index that is repeated, missing or not whole, and a direction that differs
            between rows, description and ``higher_is_better``.
        FileNotFoundError
            No such file.
        ModuleNotFoundError
            .parquet without pyarrow (``pip install "moso-fast[table]"``).
        """
        path = Path(path)
        stored = files.load(path, higher_is_better)
        try:
            table = ScoreTable(
                scores=torch.from_numpy(stored.scores),
                metrics={n: torch.from_numpy(values) for n, values in stored.metrics.items()},
                per_checkpoint={
                    n: torch.from_numpy(values) for n, values in stored.per_checkpoint.items()
                },
                index=torch.from_numpy(stored.index),
                higher_is_better=stored.higher_is_better,
                provenance=stored.provenance,
            )
        except (ValueError, TypeError) as error:
            raise not_a_table(path, str(error)) from error
        for note in stored.notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        return table

    @classmethod
    def concat(cls, tables: Sequence[ScoreTable]) -> ScoreTable:
        """One table over disjoint indices, sorted by index: parts scored by different surrogates.

        Metrics that every table has are kept, and values per checkpoint where all have equally
        many. Facts of the origin that agree stay at the top; those that differ go to ``parts``,
        one entry a table.

        Raises
        ------
        ValueError
            No table, an index in two tables, or tables of opposite direction.
        """
        tables = list(tables)
        if not tables:
            raise ValueError("tables must hold at least one ScoreTable; got none")
        directions = {table.higher_is_better for table in tables}
        if len(directions) > 1:
            raise ValueError("tables disagree in higher_is_better; concat needs one direction")
        index, order = torch.cat([table.index for table in tables]).sort()
        _check_unique(index)
        metrics = [n for n in tables[0].metrics if all(n in t.metrics for t in tables)]
        depth = {
            name: {t.per_checkpoint[name].shape[0] for t in tables if name in t.per_checkpoint}
            for name in tables[0].per_checkpoint
            if all(name in t.per_checkpoint for t in tables)
        }
        return cls(
            scores=torch.cat([table.scores for table in tables])[order],
            metrics={n: torch.cat([t.metrics[n] for t in tables])[order] for n in metrics},
            per_checkpoint={
                name: torch.cat([t.per_checkpoint[name] for t in tables], 1)[:, order]
                for name, depths in depth.items()
                if len(depths) == 1
            },
            index=index,
            higher_is_better=directions.pop(),
            provenance=_merge([table.provenance for table in tables]),
        )


def _own(name: str, values: Any) -> Tensor:
    """Tensor of ``values``: a tensor itself, else a copy, since a table may be written to."""
    return values if isinstance(values, Tensor) else as_tensor(name, values).clone()


def _floats(name: str, values: Any, rank: int) -> Tensor:
    values = _own(name, values)
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor; got {values.dtype}")
    if values.dim() != rank:
        shape = "(N,)" if rank == 1 else "(K, N)"
        raise ValueError(f"{name} must have shape {shape}; got {tuple(values.shape)}")
    return values.detach().cpu()


def _check_unique(index: Tensor) -> None:
    ordered = index.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"index {int(repeated[0])} stands in the table twice; it must be unique")


def _merge(origins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(origins) == 1:
        return dict(origins[0])
    first = origins[0]
    same = {
        key: first[key] for key in first if all(key in o and o[key] == first[key] for o in origins)
    }
    return {**same, "parts": [{k: v for k, v in o.items() if k not in same} for o in origins]}
