"""The first look: every backend, regime, dtype and precision on two sizes against float64.

Rows are such that rounding shows: features with a mean, seven of ten labels alike, so that the
terms of the gradient do not average out. One line of data a size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from moso_fast.backends import _PREFERENCE, backends, get
from moso_fast.backends.triton.choice import REGIMES
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import last_layer_stats

from ...table import OURS
from ..worker import Wrong
from .timing import device, dtype_of, forced

# Both multiples of 16, so that the second compiles nothing.
ROWS, DRY_ROWS = (608, 20_000), (64, 304)
# (heads, classes, columns): one for everybody, and what only some have. Three heads take the
# batched product of few_classes; a hundred classes the CUDA kernels' two blocks a tile; rows of
# 190 columns, in any dtype but float64, do not begin at multiples of 16 bytes.
SHAPE = (None, 10, 512)
EXTRA = {
    "cuda": ((None, 100, 512), (3, 10, 256)),
    "triton/row_tiles": ((None, 100, 512), (None, 250, 512), (None, 10, 190), (None, 100, 190)),
    "triton/few_classes": ((3, 10, 256),),
    "triton/recompute": ((None, 1000, 192),),
    "triton/stored": ((None, 100, 192), (None, 1000, 192)),  # the alignment's two orders
    # More classes than columns; weights padded to a multiple of 8 beside rows of an odd length.
    "triton/blas": ((None, 1000, 192), (None, 100, 190)),
}
DTYPES = ("bfloat16", "float32", "float16", "float64")
FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")
# float64 results are held to more than any precision asks for.
DOUBLE = 1e-10

Head = tuple[int | None, int, int]


def cases(where: torch.device) -> Iterator[dict[str, Any]]:
    """Yield contender, head, dtype and precision of every case that this machine can run.

    Contenders in turn: what compiles nothing does not wait behind what does.
    """
    by_contender: dict[str, list[dict[str, Any]]] = {}
    for case in _all_cases(where):
        by_contender.setdefault(case["contender"], []).append(case)
    for in_turn in zip_longest(*by_contender.values()):
        yield from (case for case in in_turn if case is not None)


def _all_cases(where: torch.device) -> Iterator[dict[str, Any]]:
    for name in _PREFERENCE[where.type]:
        if not backends()[name].available:
            continue
        for contender in [f"triton/{r}" for r in REGIMES] if name == "triton" else [name]:
            for dtype in DTYPES:
                for precision in OURS if dtype != "float64" else ("highest",):
                    for head in _heads(contender, dtype, precision, where):
                        yield {
                            "contender": contender,
                            "head": head,
                            "dtype": dtype,
                            "precision": precision,
                        }


def _heads(contender: str, dtype: str, precision: str, where: torch.device) -> list[Head]:
    backend, _, regime = contender.partition("/")

    def fits(head: Head) -> bool:
        problem = _problem(*_data(2, head, dtype_of(dtype), where), precision)
        if get(backend).supports(problem) is not None:
            return False
        return not regime or REGIMES[regime].fits(problem) is None

    return [head for head in (SHAPE, *EXTRA.get(contender, ())) if fits(head)]


def _problem(h: Tensor, w: Tensor, y: Tensor, b: Tensor, precision: str) -> Problem:
    return build_problem(h, w, y, b, precision=precision)


def _data(
    n: int, head: Head, dtype: torch.dtype, where: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, c, d = head
    g = torch.Generator(device=where).manual_seed(n)
    shape = (c, d) if heads is None else (heads, c, d)
    features = (torch.randn(n, d, generator=g, device=where) + 1).to(dtype)
    weight = (torch.randn(shape, generator=g, device=where) / d**0.5).to(dtype)
    labels = torch.randint(c, (n,), generator=g, device=where)
    labels[: 7 * n // 10] = 0
    return features, weight, labels, torch.randn(shape[:-1], generator=g, device=where).to(dtype)


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Run one case on both sizes; the first that is wrong ends it."""
    where = device()
    backend, _, regime = unit["contender"].partition("/")
    dtype, precision = dtype_of(unit["dtype"]), unit["precision"]
    heads, classes, columns = unit["head"]
    limit = DOUBLE if dtype == torch.float64 else OURS[precision]
    for n in ROWS if where.type == "cuda" else DRY_ROWS:
        data = _data(n, (heads, classes, columns), dtype, where)
        truth = closed_form_stats(*data)
        with forced(regime):
            stats = last_layer_stats(*data, backend=backend, precision=precision)
        errors = {name: _error(getattr(stats, name), getattr(truth, name)) for name in FIELDS}
        norm = torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64, device=where)
        errors["mean_grad_sqnorm"] = _error(norm, truth.mean_grad_sqnorm)
        emit(**{f"errors at {n}": errors})
        for name, error in errors.items():
            # Squared norms have twice the error of the norm.
            if not error <= (2 * limit if name.endswith("sqnorm") else limit):
                raise Wrong(f"{n} rows, {name}: relative error {error:.2g}, limit {limit:g}")


def _error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; NaN where the value has one."""
    found = value.double().reshape(truth.shape)
    return float((found - truth).norm() / truth.norm())
