"""``moso-fast prune``: from scores to the indices of the samples to keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import Json, Labels, Quiet, ScoresFile, TableFile, emit, labels_of, load_table

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".npy", ".txt", ".csv")


def prune(
    keep: Annotated[
        str,
        typer.Option(
            help="Fraction with a decimal point (0.5), percentage (50%) or count (25000): 1 is "
            "one sample, 1.0 all.",
            metavar="SHARE",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Kept indices: .npy, .txt or .csv.")
    ],
    table_file: TableFile = None,
    scores: ScoresFile = None,
    labels: Labels = None,
    balance: Annotated[
        str | None, typer.Option(help="Quota per class: equal or proportional (needs --labels).")
    ] = None,
    method: Annotated[str, typer.Option(help="top, bottom, random or sample.")] = "top",
    by: Annotated[str, typer.Option(help="Column to rank by: score, or a metric.")] = "score",
    seed: Annotated[int, typer.Option(help="Of the methods random and sample.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the data-set indices of the samples of the table SCORES to keep, ascending.

    top keeps the highest values of the column; bottom the lowest. Fractions are of all rows,
    rounded half up; samples without a score are never kept.
    """
    wanted = parse_keep(keep)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output must end in {', '.join(SUFFIXES)}; got {output.name!r}")
    if balance is not None and labels is None:
        raise ValueError(f"--balance {balance} needs --labels FILE")
    from ..tables.select import select
    from ..util.files import check_folder

    check_folder(output)
    table = load_table(table_file, scores, "prune")
    values = table.column(by)
    if by == "score" and not table.higher_is_better:
        values = -values
    classes = None if labels is None else labels_of(labels, table.index)
    rows = select(values, wanted, labels=classes, balance=balance, method=method, seed=seed)
    rows = rows[table.index[rows].argsort()]
    write_indices(output, table.index[rows], table.column(by)[rows], by)
    result = {
        "output": str(output),
        "keep": describe_keep(wanted, len(table)),
        "kept": rows.numel(),
        "of": len(table),
        "unscored": int(values.isnan().sum()),
        "method": method,
        "by": by,
        "balance": balance,
        "lowest_kept": float(table.column(by)[rows].min()) if rows.numel() else None,
        "highest_kept": float(table.column(by)[rows].max()) if rows.numel() else None,
    }
    if classes is not None and classes.numel():
        names, counts = classes[rows].unique(return_counts=True)
        kept = dict(zip(names.tolist(), counts.tolist(), strict=True))
        every = {name: kept.get(name, 0) for name in classes.unique().tolist()}
        few = {"classes": len(every), "min": min(every.values()), "max": max(every.values())}
        result["kept_per_class"] = every if json else few
    emit(result, as_json=json, quiet=quiet)


def parse_keep(text: str) -> float:
    """Read a count (int) or a fraction (float): ``25000``, ``0.5``, ``50%``.

    Raises
    ------
    ValueError
        None of these, or a fraction outside [0, 1].
    """
    wrong = (
        "--keep must be a fraction in [0, 1] (0.5), a percentage (50%) or a count (25000); "
        f"got {text!r}"
    )
    try:
        if text.isdecimal():
            return int(text)
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(wrong) from None
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(wrong)
    return fraction


def describe_keep(wanted: float, total: int) -> str:
    """Say how ``--keep`` was read: 1 is one sample and 1.0 all of them."""
    if not isinstance(wanted, int):
        return f"the fraction {wanted:g} of {total:,}"
    if wanted == 1:
        return "1 sample (a count; 1.0 or 100% keeps all)"
    return f"{wanted:,} samples (a count)"


def write_indices(path: Path, index: Tensor, values: Tensor, name: str) -> None:
    """Write indices (and their values, to .csv) in the format of the suffix, whole or not."""
    import numpy as np

    from ..util.files import atomic_path

    with atomic_path(path) as temporary:
        if path.suffix == ".npy":
            np.save(temporary, index.numpy())
        elif path.suffix == ".txt":
            temporary.write_text("".join(f"{row}\n" for row in index.tolist()))
        else:
            pairs = zip(index.tolist(), values.tolist(), strict=True)
            lines = [f"{row},{value:.9g}\n" for row, value in pairs]
            temporary.write_text(f"index,{name}\n" + "".join(lines))
