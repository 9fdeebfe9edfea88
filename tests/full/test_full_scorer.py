"""gradient="full" through the whole scorer: checkpoints, parts, views, chunks, command line."""

from __future__ import annotations

import copy
import os
import random
import sys
from pathlib import Path
from typing import Any

import full_scorer_cases
import pytest
import torch
from full_cases import build, gradients, scores
from full_scorer_cases import (
    CLOSE,
    RATES,
    Listed,
    N,
    Stream,
    checkpoints,
    expected,
    full,
    same,
    samples,
)
from torch import Tensor
from torch.utils.data import DataLoader

from moso_fast.full import chunks
from moso_fast.full.engine import FullGradient
from moso_fast.scorer import MoSoScorer
from moso_fast.scoring.partition import partition_ids
from moso_fast.tables.table import ScoreTable


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


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moso_fast.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = f"import sys\nsys.path.append({str(Path(full_scorer_cases.__file__).parent)!r})\n"
    text += "from full_cases import build\nfrom full_scorer_cases import samples as data\n"
    text += "def net(): return build('cnn')\n"
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
