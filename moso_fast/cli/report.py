"""``moso-fast report``: plots of a score table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import (
    Json,
    Labels,
    Quiet,
    ScoresFile,
    TableFile,
    describe,
    emit,
    labels_of,
    load_table,
    rows_of,
)

if TYPE_CHECKING:
    from ..tables.table import ScoreTable


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; made if missing.")],
    table_file: TableFile = None,
    scores: ScoresFile = None,
    keep: Annotated[
        str | None, typer.Option(help="Mark the cut of prune --keep in the histogram.")
    ] = None,
    labels: Labels = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="(N, H, W[, 3]) images of the whole data set, .npy: draws the extremes.",
            metavar="FILE",
        ),
    ] = None,
    errors: Annotated[
        str | None,
        typer.Option(
            help="(N,) known label errors as 0/1, .npy: draws how fast each score finds them.",
            metavar="FILE",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the score table SCORES: histogram, metrics, checkpoints, extremes, label errors.

    Writes score_histogram.png, metrics.png and, of several checkpoints, checkpoints.png; --images
    (with --labels for the captions) adds extremes.png, --errors adds label_errors.png.
    """
    from .prune import describe_keep, parse_keep

    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file; it must be a folder")
    table = load_table(table_file, scores, "report")
    share = None if keep is None else parse_keep(keep)
    plots = _plan(table, labels, images, errors, share)
    output.mkdir(parents=True, exist_ok=True)
    written = [str(draw(output / name)) for name, draw in plots.items()]
    facts: dict[str, Any] = {"wrote": written, "samples": len(table), **describe(table.scores)}
    if share is not None:
        facts["keep"] = describe_keep(share, len(table))
    emit(facts, as_json=json, quiet=quiet)


def _plan(
    table: ScoreTable,
    labels: str | None,
    images: str | None,
    errors: str | None,
    share: float | None,
) -> dict[str, Any]:
    """File name -> function of its path; reads and checks everything before the first is drawn."""
    import torch

    from ..sources.arrays import open_array
    from ..tables import report as plots
    from ..tables.select import select

    if not bool(table.scores.isfinite().any()):
        raise ValueError("the table has no finite score: nothing to draw")
    cut = None
    if share is not None:
        kept = select(table, share)
        rows = torch.isin(table.index, kept)
        if kept.numel():
            kept_scores = table.scores[rows]
            cut = float(kept_scores.min() if table.higher_is_better else kept_scores.max())
    means = "high = informative = keep" if table.higher_is_better else "low = keep"
    classes = None if labels is None else labels_of(labels, table.index)
    todo: dict[str, Any] = {
        "score_histogram.png": lambda path: plots.score_histogram(
            {"all samples": table.scores}, path, cut=cut, xlabel=f"score ({means})"
        )
    }
    if any(
        int((v.isfinite() & table.scores.isfinite()).sum()) >= 2 for v in table.metrics.values()
    ):
        todo["metrics.png"] = lambda path: plots.metric_panels(table, path)
    if "score" in table.per_checkpoint and table.per_checkpoint["score"].shape[0] > 1:
        todo["checkpoints.png"] = lambda path: plots.checkpoint_bands(table, path)
    if images is not None:
        pictures = open_array(images)
        if pictures.dim() != 3 and not (pictures.dim() == 4 and pictures.shape[-1] == 3):
            raise ValueError(
                f"{images} must hold (N, H, W) or (N, H, W, 3); got {tuple(pictures.shape)}"
            )
        rows_of(pictures[:, :0], table.index, images, "images")  # the length, without the pixels
        captions = table.index if classes is None else classes
        todo["extremes.png"] = lambda path: _extremes(table, pictures, captions, path)
    if errors is not None:
        wrong = rows_of(open_array(errors), table.index, errors, "flags")
        if wrong.dim() != 1 or not 0 < int(wrong.bool().sum()) < wrong.numel():
            raise ValueError(f"{errors} must mark some but not all samples, shape (N,)")
        todo["label_errors.png"] = lambda path: plots.label_error_curve(
            _suspicion(table), wrong.bool(), path
        )
    return todo


def _extremes(table: ScoreTable, pictures: Any, captions: Any, path: Path) -> Path:
    """Draw from the few images at both ends alone: the others are not read."""
    import torch

    from ..tables import report as plots

    scored = (~table.scores.isnan()).nonzero().flatten()
    order = scored[table.scores[scored].argsort(stable=True)]
    ends = torch.cat([order[:10], order[10:][-10:]]).sort().values
    return plots.extremes(pictures[table.index[ends]], captions[ends], table.scores[ends], path)


def _suspicion(table: ScoreTable) -> dict[str, Any]:
    """Scores that are high for likely label errors, by the name of what they come from."""
    low = {"MoSo score (low first)": -table.scores if table.higher_is_better else table.scores}
    if "margin" in table.metrics:
        low["margin (low first)"] = -table.metrics["margin"]
    names = ("self_influence", "el2n", "loss")
    return {**low, **{name: table.metrics[name] for name in names if name in table.metrics}}
