"""What a provider is: one way to compute a case, and why it may not be able to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cases import Case
from ..inputs import Inputs, Result

__all__ = ["FAMILIES", "TOLERANCES", "Job", "Provider"]

Job = Callable[[], Result]

# ours; plain PyTorch without a per-sample gradient; plain PyTorch with one; other libraries.
FAMILIES = ("ours", "plain", "autograd", "peer")

# Largest relative error that still gets a number. Ours are held to the package's contract, the
# others to being the same computation; 16-bit products cost two digits.
_OURS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_OTHERS = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
TOLERANCES = {"ours": _OURS, "plain": _OTHERS, "autograd": _OTHERS, "peer": _OTHERS}


def _never(case: Case, inputs: Inputs) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes
    ----------
    prepare
        From case and inputs the job that is timed; what it does before is set-up and is not.
    needs
        Modules that must be importable.
    refuse
        Why it cannot take this problem, or None.
    heavy
        Builds per-sample gradients or goes sample by sample: takes part in heavy cases only.
    narrow
        For features of 16 bits only.
    compiles
        Compiles in its set-up, for seconds: not in every case of the small profile.
    note
        What it leaves out, shown beside its numbers.
    """

    name: str
    family: str
    kinds: frozenset[str]
    prepare: Callable[[Case, Inputs], Job]
    needs: tuple[str, ...] = ()
    refuse: Callable[[Case, Inputs], str | None] = _never
    heavy: bool = False
    narrow: bool = False
    compiles: bool = False
    note: str = ""

    def missing(self) -> str | None:
        """Name the modules that are not installed, or return None."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def takes(self, case: Case) -> bool:
        """Whether it belongs to this case at all; what it does not is not even called skipped."""
        wide = case.dtype in (torch.float32, torch.float64)
        return case.kind in self.kinds and self.heavy <= case.heavy and not (self.narrow and wide)

    def tolerance(self, case: Case) -> float:
        """Largest relative error that gets a number."""
        return TOLERANCES[self.family][case.dtype]
