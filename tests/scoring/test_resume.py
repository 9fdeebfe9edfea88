"""A scoring run that was killed goes on and ends with bitwise the same table."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import moso_fast
from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.tables.table import ScoreTable

N, CHECKPOINTS = 20, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.fc = nn.Linear(6, 3)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.fc(torch.relu(self.body(x)))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (N,), generator=generator)
    return TensorDataset(torch.randn(N, 5, generator=generator), labels)


def checkpoints(frozen: bool = False) -> list[Checkpoint]:
    generator = torch.Generator().manual_seed(1)
    first = {n: torch.randn(t.shape, generator=generator) for n, t in Net().state_dict().items()}
    result = []
    for k in range(CHECKPOINTS):
        moving = {
            n: t + 0.1 * k * torch.randn(t.shape, generator=generator) for n, t in first.items()
        }
        if frozen and k != 3:
            moving |= {n: t for n, t in first.items() if n.startswith("body")}
        result.append(Checkpoint(moving, lr=0.1 / (k + 1)))
    return result


class StopsAt(Dataset):
    """The data set, until a sample of some pass raises KeyboardInterrupt."""

    def __init__(self, at_pass: int) -> None:
        # Before the first pass some samples are read, to compare them with those of the folder.
        self.base, self.at_pass, self.passes = data(), at_pass, -1

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.passes += index == 0
        if self.passes == self.at_pass and index == 9:
            raise KeyboardInterrupt
        return self.base[index]


def score(
    folder: Path | None, dataset: Any = None, model: Net | None = None, **changes: Any
) -> Any:
    options = {name: changes.pop(name) for name in ("loss", "label_smoothing") if name in changes}
    arguments = {"checkpoints": checkpoints(), "partition": 2, "resume": folder, **changes}
    scorer = MoSoScorer(model or Net(), batch_size=8, progress=False, **options)
    return scorer.score(data() if dataset is None else dataset, **arguments)


def same(one: ScoreTable, other: ScoreTable) -> bool:
    pairs = [(one.scores, other.scores)]
    pairs += [(one.metrics[name], other.metrics[name]) for name in other.metrics]
    pairs += [
        (one.per_checkpoint[name], other.per_checkpoint[name]) for name in other.per_checkpoint
    ]
    facts = one.provenance == other.provenance
    return facts and all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("at_pass", [1, 2])
def test_interrupted_run_goes_on_bitwise(tmp_path: Path, frozen: bool, at_pass: int) -> None:
    steps = checkpoints(frozen)
    expected = score(None, checkpoints=steps)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, StopsAt(at_pass), checkpoints=steps)
    finished = sorted(path.name for path in tmp_path.glob("group_*.npz"))
    # A frozen backbone makes one group of the first three checkpoints.
    assert finished == ["group_00000.npz"][: at_pass - 1]
    model = Net()
    assert same(score(tmp_path, model=model, checkpoints=steps), expected)
    passes = (2 if frozen else CHECKPOINTS) - len(finished)
    assert model.forwards == 3 * passes
    model.forwards = 0
    assert same(score(tmp_path, model=model, checkpoints=iter(steps)), expected)
    assert model.forwards == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_killed_at_any_write(tmp_path: Path, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stops just before each file would be moved into place, one after the other."""
    steps = checkpoints(frozen)
    expected = score(None, checkpoints=steps)
    replace, writes = os.replace, 3 if frozen else CHECKPOINTS + 1
    for stop in range(writes):
        left = stop

        def stopping(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            replace(*arguments)

        monkeypatch.setattr(os, "replace", stopping)
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            score(folder, checkpoints=steps)
        monkeypatch.setattr(os, "replace", replace)
        assert len(list(folder.iterdir())) == stop
        assert same(score(folder, checkpoints=steps), expected)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_resume

class Kills(test_resume.StopsAt):
    def __getitem__(self, index):
        try:
            return super().__getitem__(index)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGKILL)

test_resume.score({folder!r}, Kills(3))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(moso_fast.__file__).parents[1])]
    script = KILLED.format(paths=paths, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.glob("group_*.npz"))) == 2
    model = Net()
    assert same(score(tmp_path, model=model), score(None))
    assert model.forwards == 3 * (CHECKPOINTS - 2)


def test_other_formulas_rates_and_more_checkpoints_use_what_is_there(tmp_path: Path) -> None:
    steps = checkpoints()
    score(tmp_path, checkpoints=steps[:3])
    for formula in ("one_step", "official_exact"):
        model = Net()
        faster = [Checkpoint(c.source, lr=2 * c.lr) for c in steps]
        changes: dict[str, Any] = {"formula": formula, "combine": "zscore", "num_steps": 10}
        table = score(tmp_path, model=model, checkpoints=faster, **changes)
        assert model.forwards == (3 if formula == "one_step" else 0)
        assert same(table, score(None, checkpoints=faster, **changes))


def with_other_labels() -> TensorDataset:
    inputs, labels = data().tensors
    return TensorDataset(inputs, 2 - labels)


def with_other_inputs(changed: slice = slice(None)) -> TensorDataset:
    inputs, labels = (t.clone() for t in data().tensors)
    inputs[changed] = (inputs[changed] - 0.5) / 0.1
    return TensorDataset(inputs, labels)


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 7), nn.Linear(7, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing was 0.0 and is now 0.1"),
        ({"partition": 4}, "partition was '"),
        ({"partition": None}, "and is now 'none'"),
        ({"dataset": TensorDataset(*data()[:16])}, "samples was 20 and is now 16"),
        ({"dataset": with_other_inputs()}, "inputs was 'digest .* of 20 samples' and is now"),
        ({"dataset": with_other_inputs(slice(19, 20))}, "inputs was 'digest"),
        ({"dataset": with_other_labels()}, "the labels of the data set differ"),
        ({"checkpoints": checkpoints()[::-1]}, "checkpoint 0 .* has other weights than the one"),
        ({"checkpoints": checkpoints()[:1]}, "it holds more checkpoints than the 1 given"),
        ({"model": Wider(), "checkpoints": None}, r"model was \{"),
    ],
)
def test_folder_of_a_different_run(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, StopsAt(3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to a different run: .*{message}") as caught:
        score(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_run_that_failed_before_its_first_result_binds_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, StopsAt(1))
    changes = {"partition": 4, "label_smoothing": 0.1}
    assert same(score(tmp_path, **changes), score(None, **changes))
    with pytest.raises(ValueError, match=r"label_smoothing was 0\.1 and is now 0\.0"):
        score(tmp_path, partition=4)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        score(tmp_path / "file")
    folder = tmp_path / "folder"
    score(folder)
    whole = (folder / "group_00001.npz").read_bytes()
    (folder / "group_00001.npz").write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"group_00001\.npz is damaged; delete it"):
        score(folder)
    (folder / "manifest.json").write_text("[")
    with pytest.raises(ValueError, match="is not a manifest of an earlier run"):
        score(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds group_\*\.npz but no manifest\.json"):
        score(folder)


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    table = score(tmp_path / "a" / "b")
    assert same(table, score(None))


def test_in_memory_states_are_told_apart_by_their_values(tmp_path: Path) -> None:
    steps = checkpoints()
    score(tmp_path, checkpoints=steps)
    changed = copy.deepcopy(steps[2].source)
    changed["body.bias"][0] += 1e-6

    def stream() -> Iterator[Checkpoint]:
        yield from steps[:2]
        yield Checkpoint(changed, lr=0.1)

    with pytest.raises(ValueError, match=r"checkpoint 2 \(a state dict in memory\) has other w"):
        score(tmp_path, checkpoints=stream())


def test_numbers_of_the_samples_of_a_run_without_results_are_not_taken_over(tmp_path: Path) -> None:
    class Numbered(StopsAt):
        def __getitem__(self, index: int) -> Any:
            return (*super().__getitem__(index), 100 + index)

    assert score(tmp_path, Numbered(9)).index[0] == 100
    assert (tmp_path / "index.npy").exists()
    for group in tmp_path.glob("group_*.npz"):
        group.unlink()
    table = score(tmp_path, label_smoothing=0.1)
    assert same(table, score(None, label_smoothing=0.1))
    assert table.index.tolist() == list(range(N))


def test_a_data_set_that_draws_at_random_is_named_as_the_cause(tmp_path: Path) -> None:
    class Drawn(StopsAt):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return x + torch.rand(5), y

    score(tmp_path, Drawn(9))
    torch.rand(1)
    with pytest.raises(ValueError, match="if the data set draws at random") as caught:
        score(tmp_path, Drawn(9))
    assert "\n" not in str(caught.value)


def test_a_group_that_reaches_beyond_the_checkpoints_given(tmp_path: Path) -> None:
    """Heads over one backbone are stored together: fewer of them are another run too."""
    steps = checkpoints(frozen=True)
    score(tmp_path, checkpoints=steps)
    assert [path.name for path in sorted(tmp_path.glob("group_*"))] == [
        "group_00000.npz",
        "group_00003.npz",
    ]
    (tmp_path / "group_00003.npz").unlink()
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"it holds more checkpoints than the {count} given"):
            score(tmp_path, checkpoints=steps[:count])
    assert same(score(tmp_path, checkpoints=steps[:3]), score(None, checkpoints=steps[:3]))


class Stream(IterableDataset):
    """The data set, of which nobody knows beforehand how many samples it has."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([data()[k] for k in range(N)])


def test_parts_of_a_stream_are_those_of_the_folder(tmp_path: Path) -> None:
    """The ids of parts are not known before the stream was read: number and seed stand for them."""
    table = score(tmp_path, Stream(), partition=2, seed=3)
    assert same(score(tmp_path, Stream(), partition=2, seed=3), table)
    for changes, said in (
        ({"partition": 3, "seed": 3}, "partition was '2, seed 3' and is now '3, seed 3'"),
        ({"partition": 2, "seed": 4}, "partition was '2, seed 3' and is now '2, seed 4'"),
        ({"partition": None, "seed": 3}, "partition was '2, seed 3' and is now 'none'"),
    ):
        with pytest.raises(ValueError, match=f"belongs to a different run: {said}"):
            score(tmp_path, Stream(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, r"dtype was None and is now 'torch\.float64'"),
        ({"shift_labels": True}, "shift_labels was False and is now True"),
        ({"per": "sample"}, "per was 'token' and is now 'sample'"),
        ({"chunk_size": 3}, "chunk_size was None and is now 3"),
        ({"backend": "torch"}, "backend was 'auto' and is now 'torch'"),
        ({"feature_cache": "bfloat16"}, "feature_cache was 'auto' and is now 'bfloat16'"),
        ({"head": "body"}, "head was 'fc' and is now 'body'"),
        ({"ignore_index": 1}, "ignore_index was -100 and is now 1"),
        ({"nonfinite": "exclude"}, "nonfinite was 'raise' and is now 'exclude'"),
        ({"precision": "high"}, "precision was None and is now 'high'"),
    ],
)
def test_every_setting_that_decides_the_statistics_binds(
    tmp_path: Path, changes: dict, message: str
) -> None:
    """So a folder is not taken up where its numbers would not be those of this run."""
    given = {"batch_size": 8, "progress": False, "shift_labels": False}
    MoSoScorer(Net(), **given).score(data(), checkpoints(), resume=tmp_path)
    other = MoSoScorer(Net(), **{**given, **changes})
    with pytest.raises(ValueError, match=f"belongs to a different run: {message}"):
        other.score(data(), checkpoints(), resume=tmp_path)
