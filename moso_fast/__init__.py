"""Exact MoSo scores for data pruning, for the cost of one inference pass per checkpoint."""

from __future__ import annotations

from pathlib import Path as _Path

# A wheel maps kernels/ to moso_fast/kernels; in a source tree it lies beside this package. setup.py
# shows that the folder above is the source tree: in site-packages, appending it would let
# `moso_fast.kernels` mean whatever unrelated `kernels` is installed there.
_package = _Path(__file__).resolve().parent
if not (_package / "kernels").is_dir() and (_package.parent / "setup.py").is_file():
    __path__.append(str(_package.parent))

from .backends import Availability, backends
from .core.formulas import FORMULAS
from .functional import LastLayerStats, explain, last_layer_stats, moso_scores
from .scorer import MoSoScorer
from .scoring.from_files import score_files
from .scoring.partition import partition_ids
from .sources.checkpoints.checkpoint import Checkpoint
from .surrogate.training import Surrogate, score_surrogates, train_surrogates
from .tables.select import select
from .tables.table import ScoreTable
from .version import __version__

__all__ = [
    "FORMULAS",
    "Availability",
    "Checkpoint",
    "LastLayerStats",
    "MoSoScorer",
    "ScoreTable",
    "Surrogate",
    "__version__",
    "backends",
    "explain",
    "last_layer_stats",
    "moso_scores",
    "partition_ids",
    "score_files",
    "score_surrogates",
    "select",
    "train_surrogates",
]
