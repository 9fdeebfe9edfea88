"""Every bad argument of the scorer gets its one-line error, before any work where possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scorer_cases import (
    N,
    SmallNet,
    images,
    scorer,
    trained,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.backends import backends
from moso_fast.core.losses import LOSSES
from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="module")
def states(model: SmallNet) -> list[dict[str, Tensor]]:
    return trained(model)


BAD_SETTINGS: list[tuple[dict, type, str]] = [
    (
        {"gradient": "half"},
        ValueError,
        "gradient must be one of last_layer, full, got 'half'",
    ),
    (
        {"loss": F.cross_entropy},
        ValueError,
        "loss must be the name of a loss for gradient='last_layer' (cross_entropy, "
        "binary_cross_entropy, mse), got function (a callable)",
    ),
    (
        {"loss": "hinge"},
        ValueError,
        f"loss must be one of {', '.join(LOSSES)}; got 'hinge'",
    ),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1), got 1.5"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    (
        {"precision": "low"},
        ValueError,
        "precision must be None or one of highest, high, medium; got 'low'",
    ),
    ({"nonfinite": "skip"}, ValueError, "nonfinite must be one of raise, exclude; got 'skip'"),
    (
        {"backend": "gpu"},
        ValueError,
        f"backend must be one of auto, {', '.join(backends())}, got 'gpu'",
    ),
    (
        {"feature_cache": "int8"},
        ValueError,
        "feature_cache must be one of auto, float32, bfloat16, got 'int8'",
    ),
    (
        {"shift_labels": "yes"},
        ValueError,
        "shift_labels must be 'auto', True or False, got 'yes'",
    ),
    ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of rows, got 0"),
    (
        {"chunk_size": -1, "gradient": "full"},
        ValueError,
        "chunk_size must be a positive number of rows, got -1",
    ),
    (
        {"dtype": torch.int64},
        TypeError,
        "dtype must be a floating-point torch.dtype or None, got torch.int64",
    ),
    ({"columns": [3]}, TypeError, "columns must be names of entries of a batch, got [3]"),
    ({"columns": []}, TypeError, "columns must be names of entries of a batch, got []"),
    (
        {"head": "nothing"},
        ValueError,
        "head 'nothing' is no module of the model; its nn.Linear modules are 'fc' (12 -> 4)",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_SETTINGS)
def test_bad_settings(model: SmallNet, options: dict, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        MoSoScorer(model, **options)
    assert str(caught.value) == message


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got function$"):
        MoSoScorer(F.relu)  # type: ignore[arg-type]


STATE = SmallNet().state_dict()


ONE_EACH = TensorDataset(torch.randn(3, 1, 4, 4), torch.tensor([0, -100, -100]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"formula": "best"},
            ValueError,
            "formula must be one of moso, one_step, official, official_exact, alignment, "
            "cosine; got 'best'",
        ),
        ({"combine": "max"}, ValueError, "combine must be one of mean, zscore; got 'max'"),
        ({"num_steps": 0}, ValueError, "num_steps must be None or a whole number >= 1; got 0"),
        ({"data": 3}, TypeError, "data must be a DataLoader or a Dataset, got int"),
        (
            {"data": DataLoader(images(), shuffle=True)},
            ValueError,
            "data: scores come back in data-set order, but the loader may shuffle or leave "
            "samples out (its sampler is a RandomSampler); use DataLoader(dataset, "
            "shuffle=False), with a Subset for a part of the data",
        ),
        (
            {"checkpoints": []},
            ValueError,
            "checkpoints is empty; give at least one Checkpoint, or None for the model as it is",
        ),
        ({"checkpoints": 3}, TypeError, "checkpoints must be an iterable of Checkpoint, got int"),
        ({"checkpoints": ["missing.pt"]}, ValueError, "checkpoint missing.pt does not exist"),
        (
            {"checkpoints": [Checkpoint(STATE, lr=0.1), Checkpoint(STATE)]},
            ValueError,
            "checkpoints: either all have a learning rate or none, but checkpoint 0 has one "
            "and checkpoint 1 has none; give Checkpoint(source, lr=...) for each (without: a "
            "state dict in memory)",
        ),
        (
            {"partition": [0] * 22 + [1]},
            ValueError,
            "partition: every part needs at least 2 samples to be scored against its own mean, "
            "part 1 has 1",
        ),
        (
            {"partition": 12},
            ValueError,
            "partition: every part needs at least 2 samples to be scored against its own mean, "
            "part 11 has 1",
        ),
        (
            {"partition": [0, 1]},
            ValueError,
            "partition must have one id per sample, shape (23,), got (2,)",
        ),
        ({"partition": 0.5}, TypeError, "partition ids must be integers, got torch.float32"),
        ({"index": [0, 1]}, ValueError, "index must have one entry per sample, 23, got 2"),
        ({"index": torch.ones(N)}, TypeError, "index must hold integers, got torch.float32"),
        ({"index": torch.ones(N) * 1j}, TypeError, "index must hold integers, got torch.complex64"),
        ({"index": torch.ones(1, 1).long()}, ValueError, "index must have shape (N,), got (1, 1)"),
        (
            {"index": [0, *range(N - 1)]},
            ValueError,
            "index 0 stands in the table twice; it must be unique",
        ),
        ({"index": range(-1, N - 1)}, ValueError, "index must not be negative; got -1"),
    ],
)
def test_bad_arguments_are_refused_before_any_forward_pass(
    arguments: dict, error: type, message: str
) -> None:
    model = SmallNet()
    arguments = {"data": images(), **arguments}
    with pytest.raises(error) as caught:
        scorer(model).score(arguments.pop("data"), **arguments)
    assert str(caught.value) == message
    assert model.forwards == 0


def test_rates_of_a_generator_are_checked_as_they_come(model: SmallNet, states: list) -> None:
    stream = iter([Checkpoint(states[0]), Checkpoint(states[1], lr=0.1)])
    with pytest.raises(ValueError, match="checkpoint 1 has one and checkpoint 0 has none"):
        scorer(model).score(images(), stream)


def test_too_few_counted_samples() -> None:
    model = SmallNet()
    with pytest.raises(ValueError, match="only 1 sample counts"):
        scorer(model).score(ONE_EACH)
    labels = torch.where(torch.arange(N) < 21, images().tensors[1], -100)
    data = TensorDataset(images().tensors[0], labels)
    partition = [0] * 20 + [1] * 3
    with pytest.raises(ValueError, match=r"samples that are not ignored .* part 1 has 1"):
        scorer(model).score(data, partition=partition)
    assert model.forwards == 0, "these labels are at hand"
    with pytest.raises(ValueError, match=r"samples that are not ignored .* part 1 has 1"):
        scorer(model).score(list(data), [STATE, STATE], partition=partition)
    assert model.forwards == 3, "found right after the pass that shows the labels"
    table = scorer(model).score(ONE_EACH, formula="alignment")
    assert table.scores.isnan().tolist() == [False, True, True]


def test_label_out_of_range_and_non_finite_input(model: SmallNet) -> None:
    inputs, labels = images().tensors
    wrong = labels.clone()
    wrong[17] = 9
    with pytest.raises(ValueError, match=r"labels\[17\] is 9, outside \[0, 4\)"):
        scorer(model).score(TensorDataset(inputs, wrong))
    broken = inputs.clone()
    broken[5] = float("nan")
    with pytest.raises(ValueError, match="row 5 is the first with a non-finite value"):
        scorer(model).score(TensorDataset(broken, labels))
    table = scorer(model, nonfinite="exclude").score(TensorDataset(broken, labels))
    assert table.scores.isnan().nonzero().flatten().tolist() == [5]


def test_progress_is_silent_without_a_terminal(
    model: SmallNet, capsys: pytest.CaptureFixture[str]
) -> None:
    MoSoScorer(model).score(images())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(
    model: SmallNet,
    states: list,
    rich: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
        monkeypatch.setattr("moso_fast.util.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    MoSoScorer(model, batch_size=8).score(images(), states)
    out, err = capsys.readouterr()
    assert out == ""
    assert "scoring" in err
    if not rich:
        assert "scoring: 9/9 batches" in err
        assert err.endswith("\r")
    assert (MoSoScorer(model, progress=False).score(images()), capsys.readouterr().err)[1] == ""
