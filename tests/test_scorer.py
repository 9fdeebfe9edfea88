"""MoSoScorer against brute force: per-sample autograd of the head in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from moso_fast.checkpoints import Checkpoint
from moso_fast.partition import partition_ids
from moso_fast.scorer import MoSoScorer
from moso_fast.table import ScoreTable

N, CLASSES = 23, 4
RATES = (0.3, 0.1, 0.05)


class SmallNet(nn.Module):
    """Convolution, batch norm, dropout and a head; counts its forward passes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 4, CLASSES, bias=bias)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1))


def images(count: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 1, 4, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def trained(model: nn.Module, steps: int = len(RATES)) -> list[dict[str, Tensor]]:
    """State dicts along a short training, with running statistics of batch norm that move."""
    model = copy.deepcopy(model).train()
    inputs, labels = images().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def head_gradients(model: nn.Module, state: dict[str, Tensor], **loss: Any) -> Tensor:
    """Per-sample gradients of the head, (N, C * (D + 1)), by autograd in float64."""
    model = copy.deepcopy(model).double().eval()
    model.load_state_dict({n: t.double() if t.is_floating_point() else t for n, t in state.items()})
    inputs, labels = images().tensors
    rows = []
    for x, y in zip(inputs.double(), labels, strict=True):
        value = F.cross_entropy(model(x[None]), y[None], **loss)
        grads = torch.autograd.grad(value, list(model.fc.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def paper_score(gradients: Tensor) -> Tensor:
    """<mean gradient of the others, own gradient>, literally."""
    total = gradients.sum(0)
    return torch.stack([((total - g) / (len(gradients) - 1)) @ g for g in gradients])


def expected_scores(
    gradients: list[Tensor],
    ids: Tensor,
    combine: str = "mean",
    num_steps: int | None = None,
    rates: tuple[float, ...] = RATES,
) -> Tensor:
    scores = torch.zeros(N, dtype=torch.float64)
    for part in ids.unique():
        members = ids == part
        for eta, g in zip(rates, gradients, strict=True):
            s = paper_score(g[members])
            if combine == "zscore":
                s = (s - s.mean()) / s.std(unbiased=False)
            else:
                s = s * eta * (1 if num_steps is None else num_steps / int(members.sum()))
            scores[members] += s / len(gradients)
    return scores


def checkpoints_of(states: list[dict[str, Tensor]]) -> list[Checkpoint]:
    return [
        Checkpoint(s, lr=eta, step=k) for k, (s, eta) in enumerate(zip(states, RATES, strict=True))
    ]


@pytest.fixture(scope="module")
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="module")
def states(model: SmallNet) -> list[dict[str, Tensor]]:
    return trained(model)


@pytest.fixture(scope="module")
def gradients(model: SmallNet, states: list[dict[str, Tensor]]) -> list[Tensor]:
    return [head_gradients(model, state) for state in states]


def scorer(model: nn.Module, **options: Any) -> MoSoScorer:
    return MoSoScorer(model, batch_size=8, progress=False, **options)


def same_table(one: ScoreTable, other: ScoreTable) -> bool:
    """Whether two tables agree bitwise."""
    pairs = [(one.scores, other.scores)]
    for mine, theirs in ((one.metrics, other.metrics), (one.per_checkpoint, other.per_checkpoint)):
        assert mine.keys() == theirs.keys()
        pairs += [(mine[name], theirs[name]) for name in mine]
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


@pytest.mark.parametrize("partition", [None, 3, "ids"])
@pytest.mark.parametrize(("combine", "num_steps"), [("mean", None), ("mean", 70), ("zscore", None)])
def test_scores_are_those_of_per_sample_autograd(
    model: SmallNet,
    states: list,
    gradients: list,
    partition: Any,
    combine: str,
    num_steps: int | None,
) -> None:
    ids = torch.zeros(N, dtype=torch.int64)
    if partition == 3:
        ids = partition_ids(N, 3, seed=9)
    elif partition == "ids":
        ids = partition = torch.arange(N) % 2 * 40 - 7
    table = scorer(model).score(
        images(),
        checkpoints_of(states),
        partition=partition,
        combine=combine,
        num_steps=num_steps,
        seed=9,
    )
    expected = expected_scores(gradients, ids, combine, num_steps)
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)
    assert table.index.tolist() == list(range(N))
    assert table.higher_is_better


def test_double_precision_and_every_metric(model: SmallNet, states: list, gradients: list) -> None:
    table = scorer(model, dtype=torch.float64).score(images(), checkpoints_of(states))
    assert table.scores.dtype == torch.float64
    expected = expected_scores(gradients, torch.zeros(N, dtype=torch.int64))
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-13)
    square = torch.stack([g.square().sum(1) for g in gradients])
    aligned = torch.stack([g @ g.mean(0) for g in gradients])
    close = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(table.per_checkpoint["grad_sqnorm"], square, **close)
    torch.testing.assert_close(table.per_checkpoint["alignment"], aligned, **close)
    eta = torch.tensor(RATES, dtype=torch.float64)[:, None]
    torch.testing.assert_close(table.metrics["self_influence"], (eta * square).mean(0), **close)
    torch.testing.assert_close(table.metrics["grand"], square.sqrt().mean(0), **close)
    inputs, labels = images().tensors
    reference = copy.deepcopy(model).double().eval()
    losses = []
    for state in states:
        reference.load_state_dict(state)
        losses.append(F.cross_entropy(reference(inputs.double()), labels, reduction="none"))
    torch.testing.assert_close(table.per_checkpoint["loss"], torch.stack(losses).detach(), **close)


@pytest.mark.parametrize("formula", ["one_step", "official", "official_exact", "alignment"])
def test_other_formulas(model: SmallNet, states: list, gradients: list, formula: str) -> None:
    table = scorer(model).score(images(), checkpoints_of(states)[:1], formula=formula)
    g = gradients[0]
    mean, n = g.mean(0), len(g)
    a, q, g2 = g @ mean, g.square().sum(1), mean @ mean
    expected = {
        "one_step": ((n + 1) * a - n * g2 - q) / (n - 1) ** 2,
        "official": a - q / n,
        "official_exact": ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / (n - 1) ** 2,
        "alignment": a,
    }[formula]
    torch.testing.assert_close(table.scores.double(), RATES[0] * expected, rtol=2e-5, atol=2e-6)


def test_label_smoothing_no_bias_and_ignored_samples() -> None:
    torch.manual_seed(3)
    model = SmallNet(bias=False)
    inputs, labels = images().tensors
    table = scorer(model, label_smoothing=0.2).score(images())
    gradients = head_gradients(model, model.state_dict(), label_smoothing=0.2)
    expected = paper_score(gradients)
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)

    ignored = torch.arange(N) % 5 == 2
    partly = TensorDataset(inputs, torch.where(ignored, -1, labels))
    table = scorer(model, label_smoothing=0.2, ignore_index=-1).score(partly)
    assert torch.equal(table.scores.isnan(), ignored)
    expected = paper_score(gradients[~ignored])
    torch.testing.assert_close(table.scores[~ignored].double(), expected, rtol=2e-5, atol=2e-6)


def test_other_losses(model: SmallNet) -> None:
    inputs, labels = images().tensors
    targets = F.one_hot(labels, CLASSES).float()
    for loss, function in (
        ("binary_cross_entropy", F.binary_cross_entropy_with_logits),
        ("mse", F.mse_loss),
    ):
        table = scorer(model, loss=loss).score(TensorDataset(inputs, targets))
        reference = copy.deepcopy(model).eval()
        values = function(reference(inputs), targets, reduction="none").sum(1)
        torch.testing.assert_close(table.metrics["loss"], values.detach(), rtol=1e-5, atol=1e-6)


def test_model_is_left_as_it_was(states: list) -> None:
    torch.manual_seed(1)
    model = SmallNet().train()
    model.bn.eval()
    parameters = list(model.parameters())
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    before = copy.deepcopy(model.state_dict())
    copies = copy.deepcopy(states)
    scorer(model).score(images(), checkpoints_of(states))
    assert [t.data_ptr() for t in model.state_dict().values()] == addresses
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert not model.fc._forward_pre_hooks
    for state, expected in zip(states, copies, strict=True):
        assert all(torch.equal(state[n], expected[n]) for n in expected)


def test_checkpoint_that_shares_memory_with_the_model(model: SmallNet, states: list) -> None:
    """state_dict() of the model itself as one of the checkpoints: not overwritten by the others."""
    own = copy.deepcopy(model)
    mixed = [states[0], own.state_dict(), states[1]]
    table = scorer(own).score(images(), mixed)
    expected = scorer(own).score(images(), copy.deepcopy(mixed))
    assert same_table(table, expected)


class Failing(Dataset):
    """Raises at one sample of the n-th pass."""

    def __init__(self, error: type[BaseException], at_pass: int) -> None:
        self.base, self.error, self.at_pass, self.passes = images(), error, at_pass, 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.passes += index == 0
        if self.passes == self.at_pass and index == 10:
            raise self.error("stopped on purpose")
        return self.base[index]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_left_as_it_was_after_an_exception(states: list, error: type) -> None:
    torch.manual_seed(1)
    model = SmallNet().train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        scorer(model).score(Failing(error, at_pass=2), checkpoints_of(states))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert not model.fc._forward_pre_hooks


def frozen_states(model: SmallNet, count: int, share: bool) -> list[dict[str, Tensor]]:
    """Checkpoints that differ in the head alone, with the backbone shared or copied."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(count):
        state = dict(model.state_dict()) if share else copy.deepcopy(model.state_dict())
        for name in ("fc.weight", "fc.bias"):
            state[name] = torch.randn(state[name].shape, generator=generator)
        result.append(state)
    return result


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_frozen_backbone_is_run_once(model: SmallNet, share: bool, stream: bool) -> None:
    model = copy.deepcopy(model)
    states = frozen_states(model, 4, share)
    model.forwards = 0
    table = scorer(model).score(images(), iter(states) if stream else states)
    assert model.forwards == 3  # batches of one pass
    assert table.per_checkpoint["alignment"].shape == (4, N)
    for k, state in enumerate(states):
        one = scorer(model).score(images(), [state])
        for name in ("alignment", "grad_sqnorm", "loss", "score"):
            torch.testing.assert_close(
                table.per_checkpoint[name][k], one.per_checkpoint[name][0], rtol=1e-5, atol=1e-6
            )


def test_one_forward_pass_a_checkpoint_when_the_backbone_moves(states: list) -> None:
    model = SmallNet()
    scorer(model).score(images(), checkpoints_of(states))
    assert model.forwards == 3 * len(states)


def test_backbone_that_comes_back_is_run_again(model: SmallNet, states: list) -> None:
    """Groups are consecutive: a, a', b, a takes three passes and keeps the order."""
    model = copy.deepcopy(model)
    near = dict(states[0])
    near["fc.bias"] = near["fc.bias"] + 1
    model.forwards = 0
    order = [states[0], near, states[1], copy.deepcopy(states[0])]
    table = scorer(model).score(images(), order)
    assert model.forwards == 9
    single = [scorer(model).score(images(), [s]).per_checkpoint["loss"][0] for s in order]
    torch.testing.assert_close(table.per_checkpoint["loss"], torch.stack(single))


def test_large_heads_are_scored_in_several_calls(
    model: SmallNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = frozen_states(model, 5, share=True)
    together = scorer(model).score(images(), states)
    model = copy.deepcopy(model)
    monkeypatch.setattr("moso_fast._job._HEADS_BYTES", 2 * model.fc.weight.numel() * 4)
    model.forwards = 0
    apart = scorer(model).score(images(), states)
    assert model.forwards == 3
    torch.testing.assert_close(apart.scores, together.scores)
    assert apart.per_checkpoint["loss"].shape == (5, N)


@pytest.mark.parametrize("alias", ["state_dict", "data"])
def test_generator_that_trains_the_same_tensors(states: list, alias: str) -> None:
    """Every state yielded is the same memory, with other values each time."""
    torch.manual_seed(4)
    live = SmallNet()

    def train() -> Iterator[Checkpoint]:
        for state, eta in zip(states, RATES, strict=True):
            live.load_state_dict(state)
            now = live.state_dict()
            yield Checkpoint({n: t.data if alias == "data" else t for n, t in now.items()}, lr=eta)

    for scored in (live, SmallNet()):
        table = scorer(scored).score(images(), train())
        expected = scorer(live).score(images(), checkpoints_of(states))
        assert same_table(table, expected)


def test_forgotten_copy_is_pointed_out(model: SmallNet) -> None:
    with pytest.warns(UserWarning, match=r"checkpoints 0 and 1 are the same tensors"):
        scorer(model).score(images(), [model.state_dict(), model.state_dict()])


def test_head_tied_to_an_embedding() -> None:
    """A tied weight decides the features too, and may be stored under one of its names."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5)
            self.lm_head = nn.Linear(5, 9, bias=False)
            self.lm_head.weight = self.embed.weight
            self.forwards = 0

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return self.lm_head(self.embed(x).mean(1))

    torch.manual_seed(0)
    model = Tied()
    data = TensorDataset(torch.randint(9, (12, 3)), torch.randint(9, (12,)))
    values = [torch.randn(9, 5) for _ in range(2)]
    both = [{"embed.weight": v, "lm_head.weight": v} for v in values]
    one = [{"embed.weight": values[0]}, {"lm_head.weight": values[1]}]
    table = scorer(model).score(data, both)
    assert model.forwards == 4
    assert same_table(scorer(model).score(data, one), table)
    inputs, labels = data.tensors
    logits = torch.stack([v[inputs].mean(1) @ v.T for v in values])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(2), reduction="none")
    torch.testing.assert_close(table.per_checkpoint["loss"].flatten(), losses)


class TinyForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.lm_head = nn.Linear(5, 7, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.embed(input_ids)))


@pytest.mark.parametrize("shift", ["auto", False])
@pytest.mark.parametrize("partition", [None, 2])
def test_sequences(shift: Any, partition: int | None) -> None:
    """A sequence is one sample: its gradient is the sum over its counted tokens."""
    torch.manual_seed(0)
    model = TinyForCausalLM()
    ids = torch.randint(7, (9, 6))
    labels = torch.where(
        torch.arange(6) < torch.tensor([6, 5, 3, 2, 6, 4, 0, 6, 5])[:, None], ids, -100
    )
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    table = scorer(model, shift_labels=shift).score(data, partition=partition)
    double = copy.deepcopy(model).double()
    rows = []
    for x, y in zip(ids, labels, strict=True):
        logits = double(x[None])[0]
        if shift == "auto":
            logits, y = logits[:-1], y[1:]
        value = F.cross_entropy(logits, y, reduction="sum", ignore_index=-100)
        rows.append(torch.autograd.grad(value, double.lm_head.weight)[0].flatten())
    counted = torch.arange(9) != 6
    parts = torch.zeros(9, dtype=torch.int64) if partition is None else partition_ids(9, 2)
    gradients = torch.stack(rows)
    assert torch.equal(table.scores.isnan(), ~counted)
    for part in parts.unique():
        members = (parts == part) & counted
        expected = paper_score(gradients[members])
        torch.testing.assert_close(table.scores[members].double(), expected, rtol=2e-5, atol=2e-6)


def test_files_and_rates_from_files(tmp_path: Path, model: SmallNet, states: list) -> None:
    for k, (state, eta) in enumerate(zip(states, RATES, strict=True)):
        torch.save({"net": state, "lr": [9.0, eta], "epoch": k}, tmp_path / f"trial_0_{k}.pth")
    table = scorer(model).score(images(), sorted(tmp_path.glob("*.pth")))
    assert same_table(table, scorer(model).score(images(), checkpoints_of(states)))
    described = table.provenance["checkpoints"]
    assert [c["lr"] for c in described] == list(RATES)
    assert [c["step"] for c in described] == [0, 1, 2]
    assert described[1]["source"].endswith("trial_0_1.pth")


def test_provenance_can_be_written_as_json(model: SmallNet, states: list) -> None:
    table = scorer(model, head="fc", precision="highest").score(
        images(), states, partition=2, seed=4, combine="zscore", index=torch.arange(N) + 100
    )
    facts = json.loads(json.dumps(table.provenance))
    assert facts["learning_rates"] == "none given, 1.0 used"
    assert facts["partition"].startswith("2 parts, split by seed 4, digest ")
    expected = {
        "torch": torch.__version__,
        "formula": "moso",
        "combine": "zscore",
        "num_steps": None,
        "samples": N,
        "seed": 4,
        "head": "fc",
        "loss": "cross_entropy",
        "precision": "highest",
        "features": "float32",
    }
    assert {name: facts[name] for name in expected} == expected
    assert {"moso_fast", "python", "backend"} <= facts.keys()
    assert table.index.tolist() == list(range(100, 100 + N))


def test_without_rates_every_checkpoint_counts_alike(
    model: SmallNet, states: list, gradients: list
) -> None:
    table = scorer(model).score(images(), states)
    expected = expected_scores(gradients, torch.zeros(N, dtype=torch.int64), rates=(1.0, 1.0, 1.0))
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)


def test_model_as_it_is(model: SmallNet) -> None:
    as_it_is = scorer(model).score(images())
    assert same_table(as_it_is, scorer(model).score(images(), model.state_dict()))
    assert as_it_is.provenance["checkpoints"][0]["source"] == "the model as it was given"


def test_bfloat16_cache_is_close(model: SmallNet, states: list) -> None:
    exact = scorer(model).score(images(), checkpoints_of(states))
    small = scorer(model, feature_cache="bfloat16").score(images(), checkpoints_of(states))
    assert small.provenance["features"] == "bfloat16"
    assert small.provenance["precision"] == "medium"
    error = (small.scores - exact.scores).abs().max() / exact.scores.abs().max()
    assert 0 < error < 0.05


def test_under_inference_mode_and_autocast(model: SmallNet, states: list) -> None:
    expected = scorer(model).score(images(), checkpoints_of(states))
    with torch.inference_mode():
        loaded = [{n: t.clone() for n, t in s.items()} for s in states]
        table = scorer(model).score(images(), checkpoints_of(loaded))
    assert same_table(table, expected)
    losses = []
    for state in states:
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(scorer(model).score(images(), [state]).metrics["loss"])
    inputs, _ = images().tensors
    with torch.autocast("cpu", torch.bfloat16):
        # Autocast keeps 16-bit copies of weights: neither the model's own, nor those of another
        # checkpoint, nor afterwards those of a checkpoint may be taken for the ones in force.
        before = copy.deepcopy(model).eval()(inputs)
        model.eval()(inputs)
        table = scorer(model).score(images(), checkpoints_of(states))
        after = model(inputs)
        model.train()
    assert torch.equal(table.per_checkpoint["loss"], torch.stack(losses))
    assert torch.equal(before, after)


def test_wrapped_models_and_states(model: SmallNet, states: list) -> None:
    expected = scorer(model).score(images(), checkpoints_of(states))
    prefixed = [{f"module.{n}": t for n, t in s.items()} for s in states]
    assert same_table(scorer(model).score(images(), checkpoints_of(prefixed)), expected)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert same_table(scorer(compiled).score(images(), checkpoints_of(states)), expected)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(images()))


def test_iterable_data_set(model: SmallNet, states: list) -> None:
    table = scorer(model).score(Stream(), checkpoints_of(states), partition=2)
    assert same_table(table, scorer(model).score(images(), checkpoints_of(states), partition=2))


def replaced(state: dict[str, Tensor], **tensors: Tensor | None) -> dict[str, Tensor]:
    result = {**state, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {name: t for name, t in result.items() if t is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fc__weight": None, "bn__bias": None},
            "checkpoint (a state dict in memory) does not fit the model: "
            "2 missing (bn.bias, fc.weight)",
        ),
        (
            {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "4 unexpected (a, b, c, ...)",
        ),
        (
            {"fc__weight": None, "head__weight": torch.ones(2)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "1 missing (fc.weight); 1 unexpected (head.weight)",
        ),
        (
            {"fc__bias": torch.ones(3)},
            "checkpoint (a state dict in memory) does not fit the model: "
            "fc.bias has shape (3,), in the model (4,)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(
    model: SmallNet, states: list, change: dict, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        scorer(model).score(images(), [replaced(states[0], **change)])
    assert str(caught.value) == message


BAD_SETTINGS: list[tuple[dict, type, str]] = [
    (
        {"gradient": "full"},
        ValueError,
        "gradient must be one of last_layer (the only value in this version), got 'full'",
    ),
    (
        {"loss": F.cross_entropy},
        ValueError,
        "loss must be the name of a loss for gradient='last_layer' (cross_entropy, "
        "binary_cross_entropy, mse), got function (a callable)",
    ),
    ({"loss": "hinge"}, ValueError, "loss must be one of "),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1), got 1.5"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
    ({"precision": "low"}, ValueError, "precision must be None or one of "),
    ({"nonfinite": "skip"}, ValueError, "nonfinite must be one of "),
    ({"backend": "gpu"}, ValueError, "backend must be one of auto, "),
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
    (
        {"dtype": torch.int64},
        TypeError,
        "dtype must be a floating-point torch.dtype or None, got torch.int64",
    ),
    ({"head": "nothing"}, ValueError, "head 'nothing' is no module of the model; its nn.Linear"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_SETTINGS)
def test_bad_settings(model: SmallNet, options: dict, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        MoSoScorer(model, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got function$"):
        MoSoScorer(F.relu)  # type: ignore[arg-type]


STATE = SmallNet().state_dict()
ONE_EACH = TensorDataset(torch.randn(3, 1, 4, 4), torch.tensor([0, -100, -100]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"formula": "best"}, ValueError, "formula must be one of "),
        ({"combine": "max"}, ValueError, "combine must be one of "),
        ({"num_steps": 0}, ValueError, "num_steps must be "),
        ({"data": 3}, TypeError, "data must be a DataLoader or a Dataset, got int"),
        (
            {"data": DataLoader(images(), shuffle=True)},
            ValueError,
            "data: scores come back in data-set order",
        ),
        ({"checkpoints": []}, ValueError, "checkpoints is empty; give at least one Checkpoint"),
        ({"checkpoints": 3}, TypeError, "checkpoints must be an iterable of Checkpoint, got int"),
        ({"checkpoints": ["missing.pt"]}, ValueError, "checkpoint missing.pt does not exist"),
        (
            {"checkpoints": [Checkpoint(STATE, lr=0.1), Checkpoint(STATE)]},
            ValueError,
            "checkpoints: either all have a learning rate or none, but checkpoint 0 has one and "
            "checkpoint 1 has none; give Checkpoint(source, lr=...) for each",
        ),
        (
            {"partition": [0] * 22 + [1]},
            ValueError,
            "partition: every part needs at least 2 samples to be scored against its own mean, "
            "part 1 has 1",
        ),
        ({"partition": 12}, ValueError, "partition: every part needs at least 2 samples"),
        ({"partition": [0, 1]}, ValueError, "partition must have one id per sample, shape (23,)"),
        ({"partition": 0.5}, TypeError, "partition ids must be integers, got "),
        ({"index": [0, 1]}, ValueError, "index must have one entry per sample, 23, got 2"),
        ({"index": torch.ones(N)}, TypeError, "index must hold integers, got torch.float32"),
        ({"index": torch.ones(1, 1).long()}, ValueError, "index must have shape (N,), got (1, 1)"),
    ],
)
def test_bad_arguments_are_refused_before_any_forward_pass(
    arguments: dict, error: type, message: str
) -> None:
    model = SmallNet()
    arguments = {"data": images(), **arguments}
    with pytest.raises(error) as caught:
        scorer(model).score(arguments.pop("data"), **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert model.forwards == 0


def test_rates_of_a_generator_are_checked_as_they_come(model: SmallNet, states: list) -> None:
    stream = iter([Checkpoint(states[0]), Checkpoint(states[1], lr=0.1)])
    with pytest.raises(ValueError, match="checkpoint 1 has one and checkpoint 0 has none"):
        scorer(model).score(images(), stream)


def test_too_few_counted_samples(model: SmallNet) -> None:
    with pytest.raises(ValueError, match="only 1 sample counts"):
        scorer(model).score(ONE_EACH)
    table = scorer(model).score(ONE_EACH, formula="alignment")
    assert table.scores.isnan().tolist() == [False, True, True]
    labels = torch.where(torch.arange(N) < 21, images().tensors[1], -100)
    data = TensorDataset(images().tensors[0], labels)
    model = copy.deepcopy(model)
    model.forwards = 0
    with pytest.raises(ValueError, match=r"samples that are not ignored .* part 1 has 1"):
        scorer(model).score(data, partition=[0] * 20 + [1] * 3)
    assert model.forwards == 3, "found right after the pass that shows the labels"


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


def test_state_that_is_no_tensor_of_the_model(states: list) -> None:
    class Extra(SmallNet):
        def get_extra_state(self) -> dict:
            return {"scale": 2}

        def set_extra_state(self, state: dict) -> None:
            pass

    model = Extra()
    with pytest.raises(ValueError, match=r"its state dict has '_extra_state', which is no tensor"):
        scorer(model).score(images(), states)
    assert scorer(model).score(images()).scores.shape == (N,)


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
        monkeypatch.setattr("moso_fast._progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    MoSoScorer(model, batch_size=8).score(images(), states)
    out, err = capsys.readouterr()
    assert out == ""
    assert "scoring" in err
    if not rich:
        assert "scoring: 9/9 batches" in err
        assert err.endswith("\r")
    assert (MoSoScorer(model, progress=False).score(images()), capsys.readouterr().err)[1] == ""
