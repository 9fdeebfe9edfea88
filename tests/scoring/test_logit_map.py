"""Maps between a head's output and the logits: found from numbers, and scored through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from core_support import needs_cpu
from torch import Tensor

from moso_fast.backends import choose
from moso_fast.core.logit_map import KINDS, LogitMap
from moso_fast.core.options import Options
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import explicit_stats
from moso_fast.scoring.head.map_search import find_map
from moso_fast.scoring.mapped import head_problem

C = 5


def numbers(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


MAPS = {
    "scale": LogitMap("scale", numbers(0.3)),
    "affine": LogitMap(
        "affine", (torch.linspace(0.5, 2, C).double(), torch.linspace(-1, 1, C).double())
    ),
    "tanh": LogitMap("tanh", numbers(2.0, 0.5)),
    "sigmoid": LogitMap("sigmoid", numbers(0.7)),
    "softmax": LogitMap("softmax", numbers(1.3)),
    "log_softmax": LogitMap("log_softmax", numbers(0.6)),
    "clamp": LogitMap("clamp", numbers(1.0, -0.8, 0.9)),
}


def probe(rows: int = 60, classes: int = C) -> Tensor:
    g = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1.0, 8.0, 64.0])[torch.randint(3, (rows, 1), generator=g)]
    return (torch.randn(rows, classes, generator=g) * sizes).double()


def test_every_kind_has_a_case() -> None:
    assert set(MAPS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_is_that_of_autograd(kind: str) -> None:
    z = probe().div_(8).requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).double()
    found = MAPS[kind].pull_back(z.detach(), weight)
    (wanted,) = torch.autograd.grad((MAPS[kind].apply(z) * weight).sum(), z)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_found(kind: str, dtype: torch.dtype) -> None:
    z = probe().to(dtype)
    seen = MAPS[kind].apply(z.double()).to(dtype)
    found = find_map(z.double(), seen.double(), torch.finfo(dtype).eps)
    assert found is not None
    assert found.kind == kind
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for got, wanted in zip(found.values, MAPS[kind].values, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda z: (z / 8).exp(),
    "square": lambda z: z * z,
    "gelu": F.gelu,
    "leaky": lambda z: F.leaky_relu(z, 0.01),
    "soft sign": F.softsign,
    "a little more than a factor": lambda z: z * (1 + 1e-4 * z.abs()),
    "layer norm": lambda z: F.layer_norm(z, (C,)),
    "sum with the neighbour": lambda z: z + 0.01 * z.roll(1, 1),
    "a factor a row": lambda z: z * torch.linspace(1, 1.01, len(z))[:, None].double(),
    "rows exchanged": lambda z: z.flip(0),
    "nothing": torch.zeros_like,
    "constant": torch.ones_like,
    "not finite": lambda z: z.masked_fill(z > 3, float("inf")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_not_taken_for_a_map(name: str) -> None:
    z = probe()
    assert find_map(z, OTHERS[name](z).float().double(), torch.finfo(torch.float32).eps) is None


def problem(targets: bool = False) -> dict:
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(C, (30,), generator=g)
    if targets:
        labels = torch.rand(30, C, generator=g)
    return {
        "features": torch.randn(30, 7, generator=g),
        "weight": torch.randn(2, C, 7, generator=g) / 2,
        "labels": labels,
        "bias": torch.randn(2, C, generator=g),
    }


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"cu_seqlens": [0, 4, 9, 9, 30]}])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_through_a_map(kind: str, loss: str, options: dict) -> None:
    given = problem(targets=loss == "mse")
    options = {k: torch.tensor(v) if k == "cu_seqlens" else v for k, v in options.items()}
    if loss == "cross_entropy":
        given["labels"][3] = -100
    chunk = options.pop("chunk_size", None)
    job = head_problem(**given, logit_map=MAPS[kind], options=Options(loss=loss), **options)
    stats, backend = job.solve(chunk_size=chunk)
    wanted = explicit_stats(**given, loss=loss, logit_map=MAPS[kind], **options)
    assert backend in ("torch", "cpu")
    for name in ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy"):
        got, want = getattr(stats, name).double(), getattr(wanted, name)
        scale = want[~want.isnan()].abs().max() if not want.isnan().all() else torch.tensor(1.0)
        torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(stats.mean_grad_sqnorm, wanted.mean_grad_sqnorm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_through_a_map_is_autograd(kind: str) -> None:
    given = {name: t[0] if name in ("weight", "bias") else t for name, t in problem().items()}
    wanted = explicit_stats(**given, logit_map=MAPS[kind])
    weight, bias = (given[n].double().requires_grad_() for n in ("weight", "bias"))
    for k, (h, y) in enumerate(zip(given["features"].double(), given["labels"], strict=True)):
        z = F.linear(h[None], weight, bias)
        loss = F.cross_entropy(MAPS[kind].apply(z), y[None])
        grads = torch.autograd.grad(loss, (weight, bias))
        square = sum(g.square().sum() for g in grads)
        torch.testing.assert_close(wanted.grad_sqnorm[0, k], square, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(wanted.loss[0, k], loss.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logit_map", [None, MAPS["tanh"]])
def test_a_factor_of_each_head(logit_map: LogitMap | None) -> None:
    given, scales = problem(), [0.5, 3.0]
    stats, _ = head_problem(**given, logit_map=logit_map, logit_scale=scales).solve()
    for k, scale in enumerate(scales):
        one = {**given, "weight": given["weight"][k], "bias": given["bias"][k]}
        inner = one["weight"].double().mul(scale), one["bias"].double().mul(scale)
        wanted = explicit_stats(
            one["features"], inner[0], one["labels"], inner[1], logit_map=logit_map
        )
        for name in ("alignment", "grad_sqnorm"):
            want = getattr(wanted, name)[0] * scale**2
            got = getattr(stats, name)[k].double()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.el2n[k].double(), wanted.el2n[0], rtol=1e-5, atol=1e-6)
        square = wanted.mean_grad_sqnorm[0] * scale**2
        torch.testing.assert_close(stats.mean_grad_sqnorm[k], square, rtol=1e-5, atol=0)
        alone, _ = head_problem(**one, logit_map=logit_map, logit_scale=[scale]).solve()
        for name in ("alignment", "grad_sqnorm", "mean_grad_sqnorm"):
            got, want = getattr(alone, name)[0], getattr(stats, name)[k]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@needs_cpu
def test_a_backend_without_maps_says_so() -> None:
    asked = build_problem(**problem(), logit_map=MAPS["tanh"])
    with pytest.raises(ValueError, match=r"the logits are 2 \* tanh\(0.5 \* z\), a soft cap"):
        choose(asked, "cpu")


def test_who_takes_maps_and_what_they_are_called() -> None:
    asked = build_problem(**problem(), logit_map=MAPS["tanh"])
    assert choose(asked)[0].name == "torch"
    assert LogitMap("scale", (torch.tensor(0.5),)).describe() == "a factor of 0.5"
