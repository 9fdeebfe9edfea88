"""Exact MoSo scores for data pruning, for the cost of one inference pass per checkpoint."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source tree (and a strict editable install) the Triton kernels lie in <root>/kernels; a wheel maps
# that folder to moso_fast/kernels. setup.py marks the root as ours: without this check a missing folder
# would make `moso_fast.kernels` resolve to whatever unrelated `kernels` lies in site-packages.
_package = _Path(__file__).resolve().parent
if not (_package / "kernels").is_dir() and (_package.parent / "setup.py").is_file():
    __path__.append(str(_package.parent))

from .backends import Availability, backends
from .functional import LastLayerStats, explain, last_layer_stats, moso_scores

__all__ = [
    "Availability",
    "LastLayerStats",
    "__version__",
    "backends",
    "explain",
    "last_layer_stats",
    "moso_scores",
]
