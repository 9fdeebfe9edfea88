"""The demonstration: its data, its numbers, its sentences and its files."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from moso_fast.cli.demo import demo
from moso_fast.demo import experiment
from moso_fast.demo.data import flip_labels, load_digits
from moso_fast.demo.experiment import (
    FLIPPED,
    MOSO,
    NOTHING,
    PRUNING_METHODS,
    RANDOM,
    SUSPICION_SCORES,
    DemoConfig,
    run_demo,
)
from moso_fast.demo.model import SmallCNN, accuracy, train_network
from moso_fast.demo.output import (
    FILES,
    prepare_folder,
    require_packages,
    text_report,
    write_files,
)
from moso_fast.demo.summary import compare, findings, spread, summarise, verdict
from moso_fast.demo.timing import autograd_alignment, closed_form_alignment
from moso_fast.tables import report
from moso_fast.tables.table import ScoreTable

TINY = DemoConfig(
    repeats=2, keeps=(0.2, 1.0), parts=2, epochs=3, samples=2, retrain_steps=15, seed=4
)


@pytest.fixture(scope="module")
def run():
    ticks: list[str] = []
    result = run_demo(TINY, ticks.append)
    return result, summarise(result), ticks


def lasting(summary):
    """Everything in a summary that a second run must repeat: all but the clock."""
    return {k: v for k, v in summary.items() if k not in ("timing", "seconds")}


def test_digits_are_split_once_by_seed():
    digits = load_digits(0)
    assert digits.train_images.shape == (1200, 1, 8, 8)
    assert digits.test_images.shape == (597, 1, 8, 8)
    everything = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert (everything.min(), everything.max()) == (0, 1)
    from sklearn.datasets import load_digits as original

    rows = torch.from_numpy(original().data).float() / 16
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, rows.tolist()))
    assert torch.equal(load_digits(0).test_images, digits.test_images)
    assert not torch.equal(load_digits(1).test_images, digits.test_images)


def test_flipped_labels_are_wrong_exactly_where_the_mask_says():
    labels = torch.arange(10).repeat(200)
    flipped, mask = flip_labels(labels, 0.1, seed=2)
    assert int(mask.sum()) == 200
    assert torch.equal(flipped != labels, mask)
    # Every wrong class is drawn, the last one too, about equally often.
    counts = ((flipped - labels) % 10)[mask].bincount(minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 8
    assert torch.equal(flip_labels(labels, 0.1, seed=2)[0], flipped)
    assert not torch.equal(flip_labels(labels, 0.1, seed=3)[0], flipped)


@pytest.mark.exhaustive
def test_network_learns_and_depends_on_its_seed_alone():
    digits = load_digits(0)
    torch.manual_seed(1)
    first = train_network(digits.train_images, digits.train_labels, steps=60, seed=7)
    torch.manual_seed(2)
    again = train_network(digits.train_images, digits.train_labels, steps=60, seed=7)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not first.training
    assert accuracy(first, digits.test_images, digits.test_labels) > 0.9


def test_accuracy_counts_right_answers():
    assert accuracy(torch.nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


@pytest.mark.exhaustive
def test_batched_closed_form_equals_the_autograd_loop():
    torch.manual_seed(0)
    digits = load_digits(0)
    images, labels = digits.train_images[:40], digits.train_labels[:40]
    model = SmallCNN().eval()
    loop = autograd_alignment(model, images, labels)
    torch.testing.assert_close(
        closed_form_alignment(model, images, labels), loop, rtol=1e-4, atol=1e-5
    )


@pytest.mark.exhaustive
def test_numbers_of_a_run(run):
    result, summary, ticks = run
    assert len(ticks) == TINY.total_work()
    assert result.timing.difference < 1e-4
    assert 0 < result.timing.moso_fast < result.timing.autograd_loop
    assert tuple(summary["pruning"]) == PRUNING_METHODS
    for by_keep in summary["pruning"].values():
        assert list(by_keep) == ["0.2", "1"]
        assert all(len(entry["values"]) == 2 for entry in by_keep.values())
        assert by_keep["1"] == summary["pruning"][MOSO]["1"]
    assert tuple(summary["label_errors"]) == SUSPICION_SCORES
    assert set(summary["cleaning"]) == {*SUSPICION_SCORES, NOTHING, RANDOM, FLIPPED}
    for name in ("EL2N", "loss", "margin"):
        # Even hardly trained surrogates are wrong about wrong labels more often than about others.
        assert summary["label_errors"][name]["auroc"]["mean"] > 0.6
    assert int(result.flipped_mask.sum()) == 120
    first = result.auroc["margin"][0]
    assert report.auroc(result.flipped_scores["margin"], result.flipped_mask) == pytest.approx(
        first
    )
    assert len(result.table.scores) == 1200


def test_each_method_keeps_what_its_score_says(monkeypatch):
    """The sets handed to the retraining are checked, not only their accuracies."""
    kept_sets, scored = [], []
    score = experiment._score

    def remembering(*args):
        scored.append(score(*args))
        return scored[-1]

    def retrained(result, labels, kept, seed):
        kept_sets.append(kept)
        return 0.5

    monkeypatch.setattr(experiment, "_score", remembering)
    monkeypatch.setattr(experiment, "_retrained", retrained)
    config = DemoConfig(
        repeats=1, keeps=(0.2,), parts=2, epochs=2, samples=2, retrain_steps=1, seed=0
    )
    result = run_demo(config)
    labels = result.digits.train_labels
    clean, noisy = scored
    pruned = dict(zip(PRUNING_METHODS, kept_sets[:5], strict=True))
    for kept in pruned.values():
        assert labels[kept].bincount().tolist() == [24] * 10
    values = {
        MOSO: clean.mean.scores,
        "MoSo (zscore)": clean.zscore.scores,
        "EL2N": clean.mean.metrics["el2n"],
        "GraNd": clean.mean.metrics["grand"],
    }
    for method, score_values in values.items():
        for digit in range(10):
            own = torch.nonzero(labels == digit).squeeze(1)
            best = own[score_values[own].argsort(descending=True)[:24]]
            assert set(best.tolist()) <= set(pruned[method].tolist())
    dropped = dict(zip((NOTHING, RANDOM, FLIPPED, *SUSPICION_SCORES), kept_sets[5:], strict=True))
    assert len(dropped[NOTHING]) == 1200
    assert torch.equal(dropped[FLIPPED], torch.nonzero(~result.flipped_mask).squeeze(1))
    table = noisy.mean
    worst_first = {
        MOSO: table.scores,
        "margin": table.metrics["margin"],
        "loss": -table.metrics["loss"],
        "self_influence": -table.metrics["self_influence"],
    }
    for name, order in worst_first.items():
        assert set(dropped[name].tolist()) == set(order.argsort()[240:].tolist())
    found = 1 - result.flipped_mask[dropped["loss"]].sum() / 120
    assert result.found["loss"] == [pytest.approx(float(found))]


@pytest.mark.exhaustive
def test_same_seed_same_numbers(run):
    _, summary, _ = run
    threads = torch.get_num_threads()
    assert lasting(summarise(run_demo(TINY))) == lasting(summary)
    assert torch.get_num_threads() == threads


def test_spread_and_paired_comparison():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": 2**0.5, "values": [1.0, 3.0]}
    assert spread([1.0])["std"] == 0.0
    clear = compare([2.0, 3.1, 4.0, 5.1], [1.0, 2.0, 3.0, 4.0])
    assert clear["clear"] and clear["mean"] == pytest.approx(1.05)
    assert not compare([1.0, 3.0, 2.0], [2.0, 1.5, 2.0])["clear"]
    # Two repeats say nothing about the noise, however equal they are.
    assert compare([2.0, 3.0], [1.0, 2.0]) == {"mean": 1.0, "standard_error": None, "clear": False}


def invented(pruning, auroc, cleaning):
    """Build a summary in which every method has the same given mean in each of three repeats."""
    entry = {"mean": 0.9, "std": 0.0, "values": [0.9] * 3}
    against = {
        m: {"mean": pruning.get(m, -0.02), "standard_error": 0.001, "clear": True}
        for m in PRUNING_METHODS
        if m != RANDOM
    }
    return {
        "config": {"dropped": 0.2, "flipped": 0.1},
        "pruning": {
            m: {k: {**entry, "mean": 0.9 + pruning.get(m, -0.02)} for k in ("0.1", "1")}
            for m in PRUNING_METHODS
        },
        "pruning_against_random": against,
        "label_errors": {
            s: {"auroc": {**entry, "mean": auroc.get(s, 0.5)}} for s in SUSPICION_SCORES
        },
        "cleaning": {
            s: {**entry, "mean": cleaning.get(s, 0.8)}
            for s in (*SUSPICION_SCORES, NOTHING, FLIPPED)
        },
        "cleaning_against_nothing": {
            s: {"mean": cleaning.get(s, 0.8) - cleaning[NOTHING], "clear": True}
            for s in (*SUSPICION_SCORES, FLIPPED)
        },
    }


def test_findings_say_who_won():
    summary = invented(
        {"EL2N": 0.013, MOSO: -0.007, RANDOM: 0.0},
        {"loss": 0.95, MOSO: 0.61},
        {"loss": 0.97, NOTHING: 0.93, FLIPPED: 0.98},
    )
    assert verdict(summary) == (
        "In this run EL2N served pruning best, loss found flipped labels best, and loss served "
        "cleaning before training best."
    )
    pruning, flipped, cleaning = findings(summary)
    assert pruning == (
        "Pruning: EL2N served best, 1.3 points above random on average; MoSo as in the paper was "
        "0.7 points below random; most accurate at keep 10%: EL2N."
    )
    assert flipped == (
        "Flipped labels: high loss found them best (AUROC 0.950); low MoSo as in the paper reached "
        "0.610; chance is 0.5."
    )
    assert cleaning == (
        "Cleaning: dropping the worst 20% by loss served best, 97.0%, 4.0 points above dropping "
        "nothing; dropping exactly the flipped ones gave 98.0%."
    )


def test_findings_claim_no_gain_that_the_numbers_do_not_show():
    summary = invented(
        {"EL2N": -0.001, MOSO: -0.007, RANDOM: 0.0},
        {MOSO: 0.9},
        {"margin": 0.92, NOTHING: 0.93, FLIPPED: 0.98},
    )
    summary["pruning_against_random"]["EL2N"]["clear"] = False
    assert verdict(summary) == (
        "In this run no score served pruning clearly better than random (best: EL2N), MoSo found "
        "flipped labels best, and dropping by no score was clearly better than dropping nothing "
        "(best: margin)."
    )
    pruning, flipped, cleaning = findings(summary)
    assert pruning.startswith(
        "Pruning: no score beat random clearly on average; the best, EL2N, was 0.1 points below "
        "random (within the noise); MoSo"
    )
    assert pruning.endswith("most accurate at keep 10%: random.")
    assert flipped == "Flipped labels: low MoSo found them best (AUROC 0.900); chance is 0.5."
    assert "by no score clearly helped; the best, margin, gave 92.0%, 1.0 points below" in cleaning
    summary["pruning_against_random"]["EL2N"].update(mean=0.004, clear=False)
    assert "no score beat random clearly" in findings(summary)[0]


@pytest.mark.exhaustive
def test_files_of_a_run(run, tmp_path):
    result, summary, _ = run
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "results.json").write_text("old")
    out = prepare_folder(tmp_path)
    assert (tmp_path / "results.json").read_text() == "old"
    assert [p.name for p in write_files(result, summary, out)] == list(FILES)
    assert {p.name for p in out.iterdir()} == {*FILES, "mine.txt"}
    assert (out / "mine.txt").read_text() == "kept"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(summary))
    assert torch.equal(ScoreTable.load(out / "scores.parquet").scores, result.table.scores)
    for name in FILES:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_interrupted_writing_leaves_no_half_written_file(run, tmp_path, monkeypatch):
    result, summary, _ = run
    (tmp_path / "extremes.png").write_bytes(b"old")

    def interrupt(figure, *args, **kwargs):
        raise KeyboardInterrupt

    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files(result, summary, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"extremes.png", "scores.parquet"}
    assert (tmp_path / "extremes.png").read_bytes() == b"old"


def test_report_names_everything_measured(run):
    _, summary, _ = run
    printed = text_report(summary)
    assert max(map(len, printed.splitlines())) <= 100
    text = " ".join(printed.split())
    sentences = (summary["verdict"], *summary["findings"])
    for words in (*PRUNING_METHODS, *SUSPICION_SCORES, NOTHING, FLIPPED, *sentences):
        assert words in text
    assert "extrapolated from 600 images at 1 checkpoint" in text
    assert f"{100 * summary['pruning'][MOSO]['0.2']['mean']:.1f} +- " in text


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--out: cannot write to the folder"):
            prepare_folder(bad)
    assert not list(prepare_folder(tmp_path / "a" / "b").iterdir())


def test_missing_package_is_named_before_the_work(monkeypatch):
    monkeypatch.setattr("moso_fast.demo.output.find_spec", lambda name: name != "pyarrow" or None)
    with pytest.raises(
        ModuleNotFoundError, match=r'needs pyarrow.*pip install "moso-fast\[demo\]"'
    ):
        require_packages()


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(DemoConfig, "quick", classmethod(lambda cls, seed=0: TINY))
    app = typer.Typer()
    app.command()(demo)
    return lambda *args: CliRunner().invoke(app, ["--quick", *map(str, args)])


@pytest.mark.exhaustive
def test_command_prints_report_or_json_and_writes_files(command, run, tmp_path):
    _, summary, _ = run
    printed = command("--out", tmp_path / "a")
    assert printed.exit_code == 0, printed.output
    assert "What this run shows" in printed.stdout
    assert printed.stderr == ""
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(FILES)
    as_json = command("--out", tmp_path / "a", "--json", "--quiet")
    assert lasting(json.loads(as_json.stdout)) == lasting(json.loads(json.dumps(summary)))


def test_command_reports_what_it_cannot_do(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused = command("--out", tmp_path / "file")
    assert refused.exit_code != 0
    assert command("--seed", "-1").exit_code == 2
    assert command("--repeats", "0").exit_code == 2
