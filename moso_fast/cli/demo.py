"""`moso-fast demo`: surrogates, scores, pruning and label errors on real images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ._common import Json, Quiet, caption_bar


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for scores, plots and numbers; made where needed.")
    ] = Path("moso_fast_demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Decides everything that is drawn at random.")
    ] = 0,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Repeats with other seeds. [default: 4]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; the numbers mean little.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prune scikit-learn's digits and find flipped labels by MoSo and by its rivals.

    Trains surrogate networks on parts of 1,200 real images, scores every image, retrains on what
    each method keeps, and does the same with 10% of the labels flipped on purpose. Writes
    scores.parquet, pruning_curve.png, score_histogram.png, extremes.png, label_errors.png and
    results.json into --out, replacing only these. Takes one to two minutes on two cores.
    """
    from ..demo.output import prepare_folder, require_packages

    require_packages()
    prepare_folder(out)

    from ..demo.experiment import DemoConfig, run_demo
    from ..demo.output import text_report, write_files
    from ..demo.summary import summarise

    config = DemoConfig.quick(seed) if quick else DemoConfig(seed=seed)
    if repeats is not None:
        config = replace(config, repeats=repeats)
    with caption_bar("surrogates", config.total_work(), shown=not quiet) as (show, advance):

        def tick(caption: str) -> None:
            show(caption)
            advance()

        result = run_demo(config, tick)
    summary = summarise(result)
    paths = write_files(result, summary, out)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    elif not quiet:
        typer.echo(text_report(summary))
        typer.echo(f"\n{summary['seconds']:.0f} s; written to {out}:")
        typer.echo("  " + ", ".join(path.name for path in paths))
