"""gradient="full" through the whole scorer: checkpoints, parts, resume, views, bad input."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, ConvNet, build, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from moso_fast.full import chunks
from moso_fast.full.engine import FullGradient
from moso_fast.scorer import MoSoScorer
from moso_fast.scoring.partition import partition_ids
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.tables.table import ScoreTable

N, RATES = 17, (0.3, 0.1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def full(model: nn.Module, **options: Any) -> MoSoScorer:
    options = {"batch_size": 5, "progress": False, **options}
    return MoSoScorer(model, gradient="full", **options)


def samples(count: int = N) -> TensorDataset:
    return TensorDataset(*data("cnn", count))


def checkpoints() -> list[Checkpoint]:
    """Weights and running statistics that differ."""
    result = []
    for k, rate in enumerate(RATES):
        torch.manual_seed(k)
        result.append(Checkpoint(ConvNet().double().state_dict(), lr=rate, step=k))
    return result


def expected(ids: Tensor | None = None, formula: str = "moso") -> Tensor:
    inputs, labels = samples().tensors
    ids = torch.zeros(N, dtype=torch.int64) if ids is None else ids
    total = torch.zeros(N, dtype=torch.float64)
    for checkpoint in checkpoints():
        net = build("cnn")
        net.load_state_dict(checkpoint.source)
        g = gradients(net, inputs, labels)
        for part in ids.unique():
            rows = ids == part
            total[rows] += checkpoint.lr * scores(g[rows], formula) / len(RATES)
    return total


class Listed(Dataset):
    """A data set that is collated item by item."""

    def __init__(self, base: TensorDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.base[index]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(samples()))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["tensors", "items", "loader", "stream"])
@pytest.mark.parametrize("partition", [None, 3])
def test_checkpoints_and_parts(kind: str, partition: int | None) -> None:
    sources = {
        "tensors": samples(),
        "items": Listed(samples()),
        "loader": DataLoader(Listed(samples()), batch_size=4),
        "stream": Stream(),
    }
    model = build("cnn").train()
    before = copy.deepcopy(model.state_dict())
    table = full(model).score(sources[kind], checkpoints(), partition=partition, seed=4)
    ids = None if partition is None else partition_ids(N, partition, 4)
    torch.testing.assert_close(table.scores, expected(ids), **CLOSE)
    assert table.provenance["gradient"] == "full"
    assert [c["lr"] for c in table.provenance["checkpoints"]] == list(RATES)
    assert model.training and model.bn.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.exhaustive
def test_metrics_are_those_of_the_last_layer() -> None:
    table = full(build("cnn")).score(samples(), checkpoints())
    other = MoSoScorer(build("cnn"), batch_size=5, progress=False).score(samples(), checkpoints())
    for name in ("loss", "el2n", "margin", "entropy"):
        torch.testing.assert_close(table.per_checkpoint[name], other.per_checkpoint[name], **CLOSE)
    head = full(build("cnn"), scope="fc").score(samples(), checkpoints(), combine="zscore")
    other = MoSoScorer(build("cnn"), progress=False).score(
        samples(), checkpoints(), combine="zscore"
    )
    torch.testing.assert_close(head.scores, other.scores, **CLOSE)


def same(one: ScoreTable, other: ScoreTable) -> bool:
    return torch.equal(one.scores, other.scores) and all(
        torch.equal(v, other.per_checkpoint[n]) for n, v in one.per_checkpoint.items()
    )


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


class Noisy(Listed):
    """Random augmentation by the generators of torch and of Python."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.randn(x.shape, dtype=x.dtype) + random.random(), y


@pytest.mark.exhaustive
def test_views_are_averaged_and_repeatable() -> None:
    views, model = 3, build("cnn")
    table = full(model, views=views).score(Noisy(samples()), partition=2, seed=8)
    assert same(table, full(model, views=views).score(Noisy(samples()), partition=2, seed=8))
    from moso_fast.full.batches import SeededViews

    state = torch.get_rng_state(), random.getstate()
    readings = [SeededViews(Noisy(samples()), views, 8)[k] for k in range(N)]
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    g = torch.stack(
        [
            gradients(
                model, torch.stack([x for x, _ in one]), torch.stack([y for _, y in one])
            ).mean(0)
            for one in readings
        ]
    )
    ids = partition_ids(N, 2, 8)
    for part in range(2):
        torch.testing.assert_close(
            table.scores[ids == part], scores(g[ids == part], "moso"), **CLOSE
        )
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1), **CLOSE)


def test_random_augmentation_is_refused_without_views() -> None:
    with pytest.raises(ValueError, match=r"gives other losses than the first; .* deterministic"):
        full(build("cnn")).score(Noisy(samples()))


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


def test_callable_loss_and_dict_batches() -> None:
    inputs, labels = samples().tensors

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, reduction="none") + outputs.square().sum(1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("cnn")

        def forward(self, pixels: Tensor) -> Tensor:
            return self.net(pixels)

    batches = [{"pixels": x, "labels": y} for x, y in samples()]
    table = full(Named(), loss=loss).score(batches)
    expected = scores(gradients(build("cnn"), inputs, labels, loss), "moso")
    torch.testing.assert_close(table.scores, expected, **CLOSE)
    assert table.metrics["el2n"].isnan().all()
    assert "loss" in table.provenance["loss"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse", "soft"])
def test_named_losses(loss: str) -> None:
    inputs, labels = samples().tensors
    targets = 0.8 * F.one_hot(labels, CLASSES).double() + 0.2 / CLASSES
    function: Any = {
        "binary_cross_entropy": F.binary_cross_entropy_with_logits,
        "mse": F.mse_loss,
        "soft": F.cross_entropy,
    }[loss]
    name = "cross_entropy" if loss == "soft" else loss
    table = full(build("cnn"), loss=name).score(TensorDataset(inputs, targets))
    kind = {} if loss == "soft" else {"reduction": "sum"}
    g = gradients(build("cnn"), inputs, targets, lambda z, t: function(z, t, **kind))
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)


class TinyForCausalLM(nn.Module):
    """Tied embedding and head, output with ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.mix(self.embed(input_ids)).cumsum(1)
        return {"logits": self.lm_head(torch.tanh(hidden))}


@pytest.mark.parametrize("per", ["token", "sample"])
def test_sequences_with_a_tied_head(per: str) -> None:
    torch.manual_seed(0)
    model = TinyForCausalLM().double()
    ids = torch.randint(7, (9, 6))
    counted = torch.tensor([6, 5, 3, 2, 6, 4, 0, 6, 5])
    labels = torch.where(torch.arange(6) < counted[:, None], ids, -100)
    items = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    table = full(model, per=per).score(items)
    rows, losses = [], []
    for x, y in zip(ids, labels, strict=True):
        logits = model(x[None])["logits"][0, :-1]
        loss = F.cross_entropy(logits, y[1:], reduction="sum")
        if per == "token":
            loss = loss / (y[1:] != -100).sum().clamp_min(1)
        losses.append(loss.detach())
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    used = counted > 1
    assert torch.equal(table.scores.isnan(), ~used)
    torch.testing.assert_close(table.scores[used], scores(torch.stack(rows)[used], "moso"), **CLOSE)
    torch.testing.assert_close(table.metrics["loss"][used], torch.stack(losses)[used], **CLOSE)
    assert table.provenance["norms_explicit"] == []
    assert table.provenance["shift_labels"] == "True, by the model's class"


def test_near_converged_losses_keep_their_ranking() -> None:
    """Losses of 1e-9 to 1e-6 in float32, where p - 1 would round to nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    labels = model(inputs).argmax(1)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, -16.0, -20.0]))
        model[1].weight[1] = 0.3
    labels = torch.zeros_like(labels)
    table = full(model).score(TensorDataset(inputs, labels))
    g = gradients(copy.deepcopy(model).double(), inputs.double(), labels)
    exact = scores(g, "moso")
    torch.testing.assert_close(table.scores.double(), exact, rtol=1e-4, atol=0)
    assert table.metrics["loss"].max() < 1e-6


@pytest.mark.exhaustive
def test_chunks_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = full(build("cnn"), batch_size=17).score(samples())
    first, sizes = FullGradient._first, []

    def limited(self: FullGradient, chunk: Any) -> Any:
        sizes.append(chunk.samples)
        if chunk.samples > 3:
            raise torch.OutOfMemoryError("out of memory")
        return first(self, chunk)

    monkeypatch.setattr(FullGradient, "_first", limited)
    table = full(build("cnn"), batch_size=17).score(samples())
    assert sizes == [17, 9, 5, 3, 3, 3, 3, 3, 2]
    torch.testing.assert_close(table.scores, whole.scores, **CLOSE)
    sizes.clear()
    full(build("cnn"), batch_size=17, chunk_size=2).score(samples())
    assert sizes == [2] * 8 + [1]


def test_chunks_are_chosen_by_what_the_model_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured activations of a sample, against a share of the memory."""
    sizes, budgets = [], []
    first = FullGradient._first

    def watched(self: FullGradient, chunk: Any) -> Any:
        sizes.append(chunk.samples)
        try:
            return first(self, chunk)
        finally:
            budgets.append(self.methods.bytes_per_sample)

    monkeypatch.setattr(FullGradient, "_first", watched)
    whole = full(build("cnn"), batch_size=6).score(samples())
    assert sizes == [6, 6, 5]
    kept = 8 * (2 * 3 * 3 * 8 + 8 * 3 * 3)  # the results of two convolutions, at the least
    assert kept < budgets[-1] < 40 * kept
    sizes.clear()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = 2.5 * chunks._COPIES * budgets[-1] / memory
    monkeypatch.setattr(chunks, "_CPU_SHARE", share)
    table = full(build("cnn"), batch_size=6).score(samples())
    assert sizes == [6] + [2, 2, 2] * 2 + [2, 2, 1]  # the first one was only probed
    torch.testing.assert_close(table.scores, whole.scores, **CLOSE)


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


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moso_fast.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
    text += "from test_full_scorer import build, samples as data\ndef net(): return build('cnn')\n"
    Path("full_cli_module.py").write_text(text)
    words = "score --model full_cli_module:net --data full_cli_module:data -o o.npz"
    assert main([*words.split(), *["--gradient", "full", "--scope", "fc", "--scope", "conv2"]]) == 0
    inputs, labels = samples().tensors
    net = build("cnn")
    net.requires_grad_(False)
    for p in (*net.conv2.parameters(), *net.fc.parameters()):
        p.requires_grad_(True)
    table = ScoreTable.load(tmp_path / "o.npz")
    expected = scores(gradients(net, inputs, labels), "moso")
    torch.testing.assert_close(table.scores, expected, **CLOSE)
    assert table.provenance["parameters"].startswith("3 (")
    assert main([*words.split(), "--scope", "fc"]) == 2
    assert "scope goes with gradient='full'" in capsys.readouterr().err
    files = ["score", "--features", "f.npy", "--labels", "l.npy", "--head", "h.npz", "-o", "o.npz"]
    for option, value in (("--scope", "fc"), ("--views", "2"), ("--autocast", "bfloat16")):
        assert main([*files, option, value]) == 2
        assert f"{option} goes with --gradient full" in capsys.readouterr().err
    assert main([*words.split(), "--gradient", "full", "--autocast", "int8"]) == 2
    assert "--autocast must be bfloat16 or float16; got 'int8'" in capsys.readouterr().err


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
