"""Formulas by name and what each computes; lives in :mod:`moso_fast.core.formulas`."""

from .core.formulas import FORMULAS, score

__all__ = ["FORMULAS", "score"]
