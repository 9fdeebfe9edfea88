"""The command line: what it computes, its exit codes, and its one-line errors."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moso_fast
from moso_fast.cli import main
from moso_fast.functional import last_layer_stats
from moso_fast.scoring.partition import partition_ids
from moso_fast.tables.table import ScoreTable

N, D, C = 90, 6, 4
SCORE = "score --features F.npy --labels y.npy --head h0.safetensors -o o.parquet"

MODULE = """
import os, signal
import numpy as np, torch
from torch import nn

class Interrupting(torch.utils.data.Dataset):
    def __len__(self): return 90
    def __getitem__(self, i):
        if i == 40: os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(6), 0

def net():
    return nn.Linear(6, 4)

def data():
    arrays = np.load("F.npy"), np.load("y.npy")
    return torch.utils.data.TensorDataset(*map(torch.from_numpy, arrays))

ready = net()
interrupting = Interrupting()

def faulty():
    raise ValueError("the user's own fault\\nin two lines")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, generator):
    """Working folder with features, labels, three heads and an importable module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_user_module", raising=False)
    np.save("F.npy", torch.randn(N, D, generator=generator).numpy())
    np.save("y.npy", (torch.arange(N) % C).numpy())
    for k in range(3):
        head = {
            "fc.weight": torch.randn(C, D, generator=generator),
            "fc.bias": torch.randn(C, generator=generator),
        }
        save_file(head, f"h{k}.safetensors")
        torch.save(
            {"net": {n.removeprefix("fc."): v for n, v in head.items()}, "lr": 0.5**k},
            f"c{k}.pt",
        )
    Path("cli_user_module.py").write_text(MODULE)
    return tmp_path


def run(capsys, words, code=0):
    capsys.readouterr()
    assert main(words if isinstance(words, list) else words.split()) == code
    return capsys.readouterr()


def spawn(arguments, folder, **options):
    """Run the command in a process of its own, from the package under test."""
    root = str(Path(moso_fast.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-m", "moso_fast.cli", *arguments.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def inputs():
    features, labels = torch.from_numpy(np.load("F.npy")), torch.from_numpy(np.load("y.npy"))
    files = [torch.load(f"c{k}.pt")["net"] for k in range(3)]
    weight = torch.stack([file["weight"] for file in files])
    return features, weight, labels, torch.stack([file["bias"] for file in files])


def test_score_equals_the_library(folder, capsys):
    words = SCORE + " --head h1.safetensors:fc.weight,fc.bias --head c2.pt --lr 1 --lr .5 --lr .25"
    facts = json.loads(run(capsys, words + " --num-steps 40 --json").out)
    table = ScoreTable.load("o.parquet")
    stats = last_layer_stats(*inputs())
    expected = sum(stats.scores(scale=0.5**k)[k].double() for k in range(3)) * 40 / (3 * N)
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(table.per_checkpoint["el2n"], stats.el2n)
    assert facts["samples"] == facts["scored"] == N and facts["checkpoints"] == 3
    assert facts["backend"] == stats.backend == table.provenance["backend"]
    assert [c["lr"] for c in table.provenance["checkpoints"]] == [1.0, 0.5, 0.25]


def test_score_within_parts_and_by_zscore(folder, capsys):
    heads = " --head h1.safetensors --combine zscore"
    run(capsys, SCORE + heads + " --partition 3 --seed 5")
    features, weight, labels, bias = inputs()
    ids = partition_ids(N, 3, 5)
    expected = torch.zeros(N, dtype=torch.float64)
    for part in range(3):
        rows = ids == part
        scores = last_layer_stats(features[rows], weight[:2], labels[rows], bias[:2]).scores()
        scores = scores.double()
        scaled = (scores - scores.mean(1, True)) / scores.std(1, correction=0, keepdim=True)
        expected[rows] = scaled.mean(0)
    table = ScoreTable.load("o.parquet")
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-5, atol=1e-6)
    np.save("ids.npy", ids.numpy())
    run(capsys, SCORE + heads + " --partition ids.npy")
    assert torch.equal(ScoreTable.load("o.parquet").scores, table.scores)


def test_heads_of_different_shape_are_checkpoints_too(folder, capsys):
    save_file({"w": torch.randn(C + 2, D), "b": torch.randn(C + 2)}, "wide.safetensors")
    run(capsys, SCORE + " --head wide.safetensors:w,b --head h1.safetensors")
    table = ScoreTable.load("o.parquet")
    stats = last_layer_stats(*inputs())
    assert table.per_checkpoint["loss"].shape == (3, N)
    torch.testing.assert_close(table.per_checkpoint["loss"][0], stats.loss[0])
    torch.testing.assert_close(table.per_checkpoint["loss"][2], stats.loss[1])


def test_model_mode_equals_file_mode(folder, capsys):
    heads = " ".join(f"--head c{k}.pt" for k in range(3))
    run(capsys, f"score --features F.npy --labels y.npy {heads} -o files.npz")
    points = " ".join(f"--checkpoint c{k}.pt" for k in range(3))
    source = "--model cli_user_module:net --data cli_user_module:data"
    run(capsys, f"score {source} {points} -o model.npz")
    one, other = ScoreTable.load("files.npz"), ScoreTable.load("model.npz")
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-8)
    assert [c["lr"] for c in other.provenance["checkpoints"]] == [1.0, 0.5, 0.25]
    run(capsys, "score --model cli_user_module:ready --data cli_user_module:data -o now.csv")
    assert ScoreTable.load("now.csv").per_checkpoint["score"].shape == (1, N)


def test_safetensors_features_and_ignored_labels(folder, capsys):
    features = torch.from_numpy(np.load("F.npy"))
    save_file({"x": features.bfloat16(), "y": torch.zeros(1)}, "F.safetensors")
    labels = np.load("y.npy").astype(np.uint16)
    labels[7] = 999
    np.save("y16.npy", labels)
    words = SCORE.replace("F.npy", "F.safetensors:x").replace("y.npy", "y16.npy")
    facts = json.loads(run(capsys, words + " --ignore-index 999 --json").out)
    assert (facts["scored"], facts["unscored"]) == (N - 1, 1)
    assert ScoreTable.load("o.parquet").provenance["precision"] == "medium"


def test_nonfinite_rows_can_be_excluded(folder, capsys):
    features = np.load("F.npy")
    features[11] = np.nan
    np.save("F.npy", features)
    run(capsys, SCORE, code=2)
    run(capsys, SCORE + " --nonfinite exclude")
    scores = ScoreTable.load("o.parquet").scores
    assert scores.isnan().nonzero().flatten().tolist() == [11]


def test_features_are_never_written_to(folder, capsys):
    before = Path("F.npy").read_bytes()
    os.chmod("F.npy", 0o400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(capsys, SCORE + " --partition 2")
    assert Path("F.npy").read_bytes() == before


@pytest.fixture
def scored(folder, generator):
    table = ScoreTable(
        torch.randn(20, generator=generator),
        {"el2n": torch.rand(20, generator=generator), "margin": torch.randn(20)},
        {"score": torch.randn(3, 20, generator=generator)},
        index=torch.randperm(60, generator=generator)[:20],
    )
    table.scores[4] = torch.nan
    table.save("s.npz")
    return table


def test_prune_writes_data_set_indices(scored, capsys):
    text = run(capsys, "prune --scores s.npz --keep 0.25 -o kept.npy").out
    best = table_indices(scored, scored.scores.nan_to_num(nan=-9e9), 5)
    assert np.load("kept.npy").tolist() == best and np.load("kept.npy").dtype == np.int64
    assert "kept" in text and "5" in text
    run(capsys, "prune --scores s.npz --keep 25% -o kept.txt --quiet")
    assert [int(line) for line in Path("kept.txt").read_text().split()] == best
    run(capsys, "prune --scores s.npz --keep 5 -o kept.csv")
    lines = Path("kept.csv").read_text().splitlines()
    assert lines[0] == "index,score" and [int(w.split(",")[0]) for w in lines[1:]] == best
    value = {int(w.split(",")[0]): float(w.split(",")[1]) for w in lines[1:]}
    row = scored.index.tolist().index(best[0])
    assert value[best[0]] == pytest.approx(float(scored.scores[row]), rel=1e-7)


def test_the_table_is_an_argument_or_an_option(scored, capsys):
    run(capsys, "prune --scores s.npz --keep 5 -o one.npy")
    run(capsys, "prune s.npz --keep 5 -o other.npy")
    run(capsys, "prune --keep 5 -o third.npy s.npz")
    assert Path("one.npy").read_bytes() == Path("other.npy").read_bytes()
    assert Path("one.npy").read_bytes() == Path("third.npy").read_bytes()
    assert (
        run(capsys, "report s.npz -o plots").out
        == run(capsys, "report --scores s.npz -o plots").out
    )


@pytest.mark.parametrize(
    ("keep", "kept", "said"),
    [
        ("1", 1, "1 sample (a count; 1.0 or 100% keeps all)"),
        ("5", 5, "5 samples (a count)"),
        ("0.5", 10, "the fraction 0.5 of 20"),
        ("1e-1", 2, "the fraction 0.1 of 20"),
        ("25 %", 5, "the fraction 0.25 of 20"),
    ],
)
def test_prune_says_how_it_read_the_share(scored, capsys, keep, kept, said):
    words = ["prune", "s.npz", "--keep", keep, "-o", "kept.npy"]
    assert f"keep          {said}" in run(capsys, words).out
    facts = json.loads(run(capsys, [*words, "--json"]).out)
    assert (facts["keep"], facts["kept"]) == (said, kept) and len(np.load("kept.npy")) == kept
    assert run(capsys, [*words, "--quiet"]).out == ""
    assert f"keep      {said}" in run(capsys, ["report", "s.npz", "--keep", keep, "-o", "r"]).out


def test_a_table_that_low_scores_lead_is_pruned_and_drawn_that_way(scored, capsys, monkeypatch):
    from moso_fast.tables import report as plots

    table = ScoreTable(torch.arange(4.0), index=torch.tensor([8, 6, 4, 2]), higher_is_better=False)
    table.save("low.csv")
    Path("low.csv").rename("moved.csv")
    assert run(capsys, "prune moved.csv --keep 0.5 -o kept.npy").err == ""
    assert np.load("kept.npy").tolist() == [6, 8]
    seen = {}
    monkeypatch.setattr(plots, "score_histogram", lambda _, path, **how: seen.update(how) or path)
    run(capsys, "report moved.csv --keep 0.5 -o r")
    assert seen == {"cut": 1.0, "xlabel": "score (low = keep)"}


def test_warnings_about_a_table_take_one_line_on_stderr(folder, capsys):
    Path("bare.csv").write_text("index,score,file\n3,0.5,a.png\n1,0.25,b.png\n")
    result = run(capsys, "prune bare.csv --keep 1 -o kept.npy --json --quiet")
    lines = result.err.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("moso-fast: warning: bare.csv: ") for line in lines
    )
    assert "'file' holds text" in lines[0] and "high is assumed" in lines[1]
    assert json.loads(result.out)["kept"] == 1 and np.load("kept.npy").tolist() == [3]


def table_indices(table, values, count):
    return sorted(table.index[values.argsort(descending=True)[:count]].tolist())


def test_prune_by_another_column_and_direction(scored, capsys):
    words = "prune --scores s.npz --keep 5 --by el2n --method bottom -o kept.npy --json"
    facts = json.loads(run(capsys, words).out)
    assert np.load("kept.npy").tolist() == table_indices(scored, -scored.metrics["el2n"], 5)
    assert facts["highest_kept"] == pytest.approx(float(scored.metrics["el2n"].sort().values[4]))


def test_prune_balances_by_labels_of_the_data_set(scored, capsys):
    labels = np.arange(60) % 3
    np.save("all.npy", labels)
    words = "prune --scores s.npz --keep 9 --labels all.npy --balance equal -o kept.npy --json"
    facts = json.loads(run(capsys, words).out)
    kept = np.load("kept.npy")
    assert np.bincount(labels[kept]).tolist() == [3, 3, 3]
    assert facts["kept_per_class"] == {"0": 3, "1": 3, "2": 3}


def test_report_draws_what_the_input_allows(scored, capsys):
    facts = json.loads(run(capsys, "report --scores s.npz -o plots --keep 0.5 --json").out)
    names = ["score_histogram.png", "metrics.png", "checkpoints.png"]
    assert facts["wrote"] == [f"plots/{name}" for name in names]
    assert sorted(p.name for p in Path("plots").iterdir()) == sorted(names)
    np.save("images.npy", np.random.default_rng(0).random((60, 5, 5)))
    np.save("wrong.npy", np.arange(60) % 2)
    words = "report --scores s.npz -o more --images images.npy --labels wrong.npy"
    run(capsys, words + " --errors wrong.npy --quiet")
    assert {p.name for p in Path("more").iterdir()} == {*names, "extremes.png", "label_errors.png"}


def test_doctor_knows_every_backend(capsys):
    facts = json.loads(run(capsys, "doctor --json").out)
    assert set(facts["backends"]) == set(moso_fast.backends())
    assert facts["backends"]["torch"]["available"] and facts["problems"] == []
    for entry in facts["backends"].values():
        assert entry["reason"] and (entry["available"] or entry["how"])
    assert facts["packages"]["torch"] and facts["moso_fast"]["version"] == moso_fast.__version__
    text = run(capsys, "doctor").out
    assert all(name in text for name in facts["backends"]) and torch.__version__ in text


def test_doctor_finds_nvcc_where_the_build_does(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    doctor = importlib.import_module("moso_fast.cli.doctor")
    monkeypatch.setattr(doctor, "_USUAL_NVCC", str(nvcc))
    assert doctor._nvcc() == f"{nvcc} (release 13.0)"


def test_doctor_fails_where_the_installation_is_broken(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moso_fast.scorer", None)
    result = run(capsys, "doctor", code=1)
    assert "BROKEN  moso_fast.scorer cannot be imported" in result.out


def test_version_and_help(capsys):
    assert run(capsys, "--version").out == f"moso-fast {moso_fast.__version__}\n"
    for words in ([], ["--help"]):
        text = run(capsys, words).out
        assert all(name in text for name in ("score", "prune", "report", "doctor", "demo"))
    for command in ("score", "prune", "report", "doctor", "demo"):
        assert "--json" in run(capsys, [command, "--help"]).out


def test_app_is_a_typer_application():
    from moso_fast.cli import app

    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and moso_fast.__version__ in result.output


def test_json_is_strict_where_nothing_is_scored(folder, capsys):
    np.save("y.npy", np.full(N, -100))
    facts = json.loads(run(capsys, SCORE + " --json").out)
    assert (facts["scored"], facts["unscored"]) == (0, N) and "score" not in facts


BAD_INPUT = [
    ("foo", "No such command 'foo'"),
    ("score", "Missing option '--output'"),
    (SCORE + " --bogus", "No such option: --bogus"),
    (SCORE + " --seed x", "Invalid value for '--seed'"),
    ("score -o x.parquet", "nothing to score: give --features, --labels and --head"),
    ("score --features F.npy -o o.parquet", "--labels, --head must go with --features"),
    ("score --model m:n -o o.parquet", "--data must go with --model"),
    (SCORE + " --model m:n", "--features and --model exclude each other"),
    (SCORE.replace("F.npy", "no.npy"), "there is no file no.npy"),
    (SCORE.replace("F.npy", "F.txt"), "F.txt must be a .npy or .safetensors file"),
    (SCORE.replace("F.npy", "y.npy"), "features must have shape (N, D), got (90,)"),
    (SCORE.replace("F.npy", "short.npy"), "disagree in D: 6 against 3"),
    (SCORE.replace("y.npy", "few.npy"), "labels must have shape (90,)"),
    (SCORE.replace("y.npy", "bad.npy"), "labels[33] is 99, outside [0, 4)"),
    (SCORE.replace("y.npy", "bad.npy") + " --partition 3", "labels[33] is 99, outside [0, 4)"),
    (SCORE.replace("h0", "no"), "there is no file no.safetensors"),
    (SCORE.replace("h0.safetensors", "h0.safetensors:x"), "no tensor 'x'; there are fc."),
    (SCORE + " --lr 1 --lr 2", "give one --lr for each --head: got 2 for 1"),
    (SCORE + " --lr -1", "--lr must be a number >= 0; got -1.0"),
    (SCORE + " --head c1.pt", "c1.pt states a learning rate and h0.safetensors does not"),
    (SCORE + " --formula x", "formula must be one of moso"),
    (SCORE + " --combine x", "combine must be one of mean, zscore; got 'x'"),
    (SCORE + " --num-steps 0", "num_steps must be"),
    (SCORE + " --partition 0", "parts must be >= 1, got 0"),
    (SCORE + " --partition 60", "every part needs at least 2 samples"),
    (SCORE + " --partition x", "--partition must be a number of parts or an .npy file; got 'x'"),
    (SCORE + " --loss x", "loss must be one of cross_entropy"),
    (SCORE + " --label-smoothing 2", "label_smoothing must be in [0, 1), got 2.0"),
    (SCORE + " --backend x", "backend must be one of auto"),
    (SCORE + " --precision x", "precision must be None or one of highest"),
    (SCORE + " --chunk-size 0", "chunk_size must be"),
    (SCORE + " --nonfinite x", "nonfinite must be one of raise, exclude"),
    (SCORE + " --device x", "--device x cannot be used here"),
    (SCORE.replace("o.parquet", "o.xlsx"), "--output must end in .parquet, .csv, .npz"),
    (SCORE.replace("o.parquet", "no/o.parquet"), "the folder no does not exist"),
    ("score --model cli_user_module --data x:y -o o.npz", "--model must be MODULE:NAME"),
    ("score --model no_such:n --data x:y -o o.npz", "there is no module 'no_such'"),
    ("score --model cli_user_module:no --data x:y -o o.npz", "no 'no' in cli_user_module"),
    ("score --model cli_user_module:data --data x:y -o o.npz", "must give an nn.Module"),
    (
        "score --model cli_user_module:net --data cli_user_module:data --checkpoint no.pt -o o.npz",
        "checkpoint no.pt does not exist",
    ),
    ("prune --scores s.npz --keep 2.0 -o k.npy", "--keep must be a fraction in [0, 1]"),
    ("prune --scores s.npz --keep x -o k.npy", "--keep must be a fraction in [0, 1]"),
    ("prune --scores s.npz --keep 20 -o k.npy", "only 19 of 20 have a score"),
    ("prune --scores s.npz --keep 1 -o k.xyz", "--output must end in .npy, .txt, .csv"),
    ("prune --scores no.npz --keep 1 -o k.npy", "no score table at no.npz"),
    ("prune --scores F.npy --keep 1 -o k.npy", "a score table is a .parquet, .csv, .npz file"),
    ("prune --scores junk.parquet --keep 1 -o k.npy", "junk.parquet is not a score table"),
    ("prune --scores s.npz --keep 1 --balance equal -o k.npy", "--balance equal needs --labels"),
    ("prune --scores s.npz --keep 1 --by x -o k.npy", "no column 'x'; it has score, el2n"),
    ("prune --scores s.npz --keep 1 --method x -o k.npy", "method must be one of top"),
    (
        "prune --scores s.npz --keep 1 --balance equal --labels few.npy -o k.npy",
        "few.npy must hold labels of the whole data set",
    ),
    ("prune --keep 1 -o k.npy", "give the score table: moso-fast prune SCORES ..."),
    ("prune s.npz --scores s.npz --keep 1 -o k.npy", "once: got s.npz and --scores s.npz"),
    ("prune s.npz F.npy --keep 1 -o k.npy", "unexpected extra argument"),
    ("report -o r", "give the score table: moso-fast report SCORES ..."),
    (
        "prune s.npz --keep 1 --balance equal --labels names.npy -o k.npy",
        "names.npy holds <U3, which torch lacks; class names become ids by numpy.unique",
    ),
    ("report --scores s.npz -o F.npy", "--output F.npy is a file; it must be a folder"),
    ("report --scores s.npz -o r --images y.npy", "y.npy must hold (N, H, W)"),
    ("report --scores s.npz -o r --errors few.npy", "few.npy must hold flags"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_gives_2_in_one_line_and_no_file(scored, capsys, words, message):
    features, labels = np.load("F.npy"), np.load("y.npy")
    np.save("short.npy", features[:, :3])
    np.save("few.npy", labels[:3])
    np.save("names.npy", np.array(["cat", "dog"] * 45))
    labels[33] = 99
    np.save("bad.npy", labels)
    Path("junk.parquet").write_text("hello")
    before = {path.name for path in Path().iterdir()}
    result = run(capsys, words, code=2)
    assert message in result.err
    assert result.err.startswith("moso-fast: ") and result.err.count("\n") == 1
    assert result.out == ""
    assert {p.name for p in Path().iterdir() if p.name != "__pycache__"} <= before


def test_other_faults_give_1_and_a_traceback_on_request(folder, capsys):
    words = "score --model cli_user_module:faulty --data cli_user_module:data -o o.npz"
    error = run(capsys, words, code=1).err
    assert error == (
        "moso-fast: ValueError: the user's own fault in two lines (--debug shows the traceback)\n"
    )
    error = run(capsys, words + " --debug", code=1).err
    assert "Traceback" in error and "in faulty" in error
    assert not Path("o.npz").exists()


def test_a_full_disk_leaves_the_old_result(folder, capsys, monkeypatch):
    run(capsys, SCORE)
    before = Path("o.parquet").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "o.parquet")

    monkeypatch.setattr(moso_fast.util.files.os, "replace", full)
    result = run(capsys, SCORE + " --formula alignment", code=2)
    assert result.err == "moso-fast: o.parquet: No space left on device\n"
    assert Path("o.parquet").read_bytes() == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich_the_extra_is_named(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run(capsys, "doctor", code=1)
    assert 'pip install "moso-fast[cli]"' in result.err and result.err.count("\n") == 1


@pytest.mark.exhaustive
def test_exit_codes_reach_the_shell(folder):
    bad = spawn(SCORE + " --formula x", folder)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("moso-fast: formula must be") and bad.stderr.count("\n") == 1
    good = spawn(SCORE, folder)
    assert good.returncode == 0 and good.stderr == "" and "o.parquet" in good.stdout


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs signals")
def test_ctrl_c_gives_130_and_leaves_nothing(folder):
    source = "--model cli_user_module:net --data cli_user_module:interrupting"
    # A test run in a shell's background inherits that SIGINT is ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = spawn(f"score {source} -o o.npz", folder, preexec_fn=listen)
    assert result.returncode == 130
    # Some versions of click end the line of the terminal's ^C themselves.
    assert result.stderr.lstrip("\n") == (
        "moso-fast: interrupted; unfinished results were not written\n"
    )
    assert not (folder / "o.npz").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.exhaustive
def test_a_closed_pipe_is_no_traceback(folder):
    read_end, write_end = os.pipe()
    os.close(read_end)
    root = str(Path(moso_fast.__file__).resolve().parents[1])
    try:
        result = subprocess.run(
            [sys.executable, "-m", "moso_fast.cli", "doctor"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
            timeout=120,
        )
    finally:
        os.close(write_end)
    assert result.returncode == 1 and result.stderr == b""


def test_another_column_keeps_its_direction_in_a_table_that_low_scores_lead(folder, capsys):
    """The table says of its score that low means keep; top of a metric is still its highest."""
    table = ScoreTable(torch.arange(6.0), {"el2n": torch.arange(6.0)}, higher_is_better=False)
    table.save("low.npz")
    for words, kept in (
        ("--by el2n", [4, 5]),
        ("--by el2n --method bottom", [0, 1]),
        ("--by score", [0, 1]),
        ("--by score --method bottom", [4, 5]),
    ):
        run(capsys, f"prune low.npz --keep 2 -o kept.npy {words}")
        assert np.load("kept.npy").tolist() == kept


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("prune s.npz --keep 1 -o k.npy --balance equal --labels {}", "labels"),
        ("report s.npz -o r --labels {}", "labels"),
        ("report s.npz -o r --images {}", "images"),
        ("report s.npz -o r --errors {}", "flags"),
    ],
)
def test_a_file_of_the_data_set_that_is_one_entry_short(scored, capsys, words, what, monkeypatch):
    from moso_fast.tables import report as plots

    drawings = ("score_histogram", "metric_panels", "checkpoint_bands", "extremes")
    for name in (*drawings, "label_error_curve"):
        monkeypatch.setattr(plots, name, lambda *given, **how: Path("r"))
    last = int(scored.index.max())
    entries = np.arange(last + 1) % 2
    if what == "images":
        entries = np.random.default_rng(0).random((last + 1, 4, 4))
    np.save("whole.npy", entries)
    np.save("short.npy", entries[:-1])
    run(capsys, words.format("whole.npy"))
    error = run(capsys, words.format("short.npy"), code=2).err
    said = f"the scores refer to index {last}, the file has {last}"
    assert f"short.npy must hold {what} of the whole data set: {said}" in error


def test_no_image_is_drawn_twice_where_there_are_few(folder, capsys, monkeypatch):
    from moso_fast.tables import report as plots

    np.save("images.npy", np.random.default_rng(0).random((60, 4, 4)))
    given = []
    monkeypatch.setattr(plots, "score_histogram", lambda _, path, **how: path)
    monkeypatch.setattr(
        plots, "extremes", lambda pictures, captions, scores, path: given.append(captions) or path
    )
    for count in (1, 2, 9, 10, 11, 19, 20, 21, 40):
        index = torch.randperm(60, generator=torch.Generator().manual_seed(count))[: count + 1]
        scores = torch.randperm(count + 1, generator=torch.Generator().manual_seed(0)).float()
        scores[count // 2] = torch.nan
        ScoreTable(scores, index=index).save("few.npz")
        run(capsys, "report few.npz --images images.npy -o r")
        order = index[scores.nan_to_num(-1).argsort()[1:]].tolist()
        expected = order if count <= 20 else order[:10] + order[-10:]
        assert sorted(given.pop().tolist()) == sorted(expected)


def test_heads_with_and_without_a_bias_are_scored_apart(folder, capsys):
    """And those of other dtypes: each as if it were the only one."""
    _, weight, _, bias = inputs()
    save_file({"fc.weight": weight[0]}, "plain.safetensors")
    save_file({"fc.weight": weight[1].double(), "fc.bias": bias[1].double()}, "wide.safetensors")
    heads = ["h0", "plain", "h2", "wide"]
    words = "score --features F.npy --labels y.npy -o o.npz " + " ".join(
        f"--head {name}.safetensors" for name in heads
    )
    run(capsys, words)
    found = ScoreTable.load("o.npz").per_checkpoint
    for k, name in enumerate(heads):
        alone = f"score --features F.npy --labels y.npy -o one.npz --head {name}.safetensors"
        run(capsys, alone)
        one = ScoreTable.load("one.npz").per_checkpoint
        for field, values in one.items():
            torch.testing.assert_close(found[field][k], values[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("parts", ["", " --partition 3"])
def test_the_record_says_how_many_samples_count(folder, capsys, parts):
    labels = np.load("y.npy")
    labels[::9] = -100
    np.save("y.npy", labels)
    run(capsys, SCORE + parts)
    origin = ScoreTable.load("o.parquet").provenance
    assert (origin["samples"], origin["counted"]) == (N, int((labels >= 0).sum()))


def test_doctor_names_a_module_that_is_there_and_cannot_be_loaded(capsys, monkeypatch):
    """Not one that was not built: that is no fault of the installation."""
    native = importlib.import_module("moso_fast.util.native")
    absent = native.NativeModule(None, "moso_fast._cuda has not been built", "install a compiler")
    broken = native.NativeModule(None, "moso_fast._cpu cannot be loaded: no symbol", "build again")
    monkeypatch.setattr(native, "load_native", lambda name: absent)
    assert json.loads(run(capsys, "doctor --json").out)["problems"] == []
    monkeypatch.setattr(native, "load_native", {"_cpu": broken, "_cuda": absent}.get)
    facts = json.loads(run(capsys, "doctor --json", code=1).out)
    assert facts["problems"] == ["moso_fast._cpu cannot be loaded: no symbol; build again"]
    assert "BROKEN  moso_fast._cpu cannot be loaded" in run(capsys, "doctor", code=1).out


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("libstdc++.so.6: no such version"), "cannot be loaded: libstdc++.so.6: no"),
        (ModuleNotFoundError("no module 'x'", name="x"), "cannot be loaded: no module 'x'"),
        (ModuleNotFoundError("no such", name="moso_fast._cpu"), None),
    ],
)
def test_a_broken_native_module_is_told_from_one_that_is_absent(monkeypatch, error, reason):
    native = importlib.import_module("moso_fast.util.native")

    def fails(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)
    found = native.load_native.__wrapped__("_cpu")
    assert found.module is None and found.how
    assert ("cannot be loaded" in found.reason) == (reason is not None)
    assert reason is None or f"moso_fast._cpu {reason}" in found.reason


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--loss x", "loss must be one of"),
        ("--label-smoothing 2", "label_smoothing must be in"),
        ("--precision x", "precision must be None or one of"),
        ("--nonfinite x", "nonfinite must be one of"),
        ("--formula x", "formula must be one of"),
        ("--combine x", "combine must be one of"),
        ("--num-steps 0", "num_steps must be"),
        ("--ignore-index 9223372036854775808", "ignore_index must fit 64 bits"),
    ],
)
@pytest.mark.parametrize("missing", ["F.npy", "y.npy", "h0.safetensors"])
def test_a_bad_option_is_found_before_any_file_is_opened(folder, capsys, option, message, missing):
    Path(missing).unlink()
    assert message in run(capsys, f"{SCORE} {option}", code=2).err
