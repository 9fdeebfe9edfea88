"""Problems, oracles and comparisons that the tests of the core share.

The oracles here use torch.autograd and nothing of moso_fast, so that they cannot share its bugs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moso_fast import backends
from moso_fast.backends import Backend, get
from moso_fast.core.memory import make_plan, rows_at_a_time
from moso_fast.core.passes import Passes
from moso_fast.core.problem import Problem, build_problem
from moso_fast.functional import last_layer_stats

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")

# Kinds of labels and losses: name -> (loss, shape of the targets, label smoothing).
KINDS = {
    "ids": ("cross_entropy", "ids", 0.0),
    "ids_smoothed": ("cross_entropy", "ids", 0.1),
    "soft": ("cross_entropy", "soft", 0.0),
    "soft_smoothed": ("cross_entropy", "soft", 0.2),
    "one_hot": ("cross_entropy", "one_hot", 0.0),
    "binary": ("binary_cross_entropy", "multi_hot", 0.0),
    "binary_soft": ("binary_cross_entropy", "fraction", 0.0),
    "mse": ("mse", "real", 0.0),
}


@dataclass(frozen=True)
class Case:
    """Arguments of one scoring call."""

    features: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.features, self.weight, self.labels, self.bias

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def runs_here(name: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the backend scores CPU tensors of this dtype on this machine."""
    if not backends()[name].available:
        return False
    backend = get(name)
    problem = build_problem(
        torch.zeros(2, 3, dtype=dtype), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    )
    return backend.supports(problem) is None


def prepared(backend: str | Backend, problem: Problem, chunk_size: int | None = None) -> Passes:
    """The passes of a backend over a problem, as the engine asks for them."""
    chosen = get(backend) if isinstance(backend, str) else backend
    return chosen.prepare(problem, make_plan(problem, chunk_size))


def chunk_rows(backend: str | Backend, problem: Problem, chunk_size: int | None = None) -> int:
    """Rows of a chunk of that job."""
    passes = prepared(backend, problem, chunk_size)
    return rows_at_a_time(problem, passes.plan, passes)


CPU_BACKENDS = tuple(name for name in backends() if runs_here(name))
needs_cpu = pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="moso_fast._cpu is not built here")
BACKENDS_AND_DTYPES = tuple(
    (name, dtype)
    for name in CPU_BACKENDS
    for dtype in (torch.float32, torch.float64)
    if runs_here(name, dtype)
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(
    kind: str = "ids",
    n: int = 17,
    c: int = 5,
    d: int = 7,
    *,
    heads: int | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Gaussian features and heads with labels of one of :data:`KINDS`."""
    g = generator(seed)
    loss, shape, smoothing = KINDS[kind]
    lead = () if heads is None else (heads,)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    features = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    # Logits of a few units whatever D, so that their own rounding stays below the tolerances.
    spread = min(1.0, 2.5 / d**0.5)
    weight = (spread * torch.randn(*lead, c, d, generator=g, dtype=torch.float64)).to(parameters)
    offset = torch.randn(*lead, c, generator=g, dtype=torch.float64).to(parameters)
    ids = torch.randint(c, (n,), generator=g)
    if shape == "ids":
        labels = ids
    elif shape == "one_hot":
        labels = F.one_hot(ids, c).to(parameters)
    elif shape == "soft":
        labels = torch.rand(n, c, generator=g, dtype=torch.float64) ** 3 + 1e-3
        labels = (labels / labels.sum(1, keepdim=True)).to(parameters)
    elif shape == "multi_hot":
        labels = torch.randint(2, (n, c), generator=g).to(parameters)
    elif shape == "fraction":
        labels = torch.rand(n, c, generator=g, dtype=torch.float64).to(parameters)
    else:
        labels = torch.randn(n, c, generator=g, dtype=torch.float64).to(parameters)
    options = {"loss": loss, "label_smoothing": smoothing, **options}
    return Case(features, weight, labels, offset if bias else None, options)


def confident_case(n: int = 2000, c: int = 10, d: int = 16, seed: int = 0) -> Case:
    """Build a well-fitted model: losses down to 1e-9, where ``p - 1`` rounds to 0 in float32."""
    g = generator(seed)
    labels = torch.randint(c, (n,), generator=g)
    features = F.one_hot(labels, d).float() + 0.03 * torch.randn(n, d, generator=g)
    return Case(features, 20.0 * torch.eye(c, d), labels, None)


def oracle_loss(logits: Tensor, label: Tensor, loss: str, label_smoothing: float = 0.0) -> Tensor:
    """Loss of one row by torch.nn.functional; logits (C,)."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits[None], label[None], label_smoothing=label_smoothing)
    if loss == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(logits, label, reduction="sum")
    return F.mse_loss(logits, label, reduction="sum")


def oracle_gradients(case: Case) -> tuple[Tensor, Tensor]:
    """Per-row gradients (N, C, D or D + 1) and losses (N,) of one head, by autograd in float64."""
    features = case.features.double()
    labels = case.labels.double() if case.labels.dim() == 2 else case.labels.long()
    weights = case.options.get("sample_weight")
    loss, smoothing = case.options["loss"], case.options["label_smoothing"]
    parameters = case.weight.double()
    if case.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
        parameters = torch.cat([parameters, case.bias.double()[:, None]], 1)
    gradients, losses = [], []
    for row, label in enumerate(labels):
        theta = parameters.clone().requires_grad_()
        value = oracle_loss(theta @ features[row], label, loss, smoothing)
        if weights is not None:
            value = value * weights[row].double()
        gradients.append(torch.autograd.grad(value, theta)[0])
        losses.append(value.detach())
    if not losses:
        return parameters.new_zeros(0, *parameters.shape), parameters.new_zeros(0)
    return torch.stack(gradients), torch.stack(losses)


def refusal(backend: str, case: Case) -> str | None:
    """Why this backend cannot run the problem, or None."""
    options = {k: v for k, v in case.options.items() if k != "chunk_size"}
    return get(backend).supports(build_problem(*case.args, **options))


def score_with(backend: str, case: Case, **options: Any) -> Any:
    """``last_layer_stats`` with this backend; skips where it says it cannot run the problem."""
    case = case.with_options(**options)
    reason = refusal(backend, case)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    stats = last_layer_stats(*case.args, backend=backend, **case.options)
    assert stats.backend == backend
    return stats


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; entries that are equal infinities or both NaN count as equal."""
    value, expected = value.double(), expected.double()
    assert value.shape == expected.shape, (value.shape, expected.shape)
    assert torch.equal(value.isnan(), expected.isnan()), "NaN in different places"
    same = (value == expected) | value.isnan()
    difference = torch.where(same, 0.0, value - expected).norm()
    scale = torch.where(same & ~torch.isfinite(expected), 0.0, expected).norm()
    return float(difference / scale.clamp_min(1e-300))


def assert_close(
    value: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0, what: str = ""
) -> None:
    """Relative Frobenius error within ``tolerance``; below ``floor`` (absolute) all is rounding."""
    assert value.shape == expected.shape, f"{what}: {value.shape} against {expected.shape}"
    if torch.equal(value.isnan(), expected.isnan()):
        difference = (value.double() - expected.double()).nan_to_num(0.0, 0.0, 0.0).abs()
        if bool((difference <= floor).all()) and not bool(value.isinf().any()):
            return
    error = relative_error(value, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:g}"


def assert_stats_match(
    stats: Any, reference: Any, tolerance: float, floor: float = 0.0, skip: tuple[str, ...] = ()
) -> None:
    """Every field, |G|^2 and the count of ``stats`` against a reference with leading K axis."""
    assert stats.count == reference.count
    for name in FIELDS:
        if name in skip:
            continue
        value, expected = getattr(stats, name), getattr(reference, name)
        assert_close(value.reshape(expected.shape), expected, tolerance, floor, name)
    norm = torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64).reshape(-1)
    expected_norm = reference.mean_grad_sqnorm.double()
    assert_close(norm, expected_norm, 2 * tolerance, floor, "mean_grad_sqnorm")


def ranks(values: Tensor) -> Tensor:
    return values.double().argsort().argsort().double()


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, for values without many ties."""
    return float(torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1])
