"""What is made beside given numbers lies where they do: held with PyTorch's device "meta"."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moso_fast.core.options import Options
from moso_fast.core.passes import Results
from moso_fast.scoring import from_files
from moso_fast.scoring.features import Features
from moso_fast.scoring.head.row_match import row_keys
from moso_fast.scoring.mapped import HeadProblem, _scaled, head_problem
from moso_fast.scoring.row_weights import RowWeights
from moso_fast.sources.heads import head_of

META = torch.device("meta")


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=META)


@pytest.mark.parametrize("columns", [0, 3])
def test_keys_of_rows(columns: int) -> None:
    assert row_keys(there(4, columns)).device == META


def test_factors_of_rows() -> None:
    features = Features(there(4, 2), there(4, dtype=torch.long), None)
    weights = RowWeights(torch.ones(3).double(), torch.ones(4).double())
    factors = weights.of(features, 3)
    assert factors is not None and factors.device == META and factors.shape == (4,)


@pytest.mark.parametrize("heads", [(), (2,)])
def test_heads_behind_factors(heads: tuple[int, ...]) -> None:
    scales = [0.5, 2.0][: len(heads) + 1]
    job = head_problem(
        there(4, 2),
        there(*heads, 3, 2),
        there(4, dtype=torch.long),
        there(*heads, 3),
        logit_scale=scales,
    )
    assert isinstance(job, HeadProblem) and job.scales is not None
    for tensor in (job.problem.weight, job.problem.bias, job.scales):
        assert tensor is not None and tensor.device == META


def test_statistics_behind_factors() -> None:
    fields = {name: there(2, 4) for name in Results.__dataclass_fields__}
    found = Results(**{**fields, "mean_grad_sqnorm": there(2, dtype=torch.float64)})
    scaled = _scaled(found, torch.tensor([0.5, 2.0], dtype=torch.float64))
    for name in ("alignment", "grad_sqnorm", "mean_grad_sqnorm"):
        one, other = getattr(scaled, name), getattr(found, name)
        assert (one.device, one.dtype, one.shape) == (META, other.dtype, other.shape)


def test_files_that_are_scored_elsewhere() -> None:
    g = torch.Generator().manual_seed(0)
    head = head_of((torch.randn(3, 2, generator=g), torch.randn(3, generator=g)), "heads[0]")
    wide = head_of(torch.randn(5, 2, generator=g), "heads[1]")
    problems = from_files._problems(
        torch.randn(4, 2, generator=g),
        torch.tensor([0, 1, 2, 0]),
        [head, wide],
        ["F.npy", "y.npy"],
        Options(),
        META,
    )
    assert [numbers for numbers, _ in problems] == [[0], [1]]
    for _, job in problems:
        tensors = (job.problem.features, job.problem.labels, job.problem.weight, job.problem.bias)
        assert {t.device for t in tensors if t is not None} == {META}
