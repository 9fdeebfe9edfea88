"""The demonstration's work: what it trains, scores, keeps and times, with parts that watch."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from demo_cases import CONFIG, made_up
from torch import nn

from moso_fast.demo import experiment, timing
from moso_fast.demo.data import flip_labels, load_digits
from moso_fast.demo.experiment import PRUNING_METHODS, SUSPICION_SCORES, DemoConfig, run_demo
from moso_fast.demo.model import SmallCNN, accuracy, train_network
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.surrogate.training import Surrogate, sample_positions
from moso_fast.tables.table import ScoreTable


class Clock:
    """Seconds that pass when something is said to take them."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (experiment, timing):
        monkeypatch.setattr(module, "time", made)
    return made


def test_the_split_of_the_digits() -> None:
    digits = load_digits()
    assert digits.train_images.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
    same = load_digits(0)
    assert torch.equal(same.train_images, digits.train_images)
    # Images kept their labels: every one is found in the original under its class.
    from sklearn.datasets import load_digits as original

    bunch = original()
    known = {tuple(row): int(label) for row, label in zip(bunch.data, bunch.target, strict=True)}
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        rows = (16 * images.flatten(1)).tolist()
        assert [known[tuple(row)] for row in rows] == labels.tolist()


def test_labels_are_flipped_to_any_other_class() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    flipped, mask = flip_labels(labels, 0.25)
    assert int(mask.sum()) == 250 and int(labels.sum()) == 0
    assert flipped[mask].unique().tolist() == list(range(1, 10))
    assert torch.equal(flip_labels(labels, 0.25, seed=0)[0], flipped)
    assert flip_labels(labels, 0.5, num_classes=3)[0].unique().tolist() == [0, 1, 2]
    assert int(flip_labels(labels[:10], 0.26)[1].sum()) == 3  # rounded
    wrapped, _ = flip_labels(torch.full((500,), 9), 1.0)
    assert wrapped.unique().tolist() == list(range(9))


def test_the_shapes_of_the_network() -> None:
    net, sides = SmallCNN(), []
    for layer in net.backbone:
        layer.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:])))
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sides == [
        *[(16, 8, 8)] * 3, (16, 4, 4), *[(32, 4, 4)] * 3, (32, 2, 2), (128,), (64,), (64,),
    ]  # fmt: skip
    convolutions = [layer for layer in net.backbone if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3)] * 2
    assert all(layer.padding == (1, 1) and layer.bias is None for layer in convolutions)
    small = SmallCNN(width=4, num_features=6)
    assert small.head.weight.shape == (10, 6) and small.backbone[0].weight.shape == (4, 1, 3, 3)


class WatchedSGD(torch.optim.SGD):
    """Keeps the options of every step."""

    steps: ClassVar[list] = []

    def step(self, closure=None):
        group = self.param_groups[0]
        names = ("lr", "momentum", "weight_decay", "nesterov")
        self.steps.append(tuple(group[name] for name in names))
        assert all(p.grad is not None for p in group["params"])
        return super().step(closure)


def test_training_takes_so_many_steps_however_many_images(monkeypatch) -> None:
    monkeypatch.setattr(WatchedSGD, "steps", [])
    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    batches, training = [], []
    forward = SmallCNN.forward

    def watched(net, x):
        batches.append(x[:, 0, 0, 0])
        training.append(net.training)
        return forward(net, x)

    monkeypatch.setattr(SmallCNN, "forward", watched)
    images = torch.arange(130.0)[:, None, None, None].expand(130, 1, 8, 8) / 130
    labels = torch.arange(130) % 10
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    net = train_network(images, labels, steps=7, seed=3)
    assert torch.equal(torch.rand(2), expected) and not net.training and all(training)
    rates = [0.05 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]
    assert [step[0] for step in WatchedSGD.steps] == pytest.approx(rates)
    assert {step[1:] for step in WatchedSGD.steps} == {(0.9, 5e-4, True)}
    # Epochs of three batches at most 64 long, which differ by one; each image once an epoch.
    sizes = [len(batch) for batch in batches]
    assert sorted(sizes[:3]) == [43, 43, 44] and len(sizes) == 7
    epochs = [torch.cat(batches[start : start + 3]) for start in (0, 3)]
    assert all(torch.equal(epoch.sort().values, images[:, 0, 0, 0]) for epoch in epochs)
    assert not torch.equal(*epochs)
    one = train_network(images[:64], labels[:64], steps=2, seed=3)
    assert [len(batch) for batch in batches[7:]] == [64, 64]
    other = train_network(images[:64], labels[:64], steps=2, seed=4)
    again = train_network(images[:64], labels[:64], steps=2, seed=3)
    weights = [net.head.weight for net in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_step_goes_down_the_mean_loss_of_its_batch(monkeypatch) -> None:
    """By hand for one step of one batch: gradient, decay and Nesterov's look ahead."""
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    start = train_network(images, labels, steps=0, seed=5)
    moved = train_network(images, labels, steps=1, seed=5)
    net = SmallCNN().train()
    net.load_state_dict(start.state_dict())
    F.cross_entropy(net(images), labels).backward()
    for (name, before), after in zip(net.named_parameters(), moved.parameters(), strict=True):
        gradient = before.grad + 5e-4 * before
        expected = before - 0.05 * (gradient + 0.9 * gradient)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = torch.tensor([[3.0, 1, 0], [0.0, 2, 1], [0.0, 2, 5]])
    assert accuracy(nn.Identity(), logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_both_alignments_of_a_network_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (9,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallCNN().eval()
    weight, bias = net.head.weight.detach().double(), net.head.bias.detach().double()
    h = torch.cat([net.backbone(images).detach().double(), torch.ones(9, 1)], 1)
    residual = (h @ torch.cat([weight, bias[:, None]], 1).T).softmax(1) - F.one_hot(labels, 10)
    grads = (residual[:, :, None] * h[:, None, :]).flatten(1)
    expected = (grads @ grads.mean(0)).float()
    for way in (timing.autograd_alignment, timing.closed_form_alignment):
        found = way(net, images, labels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert not found.requires_grad


def surrogates(digits):
    """Two of six images, each with five checkpoints that are told apart by a bias."""
    made = []
    for part in range(2):
        points = []
        for step in range(5):
            net = SmallCNN()
            nn.init.constant_(net.head.bias, 10 * part + step)
            points.append(Checkpoint(net.state_dict(), 0.1))
        made.append(Surrogate(part, torch.arange(part, 12, 2), points, 5))
    return made


def test_what_the_clock_says_is_scaled_to_all_samples(clock, monkeypatch) -> None:
    result = made_up()
    digits = result.digits
    positions = sample_positions(5, 4, 7)
    middle = positions[2]
    spent = iter([3.0, 1.0, 2.0, 9.0, 2.0])

    def check(net, images, labels):
        assert not net.training and set(net.head.bias.tolist()) == {float(middle)}
        assert torch.equal(images, digits.train_images[::2])
        assert torch.equal(labels, digits.train_labels[::2])

    def loop(*given):
        check(*given)
        clock.now += 4.0
        return torch.tensor([1.0, 2, 3, 4, 5, -8])

    def closed_form(*given):
        check(*given)
        clock.now += next(spent)

    monkeypatch.setattr(timing, "autograd_alignment", loop)
    monkeypatch.setattr(timing, "closed_form_alignment", closed_form)
    alignment = torch.full((4, 12), 99.0)
    alignment[2, ::2] = torch.tensor([1.0, 2, 3, 4, 5, -6])
    table = ScoreTable(torch.arange(12.0), per_checkpoint={"alignment": alignment})
    found = timing.measure_timing(digits, surrogates(digits), table, 4, 7)
    assert (found.num_samples, found.num_checkpoints, found.measured_samples) == (12, 4, 6)
    # Measured on six samples at one checkpoint: eight times as much is twelve at four.
    assert found.autograd_loop == 32.0 and found.closed_form == 16.0
    assert found.difference == 0.25 and math.isnan(found.moso_fast)


def test_what_the_surrogates_are_told(clock, monkeypatch) -> None:
    digits, labels = made_up().digits, torch.arange(12) % 3
    trained, asked = [], []

    def train(factory, dataset, **options):
        assert factory is SmallCNN and torch.equal(dataset.tensors[1], labels)
        assert torch.equal(dataset.tensors[0], digits.train_images)
        trained.append(options)
        return ["surrogates"]

    def score(given, factory, dataset, **options):
        assert given == ["surrogates"] and factory is SmallCNN and dataset.tensors[1] is labels
        asked.append(options)
        clock.now += 2.0 if options["combine"] == "mean" else 40.0
        return options["combine"]

    monkeypatch.setattr(experiment, "train_surrogates", train)
    monkeypatch.setattr(experiment, "score_surrogates", score)
    found = experiment._score(CONFIG, digits, labels, 11)
    assert trained == [
        {"parts": 2, "epochs": 7, "batch_size": 64, "lr": 0.05, "seed": 11, "progress": False}
    ]
    common = {"samples": 4, "seed": 11, "progress": False}
    assert asked == [{**common, "combine": "mean"}, {**common, "combine": "zscore"}]
    assert (found.surrogates, found.mean, found.zscore) == (["surrogates"], "mean", "zscore")
    assert found.seconds == 2.0


def test_a_retraining_is_told_its_images_steps_and_seed(monkeypatch) -> None:
    result, seen = made_up(), []
    labels, kept = torch.arange(12) % 3, torch.tensor([4, 1])

    def train(images, given, **options):
        assert torch.equal(images, result.digits.train_images[kept])
        seen.append((given.tolist(), options))
        return "net"

    def measured(net, images, given):
        assert images is result.digits.test_images and given is result.digits.test_labels
        return 0.25 if net == "net" else None

    monkeypatch.setattr(experiment, "train_network", train)
    monkeypatch.setattr(experiment, "accuracy", measured)
    assert experiment._retrained(result, labels, kept, 9) == 0.25
    assert seen == [([1, 1], {"steps": 20, "seed": 9})]


def test_a_whole_run_of_parts_that_are_given(clock, monkeypatch) -> None:
    """Order, seeds, captions, and which accuracy is kept under which name."""
    digits, scored, trained, timed, ticks = load_digits(3), [], [], [], []
    count = len(digits.train_labels)
    threads = torch.get_num_threads()

    def score(config, given, labels, seed):
        assert torch.equal(given.train_images, digits.train_images)
        assert torch.get_num_threads() == 1
        scored.append((seed, labels))
        clock.now += 100.0
        values = torch.rand(count, generator=torch.Generator().manual_seed(len(scored)))
        names = ("el2n", "grand", "self_influence", "loss", "margin")
        metrics = {name: values.roll(k) for k, name in enumerate(names)}
        seconds = float(len(scored))
        return experiment._Scored(["s"], ScoreTable(values, metrics), ScoreTable(-values), seconds)

    def retrained(result, labels, kept, seed):
        trained.append((labels, kept, seed))
        return len(trained) / 1000

    def measure(given, surrogates, table, samples, seed):
        timed.append((surrogates, samples, seed, len(table)))
        return made_up().timing

    for name, function in (
        ("_score", score),
        ("_retrained", retrained),
        ("measure_timing", measure),
    ):
        monkeypatch.setattr(experiment, name, function)
    torch.set_num_threads(threads + 1)
    try:
        config = DemoConfig(seed=3, repeats=3, keeps=(0.5, 1.0), dropped=0.25, samples=4)
        result = run_demo(config, ticks.append)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert [seed for seed, _ in scored] == [3000, 3000, 3001, 3001, 3002, 3002]
    assert timed == [(["s"], 4, 3000, count)]
    assert result.seconds == 600.0 and result.timing.moso_fast == 3.0  # of 1, 3 and 5
    assert result.timing.autograd_loop == made_up().timing.autograd_loop
    assert torch.equal(
        result.table.scores, torch.rand(count, generator=torch.Generator().manual_seed(1))
    )
    once = [
        "surrogates", *["retraining on 50%"] * 5, "retraining on 100%", "surrogates",
        *["retraining without the suspicious labels"] * 9,
    ]  # fmt: skip
    assert ticks == 3 * once and len(ticks) == config.total_work()
    # Fifteen retrainings a repeat: five methods on half, one on all, nine after cleaning.
    for place, method in enumerate(PRUNING_METHODS):
        halves = [(15 * repeat + place + 1) / 1000 for repeat in range(3)]
        assert result.pruning[method] == {0.5: halves, 1.0: [0.006, 0.021, 0.036]}
    cleaned = ("nothing dropped", "random", "the flipped ones", *SUSPICION_SCORES)
    for place, name in enumerate(cleaned):
        assert result.cleaned[name] == [(15 * repeat + place + 7) / 1000 for repeat in range(3)]
    for repeat in range(3):
        own = trained[15 * repeat : 15 * repeat + 15]
        assert {seed for _, _, seed in own} == {3000 + repeat}
        flipped, mask = flip_labels(digits.train_labels, 0.1, seed=3000 + repeat)
        assert all(labels is scored[2 * repeat][1] for labels, _, _ in own[:6])
        assert all(torch.equal(labels, flipped) for labels, _, _ in own[6:])
        assert [len(kept) for _, kept, _ in own[:6]] == [600] * 5 + [1200]
        assert [len(kept) for _, kept, _ in own[6:]] == [1200, 900, 1200 - int(mask.sum())] + [
            900
        ] * 6
        if repeat == 0:
            assert torch.equal(result.flipped_mask, mask)
    randoms = [trained[15 * repeat + 2][1] for repeat in range(3)]
    assert not torch.equal(randoms[0], randoms[1])
    scores = torch.rand(count, generator=torch.Generator().manual_seed(2))
    expected = {"MoSo": -scores, "MoSo (zscore)": scores, "self_influence": scores.roll(2),
                "EL2N": scores, "loss": scores.roll(3), "margin": -scores.roll(4)}  # fmt: skip
    assert list(result.flipped_scores) == list(expected)
    for name, values in expected.items():
        assert torch.equal(result.flipped_scores[name], values)
        assert len(result.auroc[name]) == len(result.found[name]) == 3
        # By counting pairs of a flipped and a correct label.
        wrong, right = values[result.flipped_mask], values[~result.flipped_mask]
        pairs = (wrong[:, None] > right).double().mean()
        assert result.auroc[name][0] == pytest.approx(float(pairs))
        worst = values.argsort(descending=True)[:300]
        assert result.found[name][0] == pytest.approx(
            float(result.flipped_mask[worst].sum() / result.flipped_mask.sum())
        )


def test_the_quick_demonstration() -> None:
    quick = DemoConfig.quick()
    assert quick == DemoConfig(0, 2, (0.2, 0.6, 1.0), 4, 6, 3, 40, 0.1, 0.2)
    assert DemoConfig.quick(9).seed == 9
