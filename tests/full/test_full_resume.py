"""Interrupted runs with gradient="full": what goes on, and what belongs to another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_cases import build
from full_scorer_cases import CLOSE, RATES, Listed, checkpoints, expected, full, same, samples
from torch import Tensor
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer


class StopsAt(Listed):
    """Raises at a sample of one pass."""

    def __init__(self, at_pass: int) -> None:
        super().__init__(samples())
        # Before the first pass some samples are read, to compare them with those of the folder.
        self.at_pass, self.passes = at_pass, -1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.passes += index == 0
        if self.passes == self.at_pass and index == 9:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.quick(1)
@pytest.mark.parametrize("at_pass", [1, 3, 4])
def test_interrupted_run_goes_on_bitwise(tmp_path: Path, at_pass: int) -> None:
    """Two passes a checkpoint: what was finished is not computed again."""
    whole = full(build("cnn")).score(Listed(samples()), checkpoints())
    with pytest.raises(KeyboardInterrupt):
        full(build("cnn")).score(StopsAt(at_pass), checkpoints(), resume=tmp_path)
    finished = (at_pass - 1) // 2
    assert len(list(tmp_path.glob("group_*.npz"))) == finished
    again = StopsAt(-9)
    table = full(build("cnn")).score(again, checkpoints(), resume=tmp_path)
    assert same(table, whole)
    assert again.passes == 2 * (len(RATES) - finished)
    again.passes = -1
    other = full(build("cnn")).score(again, checkpoints(), resume=tmp_path, formula="official")
    torch.testing.assert_close(other.scores, expected(formula="official"), **CLOSE)
    assert again.passes == 0


@pytest.mark.exhaustive
def test_folder_of_a_different_run(tmp_path: Path) -> None:
    full(build("cnn")).score(samples(), checkpoints(), resume=tmp_path)
    for options, message in (
        ({"scope": "fc"}, "parameters was "),
        ({"autocast": torch.bfloat16}, "autocast was None and is now 'torch.bfloat16'"),
    ):
        with pytest.raises(ValueError, match=f"belongs to a different run: {message}"):
            full(build("cnn"), **options).score(samples(), checkpoints(), resume=tmp_path)
    with pytest.raises(ValueError, match="the labels of the data set differ"):
        inputs, labels = samples().tensors
        full(build("cnn")).score(
            TensorDataset(inputs, labels.flip(0)),
            [*checkpoints(), checkpoints()[0]],
            resume=tmp_path,
        )
    with pytest.raises(ValueError, match="gradient was 'full' and is now None"):
        MoSoScorer(build("cnn"), progress=False).score(samples(), checkpoints(), resume=tmp_path)


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.square().sum(1)


def cubes(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.abs().pow(3).sum(1)


class Powers:
    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.square().sum(1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"loss": squares}, {"loss": cubes}, "loss was 'callable squares' and is now 'callable cu"),
        ({"loss": Powers()}, {"loss": squares}, "loss was 'callable Powers' and is now 'callable"),
        ({"loss": squares}, {}, "loss was 'callable squares' and is now 'cross_entropy'"),
        ({}, {"chunk_size": 2}, "chunk_size was None and is now 2"),
        ({}, {"views": 2}, "views was '1' and is now '2, seed 0'"),
        ({}, {"per": "sample"}, "per was 'token' and is now 'sample'"),
        ({}, {"dtype": torch.float32}, r"dtype was None and is now 'torch\.float32'"),
    ],
)
def test_every_setting_that_decides_the_statistics_binds(
    tmp_path: Path, first: dict, then: dict, message: str
) -> None:
    full(build("cnn"), **first).score(samples(), checkpoints(), resume=tmp_path)
    with pytest.raises(ValueError, match=f"belongs to a different run: .*{message}"):
        full(build("cnn"), **then).score(samples(), checkpoints(), resume=tmp_path)


@pytest.mark.exhaustive
def test_the_seed_of_the_views_binds(tmp_path: Path) -> None:
    scorer = full(build("cnn"), views=2)
    scorer.score(samples(), checkpoints(), resume=tmp_path, seed=1)
    with pytest.raises(ValueError, match="views was '2, seed 1' and is now '2, seed 5'"):
        scorer.score(samples(), checkpoints(), resume=tmp_path, seed=5)
