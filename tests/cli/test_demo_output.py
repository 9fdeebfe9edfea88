"""The demonstration's numbers, printed report and files, of a run that was made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import run
from demo_cases import ALL, CLEANED, CONFIG, PRUNING, SUSPICION, made_up

from moso_fast.demo import output, summary
from moso_fast.demo.experiment import DemoConfig
from moso_fast.demo.summary import compare, summarise, verdict
from moso_fast.tables import report
from moso_fast.tables.table import ScoreTable

REPORT = """\
scikit-learn digits, 8x8 images: 12 to train on, 4 held out.
2 surrogates of 6 images each, 7 epochs, 4 checkpoints sampled; last-layer scores; 3 repeats.

Accuracy [%] on the held-out images after retraining on the kept part, mean +- std
(20 SGD steps whatever is kept; the same number of images a class for every method)
  keep                    10%           50%          100%
  MoSo           58.3 +- 38.2  91.7 +- 14.4  75.0 +- 25.0
  MoSo (zscore)   25.0 +- 0.0   50.0 +- 0.0  75.0 +- 25.0
  random          25.0 +- 0.0   25.0 +- 0.0  75.0 +- 25.0
  EL2N            25.0 +- 0.0  25.0 +- 25.0  75.0 +- 25.0
  GraNd            0.0 +- 0.0    0.0 +- 0.0  75.0 +- 25.0

Time to score 12 images at 4 checkpoints: same head, one thread, forward passes included
  moso_fast, all metrics, with data loader   0.50 s   1.0x
  autograd at batch size 1 (*)               8.00 s  16.0x
  closed form in plain PyTorch, batched (*)  1.00 s   2.0x
  (*) alignment only; extrapolated from 6 images at 1 checkpoint, in memory.
  Alignments of moso_fast and autograd differ by at most 2e-06 of the largest.

25% of the labels flipped on purpose: finding them, and accuracy after dropping the worst 50%
  dropped                       AUROC  found in worst 50% [%]  accuracy [%]
  nothing dropped                                               50.0 +- 0.0
  random                                                       50.0 +- 25.0
  the flipped ones                                             100.0 +- 0.0
  low MoSo             0.625 +- 0.125            50.0 +- 25.0   50.0 +- 0.0
  low MoSo (zscore)    0.500 +- 0.000             50.0 +- 0.0   25.0 +- 0.0
  high self_influence  0.750 +- 0.000             50.0 +- 0.0   25.0 +- 0.0
  high EL2N            0.792 +- 0.072             50.0 +- 0.0   25.0 +- 0.0
  high loss            0.875 +- 0.000            75.0 +- 25.0  83.3 +- 14.4
  low margin           0.250 +- 0.000              0.0 +- 0.0    0.0 +- 0.0

What this run shows
  In this run MoSo served pruning best, loss found flipped labels best, and loss served cleaning
    before training best.
  Pruning: MoSo served best, 50.0 points above random on average; most accurate at keep 10/50%:
    MoSo, MoSo.
  Flipped labels: high loss found them best (AUROC 0.875); low MoSo as in the paper reached 0.625;
    chance is 0.5.
  Cleaning: dropping the worst 50% by loss served best, 83.3%, 33.3 points above dropping nothing;
    dropping exactly the flipped ones gave 100.0%.
  Within the noise: the mean paired difference is at most two standard errors.
"""


def entry(values):
    return {"mean": np.mean(values), "std": np.std(values, ddof=1), "values": values}


def against(values, baseline):
    """Mean paired difference, its standard error, and whether it is more than two of those."""
    differences = np.subtract(values, baseline)
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    return {
        "mean": differences.mean(),
        "standard_error": error,
        "clear": bool(abs(differences.mean()) > 2 * error),
    }


def flat(value, place=""):
    """Return the numbers and texts of nested dicts and lists by their place."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, each in pairs for k, v in flat(each, f"{place}/{name}").items()}
    return {place: value}


def test_every_number_of_a_summary() -> None:
    found = summarise(made_up())
    assert list(found)[-2:] == ["verdict", "findings"]
    means = {name: np.mean(values, axis=0).tolist() for name, values in PRUNING.items()}
    expected = {
        "config": {
            "seed": 3, "repeats": 3, "keeps": [0.1, 0.5, 1.0], "parts": 2, "epochs": 7,
            "samples": 4, "retrain_steps": 20, "flipped": 0.25, "dropped": 0.5,
        },
        "data": {"name": "scikit-learn digits, 8x8 images", "train": 12, "test": 4},
        "timing": {
            "num_samples": 12, "num_checkpoints": 4, "measured_samples": 6, "autograd_loop": 8.0,
            "closed_form": 1.0, "difference": 2e-6, "moso_fast": 0.5, "speed_up": 16.0,
        },
        "pruning": {
            name: {"0.1": entry(few), "0.5": entry(half), "1": entry(ALL)}
            for name, (few, half) in PRUNING.items()
        },
        "pruning_against_random": {
            name: against(values, means["random"])
            for name, values in means.items()
            if name != "random"
        },
        "label_errors": {
            name: {"auroc": entry(auroc), "found": entry(found_in)}
            for name, (auroc, found_in, _) in SUSPICION.items()
        },
        "cleaning": {name: entry(values) for name, values in CLEANED.items()},
        "cleaning_against_nothing": {
            name: against(values, [0.5] * 3)
            for name, values in CLEANED.items()
            if name != "nothing dropped"
        },
        "seconds": 61.5,
        "verdict": verdict(found),
        "findings": summary.findings(found),
    }  # fmt: skip
    assert list(found) == list(expected)
    here, there = flat(found), flat(expected)
    assert list(here) == list(there)
    for place, value in there.items():
        assert here[place] == (pytest.approx(value) if isinstance(value, float) else value), place
    json.dumps(found, allow_nan=False)


def test_a_difference_is_clear_above_two_standard_errors() -> None:
    # One above, one below and two at the mean: the error of the mean is sqrt(2 / 3) / 2 = 0.41.
    for mean, clear in ((0.75, False), (0.875, True), (-0.75, False), (-0.875, True)):
        found = compare([mean + 1, mean, mean, mean - 1], [0.0] * 4)
        error = pytest.approx((2 / 3) ** 0.5 / 2)
        assert found == {"mean": mean, "standard_error": error, "clear": clear}
    assert compare([1.0, 2.0], [0.0, 1.0])["standard_error"] is None
    assert compare([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == {
        "mean": 1.0, "standard_error": 0.0, "clear": True,
    }  # fmt: skip
    assert not compare([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])["clear"]
    with pytest.raises(ValueError, match="zip"):
        compare([1.0], [1.0, 2.0])


def test_the_printed_report() -> None:
    assert output.text_report(summarise(made_up())) + "\n" == REPORT


def test_what_the_files_are_given(tmp_path, monkeypatch) -> None:
    result = made_up()
    numbers = summarise(result)
    seen = {}
    for name in ("pruning_curve", "score_histogram", "extremes", "label_error_curve"):

        def draw(*given, name=name, **options):
            (path,) = (one for one in given if isinstance(one, Path))
            seen[name] = (path.name, [one for one in given if one is not path], options)

        monkeypatch.setattr(report, name, draw)
    paths = output.write_files(result, numbers, tmp_path)
    assert paths == [tmp_path / name for name in output.FILES]
    assert torch.equal(ScoreTable.load(paths[0]).scores, torch.arange(12.0))
    text = paths[-1].read_text()
    assert text == json.dumps(numbers, indent=2) + "\n"

    name, (keeps, curves), options = seen["pruning_curve"]
    assert name == "pruning_curve.png" and keeps == [0.1, 0.5, 1.0]
    assert options == {"title": "Digits: accuracy on 4 held-out images, 3 repeats"}
    assert list(curves) == list(PRUNING)
    for method, (few, half) in PRUNING.items():
        expected = [[100 * f(v) for v in (few, half, ALL)] for f in (np.mean, _deviation)]
        assert [*map(list, curves[method])] == [pytest.approx(row) for row in expected]
    name, (groups,), options = seen["score_histogram"]
    assert name == "score_histogram.png" and options == {
        "title": "Digits: MoSo scores, first repeat",
        "xlabel": "MoSo score (high = informative = keep)",
    }
    # Suspicion is high where the score is low: the histogram shows scores.
    assert {name: values.tolist() for name, values in groups.items()} == {
        "labels as they are": list(range(12)),
        "25% flipped: correct ones": [-1, -2, -3, -5, -6, -7, -9, -10, -11],
        "25% flipped: flipped ones": [0, -4, -8],
    }
    name, (images, labels, scores), options = seen["extremes"]
    assert name == "extremes.png" and images.shape == (12, 8, 8)
    assert torch.equal(images, result.digits.train_images[:, 0])
    assert labels is result.digits.train_labels and scores is result.table.scores
    assert options == {"title": "Digits: lowest and highest MoSo scores"}
    name, (curves, mask), options = seen["label_error_curve"]
    assert name == "label_errors.png" and mask is result.flipped_mask
    assert list(curves) == [
        "low MoSo", "low MoSo (zscore)", "high self_influence", "high EL2N", "high loss",
        "low margin",
    ]  # fmt: skip
    assert list(curves.values()) == list(result.flipped_scores.values())
    assert options == {
        "title": "Digits: finding the 25% of labels flipped on purpose, first repeat"
    }


def _deviation(values):
    return np.std(values, ddof=1)


def test_folders_and_packages_that_are_not_there(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    for bad, why in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "x", "Not a directory"),
    ):
        with pytest.raises(ValueError) as refused:
            output.prepare_folder(bad)
        assert str(refused.value) == (
            f"--out: cannot write to the folder {bad} ({why}); give a folder that can be created"
        )

    def without_words(*_):
        raise OSError("in words")

    monkeypatch.setattr(output, "atomic_path", without_words)
    with pytest.raises(ValueError, match=r"\(in words\); give"):
        output.prepare_folder(tmp_path)
    monkeypatch.setattr(output, "find_spec", lambda name: None if name[0] in "sm" else name)
    with pytest.raises(ModuleNotFoundError) as refused:
        output.require_packages()
    assert str(refused.value) == (
        'the demo needs sklearn, matplotlib, not installed here: pip install "moso-fast[demo]"'
    )
    monkeypatch.setattr(output, "find_spec", lambda name: name)
    output.require_packages()


@pytest.fixture
def ran(monkeypatch):
    """Have the demonstration be made up: what it was asked for is kept."""
    seen = []

    def run_demo(config, tick):
        seen.append(config)
        tick("a caption")
        return made_up()

    def write_files(result, numbers, out):
        seen.append((numbers["seconds"], out))
        return [out / "a.png", out / "b.json"]

    monkeypatch.setattr("moso_fast.demo.experiment.run_demo", run_demo)
    monkeypatch.setattr(output, "write_files", write_files)
    return seen


def test_the_command_hands_its_options_on(ran, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(capsys, "demo")
    assert ran == [DemoConfig(), (61.5, Path("moso_fast_demo"))]
    assert Path("moso_fast_demo").is_dir()
    assert shown.out == f"{REPORT}\n62 s; written to moso_fast_demo:\n  a.png, b.json\n"
    for words, config in (
        ("--seed 5", DemoConfig(seed=5)),
        ("--seed 5 --repeats 2", DemoConfig(seed=5, repeats=2)),
        ("--seed 5 --quick", DemoConfig.quick(5)),
        ("--quick --repeats 1", DemoConfig(0, 1, (0.2, 0.6, 1.0), 4, 6, 3, 40)),
    ):
        ran.clear()
        assert run(capsys, f"demo -q --out x {words}") == ("", "")
        assert ran == [config, (61.5, Path("x"))]
    shown = run(capsys, "demo --json").out
    assert shown == json.dumps(summarise(made_up()), indent=2) + "\n"
    assert run(capsys, "demo --json -q").out == shown
    for words in ("--seed -1", "--seed 2147483649", "--repeats 0"):
        assert f"Invalid value for '{words.split()[0]}'" in run(capsys, f"demo {words}", code=2).err
    ran.clear()
    run(capsys, "demo -q --seed 2147483648")
    assert ran[0].seed == 2**31


def test_the_commands_bar_counts_the_work(ran, tmp_path, monkeypatch, capsys) -> None:
    import contextlib
    import importlib

    steps = []

    @contextlib.contextmanager
    def bar(caption, total, *, shown):
        steps.append((caption, total, shown))
        yield steps.append, lambda: steps.append("advance")

    monkeypatch.setattr(importlib.import_module("moso_fast.cli.demo"), "caption_bar", bar)
    for words, shown in (("", True), (" -q", False)):
        steps.clear()
        run(capsys, f"demo --out {tmp_path}{words}")
        # Four repeats: five sizes by five methods, all once, nine cleanings, two sets.
        assert steps == [("surrogates", 4 * (25 + 1 + 9 + 2), shown), "a caption", "advance"]


def test_work_of_other_sizes() -> None:
    assert CONFIG.total_work() == 3 * (2 * 5 + 1 + 9 + 2)
    assert DemoConfig(repeats=1, keeps=(0.5,)).total_work() == 5 + 9 + 2
