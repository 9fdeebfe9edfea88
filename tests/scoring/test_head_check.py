"""What is looked at in the head and the model's output, how often, and what is said of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_support import needs_cpu
from scorer_cases import SmallNet, images, scorer, trained
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.scoring.features import FeatureCapture
from moso_fast.scoring.head.row_match import Match, distinct_share, match_rows, row_keys, same_bits
from moso_fast.scoring.head.weights import HeadReading
from moso_fast.sources.data.loaders import make_loader
from moso_fast.sources.find_head import find_head

D, C = 8, 3


class Net(nn.Module):
    """Counts its forward passes; ``behind`` gets the head's output and the number of the pass."""

    def __init__(
        self, behind: Callable[[Tensor, int], Tensor], head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(D, C) if head is None else head
        self.behind, self.forwards = behind, 0

    def forward(self, x: Tensor) -> Any:
        self.forwards += 1
        return self.behind(self.fc(x), self.forwards)


def data(count: int = 96, dtype: torch.dtype = torch.float32) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, D, generator=g).to(dtype)
    return TensorDataset(x, torch.randint(C, (count,), generator=g))


def score(model: nn.Module, samples: Any = None, checkpoints: Any = None, **options: Any) -> Any:
    options = {"batch_size": 32, "progress": False, **options}
    return MoSoScorer(model, **options).score(samples or data(), checkpoints)


def capture(model: nn.Module) -> FeatureCapture:
    name, head = find_head(model)
    return FeatureCapture(model, name, head, make_loader(data(), 32))


@pytest.mark.parametrize(
    ("behind", "passes"),
    [
        (lambda z, k: z, 6),  # the very tensor: nothing to find out
        (lambda z, k: (z, z.clone()), 6),
        (lambda z, k: z.clone(), 7),  # a probe, once in the whole job
        (lambda z, k: z * 0.5, 8),  # and one for each checkpoint, since the factor may be learned
        (lambda z, k: z.div_(2), 9),  # and once again, to copy what is written to
    ],
)
def test_forward_passes(behind: Callable, passes: int) -> None:
    torch.manual_seed(0)
    model = Net(behind)
    model.extra = nn.Parameter(torch.zeros(1))
    first = copy.deepcopy(model.state_dict())
    second = {name: value + 0.1 for name, value in first.items()}
    score(model, checkpoints=[first, second])
    assert model.forwards == passes


REFUSED = "the model's logits are not the output of head 'fc' (Linear): "


@pytest.mark.parametrize(
    ("behind", "what"),
    [
        (lambda z, k: z if k == 1 else 2 * z, "in an earlier one they were"),
        (lambda z, k: z if k == 1 else z.roll(1, 1), "in an earlier one they were"),
        (lambda z, k: z if k == 1 else z + 1e-3, "in an earlier one they were"),
        (lambda z, k: z * (2 if k <= 2 else 3), "with the real ones they are not"),
    ],
)
def test_a_later_batch_that_differs(behind: Callable, what: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError) as caught:
        score(Net(behind))
    assert str(caught.value).startswith(REFUSED)
    assert what in str(caught.value)


def test_a_later_batch_in_another_order_is_put_right() -> None:
    torch.manual_seed(0)
    model = Net(lambda z, k: z if k == 1 else z.flip(0))
    features = capture(model).run().features
    x = data().tensors[0]
    wanted = torch.cat([x[:32], x[32:64].flip(0), x[64:].flip(0)])
    assert torch.equal(features, wanted)


def test_a_later_batch_whose_rows_look_alike() -> None:
    """Logits of zeros say nothing of their order: random ones are put in their place."""
    head = nn.Linear(D, C)
    nn.init.zeros_(head.weight)
    model = Net(lambda z, k: z.flip(0), head)
    features = capture(model).run().features
    x = data().tensors[0]
    assert torch.equal(features, torch.cat([b.flip(0) for b in x.split(32)]))
    assert model.forwards == 6


def test_rows_by_their_bits() -> None:
    g = torch.Generator().manual_seed(2)
    rows, inputs = torch.randn(6, 3, generator=g), torch.randn(6, 4, generator=g)
    order = torch.tensor([4, 0, 5])
    found = match_rows(rows[order], rows, inputs)
    assert isinstance(found, Tensor)
    assert found.tolist() == [4, 0, 5]
    assert match_rows(rows[:2] + 1e-6, rows, inputs) is Match.NONE
    rows[3] = rows[0]
    assert match_rows(rows[order], rows, inputs) is Match.AMBIGUOUS
    assert distinct_share(rows, inputs) == pytest.approx(4 / 6)
    inputs[3] = inputs[0]
    assert isinstance(match_rows(rows[order], rows, inputs), Tensor)
    assert distinct_share(rows, inputs) == 1
    samples = torch.tensor([0, 0, 0, 1, 1, 1])
    found = match_rows(rows[[0, 3]], rows, inputs, (torch.tensor([0, 1]), samples))
    assert isinstance(found, Tensor)
    assert found.tolist() == [0, 3]


def test_bits_of_nan_and_zero() -> None:
    rows = torch.tensor([[0.0, float("nan")], [-0.0, float("nan")]])
    assert same_bits(rows[:1], rows[1:])
    assert row_keys(rows)[0] == row_keys(rows)[1]
    assert not same_bits(rows, rows + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide", [8, 1024])
def test_rounding_is_no_difference(dtype: torch.dtype, wide: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, C)).to(dtype)
    x = torch.randn(24, wide, dtype=dtype)
    table = score(model, TensorDataset(x, torch.arange(24) % C))
    assert table.scores.isfinite().all()


def test_rounding_of_one_row_and_of_autocast() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        score(model, TensorDataset(torch.ones(2, 3), torch.tensor([0, 1])), batch_size=1)
        with torch.autocast("cpu", torch.bfloat16):
            score(nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, C)))


class Scaled(nn.Linear):
    factor = 1.02

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.factor, self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_factor_near_one_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    name, head = "fc", Scaled(D, C)
    model = Net(lambda z, k: z, head).to(dtype)
    inputs = capture(model).inputs
    x = data(256, dtype).tensors[0]
    with inputs.one_pass(), torch.no_grad():
        inputs.features((x,), {})
    reading = inputs.reading
    assert isinstance(reading, HeadReading)
    assert inputs.name == name
    assert reading.input_scale == pytest.approx(1.02, rel=3e-3)


class Changing(nn.Linear):
    """Not the same map in its last batch: such a head is looked at in every one."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 if self.calls < 4 else 2)


def test_a_head_that_changes_later() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"head 'fc' \(Changing\) cannot be scored by itself"):
        score(Net(lambda z, k: z, Changing(D, C)))  # three batches, and one call of our own


def hook_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "wrap",
    [
        hook_weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
    ],
)
def test_computed_weights_are_left_as_they_were(wrap: Callable) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(D, D)), nn.Tanh(), wrap(nn.Linear(D, C)))
    before = [m.__dict__["weight"] for m in (model[0], model[2])]
    values = [w.detach().clone() for w in before]
    state = {n: v + 0.5 if v.dtype.is_floating_point else v for n, v in model.state_dict().items()}
    table = score(model, checkpoints=[state])
    assert [m.__dict__["weight"] for m in (model[0], model[2])] == before or all(
        m.__dict__["weight"] is w for m, w in zip((model[0], model[2]), before, strict=True)
    )
    assert all(torch.equal(w, v) for w, v in zip(before, values, strict=True))
    assert table.provenance["weight"].startswith("computed from other parameters")


def test_what_the_table_says_of_the_head() -> None:
    torch.manual_seed(0)
    plain = score(Net(lambda z, k: z)).provenance
    assert plain["logits"] == "the head's output"
    assert "tied" not in plain and "weight" not in plain
    capped = score(Net(lambda z, k: 2 * torch.tanh(z / 2))).provenance
    assert capped["logits"] == "2 * tanh(0.5 * z), a soft cap of the head's output z"
    assert capped["backend"] == "torch"

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, D), nn.Linear(D, 9, bias=False)
            self.fc.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.embed(x).sum(1))

    g = torch.Generator().manual_seed(1)
    ids = TensorDataset(torch.randint(9, (12, 4), generator=g), torch.arange(12) % 9)
    tied = score(Tied(), ids).provenance
    assert tied["tied"] == (
        "weight is shared with embed.weight; the score is of the head's own use of it"
    )


def test_maps_with_parts_and_checkpoints_that_share_features() -> None:
    torch.manual_seed(0)
    model = SmallNet()
    behind = nn.Sequential(model, nn.Sigmoid())
    states = [
        {f"0.{n}" if not n.startswith("0.") else n: v for n, v in s.items()} for s in trained(model)
    ]
    heads = [dict(states[0]), {**states[0], "0.fc.weight": states[1]["0.fc.weight"]}]
    both = scorer(behind).score(images(), heads, partition=2)
    for k, state in enumerate(heads):
        one = scorer(behind).score(images(), [state], partition=2)
        for name in ("alignment", "loss", "score"):
            torch.testing.assert_close(
                both.per_checkpoint[name][k], one.per_checkpoint[name][0], rtol=1e-4, atol=1e-6
            )


@needs_cpu  # the torch backend rounds no operands
def test_noise_of_16_bit_operands_is_pointed_out() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=g).bfloat16()
    many = TensorDataset(x, torch.randint(3000, (64,), generator=g))
    torch.manual_seed(0)
    model = nn.Linear(32, 3000, bias=False).bfloat16()
    message = "precision='medium': the scores are differences of terms"
    with pytest.warns(UserWarning, match=message) as caught:
        score(model, many)
    assert caught[0].filename == __file__  # it points at whoever called the scorer
    few = TensorDataset(x, torch.randint(3, (64,), generator=g))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, many, precision="high")
        score(nn.Linear(32, 3).bfloat16(), few)
