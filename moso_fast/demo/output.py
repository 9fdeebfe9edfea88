"""What the demonstration leaves behind: the printed report, plots, scores and numbers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..tables import report
from ..util.files import atomic_path
from .experiment import MOSO, SUSPICION_SCORES, SUSPICIOUS_WHEN_LOW, DemoResult

FILES = (
    "scores.parquet",
    "pruning_curve.png",
    "score_histogram.png",
    "extremes.png",
    "label_errors.png",
    "results.json",
)

PACKAGES = ("sklearn", "pyarrow", "matplotlib")


def require_packages() -> None:
    """Raise ModuleNotFoundError, before the work begins, for a package that is needed later."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}, not installed here: "
            'pip install "moso-fast[demo]"'
        )


def prepare_folder(out: Path) -> Path:
    """Create the folder where needed, before the work begins.

    Raises
    ------
    ValueError
        ``out``, or a folder above it, is a file or cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / FILES[-1]) as probe:
            probe.touch()
            raise _WritableError
    except _WritableError:
        return out
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to the folder {out} ({error.strerror or error}); "
            "give a folder that can be created"
        ) from None


class _WritableError(Exception):
    """Ends the probe of a folder, so that the temporary file goes and nothing is replaced."""


def write_files(result: DemoResult, summary: dict[str, Any], out: Path) -> list[Path]:
    """Write the scores, four plots and the numbers into ``out``, each whole or not at all."""
    paths = [out / name for name in FILES]
    scores, curve, histogram, extremes, errors, numbers = paths
    config, digits = result.config, result.digits
    result.table.save(scores)
    keeps = list(config.keeps)
    report.pruning_curve(
        keeps,
        {
            method: (
                [100 * by_keep[f"{keep:g}"]["mean"] for keep in keeps],
                [100 * by_keep[f"{keep:g}"]["std"] for keep in keeps],
            )
            for method, by_keep in summary["pruning"].items()
        },
        curve,
        title=f"Digits: accuracy on {len(digits.test_labels)} held-out images, "
        f"{config.repeats} repeats",
    )
    share = f"{config.flipped:.0%}"
    flipped_scores = -result.flipped_scores[MOSO]
    report.score_histogram(
        {
            "labels as they are": result.table.scores,
            f"{share} flipped: correct ones": flipped_scores[~result.flipped_mask],
            f"{share} flipped: flipped ones": flipped_scores[result.flipped_mask],
        },
        histogram,
        title="Digits: MoSo scores, first repeat",
        xlabel="MoSo score (high = informative = keep)",
    )
    report.extremes(
        digits.train_images.squeeze(1),
        digits.train_labels,
        result.table.scores,
        extremes,
        title="Digits: lowest and highest MoSo scores",
    )
    report.label_error_curve(
        {_worst(name): values for name, values in result.flipped_scores.items()},
        result.flipped_mask,
        errors,
        title=f"Digits: finding the {share} of labels flipped on purpose, first repeat",
    )
    with atomic_path(numbers) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return paths


def text_report(summary: dict[str, Any]) -> str:
    """Tables and findings as plain text of at most 100 columns."""
    config, data = summary["config"], summary["data"]
    part = data["train"] // config["parts"]
    lines = [
        f"{data['name']}: {data['train']:,} to train on, {data['test']} held out.",
        f"{config['parts']} surrogates of {part} images each, {config['epochs']} epochs, "
        f"{config['samples']} checkpoints sampled; last-layer scores; {config['repeats']} repeats.",
        "",
        *_pruning_table(summary),
        "",
        *_timing_table(summary["timing"]),
        "",
        *_label_table(summary),
        "",
        "What this run shows",
        *(_wrapped(sentence) for sentence in (summary["verdict"], *summary["findings"])),
        "  Within the noise: the mean paired difference is at most two standard errors.",
    ]
    return "\n".join(lines)


def _pruning_table(summary: dict[str, Any]) -> list[str]:
    keeps = list(summary["pruning"][MOSO])
    rows = [["keep", *(f"{float(keep):.0%}" for keep in keeps)]]
    for method, by_keep in summary["pruning"].items():
        rows.append([method, *(_percent(by_keep[keep]) for keep in keeps)])
    return [
        "Accuracy [%] on the held-out images after retraining on the kept part, mean +- std",
        f"({summary['config']['retrain_steps']} SGD steps whatever is kept; the same number of "
        "images a class for every method)",
        *_aligned(rows),
    ]


def _timing_table(timing: dict[str, Any]) -> list[str]:
    named = (
        ("moso_fast, all metrics, with data loader", "moso_fast"),
        ("autograd at batch size 1 (*)", "autograd_loop"),
        ("closed form in plain PyTorch, batched (*)", "closed_form"),
    )
    rows = [
        [name, f"{timing[key]:.2f} s", f"{timing[key] / timing['moso_fast']:.1f}x"]
        for name, key in named
    ]
    return [
        f"Time to score {timing['num_samples']:,} images at {timing['num_checkpoints']} "
        "checkpoints: same head, one thread, forward passes included",
        *_aligned(rows),
        f"  (*) alignment only; extrapolated from {timing['measured_samples']} images at 1 "
        "checkpoint, in memory.",
        f"  Alignments of moso_fast and autograd differ by at most {timing['difference']:.0e} "
        "of the largest.",
    ]


def _label_table(summary: dict[str, Any]) -> list[str]:
    config = summary["config"]
    dropped = f"{config['dropped']:.0%}"
    rows = [["dropped", "AUROC", f"found in worst {dropped} [%]", "accuracy [%]"]]
    for name, accuracy in summary["cleaning"].items():
        cells = ["", ""]
        if name in SUSPICION_SCORES:
            entry = summary["label_errors"][name]
            auroc = entry["auroc"]
            cells = [f"{auroc['mean']:.3f} +- {auroc['std']:.3f}", _percent(entry["found"])]
        shown = _worst(name) if name in SUSPICION_SCORES else name
        rows.append([shown, *cells, _percent(accuracy)])
    return [
        f"{config['flipped']:.0%} of the labels flipped on purpose: finding them, and accuracy "
        f"after dropping the worst {dropped}",
        *_aligned(rows),
    ]


def _worst(name: str) -> str:
    """Say which end of a score is suspicious."""
    return f"{'low' if name in SUSPICIOUS_WHEN_LOW else 'high'} {name}"


def _percent(entry: dict[str, Any]) -> str:
    return f"{100 * entry['mean']:.1f} +- {100 * entry['std']:.1f}"


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, 98, initial_indent="  ", subsequent_indent="    ")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if c else cell.ljust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
