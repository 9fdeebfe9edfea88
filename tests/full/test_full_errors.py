"""What gradient="full" refuses: samples (or leaves them out, where asked to), models, settings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, build, gradients, scores
from full_scorer_cases import CLOSE, Listed, N, Stream, full, samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer


@pytest.mark.exhaustive
def test_ignored_and_excluded_samples() -> None:
    inputs, labels = samples().tensors
    left_out = torch.arange(N) % 4 == 1
    table = full(build("cnn")).score(TensorDataset(inputs, torch.where(left_out, -100, labels)))
    g = gradients(build("cnn"), inputs[~left_out], labels[~left_out])
    assert torch.equal(table.scores.isnan(), left_out)
    torch.testing.assert_close(table.scores[~left_out], scores(g, "moso"), **CLOSE)
    broken = torch.where(left_out[:, None, None, None], torch.nan, inputs)
    with pytest.raises(ValueError, match="the loss or gradient of sample 1 is not finite"):
        full(build("cnn")).score(TensorDataset(broken, labels))
    table = full(build("cnn"), nonfinite="exclude").score(TensorDataset(broken, labels))
    torch.testing.assert_close(table.scores[~left_out], scores(g, "moso"), **CLOSE)
    first = torch.arange(N) < 5  # a whole batch, before anything is known of the model
    broken = torch.where(first[:, None, None, None], torch.nan, inputs)
    table = full(build("cnn"), nonfinite="exclude").score(TensorDataset(broken, labels))
    assert torch.equal(table.scores.isnan(), first)


class Root(nn.Module):
    """Square roots of 0 for an input of 0: the loss is finite, the derivative is not."""

    def __init__(self, clipped: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(108, CLASSES, bias=False)
        self.clipped = clipped

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(1))
        return (z - 1e-3).relu().sqrt() if self.clipped else z.square().sqrt()


@pytest.mark.parametrize("clipped", [False, True])
def test_gradient_that_is_not_finite(clipped: bool) -> None:
    torch.manual_seed(0)
    model, (inputs, labels) = Root(clipped).double(), samples().tensors
    inputs = inputs.clone()
    inputs[11] = 0.0
    data = TensorDataset(inputs, labels)
    if clipped:
        # Backward gives 0 where the derivative is 0 times infinity, forward mode alone NaN.
        table = full(model).score(data)
        expected = scores(gradients(model, inputs, labels), "moso")
        torch.testing.assert_close(table.scores, expected, **CLOSE)
        return
    with pytest.raises(ValueError, match="the loss or gradient of sample 11 is not finite"):
        full(model).score(data)
    table = full(model, nonfinite="exclude").score(data)
    assert table.scores.isnan().nonzero().flatten().tolist() == [11]
    rest = torch.arange(N) != 11
    g = gradients(model, inputs[rest], labels[rest])
    torch.testing.assert_close(table.scores[rest], scores(g, "moso"), **CLOSE)


class Contrastive(nn.Module):
    """Samples that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(108, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(1))
        return z - z.mean(0)


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(108, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x).flatten(1))


def test_samples_that_influence_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="the loss of a sample changes with the other samples"):
        full(Contrastive().double()).score(samples())
    with pytest.raises(ValueError, match=r"batch norm 'bn' uses the statistics of the batch"):
        full(BatchStatistics().double()).score(samples())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "fc"}, ValueError, "head goes with gradient='last_layer', not with 'full'"),
        ({"precision": "high"}, ValueError, "precision goes with gradient='last_layer'"),
        ({"scope": "nothing"}, ValueError, "scope 'nothing' matches no parameter that requires"),
        ({"scope": 3}, TypeError, "scope must be None, names or a predicate"),
        ({"scope": lambda n, p: False}, ValueError, "model: no parameter is in scope"),
        ({"views": 0}, ValueError, "views must be a positive int, got 0"),
        ({"autocast": torch.float32}, ValueError, "autocast must be None, bfloat16 or float16"),
        ({"loss": "hinge"}, ValueError, "loss must be a callable or one of cross_entropy"),
    ],
)
def test_bad_settings(options: dict, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        full(build("cnn"), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_of_the_full_gradient_alone() -> None:
    for options in ({"scope": "fc"}, {"views": 2}, {"autocast": torch.bfloat16}):
        with pytest.raises(ValueError, match="goes with gradient='full', not with 'last_layer'"):
            MoSoScorer(build("cnn"), **options)


def test_bad_data() -> None:
    inputs, labels = samples().tensors
    wrong = labels.clone()
    wrong[12] = 9
    with pytest.raises(ValueError, match=r"labels\[12\] is 9, outside \[0, 5\)"):
        full(build("cnn")).score(TensorDataset(inputs, wrong), partition=2)
    with pytest.raises(ValueError, match="loss must return one value a sample"):
        full(build("cnn"), loss=F.cross_entropy).score(samples())
    with pytest.raises(ValueError, match="only 1 sample counts"):
        full(build("cnn")).score(samples(1))
    alone = torch.where(torch.arange(N) == 3, labels, -100)
    with pytest.raises(ValueError, match="only 1 sample counts"):
        full(build("cnn")).score(Listed(TensorDataset(inputs, alone)))
    with pytest.raises(ValueError, match="views needs a data set that is read sample by sample"):
        full(build("cnn"), views=2).score(Stream())
