"""Surrogate training (Algorithm 1) and scoring of each part by its own surrogate."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from moso_fast.scoring.partition import partition_ids
from moso_fast.surrogate.training import (
    Surrogate,
    sample_positions,
    score_surrogates,
    train_surrogates,
)

N, D, C = 31, 6, 3
QUICK = {"parts": 3, "epochs": 4, "batch_size": 4, "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(N, D, generator=generator)
    return TensorDataset(inputs, torch.randint(C, (N,), generator=generator))


class Watched(Dataset):
    """Counts reads of every item and can stop a run like Ctrl-C would."""

    def __init__(self, dataset, stop_after=math.inf):
        self.dataset, self.reads, self.stop_after = dataset, [], stop_after

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if len(self.reads) >= self.stop_after:
            raise KeyboardInterrupt
        self.reads.append(index)
        return self.dataset[index]


class WatchedSGD(torch.optim.SGD):
    """Records the learning rate of every step that training takes."""

    used: list[tuple[float, ...]]

    def step(self, closure=None):
        group = self.param_groups[0]
        names = ("lr", "momentum", "weight_decay", "nesterov")
        self.used.append(tuple(group[n] for n in names))
        return super().step(closure)


def weights(surrogates):
    return [c.source for s in surrogates for c in s.checkpoints]


def same(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_parts_are_the_seeded_partition(data):
    surrogates = train_surrogates(Net, data, **QUICK, seed=3)
    ids = partition_ids(N, 3, 3)
    assert [s.part for s in surrogates] == [0, 1, 2]
    for surrogate in surrogates:
        assert torch.equal(surrogate.index, torch.nonzero(ids == surrogate.part).squeeze(1))


def test_cosine_learning_rate_per_step_and_recorded_with_each_checkpoint(data, monkeypatch):
    WatchedSGD.used = []
    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    surrogates = train_surrogates(
        Net, data, **QUICK, lr=0.2, min_lr=0.01, momentum=0.8, weight_decay=1e-3
    )
    for number, surrogate in enumerate(surrogates):
        per_epoch = math.ceil(len(surrogate.index) / 4)
        steps = 4 * per_epoch
        assert surrogate.num_steps == steps
        used = WatchedSGD.used[number * steps : (number + 1) * steps]
        expected = [0.01 + 0.19 * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
        assert [u[0] for u in used] == pytest.approx(expected, rel=1e-12)
        assert {u[1:] for u in used} == {(0.8, 1e-3, True)}
        assert [c.step for c in surrogate.checkpoints] == [e * per_epoch for e in (1, 2, 3, 4)]
        assert [c.lr for c in surrogate.checkpoints] == [
            used[c.step - 1][0] for c in surrogate.checkpoints
        ]
    assert len(WatchedSGD.used) == sum(s.num_steps for s in surrogates)


def test_checkpoints_are_the_weights_at_those_moments(data):
    seen = []

    class Followed(Net):
        def forward(self, x):
            if self.training:
                seen.append({k: v.clone() for k, v in self.state_dict().items()})
            return super().forward(x)

    (surrogate,) = train_surrogates(Followed, data, parts=1, epochs=3, batch_size=8, progress=False)
    # The weights kept after epoch e are those that the first forward of epoch e + 1 starts from.
    first, second = (seen[c.step] for c in surrogate.checkpoints[:-1])
    assert same([first, second], [c.source for c in surrogate.checkpoints[:-1]])
    assert not same([first], [surrogate.checkpoints[-1].source])


def test_same_seed_same_weights_and_global_generator_untouched(data):
    torch.manual_seed(11)
    expected_next = torch.rand(3)
    torch.manual_seed(11)
    first = train_surrogates(Net, data, **QUICK, seed=1)
    assert torch.equal(torch.rand(3), expected_next)
    assert same(weights(first), weights(train_surrogates(Net, data, **QUICK, seed=1)))
    other = train_surrogates(Net, data, **QUICK, seed=2)
    assert not same(weights(first)[-1:], weights(other)[-1:])


def test_all_parts_start_from_the_same_weights_and_read_only_their_samples(data):
    starts = []

    def factory():
        net = Net()
        starts.append({k: v.clone() for k, v in net.state_dict().items()})
        return net

    watched = Watched(data)
    surrogates = train_surrogates(factory, watched, **QUICK)
    assert same(starts[:2], starts[1:])
    expected = [i for s in surrogates for _ in range(4) for i in s.index.tolist()]
    for s, start in zip(surrogates, (0, 44, 84), strict=True):
        reads = watched.reads[start : start + 4 * len(s.index)]
        assert sorted(reads) == sorted(s.index.tolist() * 4)
    assert len(watched.reads) == len(expected)


@pytest.mark.exhaustive
def test_it_learns():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, D, generator=generator)
    labels = (inputs[:, :C]).argmax(dim=1)
    surrogates = train_surrogates(
        Net, TensorDataset(inputs, labels), parts=2, epochs=30, batch_size=16, progress=False
    )
    for surrogate in surrogates:
        net = Net().eval()
        net.load_state_dict(surrogate.checkpoints[-1].source)
        own = surrogate.index
        assert (net(inputs[own]).argmax(1) == labels[own]).float().mean() > 0.9


@pytest.mark.parametrize(("num_samples", "batch_size"), [(9, 4), (5, 4), (10, 3), (3, 256)])
def test_no_batch_of_a_single_sample(num_samples, batch_size):
    sizes = []

    class Sized(Net):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    dataset = TensorDataset(torch.randn(num_samples, D), torch.zeros(num_samples).long())
    train_surrogates(
        Sized, dataset, parts=1, epochs=1, batch_size=batch_size, lr=0.01, progress=False
    )
    assert sum(sizes) == num_samples
    assert min(sizes) > 1
    assert max(sizes) <= batch_size


@pytest.mark.parametrize(
    ("every", "kept"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_every_keeps_the_last_epoch_too(data, every, kept):
    (surrogate,) = train_surrogates(
        Net, data, parts=1, epochs=5, batch_size=N, every=every, progress=False
    )
    assert [c.step for c in surrogate.checkpoints] == kept


@pytest.mark.exhaustive
def test_training_transform_is_seeded_and_used_in_training(data):
    def jitter(x):
        return x + torch.randn_like(x)

    plain = train_surrogates(Net, data, **QUICK)
    first = train_surrogates(Net, data, **QUICK, train_transform=jitter)
    again = train_surrogates(Net, data, **QUICK, train_transform=jitter)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(plain))


def test_workers_give_the_same_weights(data):
    serial = train_surrogates(Net, data, parts=1, epochs=1, batch_size=8, progress=False)
    workers = train_surrogates(
        Net, data, parts=1, epochs=1, batch_size=8, num_workers=1, progress=False
    )
    assert same(weights(serial), weights(workers))


@pytest.mark.exhaustive
def test_soft_labels(data):
    inputs, labels = data.tensors
    soft = TensorDataset(inputs, F.one_hot(labels, C).float())
    hard = weights(train_surrogates(Net, data, **QUICK))
    for a, b in zip(hard, weights(train_surrogates(Net, soft, **QUICK)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_files_have_the_authors_layout_and_the_same_weights(data, tmp_path):
    kept = train_surrogates(Net, data, **QUICK, every=2)
    filed = train_surrogates(Net, data, **QUICK, every=2, out=tmp_path / "s")
    names = {p.name for p in (tmp_path / "s").iterdir()}
    trials = {f"trial_{part}_{epoch}.pth" for part in range(3) for epoch in (2, 4)}
    assert names == trials | {"manifest.json", "partition.pt"}
    for in_memory, in_file in zip(kept, filed, strict=True):
        for a, b in zip(in_memory.checkpoints, in_file.checkpoints, strict=True):
            content = torch.load(b.source, weights_only=True)
            assert set(content) == {"net", "lr", "epoch"}
            assert same([a.source], [content["net"]])
            assert content["lr"] == [b.lr] == [a.lr]
            assert b.step == a.step == content["epoch"] * math.ceil(len(in_file.index) / 4)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["parts"], manifest["num_samples"]) == (0, 3, N)
    partition = torch.load(tmp_path / "s" / "partition.pt", weights_only=True)
    assert torch.equal(partition, partition_ids(N, 3, 0))


@pytest.mark.exhaustive
def test_finished_parts_are_not_trained_again(data, tmp_path):
    first = train_surrogates(Net, data, **QUICK, out=tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    (tmp_path / "trial_1_4.pth").unlink()
    watched = Watched(data)
    again = train_surrogates(Net, watched, **QUICK, out=tmp_path)
    # All labels are probed once for the manifest (N <= 64); then only part 1 is read.
    assert sorted(watched.reads[:N]) == list(range(N))
    assert set(watched.reads[N:]) == set(again[1].index.tolist())
    for path in tmp_path.iterdir():
        if not path.name.startswith("trial_1_"):
            assert path.stat().st_mtime_ns == before[path.name][0]
    loaded = torch.load(tmp_path / "trial_1_4.pth", weights_only=True)["net"]
    assert same([loaded], weights(train_surrogates(Net, data, **QUICK))[7:8])
    assert [c.lr for s in again for c in s.checkpoints] == [
        c.lr for s in first for c in s.checkpoints
    ]


@pytest.mark.exhaustive
def test_killed_run_continues_with_the_same_result(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_surrogates(Net, Watched(data, stop_after=N + 60), **QUICK, out=tmp_path)
    assert (tmp_path / "trial_0_4.pth").exists()
    assert not (tmp_path / "trial_2_1.pth").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    expected = weights(train_surrogates(Net, data, **QUICK))
    files = [tmp_path / f"trial_{p}_{e}.pth" for p in range(3) for e in (1, 2, 3, 4)]
    assert same([torch.load(f, weights_only=True)["net"] for f in files], expected)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"lr": 0.05}, "lr is 0.1 there and 0.05 here"),
        ({"train_transform": torch.neg}, "train_transform is"),
    ],
)
def test_folder_of_another_run_is_refused(data, tmp_path, change, key):
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    with pytest.raises(ValueError, match=key):
        train_surrogates(Net, data, **{**QUICK, **change}, out=tmp_path)


def test_folder_of_other_labels_or_another_network_is_refused(data, tmp_path):
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    inputs, labels = data.tensors
    with pytest.raises(ValueError, match="labels_sha256"):
        train_surrogates(Net, TensorDataset(inputs, (labels + 1) % C), **QUICK, out=tmp_path)
    with pytest.raises(ValueError, match="model_sha256"):
        train_surrogates(lambda: nn.Linear(D, C), data, **QUICK, out=tmp_path)


def test_folder_without_or_with_a_broken_manifest_is_refused(data, tmp_path):
    (tmp_path / "trial_0_1.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        train_surrogates(Net, data, **QUICK, out=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable manifest"):
        train_surrogates(Net, data, **QUICK, out=tmp_path)


class Triples(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.zeros(D), 0, "extra"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


class Tuples(Net):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parts": 0}, ValueError, "parts: expected a positive int, got 0"),
        ({"parts": 2.0}, TypeError, "parts: expected an int, got 2.0"),
        ({"parts": 16}, ValueError, "16 parts of 31 samples leave fewer than 2"),
        ({"epochs": 0}, ValueError, "epochs: expected a positive int"),
        ({"batch_size": True}, TypeError, "batch_size: expected an int"),
        ({"every": -1}, ValueError, "every: expected a positive int"),
        ({"seed": -1}, ValueError, "seed: expected an int of at least 0, got -1"),
        ({"lr": 0.0}, ValueError, "lr: expected a finite float that is positive"),
        ({"lr": "0.1"}, TypeError, "lr: expected a float"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay: expected a finite float"),
        ({"min_lr": 0.5}, ValueError, "min_lr: expected at most lr"),
        ({"momentum": 0.0}, ValueError, "nesterov: needs momentum > 0"),
        ({"model_factory": Net()}, TypeError, "expected a function that returns a new nn.Module"),
        ({"model_factory": dict}, TypeError, "must return an nn.Module, got dict"),
        ({"model_factory": Tuples}, TypeError, "must return the logits as a tensor, got tuple"),
        ({"dataset": Stream()}, TypeError, "expected a map-style data set"),
        ({"dataset": Triples()}, TypeError, r"item \d+ must be a pair .* got tuple of 3"),
        ({"lr": 1e30}, ValueError, "training of part 0 diverged: loss .* lower lr"),
    ],
)
def test_bad_arguments_are_named(data, arguments, error, message):
    given = {"model_factory": Net, "dataset": data, **QUICK, **arguments}
    with pytest.raises(error, match=message):
        train_surrogates(**given)


def brute_force(surrogates, positions, data):
    """Paper's equation by autograd of every sample's head gradient, one part at a time."""
    inputs, labels = data.tensors
    scores = torch.full((N,), math.nan, dtype=torch.float64)
    for s in surrogates:
        total = torch.zeros(len(s.index), dtype=torch.float64)
        for position in positions:
            net = Net().eval()
            net.load_state_dict(s.checkpoints[position].source)
            net.double()
            rows = []
            for i in s.index.tolist():
                loss = F.cross_entropy(net(inputs[i : i + 1].double()), labels[i : i + 1])
                grads = torch.autograd.grad(loss, list(net.head.parameters()))
                rows.append(torch.cat([g.flatten() for g in grads]))
            g = torch.stack(rows)
            for i in range(len(g)):
                others = torch.cat([g[:i], g[i + 1 :]]).mean(dim=0)
                total[i] += s.checkpoints[position].lr * (others @ g[i])
        scores[s.index] = total / len(positions)
    return scores


def test_scores_are_those_of_each_parts_own_surrogate(data):
    surrogates = train_surrogates(Net, data, **QUICK, lr=0.05)
    table = score_surrogates(surrogates, Net, data, samples=3, seed=4, progress=False)
    expected = brute_force(surrogates, sample_positions(4, 3, 4), data)
    assert torch.equal(table.index, torch.arange(N))
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-4, atol=1e-6)
    assert table.per_checkpoint["alignment"].shape == (3, N)


@pytest.mark.exhaustive
def test_scorer_arguments_are_passed_on(data):
    surrogates = train_surrogates(Net, data, **QUICK)
    plain = score_surrogates(surrogates, Net, data, samples=None, progress=False)
    aligned = score_surrogates(
        surrogates, Net, data, samples=None, formula="alignment", head="head", progress=False
    )
    assert torch.equal(plain.per_checkpoint["alignment"], aligned.per_checkpoint["alignment"])
    assert not torch.equal(plain.scores, aligned.scores)
    zscore = score_surrogates(surrogates, Net, data, samples=2, combine="zscore", progress=False)
    for surrogate in surrogates:
        assert abs(zscore.scores[surrogate.index].mean()) < 1e-5


@pytest.mark.exhaustive
def test_scoring_continues_from_its_folder(data, tmp_path):
    surrogates = train_surrogates(Net, data, **QUICK)
    once = score_surrogates(surrogates, Net, data, samples=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        watched = Watched(data, stop_after=50)
        score_surrogates(surrogates, Net, watched, samples=2, resume=tmp_path, progress=False)
    watched = Watched(data)
    again = score_surrogates(surrogates, Net, watched, samples=2, resume=tmp_path, progress=False)
    assert torch.equal(once.scores, again.scores)
    # Each part also compares its samples with those of the folder: N more than a run anew.
    assert len(watched.reads) < N + 2 * N


def test_sample_positions():
    drawn = [sample_positions(50, 10, seed) for seed in range(20)]
    assert all(d == sorted(set(d)) and len(d) == 10 and d[0] >= 0 and d[-1] < 50 for d in drawn)
    assert len({tuple(d) for d in drawn}) == 20
    assert sample_positions(50, 10, 3) == drawn[3]
    assert sample_positions(4, None) == sample_positions(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (5, ValueError, "samples: expected 1 to 4, .* got 5"),
        (0, ValueError, "samples: expected 1 to 4"),
        (2.0, TypeError, "samples: expected an int or None, got 2.0"),
    ],
)
def test_bad_samples_are_named(data, samples, error, message):
    surrogates = train_surrogates(Net, data, **QUICK)
    with pytest.raises(error, match=message):
        score_surrogates(surrogates, Net, data, samples=samples)


def test_surrogates_that_do_not_fit_are_refused(data):
    surrogates = train_surrogates(Net, data, **QUICK)
    first, *others = surrogates
    short = Surrogate(first.part, first.index, first.checkpoints[:2], first.num_steps)
    small = TensorDataset(*(t[:20] for t in data.tensors))
    with pytest.raises(ValueError, match="surrogates: expected at least one"):
        score_surrogates([], Net, data)
    with pytest.raises(ValueError, match="same number of checkpoints for every part"):
        score_surrogates([short, *others], Net, data)
    with pytest.raises(ValueError, match="dataset: has 20 samples, but part 0 holds index"):
        score_surrogates(surrogates, Net, small)


def test_every_part_and_every_seed_has_an_order_of_its_own():
    """Two parts of equal size, whose samples are the same, still see them in another order."""
    inputs = torch.arange(24.0).reshape(12, 2)[:, :1].expand(12, D)
    data = TensorDataset(inputs, torch.zeros(12, dtype=torch.int64))
    orders = {}
    for seed in (0, 1):
        watched = Watched(data)
        surrogates = train_surrogates(
            Net, watched, parts=3, epochs=2, batch_size=2, progress=False, seed=seed
        )
        for part, surrogate in enumerate(surrogates):
            reads = watched.reads[8 * part : 8 * part + 8]
            place = {int(at): k for k, at in enumerate(surrogate.index)}
            orders[seed, part] = [place[at] for at in reads]
    assert len(set(map(tuple, orders.values()))) == len(orders)


def test_dropout_differs_from_part_to_part():
    """The global generator, which a network draws from, is seeded by the part as well."""
    drawn = []

    class Drawing(Net):
        def forward(self, x):
            if self.training:
                drawn.append(float(torch.rand(())))
            return super().forward(x)

    inputs = torch.zeros(12, D)
    train_surrogates(
        Drawing, TensorDataset(inputs, torch.zeros(12).long()),
        parts=3, epochs=1, batch_size=4, progress=False,
    )  # fmt: skip
    assert len(drawn) == len(set(drawn)) == 3


def test_an_index_just_outside_the_data_set(data):
    """The first index that is not there, and the last that is."""
    surrogates = train_surrogates(Net, data, **QUICK)
    last = next(s for s in surrogates if N - 1 in s.index)
    short = TensorDataset(*(t[: N - 1] for t in data.tensors))
    message = f"dataset: has {N - 1} samples, but part {last.part} holds index {N - 1}"
    with pytest.raises(ValueError, match=message):
        score_surrogates(surrogates, Net, short)
    table = score_surrogates(surrogates, Net, data, samples=None)
    assert table.index.tolist() == list(range(N))
