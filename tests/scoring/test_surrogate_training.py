"""Surrogate training (Algorithm 1): parts, rates, seeds and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from surrogate_cases import QUICK, C, D, N, Net, Watched, same, samples, weights
from torch.utils.data import Dataset, TensorDataset

from moso_fast.scoring.partition import partition_ids
from moso_fast.surrogate.training import train_surrogates


@pytest.fixture
def data():
    return samples()


class WatchedSGD(torch.optim.SGD):
    """Records the learning rate of every step that training takes."""

    used: list[tuple[float, ...]]

    def step(self, closure=None):
        group = self.param_groups[0]
        names = ("lr", "momentum", "weight_decay", "nesterov")
        self.used.append(tuple(group[n] for n in names))
        return super().step(closure)


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
