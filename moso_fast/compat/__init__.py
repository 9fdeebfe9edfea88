"""The authors' scoring functions and, as ``python -m moso_fast.compat``, their script."""

from .api import MoSo_scoring, MoSo_scoring_exact

__all__ = ["MoSo_scoring", "MoSo_scoring_exact"]
